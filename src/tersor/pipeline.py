"""compress(): READ THIS FIRST.

A network, a recipe and data go in; every stage is applied, exported, measured on the target and
judged; an artifact that runs without tersor's training side comes out.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tersor import trainer, workspace
from tersor.core import artifact, packing, plugins, sniffing
from tersor.core.artifact import Artifact
from tersor.core.context import Data, Fit, Track, silent, under_way
from tersor.core.errors import DataError, ModelError, suggest
from tersor.core.goal import Goal
from tersor.core.hardware import environment
from tersor.core.model import Model
from tersor.core.recipe import Recipe, stage_name
from tersor.core.report import Report, StageReport
from tersor.core.report_page import to_html
from tersor.core.report_text import to_markdown
from tersor.core.runtime import Target
from tersor.core.training import Training
from tersor.ops import splits
from tersor.plan import (
    Plan,
    check,
    check_metrics,
    check_teacher,
    check_training,
    forecast,
    make_inputs,
    try_forward,
)
from tersor.stages import Run, State

__all__ = ["compress", "load", "load_data", "plan"]


def load(source: str, *, weights: str | Path | None = None, partial: bool = False) -> Model:
    """Load a network.

    Args:
        source: "package.module:factory", "file.py:factory", "x.pt2", "x.onnx", or "SOURCE:place",
            such as "huggingface:FOLDER".
        weights: A .safetensors file for a module, or an artifact made from it.
        partial: Load the weights that fit, and say in `Model.notes` what did not.

    Raises:
        ModelError: cannot be loaded; says why and what to do.
    """
    path = None if weights is None else Path(weights)
    if packing.is_packed(Path(source)):
        with packing.unpacked(Path(source)) as file:
            if file.suffix not in (".onnx", ".pt2"):
                raise ModelError(
                    f"{source!r} holds {file.name!r}, which cannot be looked into; give the "
                    "artifact's folder"
                )
            return replace(load(str(file), weights=path, partial=partial), origin=source)
    known = plugins.names("sources")
    name, _, place = source.partition(":")
    if name in known and place:
        return plugins.source(name).load(place, weights=path, partial=partial)
    for candidate in known:
        if Path(source).suffix in plugins.source(candidate).suffixes:
            return plugins.source(candidate).load(source, weights=path, partial=partial)
    if Path(source).exists() and Path(source).suffix != ".py":
        raise ModelError(f"{source!r} {sniffing.no_network(Path(source))}")
    return plugins.source("module").load(source, weights=path, partial=partial)


def load_data(place: str) -> Data:
    """Load batches: "digits", "arrays:FILE.npz", "images:FOLDER" or "file.py:function".

    Raises:
        DataError: says what is wrong with which batch.
    """
    name, _, rest = place.partition(":")
    known = plugins.names("datasets")
    if not rest and name not in known:
        raise DataError(
            f"unknown data {place!r}.{suggest(place, known)} Data are digits, arrays:FILE.npz, "
            "images:FOLDER or FILE.py:FUNCTION"
        )
    if name in known:
        made = plugins.module("datasets", name).load(rest)
    else:
        made = plugins.module("datasets", "script").load(place)
    assert isinstance(made, Data)
    return made


def plan(
    model: Model,
    recipe: Recipe | str | Path,
    *,
    data: Data,
    goal: Goal | None = None,
    target: Target | None = None,
    metrics: Sequence[str] = ("size", "latency", "fidelity"),
    teacher: Model | torch.nn.Module | None = None,
    fit: Fit | None = None,
    threads: int | None = None,
    out: str | Path,
) -> Plan:
    """Check everything and predict time, memory and disk, without doing any of it."""
    resolved = _resolve(recipe, goal, target, threads)
    names = _metric_names(resolved, metrics)
    check(model, resolved, data, names, Path(out))
    check_training(resolved, data, fit)
    inputs = make_inputs(model, data)
    if model.form == "module":
        try_forward(model.net, inputs)
    check_metrics(model, data, names)
    if teacher is not None:
        check_teacher(_as_model(teacher), model, resolved, inputs)
    return forecast(model, resolved, data, inputs, names, Path(out))


def compress(
    model: Model | torch.nn.Module,
    recipe: Recipe | str | Path,
    *,
    data: Data,
    out: str | Path,
    goal: Goal | None = None,
    target: Target | None = None,
    metrics: Sequence[str] = ("size", "latency", "fidelity"),
    teacher: Model | torch.nn.Module | None = None,
    fit: Fit | None = None,
    predicted: Sequence[tuple[float, float]] = (),
    seed: int = 0,
    threads: int | None = None,
    batch: int = 1,
    resume: bool = False,
    strict: bool = False,
    command: str = "",
    display: Track = silent,
    should_stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Compress a network, keeping only the stages that pay inside the limits.

    Args:
        model: From `load`, or an nn.Module in eval mode. Not changed.
        recipe: A Recipe, a file, or the name of a recipe of the package.
        data: Batches by role.
        out: Folder of the artifact; its work folder is beside it.
        goal: Instead of the recipe's.
        target: Instead of the recipe's.
        metrics: Measured besides those of the goal.
        teacher: What steps of distillation learn from; the untouched `model` by default. Fidelity
            is measured against `model` all the same.
        fit: The trainer; tersor's own by default, with the recipe's `training`.
        predicted: By stage, what `advise` expects of it (`Advice.predicted`), for the report.
        seed: Decides every random number.
        threads: Of the target; 0 means all usable cores.
        batch: Samples in a timed batch.
        resume: Go on with a run that was interrupted.
        strict: A limit holds only when its whole interval is inside.
        command: How to repeat the run, for the report.
        display: Progress.
        should_stop: Asked wherever little is lost, such as after a step of training; True raises
            KeyboardInterrupt, resumable.

    Returns:
        The artifact; `artifact.report.reached` tells whether every limit holds.

    Raises:
        TersorError: before any work for mistakes, or in one of several processes; StepError when a
            technique fails.
        KeyboardInterrupt: stopped; run again with `resume=True`.
    """
    started = time.perf_counter()
    trainer.check_alone()
    model = _as_model(model)
    out = Path(out)
    resolved = _resolve(recipe, goal, target, threads)
    names = _metric_names(resolved, metrics)
    data, warnings = splits.decide_on(data)
    check(model, resolved, data, names, out)
    check_training(resolved, data, fit)
    inputs = make_inputs(model, data)
    if model.form == "module":
        model.net.eval()
        try_forward(model.net, inputs)
    check_metrics(model, data, names)
    guide = None if teacher is None else _as_model(teacher)
    if guide is not None:
        check_teacher(guide, model, resolved, inputs)
    artifact.check_out(out)
    work = out.with_name(out.name + ".work")
    with artifact.lock(out):
        with under_way(display, "preparing: hashing the network and the data"):
            training = workspace.training_threads(work, out) if resume else None
            if training is None and model.form == "module" and data.train is not None:
                training = trainer.choose_threads(model.net, data.train)
            mark = workspace.fingerprint(model.net, data, resolved, seed, batch, training or 1)
            if guide is not None:
                mark["teacher"] = workspace.hash_of(guide.net)
        if resume and (whole := workspace.written(out, work, mark)) is not None:
            artifact.clear_left(out)
            if work.exists():
                workspace.remove(work)
            return whole
        with workspace.opened(work, mark, resume):
            run = Run(
                recipe=resolved,
                inputs=inputs,
                data=data,
                original=model.net,
                names=names,
                batch=batch,
                seed=seed,
                fit=fit or _own_fit(resolved.training, training or 1, display, should_stop),
                work=work,
                teacher=None if guide is None else guide.net,
                display=display,
                predicted=predicted,
                should_stop=should_stop,
                warnings=[*model.notes, *warnings],
            )
            run.stop_if_asked()
            with under_way(display, "the untouched network"):
                before = run.start()
            current = before
            stages: list[StageReport] = []
            for index, stage in enumerate(resolved.stages):
                words = f"stage {index + 1} of {len(resolved.stages)}: {stage_name(stage)}"
                with under_way(display, words):
                    current, done = run.stage(index, stage, current)
                stages.append(done)
                run.stop_if_asked()
            with under_way(display, "measuring before and after, for the report"):
                report = run.final(before, current, tuple(stages), strict)
            report = replace(
                report,
                origin=model.origin,
                command=command,
                seconds=time.perf_counter() - started,
            )
            origin = None if guide is None else guide.origin
            made = _write(out, run, before, current, report, mark, origin, model.processor)
    return made


