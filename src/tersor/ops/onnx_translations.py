"""ONNX for quantized layers, where the exporter has none or writes what runtimes do not fuse.

`translations` serves the exporter; `finish` works on what it wrote: 4-bit codes are packed two to a
byte, and biases of integer Gemms become integers, which ONNX Runtime asks for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed

import tersor.ops.dynamic
import tersor.ops.multi_head  # noqa: F401  # both register torch.ops.tersor
from tersor.ops.onnx_recurrent import store_codes


def translations() -> dict[Any, Callable[..., Any]]:
    """Map torch operators to functions that write them in ONNX."""
    from onnxscript import evaluator, ir
    from onnxscript import opset21 as op

    write: Any = op  # its annotations know values of scripts alone

    def contrib(kind: str, inputs: list[Any], attributes: list[Any], num_outputs: int = 1) -> Any:
        """Write an operator of ONNX Runtime's own; return its outputs, of float32."""
        node: Any = ir.Node("com.microsoft", kind, inputs, attributes, num_outputs=num_outputs)
        # the exporter's recorder; onnxscript itself knows no operators of other domains
        recorder: Any = evaluator.default()
        recorder.nodes.append(node)
        for made in node.outputs:
            made.dtype = ir.DataType.FLOAT
        return node.outputs

    def dequantize_per_channel_group(
        codes: Any,
        scales: Any,
        zeros: Any,
        quant_min: int,
        quant_max: int,
        dtype: int,
        group_size: int,
        output_dtype: int,
    ) -> Any:
        assert output_dtype in (1, ir.DataType.FLOAT)
        four = quant_max - quant_min == 15
        if quant_min < 0:
            kind = ir.DataType.INT4 if four else ir.DataType.INT8
        else:
            kind = ir.DataType.UINT4 if four else ir.DataType.UINT8
        codes = op.Cast(codes, to=kind)
        if zeros is None:
            return op.DequantizeLinear(codes, scales, axis=1, block_size=group_size)
        zeros = op.Cast(zeros, to=kind)
        return op.DequantizeLinear(codes, scales, zeros, axis=1, block_size=group_size)

    def dynamic_linear(x: Any, codes: Any, scale: Any, bias: Any) -> Any:
        taken, step, zero = op.DynamicQuantizeLinear(x)
        product = op.MatMulInteger(taken, op.Transpose(codes, perm=[1, 0]), zero)
        made = op.Mul(op.Cast(product, to=ir.DataType.FLOAT), op.Mul(step, scale))
        return made if bias is None else op.Add(made, bias)

    def dynamic_lstm(
        x: Any,
        weight: Any,
        weight_scale: Any,
        recurrent: Any,
        recurrent_scale: Any,
        bias: Any,
        hidden: Any,
        cell: Any,
    ) -> Any:
        sides, units, gates = recurrent.shape
        zeros: Any = write.Constant(value=ir.tensor(np.zeros((sides, gates), np.int8)))
        outputs, last, last_cell = contrib(
            "DynamicQuantizeLSTM",
            [
                x,
                weight,
                recurrent,
                bias,
                None,
                hidden,
                cell,
                None,
                weight_scale,
                zeros,
                recurrent_scale,
                zeros,
            ],
            [
                ir.AttrInt64("hidden_size", units),
                ir.AttrString("direction", "bidirectional" if sides == 2 else "forward"),
            ],
            num_outputs=3,
        )
        shape = write.Constant(value_ints=[0, 0, -1])
        return write.Reshape(write.Transpose(outputs, perm=[0, 2, 1, 3]), shape), last, last_cell

    def multi_head_attention(
        query: Any, key: Any, value: Any, mask: Any, heads: int, scale: float, causal: bool
    ) -> Any:
        inputs = [query, key, value, *([] if mask is None else [None, None, mask])]
        return contrib("MultiHeadAttention", inputs, settings(heads, scale, causal))[0]

    def projected_attention(
        x: Any, weight: Any, bias: Any, mask: Any, heads: int, scale: float, causal: bool
    ) -> Any:
        inputs = [x, weight, bias, *([] if mask is None else [None, None, mask])]
        return contrib("Attention", inputs, settings(heads, scale, causal))[0]

    def settings(heads: int, scale: float, causal: bool) -> list[Any]:
        return [
            ir.AttrInt64("num_heads", heads),
            ir.AttrFloat32("scale", scale),
            ir.AttrInt64("unidirectional", int(causal)),
        ]

    def conv_transpose2d(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = (1,),
        padding: Any = (0,),
        output_padding: Any = (0,),
        groups: int = 1,
        dilation: Any = (1,),
    ) -> Any:
        def both(sizes: Any) -> list[int]:
            return list(sizes) * (1 if len(sizes) == 2 else 2)

        return op.ConvTranspose(
            x,
            weight,
            bias,
            strides=both(stride),
            pads=both(padding) * 2,
            output_padding=both(output_padding),
            group=groups,
            dilations=both(dilation),
        )

    return {
        torch.ops.aten.conv_transpose2d.input: conv_transpose2d,
        torch.ops.quantized_decomposed.dequantize_per_channel_group.default: (
            dequantize_per_channel_group
        ),
        torch.ops.tersor.dynamic_linear.default: dynamic_linear,
        torch.ops.tersor.dynamic_lstm.default: dynamic_lstm,
        torch.ops.tersor.multi_head_attention.default: multi_head_attention,
        torch.ops.tersor.projected_attention.default: projected_attention,
    }


