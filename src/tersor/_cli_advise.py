"""`tersor advise`, and the recipe `auto`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_progress import Progress
from tersor._cli_talk import (
    check_out,
    paragraph,
    show,
    show_json,
    table,
    tell,
)

if TYPE_CHECKING:
    from tersor.advisor import Advice
    from tersor.core.context import Data, Fit
    from tersor.core.errors import UnfitError
    from tersor.core.goal import Goal
    from tersor.core.model import Model
    from tersor.core.recipe import Recipe
    from tersor.core.runtime import Target

AUTO = "auto"
"""The recipe that advise finds."""


def advise(
    model: str,
    *,
    data: str | None,
    goal: "Goal | None",
    target: "Target | None",
    batch: int,
    threads: int | None,
    minutes: float,
    weights: Path | None,
    partial: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Try steps, and print the recipe of those that pay."""
    from dataclasses import replace

    from tersor import advisor, pipeline
    from tersor.core.errors import DataError
    from tersor.core.runtime import Target

    if data is None:
        raise DataError(
            "advise tries steps on data; give --data DATA, or a --machine to predict for"
        )
    check_out(out, ".yaml")
    chosen = target or Target(runtime="onnxruntime")
    if threads is not None:
        chosen = replace(chosen, options={**chosen.options, "threads": threads})
    loaded = pipeline.load(model, weights=weights, partial=partial)
    for note in loaded.notes:
        tell(note)
    batches = pipeline.load_data(data)
    try:
        found = advisor.advise(
            loaded,
            batches,
            target=chosen,
            goal=goal,
            batch=batch,
            minutes=minutes,
            display=Progress(),
        )
    except KeyboardInterrupt:
        tell("interrupted; nothing is kept, run it again")
        return 130
    if out is not None:
        out.write_text(_yaml(found), encoding="utf-8")
    if as_json:
        show_json({"advice": plain(found)})
    else:
        show(_told(found, model, data, out))
    for warning in found.warnings:
        tell(f"warning: {warning}")
    return 0


def check_described(**given: Any) -> None:
    """Refuse words that say how to try steps where nothing is tried.

    Raises:
        RecipeError: names the first of them.
    """
    from tersor.core.errors import RecipeError

    for name, value in given.items():
        if value not in (None, []):
            raise RecipeError(
                f"with --machine nothing is tried, so that --{name} has no meaning; leave it out"
            )


