"""Features are learnt without a single label."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.context import Data
from tersor.core.errors import DataError, StepError
from tersor.distillation.distill_self_supervised import (
    DistillSelfSupervised,
    Prototypes,
    distill_self_supervised,
)
from tests import networks

Make = Callable[..., Any]


def test_the_loss_on_prototypes_written_out() -> None:
    """Two calls: the second one's targets are centered by what the first one saw."""
    parts = Prototypes(5, 5, 7, seed=0)
    directions = parts.directions.double()
    center = [0.0] * 7
    for _ in range(2):
        own, its = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
        cosines: list[list[list[float]]] = [[], []]
        for features, into in zip((its.double(), own.double()), cosines, strict=True):
            for row in features.flatten(0, 1):
                length = math.sqrt(sum(v.item() ** 2 for v in row))
                into.append([(row @ directions[:, k]).item() / length for k in range(7)])
        total = 0.0
        for teacher, student in zip(*cosines, strict=True):
            p = [math.exp((z - c) / 0.04) for z, c in zip(teacher, center, strict=True)]
            q = [math.exp(z / 0.1) for z in student]
            total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True)) / 6
        assert parts(own, its, 0.04, 0.1).item() == pytest.approx(total, rel=1e-4)
        means = [sum(row[k] for row in cosines[0]) / 6 for k in range(7)]
        center = [0.9 * c + 0.1 * m for c, m in zip(center, means, strict=True)]
        torch.testing.assert_close(parts.center, torch.tensor(center), rtol=1e-4, atol=1e-6)


def test_prototypes_are_the_seeds() -> None:
    a, b, c = (Prototypes(4, 6, 9, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.directions, b.directions)
    assert torch.equal(a.project.weight, b.project.weight)  # type: ignore[arg-type]
    assert not torch.equal(a.directions, c.directions)


def test_it_recovers_what_a_cut_lost_without_labels(tiny_context: Make) -> None:
    teacher = networks.tiny_cnn()
    net = copy.deepcopy(teacher)
    net.block1 = nn.Identity()
    images, labels = networks.digits()
    bare = Data(train=[{"x": batch["x"]} for batch in networks.split(0, 1200)])

    def accuracy() -> float:
        return (net(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()

    lost = accuracy()
    context = tiny_context(teacher, data=bare)
    found = distill_self_supervised(net, DistillSelfSupervised(epochs=2, lr=0.05), context)
    assert found is net
    assert accuracy() > lost + 0.1
    assert context.facts["features"] == {"student": "fc", "teacher": "fc"}
    assert not any(m._forward_pre_hooks for m in (*net.modules(), *teacher.modules()))


def test_a_narrower_student(tiny_context: Make) -> None:
    net = networks.tiny_cnn(4)
    context = tiny_context(networks.tiny_cnn(8))
    found = distill_self_supervised(net, DistillSelfSupervised(epochs=0.2), context)
    assert found(networks.digits()[0][:2]).shape == (2, 10)


def test_a_network_without_a_head(tiny_context: Make) -> None:
    """Where the last operator is no linear layer the outputs are the features."""

    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).relu()

    teacher, net = Map().eval(), Map().eval()
    with torch.no_grad():
        net.conv.weight.mul_(0.5)
    x = networks.digits()[0][:64]

    def error() -> float:
        return (net(x) - teacher(x)).square().mean().item()

    before = error()
    context = tiny_context(teacher)
    distill_self_supervised(net, DistillSelfSupervised(epochs=2, lr=0.02, match=4), context)
    assert error() < 0.6 * before
    assert context.facts["features"] == {"student": "output", "teacher": "output"}


def test_what_does_not_fit(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(DataError, match="distill_self_supervised needs training data"):
        distill_self_supervised(net, DistillSelfSupervised(), tiny_context(net, data=Data()))
    with pytest.raises(StepError, match="distill_self_supervised needs the original network"):
        distill_self_supervised(net, DistillSelfSupervised(), tiny_context(net, reference=None))
    fewer = networks.tiny_cnn()
    fewer.fc = nn.Linear(16, 3)
    with pytest.raises(StepError, match=r"and outputs \(64, 3\) with \(64, 10\); positions and"):
        distill_self_supervised(fewer, DistillSelfSupervised(), tiny_context(net))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1.0}, "epochs must not be negative, got -1.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"prototypes": 1}, "prototypes must be at least 2, got 1"),
        ({"sharp": 0.0}, "sharp must be positive, got 0.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"match": -1.0}, "match must not be negative, got -1.0"),
    ],
)
def test_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillSelfSupervised(**settings)
