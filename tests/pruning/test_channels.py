"""Channel pruning: what was asked is what is cut, exactly; what cannot be done is said."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.context import Data
from tersor.core.errors import DataError, RecipeError, StepError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.ops.capture import capture
from tersor.ops.groups import couple
from tersor.pruning.channels import Channels, channels
from tests import networks

Make = Callable[..., Any]


def macs(net: nn.Module) -> int:
    return couple(capture(net, networks.inputs()), net).macs()


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_half_of_the_channels(importance: Any, ranking: Any, tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = sum(p.numel() for p in net.parameters())
    context = tiny_context(net)
    config = Channels(ratio=0.5, importance=importance, ranking=ranking, multiple=1)
    smaller = channels(net, config, context)
    assert type(smaller) is networks.TinyCnn
    assert smaller(networks.digits()[0][:3]).shape == (3, 10)
    sizes = [tuple(map(int, text.split(" -> "))) for text in context.facts["groups"].values()]
    assert sum(a for a, _ in sizes) == 64
    # a group keeps one channel, even where all others matter more
    assert 32 <= sum(b for _, b in sizes) <= 32 + (ranking == "global")
    if ranking == "local":
        assert all(2 * b == a for a, b in sizes)
        assert smaller.block2.conv1.out_channels == smaller.block2.bn1.num_features == 8
    assert sum(p.numel() for p in smaller.parameters()) < before / 2 or ranking == "global"
    assert context.facts["macs_after"] == macs(smaller)
    assert context.facts["protected"] == ["10 channels out of fc; protected: the network's output"]


def test_what_stays_is_a_multiple(tiny_context: Make) -> None:
    net = networks.tiny_cnn(width=16)
    smaller = channels(net, Channels(ratio=0.3), tiny_context(net))
    kept = {m.out_channels for m in smaller.modules() if isinstance(m, nn.Conv2d)}
    assert kept == {16, 24}  # 16 -> 11.2 -> 16, 32 -> 22.4 -> 24


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("target", [0.7, 0.3])
def test_macs(target: float, ranking: Any, tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    full = macs(net)
    config = Channels(macs=target, multiple=1, ranking=ranking)
    share = macs(channels(net, config, tiny_context(net))) / full
    # one channel of a group of 8 is a few percent of this network
    assert target - 0.06 < share <= target


def test_ratio_zero_changes_nothing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    same = channels(net, Channels(ratio=0.0), tiny_context(net))
    assert all(torch.equal(v, before[k]) for k, v in same.state_dict().items())


def test_the_same_seed_and_data_give_the_same_network(tiny_context: Make) -> None:
    first, second = (
        channels(net, Channels(importance="taylor", multiple=2), tiny_context(net)).state_dict()
        for net in (networks.tiny_cnn(), networks.tiny_cnn())
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_layers(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    config = Channels(layers=Layers(patterns=("*.conv1", "!block1.*")), multiple=1)
    context = tiny_context(net)
    channels(net, config, context)
    assert context.facts["groups"] == {"block2.conv1": "16 -> 8", "block3.conv1": "16 -> 8"}


@pytest.mark.parametrize("target", ["macs", "parameters", "ratio"])
def test_sensitivity(target: str, tiny_context: Make) -> None:
    """Each group gets its own share; the fragment that is reported gives the same network."""
    net = networks.tiny_cnn()
    before, full = sum(p.numel() for p in net.parameters()), macs(net)
    context = tiny_context(net)
    config = Channels(**{target: 0.6}, ranking="sensitivity", multiple=1)
    made = channels(copy.deepcopy(net), config, context)
    if target == "ratio":
        sizes = [tuple(map(int, t.split(" -> "))) for t in context.facts["groups"].values()]
        assert sum(b for _, b in sizes) <= 0.4 * 64
    else:
        left = macs(made) / full
        if target == "parameters":
            left = sum(p.numel() for p in made.parameters()) / before
        assert 0.45 < left <= 0.6
    sensitivities = context.facts["sensitivities"]
    assert set(sensitivities) == set(context.facts["groups"])
    for own in sensitivities.values():
        assert list(own) == ["0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875"]
        assert own["0.125"] < own["0.875"]
    settings = context.facts["recipe"]["channels"]
    again = Channels(multiple=1, ratios=tuple(settings["ratios"]))
    other = channels(copy.deepcopy(net), again, tiny_context(net))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in made.state_dict().items())


def test_a_silent_group_is_the_least_sensitive(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with torch.no_grad():
        net.block3.bn2.weight.zero_()  # the block adds nothing but a constant
    context = tiny_context(net)
    channels(net, Channels(macs=0.9, ranking="sensitivity", multiple=1), context)
    losses = {n: own["0.5"] for n, own in context.facts["sensitivities"].items()}
    assert min(losses, key=lambda n: losses[n]) == "block3.conv1"


def test_per_cost_takes_what_saves_most(tiny_context: Make) -> None:
    """With equal scores the channels go that save most: here of the first, large grid."""
    net = networks.tiny_cnn()
    context = tiny_context(net)
    config = Channels(macs=0.8, importance="random", ranking="per_cost", multiple=1)
    channels(net, config, context)
    left = {n: int(t.split(" -> ")[-1]) for n, t in context.facts["groups"].items()}
    # a channel of block1.conv1 costs 2 * 8 * 9 * 64, one of block2.conv1 9 * (8 + 16) * 16
    assert left["block1.conv1"] / 8 < left["block2.conv1"] / 16


def test_latency_is_measured(tiny_context: Make) -> None:
    net = networks.tiny_cnn(width=16)

    def cost(nets: Any) -> list[float]:
        return [sum(p.numel() for p in n.parameters()) / 1000 for n in nets]

    context = tiny_context(net, latency=cost)
    before = sum(p.numel() for p in net.parameters())
    made = channels(net, Channels(latency=0.5, multiple=4), context)
    share = sum(p.numel() for p in made.parameters()) / before
    assert share <= 0.5
    assert context.facts["latency_share"] == pytest.approx(share)
    assert 2 <= context.facts["timed"] <= 8
    again = networks.tiny_cnn(width=16)
    with pytest.raises(StepError, match=r"latency 0.01 of the original's cannot be reached"):
        channels(again, Channels(latency=0.01, multiple=4), tiny_context(again, latency=cost))


def test_rounds_with_recovery_between(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = channels(net, Channels(macs=0.4, multiple=1, rounds=2, recovery=0.2), context)
    full = context.facts["macs_before"]
    assert macs(made) / full <= 0.4
    steps = [t.split(" -> ") for t in context.facts["groups"].values()]
    assert all(len(sizes) == 3 for sizes in steps)
    assert all(int(a) >= int(b) >= int(c) for a, b, c in steps)


@pytest.mark.parametrize("importance", ["fisher", "bn_scale", "fpgm", "activation", "random"])
def test_every_importance(importance: Any, tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    channels(net, Channels(importance=importance, multiple=1), context)
    sizes = [tuple(map(int, t.split(" -> "))) for t in context.facts["groups"].values()]
    assert all(2 * b == a for a, b in sizes)


def test_ratios() -> None:
    for entry in ("layer1", "layer1=1.5", "=0.5", "layer1=much"):
        with pytest.raises(ValueError, match=r'ratios: write "layer1.*=0.25", a share in'):
            Channels(ratios=(entry,))
    with pytest.raises(ValueError, match=r"give ratios or macs, not both"):
        Channels(ratios=("a=0.5",), macs=0.5)
    with pytest.raises(ValueError, match=r"ratios say what goes from where; leave out ranking"):
        Channels(ratios=("a=0.5",), ranking="global")
    with pytest.raises(ValueError, match=r"recovery is the training between cuts; give rounds"):
        Channels(macs=0.5, recovery=0.5)
    with pytest.raises(ValueError, match=r"ranking sensitivity finds the shares of one cut"):
        Channels(ranking="sensitivity", rounds=2)
    with pytest.raises(ValueError, match=r"ratios are reached in one cut; leave rounds at 1"):
        Channels(ratios=("a=0.5",), rounds=2)


def test_a_pattern_that_fits_nothing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(RecipeError, match=r"'block1.conf1' fits no group. Did you mean 'block1"):
        channels(net, Channels(ratios=("block1.conf1=0.5",)), tiny_context(net))


def test_dead_channels_go_first(tiny_context: Make) -> None:
    """Silence five of eight channels: whichever the importance, they go, and the outputs stay."""
    for importance in ("l1", "l2", "taylor"):
        net = networks.tiny_cnn()
        with torch.no_grad():
            net.block1.conv1.weight[1:6] = 0
            net.block1.conv2.weight[:, 1:6] = 0
        x = networks.digits()[0][:20]
        wanted = net(x)
        data = Data(calibration=networks.split(0, 128)) if importance == "taylor" else Data()
        context = tiny_context(net, data=data)
        config = Channels(
            ratio=5 / 8,
            multiple=1,
            importance=importance,
            layers=Layers(patterns=("block1.conv1",)),
        )
        before = net.block1.conv1.weight.detach()[[0, 6, 7]].clone()
        found = channels(net, config, context)
        assert torch.equal(found.block1.conv1.weight, before)
        if importance != "taylor":  # with data, statistics are estimated anew
            torch.testing.assert_close(found(x), wanted, rtol=1e-4, atol=1e-5)


def test_recipe_values() -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got 1.0"):
        Channels(ratio=1.0)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got -0.1"):
        Channels(ratio=-0.1)
    with pytest.raises(ValueError, match=r"macs must be in \(0, 1\], got 0"):
        Channels(macs=0)
    with pytest.raises(ValueError, match=r"give ratio or macs, not both"):
        Channels(macs=0.5, ratio=0.5)
    with pytest.raises(ValueError, match=r"multiple must be at least 1, got 0"):
        Channels(multiple=0)


def test_weaker() -> None:
    assert Channels(ratio=0.5).weaker() == Channels(ratio=0.35)
    assert Channels().weaker() == Channels(ratio=0.35)
    assert Channels(macs=0.5).weaker() == Channels(macs=0.65)
    assert Channels(ratio=0.05).weaker() is None
    assert Channels(macs=0.95).weaker() is None


def test_target_that_would_empty_a_layer(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        StepError,
        match=r"macs: 0.01 would empty layers: with 4 channels left in each group 0\.\d+ of the",
    ):
        channels(net, Channels(macs=0.01, multiple=4), tiny_context(net))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_rounding_that_removes_nothing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(
        StepError,
        match=r"nothing would be removed: groups have 8, 16 channels, .* multiple of 8; use a smaller",
    ):
        channels(net, Channels(ratio=0.2), tiny_context(net))


class Fixed(nn.Module):
    """Its forward relies on the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)).reshape(-1, 288))


