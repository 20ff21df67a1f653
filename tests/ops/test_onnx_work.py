"""Multiply-accumulates and compulsory bytes of fused operators."""

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

from tersor.ops.ceilings import product
from tersor.ops.onnx_work import Counter


def graph():
    """Return y = relu(conv(x) + x), one 3x3 convolution of 4 channels in 2 groups, then a Gemm."""
    weight = numpy_helper.from_array(np.ones((4, 2, 3, 3), np.float32), "w")
    flat = numpy_helper.from_array(np.ones((5, 100), np.float32), "v")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", group=2, pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "x"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "v"], ["y"], name="gemm", transB=1),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [weight, flat],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_work_of_fused_operators():
    counter = Counter(graph(), {"x": np.zeros((2, 4, 5, 5), np.float32)})
    work = counter.work(["conv", "add", "relu"])
    assert work.macs == 2 * 4 * 25 * 2 * 9
    assert work.weight_bytes == 4 * 4 * 2 * 9
    # x once, although two operators read it; r; what lies between is not moved
    assert work.moved_bytes == 4 * (2 * 4 * 25) * 2
    assert work.intensity == pytest.approx(2 * work.macs / (work.weight_bytes + work.moved_bytes))
    assert (work.shape, work.groups, work.integers) == ((4, 2, 3, 3), 2, False)
    alone = counter.work(["add"])
    assert (alone.macs, alone.moved_bytes) == (0, 4 * 200 * 3)
    gemm = counter.work(["y"])  # by its output's name
    assert (gemm.macs, gemm.shape) == (2 * 100 * 5, (100, 5))
    assert counter.work(["nowhere"]).macs == 0
    assert counter.work(["nowhere"]).intensity == 0


def test_integers_are_bytes():
    counter = Counter(product("int8", 16), {"x": np.zeros((16, 16), np.float32)})
    work = counter.work(["product", "r", "v"])
    assert work.integers
    assert work.macs == 16**3
    # the weight, two scales and zero points; the quantized x and y in float
    assert work.weight_bytes == 256 + 4 + 1 + 1
    assert work.moved_bytes == 256 + 4 * 256
    assert not counter.work(["product"]).integers
    # a runtime that moved the dequantizations into the product, and names them nowhere
    folded = counter.work(["product"], ["product", "q"])
    assert folded.integers
    assert (folded.weight_bytes, folded.moved_bytes) == (work.weight_bytes, work.moved_bytes)
    # one that runs them by themselves multiplies in float
    assert not counter.work(["product"], ["product", "q", "r", "v"]).integers
