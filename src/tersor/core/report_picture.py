"""The pictures of a report: quality against each cost, area for size, as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import ascii_lowercase
from typing import Any

import yaml

from tersor.core.goal import Limit
from tersor.core.metric import Measurement
from tersor.core.report import Report
from tersor.core.report_view import (
    attempt_figures,
    best_metric,
    figure,
    find,
    originals,
    quality_metric,
    stage_figures,
)
from tersor.core.report_words import LANGUAGES, Language, human, metric_word, say
from tersor.core.schema import to_plain

WIDTH, HEIGHT = 460, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 28, 28, 50
_LARGEST, _SMALLEST = 20.0, 5.5
_LONGEST = 160
"""Characters of a step's settings in a tip."""
_COSTS = ("latency", "size", "energy", "cpu_seconds", "peak_memory")
"""A picture each, where they were measured."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One circle."""

    label: str
    """"0", "1", ... or a key of the words."""
    kind: str
    """ "original", "result" or a stage's verdict."""
    name: str
    x: Measurement
    y: Measurement
    area: Measurement | None
    steps: str = ""
    """What led there, as in a recipe."""


def points(report: Report, cost: str = "") -> list[Point]:
    """List what a picture shows; fewer than two points make no picture.

    Args:
        report: What a run had to say.
        cost: The metric across; what was improved by default.
    """
    x_name, y_name = cost or x_metric(report), quality_metric(report)
    wanted = [("original", "original", "", "", originals(report))]
    done: tuple[Any, ...] = ()
    numbered = zip(report.stages, stage_figures(report), attempt_figures(report), strict=True)
    for number, (stage, shown, tried) in enumerate(numbered, 1):
        for letter, (attempt, figures) in zip(ascii_lowercase, tried, strict=False):
            steps = _steps((*done, *attempt.get("settings", ())))
            wanted.append((f"{number}{letter}", "dropped", stage.name, steps, figures))
        wanted.append(
            (str(number), stage.verdict, stage.name, _steps((*done, *stage.settings)), shown)
        )
        if stage.verdict != "dropped":
            done = (*done, *stage.settings)
    if not report.stages or not _seen(wanted[1:], x_name, y_name):
        # slow metrics are measured before and after a run only
        wanted = [
            ("original", "original", "", "", report.before),
            ("result", "result", "", _steps(done), report.after),
        ]
    return _seen(wanted, x_name, y_name)


def _seen(
    wanted: Sequence[tuple[str, str, str, str, Sequence[Measurement]]], x_name: str, y_name: str
) -> list[Point]:
    found = []
    for label, kind, name, steps, measurements in wanted:
        x, y = find(measurements, x_name), find(measurements, y_name)
        if x is not None and y is not None and math.isfinite(x.value) and math.isfinite(y.value):
            area = find(measurements, "size")
            point = Point(label=label, kind=kind, name=name, x=x, y=y, area=area, steps=steps)
            found.append(point)
    return found


def _steps(settings: Sequence[Any]) -> str:
    """Write steps in a line: "fuse_batch_norm; static {calibrator: entropy}"."""
    return "; ".join(
        f"{name} {_flow(own)}" if own else str(name)
        for step in to_plain(settings)
        for name, own in (step.items() if isinstance(step, dict) else ((step, None),))
    )


