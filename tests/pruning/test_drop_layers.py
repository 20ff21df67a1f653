"""Which blocks go, when to stop, and what is said when it cannot be done."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.context import Data
from tersor.core.errors import DataError, StepError
from tersor.core.layers import Layers
from tersor.pruning.drop_layers import DropLayers, drop_layers
from tests import networks

Make = Callable[..., Any]


class Add(nn.Module):
    """Residual block whose weight says how much it does."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.layer.weight.data *= strength
        self.layer.bias.data *= strength

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Wide(nn.Module):
    """Residual block that does nothing, with many parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.down.weight.data.zero_()
        self.down.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    def __init__(self, *strengths: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Add(s) for s in strengths))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x.flatten(1)))


class Cost:
    """A latency that is known: two for the head and one for each block; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, nets: Sequence[nn.Module]) -> list[float]:
        self.calls += 1
        return [2.0 + sum(isinstance(m, Add) for m in net.modules()) for net in nets]


def gone(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if type(m) is nn.Identity]


def chain(*strengths: float) -> nn.Module:
    torch.manual_seed(0)
    return Chain(*strengths).eval()


def test_the_blocks_that_do_least_go_first(tiny_context: Make) -> None:
    net = chain(1.0, 0.01, 2.0, 0.1, 0.03)
    context = tiny_context(copy.deepcopy(net))
    found = drop_layers(net, DropLayers(blocks=3), context)
    assert gone(found) == ["blocks.1", "blocks.3", "blocks.4"]
    assert [r["block"] for r in context.facts["removed"]] == ["blocks.1", "blocks.4", "blocks.3"]
    scores = [r["score"] for r in context.facts["removed"]]
    assert scores == sorted(scores)


def test_scores_are_the_rise_of_the_divergence(tiny_context: Make) -> None:
    net = chain(1.0, 0.02, 0.5)
    whole = copy.deepcopy(net)
    context = tiny_context(whole)
    drop_layers(net, DropLayers(blocks=2, samples=100), context)
    x = torch.cat([b["x"] for b in networks.split(0, 256)])[:100]
    log_q = F.log_softmax(whole(x).double(), 1)

    def rise(*blocks: int) -> float:
        cut = copy.deepcopy(whole)
        for i in blocks:
            cut.blocks[i] = nn.Identity()
        log_p = F.log_softmax(cut(x).double(), 1)
        return (
            sum(
                (log_q[i, c].exp() * (log_q[i, c] - log_p[i, c])).item()
                for i in range(100)
                for c in range(10)
            )
            / 100
        )

    found = context.facts["removed"]
    assert found[0]["score"] == pytest.approx(rise(1), abs=1e-5)
    assert found[1]["score"] == pytest.approx(rise(1, 2) - rise(1), abs=1e-5)


@pytest.mark.parametrize(("share", "count"), [(0.95, 1), (0.7, 3), (0.5, 5), (0.21, 8)])
def test_latency_is_reached_with_the_fewest_blocks(
    share: float, count: int, tiny_context: Make
) -> None:
    net = chain(*(0.1 * i for i in range(1, 9)))
    cost = Cost()
    context = tiny_context(copy.deepcopy(net), latency=cost)
    drop_layers(net, DropLayers(latency=share), context)
    assert len(gone(net)) == count
    assert context.facts["latency_share"] == (10 - count) / 10
    assert cost.calls <= 4


@pytest.mark.slow
def test_measured_on_the_target(tiny_context: Make) -> None:
    net = networks.tiny_cnn(width=32)
    context = tiny_context(networks.tiny_cnn(width=32))
    found = drop_layers(net, DropLayers(latency=0.9), context)
    assert type(found) is networks.TinyCnn
    assert 0 < context.facts["latency_share"] <= 0.9
    assert {"block1", "block3"} & set(gone(found))
    assert found(networks.digits()[0][:2]).shape == (2, 10)