class Mixing(nn.Module):
    """Nothing of it can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softmax(self.first(x), dim=1).flatten(1))


def test_numbers_written_in_forward_follow(tiny_context: Make) -> None:
    net = Fixed().eval()
    context = tiny_context(net)
    made = channels(net, Channels(multiple=1), context)
    assert context.facts["form"] == "graph"
    assert made.last.in_features == 4 * 36
    assert made(x=networks.digits()[0][:7]).shape == (7, 10)
    assert net.first.out_channels == 8


def test_everything_is_protected(tiny_context: Make) -> None:
    net = Mixing().eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        StepError,
        match=r"no channels of Mixing can be cut, all are protected \(first: softmax mixes channels \(softmax\); last: the network's output\)",
    ):
        channels(net, Channels(), tiny_context(net))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Divides(nn.Module):
    """Computes with the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1))
        return self.last(y / y.shape[1] + y / self.first.out_features)


def test_a_number_computed_from_the_size_stays(tiny_context: Make) -> None:
    context = tiny_context(net := Divides().eval())
    made = channels(net, Channels(), context)
    assert context.facts["form"] == "graph"
    assert made.last.in_features == 8


class Noisy(nn.Module):
    """Never gives the same outputs twice: nothing can be checked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.last(self.first(x) + torch.rand_like(x[:, :1]))


def test_outputs_that_cannot_be_compared_are_refused(tiny_context: Make) -> None:
    net = Noisy().eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(StepError, match=r"of their size from what was meant; its forward computes"):
        channels(net, Channels(), tiny_context(net))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Twice(nn.Module):
    """The first output is exact after any cut, the second never can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        y = self.last(self.first(x))
        return y, y + torch.rand_like(x[:, :1])


