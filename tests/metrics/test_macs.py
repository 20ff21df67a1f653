from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.errors import ModelError
from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics.macs import count, macs
from tests import networks

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

X = {"x": np.zeros((2, 1, 8, 8), np.float32)}


def _by_hand(width: int = 8) -> int:
    """Count the small residual network's layers: out pixels * out channels * in channels * kernel."""
    w = width
    first = 64 * w * 1 * 9
    block1 = 2 * 64 * w * w * 9
    block2 = 16 * (2 * w) * w * 9 + 16 * (2 * w) * (2 * w) * 9 + 16 * (2 * w) * w
    block3 = 2 * 16 * (2 * w) * (2 * w) * 9
    return first + block1 + block2 + block3 + 2 * w * 10


def test_macs_of_one_sample_by_hand() -> None:
    found = macs(
        Subject(
            target=Target(runtime="x"),
            net=networks.tiny_cnn(trained=False),
            inputs=[X],
            conditions={"batch": 2},
        )
    )
    assert found.value == _by_hand()
    assert found.unit == "1"
    assert found.how == "multiply-accumulates of one sample, counted at batch 2"


@pytest.mark.parametrize(
    "make",
    [networks.tiny_cnn, pytest.param(networks.tiny_transformer, marks=pytest.mark.slow)],
)
def test_all_forms_agree(make: Callable[..., nn.Module]) -> None:
    from tersor.ops.lower import lower

    net = make(trained=False)
    wanted = count(net, X)
    assert wanted > 0
    program = lower(net, "exported", networks.inputs())
    assert count(program, X) == wanted
    assert count(lower(program, "onnx", networks.inputs()), X) == wanted


def test_quantized_layers_count_like_float_ones() -> None:
    from tersor.ops.modules import quantized

    layer = nn.Conv2d(1, 4, 3)
    assert count(quantized(layer, torch.ones(4)), {"x": X["x"]}) == count(
        nn.Sequential(layer), {"input": X["x"]}
    )


def test_fast_path_of_attention_is_counted_and_put_back() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    found = count(layer, {"src": np.zeros((1, 5, 16), np.float32)})
    assert found == 5 * 16 * 48 + 2 * 5 * 5 * 16 + 5 * 16 * 16 + 2 * 5 * 16 * 32
    assert torch.backends.mha.get_fastpath_enabled() == before


def _model(
    nodes: list[Any],
    inputs: dict[str, list[Any]],
    constants: dict[str, np.ndarray],
    outputs: list[str],
    **opsets: int,
) -> Any:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        values,
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    sets = [
        helper.make_opsetid("", 21),
        *(helper.make_opsetid(d.replace("_", "."), v) for d, v in opsets.items()),
    ]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def test_onnx_operators_by_hand() -> None:
    f = np.float32
    conv = _model(
        [helper.make_node("Conv", ["x", "w"], ["y"], group=2)],
        {"x": ["n", 4, 8, 8]},
        {"w": np.zeros((6, 2, 3, 3), f)},
        ["y"],
    )
    assert count(conv, {"x": np.zeros((3, 4, 8, 8), f)}) == 3 * 6 * 6 * 6 * 2 * 9
    back = _model(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"])],
        {"x": ["n", 4, 8, 8]},
        {"w": np.zeros((4, 5, 2, 2), f)},
        ["y"],
    )
    assert count(back, {"x": np.zeros((1, 4, 8, 8), f)}) == 4 * 64 * 5 * 4
    einsum = _model(
        [helper.make_node("Einsum", ["a", "b"], ["y"], equation="bij,bjk->bik")],
        {"a": ["n", 2, 3], "b": ["n", 3, 5]},
        {},
        ["y"],
    )
    assert (
        count(einsum, {"a": np.zeros((4, 2, 3), f), "b": np.zeros((4, 3, 5), f)}) == 4 * 2 * 3 * 5
    )
    lstm = _model(
        [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=5)],
        {"x": [7, "n", 3]},
        {"w": np.zeros((1, 20, 3), f), "r": np.zeros((1, 20, 5), f)},
        ["y"],
    )
    assert count(lstm, {"x": np.zeros((7, 2, 3), f)}) == 7 * 2 * 20 * (3 + 5)


def test_operators_unknown_to_inference_are_run() -> None:
    pytest.importorskip("onnxruntime")
    packed = {
        "w": np.zeros((8, 1, 16), np.uint8),
        "s": np.ones(8, np.float32),
        "v": np.zeros((8, 4), np.float32),
    }
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["h"],
            domain="com.microsoft",
            K=32,
            N=8,
            bits=4,
            block_size=32,
        ),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    model = _model(nodes, {"x": ["n", 32]}, packed, ["y"], com_microsoft=1)
    assert count(model, {"x": np.zeros((3, 32), np.float32)}) == 3 * 32 * 8 + 3 * 8 * 4


def test_a_branch_with_products_is_refused() -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], name="choose", then_branch=inner, else_branch=inner)
    model = _model([node], {"x": [2, 2], "c": []}, {}, ["y"])
    with pytest.raises(
        ModelError,
        match="the multiply-accumulates inside If 'choose' depend on the data; leave 'macs' out",
    ):
        count(model, {"x": np.zeros((2, 2), np.float32)})


def test_a_network_that_fails_is_named() -> None:
    with pytest.raises(
        ModelError, match="counting multiply-accumulates failed while running the network: "
    ):
        count(nn.Linear(3, 2), {"input": np.zeros((1, 4), np.float32)})


@pytest.mark.slow
def test_workloads_match_their_table(workload: Callable[[str], ModuleType]) -> None:
    evaluate = workload("evaluate")
    for script, name in (("cifar", "resnet20"), ("fashion", "vit"), ("speech", "lstm")):
        module = workload(script)
        net = getattr(module, name)()
        batch = next(iter(module.data()["test"]))
        example = {key: tensor[:1] for key, tensor in batch.items() if key != "labels"}
        arrays = {key: tensor.numpy() for key, tensor in example.items()}
        assert count(net, arrays) == evaluate.count_macs(net, example)