def _as_model(given: Model | torch.nn.Module) -> Model:
    if isinstance(given, Model):
        return given
    return Model(net=given, form="module", origin=f"module:{type(given).__name__}")


def _own_fit(
    training: Training, threads: int, display: Track, should_stop: Callable[[], bool]
) -> Fit:
    """Return tersor's trainer with the settings of a recipe; smoothing is in the loss."""
    settings = dataclasses.asdict(training)
    del settings["label_smoothing"]
    return functools.partial(
        trainer.fit, **settings, threads=threads, display=display, should_stop=should_stop
    )


_NETWORK = ("network", "weights")
"""Stems of the files that a stage stores its network in."""


def _resolve(
    recipe: Recipe | str | Path, goal: Goal | None, target: Target | None, threads: int | None
) -> Recipe:
    """Read the recipe and let the arguments override its goal, target and threads."""
    made = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    chosen = target or made.target
    if threads is not None:
        chosen = replace(chosen, options={**chosen.options, "threads": threads})
    return replace(made, goal=goal or made.goal, target=chosen)


def _metric_names(recipe: Recipe, asked: Sequence[str]) -> tuple[str, ...]:
    """List what is measured: the goal's metric and limits first, then what was asked for.

    Raises:
        RecipeError: an unknown metric, with the nearest name.
    """
    wanted = [] if recipe.goal is None else [recipe.goal.best, *recipe.goal.limits]
    names = tuple(dict.fromkeys([*wanted, *asked]))
    for name in names:
        plugins.metric(name)
    return names


