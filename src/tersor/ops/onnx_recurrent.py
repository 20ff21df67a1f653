"""Integer weights of LSTMs and GRUs in ONNX, in the order in which its operators take them."""

from typing import Any

import numpy as np

_KINDS = ("LSTM", "GRU")


def store_codes(graph: Any) -> None:
    """Rearrange codes instead of the float weights that they stand for.

    The exporter puts gates into the order of ONNX after dequantizing. A runtime would do so each
    time, since it keeps DequantizeLinear. Here the codes are in that order; a cast and a product
    with the scales are in front of the operator, which runtimes compute once, when they load.

    Args:
        graph: `ops.onnx_translations._Graph`; changed.
    """
    from onnx import TensorProto, helper

    for node in list(graph.nodes):
        for i in (1, 2) if node.op_type in _KINDS else ():
            source = node.input[i]
            if source in graph.initializers:
                continue
            codes, scale = (_read(graph, source, part) for part in ("codes", "scale"))
            if codes is None or scale is None or codes.dtype != np.int8:
                continue
            # a scale is that of a row
            kept = graph.add(f"{source}_codes", codes)
            step = graph.add(f"{source}_scale", scale[..., :1])
            wide, made = graph.fresh(f"{source}_wide"), graph.fresh(f"{source}_weight")
            graph.insert_before(
                node,
                helper.make_node("Cast", [kept], [wide], to=TensorProto.FLOAT),
                helper.make_node("Mul", [wide, step], [made]),
            )
            node.input[i] = made
    _drop_unused(graph)


def _read(graph: Any, name: str, part: str) -> np.ndarray | None:
    """Rearrange a constant: its codes, or the scale of each; None: it is something else."""
    if name in graph.initializers:
        return np.asarray(graph.array(name))
    node = graph.producers.get(name)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantized(graph, node, part)
    if node.op_type not in ("Slice", "Concat", "Unsqueeze"):
        return None
    given = [_read(graph, each, part) for each in node.input]
    arrays = [array for array in given if array is not None]
    if len(arrays) < len(given):
        return None
    if node.op_type == "Concat":
        return np.concatenate(arrays, axis=_axis(node))
    if node.op_type == "Unsqueeze":
        return np.expand_dims(arrays[0], tuple(int(axis) for axis in arrays[1]))
    return _sliced(*arrays)


def _dequantized(graph: Any, node: Any, part: str) -> np.ndarray | None:
    codes, scale = (graph.initializers.get(name) for name in node.input[:2])
    if codes is None or scale is None or any(each.name == "block_size" for each in node.attribute):
        return None
    if len(node.input) > 2 and graph.array(node.input[2]).any():
        return None
    array = np.asarray(graph.array(node.input[0]))
    if part == "codes":
        return array
    shape = [1] * array.ndim
    shape[_axis(node, 1)] = -1
    step = np.asarray(graph.array(node.input[1])).reshape(shape)
    return np.broadcast_to(step, array.shape)


def _axis(node: Any, default: int = 0) -> int:
    return int(next((each.i for each in node.attribute if each.name == "axis"), default))


def _sliced(
    array: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    axes: np.ndarray | None = None,
    steps: np.ndarray | None = None,
) -> np.ndarray:
    found = [slice(None)] * array.ndim
    places = range(len(starts)) if axes is None else axes
    strides = np.ones_like(starts) if steps is None else steps
    for axis, start, end, step in zip(places, starts, ends, strides, strict=True):
        found[int(axis)] = slice(int(start), int(end), int(step))
    return array[tuple(found)]


def _drop_unused(graph: Any) -> None:
    """Remove what led from the codes to the weights before."""
    while True:
        used = {name for node in graph.nodes for name in node.input}
        idle = [
            node
            for node in graph.nodes
            if not any(name in used or graph.is_output(name) for name in node.output)
        ]
        if not idle:
            return
        for node in idle:
            graph.remove(node)
