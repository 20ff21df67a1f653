"""The teacher's answers are what is learnt."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.context import Data
from tersor.core.errors import DataError, StepError
from tersor.distillation.distill_logits import DistillLogits, distill_logits
from tersor.ops.losses import labelled_loss
from tests import networks

Make = Callable[..., Any]


class Spy:
    """A user's own trainer: keeps what it is given."""

    def __call__(self, net: nn.Module, loss: Any, **settings: Any) -> nn.Module:
        self.loss, self.settings = loss, settings
        return net.eval()


def test_the_loss_written_out(tiny_context: Make) -> None:
    teacher, student, spy = networks.tiny_cnn(), networks.tiny_cnn(trained=False), Spy()
    context = tiny_context(teacher, fit=spy)
    config = DistillLogits(temperature=3.0, hard=0.25, epochs=0.5, lr=0.01)
    assert distill_logits(student, config, context) is student
    (batch,) = networks.split(0, 20)
    own, wanted = student(batch["x"]).double(), teacher(batch["x"]).double()
    p, q = F.softmax(wanted / 3, 1), F.softmax(own / 3, 1)
    soft = (
        9
        * sum((p[i, c] * (p[i, c] / q[i, c]).log()).item() for i in range(20) for c in range(10))
        / 20
    )
    hard = F.cross_entropy(own, batch["labels"]).item()
    assert spy.loss(student, batch).item() == pytest.approx(0.25 * hard + 0.75 * soft, rel=1e-4)
    assert spy.settings == {
        "batches": context.data.train,
        "epochs": 0.5,
        "lr": 0.01,
        "seed": 0,
        "checkpoint": context.work_dir / "distill_logits.safetensors",
        "on_step": None,
    }


def test_labels_are_not_needed_without_their_loss(tiny_context: Make) -> None:
    teacher, spy = networks.tiny_cnn(), Spy()
    student = networks.tiny_cnn()
    distill_logits(student, DistillLogits(hard=0.0), tiny_context(teacher, fit=spy))
    x = networks.digits()[0][:20]
    assert spy.loss(student, {"x": x}).item() == pytest.approx(0, abs=1e-6)
    distill_logits(student, DistillLogits(), tiny_context(teacher, fit=spy))
    with pytest.raises(DataError, match="batches have no labels; add them, or set hard: 0"):
        spy.loss(student, {"x": x})


def test_it_recovers_what_a_cut_lost(tiny_context: Make) -> None:
    teacher = networks.tiny_cnn()
    net = copy.deepcopy(teacher)
    net.block1 = net.block3 = nn.Identity()
    before = copy.deepcopy(teacher.state_dict())
    images, labels = networks.digits()

    def accuracy(net: nn.Module) -> float:
        return (net(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()

    lost = accuracy(net)
    context = tiny_context(teacher)
    distill_logits(net, DistillLogits(epochs=2, lr=0.05), context)
    assert accuracy(net) > lost + 0.1
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert context.facts == {"epochs": 2, "temperature": 4.0, "hard": 0.1}


def test_zero_epochs_change_nothing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    distill_logits(net, DistillLogits(epochs=0), tiny_context(networks.tiny_cnn()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_numbers_are_compared_by_their_squares(tiny_context: Make) -> None:
    spy, teacher, student = Spy(), nn.Linear(3, 2), nn.Linear(3, 2)
    context = tiny_context(teacher, fit=spy, loss=labelled_loss)
    distill_logits(student, DistillLogits(hard=0.5), context)
    batch = {"input": torch.randn(5, 3), "labels": torch.randn(5, 2)}
    own, wanted = student(batch["input"]), teacher(batch["input"])
    found = spy.loss(student, batch)
    torch.testing.assert_close(
        found, 0.5 * F.mse_loss(own, batch["labels"]) + 0.5 * F.mse_loss(own, wanted)
    )


def test_the_users_own_loss_is_the_hard_one(tiny_context: Make) -> None:
    def own(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["x"]).square().mean()

    spy, teacher = Spy(), networks.tiny_cnn()
    data = replace(networks.data(), loss=own)
    distill_logits(
        teacher, DistillLogits(hard=1.0), tiny_context(teacher, fit=spy, data=data, loss=own)
    )
    (batch,) = networks.split(0, 8)
    assert spy.loss(teacher, batch).item() == pytest.approx(own(teacher, batch).item())


def test_what_is_missing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(DataError, match="distill_logits needs training data"):
        distill_logits(net, DistillLogits(), tiny_context(net, data=Data()))
    with pytest.raises(StepError, match="needs the original network as its teacher"):
        distill_logits(net, DistillLogits(), tiny_context(net, reference=None))
    spy = Spy()
    distill_logits(net, DistillLogits(), tiny_context(nn.Flatten(), fit=spy, reference=Named()))
    (batch,) = networks.split(0, 8)
    with pytest.raises(StepError, match=r"outputs have shape \(8, 10\), the original's \(8, 64\)"):
        spy.loss(net, batch)


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_values() -> None:
    for settings, message in (
        ({"epochs": -1.0}, "epochs must not be negative, got -1.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"hard": 1.5}, r"hard must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillLogits(**settings)
