"""What the teacher sees inside is learnt, too."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.context import Data
from tersor.core.errors import DataError, StepError, UnfitError
from tersor.distillation.distill_features import (
    DistillFeatures,
    attention_distance,
    distill_features,
)
from tersor.ops.features import Apprentice
from tests import networks

Make = Callable[..., Any]


class Spy:
    """A user's own trainer: computes the loss once, while the layers are listened to."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __call__(self, net: nn.Module, loss: Any, **settings: Any) -> nn.Module:
        self.net, self.settings = net, settings
        self.value = loss(net, self.batch).item()
        return net.eval()


def features(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of blocks 1 and 3 of the small CNN, in float64."""
    net = copy.deepcopy(net).double()
    first = net.block1(torch.relu(net.bn1(net.conv1(x.double()))))
    return [first, net.block3(net.block2(first))]


def test_attention_written_out(tiny_context: Make) -> None:
    teacher, student = networks.tiny_cnn(), networks.tiny_cnn(trained=False)
    (batch,) = networks.split(0, 6)
    spy = Spy(batch)
    config = DistillFeatures(weight=3.0, hard=0.0, temperature=2.0, epochs=0.5, lr=0.01)
    context = tiny_context(teacher, fit=spy)
    assert distill_features(student, config, context) is student
    total = 0.0
    for own, its in zip(features(student, batch["x"]), features(teacher, batch["x"]), strict=True):
        for n in range(6):
            maps = [(each[n] ** 2).sum(0).flatten() for each in (own, its)]
            total += sum((maps[0] / maps[0].norm() - maps[1] / maps[1].norm()) ** 2).item() / 12
    p = F.softmax(teacher(batch["x"]) / 2, 1)
    q = F.log_softmax(student(batch["x"]) / 2, 1)
    soft = 4 * F.kl_div(q, p, reduction="batchmean").item()
    assert spy.value == pytest.approx(soft + 3 * total, rel=1e-4)
    assert context.facts["pairs"] == {"block1": "block1", "block3": "block3"}
    assert spy.settings["checkpoint"] == context.work_dir / "distill_features.safetensors"
    assert (spy.settings["epochs"], spy.settings["lr"]) == (0.5, 0.01)


def test_hints_written_out(tiny_context: Make) -> None:
    """Half the width: the projections are made, trained with the student, and thrown away."""
    teacher, student = networks.tiny_cnn(8), networks.tiny_cnn(4, trained=False)
    (batch,) = networks.split(0, 6)
    spy = Spy(batch)
    config = DistillFeatures(match="hints", weight=2.0, hard=1.0)
    found = distill_features(student, config, tiny_context(teacher, fit=spy))
    assert found is student
    assert isinstance(spy.net, Apprentice)
    parts = list(spy.net.parts.children())
    assert [tuple(part.weight.shape) for part in parts] == [(8, 4), (16, 8)]
    total = 0.0
    for part, own, its in zip(
        parts, features(student, batch["x"]), features(teacher, batch["x"]), strict=True
    ):
        weight, bias = part.weight.detach().double(), part.bias.detach().double()
        projected = torch.einsum("oc,nchw->nohw", weight, own) + bias.view(1, -1, 1, 1)
        total += ((projected - its) ** 2).mean().item() / (its**2).mean().item() / 2
    hard = F.cross_entropy(student(batch["x"]), batch["labels"]).item()
    assert spy.value == pytest.approx(hard + 2 * total, rel=1e-4)
    assert not any("parts" in name for name, _ in found.named_modules())


def test_a_student_that_sees_the_same_has_no_distance(tiny_context: Make) -> None:
    for match in ("attention", "hints"):
        net = networks.tiny_cnn()
        (batch,) = networks.split(0, 6)
        spy = Spy({"x": batch["x"]})
        config = DistillFeatures(match=match, hard=0.0)  # type: ignore[arg-type]
        distill_features(net, config, tiny_context(networks.tiny_cnn(), fit=spy))
        assert spy.value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("match", ["attention", "hints"])
def test_it_recovers_what_a_cut_lost(match: Any, tiny_context: Make) -> None:
    teacher = networks.tiny_cnn()
    net = copy.deepcopy(teacher)
    net.block1 = nn.Identity()
    images, labels = networks.digits()

    def accuracy() -> float:
        return (net(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()

    lost = accuracy()
    config = DistillFeatures(match=match, epochs=2, lr=0.05, hard=0.0)
    found = distill_features(net, config, tiny_context(teacher))
    assert found is net
    assert accuracy() > lost + 0.1
    assert not any(m._forward_hooks for m in (*net.modules(), *teacher.modules()))


def test_a_sequential_network_is_not_grown(tiny_context: Make) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        return nn.Sequential(block, nn.Flatten(), nn.Linear(256, 10)).eval()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    student = Named().eval()
    config = DistillFeatures(match="hints", epochs=0.2, hard=0.0)
    found = distill_features(student, config, tiny_context(Named().eval()))
    assert len(found.inside) == 3
    assert found(networks.digits()[0][:2]).shape == (2, 10)


def test_the_teacher_may_be_another(tiny_context: Make) -> None:
    wide = networks.tiny_cnn(16)
    context = replace(tiny_context(networks.tiny_cnn()), teacher=wide)
    (batch,) = networks.split(0, 4)
    spy = Spy(batch)
    distill_features(networks.tiny_cnn(), DistillFeatures(match="hints"), replace(context, fit=spy))
    assert spy.net.parts.get_submodule("1").weight.shape == (32, 16)  # type: ignore[union-attr]


def test_attention_distance_is_between_zero_and_two() -> None:
    one, other = torch.zeros(2, 4, 3), torch.zeros(2, 4, 5)
    one[:, 0], other[:, 1] = 1.0, 2.0
    assert attention_distance(one, other).item() == pytest.approx(2.0)
    assert attention_distance(one, 7 * one).item() == pytest.approx(0.0)


def test_what_does_not_fit(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(DataError, match="distill_features needs training data"):
        distill_features(net, DistillFeatures(), tiny_context(net, data=Data()))
    with pytest.raises(StepError, match="distill_features needs the original network"):
        distill_features(net, DistillFeatures(), tiny_context(net, reference=None))
    with pytest.raises(UnfitError, match="no features of student and teacher can be compared"):
        distill_features(net, DistillFeatures(), tiny_context(networks.tiny_transformer()))
    with pytest.raises(StepError, match="pairs: the student has no features at 'block9'"):
        distill_features(net, DistillFeatures(pairs=("block9",)), tiny_context(net))
    bare = Spy({"x": networks.digits()[0][:4]})
    with pytest.raises(DataError, match="distill_features: batches have no labels; add them, or"):
        distill_features(net, DistillFeatures(), tiny_context(net, fit=bare))
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1.0}, "epochs must not be negative, got -1.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"weight": -1.0}, "weight must not be negative, got -1.0"),
        ({"points": 0}, "points must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"hard": 1.5}, r"hard must be in \[0, 1\], got 1.5"),
    ],
)
def test_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillFeatures(**settings)
