import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics.parameters import count, parameters
from tests import networks


def _learned(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameters_of_a_module() -> None:
    net = networks.tiny_cnn(trained=False)
    found = parameters(Subject(target=Target(runtime="x"), net=net))
    assert found.value == _learned(net)
    assert found.unit == "1"


def test_a_shared_tensor_counts_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert count(net) == 16 + 4 + 4


def test_quantizing_does_not_change_the_count() -> None:
    from tersor.ops.modules import GroupedLinear, quantized

    layer = nn.Conv2d(3, 8, 3)
    assert count(quantized(layer, torch.ones(8))) == _learned(layer)
    grouped = GroupedLinear(64, 10, bits=4, group_size=32, symmetric=False)
    assert count(grouped) == 64 * 10 + 10


def test_running_statistics_are_not_counted() -> None:
    assert count(nn.BatchNorm2d(8)) == 16


def test_the_exported_program_agrees() -> None:
    from tersor.ops.lower import lower

    net = networks.tiny_transformer(trained=False)
    assert count(lower(net, "exported", networks.inputs())) == _learned(net)


def test_onnx_agrees_but_for_the_form_of_batch_norm() -> None:
    pytest.importorskip("onnx")
    from tersor.ops.lower import lower

    net = networks.tiny_cnn(trained=False)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # equal tensors would be stored once
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.0)
    found = count(lower(net, "onnx", networks.inputs()))
    assert found in (_learned(net), _learned(net) - sum(m.num_features for m in norms))


def test_onnx_counts_a_gain_that_is_also_a_statistic() -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    ones, zeros = (
        onnx.numpy_helper.from_array(np.full(4, value, np.float32), name)
        for name, value in (("ones", 1), ("zeros", 0))
    )
    node = helper.make_node("BatchNormalization", ["x", "ones", "zeros", "zeros", "ones"], ["y"])
    graph = helper.make_graph([node], "g", [onnx.ValueInfoProto(name="x")], [], [ones, zeros])
    assert count(helper.make_model(graph)) == 8


def test_int8_onnx_counts_codes_and_not_scales() -> None:
    pytest.importorskip("onnx")
    from tersor.core.model import Inputs
    from tersor.ops.lower import lower
    from tersor.ops.modules import quantized

    layer = nn.Conv2d(1, 8, 3)
    net = nn.Sequential(quantized(layer, torch.full((8,), 0.01)))
    inputs = Inputs(example={"input": torch.zeros(2, 1, 8, 8)}, dynamic={"input": {0: "batch"}})
    assert count(lower(net, "onnx", inputs)) == _learned(layer)
