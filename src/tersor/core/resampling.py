"""Score: a quality metric as a function of how often each sample counts; its interval and test.

Accuracy, mean squared error and AUC are means over samples and have intervals in closed form. F1,
IoU, perplexity and mAP are not: for them the samples are drawn anew, with replacement, and a draw
is nothing but how often each sample counts. Two networks are compared on the same samples, or on
the same draws.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tersor.core.metric import Better
from tersor.core.statistics import Z, mcnemar, mean_interval, paired_difference, wilson

RESAMPLES = 1000
FEWEST = 5
"""Samples below which there are too few different draws (of 4: 35) to bound 95 % of them."""
_CELLS = 2_000_000  # of draws held at a time


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a network scored on a split."""

    count: int
    """Samples."""
    of: Callable[[np.ndarray], np.ndarray]
    """How often each sample counts, (draws, samples), to the metric of each draw, (draws,)."""
    parts: np.ndarray | None = None
    """(samples,): the metric is `scale` times their mean; None where it is not a mean."""
    single: bool = False
    """Each part is one trial: 0 or 1."""
    scale: float = 1.0
    """100 where parts are shares and the metric is in percent."""
    bounds: tuple[float, float] = (0.0, math.inf)
    """What the metric lies between."""
    resamples: int = RESAMPLES
    """0: drawing anew would take too long."""

    @property
    def value(self) -> float:
        """Return the metric."""
        if self.parts is not None:
            return self.scale * float(self.parts.mean())
        return float(self.of(np.ones((1, self.count)))[0])


def mean_of(
    parts: np.ndarray, *, single: bool = False, percent: bool = False, lowest: float = 0.0
) -> Score:
    """Make the score of a metric that is a mean over samples.

    Args:
        parts: Shape (samples,); shares where `percent`.
        single: Each is one trial, so that Wilson's interval and McNemar's test hold.
        percent: The metric is 100 times the mean, and at most 100.
        lowest: The lowest share there is.
    """
    scale = 100.0 if percent else 1.0
    return Score(
        count=parts.size,
        of=lambda draws: scale * (draws @ parts) / draws.sum(1),
        parts=parts,
        single=single,
        scale=scale,
        bounds=(scale * lowest, 100.0 if percent else math.inf),
    )


def draws(count: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each of `count` samples is drawn, shape (some, count), `resamples` in all."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // count)
    for begin in range(0, resamples, at_once):
        drawn = rng.integers(count, size=(min(at_once, resamples - begin), count))
        yield np.array([np.bincount(row, minlength=count) for row in drawn], dtype=np.float64)


def interval(score: Score, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % interval of a score; None where the samples are too few to tell."""
    if score.parts is not None:
        if score.single:
            low, high = wilson(float(score.parts.sum()), score.count)
        else:
            low, high = mean_interval(score.parts)
        low, high = score.scale * low, score.scale * high
    elif score.count < FEWEST or not score.resamples:
        return None
    else:
        found = [score.of(drawn) for drawn in draws(score.count, score.resamples, seed)]
        low, high = (float(end) for end in np.quantile(np.concatenate(found), [0.025, 0.975]))
    value = score.value
    low, high = max(min(low, value), score.bounds[0]), min(max(high, value), score.bounds[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


@dataclass(frozen=True, kw_only=True)
class Paired:
    """How a metric changed between two networks that saw the same samples."""

    difference: float
    """after - before, in the metric's unit."""
    low: float
    high: float
    """The 95 % interval of the difference."""
    p: float
    """Two-sided: how often equal networks would differ so much."""
    test: str
    """Name of the test behind `p`."""
    count: int
    """Samples."""

    def verdict(self, better: Better) -> str:
        """Say "better", "worse" or "no difference": by the side of zero the interval is on."""
        if self.low <= 0 <= self.high:
            return "no difference"
        return "better" if (self.difference > 0) == (better == "higher") else "worse"


def paired(before: Score, after: Score, seed: int = 0) -> Paired | None:
    """Compare two networks' scores on the same samples.

    Returns:
        None where the samples are too few to tell.

    Source:
        Where samples are single trials: `paired_difference` and McNemar's exact test. Other means:
        the normal interval and test of the mean of differences. Else: Efron and Tibshirani, "An
        introduction to the bootstrap", 1993, both networks on the same draws; p is twice the share
        of draws on the rarer side of zero, each side counting one more, so that it is never 0.
    """
    assert before.count == after.count
    if before.parts is None or after.parts is None:
        return _bootstrapped(before, after, seed)
    if before.single:
        value, (low, high) = paired_difference(before.parts, after.parts)
        moved = after.parts - before.parts
        p, test = mcnemar(int((moved > 0).sum()), int((moved < 0).sum())), "McNemar's exact test"
    else:
        moved = after.parts - before.parts
        value, (low, high) = float(moved.mean()), mean_interval(moved)
        p, test = _normal(value, (high - low) / 2), "normal test of the samples' differences"
    if not math.isfinite(low):
        return None
    scale = before.scale
    return Paired(
        difference=scale * value,
        low=scale * low,
        high=scale * high,
        p=p,
        test=test,
        count=before.count,
    )


def _bootstrapped(before: Score, after: Score, seed: int) -> Paired | None:
    resamples = min(before.resamples, after.resamples)
    if before.count < FEWEST or not resamples:
        return None
    found = np.concatenate(
        [after.of(drawn) - before.of(drawn) for drawn in draws(before.count, resamples, seed)]
    )
    value = after.value - before.value
    low, high = (float(end) for end in np.quantile(found, [0.025, 0.975]))
    rarer = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return Paired(
        difference=value,
        low=min(low, value),
        high=max(high, value),
        p=min(1.0, 2 * (rarer + 1) / (resamples + 1)),
        test=f"paired bootstrap of {resamples} draws",
        count=before.count,
    )


def _normal(value: float, reach: float) -> float:
    """Return the two-sided p of a normal value whose 95 % interval reaches so far to each side."""
    if reach == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(Z * abs(value) / reach / math.sqrt(2))
