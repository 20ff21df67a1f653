"""An ONNX file, read without trusting anything in it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from tersor.core.errors import ModelError
from tersor.core.model import Inputs, Model, Source
from tersor.core.sniffing import foreign
from tersor.sources._onnx_data import check_tensors, check_values, embed_external
from tersor.sources._onnx_memory import check_memory
from tersor.sources._onnx_structure import check_loops, check_structure, check_text, check_versions

if TYPE_CHECKING:
    import torch

_LARGEST = (2 << 30) - 1
_FREE_SIZE = 16
"""Example size of a free dimension that is not the batch."""
_LARGEST_EXAMPLE = 1 << 28


def load(place: str, *, weights: Path | None = None, partial: bool = False) -> Model:
    """Read an ONNX model; external data are brought in.

    Args:
        place: The .onnx file.
        weights: Must be None: the file holds its weights.
        partial: Has no meaning here.

    Raises:
        ModelError: damaged, unsafe, too new, too large to run, or with NaN or infinite weights.
    """
    del partial
    file = Path(place)
    if weights is not None:
        raise ModelError(f"ONNX model {place!r} holds its own weights; leave --weights out")
    reason = foreign(file)
    if reason:
        raise ModelError(f"ONNX model {place!r} {reason}")
    try:
        model, notes = _read(file)
        inputs = _inputs(model)
        _check_rest(model)
    except ModelError as error:
        raise ModelError(f"ONNX model {place!r}: {error}") from error
    return Model(net=model, form="onnx", origin=f"onnx:{place}", inputs=inputs, notes=notes)


def check(file: Path) -> None:
    """Refuse what `load` refuses in a file, without torch.

    Raises:
        ModelError: damaged, unsafe, too new, too large to run, or with NaN or infinite weights.
    """
    try:
        model, _ = _read(file)
        _check_rest(model)
    except ModelError as error:
        raise ModelError(f"ONNX model {str(file)!r}: {error}") from error


def _read(file: Path) -> tuple[Any, tuple[str, ...]]:
    size = file.stat().st_size
    if size > _LARGEST:
        raise ModelError(
            f"it has {size / 2**30:.1f} GiB, but a protobuf file can have 2; save it with external "
            "data: onnx.save(model, FILE, save_as_external_data=True)"
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # DecodeError, of whichever protobuf is installed
        raise ModelError(
            f"its {size} bytes are not an ONNX model: cut off while it was copied, or damaged"
        ) from error
    check_text(model)
    check_versions(model)
    check_structure(model)
    check_tensors(model)
    notes = embed_external(model, file.resolve().parent)
    check_values(model)
    check_loops(model)
    check_memory(model)
    return model, notes


def _check_rest(model: Any) -> None:
    """Let onnx check attributes and types, on what it can take in one piece."""
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGEST - (64 << 20):
        return
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ModelError(" ".join(lines[:2])[:300]) from error


def _inputs(model: Any) -> Inputs:
    """Make an example batch of two from the signature: random floats, zeros else."""
    stored = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in stored]
    if not values:
        raise ModelError("it has no inputs")
    rng = np.random.default_rng(0)
    example, dynamic, total = {}, {}, 0
    for value in values:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type == onnx.TensorProto.STRING:
            raise ModelError(f"input {value.name!r} is no tensor of numbers")
        if not kind.HasField("shape"):
            raise ModelError(f"input {value.name!r} has no shape; export it again with one")
        free = {
            axis: dim.dim_param or ("batch" if axis == 0 else f"{value.name}_{axis}")
            for axis, dim in enumerate(kind.shape.dim)
            if dim.dim_value == 0  # unset, or the 0 of older exporters
        }
        shape = [
            (2 if axis == 0 else _FREE_SIZE) if axis in free else dim.dim_value
            for axis, dim in enumerate(kind.shape.dim)
        ]
        total += math.prod(shape)
        if any(n < 0 for n in shape) or total > _LARGEST_EXAMPLE:
            raise ModelError(f"input {value.name!r} has an impossible shape: {shape[:8]}")
        example[value.name] = _example(kind.elem_type, shape, rng, value.name)
        if free:
            dynamic[value.name] = free
    return Inputs(example=example, dynamic=dynamic)


def _example(kind: int, shape: list[int], rng: np.random.Generator, name: str) -> "torch.Tensor":
    import torch

    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    except (KeyError, ValueError):
        raise ModelError(f"input {name!r} has the unknown type {kind}") from None
    if np.issubdtype(dtype, np.floating):
        return torch.from_numpy(rng.standard_normal(shape).astype(dtype))
    try:
        return torch.from_numpy(np.zeros(shape, dtype))
    except TypeError:
        raise ModelError(f"input {name!r} has type {dtype}, which torch does not have") from None


SOURCE = Source(load=load, suffixes=(".onnx",), check=check)
