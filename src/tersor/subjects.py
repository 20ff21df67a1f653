"""What can be measured: an artifact, its directory, or a bare model file; and inputs for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.errors import DataError, ModelError, TargetError, suggest
from tersor.core.manifest import MANIFEST
from tersor.core.packing import is_packed, unpacked
from tersor.core.runtime import Arrays, Runner, Target

RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch_export"}
"""The runtime of a bare model file where no target is given."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One input of a network."""

    shape: tuple[int | str, ...]
    """A word where the size is free; the first one is then the batch."""
    dtype: str
    """numpy's name."""
    usual: tuple[int, ...] | None = None
    """A shape it was called with."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A network on disk, and the target it is measured on."""

    name: str
    """As it was given."""
    target: Target
    files: tuple[Path, ...]
    """The first one is loaded."""
    inputs: Mapping[str, Signature]
    artifact: Artifact | None = None

    def load(self) -> Runner:
        """Load the network.

        Raises:
            ArtifactError: altered. DependencyError: the runtime is missing. TargetError: refused.
        """
        if self.artifact is not None:
            return self.artifact.load(device=self.target.device, threads=self.target.threads)
        runtime = plugins.runtime(self.target.runtime)
        if self.target.device not in runtime.devices:
            raise TargetError(
                f"runtime {self.target.runtime!r} has no device {self.target.device!r}."
                f"{suggest(self.target.device, runtime.devices)} "
                f"It has {', '.join(runtime.devices)}"
            )
        plugins.require("runtimes", self.target.runtime, runtime.to_run)
        return runtime.open(self.files[0], self.target)

    def net(self) -> Any:
        """Read the network into memory, for metrics that look inside.

        Raises:
            ModelError: the file is of a kind that cannot be looked into.
        """
        with unpacked(self.files[0]) as file:
            source = {".onnx": "onnx", ".pt2": "exported"}.get(file.suffix)
            if source is None:
                raise ModelError(
                    f"{file.name} cannot be looked into; ask for parameters and macs of the "
                    "network it was made from, or of a .onnx or .pt2 file"
                )
            return plugins.source(source).load(str(file)).net


def place(
    subject: Artifact | str | Path, *, target: Target | None = None, threads: int | None = None
) -> Place:
    """Find out what `subject` is.

    Args:
        subject: An Artifact, its directory, or a model file (.onnx, .xml, .pt2).
        target: Where to run a bare file; an artifact has its own.
        threads: Instead of the target's; 0 means all usable cores.

    Raises:
        ModelError: there is nothing, or nothing that can be run.
        TargetError: another runtime is asked of an artifact than it was made for.
    """
    if not isinstance(subject, Artifact):
        path = Path(subject)
        if path.is_file() and path.name != MANIFEST:
            return _bare(path, target, threads)
        if not path.exists():
            raise ModelError(f"{str(subject)!r} does not exist; give an artifact or a model file")
        subject = Artifact.open(path.parent if path.name == MANIFEST else path)
    if target is not None and target.runtime != subject.target.runtime:
        raise TargetError(
            f"{str(subject.path)!r} was made for {subject.target}, not for {target}; "
            f"leave the target out, or compress again with --target {target}"
        )
    chosen = subject.target if target is None else replace(subject.target, device=target.device)
    raw = subject.manifest.get("inputs", {})
    return Place(
        name=str(subject.path),
        target=_threaded(chosen, threads),
        files=subject.model_files,
        inputs={name: _from_manifest(entry) for name, entry in raw.items()},
        artifact=subject,
    )


