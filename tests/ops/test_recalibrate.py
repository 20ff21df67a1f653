"""Batch norm statistics: the batch's own, and estimated anew."""

import torch
from torch import nn

from tersor.ops.recalibrate import batch_statistics, recalibrate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3, momentum=0.25)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.bn(x))


def test_recalibrate_is_the_mean_over_batches() -> None:
    net = Net().eval()
    batches = [{"x": torch.randn(8, 3) * 3 + 1, "labels": torch.zeros(8)} for _ in range(4)]
    assert recalibrate(net, batches) == 1
    mean = torch.stack([b["x"].mean(0) for b in batches]).mean(0)
    variance = torch.stack([b["x"].var(0) for b in batches]).mean(0)
    torch.testing.assert_close(net.bn.running_mean, mean)
    torch.testing.assert_close(net.bn.running_var, variance)
    assert net.bn.momentum == 0.25
    assert not any(m.training for m in net.modules())


def test_recalibrate_leaves_what_it_cannot_estimate() -> None:
    net = Net()
    net.bn.running_mean.fill_(5)
    assert recalibrate(net, [{"x": torch.randn(1, 3)}]) == 0
    assert net.bn.running_mean.tolist() == [5, 5, 5]
    assert recalibrate(nn.Linear(3, 3), []) == 0


def test_batch_statistics_leave_no_trace() -> None:
    net = Net().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(50, 3) * 4 + 2
    with batch_statistics(net):
        y = net(x)
    torch.testing.assert_close(y, (x - x.mean(0)) / (x.var(0, correction=0) + net.bn.eps).sqrt())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.bn.training
    assert net.bn.momentum == 0.25