def recipe_of(
    out: Path,
    model: "Model",
    data: "Data",
    *,
    goal: "Goal | None",
    target: "Target",
    batch: int,
    minutes: float | None,
    seed: int,
    fit: "Fit | None",
    teacher: "Model | None",
    resume: bool,
) -> tuple["Recipe", Sequence[tuple[float, float]], float | None]:
    """Return the recipe that advise finds, what it predicts, and the minutes that it was given.

    A resumed run gets the same again; of one that had ended, the minutes are not known.

    Raises:
        UnfitError: nothing pays. RecipeError: it was resumed with another goal, target or minutes.
        KeyboardInterrupt: stopped; nothing is kept.
    """
    from tersor import advisor
    from tersor.core import files
    from tersor.core.errors import RecipeError
    from tersor.core.recipe import Recipe
    from tersor.core.schema import to_plain

    kept = kept_of(out)
    if resume and (earlier := _earlier(kept, out)) is not None:
        recipe, predicted, allowed = earlier
        if allowed is None and minutes is not None:
            tell(f"the run in {out} had ended; --minutes {minutes:g} changes nothing")
        if None not in (minutes, allowed) and minutes != allowed:
            raise RecipeError(
                f"cannot resume: the advice for {out} was given for --minutes {allowed:g}, not "
                f"{minutes:g}. Leave --minutes out, or run without --resume"
            )
        if target != recipe.target or (goal or advisor.usual_goal(data)) != recipe.goal:
            asked = f"target {recipe.target.text}, goal {to_plain(recipe.goal)}"
            raise RecipeError(
                f"cannot resume: the advice for {out} was given for another goal or target "
                f"({asked}). Give the same again, or run without --resume"
            )
        return recipe, predicted, allowed
    tell("trying what may help; every step is measured")
    minutes = advisor.MINUTES if minutes is None else minutes
    found = advisor.advise(
        model,
        data,
        target=target,
        goal=goal,
        batch=batch,
        minutes=minutes,
        fit=fit,
        teacher=teacher,
        seed=seed,
        display=Progress(),
    )
    if not found.suggestions:
        raise nothing(found)
    for each in found.suggestions:
        tell(f"  {_names(each.stage)}: {_range(each.gain)} predicted; {each.why}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    content = {"recipe": found.recipe, "predicted": found.predicted, "minutes": minutes}
    files.replace_file(kept, json.dumps(content, indent=1).encode())
    return Recipe.parse(found.recipe), found.predicted, minutes


def nothing(found: "Advice") -> "UnfitError":
    """Tell why each step that was tried is left out, and return the error for it."""
    from tersor.core.errors import UnfitError
    from tersor.core.schema import to_plain

    for each in found.refusals:
        tell(f"  {_short(each.stage)}: {each.reason}")
    return UnfitError(
        f"advise found nothing that pays for the goal {to_plain(found.goal)}; what was tried is "
        "above. Allow more by --limit, or time for training by --minutes"
    )


def _earlier(
    kept: Path, out: Path
) -> tuple["Recipe", Sequence[tuple[float, float]], float | None] | None:
    """Return the advice that a run is following, or has followed to its end, and its minutes.

    Raises:
        RecipeError: the file that it is kept in is damaged.
    """
    from tersor.core.artifact import Artifact
    from tersor.core.errors import RecipeError
    from tersor.core.recipe import Recipe

    if kept.is_file():
        try:
            raw = json.loads(kept.read_text(encoding="utf-8"))
            plain, predicted = raw["recipe"], [(float(a), float(b)) for a, b in raw["predicted"]]
            minutes = float(raw["minutes"])
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{kept} is damaged; run again without --resume") from error
        return Recipe.parse(plain, where=kept.name), predicted, minutes
    if not (out / "manifest.json").is_file():
        return None
    done = Artifact.open(out)
    gains = [each.predicted for each in done.report.stages]
    return Recipe.parse(done.recipe, where=f"{out}/manifest.json"), [g for g in gains if g], None


def kept_of(out: Path) -> Path:
    """Return where the advice is kept until the run that follows it is done."""
    return out.with_name(out.name + ".advice.json")


def plain(found: "Advice") -> Mapping[str, Any]:
    """Return advice as plain data, with steps as they stand in a recipe."""
    from tersor.core.recipe import plain_step

    made = dict(vars(found))
    made["suggestions"] = [
        {**vars(each), "stage": [plain_step(c) for c in each.stage]} for each in found.suggestions
    ]
    made["refusals"] = [
        {"stage": [plain_step(c) for c in each.stage], "reason": each.reason}
        for each in found.refusals
    ]
    return made


def _told(found: "Advice", model: str, data: str, out: Path | None) -> str:
    lines = []
    if found.words:
        lines += ["what limits it here", *(paragraph(f"- {w}", "") for w in found.words), ""]
    rows = [
        (_names(each.stage), _range(each.gain), each.why, each.seen) for each in found.suggestions
    ]
    if rows:
        for name, gain, why, seen in rows:
            lines += [f"{name}: {gain} predicted", paragraph(why), paragraph(f"seen: {seen}")]
        lines += ["", f"together: {_range(found.gain)} better {found.goal.best} predicted", ""]
    else:
        lines += ["nothing that was tried pays", ""]
    if found.refusals:
        lines.append("tried, or looked at, and left out")
        lines.append(table(("step", "why"), [(_short(r.stage), r.reason) for r in found.refusals]))
        lines.append("")
    if rows:
        lines += [_yaml(found).rstrip(), ""]
        place = str(out) if out is not None else "auto"
        lines.append(f"do it: tersor compress {model} --data {data} --recipe {place}")
    return "\n".join(lines)


def _yaml(found: "Advice") -> str:
    import yaml

    reasons = "".join(
        f"# {_names(each.stage)}: {_range(each.gain)} predicted\n#   {each.why}\n"
        for each in found.suggestions
    )
    text: str = yaml.safe_dump(dict(found.recipe), sort_keys=False)
    return reasons + text


def _names(stage: Sequence[Any]) -> str:
    from tersor.core.recipe import stage_name

    return stage_name(tuple(stage))


def _short(stage: Sequence[Any]) -> str:
    """Write a stage with what its first step was told."""
    from tersor.core.schema import changed

    told = ", ".join(f"{k} {v}" for k, v in changed(stage[0]).items() if k != "ranking")
    return f"{_names(stage)} ({told})" if told else _names(stage)


def _range(gain: tuple[float, float]) -> str:
    return f"{gain[0]:.2f}x to {gain[1]:.2f}x"
