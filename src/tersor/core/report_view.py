"""What a report shows, before it is drawn: pairs of figures, the headline, the chosen metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tersor.core.metric import Better, Measurement
from tersor.core.report import LimitReport, Ratio, Report, StageReport
from tersor.core.report_words import (
    Language,
    human,
    human_interval,
    metric_word,
    ratio_digits,
    say,
)
from tersor.core.schema import Mistakes, from_plain, to_plain

T = TypeVar("T")
COSTS = (
    "latency",
    "throughput",
    "size",
    "peak_memory",
    "parameters",
    "nonzeros",
    "macs",
    "energy",
    "cpu_seconds",
)
_TOLD = 3
"""Names that a line tells."""
_SPEED, _EXTENT = ("faster", "slower"), ("smaller", "larger")
_WORDS = {
    "latency": _SPEED,
    "throughput": _SPEED,
    "size": _EXTENT,
    "peak_memory": _EXTENT,
    "parameters": _EXTENT,
    "nonzeros": _EXTENT,
    "macs": _EXTENT,
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One metric before and after."""

    metric: str
    before: Measurement | None
    after: Measurement | None
    ratio: Ratio | None
    """Re-measured interleaved, where the run did so."""

    @property
    def points(self) -> tuple[float, float] | None:
        """Return the paired 95 % interval of the change in points, where the run has one."""
        if self.before is None or self.ratio is None or not self.ratio.how.startswith("paired"):
            return None
        if self.ratio.difference is not None:
            return self.ratio.difference[1:]
        value = self.before.value
        return value * (self.ratio.low - 1), value * (self.ratio.high - 1)

    @property
    def how(self) -> str:
        """Say how the figures were made, and where the change was tested, how."""
        tested = self.ratio is not None and self.ratio.p is not None
        return f"{self.any.how}; {self.ratio.how}" if tested and self.ratio else self.any.how

    @property
    def any(self) -> Measurement:
        """Return the measurement there is."""
        found = self.after or self.before
        assert found is not None
        return found


def pairs(report: Report) -> list[Pair]:
    """Join before and after by metric, in the order measured; repeated metrics keep their rank."""
    ratios = {ratio.metric: ratio for ratio in report.ratios}
    keys = list(dict.fromkeys([*_ranked(report.before), *_ranked(report.after)]))
    before, after = _ranked(report.before), _ranked(report.after)
    return [
        Pair(
            metric=name,
            before=before.get((name, rank)),
            after=after.get((name, rank)),
            ratio=ratios.get(name) if rank == 0 else None,
        )
        for name, rank in keys
    ]


def _ranked(measurements: Sequence[Measurement]) -> dict[tuple[str, int], Measurement]:
    found: dict[tuple[str, int], Measurement] = {}
    for item in measurements:
        rank = sum(name == item.metric for name, _ in found)
        found[item.metric, rank] = item
    return found


def figure(measurement: Measurement | None, lang: Language = "en") -> str:
    """Write a measurement with its interval: "2.31 ms (2.28 to 2.35)"."""
    if measurement is None:
        return "-"
    text = human(measurement.value, measurement.unit)
    if measurement.spread is None:
        return text
    return (
        f"{text} ({human_interval(measurement.spread, measurement.unit, measurement.value, lang)})"
    )


def change(pair: Pair, lang: Language = "en") -> str:
    """Write what changed: "4.12x faster (3.98 to 4.25)", "-0.76 points"; "-" where unknown."""
    if pair.before is None or pair.after is None:
        return "-"
    if pair.after.unit == "%":
        text = say("points", lang, points=f"{pair.after.value - pair.before.value:+.2f}")
        if pair.points is None:
            return text
        low, high = (f"{end:+.2f}" for end in pair.points)
        return f"{text} ({say('interval', lang, low=low, high=high)})"
    if pair.ratio is not None and pair.ratio.value > 0:
        return _ratio(pair.metric, pair.ratio.value, lang, pair.ratio)
    value = gain(pair.before.value, pair.after.value, pair.after.better)
    return "-" if value is None else _ratio(pair.metric, value, lang)


