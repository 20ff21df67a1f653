"""Does a stage pay inside the limits? Keep it or roll it back, and say why.

A stage is kept if (a) it breaks no limit that held before it and moves no limit not yet reached
further away, and (b) it bought something: the goal's metric, a limit not yet reached or quality is
better beyond the measured noise; or it is preparation, with outputs unchanged within the tolerance
of the number format.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.core.errors import RecipeError
from tersor.core.goal import Goal, Limit, inside
from tersor.core.metric import Measurement
from tersor.core.report import LimitReport
from tersor.core.statistics import Comparison

SPEEDS = ("latency", "throughput")
"""Metrics that are judged by the interleaved contest, not by two separate figures."""

AWAY = 0.005
"""Share of a value by which it must get worse to move away from a limit that is not reached: a file
grows by some bytes whatever is written in it."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured around one stage, all on the split that decides."""

    original: Mapping[str, Measurement]
    """The untouched network, by metric."""
    before: Mapping[str, Measurement]
    """The network before the stage."""
    after: Mapping[str, Measurement]
    """The network after it."""
    contest: Comparison | None = None
    """Speed of after against before, interleaved."""
    unchanged: bool = False
    """Outputs are those of before, within the tolerance of the number format."""
    quality: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Paired change of each quality metric against before, above 0 where better: difference, low,
    high; in the metric's unit."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Keep or not, and why. `too_strong`: a weaker setting may help."""

    keep: bool
    reason: str
    too_strong: bool = False


def judge(goal: Goal, seen: Evidence) -> Decision:
    """Decide about one stage.

    Args:
        goal: What to improve, within which limits.
        seen: Holds a measurement of `goal.best` and of each limit for original, before and after.

    Raises:
        RecipeError: a limit does not fit its metric.
    """
    broken = [text for name in goal.limits if (text := _breaks(goal, name, seen))]
    if broken:
        return Decision(keep=False, reason="; ".join(broken), too_strong=True)
    gains = [text for name in _wanted(goal, seen) if (text := _gain(name, seen))]
    worse = _loss(goal.best, seen)
    if gains and not worse:
        return Decision(keep=True, reason="; ".join(gains))
    if gains:
        return Decision(keep=True, reason="; ".join([*gains, f"although {worse}"]))
    better = [text for name in seen.quality if (text := _quality_gain(name, seen))]
    if better and not worse:
        return Decision(keep=True, reason="; ".join(better))
    if worse:
        return Decision(keep=False, reason=f"bought nothing: {worse}")
    if seen.unchanged:
        return Decision(
            keep=True, reason="preparation: outputs are unchanged and nothing got worse"
        )
    return Decision(keep=False, reason=f"bought nothing: {_same(goal.best, seen)}")


def bound_of(name: str, limit: Limit, original: Measurement) -> float:
    """Return the worst value of a metric that a limit allows.

    Raises:
        RecipeError: points on a metric that is not in percent, or a unit that does not fit.
    """
    try:
        return limit.bound(original.value, original.unit, original.better)
    except ValueError as error:
        raise RecipeError(f"limit on {name}: {error}") from error


def check_limits(
    goal: Goal,
    original: Mapping[str, Measurement],
    final: Mapping[str, Measurement],
    intervals: Mapping[str, tuple[float, float]],
    strict: bool,
) -> tuple[LimitReport, ...]:
    """Check every limit on the final figures.

    Args:
        goal: Holds the limits.
        original: The untouched network on the final split.
        final: The result on it.
        intervals: 95 % interval of the final value, paired against the original where that exists.
        strict: The whole interval must be inside, not only the value.
    """
    reports = []
    for name, limit in goal.parsed().items():
        m = final[name]
        bound = bound_of(name, limit, original[name])
        interval = intervals.get(name, m.spread)
        holds = inside(m.value, bound, m.better)
        if strict and interval is not None:
            holds = holds and all(inside(edge, bound, m.better) for edge in interval)
        reports.append(
            LimitReport(
                metric=name,
                text=goal.limits[name],
                bound=bound,
                value=m.value,
                unit=m.unit,
                holds=holds,
                interval=interval,
            )
        )
    return tuple(reports)


