"""The picture of a network's coupled channels: a column a layer, a row a group, as SVG."""

from html import escape

from tersor.ops.groups import Coupling, Group

_PITCH, _ROW = 19, 22
_LETTER = 6.3
"""Width of a letter of 11 pixels, on the wide side."""
_STYLE = """
.groups { font: 11px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; --paper: #fff;
  --ink: #1b1f24; --quiet: #57606a; --line: #e4e8ec; --free: #0b5cad; --stays: #8b949e; }
@media (prefers-color-scheme: dark) { .groups { --paper: #0f1216; --ink: #e6e9ed;
  --quiet: #9aa5b1; --line: #262c34; --free: #6cb2f7; --stays: #66707b; } }
.groups .paper { fill: var(--paper); } .groups text { fill: var(--ink); }
.groups .grid { stroke: var(--line); } .groups .number { font-weight: 600; }
.groups .free { color: var(--free); } .groups .stays { color: var(--stays); }
.groups .stays text, .groups .quiet { fill: var(--quiet); }
.groups .span { stroke: currentColor; stroke-width: 1.5; stroke-opacity: .45; }
.groups .made, .groups .passed { fill: currentColor; }
.groups .read { fill: none; stroke: currentColor; stroke-width: 1.7; }
"""


def draw(coupling: Coupling) -> str:
    """Draw the groups in the order of the graph; those that must stay are gray, with the reason.

    Returns:
        One SVG element that is a whole file, too, and loads nothing; light or dark as the reader's.
    """
    columns = _columns(coupling)
    names = [group.name for group in coupling.groups]
    left = 56 + _LETTER * max(map(len, names), default=0)
    longest = max(map(len, columns), default=0)
    top = 52 + 0.71 * _LETTER * longest  # names lean by 45 degrees
    wall = left + _PITCH * len(columns)
    reasons = max((len(group.stays or "") for group in coupling.groups), default=0)
    width = max(wall + 16 + _LETTER * reasons, wall + 0.71 * _LETTER * longest + 16, 480)
    floor = top + _ROW * len(names)
    free, total = coupling.counts
    share = f"{free} of {total} channels can be cut"
    size = f"{width:.0f} {floor + 40:.0f}".split()
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="groups" width="{size[0]}" '
        f'height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-label="coupled channels: {share}"><style>{_STYLE}</style>',
        f'<rect class="paper" width="{size[0]}" height="{size[1]}"/>',
        _text(12, 22, f"Channels that belong together: {share}", "number"),
    ]
    middles = {}
    for place, layer in enumerate(columns):
        x = middles[layer] = left + _PITCH * (place + 0.5)
        lines.append(f'<path class="grid" d="M{x:.1f} {top:.0f}V{floor:.0f}"/>')
        at = f"rotate(-45 {x:.1f} {top - 6:.1f})"
        lines.append(f'<text x="{x:.1f}" y="{top - 6:.1f}" transform="{at}">{escape(layer)}</text>')
    for place, group in enumerate(coupling.groups):
        lines += _row(group, middles, left, wall, top + _ROW * (place + 0.5))
    return "\n".join([*lines, *_legend(floor + 24), "</svg>"]) + "\n"


def _columns(coupling: Coupling) -> list[str]:
    """List the layers of all groups in the order in which the graph first uses them."""
    used = [str(node.target) for node in coupling.captured.graph.nodes]
    layers = dict.fromkeys(layer for group in coupling.groups for layer, _ in group.indices)

    def first(layer: str) -> int:
        owned = f"{layer}."  # of a layer that is not called, but whose parameters are used
        fits = (i for i, name in enumerate(used) if name == layer or name.startswith(owned))
        return next(fits, len(used))

    return sorted(layers, key=first)


def _row(group: Group, middles: dict[str, float], left: float, wall: float, y: float) -> list[str]:
    places = [middles[layer] for layer, _ in group.indices]
    marks = [
        f'<circle class="{kind}" cx="{middles[layer]:.1f}" cy="{y:.1f}" r="{radius}"/>'
        for kind, radius, layers in (
            ("passed", 2.6, group.passed),
            ("made", 4.5, group.makers),
            ("read", 6.5, group.readers),
        )
        for layer in layers
    ]
    return [
        f'<g class="{"stays" if group.stays else "free"}"><title>{escape(str(group))}</title>',
        _text(left - 44, y + 4, group.name, anchor="end"),
        _text(left - 10, y + 4, str(group.size), "number", anchor="end"),
        f'<path class="span" d="M{min(places):.1f} {y:.1f}H{max(places):.1f}"/>',
        *marks,
        _text(wall + 8, y + 4, group.stays) if group.stays else "",
        "</g>",
    ]


def _legend(y: float) -> list[str]:
    entries = (
        ("made", 4.5, "makes them"),
        ("passed", 2.6, "passes them"),
        ("read", 6.5, "reads them"),
    )
    lines = []
    for place, (kind, radius, words) in enumerate(entries):
        x = 20 + 110 * place
        lines.append(f'<circle class="{kind} free" cx="{x}" cy="{y:.1f}" r="{radius}"/>')
        lines.append(_text(x + 12, y + 4, words, "quiet"))
    return [*lines, _text(20 + 110 * 3, y + 4, "gray: must stay", "quiet")]


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
