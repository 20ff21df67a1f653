"""Mixed precision is for dense convolutions only."""

import torch
from torch import nn

from tersor.ops.precision import channels_last, computes_bf16, gains_from_bf16


def test_which_networks_gain() -> None:
    dense = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU())
    depthwise = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16))
    linear = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(100, 100))
    assert gains_from_bf16(dense) is computes_bf16()
    assert not gains_from_bf16(depthwise)
    assert not gains_from_bf16(linear)


def test_layout_is_as_it_was() -> None:
    net = nn.Conv2d(8, 16, 3)
    weight = net.weight.detach().clone()
    with channels_last(net):
        assert net.weight.is_contiguous(memory_format=torch.channels_last)
        assert not net.weight.is_contiguous()
    assert net.weight.is_contiguous()
    assert torch.equal(net.weight, weight)
