"""The picture of sparse execution: speed against zeros, a line a layer, as SVG and as one page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tersor.core.report_html import picture_page

WIDTH, HEIGHT = 880, 470
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 230, 34, 52
_LABEL_STEP = 17.0
COLORS = 8
"""Lines that look different; more begin again."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One layer shape."""

    label: str
    zeros: tuple[float, ...]
    """Percents, ascending."""
    times: tuple[float, ...]
    """How many times faster sparse is than the best dense kernel."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """The 95 % intervals of `times`."""
    break_even: float | None
    """Percent of zeros from which sparse is faster; None: never, as far as measured."""


def even_words(curve: Curve) -> str:
    """Say from where on sparse is faster: "76 %", "50 % or less", "above 98 %"."""
    if curve.break_even is None:
        return f"above {curve.zeros[-1]:g} %"
    if curve.break_even <= curve.zeros[0]:
        return f"{curve.zeros[0]:g} % or less"
    return f"{curve.break_even:.0f} %"


def draw(curves: Sequence[Curve]) -> str:
    """Draw the curves, with zeros across so that what is left halves at equal steps.

    Args:
        curves: At least one, each of at least one point.

    Returns:
        An `svg` element with a focusable group for each curve; its style is `STYLE`.
    """
    zeros = sorted({z for c in curves for z in c.zeros})
    ends = [value for c in curves for value in (*c.low, *c.high)]
    up = _Up(min(0.9, *ends), max(1.2, *ends))
    across = _Across(zeros[0], zeros[-1])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="how many times faster '
        'sparse execution is, by percent of zeros">',
        *_grid(zeros, across, up),
    ]
    for number, (curve, label_y) in enumerate(zip(curves, _label_places(curves, up), strict=True)):
        parts.append(_curve(curve, number % COLORS, label_y, across, up))
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Across:
    first: float
    last: float

    def at(self, zeros: float) -> float:
        low, high = (-math.log(100 - z) for z in (self.first, self.last))
        share = (-math.log(100 - zeros) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (WIDTH - _RIGHT - _LEFT)


@dataclass(frozen=True)
class _Up:
    low: float
    high: float

    def at(self, times: float) -> float:
        low, high = math.log(self.low) - 0.08, math.log(self.high) + 0.08
        share = (math.log(times) - low) / (high - low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)

    def ticks(self) -> list[float]:
        lowest, highest = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
        return [2.0**power for power in range(lowest, highest + 1)]


def _grid(zeros: Sequence[float], across: _Across, up: _Up) -> list[str]:
    floor, wall, right = HEIGHT - _BOTTOM, _LEFT, WIDTH - _RIGHT
    lines = []
    for tick in zeros:
        x = f"{across.at(tick):.1f}"
        lines.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{floor}"/>')
        lines.append(_text("tick", x, floor + 18, f"{tick:g} %", "middle"))
    for times in up.ticks():
        y = up.at(times)
        lines.append(f'<line class="grid" x1="{wall}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text("tick", wall - 8, f"{y + 4:.1f}", f"{times:g}x", "end"))
    even = f"{up.at(1):.1f}"
    lines += [
        f'<line class="bound" x1="{wall}" x2="{right}" y1="{even}" y2="{even}"/>',
        f'<line class="axis" x1="{wall}" x2="{right}" y1="{floor}" y2="{floor}"/>',
        f'<line class="axis" x1="{wall}" x2="{wall}" y1="{_TOP}" y2="{floor}"/>',
        _text("label", (wall + right) / 2, HEIGHT - 10, "weights that are zero", "middle"),
        _text("label", 8, 18, "times as fast as the best dense kernel", "start"),
        _text("label", right + 14, 18, "layer: sparse is faster from", "start"),
    ]
    return lines


def _label_places(curves: Sequence[Curve], up: _Up) -> list[float]:
    """Put each label beside the end of its line, none on another."""
    order = sorted(range(len(curves)), key=lambda i: up.at(curves[i].times[-1]))
    places = [0.0] * len(curves)
    last = _TOP - _LABEL_STEP + 8
    for i in order:
        places[i] = last = max(up.at(curves[i].times[-1]) + 4, last + _LABEL_STEP)
    over = last - (HEIGHT - _BOTTOM)
    if over > 0:  # push up those that stand below the floor, and whatever they then cover
        top = HEIGHT - _BOTTOM + _LABEL_STEP
        for i in reversed(order):
            places[i] = top = min(places[i], top - _LABEL_STEP)
    return places


def _curve(curve: Curve, color: int, label_y: float, across: _Across, up: _Up) -> str:
    at = [(across.at(z), up.at(t)) for z, t in zip(curve.zeros, curve.times, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    spreads = "".join(
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{up.at(low):.1f}" '
        f'y2="{up.at(high):.1f}"/>'
        for (x, _), low, high in zip(at, curve.low, curve.high, strict=True)
    )
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at)
    even = ""
    if curve.break_even is not None and curve.break_even > curve.zeros[0]:
        x = across.at(curve.break_even)
        even = f'<circle class="even" cx="{x:.1f}" cy="{up.at(1):.1f}" r="5.5"/>'
    figures = "; ".join(
        f"{z:g} % zeros {t:.2f}x" for z, t in zip(curve.zeros, curve.times, strict=True)
    )
    tip = escape(f"{curve.label}: {figures}; faster from {even_words(curve)}")
    end_x, end_y = at[-1]
    x = WIDTH - _RIGHT + 14
    return (
        f'<g class="curve c{color}" tabindex="0" role="img" aria-label="{tip}"><title>{tip}</title>'
        f'<polyline points="{line}"/>{spreads}{dots}{even}'
        f'<line class="lead" x1="{end_x + 4:.1f}" y1="{end_y:.1f}" x2="{x - 3}" '
        f'y2="{label_y - 4:.1f}"/>'
        + _text("name", x, f"{label_y:.1f}", f"{curve.label}: {even_words(curve)}", "start")
        + "</g>"
    )


def _text(kind: str, x: float | str, y: float | str, words: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


_LINES = ("#0b6bcb", "#c2410c", "#1a7f37", "#8250df", "#9a6700", "#0e7490", "#bf3989", "#57606a")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")


def _dash(number: int) -> str:
    return f"stroke-dasharray: {_DASHES[number % len(_DASHES)]};"


STYLE = "\n".join(
    [
        ".curve polyline { fill: none; stroke: var(--own); stroke-width: 1.8; }",
        ".curve .whisker { stroke: var(--own); stroke-width: 1.2; }",
        ".curve circle { fill: var(--own); }",
        ".curve .even { fill: none; stroke: var(--own); stroke-width: 1.8; }",
        ".curve .lead { stroke: var(--own); stroke-width: .8; stroke-dasharray: 1 2; }",
        ".curve .name { fill: currentColor; font-size: 12px; }",
        ".curve:hover polyline, .curve:focus polyline { stroke-width: 3.5; }",
        *(
            f".c{i} {{ --own: {color}; }} .c{i} polyline {{ {_dash(i)} }}"
            for i, color in enumerate(_LINES)
        ),
    ]
)
"""What the curves need beside the report's style sheet."""


