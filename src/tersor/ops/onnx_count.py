"""Walk an ONNX graph: multiply-accumulates of its nodes, numbers of its initializers."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tersor.core.errors import ModelError
from tersor.core.runtime import Arrays

Shape = tuple[int, ...]
_INNER = ("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul")
_CONV = ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
_RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
_CODES = {
    "DequantizeLinear": (0,),
    "QuantizeLinear": (0,),
    "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearConv": (0, 3, 8),
    "QLinearMatMul": (0, 3),
    "DynamicQuantizeLSTM": (1, 2, 3),
}
"""Inputs that hold numbers of the network; the others are scales and zero points."""
_STORED = (3, 17, 19)
"""Data types of weights that a cast widens: INT8, FLOAT8E4M3FN, FLOAT8E5M2."""
COUNTED = (
    *_INNER,
    *_CONV,
    *_RECURRENT,
    "Gemm",
    "MatMulNBits",
    "ConvTranspose",
    "Einsum",
    "Attention",
)
"""Operators that multiply and accumulate; element-wise ones are not counted, as is usual."""


def count_macs(model: Any, inputs: Arrays) -> int:
    """Count multiply-accumulates of one run on `inputs`.

    Args:
        model: onnx.ModelProto. Not modified.
        inputs: By the names of the graph's inputs; their shapes decide the count.

    Raises:
        ModelError: a shape cannot be told, or a loop or branch holds a counted operator.
    """
    import onnx.inliner

    model = onnx.inliner.inline_local_functions(model) if len(model.functions) else model
    nodes = list(model.graph.node)
    for node in nodes:
        for inner in _subgraphs(node):
            if any(deep.op_type in COUNTED for deep in inner.node):
                raise ModelError(
                    f"the multiply-accumulates inside {node.op_type} {node.name!r} depend on the "
                    "data; leave 'macs' out"
                )
    shapes = shapes_of(model, inputs)
    return sum(macs_of(node, shapes) for node in nodes if node.op_type in COUNTED)


def shapes_of(model: Any, inputs: Arrays) -> dict[str, Shape]:
    """Tell the shapes of a graph's tensors, all those at least that counting needs.

    Raises:
        ModelError: one cannot be told.
    """
    shapes = _shapes(model, inputs)
    counted = [node for node in model.graph.node if node.op_type in COUNTED]
    missing = [name for node in counted for name in _relevant(node) if name not in shapes]
    return {**shapes, **_run_shapes(model, inputs, missing)} if missing else shapes


def count_parameters(model: Any, *, zeros: bool = True) -> int:
    """Count the numbers of weights, biases and gains; metrics/parameters.py says what is not.

    Args:
        model: onnx.ModelProto.
        zeros: Count numbers that are zero, too; those packed in less than a byte all count.
    """
    nodes = list(_all_nodes(model.graph))
    counted, packed = _weights(model, nodes)
    total = 0
    for name, tensor in _constants(model.graph, nodes):
        if name in packed:
            total += _packed_numbers(packed[name], tensor, zeros)
        elif name in counted:
            total += math.prod(tensor.dims) if zeros else _nonzeros(tensor)
    return total


def weight_names(model: Any) -> set[str]:
    """Name the constants that hold weights, biases and gains, in floats or codes."""
    counted, packed = _weights(model, list(_all_nodes(model.graph)))
    return counted | packed.keys()


def _weights(model: Any, nodes: list[Any]) -> tuple[set[str], dict[str, Any]]:
    """Return the names of constants whose numbers count, and of packed ones with their users."""
    import onnx

    floats = (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    )
    codes: set[str] = set()
    weights: set[str] = set()
    packed: dict[str, Any] = {}
    small = {tensor.name for tensor in model.graph.initializer if tensor.data_type in _STORED}
    wide: set[str] = set()
    for node in nodes:
        given = list(node.input)
        kind = node.op_type
        if kind == "Cast" and given[0] in small:
            codes.add(given[0])
            wide.update(node.output)
        elif kind == "Mul" and wide & set(given):
            pass  # by scales
        elif kind == "MatMulNBits":
            packed[given[1]] = node
            weights.update([given[0], *given[4:]])
        elif kind in _CODES:
            codes.update(given[i] for i in _CODES[kind] if i < len(given))
        elif kind == "BatchNormalization":
            weights.update(given[:3])  # not the running statistics
        else:
            weights.update(given)
    counted = {
        name
        for name, tensor in _constants(model.graph, nodes)
        if name in codes or (name in weights and tensor.data_type in floats and len(tensor.dims))
    }
    return counted - packed.keys(), packed


def _nonzeros(tensor: Any) -> int:
    from onnx import numpy_helper

    return int((numpy_helper.to_array(tensor) != 0).sum())


def _packed_numbers(node: Any, tensor: Any, zeros: bool) -> int:
    """Count the weights of a MatMulNBits; its last block is filled up with zeros."""
    from onnx import numpy_helper

    if not zeros and tensor.dims:
        zero = zero_codes(node, numpy_helper.to_array(tensor))
        if zero is not None:
            return int((~zero).sum())
    return int(attribute_of(node, "N", 0)) * int(attribute_of(node, "K", 0))


def zero_codes(node: Any, codes: np.ndarray) -> np.ndarray | None:
    """Mark the codes that stand for zero in the weights of a MatMulNBits; None: not told.

    Args:
        node: The operator.
        codes: Its second input; told for codes of a byte without zeros of their own.
    """
    symmetric = len(node.input) < 4 or not node.input[3]
    if not symmetric or attribute_of(node, "bits", 4) != 8:
        return None
    found: np.ndarray = codes == 128
    return found


def macs_of(node: Any, shapes: Mapping[str, Shape]) -> int:
    """Count the multiply-accumulates of one operator of COUNTED."""
    kind = node.op_type
    first = shapes[node.input[0]]
    made = shapes.get(node.output[0], ())
    if kind in _CONV:
        weight = shapes[node.input[3 if kind == "QLinearConv" else 1]]
        return math.prod(made) * math.prod(weight[1:])
    if kind == "ConvTranspose":
        return math.prod(first) * math.prod(shapes[node.input[1]][1:])
    if kind in _INNER:
        return math.prod(made) * first[-1]
    if kind == "Gemm":
        return math.prod(made) * first[0 if attribute_of(node, "transA", 0) else 1]
    if kind == "MatMulNBits":
        return math.prod(first) * int(attribute_of(node, "N", 0))
    if kind in _RECURRENT:
        steps = math.prod(first[:2])
        return steps * (math.prod(shapes[node.input[1]]) + math.prod(shapes[node.input[2]]))
    if kind == "Attention":
        return _attention(node, shapes)
    terms = (
        attribute_of(node, "equation", b"").decode().replace(" ", "").partition("->")[0].split(",")
    )
    sizes = {
        letter: size
        for term, name in zip(terms, node.input, strict=True)
        for letter, size in zip(term, shapes[name], strict=True)
    }
    return math.prod(sizes.values())


def _attention(node: Any, shapes: Mapping[str, Shape]) -> int:
    """Count Q K^T and its product with V; (B, H, L, D), or (B, L, H * D) with attributes."""
    query, key, value = (shapes[name] for name in node.input[:3])
    if len(query) == 4:
        rows, width, long, deep = math.prod(query[:3]), query[3], key[2], value[3]
    else:
        heads = int(attribute_of(node, "q_num_heads", 1))
        kv_heads = int(attribute_of(node, "kv_num_heads", heads))
        rows, width, long, deep = (
            query[0] * heads * query[1],
            query[2] // heads,
            key[1],
            value[2] // kv_heads,
        )
    return rows * long * (width + deep)


def _relevant(node: Any) -> list[str]:
    """List the tensors whose shapes a count needs."""
    last = {"QLinearConv": 4, "QLinearMatMul": 4, "MatMulNBits": 1}.get(node.op_type, 3)
    return [name for name in [*node.input[:last], node.output[0]] if name]


def _shapes(model: Any, inputs: Arrays) -> dict[str, Shape]:
    """Infer what shapes follow from those of the inputs."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]  # their batch is a symbol, which would win over the number
    for value in bare.graph.input:
        if value.name in inputs:
            _set_shape(value, np.shape(inputs[value.name]))
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        dims = value.type.tensor_type.shape.dim
        known = value.type.tensor_type.HasField("shape")
        if known and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _set_shape(value: Any, shape: Shape) -> None:
    value.type.tensor_type.ClearField("shape")
    for size in shape:
        value.type.tensor_type.shape.dim.add().dim_value = size
    if not shape:
        value.type.tensor_type.shape.SetInParent()


def _run_shapes(model: Any, inputs: Arrays, names: Iterable[str]) -> dict[str, Shape]:
    """Run the model once and look, where inference does not know an operator."""
    import onnx
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {tensor.name for tensor in copy.graph.initializer}
    given = {value.name for value in copy.graph.input}
    present = {value.name for value in copy.graph.output}
    wanted = [n for n in dict.fromkeys(names) if n not in constants | given]
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in present)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        made = session.run(wanted, {n: a for n, a in inputs.items() if n in given})
    except Exception as error:
        raise ModelError(
            f"cannot tell the shape of {wanted[0]!r}, which counting multiply-accumulates needs: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return {name: tuple(np.shape(array)) for name, array in zip(wanted, made, strict=True)}


def _constants(graph: Any, nodes: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in nodes:
        value = attribute_of(node, "value", None) if node.op_type == "Constant" else None
        if value is not None:
            yield node.output[0], value


def _all_nodes(graph: Any) -> Iterable[Any]:
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _all_nodes(inner)


def _subgraphs(node: Any) -> list[Any]:
    return [a.g for a in node.attribute if a.HasField("g")]


def attribute_of(node: Any, name: str, default: Any) -> Any:
    """Read an attribute of an ONNX node."""
    import onnx

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default
