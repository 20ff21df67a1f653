"""Quantized ONNX as AMD's Vitis AI takes it for its DPUs, which compute with shifts.

Every rounding is int8 around 0 with one scale for the tensor, a power of two; so are weights and
biases. What `static` makes with `{symmetric: true, power_of_two: true, per_channel: false}` is so
but for the biases, which it leaves in float or in 32 bits; they are rounded here.

Source:
    Vitis AI User Guide, UG1414: quantizer "pof2s", 8 bits for weights, biases and activations.
    The file follows its rules; it was not compiled by AMD's tools.
"""

from typing import Any

import numpy as np

from tersor.core.errors import TargetError

_CURE = "quantize with `static: {symmetric: true, power_of_two: true, per_channel: false}`"
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")


def to_vitis_ai(model: Any) -> Any:
    """Return a copy whose biases are int8 with a scale that is a power of two.

    A network in float, such as the original that others are compared with, is left as it is.

    Args:
        model: onnx.ModelProto with Q/DQ. Not modified.

    Raises:
        TargetError: a rounding is of another kind; it is named.
    """
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    if not any(node.op_type == "QuantizeLinear" for node in graph.node):
        return made
    dequantized = {}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            dequantized[node.output[0]] = node
            if constants[node.input[0]].dtype == np.int32:  # a bias, which is rounded anew
                continue
        _check(node, constants)
    nodes: list[Any] = []
    for node in graph.node:
        bias = node.input[2] if node.op_type in _WEIGHTED and len(node.input) > 2 else ""
        values = _values(bias, constants, dequantized)
        if values is not None:
            name = f"{node.name or node.output[0]}.bias"
            scale = 2.0 ** np.ceil(np.log2(max(float(np.abs(values).max()), 1e-30) / 127))
            codes = np.rint(values / scale).clip(-128, 127).astype(np.int8)
            for key, array in (("codes", codes), ("scale", scale), ("zero", np.int8(0))):
                kind = np.float32 if key == "scale" else np.int8
                tensor = numpy_helper.from_array(np.asarray(array, kind), f"{name} {key}")
                graph.initializer.append(tensor)
            parts = [f"{name} {key}" for key in ("codes", "scale", "zero")]
            nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name} rounded"]))
            node.input[2] = f"{name} rounded"
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | {o.name for o in graph.output}
    nodes = [n for n in nodes if n.output[0] not in dequantized or n.output[0] in used]
    used = {name for node in nodes for name in node.input}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return made


def _check(node: Any, constants: dict[str, np.ndarray]) -> None:
    scale = constants[node.input[1]]
    zero = constants[node.input[2]] if len(node.input) > 2 else np.zeros((), np.uint8)
    exact = bool(np.all(np.frexp(scale)[0] == 0.5))
    if zero.dtype != np.int8 or np.any(zero) or len(set(scale.ravel().tolist())) > 1 or not exact:
        raise TargetError(
            f"{node.input[0]!r} is not rounded to int8 around 0 with one scale that is a power of "
            f"two, which Vitis AI needs; {_CURE}"
        )


def _values(
    name: str, constants: dict[str, np.ndarray], dequantized: dict[str, Any]
) -> np.ndarray | None:
    """Return the float values of a bias; None: there is none, or it is int8 already."""
    if name in constants:
        return constants[name]
    if name not in dequantized:
        return None
    node = dequantized[name]
    codes = constants[node.input[0]]
    if codes.dtype != np.int32:
        return None
    return np.asarray(codes * constants[node.input[1]].astype(np.float64))
