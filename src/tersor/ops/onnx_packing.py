"""Weights of fewer than 8 bits take fewer than 8 bits of an ONNX file.

Runtimes compute with bytes. What a file holds is another matter: codes are packed, and the graph
unpacks them with integer operators over constants, which ONNX Runtime computes once, when it loads
the file. From then on the network is the one with bytes.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tersor.ops.onnx_count import attribute_of

_WORTH = 1024
"""Bytes to be saved at least: the operators that unpack a layer take about as many."""


def pack_weights(model: Any) -> Any:
    """Pack weights whose codes all fit fewer bits than they are held in.

    Those are weights of DequantizeLinear, int8 or uint8, and of MatMulNBits with 4 bits.

    Args:
        model: onnx.ModelProto of opset 18 or later. Not modified.

    Returns:
        The model, or a copy with packed weights. It computes the same, bit by bit.
    """
    import onnx

    initializers = {t.name: t for t in model.graph.initializer}
    uses: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    chosen: dict[str, _Codes] = {}
    for name, tensor in initializers.items():
        kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        if tensor.data_type not in kinds or len(tensor.dims) < 2:
            continue
        array, users = onnx.numpy_helper.to_array(tensor), uses[name]
        if all(n.op_type == "DequantizeLinear" and n.input[0] == name for n in users):
            codes = _Codes(codes=array, bits=_bits(array), lift=0, dims=array.shape)
            codes = replace(codes, lift=_lift(array, codes.bits))
        elif all(n.op_type == "MatMulNBits" and n.input[1] == name for n in users):
            if any(attribute_of(n, "bits", 4) != 4 for n in users):
                continue
            codes = _halves(array)
        else:
            continue
        if array.size - codes.codes.size * codes.bits // 8 > _WORTH:
            chosen[name] = codes
    if not chosen:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    kept = [t for t in made.graph.initializer if t.name not in chosen]
    nodes = list(made.graph.node)
    del made.graph.initializer[:], made.graph.node[:]
    made.graph.initializer.extend(kept)
    for name, codes in chosen.items():
        made.graph.node.extend(_unpacking(made.graph, name, codes))
    made.graph.node.extend(nodes)
    return made


@dataclass(frozen=True, kw_only=True)
class _Codes:
    """Weights that fit `bits` once `lift` is added; read as they are, or as halves of bytes."""

    codes: np.ndarray
    bits: int
    lift: int
    dims: tuple[int, ...]
    """Of the initializer that they come from."""
    halves: bool = False


def _halves(array: np.ndarray) -> _Codes:
    """Split bytes into codes of 4 bits, the low one first."""
    codes = np.stack([array & 15, array >> 4], axis=-1).reshape(-1).astype(np.int8)
    low, high = int(codes.min(initial=15)), int(codes.max(initial=0))
    bits = max((high - low).bit_length(), 1)
    return _Codes(codes=codes, bits=bits, lift=-low, dims=array.shape, halves=True)


def _bits(codes: np.ndarray) -> int:
    """Return the fewest bits, 1 at least, that hold all codes."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if codes.dtype == np.uint8:
        return max(high.bit_length(), 1)
    return max(high, -1 - low).bit_length() + 1


def packed(codes: np.ndarray, bits: int, lift: int | None = None) -> np.ndarray:
    """Pack codes, `bits` bytes for every eight of them: uint8 (groups, bits).

    Args:
        codes: Integers, signed or not.
        bits: Of a code.
        lift: What makes them unsigned; unset: half the range where their type is signed.
    """
    lift = _lift(codes, bits) if lift is None else lift
    lifted = (codes.reshape(-1).astype(np.int64) + lift).astype(np.uint64)
    eights = np.pad(lifted, (0, -len(lifted) % 8)).reshape(-1, 8)
    places = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    words = np.bitwise_or.reduce(eights << places, axis=1)
    ends = np.arange(bits, dtype=np.uint64) * np.uint64(8)
    made: np.ndarray = ((words[:, None] >> ends) & np.uint64(255)).astype(np.uint8)
    return made


def _lift(codes: np.ndarray, bits: int) -> int:
    """Return what makes signed codes unsigned."""
    return 0 if codes.dtype == np.uint8 else 1 << (bits - 1)


def _unpacking(graph: Any, name: str, given: _Codes) -> list[Any]:
    """Return the nodes that turn packed codes into the tensor `name`."""
    import onnx

    kinds = onnx.TensorProto
    codes, bits, lift = given.codes, given.bits, given.lift

    def constant(key: str, array: np.ndarray) -> str:
        full = f"unpack.{key}"
        if all(t.name != full for t in graph.initializer):
            graph.initializer.append(onnx.numpy_helper.from_array(array, full))
        return full

    made: list[Any] = []

    def write(kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{name}.{len(made)}"
        made.append(onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    own = packed(codes, bits, lift)
    graph.initializer.append(onnx.numpy_helper.from_array(own, f"{name}.packed"))
    bytes_ = np.arange(bits, dtype=np.uint64) * np.uint64(8)
    places = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    spread = write(
        "BitShift",
        write("Cast", f"{name}.packed", to=kinds.UINT64),
        constant(f"bytes{bits}", bytes_),
        direction="LEFT",
    )
    summed = write(
        "ReduceSum",
        write("Cast", spread, to=kinds.INT64),
        constant("last", np.array([1], np.int64)),
        keepdims=1,
    )
    parts = write(
        "BitShift",
        write("Cast", summed, to=kinds.UINT64),
        constant(f"places{bits}", places),
        direction="RIGHT",
    )
    lifted = write(
        "BitwiseAnd", parts, constant(f"mask{bits}", np.array((1 << bits) - 1, np.uint64))
    )
    kind = kinds.INT8 if codes.dtype == np.int8 and not given.halves else kinds.UINT8
    flat = write("Cast", lifted, to=kinds.INT64 if given.halves else kinds.INT32)
    if lift:
        lift_type = np.int64 if given.halves else np.int32
        flat = write("Sub", flat, constant(f"zero{lift}_{given.halves}", np.array(lift, lift_type)))
    if given.halves:
        pairs = write("Reshape", flat, constant("pairs", np.array([-1, 2], np.int64)))
        placed = write("Mul", pairs, constant("halves", np.array([1, 16], np.int64)))
        flat = write("ReduceSum", placed, constant("last", np.array([1], np.int64)), keepdims=0)
    flat = write("Cast", flat, to=kind)
    count = math.prod(given.dims)
    if codes.size % 8:
        flat = write(
            "Slice",
            write("Reshape", flat, constant("flat", np.array([-1], np.int64))),
            constant("start", np.array([0], np.int64)),
            constant(f"count{count}", np.array([count], np.int64)),
        )
    shape = "x".join(map(str, given.dims))
    write("Reshape", flat, constant(f"shape{shape}", np.array(given.dims, np.int64)))
    made[-1].output[0] = name
    return made
