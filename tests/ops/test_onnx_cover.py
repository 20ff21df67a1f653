"""Operators of an optimized graph are traced to those of the file by the names of tensors."""

from typing import Any

import pytest

from tersor.ops.onnx_cover import covered

onnx = pytest.importorskip("onnx")


def model(*nodes: Any) -> Any:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in ("x", "y")]
    return helper.make_model(helper.make_graph(list(nodes), "g", ends[:1], ends[1:]))


def node(kind: str, inputs: str, output: str, name: str | None = None, **attributes: Any) -> Any:
    from onnx import helper

    words = inputs.split()
    return helper.make_node(kind, words, [output], name=name or f"{kind}_{output}", **attributes)


def test_what_lies_between_is_covered() -> None:
    file = model(
        node("MatMul", "x w", "a"),
        node("Add", "a b", "c"),
        node("Gelu", "c", "d"),
        node("Relu", "d", "y"),
    )
    optimized = model(
        node("MatMul", "x w", "a"), node("BiasGelu", "a b", "d"), node("Relu", "d", "y")
    )
    found = [(ran.kind, sorted(ran.covers)) for ran in covered(file, optimized)]
    assert found == [
        ("MatMul", ["MatMul_a"]),
        ("BiasGelu", ["Add_c", "Gelu_d"]),
        ("Relu", ["Relu_y"]),
    ]


def test_blocked_channels_keep_their_names() -> None:
    """A sum and an activation taken into a convolution are told by its fourth input."""
    file = model(
        node("Conv", "x w", "a"),
        node("Relu", "a", "r"),
        node("Conv", "r v", "c"),
        node("Add", "c r", "s"),
        node("Relu", "s", "t"),
        node("Neg", "t", "y"),
    )
    optimized = model(
        node("Conv", "x w", "t0", "r_nchwc", activation="Relu"),
        node("Conv", "t0 v b t0", "t1", "c_nchwc", activation="Relu"),
        node("ReorderOutput", "t1", "t"),
        node("Neg", "t", "y"),
    )
    found = {ran.covers for ran in covered(file, optimized) if ran.kind == "Conv"}
    assert found == {("Relu_r", "Conv_a"), ("Relu_t", "Add_s", "Conv_c")}