def gain(before: float, after: float, better: Better) -> float | None:
    """Return how many times better `after` is; None where that has no meaning."""
    best, other = (before, after) if better == "lower" else (after, before)
    return best / other if best > 0 and other > 0 and math.isfinite(best / other) else None


def _ratio(metric: str, value: float, lang: Language, ratio: Ratio | None = None) -> str:
    if ratio is not None and ratio.verdict == "no difference":
        if ratio.low == ratio.high:
            return say("same", lang)
        low, high = ratio_digits(ratio.low), ratio_digits(ratio.high)
        return f"{say('same', lang)} ({say('interval', lang, low=low, high=high)})"
    good, bad = _WORDS.get(metric, ("better", "worse"))
    if abs(value - 1) < 5e-3 and (ratio is None or ratio.low == ratio.high):
        return say("same", lang)
    if value >= 1:
        ends = (ratio.low, ratio.high) if ratio else None
        text = say(good, lang, ratio=ratio_digits(value))
    else:
        ends = (1 / ratio.high, 1 / ratio.low) if ratio and ratio.low > 0 else None
        text = say(bad, lang, ratio=ratio_digits(1 / value))
    if ends is None or ends[0] == ends[1]:
        return text
    low, high = ratio_digits(ends[0]), ratio_digits(ends[1])
    return f"{text} ({say('interval', lang, low=low, high=high)})"


def limited(limit: LimitReport, lang: Language = "en") -> str:
    """Write what a limit met: "88.10 % (87.74 to 88.46)"."""
    text = human(limit.value, limit.unit)
    if limit.interval is None:
        return text
    return f"{text} ({human_interval(limit.interval, limit.unit, limit.value, lang)})"


def headline(report: Report, lang: Language = "en") -> str:
    """Sum a run up in one line: "4.12x faster, 6.02x smaller, accuracy 88.10 % (-0.76 points)"."""
    shown = {pair.metric: pair for pair in reversed(pairs(report))}
    first = dict.fromkeys([best_metric(report), "latency", "size"])
    words = [_moved(shown[name], lang) for name in first if name in shown]
    words = [text for text in words if text]
    quality = quality_metric(report)
    if quality in shown and shown[quality].after is not None:
        now = shown[quality].any
        text = f"{metric_word(quality, lang)} {human(now.value, now.unit)}"
        moved = _bare(change(shown[quality], lang))
        words.append(text if moved == "-" else f"{text} ({moved})")
    return say("comma", lang).join(words) or say("headline_none", lang)


def _moved(pair: Pair, lang: Language) -> str:
    """Write a change for the headline, with the metric's name where the words do not tell it."""
    text = _bare(change(pair, lang))
    if pair.any.unit == "%" or text == "-":
        return ""
    clear = pair.metric in ("latency", "size") and text != say("same", lang)
    return text if clear else f"{metric_word(pair.metric, lang)}: {text}"


def _bare(text: str) -> str:
    return text.partition(" (")[0]


def reproduction(report: Report) -> tuple[str, ...]:
    """Name the words about repeating the run."""
    auto = "--recipe auto" in report.command
    return ("reproduce_note", "reproduce_auto") if auto else ("reproduce_note",)


def best_metric(report: Report) -> str:
    """Return the metric that the run improved; latency where no goal was given."""
    goal = report.recipe.get("goal")
    return str(goal.get("best", "latency")) if isinstance(goal, Mapping) else "latency"


def quality_metric(report: Report) -> str:
    """Return the metric that says how good the network still is, or an empty string."""
    measured = [item.metric for item in (*report.after, *report.before)]
    limited = [limit.metric for limit in report.limits]
    ordered = [*limited, "quality", "accuracy", *measured]
    return next((name for name in ordered if name in measured and name not in COSTS), "")


def originals(report: Report) -> tuple[Measurement, ...]:
    """Return what the stages are seen against: the original on the split that decides."""
    return report.start or report.before


def predicted(stage: StageReport) -> str:
    """Write the gain that was predicted of a stage; empty: none was."""
    return "" if stage.predicted is None else "{:.2f}x to {:.2f}x".format(*stage.predicted)


