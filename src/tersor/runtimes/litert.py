"""LiteRT, formerly TensorFlow Lite, on the CPU with XNNPACK.

Networks that `static` quantized become integer operators: convolutions, additions, pooling and
what merely moves numbers take and give int8 codes. Linear layers whose output stays in float, as
`static` leaves them, and those of `dynamic` multiply in integers, too; their input is rounded once
more, with a scale of each row. Weights of other layers that compute in float (transposed
convolutions, those whose output leaves the network), and of `weight_only` with 8 bits and `half`
with fp16, are stored in few bits and unpacked when the file is loaded. A file takes batches of one
size; int64 inputs and outputs are int32 in it.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs
from tersor.core.pieces import in_pieces
from tersor.core.runtime import Arrays, Runner, Runtime, Signature, Target
from tersor.core.sniffing import foreign

_NARROWER = {np.dtype(np.int64): np.dtype(np.int32), np.dtype(np.float64): np.dtype(np.float32)}


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.tflite`."""
    from tersor.runtimes._litert_file import finish
    from tersor.runtimes._litert_program import prepared

    module, kept = prepared(net)
    file = folder / "model.tflite"
    with _quiet():
        import litert_torch
        import torch

        try:
            with torch.no_grad():
                made = litert_torch.convert(
                    module,
                    sample_kwargs=dict(inputs.example),
                    quant_config=_integers(),
                )
            made.export(str(file))
        except Exception as error:
            raise TargetError(f"LiteRT cannot take the network: {_plain(error)}") from error
    finish(file, kept, {n: str(t.numpy().dtype) for n, t in inputs.example.items()})
    return [file]


def _integers() -> Any:
    """Ask the converter to make integer operators of roundings.

    Its public constructor wants the quantizer of PyTorch that made the network; only the kind of
    quantization is read from it.
    """
    from litert_torch.quantize.pt2e_quantizer import (
        PT2EQuantizer,
        get_symmetric_quantization_config,
    )
    from litert_torch.quantize.quant_config import QuantConfig

    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config())
    return QuantConfig(pt2e_quantizer=quantizer)


def load(path: Path, target: Target) -> Runner:
    """Load a file, with XNNPACK for the operators that it has."""
    return _runner(path, target.threads or usable_cores())


def inputs(path: Path) -> Mapping[str, Signature]:
    """Read what a file takes; sizes that may change are words."""
    made = {}
    for name, about in _named(_interpreter(path, 1), "inputs").items():
        free = list(about["shape_signature"]) if len(about["shape_signature"]) else about["shape"]
        shape = tuple(
            ("batch" if axis == 0 else f"{name}_{axis}") if size < 0 else int(size)
            for axis, size in enumerate(free)
        )
        usual = tuple(int(size) for size in about["shape"])
        made[name] = Signature(shape=shape, dtype=np.dtype(about["dtype"]).name, usual=usual)
    return made


def _runner(path: Path, threads: int) -> Runner:
    runner = _Runner(_interpreter(path, threads))
    fixed = {
        name: [int(size) for size in about["shape"]]
        for name, about in runner.inputs.items()
        if len(about["shape"])
        and (not len(about["shape_signature"]) or about["shape_signature"][0] > 0)
    }
    return in_pieces(runner, fixed)


def _interpreter(path: Path, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    reason = foreign(path, "a TFLite file")
    if reason:
        raise TargetError(f"{path.name} {reason}")
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        raise TargetError(f"LiteRT cannot load {path.name}: {_plain(error)}") from error
    return interpreter


def _named(interpreter: Any, side: str) -> dict[str, Any]:
    """Map names of inputs or outputs to what the interpreter says of their tensors."""
    details = getattr(interpreter, f"get_{side[:-1]}_details")()
    signatures = interpreter._get_full_signature_list()
    if len(signatures) != 1:  # without one, tensors' own names
        return {about["name"]: about for about in details}
    called = next(iter(signatures.values()))[
        side
    ]  # by name; the network's order is that of details
    return {name: about for about in details for name, i in called.items() if i == about["index"]}


class _Runner:
    """An interpreter, whose tensors are resized to the inputs that come."""

    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter
        self.inputs = _named(interpreter, "inputs")
        self.outputs = {n: about["index"] for n, about in _named(interpreter, "outputs").items()}

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        kept = {
            about["index"]: _fitting(name, inputs[name], np.dtype(about["dtype"]))
            for name, about in self.inputs.items()
        }

        def call() -> Arrays:
            try:
                self._size(kept)
                for index, array in kept.items():
                    self.interpreter.set_tensor(index, array)
                self.interpreter.invoke()
                return {n: self.interpreter.get_tensor(i) for n, i in self.outputs.items()}
            except (RuntimeError, ValueError) as error:
                raise TargetError(f"LiteRT failed while running: {_plain(error)}") from error

        return call

    def _size(self, kept: Mapping[int, np.ndarray]) -> None:
        other = {
            about["index"]: kept[about["index"]].shape
            for about in self.inputs.values()
            if tuple(about["shape"]) != kept[about["index"]].shape
        }
        if other:
            for index, shape in other.items():
                self.interpreter.resize_tensor_input(index, shape, strict=True)
            self.interpreter.allocate_tensors()
            self.inputs = _named(self.interpreter, "inputs")

    def close(self) -> None:
        del self.interpreter


def _fitting(name: str, array: np.ndarray, wanted: np.dtype[Any]) -> np.ndarray:
    """Return a copy of the type that the file takes: 64 bits become 32."""
    if array.dtype == wanted:
        return np.array(array)
    if _NARROWER.get(array.dtype) != wanted:
        raise TargetError(f"input {name!r} is {array.dtype}, but the file takes {wanted}")
    if array.dtype == np.int64 and array.size:
        bounds = np.iinfo(np.int32)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise TargetError(f"input {name!r} has numbers that do not fit into 32 bits")
    return array.astype(wanted)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter, which prints its progress and warns of what does not matter here."""
    log = logging.getLogger()
    level = log.level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def _plain(error: Exception) -> str:
    """Say what the converter or the interpreter said, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if found := line.partition("Lowering not found: ")[2]:
            return f"it has no operator {found!r}"
    return " ".join(lines[:2])[:300] or type(error).__name__


RUNTIME = Runtime(
    takes="exported",
    devices=("cpu",),
    export=export,
    load=load,
    inputs=inputs,
    suffixes=(".tflite",),
    fixed_batch=True,
    weights=("fp16",),
    to_export=("torch", "litert_torch"),
    to_run=("ai_edge_litert",),
)
