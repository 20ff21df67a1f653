"""Lottery tickets: where each round begins, what it prunes, and how it goes on after a stop."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor import trainer
from tersor.core.context import Data
from tersor.core.errors import DataError, UnfitError
from tersor.ops import masks
from tersor.pruning.lottery_ticket import LotteryTicket, lottery_ticket
from tests import networks

Make = Callable[..., Any]
State = dict[str, Tensor]


def state(net: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def watched(config: LotteryTicket, make: Make, net: nn.Module) -> tuple[list[State], list[State]]:
    """Return the network's state at the begin and at the end of each training."""
    begins, ends = [], []

    def fit(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        begins.append(state(net))
        trained = trainer.fit(net, *args, **settings)
        ends.append(state(trained))
        return trained

    result = lottery_ticket(net, config, make(net, fit=masks.holding(fit)))
    masks.settle(result)
    assert all(torch.equal(ends[-1][name], tensor) for name, tensor in state(result).items())
    return begins, ends


def expected_begin(point: State, trained: State, sparsity: float) -> State:
    """Prune the smallest trained weights of each matrix; the others are those of `point`."""
    begin = {}
    for name, tensor in point.items():
        begin[name] = tensor.clone()
        if tensor.dim() > 1:
            count = int(sparsity * tensor.numel() + 1e-6)
            order = trained[name].abs().flatten().argsort(stable=True)
            begin[name].view(-1)[order[:count]] = 0.0
    return begin


def assert_same(found: State, wanted: State) -> None:
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_each_round_takes_the_same_share() -> None:
    config = LotteryTicket(sparsity=0.875, rounds=3)
    assert [config.after(n) for n in (1, 2, 3)] == pytest.approx([0.5, 0.75, 0.875])
    assert LotteryTicket(sparsity=0.9, rounds=7).after(7) == 0.9


def test_rewinding_the_learning_rate(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    given = state(net)
    config = LotteryTicket(rounds=2, epochs=0.3)
    begins, ends = watched(config, tiny_context, net)
    assert len(begins) == 2
    assert_same(begins[0], expected_begin(given, given, config.after(1)))
    assert_same(begins[1], expected_begin(ends[0], ends[0], 0.9))


def test_rewinding_to_the_given_weights(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    given = state(net)
    config = LotteryTicket(rounds=2, epochs=0.3, rewind="given")
    begins, ends = watched(config, tiny_context, net)
    assert_same(begins[0], expected_begin(given, given, config.after(1)))
    assert_same(begins[1], expected_begin(given, ends[0], 0.9))


def test_rewinding_to_the_initialization(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    config = LotteryTicket(rounds=2, epochs=0.3, rewind="initial")
    begins, ends = watched(config, tiny_context, net)
    assert len(begins) == 3
    assert not torch.equal(begins[0]["fc.weight"], networks.tiny_cnn().fc.weight)  # type: ignore[arg-type, union-attr]
    assert (begins[0]["bn1.running_mean"] == 0).all()
    assert_same(begins[1], expected_begin(begins[0], ends[0], config.after(1)))
    assert_same(begins[2], expected_begin(begins[0], ends[1], 0.9))


def test_rewinding_to_an_early_point(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    config = LotteryTicket(rounds=1, epochs=0.3, rewind="initial", early=0.2)
    begins, ends = watched(config, tiny_context, net)
    assert len(begins) == 3
    assert_same(begins[1], ends[0])
    assert_same(begins[2], expected_begin(ends[0], ends[1], 0.9))


def test_the_report(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    lottery_ticket(net, LotteryTicket(sparsity=0.75, rounds=2, epochs=0.2), context)
    assert context.facts["sparsities"] == [0.5, 0.75]
    assert context.facts["epochs"] == pytest.approx(0.4)
    assert context.facts["sparsity"] == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("rewind", ["learning_rate", "given", "initial"])
def test_a_stopped_run_goes_on_to_the_same_bits(rewind: Any, tmp_path: Path) -> None:
    config = LotteryTicket(
        rounds=2, epochs=0.3, rewind=rewind, early=0.2 if rewind == "initial" else 0.0
    )
    calls = itertools.count(1)

    class StopError(Exception):
        pass

    def stopping(*args: Any, on_step: Any, **settings: Any) -> nn.Module:
        number = next(calls)

        def stop(done: int, total: int) -> None:
            if number == 2 and done == 3:
                raise StopError

        return trainer.fit(*args, **settings, on_step=stop, checkpoint_every_s=0)

    def train(place: str, fit: Any = trainer.fit) -> State:
        net = networks.tiny_cnn()
        context = networks.context(net, tmp_path / place, fit=masks.holding(fit))
        return state(lottery_ticket(net, config, context))

    whole = train("whole")
    with pytest.raises(StopError):
        train("parts", stopping)
    assert_same(train("parts"), whole)


def test_zeros_from_before_stay(tiny_context: Make) -> None:
    for rewind in ("learning_rate", "given", "initial"):
        net = networks.tiny_cnn()
        keep = torch.rand(net.fc.weight.shape) > 0.4  # type: ignore[arg-type, union-attr]
        masks.hold(net, {"fc": keep})
        config = LotteryTicket(sparsity=0.6, rounds=1, epochs=0.2, rewind=rewind)  # type: ignore[arg-type]
        net = lottery_ticket(net, config, tiny_context(net))
        assert (net.fc.weight[~keep] == 0).all()  # type: ignore[index, union-attr]
        masks.settle(net)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.flatten(1))
        return y * self.scale


def test_a_network_that_cannot_be_initialized_is_refused(tiny_context: Make) -> None:
    net = Own()
    before = state(net)
    with pytest.raises(
        UnfitError, match=r"Own 'the network itself' has parameters of its own but no reset_paramet"
    ):
        lottery_ticket(net, LotteryTicket(rewind="initial"), tiny_context(net))
    assert_same(state(net), before)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sparsity": -1}, r"sparsity must be in \[0, 1\), got -1"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"early": -1, "rewind": "initial"}, "early must not be negative, got -1"),
        ({"early": 1}, "early is for rewind: initial, got rewind: learning_rate"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": -1}, "lr must be positive, got -1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LotteryTicket(**settings)


def test_what_cannot_be_done_is_said_before_training(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(DataError, match="lottery_ticket needs training data; give `train` batch"):
        lottery_ticket(net, LotteryTicket(), tiny_context(net, data=Data()))


@pytest.mark.parametrize("rewind", ["given", "initial"])
def test_projections_of_attention_are_pruned(rewind: Any, tiny_context: Make) -> None:
    net = networks.AttendingRows()
    context = tiny_context(net)
    config = LotteryTicket(sparsity=0.7, rounds=2, rewind=rewind, epochs=0.3)
    made = masks.settle(lottery_ticket(net, config, context))
    weight = made.attention.in_proj_weight
    assert int((weight == 0).sum()) == int(0.7 * weight.numel())
    assert context.facts["sparsity_by_layer"]["attention.in_projection"] == pytest.approx(0.7, 0.01)
