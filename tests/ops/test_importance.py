"""Scores of channels, against loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import StepError
from tersor.core.model import Inputs
from tersor.ops.capture import capture
from tersor.ops.groups import Group, find_groups
from tersor.ops.importance import magnitude, taylor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.conv(x))).flatten(1))


def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch["x"]), batch["labels"])


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [
        {"x": torch.randn(6, 1, 4, 4), "labels": torch.randint(0, 3, (6,))} for _ in range(count)
    ]


@pytest.fixture
def net() -> Net:
    return Net().eval()


def only_group(net: nn.Module) -> Group:
    captured = capture(net, Inputs(example={"x": torch.randn(2, 1, 4, 4)}))
    (group,) = [g for g in find_groups(captured, net) if not g.protected]
    return group


@pytest.mark.parametrize("order", [1, 2])
def test_magnitude(net: Net, order: int) -> None:
    made, read = [], []
    for k in range(4):
        weights = net.conv.weight[k].flatten().tolist()
        made.append(sum(abs(w) ** order for w in weights) ** (1 / order))
        weights = net.last.weight[:, 4 * k : 4 * k + 4].flatten().tolist()
        read.append(sum(abs(w) ** order for w in weights) ** (1 / order))
    wanted = [
        (m / (sum(made) / 4) + r / (sum(read) / 4)) / 2 for m, r in zip(made, read, strict=True)
    ]
    found = magnitude(net, only_group(net), order)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_taylor_is_the_slope_of_the_loss(net: Net) -> None:
    """Scale what reads a channel by 1 - step: the loss changes by step times the score's root."""
    group, given = only_group(net), batches()
    wanted = torch.zeros(4)
    for batch in given:
        for k in range(4):
            moved = Net().double().eval()
            moved.load_state_dict(net.state_dict())
            wide = {"x": batch["x"].double(), "labels": batch["labels"]}
            before = loss(moved, wide).item()
            with torch.no_grad():
                moved.last.weight[:, 4 * k : 4 * k + 4] *= 1 - 1e-6
            wanted[k] += ((before - loss(moved, wide).item()) / 1e-6) ** 2 / len(given)
    (found,) = taylor(net, [group], loss, given)
    # a difference quotient of float64 with step 1e-6
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-8)
    assert all(p.grad is None for p in net.parameters())


def test_taylor_finds_the_channel_that_does_nothing(net: Net) -> None:
    group = only_group(net)
    with torch.no_grad():
        net.last.weight[:, 8:12] = 0
    (found,) = taylor(net, [group], loss, batches())
    assert found[2] == 0
    assert found.argmin() == 2


def test_not_finite(net: Net) -> None:
    given = batches(2)
    given[1]["x"][0, 0, 0, 0] = float("nan")
    with pytest.raises(StepError, match="the loss is nan on calibration batch 2"):
        taylor(net, [only_group(net)], loss, given)

    def steep(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return net(batch["x"]).sub(net(batch["x"])).abs().sum().sqrt()

    with pytest.raises(
        StepError, match="the gradient of layer 'last' is not finite on calibration batch 1"
    ):
        taylor(net, [only_group(net)], steep, batches())
