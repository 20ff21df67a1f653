"""Intervals and paired tests: what may be said from noisy numbers.

All intervals are 95 %. Speeds are compared by the median of per-block log ratios with a circular
block bootstrap, since neighboring blocks share the machine's mood; shares of correct answers by
Wilson's interval, and by a paired one where two networks saw the same samples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Verdict = Literal["faster", "slower", "no difference"]
Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two contestants timed interleaved: how many times faster `b` is than `a`."""

    speedup: float
    """Time of a / time of b: median over blocks."""
    low: float
    high: float
    """The 95 % interval of `speedup`."""
    verdict: Verdict
    """Of b: the whole interval is on one side of 1 and the median at least `min_effect` away."""
    min_effect: float
    """Smallest relative difference that is called one."""
    blocks: int
    """Interleaved blocks behind it."""
    a_ms: float
    b_ms: float
    """Milliseconds of a batch: median over blocks."""
    stable: bool
    """Whether the interval came within 2 % before the time budget ended."""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Milliseconds of a batch by block, of "a" and "b": everything above follows from them."""
    how: str = ""
    """For a reader."""
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)
    """batch, threads, targets."""
    warnings: tuple[str, ...] = ()
    """What made the machine unfit for timing."""
    self_check: Mapping[str, Any] | None = None
    """What the same procedure finds between a and a second copy of a."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        row = (
            f"{self.speedup:.3f}x [{self.low:.3f}, {self.high:.3f}]",
            self.verdict,
            f"{self.a_ms:.4g}",
            f"{self.b_ms:.4g}",
        )
        head = ("speed of b", "verdict", "a, ms", "b, ms")
        return shown("", head, [row], (self.how, *self.warnings))


def judge(
    a_ms: np.ndarray, b_ms: np.ndarray, *, min_effect: float = 0.03, seed: int = 0
) -> Comparison:
    """Compare two contestants' block times.

    Args:
        a_ms: Milliseconds of a batch in each block, shape (blocks,).
        b_ms: The same of b, in the same blocks.
        min_effect: Relative difference below which no verdict is given, >= 0.
        seed: Decides the bootstrap.

    Returns:
        The comparison, without `how`.

    Source:
        Politis and Romano, "A circular block-resampling procedure for stationary data", 1992. The
        verdict asks for both significance and size: among two copies of one network the first alone
        errs in 5 of 100, the second alone whenever the machine is noisy.
    """
    assert a_ms.shape == b_ms.shape
    assert a_ms.size > 0
    middle, low, high = log_ratio_interval(np.log(a_ms) - np.log(b_ms), seed=seed)
    verdict: Verdict = "no difference"
    if low > 0 and middle >= math.log1p(min_effect):
        verdict = "faster"
    elif high < 0 and middle <= -math.log1p(min_effect):
        verdict = "slower"
    return Comparison(
        speedup=math.exp(middle),
        low=math.exp(low),
        high=math.exp(high),
        verdict=verdict,
        min_effect=min_effect,
        blocks=a_ms.size,
        a_ms=float(np.median(a_ms)),
        b_ms=float(np.median(b_ms)),
        stable=half_width(low, high) <= 0.02,
        samples={"a": a_ms.tolist(), "b": b_ms.tolist()},
    )


def half_width(low: float, high: float) -> float:
    """Return half the width of an interval of log ratios, as a share of the ratio."""
    return math.expm1((high - low) / 2)


def log_ratio_interval(
    logs: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Bootstrap the median of a series whose neighbors are alike.

    The interval is never narrower than the order-statistic one, which holds for independent blocks:
    of 30 of those the block bootstrap alone covers the truth in 87 of 100, not in 95.

    Args:
        logs: Per-block log ratios in the order of time, shape (blocks,).
        resamples: Bootstrap resamples.
        seed: Decides them.

    Returns:
        Median, low and high end of its 95 % interval.
    """
    count = logs.size
    length = math.ceil(count ** (1 / 3))
    rng = np.random.default_rng(seed)
    steps = np.arange(length)
    at_once = max(1, 2_000_000 // count)  # bounds the memory
    medians = []
    for begin in range(0, resamples, at_once):
        rows = min(at_once, resamples - begin)
        starts = rng.integers(count, size=(rows, math.ceil(count / length), 1))
        index = ((starts + steps) % count).reshape(rows, -1)[:, :count]
        medians.append(np.median(logs[index], axis=1))
    low, high = np.quantile(np.concatenate(medians), [0.025, 0.975])
    least = median_interval(logs)
    return float(np.median(logs)), min(float(low), least[0]), max(float(high), least[1])


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % order-statistic (binomial) interval of a median; needs no distribution.

    Below six values it is their whole range, which then covers less than 95 %.
    """
    ordered = np.sort(values)
    below = _at_most(ordered.size, 0.5)
    rank = max(0, int((2 * below <= 0.05).sum()) - 1)
    return float(ordered[rank]), float(ordered[ordered.size - 1 - rank])


def quantile_interval(values: np.ndarray, share: float) -> tuple[float, float] | None:
    """Return the 95 % order-statistic (binomial) interval of a quantile.

    None where there are too few values to bound it from above: a 90th percentile needs 36.
    """
    ordered = np.sort(values)
    below = _at_most(ordered.size, share)
    low = int((below <= 0.025).sum()) - 1
    high = int((below < 0.975).sum()) + 1
    if low < 0 or high > ordered.size - 1:
        return None
    return float(ordered[low]), float(ordered[high])


def _at_most(count: int, share: float) -> np.ndarray:
    """Return the chances that at most 0 ... count of so many values lie below a quantile."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    successes = np.arange(count + 1)
    chances = np.exp(
        logs[count]
        - logs
        - logs[::-1]
        + successes * math.log(share)
        + (count - successes) * math.log1p(-share)
    )
    return np.cumsum(chances)


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` independent trials, in [0, 1].

    Source:
        Wilson, "Probable inference", 1927.
    """
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, Z * Z / count
    middle = (share + square / 2) / (1 + square)
    reach = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of independent values (normal approximation)."""
    reach = Z * float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.inf
    return float(values.mean()) - reach, float(values.mean()) + reach


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Compare the shares of correct answers of two networks on the same samples.

    Args:
        before: Share of each sample's labels that the first network got right, shape (samples,):
            0 or 1 where a sample has one label.
        after: The same of the second network.

    Returns:
        after - before in [-1, 1], and its 95 % interval.

    Source:
        Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial
        proportions based on paired data", 2012, for one label a sample; else the interval of the
        mean of the samples' differences, since the labels of one sample are not independent.
    """
    assert before.shape == after.shape
    differences = after.astype(np.float64) - before
    count = differences.size
    gained, lost = int((differences == 1).sum()), int((differences == -1).sum())
    value = float(differences.mean())
    if gained + lost != np.count_nonzero(differences):
        return value, mean_interval(differences)
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    reach = Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    low, high = max(-1.0, up - down - reach), min(1.0, up - down + reach)
    return value, (min(low, value), max(high, value))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p value that two networks are equally often right.

    Args:
        gained: Samples only the second got right.
        lost: Samples only the first got right.

    Source:
        McNemar, 1947, with the exact binomial distribution.
    """
    total, fewer = gained + lost, min(gained, lost)
    if total == 0:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1)
        for i in range(fewer + 1)
    ]
    tail = sum(math.exp(value - total * math.log(2)) for value in logs)
    return min(1.0, 2 * tail)


def bootstrap(count: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Return rows of sample numbers drawn with replacement, shape (resamples, count)."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))