def _breaks(goal: Goal, name: str, seen: Evidence) -> str | None:
    """Say how the stage broke a limit or moved away from one; None if it did not."""
    before, after = seen.before[name], seen.after[name]
    bound = bound_of(name, Limit.parse(goal.limits[name]), seen.original[name])
    if inside(after.value, bound, after.better):
        return None
    figures = f"{name} {show(before)} -> {show(after)}, limit {_number(bound, after.unit)}"
    if inside(before.value, bound, before.better):
        return f"breaks the limit {name}={goal.limits[name]}: {figures}"
    if _loss(name, seen) and abs(after.value - before.value) > AWAY * abs(before.value):
        return f"moves away from the limit {name}={goal.limits[name]}: {figures}"
    return None


def _wanted(goal: Goal, seen: Evidence) -> list[str]:
    """List the goal's metric and the limits that are not reached yet."""
    open_limits = [
        name
        for name, limit in goal.parsed().items()
        if not inside(
            seen.before[name].value,
            bound_of(name, limit, seen.original[name]),
            seen.before[name].better,
        )
    ]
    return list(dict.fromkeys([goal.best, *open_limits]))


def _gain(name: str, seen: Evidence) -> str | None:
    """Say what a metric gained beyond the noise; None if it did not."""
    if name in SPEEDS and seen.contest is not None:
        if seen.contest.verdict == "faster":
            return f"{_speed(seen.contest)}"
        return None
    if name in seen.quality:
        return _quality_gain(name, seen)
    before, after = seen.before[name], seen.after[name]
    if not _beyond_noise(before, after):
        return None
    return f"{name} {show(before)} -> {show(after)}"


def _loss(name: str, seen: Evidence) -> str | None:
    """Say what a metric lost beyond the noise; None if it did not."""
    if name in SPEEDS and seen.contest is not None:
        return _speed(seen.contest) if seen.contest.verdict == "slower" else None
    before, after = seen.before[name], seen.after[name]
    if name in seen.quality:
        difference, _, _ = seen.quality[name]
        return f"{name} {show(before)} -> {show(after)}" if difference < 0 else None
    return f"{name} {show(before)} -> {show(after)}" if _beyond_noise(after, before) else None


def _quality_gain(name: str, seen: Evidence) -> str | None:
    difference, low, high = seen.quality[name]
    if low <= 0:
        return None
    if seen.after[name].unit == "%":
        return f"{name} {difference:+.2f} points [{low:+.2f}, {high:+.2f}]"
    figures = f"{name} {show(seen.before[name])} -> {show(seen.after[name])}"
    return f"{figures}, better by {difference:.4g} [{low:.4g}, {high:.4g}]"


def _beyond_noise(worse: Measurement, better: Measurement) -> bool:
    """Tell whether `better` is better than `worse` with intervals apart (exact figures: at all)."""
    sign = 1.0 if better.better == "higher" else -1.0
    w = worse.spread or (worse.value, worse.value)
    b = better.spread or (better.value, better.value)
    return min(sign * edge for edge in b) > max(sign * edge for edge in w)


def _same(name: str, seen: Evidence) -> str:
    if name in SPEEDS and seen.contest is not None:
        return _speed(seen.contest)
    return f"{name} {show(seen.before[name])} -> {show(seen.after[name])}"


def _speed(c: Comparison) -> str:
    verb = {"faster": "faster", "slower": "as fast (slower)"}.get(c.verdict, "as fast")
    return f"{c.speedup:.2f}x {verb} [{c.low:.2f}, {c.high:.2f}], {c.a_ms:.3f} -> {c.b_ms:.3f} ms"


def show(m: Measurement) -> str:
    """Write a measurement's value with its unit, as a person would."""
    return _number(m.value, m.unit)


def _number(value: float, unit: str) -> str:
    if unit == "B":
        for factor, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if abs(value) >= factor:
                return f"{value / factor:.2f} {name}"
        return f"{value:.0f} B"
    if unit == "%":
        return f"{value:.2f} %"
    if unit == "1":
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:.4g} {unit}"