def _flow(settings: Any) -> str:
    text: str = yaml.safe_dump(settings, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def x_metric(report: Report) -> str:
    """Return the metric across: what was improved, unless that is a quality or the size."""
    best = best_metric(report)
    return "latency" if best in ("size", quality_metric(report)) else best


def costs(report: Report) -> list[str]:
    """List the metrics that a picture can be drawn of, what was improved first."""
    wanted = dict.fromkeys((x_metric(report), *_COSTS))
    return [cost for cost in wanted if len(points(report, cost)) >= 2]


def draw(report: Report, cost: str = "") -> str:
    """Draw the quality against a cost.

    Args:
        report: What a run had to say.
        cost: The metric across; what was improved by default.

    Returns:
        An `svg` element with one focusable group a point, or "" where there are not two points.
    """
    shown = points(report, cost)
    if len(shown) < 2:
        return ""
    # some percent of a cost at least, so that its ticks differ and noise is not blown up
    across = _Axis.over([_ends(p.x) for p in shown], _LEFT, WIDTH - _RIGHT, least=0.03)
    bounds = _bounds(report, shown[0].y)
    up = _Axis.over(
        [*(_ends(p.y) for p in shown), *((b, b) for b in bounds)], HEIGHT - _BOTTOM, _TOP
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-labelledby="picture">',
        *_grid(across, up, shown[0]),
        *(_bound(up, bound, shown[0].y.unit) for bound in bounds),
        _front(across, up, shown),
        *_circles(across, up, shown),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _bounds(report: Report, original: Measurement) -> list[float]:
    """Return the limits on the quality, from the original on the same split."""
    found = []
    for limit in report.limits:
        if limit.metric == original.metric:
            asked = Limit.parse(limit.text)
            found.append(asked.bound(original.value, original.unit, original.better))
    return found


def corner(report: Report) -> str:
    """Return the key of the word for the best corner of the picture."""
    x, y = find(report.before, x_metric(report)), find(report.before, quality_metric(report))
    upper = y is None or y.better == "higher"
    left = x is None or x.better == "lower"
    return f"{'upper' if upper else 'lower'}_{'left' if left else 'right'}"


@dataclass(frozen=True, kw_only=True)
class _Axis:
    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]

    @staticmethod
    def over(
        spans: Sequence[tuple[float, float]], start: float, stop: float, least: float = 0.0
    ) -> "_Axis":
        low, high = min(s[0] for s in spans), max(s[1] for s in spans)
        margin = max((high - low or abs(high) or 1.0) * 0.12, abs(high) * least)
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
        step = _step((high - low) / 5)
        first = math.ceil(low / step)
        ticks = tuple(step * i for i in range(first, math.floor(high / step) + 1))
        return _Axis(low=low, high=high, start=start, stop=stop, ticks=ticks)

    def at(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def _step(rough: float) -> float:
    """Round a step up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _ends(measurement: Measurement) -> tuple[float, float]:
    ends = [measurement.value, *(measurement.spread or ())]
    ends = [end for end in ends if math.isfinite(end)]
    return min(ends), max(ends)


def _grid(across: _Axis, up: _Axis, sample: Point) -> list[str]:
    floor, wall = HEIGHT - _BOTTOM, _LEFT
    lines = []
    for tick in across.ticks:
        x = f"{across.at(tick):.1f}"
        lines.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{floor}"/>')
        lines.append(
            _text("tick", x, floor + 18, human(tick, sample.x.unit, across.ticks[-1]), "middle")
        )
    for tick in up.ticks:
        y = up.at(tick)
        lines.append(
            f'<line class="grid" x1="{wall}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(
            _text("tick", wall - 8, f"{y + 4:.1f}", human(tick, sample.y.unit, up.ticks[-1]), "end")
        )
    lines.append(
        f'<line class="axis" x1="{wall}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    )
    lines.append(f'<line class="axis" x1="{wall}" x2="{wall}" y1="{_TOP}" y2="{floor}"/>')
    for lang in LANGUAGES:
        x_word, y_word = metric_word(sample.x.metric, lang), metric_word(sample.y.metric, lang)
        lines.append(
            _text(f"label {lang}", (wall + WIDTH - _RIGHT) / 2, HEIGHT - 10, x_word, "middle")
        )
        lines.append(_text(f"label {lang}", 8, 16, y_word, "start"))
    return lines


def _bound(up: _Axis, bound: float, unit: str) -> str:
    y = up.at(bound)
    line = f'<line class="bound" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    words = (
        _text(
            f"bound-label {lang}",
            WIDTH - _RIGHT,
            f"{y - 5:.1f}",
            f"{say('limit', lang)} {human(bound, unit)}",
            "end",
        )
        for lang in LANGUAGES
    )
    return line + "".join(words)


def front(shown: Sequence[Point]) -> list[Point]:
    """Return the points that no other is at least as good as in both, the cheapest first."""

    def losses(point: Point) -> tuple[float, float]:
        signs = (1 if m.better == "lower" else -1 for m in (point.x, point.y))
        x, y = (s * m.value for s, m in zip(signs, (point.x, point.y), strict=True))
        return x, y

    best: list[Point] = []
    for point in sorted(shown, key=losses):
        if not best or losses(point)[1] < losses(best[-1])[1]:
            best.append(point)
    return best


def _front(across: "_Axis", up: "_Axis", shown: Sequence[Point]) -> str:
    """Draw the front as steps: what lies behind it is no better in either."""
    places: list[str] = []
    level = None
    for point in front(shown):
        x, y = f"{across.at(point.x.value):.1f}", f"{up.at(point.y.value):.1f}"
        places += [f"{x},{y}"] if level is None else [f"{x},{level}", f"{x},{y}"]
        level = y
    return f'<polyline class="front" points="{" ".join(places)}"/>'


def _circles(across: _Axis, up: _Axis, shown: Sequence[Point]) -> list[str]:
    """Draw the points, each label where it covers no other."""
    largest = max((p.area.value for p in shown if p.area is not None), default=0.0)
    discs = []
    for point in shown:
        share = math.sqrt(max(point.area.value, 0) / largest) if point.area and largest > 0 else 0.4
        radius = max(_SMALLEST, _LARGEST * share)
        discs.append((across.at(point.x.value), up.at(point.y.value), radius))
    # half a width and half a height around each disc and each label
    taken = [(x, y, radius, radius) for x, y, radius in discs]
    drawn = []
    for point, (x, y, radius) in zip(shown, discs, strict=True):
        half = 4 + 3.6 * len(_short(point, "en"))
        right, left = (radius + half + 3, 4), (-radius - half - 3, 4)
        places = [(0, -radius - 6), (0, radius + 15), right, left]
        places += [(0, -radius - 22), (0, radius + 31)]
        near = ((x + dx, y + dy) for dx, dy in places)
        free = (p for p in near if not any(_covers(p, half, box) for box in taken))
        label = next(free, (x, y - radius - 6))
        taken.append((label[0], label[1] - 4, half, 6.0))
        drawn.append(_circle(point, (x, y, radius), label, across, up))
    return drawn


def _covers(
    label: tuple[float, float], half: float, box: tuple[float, float, float, float]
) -> bool:
    x, y, width, height = box
    return abs(label[0] - x) < half + width and abs(label[1] - 4 - y) < 6 + height


def _circle(
    point: Point,
    disc: tuple[float, float, float],
    label: tuple[float, float],
    across: _Axis,
    up: _Axis,
) -> str:
    x, y, radius = disc
    tips = {lang: escape(tip(point, lang)) for lang in LANGUAGES}
    left, right = (across.at(end) for end in _ends(point.x))
    low, high = (up.at(end) for end in _ends(point.y))
    color = "kept" if point.kind == "result" else point.kind
    kind = f"{point.kind} try" if point.label[-1:].isalpha() and point.name else point.kind
    at = f"{label[0]:.1f}", f"{label[1]:.1f}"
    labels = "".join(_text(lang, *at, _short(point, lang), "middle") for lang in LANGUAGES)
    return (
        f'<g class="point {kind}" tabindex="0" role="img" aria-label="{tips["en"]}" '
        f'data-en="{tips["en"]}" data-zh="{tips["zh"]}"><title>{tips["en"]}</title>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        f'<circle class="fill-{color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>{labels}</g>'
    )


def _short(point: Point, lang: Language) -> str:
    return say(point.kind, lang) if point.kind in ("original", "result") else point.label


def tip(point: Point, lang: Language) -> str:
    """Write all figures of a point in one line."""
    if point.kind in ("original", "result"):
        title = say(point.kind, lang)
    else:
        title = f"{point.label}. {point.name} ({say(point.kind, lang)})"
    shown = {m.metric: m for m in (point.x, point.y, point.area) if m is not None}
    figures = [f"{metric_word(n, lang)} {figure(m, lang)}" for n, m in shown.items()]
    recipe = [f"{say('steps', lang)} {point.steps}"] if point.steps else []
    return f"{title}: " + "; ".join([*figures, *recipe])


def _text(kind: str, x: float | str, y: float | str, words: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
