"""Groups in another order: the network computes what it did."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.ops.capture import capture
from tersor.ops.groups import Group, find_groups
from tersor.ops.permute import permute
from tests import networks


class Chain(nn.Module):
    """Everything channels run through: depthwise, grouped, transposed, concat, flatten, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.down = nn.Conv2d(6, 4, 2, stride=2)
        self.other = nn.Conv2d(1, 4, 1)
        self.fc = nn.Linear(8 * 64, 16)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)
            self.bn.weight.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.depthwise(F.relu(self.bn(self.first(x)))))
        y = self.down(F.relu(self.up(F.relu(self.grouped(y)))))
        both = torch.cat([y, self.other(x)], 1)
        return self.head(F.relu(self.fc(both.flatten(1))))


def groups_of(net: nn.Module) -> list[Group]:
    return [g for g in find_groups(capture(net, networks.inputs()), net) if not g.protected]


@pytest.mark.parametrize("make", [Chain, networks.tiny_cnn, networks.tiny_transformer])
def test_every_free_group_in_any_order_computes_the_same(make: Any) -> None:
    net = make().eval()
    x = networks.digits()[0][:4]
    with torch.no_grad():
        wanted = net(x)
    groups = groups_of(net)
    assert groups
    for group in groups:
        before = copy.deepcopy(net.state_dict())
        order = torch.randperm(group.size).tolist()
        permute(net, group, order)
        with torch.no_grad():
            # sums in another order
            assert torch.allclose(net(x), wanted, atol=1e-4), str(group)
        after = net.state_dict()
        moved = {k.rpartition(".")[0] for k in after if not torch.equal(after[k], before[k])}
        assert order == sorted(order) or {n for n, _ in group.indices} <= moved
        permute(net, group, sorted(range(group.size), key=order.__getitem__))
        assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_what_cannot_move_is_refused_and_nothing_changes() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1, groups=2), nn.PReLU(4))
    before = copy.deepcopy(net.state_dict())
    swap = ((0,), (1,), (2,), (3,))
    for indices, order, text in (
        ({("0", "out"): swap, ("1", "in"): swap}, [2, 1, 0, 3], "1 holds its channels in groups"),
        ({("0", "out"): swap, ("2", "both"): swap}, [1, 0, 2, 3], r"2 is a PReLU, whose channels"),
        ({("0", "out"): ((0, 1), (2,))}, [1, 0], "0 holds some of its channels more often than"),
    ):
        with pytest.raises(ValueError, match=text):
            permute(net, Group(indices=indices), order)  # type: ignore[arg-type]  # ports are literals
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
