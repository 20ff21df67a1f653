"""A smaller copy of a network, made of its own weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.errors import UnfitError
from tersor.distillation.student import Student, student, thinned
from tests import networks

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("count", "depth", "stay"),
    [
        (12, 0.5, [0, 2, 4, 6, 8, 10]),
        (9, 0.5, [0, 1, 3, 5, 7]),
        (3, 0.5, [0, 1]),
        (6, 0.34, [0, 2, 4]),
        (4, 0.9, [0, 1, 2, 3]),
        (1, 0.5, [0]),
    ],
)
def test_every_second_one(count: int, depth: float, stay: list[int]) -> None:
    names = [str(i) for i in range(count)]
    assert [n for n in names if n not in thinned(names, depth)] == [str(i) for i in stay]


def test_half_the_depth_has_the_teachers_weights(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    context = tiny_context(net, data=networks.data())
    found = student(net, Student(), context)
    assert isinstance(found.block3, nn.Identity)
    assert not isinstance(found.block1, nn.Identity)
    assert context.facts == {"left_out": ["block3"], "recalibrated": 5}
    for name, tensor in found.named_parameters():
        assert torch.equal(tensor, before[name])


def test_half_the_width(tiny_context: Make) -> None:
    net = networks.tiny_cnn(16)
    context = tiny_context(net)
    found = student(copy.deepcopy(net), Student(width=0.5, multiple=1), context)
    assert (found.conv1.out_channels, found.block3.conv2.out_channels) == (8, 16)
    kept = [tuple(row.flatten().tolist()) for row in found.conv1.weight.detach()]
    given = [tuple(row.flatten().tolist()) for row in net.conv1.weight.detach()]
    assert set(kept) <= set(given)
    assert context.facts["macs_after"] < 0.3 * context.facts["macs_before"]
    assert all(text.split(" -> ")[1] != text.split(" -> ")[0] for text in context.facts["channels"].values())  # fmt: skip


def test_both(tiny_context: Make) -> None:
    net = networks.tiny_cnn(16)
    found = student(net, Student(depth=0.5, width=0.5), tiny_context(net))
    assert isinstance(found.block3, nn.Identity)
    assert found.fc.in_features == 16


def test_where_there_is_nothing_to_leave_out(tiny_context: Make) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    with pytest.raises(UnfitError, match=r"depth 0.5 leaves out no block of Plain: .* found none"):
        student(Plain(), Student(), tiny_context(net))
    with pytest.raises(
        UnfitError, match=r"depth 0.9 leaves out no block of TinyCnn.*block1, block3"
    ):
        student(networks.tiny_cnn(), Student(depth=0.9), tiny_context(net))
    with pytest.raises(UnfitError, match="nothing would be removed: groups have"):
        student(networks.tiny_cnn(), Student(width=0.9), tiny_context(net))


def test_weaker() -> None:
    assert Student().weaker() == Student(depth=0.65)
    assert Student(width=0.5).weaker() == Student(width=0.65)
    assert Student(depth=0.9, width=0.9).weaker() is None


def test_values() -> None:
    with pytest.raises(ValueError, match=r"depth must be in \(0, 1\), got 1"):
        Student(depth=1)
    with pytest.raises(ValueError, match=r"width must be in \(0, 1\), got 0"):
        Student(width=0)
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        Student(multiple=0)
