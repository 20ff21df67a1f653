"""Nonzeros: in every form what is not zero is counted, and never too little."""

import pytest
import torch
from torch import nn

from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics import parameters
from tersor.metrics.nonzeros import count, nonzeros
from tersor.ops.lower import lower
from tests import networks


def sparse() -> nn.Module:
    net = networks.tiny_transformer(trained=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(0.1, 1, generator=generator)
            parameter.view(-1)[::3] = 0
    return net


def plain(net: nn.Module) -> int:
    return sum(1 for p in net.parameters() for value in p.flatten().tolist() if value != 0)


def test_in_every_form() -> None:
    net = sparse()
    found = nonzeros(Subject(target=Target(runtime="x"), net=net))
    assert found.value == plain(net)
    assert (found.unit, found.better) == ("1", "lower")
    assert count(lower(net, "exported", networks.inputs())) == plain(net)
    pytest.importorskip("onnx")
    model = lower(net, "onnx", networks.inputs())
    zeros = parameters.count(net) - plain(net)
    assert parameters.count(model) - count(model) == zeros


def test_shared_tensors_count_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    net[0].weight.data.fill_(1.0)[0] = 0
    assert count(net) == 12


def test_codes() -> None:
    from tersor.ops.modules import quantized

    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data.fill_(1.0)[:, ::2] = 0
    assert count(quantized(layer, torch.full((4,), 1 / 127))) == 16
