"""Weights of fewer than 8 bits take fewer than 8 bits of an ONNX file.

Runtimes compute with bytes. What a file holds is another matter: codes are packed, and the graph
unpacks them with integer operators over constants, which ONNX Runtime computes once, when it loads
the file. From then on the network is the one with bytes.
"""

from typing import Any

import numpy as np

_WORTH = 1024
"""Bytes to be saved at least: the operators that unpack a layer take about as many."""


def pack_weights(model: Any) -> Any:
    """Pack the weights of DequantizeLinear, int8 or uint8, whose codes all fit fewer bits.

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
    chosen: dict[str, int] = {}
    for name, tensor in initializers.items():
        kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        if tensor.data_type not in kinds or len(tensor.dims) < 2:
            continue
        codes = onnx.numpy_helper.to_array(tensor)
        bits = _bits(codes)
        plain = all(n.op_type == "DequantizeLinear" and n.input[0] == name for n in uses[name])
        if plain and bits < 8 and codes.size * (8 - bits) // 8 > _WORTH:
            chosen[name] = bits
    if not chosen:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    kept = [t for t in made.graph.initializer if t.name not in chosen]
    nodes = list(made.graph.node)
    del made.graph.initializer[:], made.graph.node[:]
    made.graph.initializer.extend(kept)
    for name, bits in chosen.items():
        codes = onnx.numpy_helper.to_array(initializers[name])
        made.graph.node.extend(_unpacking(made.graph, name, codes, bits))
    made.graph.node.extend(nodes)
    return made


def _bits(codes: np.ndarray) -> int:
    """Return the fewest bits, 1 at least, that hold all codes."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if codes.dtype == np.uint8:
        return max(high.bit_length(), 1)
    return max(high, -1 - low).bit_length() + 1


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes, `bits` bytes for every eight of them: uint8 (groups, bits)."""
    lifted = (codes.reshape(-1).astype(np.int64) + _lift(codes, bits)).astype(np.uint64)
    eights = np.pad(lifted, (0, -len(lifted) % 8)).reshape(-1, 8)
    places = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    words = np.bitwise_or.reduce(eights << places, axis=1)
    ends = np.arange(bits, dtype=np.uint64) * np.uint64(8)
    made: np.ndarray = ((words[:, None] >> ends) & np.uint64(255)).astype(np.uint8)
    return made


def _lift(codes: np.ndarray, bits: int) -> int:
    """Return what makes signed codes unsigned."""
    return 0 if codes.dtype == np.uint8 else 1 << (bits - 1)


def _unpacking(graph: Any, name: str, codes: np.ndarray, bits: int) -> list[Any]:
    """Return the nodes that turn packed codes into the tensor `name`."""
    import onnx

    kinds = onnx.TensorProto

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

    own = packed(codes, bits)
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
    lift, kind = _lift(codes, bits), kinds.INT8 if codes.dtype == np.int8 else kinds.UINT8
    flat = write("Cast", lifted, to=kinds.INT32)
    if lift:
        flat = write("Sub", flat, constant(f"zero{bits}", np.array(lift, np.int32)))
    flat = write("Cast", flat, to=kind)
    if codes.size % 8:
        flat = write(
            "Slice",
            write("Reshape", flat, constant("flat", np.array([-1], np.int64))),
            constant("start", np.array([0], np.int64)),
            constant(f"count{codes.size}", np.array([codes.size], np.int64)),
        )
    shape = "x".join(map(str, codes.shape))
    write("Reshape", flat, constant(f"shape{shape}", np.array(codes.shape, np.int64)))
    made[-1].output[0] = name
    return made