def stage_figures(report: Report) -> list[tuple[Measurement, ...]]:
    """Return the measurements after each stage, latencies made comparable.

    Figures that were measured minutes apart differ by the mood of the machine, too. So the latency
    of a stage is the original's divided by the interleaved ratios of the stages up to it.
    """
    return [
        _comparable(stage.measurements, before, stage.speed)
        for stage, before in zip(report.stages, _latencies(report), strict=True)
    ]


def attempt_figures(
    report: Report,
) -> list[list[tuple[Mapping[str, Any], tuple[Measurement, ...]]]]:
    """Return the earlier tries of each stage with their measurements, latencies made comparable."""
    found = []
    for stage, before in zip(report.stages, _latencies(report), strict=True):
        tried = []
        for attempt in stage.attempts:
            plain = to_plain(attempt)
            own = [_read(Measurement, each) for each in plain.get("measurements") or ()]
            kept = [each for each in own if each is not None]
            tried.append((plain, _comparable(kept, before, _read(Ratio, plain.get("speed")))))
        found.append(tried)
    return found


def _read(kind: type[T], plain: Any) -> T | None:
    """Read back what a report keeps as plain data; None where it is something else."""
    return from_plain(kind, plain, (), Mistakes())


def _latencies(report: Report) -> list[Measurement | None]:
    """Return the latency that each stage started from."""
    current = find(originals(report), "latency")
    found = []
    for stage in report.stages:
        found.append(current)
        if stage.verdict != "dropped":
            after = _comparable(stage.measurements, current, stage.speed)
            current = find(after, "latency")
    return found


def _comparable(
    measurements: Sequence[Measurement], before: Measurement | None, speed: Ratio | None
) -> tuple[Measurement, ...]:
    measured = find(measurements, "latency")
    if before is None or measured is None or speed is None:
        return tuple(measurements)
    after = _divided(before, measured, speed)
    return tuple(after if m is measured else m for m in measurements)


def _divided(before: Measurement, measured: Measurement, speed: Ratio) -> Measurement:
    if not (speed.value > 0 and speed.low > 0):
        return measured
    return replace(
        measured,
        value=before.value / speed.value,
        spread=(before.value / speed.high, before.value / speed.low),
        how=f"{human(before.value, before.unit)} before the stage, divided by the interleaved "
        f"ratio; alone: {figure(measured)}",
    )


def find(measurements: Sequence[Measurement], metric: str) -> Measurement | None:
    """Return the first measurement of a metric."""
    return next((item for item in measurements if item.metric == metric), None)


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """List a nested mapping as (dotted name, text) rows; what is unknown is left out."""
    rows: list[tuple[str, str]] = []
    for key, item in mapping.items():
        if isinstance(item, Mapping):
            rows += flat(item, f"{prefix}{key}.")
        elif isinstance(item, (list, tuple)):
            rows.append((f"{prefix}{key}", ", ".join(str(part) for part in item)))
        elif isinstance(item, int) and key.endswith("_bytes"):
            rows.append((f"{prefix}{key.removesuffix('_bytes')}", human(item, "B")))
        elif item is not None:
            rows.append((f"{prefix}{key}", str(item)))
    return rows


def left_in_float(stage: StageReport) -> list[str]:
    """Say which layers a stage left in float and why, a line for each reason.

    What the recipe left out itself, and what a stage before has rounded, is not told.
    """
    if stage.verdict == "dropped":
        return []
    names: dict[str, list[str]] = {}
    for facts in stage.facts.values():
        left = facts.get("left_in_float") if isinstance(facts, Mapping) else None
        for name, reason in left.items() if isinstance(left, Mapping) else ():
            if reason not in ("excluded by layers", "quantized before"):
                names.setdefault(str(reason), []).append(str(name))
    lines = []
    for reason, own in names.items():
        more = f" and {len(own) - _TOLD} more" if len(own) > _TOLD else ""
        lines.append(f"{', '.join(own[:_TOLD])}{more}: {reason}")
    return lines
