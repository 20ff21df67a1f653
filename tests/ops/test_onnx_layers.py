"""Layers of operators, by the names of their weights."""

import pytest

pytest.importorskip("onnx")

import numpy as np
from onnx import helper, numpy_helper

from tersor.ops.onnx_layers import layers_of


def test_weights_keep_their_name_through_rounding_and_transposition() -> None:
    ones = np.ones((2, 2), np.float32)
    weights = ["block.0.conv.weight", "fc.weight_q", "fc.bias", "val_3"]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "block.0.conv.weight"], ["a"], name="node_conv"),
            helper.make_node("DequantizeLinear", ["fc.weight_q", "val_3"], ["q"]),
            helper.make_node("Transpose", ["q"], ["t"]),
            helper.make_node("Gemm", ["a", "t", "fc.bias"], ["b"], name="node_linear"),
            helper.make_node("Mul", ["b", "val_3"], ["y"], name="node_mul"),
        ],
        "g",
        [],
        [],
        [numpy_helper.from_array(ones, name) for name in weights],
    )
    found = layers_of(helper.make_model(graph))
    assert found == {"node_conv": "block.0.conv", "node_linear": "fc"}
