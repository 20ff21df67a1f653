"""Where the time goes, before and after: a part of a report's page."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from tersor.core.report import OperatorReport, OperatorsReport, Report
from tersor.core.report_html import both, heading, named, speak, table
from tersor.core.report_words import human, say

_OPEN = 16
"""A table of more layers is folded."""


def operators(report: Report) -> list[str]:
    """Draw the time by kind of operator, by layer, and list the operators."""
    found = report.operators
    if found is None or not (found.before or found.after):
        how = (say("operators_old"), say("operators_old", "zh"))
        how = how if found is None else (found.how, found.how)
        words = (say("operators_none", "en", how=how[0]), say("operators_none", "zh", how=how[1]))
        return [heading("operators"), f'<p class="note">{both(*words)}</p>']
    return [
        heading("operators"),
        f'<p class="note">{speak("operators_note", how=found.how)}</p>',
        *_twins("work", _sums(found.before, _part), _sums(found.after, _part), whole=True),
        *_layers(found),
        f"<details><summary>{speak('each_operator')}</summary>",
        *(line for side in ("before", "after") for line in _list(side, getattr(found, side))),
        "</details>",
    ]


def _part(operator: OperatorReport) -> str:
    return operator.part


def _layer(operator: OperatorReport) -> str:
    return operator.layer or operator.part


def _sums(
    operators: Sequence[OperatorReport], key: Callable[[OperatorReport], str]
) -> dict[str, float]:
    made: dict[str, float] = {}
    for operator in operators:
        made[key(operator)] = made.get(key(operator), 0.0) + operator.ms
    return made


def _layers(found: OperatorsReport) -> list[str]:
    """Set each layer beside itself, in the order that they run in; what is in none comes last."""
    if not any(operator.layer for operator in (*found.before, *found.after)):
        return []
    before, after = _sums(found.before, _layer), _sums(found.after, _layer)
    parts = {operator.part for operator in (*found.before, *found.after)}
    ordered = sorted(dict.fromkeys([*before, *after]), key=parts.__contains__)
    fold = "" if len(ordered) > _OPEN else " open"
    return [
        f"<details{fold}><summary>{speak('each_layer')}</summary>",
        *_twins("layer", {n: before[n] for n in ordered if n in before}, after, order=ordered),
        "</details>",
    ]


def _twins(
    head: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    order: Sequence[str] = (),
    whole: bool = False,
) -> list[str]:
    """Draw two bars a row on one scale; without an order the longest come first."""
    names = list(order) or sorted(
        {*before, *after}, key=lambda n: -max(before.get(n, 0.0), after.get(n, 0.0))
    )
    longest = max([*before.values(), *after.values()], default=0.0)
    rows = [_twin(named(n), before.get(n), after.get(n), longest) for n in names]
    if whole:
        rows.append(_twin(speak("sum"), sum(before.values()), sum(after.values()), 0.0))
    return table((head, "before", "after", ""), rows)


def _twin(name: str, before: float | None, after: float | None, longest: float) -> str:
    figures = "".join(
        f'<td class="number">{"-" if ms is None else escape(human(ms, "ms"))}</td>'
        for ms in (before, after)
    )
    bars = "".join(
        f'<rect class="fill-{kind}" y="{y}" width="{100 * (ms or 0.0) / longest:.2f}%" height="7"/>'
        for kind, y, ms in (("original", 1, before), ("kept", 9, after))
        if longest > 0
    )
    drawn = f'<svg width="100%" height="17" aria-hidden="true">{bars}</svg>' if bars else ""
    return f'<tr><th scope="row">{name}</th>{figures}<td class="bars">{drawn}</td></tr>'


def _list(side: str, operators: Sequence[OperatorReport]) -> list[str]:
    total = sum(operator.ms for operator in operators) or 1.0
    rows = [
        f'<tr><th scope="row">{escape(o.name)}</th><td>{escape(o.kind)}</td>'
        f'<td>{escape(o.layer)}</td><td class="number">{escape(human(o.ms, "ms"))}</td>'
        f'<td class="number">{100 * o.ms / total:.1f} %</td></tr>'
        for o in operators
    ]
    return [
        f"<h3>{speak(side)}</h3>",
        *table(("operator", "kind", "layer", "latency", "share"), rows),
    ]
