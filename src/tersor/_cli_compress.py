"""`tersor compress` and `tersor demo`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor import _cli_advise
from tersor._cli_advise import AUTO
from tersor._cli_progress import Progress, interruptible
from tersor._cli_talk import (
    colored,
    paragraph,
    show,
    show_json,
    table,
    tell,
)

if TYPE_CHECKING:
    from tersor.core.goal import Goal
    from tersor.core.recipe import Recipe
    from tersor.core.report import Report
    from tersor.plan import Plan

METRICS = ("size", "latency", "fidelity")
"""Measured besides those of the goal and of --metric."""
_ONCE = ("--resume", "--dry-run", "--json", "--debug")


def compress(
    model: str,
    *,
    words: Sequence[str],
    data: str,
    recipe: str | None,
    again: Path | None,
    target: str | None,
    best: str | None,
    limits: Sequence[str],
    metrics: Sequence[str],
    minutes: float | None,
    out: Path,
    batch: int | None,
    threads: int | None,
    seed: int | None,
    weights: Path | None,
    partial: bool,
    teacher: str | None,
    teacher_weights: Path | None,
    fit: str | None,
    quality: str | None,
    strict: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Compress a network as the words say.

    Returns:
        The exit code: 1 where a limit is not reached, 130 where it was interrupted.
    """
    from tersor.core.context import under_way
    from tersor.core.errors import DataError, RecipeError
    from tersor.core.imports import import_object

    earlier = _earlier(again) if again is not None else {}
    display = Progress()
    with under_way(display, "reading the recipe, which loads PyTorch"):
        chosen = _recipe(recipe, earlier, again, target)
    if minutes is not None and recipe != AUTO:
        raise RecipeError(
            "--minutes is what --recipe auto may train; a recipe says it by its epochs"
        )
    goal = goal_of(chosen.goal, best, limits)
    _check_names(goal, metrics)
    with under_way(display, f"loading {model}"):
        from tersor import pipeline

        loaded = pipeline.load(model, weights=weights, partial=partial)
    for note in loaded.notes:
        tell(note)
    with under_way(display, f"reading the data {data}"):
        batches = pipeline.load_data(data)
    if quality is not None:
        made = import_object(quality, error=DataError, what="quality function")
        batches = replace(batches, quality=made)
    if teacher is None and teacher_weights is not None:
        raise DataError("--teacher-weights are those of a teacher; give it with --teacher")
    if teacher is None and earlier.get("teacher"):
        raise DataError(
            f"the run in {again} learnt from {earlier['teacher']}; give it again with --teacher"
        )
    guide = None if teacher is None else pipeline.load(teacher, weights=teacher_weights)
    trainer = None if fit is None else import_object(fit, error=DataError, what="trainer")
    number = earlier.get("seed", 0) if seed is None else seed
    samples = batch or earlier.get("batch", 1)
    predicted: Sequence[tuple[float, float]] = ()
    if recipe == AUTO:
        on = chosen.target
        if threads is not None:
            on = replace(on, options={**on.options, "threads": threads})
        try:
            chosen, predicted, allowed = _cli_advise.recipe_of(
                out,
                loaded,
                batches,
                goal=goal,
                target=on,
                batch=samples,
                minutes=minutes,
                seed=number,
                fit=trainer,
                teacher=guide,
                resume=resume,
            )
        except KeyboardInterrupt:
            tell("interrupted before there was a recipe; nothing is kept, run it again")
            return _interrupted(None, as_json)
        goal = chosen.goal
        if minutes is None and allowed is not None:
            words = [*words, "--minutes", f"{allowed:g}"]
    wanted: dict[str, Any] = {
        "data": batches,
        "teacher": guide,
        "fit": trainer,
        "goal": goal,
        "metrics": tuple(dict.fromkeys([*METRICS, *metrics, *earlier.get("metrics", ())])),
        "out": out,
    }
    if dry_run:
        return _show_plan(pipeline.plan(loaded, chosen, **wanted, threads=threads), as_json)
    try:
        with interruptible(display.now) as should_stop:
            artifact = pipeline.compress(
                loaded,
                chosen,
                **wanted,
                seed=number,
                threads=threads,
                batch=samples,
                predicted=predicted,
                resume=resume,
                strict=strict,
                command=_command(words),
                display=display,
                should_stop=should_stop,
            )
    except KeyboardInterrupt:
        go_on = _command(words, keep=("--resume",))
        tell(f"interrupted; go on with:\n{go_on}")
        return _interrupted(go_on, as_json)
    _cli_advise.kept_of(out).unlink(missing_ok=True)
    if as_json:
        show((artifact.path / "report.json").read_text(encoding="utf-8").rstrip())
    else:
        show(summary(artifact.report, artifact.path))
    return 0 if artifact.report.reached else 1


def demo(
    *,
    words: Sequence[str],
    out: Path,
    target: str | None,
    threads: int | None,
    resume: bool,
    as_json: bool,
) -> int:
    """Compress the network that ships with tersor, on real digits."""
    tell("compressing a small residual network for handwritten digits; every step is measured")
    return compress(
        "tersor.demo.network:trained",
        words=words,
        data="digits",
        recipe="demo",
        again=None,
        target=target,
        best=None,
        limits=(),
        metrics=("accuracy",),
        minutes=None,
        out=out,
        batch=None,
        threads=threads,
        seed=None,
        weights=None,
        partial=False,
        teacher=None,
        teacher_weights=None,
        fit=None,
        quality=None,
        strict=False,
        resume=resume,
        dry_run=False,
        as_json=as_json,
    )