def finish(model: Any) -> Any:
    """Rewrite what the exporter wrote into the form that ONNX Runtime and OpenVINO both fuse.

    Numbers do not change, but for the biases of integer Gemms, which are rounded to
    (input scale * weight scale), the step of the 32-bit sums they are added to.

    Args:
        model: onnx.ModelProto; changed and returned. A model without quantized layers stays as it
        is.
    """
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "Cast":
            _fold_cast(graph, node)
    if any(node.op_type == "DequantizeLinear" for node in graph.nodes):
        store_codes(graph)
    for node in list(model.graph.node):
        if node.op_type == "DequantizeLinear" and _attribute(node, "block_size"):
            _transpose_blocks(graph, node)
    for node in list(model.graph.node):
        if node.op_type == "Gemm":
            _round_bias(graph, node)
        elif node.op_type == "DequantizeLinear" and node.input[0] in graph.initializers:
            _own_zeros(graph, node)
    graph.write()
    return model


class _Graph:
    """An ONNX graph with its initializers and consumers by name."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.initializers = {tensor.name: tensor for tensor in proto.initializer}
        self.producers = {name: node for node in proto.node for name in node.output}
        self.nodes = list(proto.node)
        self.used: set[str] = {name for node in proto.node for name in (*node.input, *node.output)}

    def consumers(self, name: str) -> list[Any]:
        return [node for node in self.nodes if name in node.input]

    def is_output(self, name: str) -> bool:
        return any(output.name == name for output in self.proto.output)

    def remove(self, node: Any) -> None:
        self.nodes = [other for other in self.nodes if other is not node]

    def insert_before(self, node: Any, *made: Any) -> None:
        at = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[at:at] = made

    def fresh(self, name: str) -> str:
        made, count = name, 0
        while made in self.used or made in self.initializers:
            count += 1
            made = f"{name}_{count}"
        self.used.add(made)
        return made

    def add(self, name: str, array: np.ndarray, data_type: int | None = None) -> str:
        """Add an initializer; `data_type` packs 4-bit codes."""
        import onnx

        made = self.fresh(name)
        if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            tensor = onnx.TensorProto(name=made, data_type=data_type, dims=array.shape)
            tensor.raw_data = _pack(array)
        else:
            tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), made)
        self.initializers[made] = tensor
        return made

    def array(self, name: str) -> np.ndarray:
        import onnx

        return np.asarray(onnx.numpy_helper.to_array(self.initializers[name]))

    def write(self) -> None:
        """Put nodes and the initializers still used back into the proto."""
        used = {name for node in self.nodes for name in node.input}
        used |= {output.name for output in self.proto.output}
        nodes = list(self.nodes)
        kept = [tensor for name, tensor in self.initializers.items() if name in used]
        del self.proto.node[:]
        self.proto.node.extend(nodes)
        del self.proto.initializer[:]
        self.proto.initializer.extend(kept)


def _fold_cast(graph: _Graph, node: Any) -> None:
    """Turn Cast(initializer) to a format of codes into an initializer of that format."""
    import onnx

    kinds = onnx.TensorProto
    to = _attribute(node, "to")
    if node.input[0] not in graph.initializers or graph.is_output(node.output[0]):
        return
    source = graph.array(node.input[0])
    if to in (kinds.INT4, kinds.UINT4):
        made = graph.add(node.input[0], source, to)
    elif to in (kinds.INT8, kinds.UINT8) and source.dtype.kind in "iu":
        made = graph.add(node.input[0], source.astype(np.int8 if to == kinds.INT8 else np.uint8))
    else:
        return
    _replace(graph, node.output[0], made)
    graph.remove(node)


def _transpose_blocks(graph: _Graph, node: Any) -> None:
    """Store codes (O, I) as (I, O), so that MatMul can take them without a Transpose."""
    if any(name not in graph.initializers for name in node.input if name):
        return
    codes, consumers = graph.initializers[node.input[0]], graph.consumers(node.output[0])
    if len(codes.dims) != 2 or _attribute(node, "axis") != 1 or graph.is_output(node.output[0]):
        return
    if not all(_takes_transposed(consumer, node.output[0]) for consumer in consumers):
        return
    for consumer in consumers:
        if consumer.op_type == "Transpose":
            _replace(graph, consumer.output[0], node.output[0])
            graph.remove(consumer)
        else:
            _split_gemm(graph, consumer)
    for i, name in enumerate(node.input):
        if name:
            kind = graph.initializers[name].data_type
            node.input[i] = graph.add(name, graph.array(name).T, kind)
    for attribute in node.attribute:
        if attribute.name == "axis":
            attribute.i = 0


def _takes_transposed(node: Any, weight: str) -> bool:
    if node.op_type == "Transpose":
        return list(_attribute(node, "perm") or ()) == [1, 0]
    plain = (_attribute(node, "alpha") or 1.0) == (_attribute(node, "beta") or 1.0) == 1.0
    return (
        node.op_type == "Gemm"
        and node.input[1] == weight != node.input[0]
        and bool(_attribute(node, "transB"))
        and not _attribute(node, "transA")
        and plain
    )


def _split_gemm(graph: _Graph, node: Any) -> None:
    """Write Gemm(x, w, bias) as Add(MatMul(x, w), bias)."""
    import onnx

    bias = node.input[2] if len(node.input) > 2 else ""
    product = graph.fresh(f"{node.output[0]}_product") if bias else node.output[0]
    made = [onnx.helper.make_node("MatMul", list(node.input[:2]), [product], name=node.name)]
    if bias:
        made.append(onnx.helper.make_node("Add", [product, bias], [node.output[0]]))
    graph.insert_before(node, *made)
    graph.remove(node)


def _own_zeros(graph: _Graph, node: Any) -> None:
    """Give weights a zero point of their own.

    The exporter shares it between layers of one width; OpenVINO folds one that serves a convolution
    and a linear layer for neither, and then computes both in float.
    """
    zeros = node.input[2] if len(node.input) > 2 else ""
    if zeros in graph.initializers and len(graph.consumers(zeros)) > 1:
        kind = graph.initializers[zeros].data_type
        node.input[2] = graph.add(f"{node.input[0]}_zero", graph.array(zeros), kind)


def _round_bias(graph: _Graph, node: Any) -> None:
    """Give a Gemm of codes the 32-bit integer bias without which ONNX Runtime keeps it in float."""
    import onnx

    if len(node.input) < 3 or node.input[2] not in graph.initializers:
        return
    sides = [graph.producers.get(name) for name in node.input[:2]]
    if any(side is None or side.op_type != "DequantizeLinear" for side in sides):
        return
    if any(side.input[1] not in graph.initializers for side in sides if side is not None):
        return
    left, right = (graph.array(side.input[1]) for side in sides if side is not None)
    if left.size != 1 or right.ndim > 1:
        return
    bias = graph.array(node.input[2])
    step = (left.reshape(()) * right).astype(np.float32)
    codes = np.clip(np.rint(bias / step), -(2**31 - 1), 2**31 - 1).astype(np.int32)
    step = np.broadcast_to(step, codes.shape)
    zeros = graph.add(f"{node.input[2]}_zero", np.zeros(codes.shape, np.int32))
    scale = graph.add(f"{node.input[2]}_scale", step)
    made = graph.fresh(f"{node.input[2]}_dequantized")
    dequantize = onnx.helper.make_node(
        "DequantizeLinear", [graph.add(node.input[2], codes), scale, zeros], [made], axis=0
    )
    graph.insert_before(node, dequantize)
    node.input[2] = made


def _replace(graph: _Graph, old: str, new: str) -> None:
    for node in graph.nodes:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _pack(codes: np.ndarray) -> bytes:
    """Pack 4-bit codes two to a byte, the first one low, as ONNX stores INT4."""
    flat = codes.reshape(-1).astype(np.int16) & 0xF
    if flat.size % 2:
        flat = np.append(flat, 0)
    return bytes((flat[0::2] | (flat[1::2] << 4)).astype(np.uint8))


def _attribute(node: Any, name: str) -> Any:
    import onnx

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return None
