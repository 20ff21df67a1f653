"""Gradual pruning: the schedule, what goes by size and by movement, and trainers of all kinds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor import trainer
from tersor.core.context import Data
from tersor.core.errors import DataError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.ops import masks
from tersor.pruning.gradual import Gradual, gradual
from tests import networks

Make = Callable[..., Any]
CRITERIA = ("magnitude", "movement")


def sparsity(net: nn.Module) -> dict[str, float]:
    return {
        name: 1 - p.count_nonzero().item() / p.numel()
        for name, p in net.named_parameters()
        if p.dim() > 1
    }


def plain_sgd(
    net: nn.Module, loss: Any, *, batches: Any, epochs: float, on_step: Any, **_: Any
) -> nn.Module:
    """The simplest trainer that keeps to the contract."""
    total, done = int(epochs) * len(batches), 0
    for _pass in range(int(epochs)):
        for batch in batches:
            net.zero_grad()
            loss(net, batch).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
            done += 1
            on_step(done, total)
    return net


def test_the_schedule() -> None:
    config = Gradual(sparsity=0.8, initial=0.2, start=0.1, end=0.6)
    steps = range(101)
    found = [config.asked(step, 100) for step in steps]
    # Zhu and Gupta, equation 1, with n * delta t = 50 and t_0 = 10
    wanted = [
        0.0 if t < 10 else 0.8 + (0.2 - 0.8) * (1 - (min(t, 60) - 10) / 50) ** 3 for t in steps
    ]
    assert found == pytest.approx(wanted, abs=1e-12)
    constant = Gradual(sparsity=0.8, schedule="constant", start=0.3)
    assert [constant.asked(step, 10) for step in (0, 2, 3, 9)] == [0.0, 0.0, 0.8, 0.8]
    line = Gradual(sparsity=0.8, power=1, start=0, end=1)
    assert line.asked(5, 10) == pytest.approx(0.4)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("schedule", ["polynomial", "constant"])
def test_sparsity_asked_is_sparsity_found(
    schedule: Any, criterion: Any, scope: Any, tiny_context: Make
) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    config = Gradual(
        sparsity=0.7, schedule=schedule, criterion=criterion, scope=scope, every=3, end=0.6
    )
    trained = gradual(net, config, context)
    found = sparsity(trained)
    if scope == "layer":
        assert all(value == pytest.approx(0.7, abs=0.015) for value in found.values())
    assert context.facts["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert set(dict(trained.named_buffers())) == set(dict(networks.tiny_cnn().named_buffers()))
    assert not any(p._backward_hooks for p in trained.parameters())
    masks.settle(trained)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_against_plain_loops(criterion: Any, tiny_context: Make) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    batches = [
        {"input": b["x"].double(), "labels": b["labels"]} for b in networks.split(0, 640, size=32)
    ]
    weight, bias = net[1].weight.detach().clone(), net[1].bias.detach().clone()  # type: ignore[union-attr, operator]
    config = Gradual(sparsity=0.6, criterion=criterion, start=0.2, end=0.8, every=4)
    score, keep = torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
    revived = 0
    for step, batch in enumerate(batches, 1):
        x = batch["input"].flatten(1)
        logits = x @ (weight * keep).T + bias
        error = (logits.softmax(1) - F.one_hot(batch["labels"], 10)) / len(x)
        gradient = error.T @ x
        score -= weight * gradient
        weight -= 0.1 * gradient * keep
        bias -= 0.1 * error.sum(0)
        if 4 <= step <= 16 and step % 4 == 0:
            ranked = score if criterion == "movement" else (weight * keep).abs()
            count = int(config.asked(step, 20) * 640 + 1e-6)
            before = keep.clone()
            keep = torch.ones_like(keep)
            keep.view(-1)[ranked.flatten().argsort(stable=True)[:count]] = False
            revived += int((keep & ~before).sum())
    from tersor.ops.losses import labelled_loss

    context = tiny_context(net, data=Data(train=batches), loss=labelled_loss, fit=plain_sgd)
    trained = gradual(net, config, context)
    # scores are kept in float32: the same order, if not the same bits
    assert torch.allclose(trained[1].weight, weight * keep, atol=1e-12)  # type: ignore[index]
    assert (revived > 0) == (criterion == "movement")


def test_weights_that_were_zero_stay_zero(tiny_context: Make) -> None:
    for criterion in CRITERIA:
        net = networks.tiny_cnn()
        keep = torch.rand(net.fc.weight.shape) > 0.4  # type: ignore[arg-type, union-attr]
        masks.hold(net, {"fc": keep})
        trained = gradual(
            net, Gradual(sparsity=0.6, criterion=criterion, every=3), tiny_context(net)
        )
        assert (trained.fc.weight[~keep] == 0).all()  # type: ignore[index, union-attr]
        assert sparsity(trained)["fc.weight"] == 0.6


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_stopped_run_goes_on_to_the_same_bits(criterion: Any, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stopping(*args: Any, on_step: Any, **settings: Any) -> nn.Module:
        def stop(done: int, total: int) -> None:
            on_step(done, total)
            if done == 11:
                raise StopError

        return trainer.fit(*args, **settings, on_step=stop, checkpoint_every_s=0)

    def train(place: str, fit: Any = trainer.fit) -> nn.Module:
        net = networks.tiny_cnn()
        context = networks.context(net, tmp_path / place, fit=masks.holding(fit))
        return gradual(net, Gradual(criterion=criterion, every=2), context)

    whole = train("whole")
    with pytest.raises(StopError):
        train("parts", stopping)
    resumed = train("parts")
    again = train("parts")  # training was done already
    for a, b, c in zip(*(n.state_dict().values() for n in (whole, resumed, again)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_chosen_layers_only(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    config = Gradual(epochs=0.5, every=1, layers=Layers(patterns=("fc",)))
    found = sparsity(gradual(net, config, tiny_context(net)))
    assert {name for name, value in found.items() if value > 0} == {"fc.weight"}


def test_trainers_that_prune_nothing_are_told(tiny_context: Make) -> None:
    def forgets(net: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return net

    def copies(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        return plain_sgd(copy.deepcopy(net), *args, **settings)

    def late(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        trainer.fit(net, *args, **settings)
        with torch.no_grad():
            net.fc.weight.add_(1e-3)  # type: ignore[union-attr, operator]
        return net

    for fit in (forgets, copies):
        net = networks.tiny_cnn()
        with pytest.raises(
            StepError,
            match=r"gradual pruned 0\.00% of the weights instead of 90\.00%: the trainer ",
        ):
            gradual(net, Gradual(), tiny_context(net, fit=fit))
        assert set(dict(net.named_buffers())) == set(dict(networks.tiny_cnn().named_buffers()))
        assert not any(p._backward_hooks for p in net.parameters())
    net = networks.tiny_cnn()
    with pytest.raises(StepError, match="layer 'fc': 144 of 144 pruned weights are not zero after"):
        gradual(net, Gradual(every=2), tiny_context(net, fit=late))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": 0.5, "initial": 0.6}, r"initial must be in \[0, sparsity\], got 0.6"),
        ({"power": 0}, "power must be positive, got 0"),
        ({"start": 0.8, "end": 0.7}, "0 <= start <= end <= 1 must hold, got 0.8 and 0.7"),
        ({"criterion": "movement", "start": 0}, "movement needs steps to see weights move: start"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": 0}, "lr must be positive, got 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Gradual(**settings)


def test_what_cannot_be_done_is_said_before_training(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(DataError, match="gradual needs training data; give `train` batches"):
        gradual(net, Gradual(), tiny_context(net, data=Data()))
    with pytest.raises(UnfitError, match=r"a sparsity of 0\.9999 would leave no weight in layer"):
        gradual(net, Gradual(sparsity=0.9999, scope="global"), tiny_context(net))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_projections_of_attention_are_pruned(criterion: Any, tiny_context: Make) -> None:
    net = networks.AttendingRows(vdim=16)
    context = tiny_context(net)
    trained = gradual(net, Gradual(sparsity=0.7, criterion=criterion, every=3), context)
    found = sparsity(trained)
    assert found["attention.in_proj_weight"] == pytest.approx(0.7, abs=0.01)
    assert set(context.facts["sparsity_by_layer"]) >= {"attention.in_projection", "fc"}
    assert not list(trained.buffers())
    masks.settle(trained)
