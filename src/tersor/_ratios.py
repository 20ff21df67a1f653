"""How many times better a network became: ratios of two networks' figures, for the report."""

from dataclasses import replace

from tersor.core.metric import Measurement
from tersor.core.report import Ratio
from tersor.core.resampling import Paired
from tersor.core.statistics import Comparison


def of_contest(found: Comparison) -> Ratio:
    """Write an interleaved contest of latencies as a ratio."""
    return Ratio(
        metric="latency",
        value=found.speedup,
        low=found.low,
        high=found.high,
        verdict={"faster": "better", "slower": "worse"}.get(found.verdict, found.verdict),
        how=found.how,
    )


def of_figures(before: Measurement, after: Measurement) -> Ratio:
    """Return how many times better `after` is, from two separate figures."""
    x, y = (before, after) if before.better == "lower" else (after, before)
    if y.value == 0:
        same = x.value == 0
        return Ratio(
            metric=before.metric,
            value=1.0 if same else 0.0,
            low=0.0,
            high=0.0,
            verdict="not comparable",
        )
    value = x.value / y.value
    (a, b), (c, d) = x.spread or (x.value, x.value), y.spread or (y.value, y.value)
    low, high = a / (d or y.value), b / (c or y.value)
    verdict = "better" if low > 1 else "worse" if high < 1 else "no difference"
    return Ratio(
        metric=before.metric,
        value=value,
        low=low,
        high=high,
        verdict=verdict,
        how="from two figures",
    )


def with_interval(ratio: Ratio, before: Measurement, found: Paired) -> Ratio:
    """Give a quality metric's ratio the paired interval and test."""
    made = replace(
        ratio,
        verdict=found.verdict(before.better),
        how=f"paired on the same samples: {found.test}, p = {found.p:.2g}",
        difference=(found.difference, found.low, found.high),
        p=found.p,
    )
    low, high = before.value + found.low, before.value + found.high
    if before.value <= 0 or (before.better == "lower" and low <= 0):
        return made
    if before.better == "lower":
        return replace(made, low=before.value / high, high=before.value / low)
    return replace(made, low=low / before.value, high=high / before.value)
