"""ONNX networks in 16 bits, run by ONNX Runtime."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from tersor.core.errors import TargetError
from tersor.ops.lower import lower
from tersor.ops.onnx_half import to_half
from tersor.quantization.static import Static, static
from tests import networks


def run(model: Any, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("rounded", [False, True])
def test_computes_nearly_the_same(rounded: bool, tiny_context: Any) -> None:
    """fp16 keeps 11 bits: after nine layers outputs differ by some 2**-9 of their size."""
    net = networks.tiny_cnn()
    context = tiny_context(net)
    if rounded:
        net = static(net, Static(symmetric=True), context)
    model = lower(net, "onnx", networks.inputs())
    before = model.SerializeToString()
    made = to_half(model, "fp16")
    onnx.checker.check_model(made, full_check=True)
    assert model.SerializeToString() == before
    kinds = {t.data_type for t in made.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    x = networks.split(1200, 1264)[0]["x"].numpy()
    wanted, found = run(model, x), run(made, x)
    assert found.dtype == np.float32
    error = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))
    assert 0 < error < (0.05 if rounded else 2**-8)


def test_bf16_is_well_formed() -> None:
    """Convolutions take bf16 from opset 22 on."""
    made = to_half(lower(networks.tiny_cnn(), "onnx", networks.inputs()), "bf16")
    assert made.opset_import[0].version == 22
    onnx.checker.check_model(made, full_check=True)
    assert TensorProto.BFLOAT16 in {t.data_type for t in made.graph.initializer}


def small(nodes: list[Any], constants: dict[str, Any]) -> Any:
    shape = ["n", 1, 2, 2]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_constants_beyond_the_range_become_its_ends() -> None:
    model = small([helper.make_node("Min", ["x", "top"], ["y"])], {"top": 1e6})
    (top,) = to_half(model, "fp16").graph.initializer
    assert float(numpy_helper.to_array(top)) == 65504


def test_sizes_of_a_resize_stay_float32() -> None:
    model = small(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")],
        {"scales": [1, 1, 2, 2]},
    )
    made = to_half(model, "fp16")
    assert made.graph.initializer[0].data_type == TensorProto.FLOAT
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(run(made, x), x.repeat(2, 2).repeat(2, 3))


def test_an_output_that_is_read_again_is_turned_once() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    model = small(nodes, {})
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 1, 2, 2]))
    made = to_half(model, "fp16")
    onnx.checker.check_model(made, full_check=True)
    x = np.array([[[[-1.0, 2.0], [3.0, -4.0]]]], np.float32)
    np.testing.assert_array_equal(run(made, x), np.maximum(x, 0))


def test_branches_are_refused() -> None:
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "b", [], [
        helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    ])  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="fork")
    with pytest.raises(TargetError, match=r"^a network with If \('fork'\) cannot be turned to"):
        to_half(small([node], {}), "fp16")
