"""CoreML: an ML program for Apple's devices; written anywhere, run on macOS.

The exported program is converted by coremltools to an ML package for iOS 17 and macOS 14 or later,
computing in 32-bit floats. A package is a folder; here it is one file, a zip of that folder, which
Xcode and macOS open after unpacking. Running it needs macOS, where CoreML is part of the system;
`load` refuses elsewhere.

Weights of a quantized network stay 8-bit integers in the package (`constexpr_affine_dequantize`),
and its roundings become CoreML's `quantize` and `dequantize`. Weights in groups of fewer bits are
stored as one byte each, and made floats by arithmetic. Whether an Apple device computes in integers
is the system's choice, and was not measured here.
"""

import contextlib
import io
import json
import logging
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.model import Inputs
from tersor.core.pieces import in_pieces
from tersor.core.runtime import Arrays, Runner, Runtime, Target
from tersor.core.sniffing import zip_problem

_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The first moment that a zip file can name: the same network gives the same bytes."""


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.mlpackage.zip`.

    Raises:
        TargetError: an operator that coremltools does not convert.
    """
    from tersor.ops.exported_names import output_names

    program = _plain_program(net, inputs)
    with _quiet():
        import coremltools

        try:
            made = coremltools.convert(
                program,
                outputs=[coremltools.TensorType(name=name) for name in output_names(net)],
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
            )
        except Exception as error:
            raise TargetError(f"CoreML cannot take the network: {_reason(error)}") from error
        # when and with which versions it was made says nothing about the network
        made.user_defined_metadata.clear()
        with tempfile.TemporaryDirectory(prefix="tersor-") as aside:
            package = Path(aside) / "model.mlpackage"
            made.save(str(package))
            file = folder / "model.mlpackage.zip"
            file.write_bytes(_zipped(package))
    return [file]


def load(path: Path, target: Target) -> Runner:
    """Load the package in CoreML, which chooses among processor, GPU and neural engine.

    Raises:
        TargetError: this is no macOS, or the file is damaged.
    """
    if sys.platform != "darwin":
        raise TargetError(
            "CoreML models run on macOS only. Here the file can be written, not run or measured; "
            "give the same command on a Mac"
        )
    if target.threads:
        raise TargetError("CoreML chooses its threads by itself; leave threads out")
    with _quiet():
        import coremltools

        units = coremltools.ComputeUnit
        aside = tempfile.TemporaryDirectory(prefix="tersor-")
        try:
            if problem := zip_problem(path):
                raise ValueError(f"it {problem}")
            with zipfile.ZipFile(path) as zipped:
                zipped.extractall(aside.name)
            model = coremltools.models.MLModel(
                str(Path(aside.name) / "model.mlpackage"),
                compute_units=units.CPU_ONLY if target.device == "cpu" else units.ALL,
            )
            description = model.get_spec().description
        except Exception as error:
            aside.cleanup()
            raise TargetError(f"CoreML cannot load {path.name}: {_reason(error)}") from error
    shapes = {each.name: tuple(each.type.multiArrayType.shape) for each in description.input}
    runner = _Runner(model, aside, shapes)
    return in_pieces(runner, shapes)


class _Runner:
    """A loaded package; its folder goes with it."""

    def __init__(self, model: Any, aside: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model, self.aside, self.shapes = model, aside, shapes

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        # CoreML has no 64-bit integers
        bound = {
            name: np.ascontiguousarray(a, dtype=np.int32 if a.dtype.kind in "iub" else np.float32)
            for name, a in ((name, inputs[name]) for name in self.shapes)
        }

        def call() -> Arrays:
            try:
                return {n: np.asarray(a) for n, a in self.model.predict(bound).items()}
            except Exception as error:
                raise TargetError(f"CoreML failed while running: {_reason(error)}") from error

        return call

    def close(self) -> None:
        del self.model
        self.aside.cleanup()


def _plain_program(net: Any, inputs: Inputs) -> Any:
    """Decompose to the operators that coremltools knows; groups of weights become floats."""
    from tersor.ops.plain_rounding import without_quantized

    program = without_quantized(net, groups_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = program.run_decompositions({})
    program._example_inputs = ((), dict(inputs.example))
    return program


def _zipped(package: Path) -> bytes:
    """Put a package into a zip without its random names, dates and debug information."""
    manifest = json.loads((package / "Manifest.json").read_text(encoding="utf-8"))
    names = sorted(manifest["itemInfoEntries"].items(), key=lambda each: each[1]["path"])
    fixed = {old: f"00000000-0000-4000-8000-{i:012d}" for i, (old, _) in enumerate(names)}
    manifest["itemInfoEntries"] = {fixed[old]: entry for old, entry in names}
    manifest["rootModelIdentifier"] = fixed[manifest["rootModelIdentifier"]]
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    from coremltools.proto import Model_pb2

    program = package / "Data/com.apple.CoreML/model.mlmodel"
    parsed = Model_pb2.Model.FromString(program.read_bytes())
    program.write_bytes(parsed.SerializeToString(deterministic=True))
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as zipped:
        for file in sorted(package.rglob("*")):
            if file.is_file():
                where = f"model.mlpackage/{file.relative_to(package).as_posix()}"
                zipped.writestr(zipfile.ZipInfo(where, _LONG_AGO), file.read_bytes())
    return made.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence coremltools, which shows its progress and what it was not tested with."""
    log = logging.getLogger("coremltools")
    before = log.level
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            log.setLevel(logging.CRITICAL)
            with contextlib.redirect_stdout(io.StringIO()):
                yield
    finally:
        log.setLevel(before)


def _reason(error: Exception) -> str:
    """Keep the line of coremltools' message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^-=")]
    named = [
        line for line in lines if re.search("not (implemented|supported)|unsupported", line, re.I)
    ]
    return (named or lines[-1:] or [type(error).__name__])[0][:300]


RUNTIME = Runtime(
    takes="exported",
    devices=("cpu", "all"),
    export=export,
    load=load,
    fixed_batch=True,
    system="darwin",
    to_export=("torch", "coremltools"),
    to_run=("coremltools",),
)
