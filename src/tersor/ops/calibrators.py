"""Ranges of activations: min_max, moving_average, percentile, entropy, mse.

Each is a function (histogram) -> (low, high), the range that gets codes; what lies outside is
clipped.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Calibrator = Callable[["Histogram"], tuple[float, float]]
_LEVELS = 256
_STEPS = 100
"""Candidate ranges tried by entropy and mse."""


class Histogram:
    """A histogram of a stream of tensors in fixed memory.

    The range doubles, and neighboring bins merge, when a value falls outside; counts stay exact.

    Args:
        bins: An even number; 0 keeps the ends alone, which is all that `min_max` reads.
        each: Average the ends of each sample (rows of the first dimension), for `moving_average`.
    """

    counts: np.ndarray
    low: float
    width: float
    least: float
    most: float
    each: bool
    samples: int
    averages: np.ndarray
    """Mean over samples of the least and the largest value (2,)."""

    def __init__(self, bins: int = 2048, each: bool = False) -> None:
        assert bins % 2 == 0
        self.each, self.samples, self.averages = each, 0, np.zeros(2)
        self.counts = np.zeros(bins)
        self.low = self.width = 0.0
        self.least, self.most = np.inf, -np.inf

    @property
    def centers(self) -> np.ndarray:
        """Middle of each bin."""
        bins = len(self.counts)
        return self.low + (np.arange(bins) + 0.5) * (self.width / bins)

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        x = x.detach().float()
        if x.numel() == 0:
            return
        ends = torch.aminmax(x)
        least, most = float(ends.min), float(ends.max)
        if not (np.isfinite(least) and np.isfinite(most)):
            raise ValueError("NaN or infinity")
        self.least, self.most = min(self.least, least), max(self.most, most)
        if self.each:
            own = [torch.aminmax(sample) for sample in (x if x.dim() else x[None])]
            found = np.array([[float(e.min), float(e.max)] for e in own])
            self.samples += len(found)
            self.averages += (found - self.averages).sum(0) / self.samples
        if not len(self.counts):
            return
        if not self.width:
            self.low = least
            self.width = max(most - least, 1e-6 * max(abs(least), abs(most)), 1e-20)
        self._widen(least, most)
        inside = x.clamp(self.low, self.low + self.width)
        counted = torch.histc(inside, len(self.counts), self.low, self.low + self.width)
        self.counts += counted.double().numpy()

    def _widen(self, least: float, most: float) -> None:
        while least < self.low or most > self.low + self.width:
            merged = self.counts.reshape(-1, 2).sum(1)
            if least < self.low:
                self.low -= self.width
                self.counts = np.concatenate([np.zeros_like(merged), merged])
            else:
                self.counts = np.concatenate([merged, np.zeros_like(merged)])
            self.width *= 2


def min_max(histogram: Histogram) -> tuple[float, float]:
    """Keep everything that was seen."""
    return float(histogram.least), float(histogram.most)


def moving_average(histogram: Histogram) -> tuple[float, float]:
    """Average the ends of each sample, so that single outliers are clipped.

    Source:
        Jacob et al., arXiv:1712.05877, section 3.1; all samples weigh the same here.
    """
    low, high = histogram.averages
    return float(low), float(high)


def percentile(histogram: Histogram, percent: float = 99.99) -> tuple[float, float]:
    """Keep `percent` of the values; as many are clipped at either end."""
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    cut = (100 - percent) / 200
    edges = histogram.low + np.arange(len(share) + 1) * (histogram.width / len(share))
    low = edges[int(np.searchsorted(share, cut, side="right"))]
    high = edges[min(int(np.searchsorted(share, 1 - cut)) + 1, len(share))]
    return max(float(low), histogram.least), min(float(high), histogram.most)


def entropy(histogram: Histogram) -> tuple[float, float]:
    """Choose the range whose codes keep most information.

    Source:
        Migacz, 8-bit inference with TensorRT, GTC 2017: the clipped histogram against its rounded
        self, by Kullback-Leibler divergence. There the range is symmetric; here both ends shrink by
        the same factor. The bin of zero is left out of both, as there.
    """
    return _best(histogram, _divergence, both=True)


def mse(histogram: Histogram) -> tuple[float, float]:
    """Choose the range with the smallest squared error of rounding and clipping.

    Both ends shrink together at first, then each by itself.
    """
    return _best(histogram, _squared_error, both=False)


def _best(
    histogram: Histogram, loss: Callable[[Histogram, float, float], float], both: bool
) -> tuple[float, float]:
    """Shrink the ends of the range in steps and keep the best."""
    low, high = min(histogram.least, 0.0), max(histogram.most, 0.0)
    if high == low:
        return low, high
    factors = [float(f) for f in np.linspace(1.0, 1 / _STEPS, _STEPS)]
    best = min(((low * f, high * f) for f in factors), key=lambda ends: loss(histogram, *ends))
    if both:
        return best
    for _ in range(2):
        best = min(((best[0], high * f) for f in factors), key=lambda ends: loss(histogram, *ends))
        best = min(((low * f, best[1]) for f in factors), key=lambda ends: loss(histogram, *ends))
    return best


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    scale = (high - low) / (_LEVELS - 1)
    if scale <= 0:
        return float("inf")
    x = histogram.centers
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(x / scale) + zero, 0, _LEVELS - 1) - zero) * scale
    return float(histogram.counts @ np.square(rounded - x))


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    counts, centers = histogram.counts.copy(), histogram.centers
    bin_width = histogram.width / len(counts)
    counts[np.abs(centers) <= bin_width / 2] = 0
    scale = (high - low) / (_LEVELS - 1)
    inside = (centers >= low - bin_width / 2) & (centers <= high + bin_width / 2)
    if inside.sum() < _LEVELS // 2 or scale <= 0:
        return float("inf")
    kept = counts[inside]
    reference = kept.copy()
    reference[0] += counts[~inside & (centers < low)].sum()
    reference[-1] += counts[~inside & (centers > high)].sum()
    total = reference.sum()
    if total == 0:
        return float("inf")
    code = np.clip(np.round((centers[inside] - low) / scale), 0, _LEVELS - 1).astype(int)
    filled = kept > 0
    mass = np.bincount(code, kept, _LEVELS)
    bins = np.bincount(code, filled, _LEVELS)
    spread = np.where(filled, mass[code] / np.maximum(bins[code], 1), 0)
    p, q = reference / total, spread / max(spread.sum(), 1e-300)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())
