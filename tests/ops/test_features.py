"""Where two networks can be compared, and hearing what their layers say."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import StepError, UnfitError
from tersor.core.model import Inputs
from tersor.ops.features import (
    Apprentice,
    Point,
    find_pairs,
    find_points,
    listening,
    named_pairs,
    relative_error,
    spread,
)
from tersor.ops.notes import note, notes_of
from tests import networks


def names(points: list[Point]) -> list[str]:
    return [point.name for point in points]


def test_blocks_are_points_with_the_size_of_their_maps() -> None:
    points = find_points(networks.tiny_cnn(), networks.inputs())
    assert [(p.name, p.positions, p.channels) for p in points] == [
        ("block1", (8, 8), 8),
        ("block2", (4, 4), 16),
        ("block3", (4, 4), 16),
    ]


def test_layers_where_there_are_no_blocks() -> None:
    points = find_points(networks.tiny_transformer(), networks.inputs())
    assert names(points) == ["embed", "norm1", "qkv", "proj", "norm2", "fc1", "fc2"]
    assert {p.positions for p in points} == {(8,)}


def test_the_outermost_of_what_returns_one_tensor() -> None:
    net = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))
    points = find_points(net, Inputs(example={"input": torch.rand(3, 4)}))
    assert names(points) == ["0"]


def test_the_network_is_left_as_it_was() -> None:
    net = networks.tiny_cnn()
    find_points(net, networks.inputs())
    assert not any(m._forward_hooks for m in net.modules())


def test_pairs_of_networks_of_unequal_depth() -> None:
    """Of nine and of three points those at even depths; the last one is always there."""

    def points(count: int, size: int) -> list[Point]:
        return [Point(name=f"{size}.{i}", positions=(size, size), channels=4) for i in range(count)]

    deep = [*points(9, 8), *points(9, 4)]
    shallow = [*points(3, 8), *points(3, 4), *points(2, 2)]
    for count, wanted in (
        (1, {"8.2": "8.8", "4.2": "4.8"}),
        (2, {"8.1": "8.4", "8.2": "8.8", "4.1": "4.4", "4.2": "4.8"}),
        (5, {f"{s}.{i}": f"{s}.{3 * i + 2}" for s in (8, 4) for i in range(3)}),
    ):
        pairs = find_pairs(shallow, deep, count, maps=True)
        assert {p.student.name: p.teacher.name for p in pairs} == wanted


def test_a_network_and_its_copy_pair_by_name() -> None:
    points = find_points(networks.tiny_cnn(), networks.inputs())
    pairs = find_pairs(points, points, 9, maps=True)
    assert [(p.student.name, p.teacher.name) for p in pairs] == [(n, n) for n in names(points)]


def test_nothing_in_common() -> None:
    points = find_points(networks.tiny_cnn(), networks.inputs())
    other = [Point(name="a", positions=(7,), channels=3)]
    with pytest.raises(
        UnfitError,
        match="maps have the sizes 4x4, 8x8 in the one and 7 in the other",
    ):
        find_pairs(points, other, 1, maps=True)


def test_named_pairs() -> None:
    points = find_points(networks.tiny_cnn(), networks.inputs())
    pairs = named_pairs(points, points, ["block2=block3", "block1"])
    assert [(p.student.name, p.teacher.name) for p in pairs] == [
        ("block2", "block3"),
        ("block1", "block1"),
    ]
    with pytest.raises(
        StepError, match=r"the teacher has no features at 'blok3'. Did you mean 'block3'\?"
    ):
        named_pairs(points, points, ["block2=blok3"])
    with pytest.raises(
        StepError, match=r"maps of size \(8, 8\) cannot be compared with maps of size \(4, 4\)"
    ):
        named_pairs(points, points, ["block1=block2"])


@pytest.mark.parametrize(
    ("shape", "wanted"), [((2, 5), (2, 1, 5)), ((2, 3, 5), (2, 3, 5)), ((2, 5, 3, 4), (2, 12, 5))]
)
def test_spread(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    assert spread(nn.Linear(1, 1), torch.rand(shape)).shape == wanted


def test_spread_of_one_dimensional_convolutions() -> None:
    x = torch.rand(2, 5, 7)
    torch.testing.assert_close(spread(nn.Conv1d(5, 5, 1), x), x.transpose(1, 2))


def test_listening_hears_the_latest_and_stops() -> None:
    net = networks.tiny_cnn()
    batch = networks.digits()[0][:3]
    with listening(net, ["block1"]) as heard:
        net(batch)
        found = heard["block1"]
    stem = torch.relu(net.bn1(net.conv1(batch)))
    torch.testing.assert_close(found, net.block1(stem))
    assert not any(m._forward_hooks for m in net.modules())
    copy.deepcopy(net)


def test_relative_error() -> None:
    found, wanted = torch.randn(6, 4), torch.randn(6, 4)
    total = sum((found[i, j].item() - wanted[i, j].item()) ** 2 for i in range(6) for j in range(4))
    size = sum(wanted[i, j].item() ** 2 for i in range(6) for j in range(4))
    assert relative_error(found, wanted).item() == pytest.approx(total / size, rel=1e-5)
    zero: Tensor = torch.zeros(2, 2)
    assert relative_error(zero, zero).item() == 0


def test_an_apprentice_keeps_the_notes_of_its_student() -> None:
    student = nn.Linear(4, 4)
    note(student, shared=True)
    assert notes_of(Apprentice(student, nn.Identity()))["shared"] is True
