"""Programs in operators that the ONNX exporter translates as they are.

Decomposing a program means that the exporter traces it a second time, which takes longer than
writing it. What needs no decomposition, or only another spelling, is spared that.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
DIRECT = frozenset(
    [
        str(operator.getitem),
        str(operator.mul),
        *(
            f"aten.{name}"
            for name in (
                "add.Tensor",
                "arange.default",
                "avg_pool2d.default",
                "bitwise_not.default",
                "cat.default",
                "chunk.default",
                "conv1d.default",
                "conv2d.default",
                "div.Tensor",
                "embedding.default",
                "expand.default",
                "flatten.using_ints",
                "gelu.default",
                "hardtanh.default",
                "layer_norm.default",
                "linear.default",
                "masked_fill.Scalar",
                "max_pool2d.default",
                "mean.dim",
                "mul.Tensor",
                "new_zeros.default",
                "pad.default",
                "permute.default",
                "relu.default",
                "reshape.default",
                "scaled_dot_product_attention.default",
                "select.int",
                "slice.Tensor",
                "sum.dim_IntList",
                "sym_size.int",
                "_to_copy.default",
                "transpose.int",
                "unbind.int",
                "unsqueeze.default",
                "view.default",
                "zeros_like.default",
            )
        ),
        *(
            f"quantized_decomposed.{name}"
            for name in (
                "dequantize_per_channel.default",
                "dequantize_per_tensor.default",
                "quantize_per_tensor.default",
            )
        ),
    ]
)
"""Operators that the exporter translates without decomposing them first."""
_FRESH = (_ATEN.zeros_like.default, _ATEN.ones_like.default, _ATEN.full_like.default)
"""What makes memory that nothing else shares."""


def make_direct(program: ExportedProgram, known: Collection[Any]) -> bool:
    """Spell a program's operators as the exporter translates them, where that is all it takes.

    Args:
        program: Changed in place; it computes the same.
        known: Operators with translations of our own.

    Returns:
        Whether every operator can be translated now.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in calls:
        if node.target is _ATEN._assert_tensor_metadata.default and not node.users:
            program.graph.erase_node(node)
        else:
            _respell(node)
    return all(
        node.target in known or str(node.target) in DIRECT
        for node in program.graph.nodes
        if node.op == "call_function"
    )


def _respell(node: fx.Node) -> None:
    if node.target is _ATEN.to.dtype:
        x, dtype = node.args[:2]
        node.target, node.args, node.kwargs = _ATEN._to_copy.default, (x,), {"dtype": dtype}
    elif node.target is _ATEN.masked_fill_.Scalar:
        filled = node.args[0]
        if isinstance(filled, fx.Node) and filled.target in _FRESH and len(filled.users) == 1:
            node.target = _ATEN.masked_fill.Scalar
    elif node.target is _ATEN.unflatten.int:
        sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        if sizes.count(-1) <= 1:
            node.target, node.args = _ATEN.reshape.default, (node.args[0], sizes)