def _recipe(
    name: str | None, earlier: Mapping[str, Any], again: Path | None, target: str | None
) -> "Recipe":
    """Read the recipe that the words name; a target in the words replaces the recipe's."""
    from tersor.core.errors import RecipeError
    from tersor.core.recipe import Recipe, read_target, recipes
    from tersor.core.runtime import Target

    asked = read_target(target)
    if name == AUTO and again is None:
        return Recipe(stages=(), target=asked or Target(runtime="onnxruntime"))
    if (name is None) == (again is None):
        raise RecipeError(
            f"give either --recipe or --again; recipes of the package: auto, {', '.join(recipes())}"
        )
    if name is None:
        made = Recipe.parse(earlier["recipe"], where=f"{again}/manifest.json")
    else:
        made = Recipe.load(name, asked)
    if asked is None:
        return made
    same = asked.runtime == made.target.runtime
    options = {**made.target.options, **asked.options} if same else asked.options
    return replace(made, target=replace(asked, options=options))


def _earlier(folder: Path) -> dict[str, Any]:
    """Read what an artifact says about the run that made it."""
    from tersor.core.artifact import Artifact

    artifact = Artifact.open(folder)
    environment = artifact.report.environment
    return {
        "recipe": artifact.recipe,
        "seed": int(artifact.manifest.get("seed", 0)),
        "teacher": artifact.manifest.get("teacher"),
        "batch": int(environment.get("batch", 1)),
        "metrics": [measurement.metric for measurement in artifact.report.after],
    }


def goal_of(given: "Goal | None", best: str | None, limits: Sequence[str]) -> "Goal | None":
    """Let the words override the recipe's goal, limit by limit."""
    from tersor.core.errors import RecipeError
    from tersor.core.goal import Goal

    if best is None and not limits:
        return given
    asked = {}
    for text in limits:
        name, equals, limit = text.partition("=")
        if not (name and equals and limit):
            raise RecipeError(
                f"--limit {text!r} must be METRIC=LIMIT, such as accuracy=-1pt or size=25%"
            )
        asked[name.strip()] = limit.strip()
    base = given or Goal()
    try:
        return Goal(best=best or base.best, limits={**base.limits, **asked})
    except ValueError as error:
        raise RecipeError(f"--limit: {error}") from error


def _check_names(goal: "Goal | None", metrics: Sequence[str]) -> None:
    """Refuse unknown metrics at once, all of them."""
    from tersor.core import plugins
    from tersor.core.errors import RecipeError, suggest

    known = plugins.names("metrics")
    places = [("--metric", name) for name in metrics]
    if goal is not None:
        places += [("--best", goal.best), *(("--limit", name) for name in goal.limits)]
    mistakes = [
        f"{place}: unknown metric {name!r}.{suggest(name, known)} `tersor list metrics` shows all"
        for place, name in places
        if name not in known
    ]
    if mistakes:
        raise RecipeError(*mistakes)


def _command(words: Sequence[str], keep: Sequence[str] = ()) -> str:
    """Write what was typed, without the words that only matter once."""
    kept = [word for word in words if word not in _ONCE]
    return shlex.join(["tersor", *kept, *keep])


def _interrupted(resume: str | None, as_json: bool) -> int:
    if as_json:
        show_json({"interrupted": True, "resume": resume})
    return 130


def _show_plan(plan: "Plan", as_json: bool) -> int:
    from tersor.core.report_words import human, human_seconds

    if as_json:
        show_json({"plan": plan})
        return 0
    short, long = (human_seconds(seconds) for seconds in plan.seconds)
    rows = [
        ("stages", " > ".join(plan.stages)),
        ("measured", ", ".join(plan.metrics)),
        ("time", f"{short} to {long}"),
        ("memory", f"up to {human(plan.memory_bytes, 'B')}"),
        ("disk", f"up to {human(plan.disk_bytes, 'B')}"),
        *(("note", note) for note in plan.notes),
    ]
    show(table(("plan", ""), rows))
    return 0


def summary(report: "Report", place: Path) -> str:
    """Write what a run came to, for a terminal."""
    from tersor.core.report_view import change, figure, headline, left_in_float, limited, pairs
    from tersor.core.report_view import predicted as predicted_of
    from tersor.core.report_words import human, human_seconds, metric_word
    from tersor.core.schema import to_plain

    parts = [headline(report), ""]
    rows = [
        (metric_word(p.metric), figure(p.before), figure(p.after), change(p)) for p in pairs(report)
    ]
    parts += [table(("metric", "before", "after", "change"), rows), ""]
    for number, stage in enumerate(report.stages, 1):
        word = colored(stage.verdict)
        parts.append(f"{number}. {stage.name}: {word} ({human_seconds(stage.seconds)})")
        parts.append(paragraph(stage.reason))
        parts += [paragraph(f"left in float: {text}") for text in left_in_float(stage)]
        if stage.attempts:
            told = json.dumps(to_plain(stage.settings))
            parts.append(paragraph(f"the last of {len(stage.attempts) + 1} tries: {told}"))
        if stage.predicted is not None:
            parts.append(paragraph(f"{predicted_of(stage)} was predicted"))
    if report.limits:
        parts.append("")
    for limit in report.limits:
        word = colored("holds" if limit.holds else "not reached")
        bound = human(limit.bound, limit.unit)
        parts.append(f"limit {limit.metric} {limit.text}: {word}; {limited(limit)}, bound {bound}")
    parts += [paragraph(f"warning: {text}", "") for text in report.warnings]
    parts += ["", f"artifact: {place}", f"report:   {place / 'report.html'}"]
    return "\n".join(parts)