def made_inputs(found: Place, batch: int, count: int = 16, seed: int = 0) -> list[Arrays]:
    """Make input batches from a signature: normal random floats, integers 0 and 1.

    Raises:
        DataError: a size other than the batch is free and nothing tells it, or the batch is fixed.
    """
    rng = np.random.default_rng(seed)
    shapes = {
        name: _sized(found, name, signature, batch) for name, signature in found.inputs.items()
    }
    if not shapes:
        raise DataError(f"{found.name} does not say what its inputs are; give data")
    return [
        {name: _random(rng, shape, found.inputs[name].dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def fitting(found: Place, batches: Sequence[Arrays]) -> list[Arrays]:
    """Give batches the names of a network's inputs; a single input takes a single array.

    Raises:
        DataError: the names do not fit.
    """
    wanted, given = list(found.inputs), list(batches[0])
    if not wanted or set(wanted) <= set(given):
        return [{name: b[name] for name in wanted or given} for b in batches]
    if len(wanted) == len(given) == 1:
        return [{wanted[0]: b[given[0]]} for b in batches]
    raise DataError(
        f"{found.name} takes the inputs {', '.join(wanted)}; the batches hold {', '.join(given)}"
    )


def _bare(path: Path, target: Target | None, threads: int | None) -> Place:
    if is_packed(path):
        with unpacked(path) as inner:
            if inner.suffix not in RUNTIMES:
                raise ModelError(
                    f"{path.name!r} holds {inner.name!r}, which cannot be run without its "
                    "artifact; give the artifact's folder"
                )
            found = _bare(inner, target, threads)
        return replace(found, name=str(path), files=(path,))
    if target is None:
        if path.suffix not in RUNTIMES:
            raise ModelError(
                f"{path.name!r} is neither an artifact nor a model file that tersor runs "
                f"({', '.join(RUNTIMES)})"
            )
        target = Target(runtime=RUNTIMES[path.suffix])
    target = _threaded(target, threads)
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    if path.suffix == ".onnx":
        beside = [f for f in (path.with_name(path.name + ".data"),) if f.is_file()]
    files = (path, *beside)
    return Place(name=str(path), target=target, files=files, inputs=_signature(path))


def _threaded(target: Target, threads: int | None) -> Target:
    if threads is None:
        return target
    return replace(target, options={**target.options, "threads": threads})


def _from_manifest(entry: Mapping[str, Any]) -> Signature:
    free = {int(axis): word for axis, word in entry.get("dynamic", {}).items()}
    shape = tuple(free.get(axis, size) for axis, size in enumerate(entry["shape"]))
    return Signature(shape=shape, dtype=entry["dtype"], usual=tuple(entry["shape"]))


def _signature(path: Path) -> dict[str, Signature]:
    """Read the inputs of a model file through the runtime that is installed for it."""
    if path.suffix == ".pt2":
        inputs = plugins.source("exported").load(str(path)).inputs
        assert inputs is not None
        return {
            name: Signature(
                shape=tuple(inputs.dynamic.get(name, {}).get(i, n) for i, n in enumerate(t.shape)),
                dtype=str(t.dtype).removeprefix("torch."),
                usual=tuple(t.shape),
            )
            for name, t in inputs.example.items()
        }
    if path.suffix == ".onnx" and plugins.installed("onnxruntime"):
        return _of_onnx(path)
    plugins.require("runtimes", "openvino", ("openvino",))
    return _of_openvino(path)


def _of_onnx(path: Path) -> dict[str, Signature]:
    import onnxruntime

    names = {"float": "float32", "double": "float64"}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0].split(" : ")[-1][:300]
        raise ModelError(f"ONNX Runtime cannot load {path.name}: {reason}") from error
    found = {}
    for each in session.get_inputs():
        kind = each.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(
            n if isinstance(n, int) else str(n or f"axis {i}") for i, n in enumerate(each.shape)
        )
        found[each.name] = Signature(shape=shape, dtype=names.get(kind, kind))
    return found


def _of_openvino(path: Path) -> dict[str, Signature]:
    import openvino

    try:
        model = openvino.Core().read_model(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1][:300]
        raise ModelError(f"OpenVINO cannot read {path.name}: {reason}") from error
    return {
        port.get_any_name(): Signature(
            shape=tuple(
                n.get_length() if n.is_static else f"axis {i}"
                for i, n in enumerate(port.get_partial_shape())
            ),
            dtype=str(port.get_element_type().to_dtype()),
        )
        for port in model.inputs
    }


def _sized(found: Place, name: str, signature: Signature, batch: int) -> tuple[int, ...]:
    shape = list(signature.shape)
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            continue
        if axis == 0:
            shape[0] = batch
        elif signature.usual is not None:
            shape[axis] = signature.usual[axis]
        else:
            raise DataError(
                f"input {name!r} of {found.name} has a free size {size!r}; give data that fit"
            )
    sizes = tuple(int(size) for size in shape)
    if isinstance(signature.shape[0] if signature.shape else "", int) and sizes[0] != batch:
        raise DataError(
            f"input {name!r} of {found.name} has a fixed batch of {sizes[0]}; "
            f"ask for --batch {sizes[0]} instead of {batch}"
        )
    return sizes


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.standard_normal(shape).astype(kind)
    return rng.integers(0, 2, size=shape).astype(kind)
