"""Histograms of streams, calibrators, and bad calibration data."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import DataError
from tersor.core.model import Inputs
from tersor.ops import calibrators
from tersor.ops.calibrate import histograms
from tersor.ops.calibrators import Histogram
from tersor.ops.capture import capture


def counted(*tensors: Tensor) -> Histogram:
    made = Histogram()
    for tensor in tensors:
        made.add(tensor)
    return made


def test_histogram_counts_everything_while_its_range_grows() -> None:
    parts = [torch.randn(1000) * s + m for s, m in ((1, 0), (10, 3), (0.1, -50), (100, 0))]
    found, everything = counted(*parts), torch.cat(parts).numpy()
    assert found.counts.sum() == everything.size
    assert found.least == everything.min()
    assert found.most == everything.max()
    share = np.cumsum(found.counts) / everything.size
    edges = found.low + np.arange(1, len(share) + 1) * found.width / len(share)
    for quantile in (0.1, 0.5, 0.9):
        exact = np.quantile(everything, quantile)
        near = edges[np.searchsorted(share, quantile)]
        assert abs(near - exact) <= 2 * found.width / len(share)


def test_histogram_takes_constants_empty_and_huge() -> None:
    assert counted(torch.full((10,), 3.0)).most == 3.0
    assert counted(torch.zeros(10)).counts.sum() == 10
    assert counted(torch.zeros(0)).counts.sum() == 0
    wide = counted(torch.tensor([1e-8]), torch.tensor([-1e8, 1e8]))
    assert wide.counts.sum() == 3


def test_min_max_is_exact() -> None:
    x = torch.randn(5000)
    assert calibrators.min_max(counted(x)) == (float(x.min()), float(x.max()))


def test_moving_average_takes_the_ends_of_each_sample() -> None:
    x = torch.randn(50, 3, 20)
    x[7] *= 40
    made = calibrators.Histogram(0, each=True)
    for part in x.split(16):
        made.add(part)
    ends = x.flatten(1).amin(1).mean(), x.flatten(1).amax(1).mean()
    assert calibrators.moving_average(made) == pytest.approx([float(end) for end in ends])
    assert calibrators.min_max(made) == (float(x.min()), float(x.max()))
    alone = calibrators.Histogram(0, each=True)
    alone.add(torch.tensor(2.5))
    assert calibrators.moving_average(alone) == (2.5, 2.5)


def test_percentile_cuts_both_tails() -> None:
    x = torch.randn(200_000)
    low, high = calibrators.percentile(counted(x), 99.0)
    assert low == pytest.approx(np.quantile(x.numpy(), 0.005), abs=0.02)
    assert high == pytest.approx(np.quantile(x.numpy(), 0.995), abs=0.02)


def test_percentile_of_everything_is_min_max() -> None:
    x = torch.randn(1000)
    assert calibrators.percentile(counted(x), 100.0) == calibrators.min_max(counted(x))


def squared_error(x: Tensor, low: float, high: float) -> float:
    scale = (high - low) / 255
    zero = round(-low / scale)
    codes = ((x.double() / scale).round() + zero).clamp(0, 255)
    return float((((codes - zero) * scale - x.double()) ** 2).mean())


def test_mse_beats_min_max_where_there_are_outliers() -> None:
    x = torch.cat([torch.randn(500_000), torch.tensor([8.0, -9.0])])
    ends = calibrators.mse(counted(x))
    assert squared_error(x, *ends) < 0.7 * squared_error(x, float(x.min()), float(x.max()))
    # no candidate of a plain search is much better; the histogram's bins are coarser than x
    best = min(
        squared_error(x, -9 * f, 8 * g)
        for f in np.linspace(0.3, 1, 8)
        for g in np.linspace(0.3, 1, 8)
    )
    assert squared_error(x, *ends) <= 1.1 * best


def test_entropy_clips_outliers_but_not_a_uniform() -> None:
    x = torch.cat([torch.randn(100_000).abs(), torch.tensor([80.0])])
    low, high = calibrators.entropy(counted(x))
    assert low == 0
    assert 3 < high < 40
    assert calibrators.entropy(counted(torch.rand(100_000)))[1] > 0.9


@pytest.mark.parametrize("name", ["min_max", "percentile", "entropy", "mse"])
def test_calibrators_take_dead_and_constant_tensors(name: str) -> None:
    for x in (torch.zeros(100), torch.full((100,), 2.5), torch.full((100,), -1e-30)):
        low, high = getattr(calibrators, name)(counted(x))
        assert np.isfinite([low, high]).all()
        assert low <= high


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


INPUTS = Inputs(example={"x": torch.zeros(2, 1, 8, 8)}, dynamic={"x": {0: "batch"}})


def observe(batches: Any, net: nn.Module | None = None) -> tuple[list[Histogram], int]:
    captured = capture((net or Net()).eval(), INPUTS)
    nodes = [n for n in captured.graph.nodes if n.op != "output"]
    return histograms(captured, [[n] for n in nodes], batches, INPUTS)


def test_sweep_sees_every_value_once() -> None:
    batches = [{"x": torch.randn(n, 1, 8, 8), "labels": torch.zeros(n)} for n in (4, 3)]
    net = Net()
    (x, conv, _relu), samples = observe(batches, net)
    assert samples == 7
    everything = torch.cat([b["x"] for b in batches])
    assert (x.least, x.most, x.counts.sum()) == (
        float(everything.min()),
        float(everything.max()),
        7 * 64,
    )
    made = net.conv(everything)
    assert conv.most == pytest.approx(float(made.detach().max()), rel=1e-5)


def test_memory_does_not_grow_with_samples() -> None:
    few, _ = observe([{"x": torch.randn(2, 1, 8, 8)}])
    many, _ = observe({"x": 1e3 * torch.randn(2, 1, 8, 8)} for _ in range(50))
    assert [h.counts.nbytes for h in few] == [h.counts.nbytes for h in many]


def raising() -> Iterator[dict[str, Tensor]]:
    yield {"x": torch.zeros(2, 1, 8, 8)}
    raise OSError("disk gone")


def bad(value: float) -> list[dict[str, Tensor]]:
    x = torch.zeros(2, 1, 8, 8)
    spoilt = x.clone()
    spoilt[1, 0, 3, 3] = value
    return [{"x": x}, {"x": spoilt}]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the calibration data holds no batch"),
        (raising(), "the calibration data raised at batch 1: OSError: disk gone"),
        ([{"y": torch.zeros(2)}], "calibration batch 0 has no 'x'; it holds y"),
        (
            [{"x": torch.zeros(2, 3, 8, 8)}],
            r"'x' has shape \(2, 3, 8, 8\), expected \(any, 1, 8, 8\)",
        ),
        ([{"x": torch.zeros(2, 8)}], r"'x' has shape \(2, 8\), expected"),
        ([{"x": torch.zeros(2, 1, 8, 8).double()}], "'x' is torch.float64, expected torch.float32"),
        ([torch.zeros(2)], "calibration batch 0 is a Tensor, not a mapping"),
        (bad(float("nan")), "calibration batch 1: 'x' holds NaN or infinity in 1 of 128 values"),
        (bad(float("inf")), "calibration batch 1: 'x' holds NaN or infinity"),
    ],
)
def test_bad_calibration_data(batches: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        observe(batches)


def test_nan_inside_the_network_names_layer_and_batch() -> None:
    net = Net()
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="calibration batch 0 gives NaN or infinity at 'conv'"):
        observe([{"x": torch.randn(2, 1, 8, 8)}], net)