def _write(
    out: Path,
    run: Run,
    before: State,
    after: State,
    report: Report,
    mark: Mapping[str, str],
    teacher: str | None,
    processor: Sequence[Path],
) -> Artifact:
    """Write the artifact, with the untouched original and the processor beside the result."""
    manifest = {
        "origin": report.origin,
        "recipe": run.recipe.plain(),
        "inputs": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "dynamic": {str(k): v for k, v in run.inputs.dynamic.get(name, {}).items()},
            }
            for name, tensor in run.inputs.example.items()
        },
        **({} if teacher is None else {"teacher": teacher}),
        "seed": run.seed,
        "fingerprint": dict(mark),
        "environment": environment(),
    }
    original = artifact.write_artifact(
        run.work / "original-artifact",
        files=before.candidate.files,
        manifest={**manifest, "recipe": {}, "target": before.candidate.target},
        report=replace(report, after=report.before, stages=(), ratios=(), limits=()),
    )
    folders = {"original": sorted(original.path.iterdir())}
    if processor:
        folders["processor"] = list(processor)
    if after.folder is not None:  # what a later training or run would go on from
        folders["network"] = [f for f in sorted(after.folder.iterdir()) if f.stem in _NETWORK]
    return artifact.write_artifact(
        out,
        files=after.candidate.files,
        manifest={**manifest, "target": after.candidate.target},
        report=report,
        texts={
            "report.md": to_markdown(report),
            "report.zh-CN.md": to_markdown(report, lang="zh"),
            "report.html": to_html(report),
        },
        folders=folders,
    )
