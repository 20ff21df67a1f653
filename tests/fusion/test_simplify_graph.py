"""Fewer operators, the same outputs, never a larger file."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tersor.core.errors import UnfitError
from tersor.fusion.simplify_graph import SimplifyGraph
from tests import networks

pytest.importorskip("onnxslim")
onnx = pytest.importorskip("onnx")


def wasteful(constants: int = 4) -> Any:
    """y = x + a sum of constants, twice through Identity, with an operator that nobody reads."""
    from onnx import TensorProto, helper, numpy_helper

    value = numpy_helper.from_array(np.ones((1, 8), np.float32), "c0")
    nodes = [
        helper.make_node("Add", [f"c{i}", "c0"], [f"c{i + 1}"], name=f"sum{i}")
        for i in range(constants)
    ]
    nodes += [
        helper.make_node("Identity", ["x"], ["a"], name="idle"),
        helper.make_node("Relu", ["a"], ["dead"], name="unread"),
        helper.make_node("Add", ["a", f"c{constants}"], ["y"], name="last"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "wasteful", ends[:1], ends[1:], [value])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_dead_and_idle_operators_go(tiny_context: Callable[..., Any]) -> None:
    from tersor.core.model import Inputs
    from tersor.fusion.simplify_graph import simplify_graph

    model = wasteful()
    x = torch.randn(3, 8)
    context = tiny_context(None, inputs=Inputs(example={"x": x}))
    before = model.SerializeToString()
    made = simplify_graph(model, SimplifyGraph(), context)
    assert model.SerializeToString() == before
    assert [node.op_type for node in made.graph.node] == ["Add"]
    assert made.ByteSize() <= model.ByteSize()
    assert context.facts["operators"] == [7, 1]
    import onnxruntime

    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], x.numpy() + 5)


def test_a_graph_that_is_simple(tiny_context: Callable[..., Any]) -> None:
    from tersor.fusion.simplify_graph import simplify_graph
    from tersor.ops.lower import lower

    model = lower(networks.tiny_cnn(trained=False), "onnx", networks.inputs())
    with pytest.raises(UnfitError, match=r"takes none of the \d+ operators out"):
        simplify_graph(model, SimplifyGraph(), tiny_context(None))


def test_a_file_does_not_grow(tiny_context: Callable[..., Any]) -> None:
    """Constants that are computed may be larger than what computes them."""
    from onnx import TensorProto, helper, numpy_helper

    from tersor.core.model import Inputs
    from tersor.fusion.simplify_graph import simplify_graph

    shape = numpy_helper.from_array(np.array([64, 64], np.int64), "shape")
    one = numpy_helper.from_array(np.ones((1,), np.float32), "one")
    nodes = [
        helper.make_node("Expand", ["one", "shape"], ["wide"], name="grows"),
        helper.make_node("MatMul", ["x", "wide"], ["y"], name="product"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "growing", ends[:1], ends[1:], [shape, one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    context = tiny_context(None, inputs=Inputs(example={"x": torch.randn(2, 64)}))
    with pytest.raises(UnfitError, match=r"the file would grow from [\d,]+ to [\d,]+ bytes"):
        simplify_graph(model, SimplifyGraph(), context)


def test_rounds_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds must be 1 to 10, got 0"):
        SimplifyGraph(rounds=0)
