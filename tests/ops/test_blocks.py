"""Which modules are residual blocks, and what stands in for them."""

import pytest
import torch
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops.blocks import PassThrough, bypass, bypassed, find_blocks
from tests import networks


def test_blocks_of_a_residual_network() -> None:
    net = networks.tiny_cnn(trained=False)
    blocks, refused = find_blocks(net, networks.inputs())
    assert [(b.name, b.kind, b.substitute) for b in blocks] == [
        ("block1", "Block", nn.Identity),
        ("block3", "Block", nn.Identity),
    ]
    assert blocks[0].parameters == sum(p.numel() for p in net.block1.parameters())
    assert refused == {}


class Branch(nn.Module):
    """Same shapes in and out, but no way around: leaving it out would double x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Scaled(nn.Module):
    """Pre-norm block that is called with a second argument; has an addition that is none of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(8), Branch()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.branch(self.norm(x)) * scale


class Pair(nn.Module):
    """Nested: the inner ones count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scaled(), Scaled()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.second(self.first(x, scale), scale=scale)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.twice, self.asked = Pair(), Scaled(), Scaled()
        self.plain = Branch()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(1, keepdim=True)
        x = self.plain(self.pair(x, scale))
        x = self.twice(self.twice(x, scale), scale)
        return self.asked(x, scale) * self.asked.norm.weight


def test_rules() -> None:
    net = Net().eval()
    before = dict(net.named_modules())
    blocks, refused = find_blocks(net, Inputs(example={"x": torch.randn(3, 8)}))
    assert [b.name for b in blocks] == ["pair.first", "pair.second"]
    assert {b.substitute for b in blocks} == {PassThrough}
    # the network reads a weight of this block: it cannot do without
    assert refused == {"asked": "AttributeError: 'PassThrough' object has no attribute 'norm'"}
    assert dict(net.named_modules()) == before


def test_bypass_passes_the_first_argument() -> None:
    net = Pair().eval()
    x, scale = torch.randn(3, 8), torch.randn(3, 1)
    blocks, _ = find_blocks(net, Inputs(example={"x": x, "scale": scale}))
    with bypassed(net, blocks[:1]):
        torch.testing.assert_close(net(x, scale), net.second(x, scale))
    assert isinstance(net.first, Scaled)
    bypass(net, blocks)
    assert torch.equal(net(x, scale), x)
    assert type(net.first)(**net.first.arguments()).training


def test_bypassed_restores_after_an_error() -> None:
    net = networks.tiny_cnn(trained=False)
    blocks, _ = find_blocks(net, networks.inputs())
    with pytest.raises(ValueError, match="stop"), bypassed(net, blocks):
        raise ValueError("stop")
    assert isinstance(net.block1, networks.Block)


def test_real_networks(workload: object) -> None:
    assert callable(workload)
    x = {"x": torch.randn(2, 1, 28, 28)}
    blocks, _ = find_blocks(workload("fashion").vit(), Inputs(example=x))
    assert [b.name for b in blocks] == [f"blocks.{i}" for i in range(6)]
    blocks, _ = find_blocks(workload("fashion").mobilenet_v2(), Inputs(example=x))
    assert len(blocks) == 11
    blocks, _ = find_blocks(
        workload("cifar").resnet20(), Inputs(example={"x": torch.randn(2, 3, 32, 32)})
    )
    assert [b.name for b in blocks] == [f"layer1.{i}" for i in range(3)] + [
        "layer2.1",
        "layer2.2",
        "layer3.1",
        "layer3.2",
    ]
