"""Check every tensor of an ONNX model, and bring external data in from beside the model only."""

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper

from tersor.core.errors import ModelError
from tersor.sources._misfit import shorten

_BITS = {
    **dict.fromkeys(
        (TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64, TensorProto.COMPLEX64), 64
    ),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys(
        (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16, TensorProto.UINT16), 16
    ),
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), 8),
    **dict.fromkeys((TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ), 8),
    **dict.fromkeys((TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ), 8),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
    TensorProto.COMPLEX128: 128,
    **{
        getattr(TensorProto, name): bits
        for name, bits in (("INT2", 2), ("UINT2", 2), ("FLOAT8E8M0", 8))
        if hasattr(TensorProto, name)
    },
}
_FIELDS = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}
_RANGES = {
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-(2**15), 2**15 - 1),
    TensorProto.UINT16: (0, 2**16 - 1),
}
_KNOWN_KEYS = {"location", "offset", "length", "checksum", "basepath"}
_LARGEST_RANK = 64
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def tensors(model: ModelProto) -> Iterator[tuple[str, Any]]:
    """Yield every tensor of a model, also those inside attributes, subgraphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)
        for attribute in function.attribute_proto:
            yield from _attribute_tensors(attribute, function.name)


def check_tensors(model: ModelProto) -> None:
    """Refuse tensors whose shape and data do not belong together.

    Raises:
        ModelError: naming the tensor.
    """
    for name, tensor in tensors(model):
        reason = _wrong(tensor)
        if reason:
            raise ModelError(f"tensor {name!r} {reason}")


def check_values(model: ModelProto) -> None:
    """Refuse NaN and infinite weights, and scales of quantized tensors that are not positive.

    Raises:
        ModelError: naming the tensors.
    """
    bad = [name for name, tensor in tensors(model) if not _finite(tensor)]
    if bad:
        raise ModelError(
            f"NaN or infinite values in {len(bad)} tensor{'s' * (len(bad) > 1)}: {shorten(bad)}; "
            "train or repair the network first, compressing it would hide the damage"
        )
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 1:
            scale = named.get(node.input[1])
            if (
                scale is not None
                and not (numpy_helper.to_array(scale).astype(np.float64) > 0).all()
            ):
                raise ModelError(
                    f"scale {scale.name!r} of node {node.name or node.op_type!r} is not positive"
                )


def embed_external(model: ModelProto, folder: Path) -> tuple[str, ...]:
    """Read external data into the model, from plain files beside or below it only.

    Args:
        model: Changed in place: no tensor is external afterwards.
        folder: Where the model's file is.

    Returns:
        Warnings about keys that mean nothing.

    Raises:
        ModelError: naming the tensor and what is wrong with the place of its data.
    """
    notes: list[str] = []
    taken: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        unknown = sorted(set(entries) - _KNOWN_KEYS)
        if unknown:
            notes.append(f"tensor {name!r}: unknown external data keys ignored: {shorten(unknown)}")
        try:
            data, begin = _read_external(entries, tensor, folder)
            _check_overlap(
                taken.setdefault(entries["location"], []), begin, begin + len(data), name
            )
        except ValueError as error:
            raise ModelError(f"tensor {name!r}: {error}") from error
        tensor.raw_data = data
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
    return tuple(notes)


def place_problem(location: str) -> str:
    """Say why a location written in a model is not a plain path below it, or nothing."""
    if not location:
        return "is empty"
    if "\0" in location:
        return "contains a NUL byte"
    if "%" in location:
        return "is URL-encoded"
    if location.startswith(("/", "\\")) or "\\" in location or ":" in location:
        return "is absolute or of another system"
    if ".." in location.split("/"):
        return "leads out of the model's folder"
    return ""


def _read_external(entries: dict[str, str], tensor: Any, folder: Path) -> tuple[bytes, int]:
    location = entries.get("location", "")
    problem = place_problem(location)
    if problem:
        raise ValueError(f"external data location {location[:80]!r} {problem}; refused")
    file = folder
    for part in location.split("/"):
        file = file / part
        if file.is_symlink():
            raise ValueError(f"external data location {location!r} goes through a link; refused")
    try:
        descriptor = os.open(file, _OPEN)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ValueError(f"external data file {location!r} cannot be read: {why}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"external data {location!r} is not a file")
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_nlink > 1:
            raise ValueError(f"external data file {location!r} is a hard link; refused (copy it)")
        begin = _whole(entries.get("offset", "0"), "offset")
        needed = _bytes_needed(tensor)
        length = _whole(entries["length"], "length") if "length" in entries else needed
        if begin + length > status.st_size:
            raise ValueError(
                f"external data offset {begin} and length {length} lead past the end of "
                f"{location!r} ({status.st_size} bytes)"
            )
        if length != needed:
            raise ValueError(
                f"external data length {length} is not the {needed} bytes of its shape"
            )
        stream.seek(begin)
        return stream.read(length), begin


def _whole(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ValueError(f"external data {what} {text[:40]!r} is not a whole number")
    return int(text)


def _check_overlap(taken: list[tuple[int, int, str]], begin: int, end: int, name: str) -> None:
    for first, last, other in taken:
        if begin < last and first < end:
            raise ValueError(f"its external data overlap those of tensor {other!r}")
    taken.append((begin, end, name))


def _bytes_needed(tensor: Any) -> int:
    if tensor.data_type not in _BITS:
        raise ValueError(f"external data of type {tensor.data_type} are not known")
    bits: int = math.prod(tensor.dims) * _BITS[tensor.data_type]
    return -(-bits // 8)


def _wrong(tensor: Any) -> str:
    """Compare shape, type and data of one tensor; nothing is allocated."""
    dims = list(tensor.dims)
    if len(dims) > _LARGEST_RANK:
        return f"has {len(dims)} dimensions, more than {_LARGEST_RANK}"
    if any(n < 0 for n in dims):
        return f"has a negative dimension: {dims}"
    count = math.prod(dims)
    if count >= 2**63:
        return f"has more elements than can be counted: {dims}"
    if tensor.HasField("segment"):
        return "is stored in segments, which nothing reads"
    if tensor.data_location == TensorProto.EXTERNAL:
        return "" if tensor.data_type in _BITS else f"has the unknown type {tensor.data_type}"
    if tensor.data_type != TensorProto.STRING and tensor.data_type not in _BITS:
        return f"has the unknown type {tensor.data_type}"
    if tensor.HasField("raw_data"):
        if tensor.data_type == TensorProto.STRING:
            return "is text stored as raw data"
        needed = -(-count * _BITS[tensor.data_type] // 8)
        if len(tensor.raw_data) == needed:
            return ""
        given = len(tensor.raw_data)
        return f"has shape {dims[:8]}, which needs {needed} bytes, but {given} bytes of data"
    return _wrong_field(tensor, dims, count)


def _wrong_field(tensor: Any, dims: list[int], count: int) -> str:
    values = getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data"))
    complex_factor = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    packed = _BITS.get(tensor.data_type, 8) < 8
    needed = -(-count * _BITS[tensor.data_type] // 8) if packed else count * complex_factor
    if len(values) != needed:
        return (
            f"has shape {dims[:8]}, which needs {needed} values, but {len(values)} values of data"
        )
    low, high = _RANGES.get(tensor.data_type, (None, None))
    if low is not None and len(values) and not (low <= min(values) and max(values) <= high):
        return f"has a value outside [{low}, {high}], the range of its type"
    return ""


def _finite(tensor: Any) -> bool:
    """Tell whether all values are finite; a mask of zeros and infinities is not a weight."""
    if tensor.data_type not in (
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
    ):
        return True
    values = numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.BFLOAT16:
        values = values.astype(np.float32)
    if np.isfinite(values).all():
        return True
    if np.isnan(values).any():
        return False
    finite = values[np.isfinite(values)]
    return bool(values.size == 1 or (finite.size and not finite.any()))


def _graph_tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for sparse in graph.sparse_initializer:
        yield sparse.values.name, sparse.values
        yield f"{sparse.values.name} (indices)", sparse.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: Any) -> Iterator[tuple[str, Any]]:
    for attribute in node.attribute:
        name = node.name or (node.output[0] if node.output else node.op_type)
        yield from _attribute_tensors(attribute, name)


def _attribute_tensors(attribute: Any, owner: str) -> Iterator[tuple[str, Any]]:
    if attribute.type == AttributeProto.TENSOR or attribute.HasField("t"):
        yield f"{owner}.{attribute.name}", attribute.t
    for tensor in attribute.tensors:
        yield f"{owner}.{attribute.name}", tensor
    if attribute.HasField("sparse_tensor"):
        yield f"{owner}.{attribute.name}", attribute.sparse_tensor.values
        yield f"{owner}.{attribute.name} (indices)", attribute.sparse_tensor.indices
    if attribute.HasField("g"):
        yield from _graph_tensors(attribute.g)
    for graph in attribute.graphs:
        yield from _graph_tensors(graph)