_ALONE = """
text { font-family: system-ui, sans-serif; fill: #1b1f24; }
.back { fill: #fff; } .grid { stroke: #d8dee4; } .axis { stroke: #57606a; }
.tick { font-size: 12px; fill: #57606a; } .label { font-size: 13px; }
.bound { stroke: #a4333a; stroke-dasharray: 7 4; }
"""


def picture(curves: Sequence[Curve]) -> str:
    """Write the picture as an SVG file of its own, on white."""
    inside = draw(curves).partition(">")[2]
    # variables of CSS are not known to every program that shows pictures
    style = _ALONE + "\n".join(
        rule.replace(".curve", f".c{i}").replace("var(--own)", color)
        for i, color in enumerate(_LINES[: len(curves)])
        for rule in STYLE.splitlines()
        if rule.startswith(".curve") and ":hover" not in rule
    )
    dashes = "\n".join(f".c{i} polyline {{ {_dash(i)} }}" for i in range(len(_LINES)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">\n<style>{style}\n{dashes}</style>\n'
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>{inside}\n'
    )


def page(
    title: str,
    note: str,
    curves: Sequence[Curve],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    warnings: Sequence[str] = (),
) -> str:
    """Write one page that needs no network and no other file.

    Args:
        title: What was measured.
        note: On what, and how.
        curves: The picture.
        table: Head and rows below it.
        warnings: What made the machine unfit for timing.

    Returns:
        HTML; every text is escaped, and the page's policy forbids loading anything.
    """
    return picture_page(title, note, draw(curves), STYLE, table, warnings=warnings)