def test_parameters_are_saved_too(tiny_context: Make) -> None:
    """Of blocks that do as little, the larger ones go first, until enough parameters are gone."""
    net = chain(0.0, 0.0, 0.0, 1.0)
    wide = Wide()
    net.blocks.insert(2, wide)
    total = sum(p.numel() for p in net.parameters())
    context = tiny_context(copy.deepcopy(net), latency=lambda nets: [1.0, 0.9][: len(nets)])
    share = 1 - 0.9 * sum(p.numel() for p in wide.parameters()) / total
    cut = drop_layers(copy.deepcopy(net), DropLayers(latency=0.95, parameters=share), context)
    assert context.facts["removed"][0]["block"] == "blocks.2"
    assert sum(p.numel() for p in cut.parameters()) <= share * total


def test_no_block_changes_nothing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    drop_layers(net, DropLayers(blocks=0), tiny_context(networks.tiny_cnn()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert type(net.block1) is networks.Block


def test_the_reference_stays(tiny_context: Make) -> None:
    reference = networks.tiny_cnn()
    before = copy.deepcopy(reference.state_dict())
    drop_layers(networks.tiny_cnn(), DropLayers(blocks=1), tiny_context(reference))
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    assert all(p.is_contiguous() for p in reference.parameters())


def test_layers(tiny_context: Make) -> None:
    net = chain(1.0, 0.01, 2.0)
    config = DropLayers(blocks=1, layers=Layers(patterns=("!blocks.1",)))
    drop_layers(net, config, tiny_context(copy.deepcopy(net)))
    assert gone(net) == ["blocks.0"]


def test_values() -> None:
    with pytest.raises(ValueError, match=r"latency must be in \(0, 1\), got 1.5"):
        DropLayers(latency=1.5)
    with pytest.raises(ValueError, match=r"blocks must not be negative, got -1"):
        DropLayers(blocks=-1)
    with pytest.raises(ValueError, match=r"give latency or blocks, not both"):
        DropLayers(latency=0.5, blocks=2)
    with pytest.raises(ValueError, match=r"samples must be at least 1, got 0"):
        DropLayers(samples=0)


def test_weaker() -> None:
    assert DropLayers(latency=0.5).weaker() == DropLayers(latency=0.65)
    assert DropLayers().weaker() == DropLayers(latency=0.79)
    assert DropLayers(latency=0.86).weaker() is None
    assert DropLayers(blocks=5).weaker() == DropLayers(blocks=3)
    assert DropLayers(blocks=1).weaker() is None


def test_too_many_or_too_fast(tiny_context: Make) -> None:
    net = chain(1.0, 0.5)
    context = tiny_context(copy.deepcopy(net), latency=Cost())
    with pytest.raises(StepError, match=r"3 blocks are to go, but only 2 can: blocks.0, blocks.1"):
        drop_layers(net, DropLayers(blocks=3), context)
    with pytest.raises(
        StepError,
        match=r"latency 0.4 of the original's cannot be reached: without all 2 blocks that can go it is still 0.50",
    ):
        drop_layers(net, DropLayers(latency=0.4), context)
    assert gone(net) == []


def test_no_blocks_or_no_data(tiny_context: Make) -> None:
    net = networks.tiny_transformer(trained=False)
    with pytest.raises(
        StepError, match=r"TinyTransformer has no residual block that could be removed"
    ):
        drop_layers(net, DropLayers(), tiny_context(net))
    net = chain(1.0)
    with pytest.raises(StepError, match=r"found blocks.0, but layers excludes them"):
        drop_layers(net, DropLayers(layers=Layers(patterns=("*", "!blocks.0"))), tiny_context(net))
    with pytest.raises(
        StepError, match=r"'blockz.0' matches no residual block. Did you mean 'blocks.0'"
    ):
        drop_layers(net, DropLayers(layers=Layers(patterns=("blockz.0",))), tiny_context(net))
    with pytest.raises(DataError, match=r"drop_layers needs calibration data"):
        drop_layers(net, DropLayers(), tiny_context(net, data=Data()))
