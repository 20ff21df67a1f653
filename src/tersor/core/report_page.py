"""A report as one offline HTML page: English and Chinese, light and dark, nothing loaded."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tersor.core.metric import Measurement
from tersor.core.report import Report, StageReport
from tersor.core.report_html import beside, both, heading, named, row, speak, table
from tersor.core.report_operators import operators
from tersor.core.report_picture import corner, costs, draw, x_metric
from tersor.core.report_sensitivity import Sensitivity, sensitivities
from tersor.core.report_text import recipe_text
from tersor.core.report_view import (
    change,
    figure,
    find,
    flat,
    headline,
    left_in_float,
    limited,
    originals,
    pairs,
    predicted,
    quality_metric,
    reproduction,
    stage_figures,
)
from tersor.core.report_words import (
    LANGUAGES,
    Language,
    human,
    human_seconds,
    metric_word,
    say,
)
from tersor.core.schema import to_plain

_ICONS = {
    "kept": '<path d="M2 8.5 6.2 13 14 3.5" fill="none" stroke="currentColor" stroke-width="2.4"/>',
    "weakened": '<circle cx="8" cy="8" r="6" fill="none" stroke="currentColor" stroke-width="2"/>'
    '<path d="M8 2a6 6 0 0 1 0 12z" fill="currentColor"/>',
    "dropped": '<path d="M3 3l10 10M13 3 3 13" stroke="currentColor" stroke-width="2.4"/>',
    "applied": '<circle cx="8" cy="8" r="4.5" fill="currentColor"/>',
    "original": '<circle cx="8" cy="8" r="5" fill="none" stroke="currentColor" stroke-width="2"/>',
}
_HATCH = (
    '<svg width="0" height="0" aria-hidden="true" focusable="false"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect class="hatch-back" width="6" height="6"/>'
    '<line class="hatch-line" x1="1.5" x2="1.5" y1="0" y2="6"/>'
    "</pattern></defs></svg>"
)


def to_html(report: Report) -> str:
    """Draw a report as one page that needs no network and no other file.

    Returns:
        HTML; every text of the report is escaped, and the page's policy forbids loading anything.
    """
    style, script = beside("report_page.css"), beside("report_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    titles = {lang: f"tersor: {headline(report, lang)}" for lang in LANGUAGES}
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join([
        "<!doctype html>",
        f'<html lang="en" data-lang="en" data-title-en="{escape(titles["en"])}"',
        f' data-title-zh="{escape(titles["zh"])}"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{escape(titles['en'])}</title>",
        f"<style>{style}</style></head>",
        f"<body>{_HATCH}",
        *_top(report),
        "<main>",
        *_before_after(report),
        *_stages(report),
        *_picture(report),
        *operators(report),
        *_limits(report),
        *_warnings(report),
        *_environment(report),
        *_reproduce(report),
        "</main>",
        f"<footer>tersor, report schema {report.schema}</footer>",
        f"<script>{script}</script></body></html>",
    ]) + "\n"  # fmt: skip


def _top(report: Report) -> list[str]:
    reached = "reached" if report.limits else "reached_none"
    status, kind = (
        (reached, "good" if report.limits else "plain") if report.reached else ("missed", "bad")
    )
    facts = [
        ("origin", report.origin),
        ("target", report.target),
        ("took", human_seconds(report.seconds)),
    ]
    return [
        f'<header><div class="bar"><span><strong>tersor</strong> {speak("title")}</span><span>',
        '<button id="language" type="button"><span class="en" lang="zh-CN">&#20013;&#25991;</span>'
        '<span class="zh" lang="en">English</span></button>',
        f'<button id="theme" type="button">{speak("theme")}</button></span></div>',
        f'<h1><span class="headline en" lang="en">{escape(headline(report, "en"))}</span>'
        f'<span class="headline zh" lang="zh-CN">{escape(headline(report, "zh"))}</span></h1>',
        f'<p><span class="status {kind}">{speak(status)}</span></p>',
        '<dl class="facts">',
        *(
            f"<dt>{speak(key)}</dt><dd><code>{escape(text)}</code></dd>"
            for key, text in facts
            if text
        ),
        "</dl></header>",
    ]


def _before_after(report: Report) -> list[str]:
    rows = [
        row(
            named(pair.metric),
            _figure(pair.before),
            _figure(pair.after),
            _split(change(pair, "en"), change(pair, "zh")),
            how=pair.how,
        )
        for pair in pairs(report)
    ]
    head = ("metric", "before", "after", "change", "how")
    return [
        heading("before_after"),
        f'<p class="note">{speak("before_note")}</p>',
        *table(head, rows),
    ]


def _figure(measurement: Measurement | None) -> str:
    return _split(figure(measurement, "en"), figure(measurement, "zh"))


def _split(en: str, zh: str) -> str:
    """Set the bracket of a figure, its interval, below it."""
    (value_en, _, rest_en), (value_zh, _, rest_zh) = en.partition(" ("), zh.partition(" (")
    below = (
        f'<span class="spread">{both(rest_en.rstrip(")"), rest_zh.rstrip(")"))}</span>'
        if rest_en
        else ""
    )
    return both(value_en, value_zh) + below


def _stages(report: Report) -> list[str]:
    lines = [heading("stages")]
    if not report.stages:
        return [*lines, f"<p>{speak('stages_none')}</p>"]
    metric, quality = x_metric(report), quality_metric(report)
    figures = stage_figures(report)
    measured = [find(shown, metric) for shown in figures]
    original = find(originals(report), metric)
    longest = max([m.value for m in (original, *measured) if m is not None], default=0.0)
    words = (say("stages_note", lang, metric=metric_word(metric, lang)) for lang in LANGUAGES)
    lines += [f'<p class="note">{both(*words)}</p>', '<ol class="stages">']
    if original is not None:
        bar = _bar(original, longest, "original", original, find(originals(report), quality))
        lines.append(f'<li><div class="stage">{_verdict("original")}</div>{bar}</li>')
    for number, (stage, now) in enumerate(zip(report.stages, measured, strict=True), 1):
        lines += _stage(number, stage)
        if now is not None:
            good = find(stage.measurements, quality)
            lines.append(_bar(now, longest, stage.verdict, original, good))
        lines.append(f'<p class="reason">{escape(stage.reason)}</p>')
        if stage.predicted is not None:
            told = (say("predicted", lang, gain=predicted(stage)) for lang in LANGUAGES)
            lines.append(f'<p class="reason">{both(*told)}</p>')
        for text in left_in_float(stage):
            lines.append(f'<p class="reason">{speak("in_float")}: {escape(text)}</p>')
        for each in sensitivities(stage):
            lines += _sensitivity(each)
        lines += [*_details(stage, figures[number - 1]), "</li>"]
    return [*lines, "</ol>"]


def _stage(number: int, stage: StageReport) -> list[str]:
    return [
        f'<li><div class="stage"><span class="title">{number}. {escape(stage.name)}</span>',
        _verdict(stage.verdict),
        f'<span class="time">{escape(human_seconds(stage.seconds))}</span></div>',
    ]


def _verdict(kind: str, word: str = "") -> str:
    """Write a verdict as word, sign and color."""
    icon = f'<svg viewBox="0 0 16 16" aria-hidden="true" focusable="false">{_ICONS[kind]}</svg>'
    return f'<span class="verdict {kind}">{icon}{speak(word or kind)}</span>'


def _bar(
    now: Measurement,
    longest: float,
    kind: str,
    original: Measurement | None,
    quality: Measurement | None,
) -> str:
    """Draw one bar with its interval; the figures beside it say the same in words."""
    value = human(now.value, now.unit)
    beside = [f"<strong>{escape(value)}</strong>"]
    if original is not None and original.value > 0 and kind != "original":
        percent = f"{100 * now.value / original.value:.0f} %"
        beside.append(f'<span class="quiet">{speak("of_original", percent=percent)}</span>')
    if quality is not None:
        text = f"{named(quality.metric)} {escape(human(quality.value, quality.unit))}"
        beside.append(f'<br><span class="quiet">{text}</span>')
    label = escape(f"{say(kind)}: {metric_word(now.metric)} {value}")
    shapes = ['<rect class="track" width="100%" height="14"/>']
    if longest > 0:
        share = 100 * now.value / longest
        shapes.append(f'<rect class="fill-{kind}" width="{share:.2f}%" height="14"/>')
        low, high = (min(100.0, 100 * end / longest) for end in now.spread or (now.value,) * 2)
        ends = f'x1="{low:.2f}%" x2="{high:.2f}%"'
        shapes.append(f'<line class="spread-line" {ends} y1="7" y2="7"/>')
    return (
        f'<div class="length"><svg width="100%" height="14" role="img" aria-label="{label}">'
        f'{"".join(shapes)}</svg><span class="figures">{" ".join(beside)}</span></div>'
    )


def _sensitivity(found: Sensitivity) -> list[str]:
    """Draw what each layer loses with each setting: a table whose shades are the picture."""
    settings, chosen = found.settings, found.chosen
    heads = [speak("layer"), *map(escape, settings), *([speak("chosen")] if chosen else [])]
    rows = []
    for layer, losses in found.losses.items():
        marked, exact = found.marked(layer) or ("", True)
        frames = {marked: ' class="chosen"' if exact else ' class="chosen near"'}
        cells = [_heat(found, losses.get(s), frames.get(s, "")) for s in settings]
        cells += [f'<td class="taken">{escape(chosen.get(layer, "-"))}</td>'] if chosen else []
        rows.append(f'<tr><th scope="row">{escape(layer)}</th>{"".join(cells)}</tr>')
    words = (say("sensitivity", lang, technique=found.technique) for lang in LANGUAGES)
    fragment = f'<p>{speak("fragment")}</p><pre class="paste">{escape(found.fragment)}</pre>'
    return [
        f"<details open><summary>{both(*words)}</summary>",
        f'<p class="note">{speak("sensitivity_note")}{speak("chosen_note") if chosen else ""}</p>',
        '<div class="scroll"><table class="heat"><thead><tr>',
        *(f'<th scope="col">{head}</th>' for head in heads),
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
        fragment if found.fragment else "",
        "</details>",
    ]


def _heat(found: Sensitivity, loss: float | None, frame: str) -> str:
    if loss is None:
        return f"<td{frame}>-</td>"
    shade = f"--heat:{90 * found.heat(loss):.0f}%"
    return f'<td{frame} style="{shade}">{human(loss, "1")}</td>'


def _details(stage: StageReport, figures: Sequence[Measurement]) -> list[str]:
    blocks = [
        ("settings", to_plain(stage.settings)),
        ("attempts", [_attempt(attempt) for attempt in stage.attempts]),
        ("facts", to_plain(stage.facts)),
    ]
    shown = [
        f"<p>{speak(key)}</p><pre>{escape(json.dumps(content, indent=1, ensure_ascii=False))}</pre>"
        for key, content in blocks
        if content
    ]
    if figures:
        rows = [row(named(m.metric), _figure(m), how=m.how) for m in figures]
        shown = [*table(("metric", "measured", "how"), rows), *shown]
    if not shown:
        return []
    return [f"<details><summary>{speak('details')}</summary>", *shown, "</details>"]


def _attempt(attempt: Mapping[str, Any]) -> Any:
    """Write the measurements of an earlier try short."""
    plain = to_plain(attempt)
    for item in (measured := plain.get("measurements") or []):
        if not isinstance(item, dict) or "metric" not in item:
            return plain
    return {**plain, "measurements": {m["metric"]: human(m["value"], m["unit"]) for m in measured}}


def _picture(report: Report) -> list[str]:
    """Draw the quality against each cost, a figure each."""
    shown = costs(report)
    if not shown:
        return [heading("picture"), f'<p class="note">{speak("picture_none")}</p>']
    notes = (_picture_note(report, lang) for lang in LANGUAGES)
    tried = ["dropped"] if any(stage.attempts for stage in report.stages) else []
    kinds = dict.fromkeys(["original", *(stage.verdict for stage in report.stages), *tried])
    legend = "".join(_verdict(kind) for kind in kinds)
    line = '<svg viewBox="0 0 22 8" aria-hidden="true"><path class="front" d="M1 1h9v6h11"/></svg>'
    return [
        heading("picture"),
        f'<p class="note">{both(*notes)}</p>',
        f'<div class="legend">{legend}<span class="key">{line}{speak("front")}</span></div>',
        '<div class="panels">',
        *(
            f"<figure>{draw(report, cost)}"
            f'<figcaption aria-live="polite">{speak("point_at")}</figcaption></figure>'
            for cost in shown
        ),
        "</div>",
    ]


def _picture_note(report: Report, lang: Language) -> str:
    names = [metric_word(name, lang) for name in costs(report)]
    x = say("comma", lang).join(names)
    y = metric_word(quality_metric(report), lang)
    what = say("picture_metrics", lang, y=y, x=x, area=metric_word("size", lang))
    note = say("picture_note", lang, corner=say(corner(report), lang))
    return f"{what[0].upper()}{what[1:]} {note}"


def _limits(report: Report) -> list[str]:
    if not report.limits:
        return []
    rows = []
    for limit in report.limits:
        cells = [
            escape(limit.text),
            escape(human(limit.bound, limit.unit)),
            _split(limited(limit, "en"), limited(limit, "zh")),
            _verdict("kept", "holds") if limit.holds else _verdict("dropped", "broken"),
        ]
        tds = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f'<tr><th scope="row">{named(limit.metric)}</th>{tds}</tr>')
    head = ("metric", "asked", "bound", "value", "")
    note = f'<p class="note">{speak("limits_note")}</p>'
    return [heading("limits"), note, *table(head, rows)]


def _warnings(report: Report) -> list[str]:
    if not report.warnings:
        return [heading("warnings"), f'<p class="note">{speak("warnings_none")}</p>']
    items = "".join(f"<li>{escape(text)}</li>" for text in report.warnings)
    return [heading("warnings"), f'<ul class="warnings">{items}</ul>']


def _environment(report: Report) -> list[str]:
    rows = flat(to_plain(report.environment))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return [heading("environment"), f'<dl class="facts">{facts}</dl>'] if rows else []


def _reproduce(report: Report) -> list[str]:
    command = f"<pre>{escape(report.command)}</pre>" if report.command else ""
    recipe = recipe_text(report)
    folded = (
        f"<details><summary>{speak('recipe')}</summary><pre>{escape(recipe)}</pre></details>"
        if recipe
        else ""
    )
    notes = "".join(f'<p class="note">{speak(name)}</p>' for name in reproduction(report))
    return [heading("reproduce"), command, notes, folded]
