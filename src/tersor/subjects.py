"""What can be measured: an artifact, its directory, or a bare model file; and inputs for it."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.errors import DataError, ModelError, TargetError
from tersor.core.manifest import MANIFEST
from tersor.core.packing import is_packed, unpacked
from tersor.core.remote import Child, ChildError, signatures, usable_memory
from tersor.core.runtime import Arrays, Runner, Signature, Target
from tersor.core.schema import to_plain
from tersor.core.sniffing import foreign, sniff

_log = logging.getLogger("tersor")
TRIAL_S = 120.0
"""Longest time that reading, loading or running a file that is no artifact may take at first."""


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
            return self.artifact.load(device=self.target.device, options=self.target.options)
        runtime = plugins.runtime(self.target.runtime)
        plugins.check_device(self.target)
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
        subject: An Artifact, its directory, or a model file (.onnx, .xml, .pt2 ...).
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
            f"{str(subject.path)!r} was made for {subject.target.text}, not for {target.text}; "
            f"leave the target out, or compress again with --target {target.text}"
        )
    chosen = subject.target
    if target is not None:
        chosen = replace(target, options={**chosen.options, **target.options})
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


def on_disk(subject: str | Path) -> bool:
    """Tell whether something runs as it lies there: an artifact's folder, or a model file."""
    path = Path(subject)
    return path.is_dir() or path.suffix in suffixes() or is_packed(path)


def suffixes() -> dict[str, str]:
    """Map the endings of model files to the runtime that runs them where none is named."""
    found: dict[str, str] = {}
    for name in plugins.names("runtimes"):
        for suffix in plugins.own_runtime(name).suffixes:
            found.setdefault(suffix, name)
    return found


def _bare(path: Path, target: Target | None, threads: int | None) -> Place:
    if is_packed(path):
        with unpacked(path) as inner:
            if inner.suffix not in suffixes():
                raise ModelError(
                    f"{path.name!r} holds {inner.name!r}, which cannot be run without its "
                    "artifact; give the artifact's folder"
                )
            found = _bare(inner, target, threads)
        return replace(found, name=str(path), files=(path,))
    kind = sniff(path)
    if kind in ("empty", "html", "lfs", "pickle") or (kind and path.suffix == ".onnx"):
        raise ModelError(f"{path.name!r} {foreign(path)}")
    known = suffixes()
    if target is None:
        if path.suffix not in known:
            raise ModelError(
                f"{path.name!r} is neither an artifact nor a model file that tersor runs "
                f"({', '.join(known)})"
            )
        target = Target(runtime=known[path.suffix])
    target = _threaded(target, threads)
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    if path.suffix == ".onnx":
        beside = [f for f in (path.with_name(path.name + ".data"),) if f.is_file()]
    plugins.check_device(target)
    _check_ending(path, target.runtime)
    place = Place(name=str(path), target=target, files=(path, *beside), inputs={})
    runtime = plugins.runtime(target.runtime)
    plugins.require("runtimes", target.runtime, runtime.to_run)
    assert runtime.inputs is not None
    if plugins.own_runtime(target.runtime).native:
        place = _tried(place)
        _tell_faults(path)
        return place
    read = runtime.inputs
    return replace(place, inputs=what_it_takes(path, lambda: read(path)))


def _tell_faults(path: Path) -> None:
    """Warn of what compress refuses in a file that runs all the same, such as a scale of 0."""
    if path.suffix != ".onnx" or not plugins.installed("onnx"):
        return
    check = plugins.source("onnx").check
    assert check is not None
    try:
        check(path)
    except ModelError as error:
        _log.warning("warning: %s", error)


def _check_ending(path: Path, name: str) -> None:
    """Refuse a file of other runtimes than the one that is asked for.

    Raises:
        ModelError: saying which run it.
    """
    asked = plugins.own_runtime(name)
    able = [n for n in plugins.names("runtimes") if path.suffix in plugins.own_runtime(n).suffixes]
    instead = f", or measure this file on {' or '.join(able)}" if able else ""
    if asked.inputs is None:
        raise ModelError(
            f"{name} runs artifacts only, not {path.name!r}: the file does not say what it takes, "
            f"or is code; compress to this target, and give the artifact{instead}"
        )
    if able and name not in able:
        raise ModelError(
            f"{name} runs {', '.join(asked.suffixes)} files, not {path.name!r}; compress to "
            f"this target, and give the artifact{instead}"
        )


def what_it_takes(
    path: Path, read: Callable[[], Mapping[str, Signature]]
) -> Mapping[str, Signature]:
    """Read what a file takes; one that its runtime cannot read is the file's fault.

    Raises:
        ModelError: names the file, and says what the runtime did.
    """
    try:
        return read()
    except ChildError:
        raise
    except TargetError as error:
        named = str(error) if path.name in str(error) else f"{path.name}: {error}"
        raise ModelError(named) from error


def _tried(found: Place) -> Place:
    """Let a child process read, load and run a file that nobody vouches for, within a budget.

    Raises:
        ModelError: it crashes, or takes too long. TersorError: what the runtime says of it.
    """
    name, path = found.target.runtime, found.files[0]
    child = Child(name, plugins.interpreter(name), memory_bytes=usable_memory())
    about = {"file": str(path.resolve()), "target": to_plain(found.target)}
    try:
        found = replace(
            found,
            inputs=what_it_takes(
                path,
                lambda: signatures(child.ask("inputs", seconds=TRIAL_S, file=about["file"])),
            ),
        )
        child.ask("load", seconds=TRIAL_S, **about)
        fixed = [s.shape[0] for s in found.inputs.values() if s.shape and s.shape[0] != "batch"]
        batch = next((size for size in fixed if isinstance(size, int)), 1)
        with contextlib.suppress(DataError):  # a free size that only data can tell
            (arrays,) = made_inputs(found, batch, count=1)
            call = child.ask("bind", arrays, seconds=TRIAL_S).fields["call"]
            child.ask("time", seconds=TRIAL_S, call=call)
    except ChildError as error:
        raise ModelError(
            f"{path.name}: {error} on a first try in a process of its own; the file is damaged, "
            "or needs more than this machine has"
        ) from error
    finally:
        child.close()
    return found


def _threaded(target: Target, threads: int | None) -> Target:
    if threads is None:
        return target
    return replace(target, options={**target.options, "threads": threads})


def _from_manifest(entry: Mapping[str, Any]) -> Signature:
    free = {int(axis): word for axis, word in entry.get("dynamic", {}).items()}
    shape = tuple(free.get(axis, size) for axis, size in enumerate(entry["shape"]))
    return Signature(shape=shape, dtype=entry["dtype"], usual=tuple(entry["shape"]))


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