def test_every_output_is_compared(tiny_context: Make) -> None:
    net = Twice().eval()
    with pytest.raises(StepError, match=r"of their size from what was meant; its forward computes"):
        channels(net, Channels(), tiny_context(net))


def test_layers_that_do_not_exist_or_exclude_all(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(
        StepError,
        match=r"'block1.conf1' matches no layer with output channels. Did you mean 'block1.conv1'",
    ):
        channels(net, Channels(layers=Layers(patterns=("block1.conf1",))), tiny_context(net))
    with pytest.raises(StepError, match=r"layers excludes every group that could be cut"):
        channels(net, Channels(layers=Layers(patterns=("block1.conv2",))), tiny_context(net))


def test_taylor_needs_labels(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(DataError, match=r"taylor needs calibration data with labels"):
        channels(net, Channels(importance="taylor"), tiny_context(net, data=Data()))


def test_nan_in_the_data(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    bad = [
        {"x": torch.full((2, 1, 8, 8), float("nan")), "labels": torch.zeros(2, dtype=torch.long)}
    ]
    with pytest.raises(StepError, match=r"the loss is nan on calibration batch 1"):
        channels(net, Channels(importance="taylor"), tiny_context(net, data=Data(calibration=bad)))


@pytest.mark.slow
def test_resnet56(workload: Callable[[str], Any], tiny_context: Make) -> None:
    cifar = workload("cifar")
    net = cifar.resnet56()
    example = Inputs(example={"x": torch.randn(2, 3, 32, 32)}, dynamic={"x": {0: "batch"}})
    context = tiny_context(net, inputs=example, data=Data())
    channels(net, Channels(ratio=0.5), context)
    assert len(context.facts["groups"]) == 27
    assert net.layer3[4].conv1.out_channels == 32
    assert context.facts["macs_after"] < 0.52 * context.facts["macs_before"]


def test_frozen_parameters_are_scored_and_stay_frozen(tiny_context: Make) -> None:
    net, other = networks.tiny_cnn(), networks.tiny_cnn()
    net.requires_grad_(False)
    config = Channels(importance="taylor", ranking="global", multiple=1)
    made = channels(net, config, tiny_context(net))
    wanted = channels(other, config, tiny_context(other))
    assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in made.state_dict().items())
    assert not any(p.requires_grad for p in made.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_rounds_reach_the_ratio(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    channels(net, Channels(ratio=0.5, rounds=4, multiple=1), context)
    sizes = [list(map(int, t.split(" -> "))) for t in context.facts["groups"].values()]
    assert all(2 * own[-1] == own[0] and len(own) == 5 for own in sizes)
