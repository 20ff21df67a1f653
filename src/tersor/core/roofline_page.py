"""The picture of a profile: each operator under the roofs of the machine, as one page.

Source:
    Williams, Waterman, Patterson, "Roofline", CACM 2009, figure 1: operations a second against
    operations for each byte, both logarithmic. The area of a circle is its share of the time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tersor.core.report_html import picture_page

WIDTH, HEIGHT = 480, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 44, 34, 50
_LARGEST, _SMALLEST = 24.0, 4.0
_NUMBERED = 7.0
"""Circles at least so large hold the number of their row."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One operator."""

    number: int
    """Its row in the table."""
    name: str
    format: str
    intensity: float
    """Operations for each byte."""
    gflops: float
    share: float
    """Of the time, in [0, 1]."""
    tip: str


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """What the machine can do at most."""

    peaks: Mapping[str, float]
    """Billions of operations a second, by number format."""
    slopes: Mapping[str, float]
    """Billions of bytes a second, by where they come from; the one that holds here first."""


def draw(spots: Sequence[Spot], roofs: Roofs) -> str:
    """Draw the roofs and the spots below them.

    Args:
        spots: Those without operations are left out.
        roofs: At least one peak and one slope.

    Returns:
        An `svg` element with a focusable group for each spot; its style is `STYLE`.
    """
    shown = [s for s in spots if s.intensity > 0 and s.gflops > 0]
    top, steep = max(roofs.peaks.values()), next(iter(roofs.slopes.values()))
    ridges = [peak / slope for peak in roofs.peaks.values() for slope in roofs.slopes.values()]
    across = _Scale.over([*(s.intensity for s in shown), *ridges], _LEFT, WIDTH - _RIGHT)
    lowest = [s.gflops for s in shown] or [steep * across.low]
    up = _Scale.over([*lowest, *roofs.peaks.values()], HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="operations a second, by '
        'operations for each byte">',
        *_grid(across, up),
        *_peaks(roofs, across, up),
        *(
            _slope(slope, top, across, up, first=not number)
            for number, slope in enumerate(roofs.slopes.values())
        ),
    ]
    kinds = list(roofs.peaks)
    for spot in sorted(shown, key=lambda s: -s.share):  # small ones stay within reach
        color = kinds.index(spot.format) % 4 if spot.format in kinds else 3
        parts.append(_spot(spot, color, across, up))
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True, kw_only=True)
class _Scale:
    low: float
    high: float
    start: float
    stop: float

    @staticmethod
    def over(values: Sequence[float], start: float, stop: float) -> "_Scale":
        return _Scale(low=min(values) / 1.8, high=max(values) * 1.8, start=start, stop=stop)

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        ends = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1, 2, 5) if ends[1] - ends[0] < 4 else (1,)
        made = [m * 10.0**power for power in range(ends[0], ends[1] + 1) for m in steps]
        return [tick for tick in made if self.low <= tick <= self.high]


def _grid(across: _Scale, up: _Scale) -> list[str]:
    floor, wall, right = HEIGHT - _BOTTOM, _LEFT, WIDTH - _RIGHT
    lines = []
    for tick in across.ticks():
        x = f"{across.at(tick):.1f}"
        lines.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{floor}"/>')
        lines.append(_text("tick", x, floor + 18, f"{tick:g}", "middle"))
    for tick in up.ticks():
        y = up.at(tick)
        lines.append(f'<line class="grid" x1="{wall}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text("tick", wall - 8, f"{y + 4:.1f}", f"{tick:g}", "end"))
    return [
        *lines,
        f'<line class="axis" x1="{wall}" x2="{right}" y1="{floor}" y2="{floor}"/>',
        f'<line class="axis" x1="{wall}" x2="{wall}" y1="{_TOP}" y2="{floor}"/>',
        _text("label", (wall + right) / 2, HEIGHT - 10, "operations for each byte", "middle"),
        _text("label", 8, 18, "billions of operations a second", "start"),
    ]


def _peaks(roofs: Roofs, across: _Scale, up: _Scale) -> list[str]:
    slope = next(iter(roofs.slopes.values()))
    lines = []
    for number, (kind, peak) in enumerate(roofs.peaks.items()):
        x, y = across.at(peak / slope), up.at(peak)
        lines.append(
            f'<line class="roof f{number % 4}" x1="{x:.1f}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" '
            f'y2="{y:.1f}"/>'
        )
        lines.append(_text("tick", WIDTH - _RIGHT + 6, f"{y + 4:.1f}", kind, "start"))
    return lines


def _slope(slope: float, top: float, across: _Scale, up: _Scale, *, first: bool) -> str:
    """Draw a bandwidth up to the highest peak, from where it enters the picture."""
    left, right = max(across.low, up.low / slope), min(across.high, top / slope)
    if right <= left:
        return ""
    (x1, y1), (x2, y2) = ((across.at(x), up.at(slope * x)) for x in (left, right))
    kind = "roof" if first else "roof other"
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _legend(roofs: Roofs) -> str:
    """Name the lines below the picture, where no name covers another."""
    named = [
        (f"roof f{number % 4}", f"{kind} peak {peak:.0f} GFLOP/s")
        for number, (kind, peak) in enumerate(roofs.peaks.items())
    ]
    named += [
        ("roof other" if number else "roof", f"{name} {slope:.1f} GB/s")
        for number, (name, slope) in enumerate(roofs.slopes.items())
    ]
    keys = (
        '<span class="key"><svg viewBox="0 0 22 8" aria-hidden="true">'
        f'<line class="{kind}" x1="0" x2="22" y1="4" y2="4"/></svg>{escape(words)}</span>'
        for kind, words in named
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def _spot(spot: Spot, color: int, across: _Scale, up: _Scale) -> str:
    radius = max(_SMALLEST, _LARGEST * math.sqrt(max(0.0, spot.share)))
    x, y, tip = across.at(spot.intensity), up.at(spot.gflops), escape(spot.tip)
    word = ""
    if radius >= _NUMBERED:
        word = _text("inside", f"{x:.1f}", f"{y + 4:.1f}", str(spot.number), "middle")
    return (
        f'<g class="spot f{color}" tabindex="0" role="img" aria-label="{tip}"><title>{tip}</title>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>{word}</g>'
    )


def _text(kind: str, x: float | str, y: float | str, words: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


STYLE = """
figure > svg { max-width: 44rem; }
.f0 { --own: var(--applied-fill); } .f1 { --own: var(--kept-fill); }
.f2 { --own: var(--weakened-fill); } .f3 { --own: var(--original-fill); }
.roof { stroke: var(--own, var(--ink)); stroke-width: 2; } .roof.other { stroke-dasharray: 3 4; }
.spot circle { fill: var(--own); fill-opacity: .7; stroke: var(--ink); stroke-width: 1; }
.spot:hover circle, .spot:focus circle { stroke: var(--accent); stroke-width: 2.5; }
.spot { outline: none; } .inside { fill: var(--ink); font-size: 11px; font-weight: 600; }
"""
"""What the picture needs beside the report's style sheet."""


def page(
    title: str,
    note: str,
    spots: Sequence[Spot],
    roofs: Roofs,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    words: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """Write one page that needs no network and no other file.

    Args:
        title: What was profiled.
        note: On what, and how.
        spots: The operators.
        roofs: The machine's.
        table: Head and rows below the picture.
        words: What limits the network.
        warnings: What made the machine unfit for timing.

    Returns:
        HTML; every text is escaped, and the page's policy forbids loading anything.
    """
    drawn = draw(spots, roofs) + _legend(roofs)
    return picture_page(title, note, drawn, STYLE, table, words=words, warnings=warnings)
