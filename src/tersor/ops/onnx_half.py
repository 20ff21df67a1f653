"""Turn an ONNX network into one of 16 bits, for runtimes that compute in the types of the file."""

from typing import Any

import numpy as np

from tersor.core.errors import TargetError

_LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}
_FLOAT_ONLY = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs of operators that must stay float32."""
_OPSET_BF16 = 22
_BRANCHES = ("If", "Loop", "Scan", "SequenceMap")


def to_half(model: Any, precision: str) -> Any:
    """Return a copy whose float32 tensors are fp16 or bf16; inputs and outputs stay as they are.

    Constants beyond the range become its ends. Scales of roundings are turned, too: what is read
    from codes has the type of its scale.

    Args:
        model: onnx.ModelProto of opset 19 or later. Not modified.
        precision: "fp16" or "bf16".

    Raises:
        TargetError: the network has branches or loops.
    """
    import onnx
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    most = _LARGEST[precision]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    branching = [n for n in graph.node if n.op_type in _BRANCHES]
    if branching:
        name = branching[0].name or branching[0].output[0]
        raise TargetError(
            f"a network with {branching[0].op_type} ({name!r}) cannot be turned to {precision}; "
            "leave it in fp32"
        )
    kept = {
        node.input[i]
        for node in graph.node
        for i in _FLOAT_ONLY.get(node.op_type, ())
        if i < len(node.input)
    }
    if precision == "bf16":
        for entry in made.opset_import:
            if not entry.domain:
                # the same operators; convolutions and pooling take bf16 from then on
                entry.version = max(entry.version, _OPSET_BF16)
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
            tensor.CopyFrom(_turned(tensor, kind, most))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == 1:
                attribute.i = kind
            elif (
                attribute.type == onnx.AttributeProto.TENSOR
                and attribute.t.data_type == TensorProto.FLOAT
                and not kept & set(node.output)
            ):
                attribute.t.CopyFrom(_turned(attribute.t, kind, most))
    casts_in = [_cast_input(graph, value, kind) for value in graph.input if _is_float(value)]
    casts_out = [_cast_output(graph, value) for value in graph.output if _is_float(value)]
    nodes = [*casts_in, *graph.node, *casts_out]
    del graph.node[:]
    graph.node.extend(nodes)
    helper.set_model_props(made, {p.key: p.value for p in model.metadata_props})
    return made


def _is_float(value: Any) -> bool:
    return bool(value.type.tensor_type.elem_type == 1)


def _turned(tensor: Any, kind: int, most: float) -> Any:
    from onnx import helper, numpy_helper

    values = np.clip(numpy_helper.to_array(tensor), -most, most)
    to = helper.tensor_dtype_to_np_dtype(kind)
    return numpy_helper.from_array(values.astype(to), tensor.name)


def _cast_input(graph: Any, value: Any, kind: int) -> Any:
    from onnx import helper

    turned = f"{value.name} in 16 bits"
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == value.name:
                node.input[i] = turned
    return helper.make_node("Cast", [value.name], [turned], to=kind)


def _cast_output(graph: Any, value: Any) -> Any:
    from onnx import helper

    turned = f"{value.name} in 16 bits"
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == value.name:
                    names[i] = turned
    return helper.make_node("Cast", [turned], [value.name], to=1)
