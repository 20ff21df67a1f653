"""A report as Markdown, in English or Chinese."""

import json
from collections.abc import Sequence

import yaml

from tersor.core.report import Report, StageReport
from tersor.core.report_sensitivity import sensitivities
from tersor.core.report_view import (
    change,
    figure,
    flat,
    headline,
    left_in_float,
    limited,
    pairs,
    predicted,
    reproduction,
    stage_figures,
)
from tersor.core.report_words import Language, human, human_seconds, metric_word, say
from tersor.core.schema import to_plain


def to_markdown(report: Report, lang: Language = "en") -> str:
    """Write a report for people.

    Args:
        report: What a run had to say.
        lang: "en" or "zh"; reasons and warnings stay in the words they were given.

    Returns:
        Markdown with tables, ending in a line break.
    """
    parts = [
        f"# {say('title', lang)}",
        f"**{headline(report, lang)}**",
        _status(report, lang),
        _list([
            (say("origin", lang), _code(report.origin)),
            (say("target", lang), _code(report.target)),
            (say("took", lang), human_seconds(report.seconds)),
        ]),
        f"## {say('before_after', lang)}",
        say("before_note", lang),
        _measured(report, lang),
        f"## {say('stages', lang)}",
        _stages(report, lang),
        *_limits(report, lang),
        f"## {say('warnings', lang)}",
        "\n".join(f"- {_inline(text)}" for text in report.warnings) or say("warnings_none", lang),
        f"## {say('environment', lang)}",
        _table((say("name", lang), say("value", lang)), flat(to_plain(report.environment))),
        f"## {say('reproduce', lang)}",
        _block(report.command, "sh") if report.command else "",
        " ".join(say(name, lang) for name in reproduction(report)),
        f"### {say('recipe', lang)}",
        _block(recipe_text(report), "yaml"),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def recipe_text(report: Report) -> str:
    """Return the resolved recipe as YAML."""
    if not report.recipe:
        return ""
    dumped: str = yaml.safe_dump(to_plain(report.recipe), sort_keys=False, allow_unicode=True)
    return dumped.rstrip()


def _status(report: Report, lang: Language) -> str:
    if not report.reached:
        return say("missed", lang)
    return say("reached" if report.limits else "reached_none", lang)


def _measured(report: Report, lang: Language) -> str:
    head = [say(key, lang) for key in ("metric", "before", "after", "change", "how")]
    rows = []
    for pair in pairs(report):
        figures = figure(pair.before, lang), figure(pair.after, lang), change(pair, lang)
        rows.append((metric_word(pair.metric, lang), *figures, pair.how))
    return _table(head, rows)


def _stages(report: Report, lang: Language) -> str:
    stages, figures = report.stages, stage_figures(report)
    if not stages:
        return say("stages_none", lang)
    head = ["", *(say(key, lang) for key in ("stage", "verdict", "measured", "seconds", "reason"))]
    rows = []
    for number, (stage, shown) in enumerate(zip(stages, figures, strict=True), 1):
        measured = (f"{metric_word(m.metric, lang)} {human(m.value, m.unit)}" for m in shown)
        verdict = f"**{say(stage.verdict, lang)}**"
        took = human_seconds(stage.seconds)
        reason = stage.reason
        if stage.predicted is not None:
            reason += f"; {say('predicted', lang, gain=predicted(stage))}"
        rows.append((str(number), _code(stage.name), verdict, "; ".join(measured), took, reason))
    table = _table(head, rows)
    below = (*_attempts(stages, lang), *_floats(stages, lang), *_fragments(stages, lang))
    return "\n\n".join([table, *below])


def _attempts(stages: Sequence[StageReport], lang: Language) -> list[str]:
    lines = [
        f"- {_code(stage.name)}: {_code(json.dumps(to_plain(settings)))} - {_inline(str(reason))}"
        for stage in stages
        if stage.attempts
        for settings, reason in (
            *((a.get("settings", {}), a.get("reason", "")) for a in stage.attempts),
            (stage.settings, stage.reason),
        )
    ]
    return [f"{say('tries', lang)}:", "\n".join(lines)] if lines else []


def _floats(stages: Sequence[StageReport], lang: Language) -> list[str]:
    lines = [
        f"- {_code(stage.name)}: {_inline(text)}"
        for stage in stages
        for text in left_in_float(stage)
    ]
    return [f"{say('in_float', lang)}:", "\n".join(lines)] if lines else []


def _fragments(stages: Sequence[StageReport], lang: Language) -> list[str]:
    """Write what a search over layers chose as steps that can be pasted into a recipe."""
    found = [each.fragment for stage in stages for each in sensitivities(stage) if each.recipe]
    return [part for text in found for part in (say("fragment", lang), _block(text, "yaml"))]


def _limits(report: Report, lang: Language) -> list[str]:
    if not report.limits:
        return []
    head = [say(key, lang) for key in ("metric", "asked", "bound", "value")]
    rows = []
    for limit in report.limits:
        holds = say("holds" if limit.holds else "broken", lang)
        bound = human(limit.bound, limit.unit)
        rows.append(
            (
                metric_word(limit.metric, lang),
                limit.text,
                bound,
                limited(limit, lang),
                f"**{holds}**",
            )
        )
    return [f"## {say('limits', lang)}", say("limits_note", lang), _table([*head, ""], rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in line) + " |" for line in lines)


def _list(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in rows if text)


def _inline(text: str) -> str:
    """Keep a text inside its cell: no line breaks, bars or tags."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())}`" if text else ""


def _block(text: str, kind: str) -> str:
    if not text:
        return ""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{kind}\n{text}\n{fence}"
