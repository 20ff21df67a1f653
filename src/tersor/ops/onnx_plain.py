"""ONNX networks without roundings and strided slices, for runtimes that lack them.

Works on ONNX's own structures alone, so that it runs where there is no PyTorch.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with the same outputs from fewer kinds of operators.

    - DequantizeLinear of weights: the float weights.
    - QuantizeLinear and DequantizeLinear of activations: arithmetic in float. Codes are kept as
      floats, which hold them exactly.
    - Slice with steps over the last two axes of images: MaxPool of single values with strides.

    Args:
        model: Not modified.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            added[node.output[0]] = _weights(node, constants)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            nodes += _rounding(node, constants, added)
        elif node.op_type == "Slice" and (strides := _strides(node, constants)):
            nodes.append(_strided(node, strides))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in added.items())
    used = {name for node in nodes for name in node.input} | {each.name for each in graph.output}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return made


def described(values: Iterable[Any], model: onnx.ModelProto) -> list[dict[str, Any]]:
    """List name, shape and type of inputs or outputs that are no weights; a free size is 0."""
    weights = {each.name for each in model.graph.initializer}
    return [
        {
            "name": each.name,
            "shape": [axis.dim_value for axis in each.type.tensor_type.shape.dim],
            "dtype": np.dtype(
                helper.tensor_dtype_to_np_dtype(each.type.tensor_type.elem_type)
            ).name,
        }
        for each in values
        if each.name not in weights
    ]


def _weights(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> np.ndarray:
    """Compute the floats that codes stand for: by tensor, by channel or by block."""
    settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    codes, scale = (constants[name] for name in node.input[:2])
    zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
    axis, block = settings.get("axis", 1), settings.get("block_size", 0)

    def spread(numbers: np.ndarray) -> np.ndarray:
        numbers = numbers.astype(np.float32)
        if block:
            return np.repeat(numbers, block, axis)[tuple(slice(n) for n in codes.shape)]
        if numbers.ndim == 0 or numbers.size == 1:
            return numbers.reshape(())
        shape = [1] * codes.ndim
        shape[axis] = -1
        return numbers.reshape(shape)

    made = codes.astype(np.float32)
    if zero is not None:
        made = made - spread(zero)
    return np.asarray(made * spread(scale), np.float32)


def _rounding(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], added: dict[str, np.ndarray]
) -> list[onnx.NodeProto]:
    """Write the rounding of activations with one scale as arithmetic."""
    name, source, target = node.output[0], node.input[0], node.output[0]
    scale = np.float32(constants[node.input[1]].reshape(-1)[0])
    zero = constants[node.input[2]] if len(node.input) > 2 else np.zeros((), np.uint8)
    numbers = {"zero": np.float32(zero.reshape(-1)[0])}
    if node.op_type == "QuantizeLinear":
        ends = np.iinfo(zero.dtype)
        numbers |= {
            "step": np.float32(1) / scale,
            "low": np.float32(ends.min) - numbers["zero"],
            "high": np.float32(ends.max) - numbers["zero"],
        }
        steps = [
            ("Mul", [source, "step"], "scaled"),
            ("Round", ["scaled"], "rounded"),
            ("Max", ["rounded", "low"], "raised"),
            ("Min", ["raised", "high"], target),
        ]
    else:
        numbers = {"scale": scale}
        steps = [("Mul", [source, "scale"], target)]
    # codes less their zero: between the two operators nothing but moving happens to them
    own = {word: f"{name}.{word}" for word in (*numbers, "scaled", "rounded", "raised")}
    added |= {own[word]: np.asarray(n, np.float32).reshape(1) for word, n in numbers.items()}
    return [
        helper.make_node(kind, [own.get(x, x) for x in given], [own.get(made, made)])
        for kind, given, made in steps
    ]


def _strides(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> dict[int, int]:
    """Return the steps of a Slice over whole axes of images, by axis; empty: it is another one."""
    if len(node.input) < 5 or any(name not in constants for name in node.input[1:]):
        return {}
    starts, ends, axes, steps = (constants[name].reshape(-1) for name in node.input[1:5])
    whole = all(starts == 0) and all(ends >= 2**31 - 1) and all(steps > 0)
    if not whole or not set(axes.tolist()) <= {2, 3} or all(steps == 1):
        return {}
    return {int(axis): int(step) for axis, step in zip(axes, steps, strict=True)}


def _strided(node: onnx.NodeProto, strides: dict[int, int]) -> onnx.NodeProto:
    return helper.make_node(
        "MaxPool",
        [node.input[0]],
        [node.output[0]],
        kernel_shape=[1, 1],
        strides=[strides.get(2, 1), strides.get(3, 1)],
    )
