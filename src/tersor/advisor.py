"""advise(): which steps are worth it for a network, a target and a goal; each one was tried.

What needs no training is applied, exported and timed as `compress` would do it. What needs training
is applied and trained for seconds: the speed of a cut network is known before its weights are, and
how far quality is from the limit after a little training tells whether more of it can help. The
gains that were seen become predictions, ranges, which `compress --recipe auto` keeps in the report
beside what came out.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor import trainer
from tersor._trying import TRIED_S, Brief, Refusal, Suggestion, Trials
from tersor.core.context import Data, Fit, Track, silent
from tersor.core.errors import ModelError, RecipeError, suggest
from tersor.core.goal import Goal
from tersor.core.hardware import environment, preflight, probe
from tersor.core.model import Model
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.ops import splits
from tersor.plan import check, make_inputs, try_forward
from tersor.stages import Run

GOALS = ("latency", "throughput", "size")
MINUTES = 3.0
"""Of training that a stage of the recipe may ask for, as long as nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recipe with its reasons."""

    subject: str
    target: str
    goal: Goal
    batch: int
    threads: int
    words: tuple[str, ...]
    """What limits the network here, from its profile."""
    suggestions: tuple[Suggestion, ...]
    refusals: tuple[Refusal, ...]
    recipe: Mapping[str, Any]
    """As plain data: what a recipe file holds."""
    gain: tuple[float, float]
    """Of all stages together."""
    seconds: float
    warnings: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predicted(self) -> tuple[tuple[float, float], ...]:
        """The gain of each stage."""
        return tuple(each.gain for each in self.suggestions)


def advise(
    model: Model,
    data: Data,
    *,
    target: Target | None = None,
    goal: Goal | None = None,
    batch: int = 1,
    minutes: float = MINUTES,
    fit: Fit | None = None,
    teacher: Model | None = None,
    seed: int = 0,
    display: Track = silent,
    should_stop: Callable[[], bool] = lambda: False,
) -> Advice:
    """Try what may help, and return a recipe of what does; takes a minute or several.

    Args:
        model: A network in Python. Not changed.
        data: Batches by role; without `train`, only steps that need no training.
        target: onnxruntime:cpu by default.
        goal: `best` is latency, throughput or size. By default latency, with at most one point of
            accuracy lost where there are labels, else with fidelity of 99.
        batch: Samples in a timed batch.
        minutes: Of training that a stage of the recipe may ask for; 0: no step that trains.
        fit: The trainer; tersor's own by default.
        teacher: What smaller networks learn from; `model` itself by default.
        seed: Decides every random number.
        display: Progress.
        should_stop: Asked before every trial; True raises KeyboardInterrupt.

    Raises:
        RecipeError: another goal. ModelError: the network is no module. DataError: no `test`.
        TargetError: the target cannot run the network.
    """
    began = time.perf_counter()
    chosen = target or Target(runtime="onnxruntime")
    if model.form != "module":
        raise ModelError(
            "advise tries steps on the network, which takes a network in Python; this one has form "
            f"{model.form!r}. Give FILE.py:FACTORY"
        )
    data, warnings = splits.decide_on(data)
    wanted = goal or usual_goal(data)
    if wanted.best not in GOALS:
        raise RecipeError(
            f"advise knows how to improve {', '.join(GOALS)}, not {wanted.best}."
            f"{suggest(wanted.best, GOALS)}"
        )
    recipe = Recipe(stages=(), target=chosen, goal=wanted)
    names = tuple(dict.fromkeys([wanted.best, *wanted.limits]))
    inputs = make_inputs(model, data)
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        check(model, recipe, data, names, Path(folder) / "out")
        model.net.eval()
        try_forward(model.net, inputs)
        brief = Brief(fit or _own_fit(model, data), min(TRIED_S, 60 * minutes))
        run = Run(
            recipe=recipe,
            inputs=inputs,
            data=data,
            original=model.net,
            names=names,
            batch=batch,
            seed=seed,
            fit=brief,
            work=Path(folder),
            teacher=None if teacher is None else teacher.net,
            display=display,
        )
        work = Trials(run=run, brief=brief, minutes=minutes, should_stop=should_stop)
        try:
            words = work.profiled()
            for step in display(work.phases, "trying steps", len(work.phases)):
                step()
        finally:
            work.close()
    found = work.suggestions()
    return Advice(
        subject=model.origin,
        target=chosen.text,
        goal=wanted,
        batch=batch,
        threads=chosen.threads,
        words=words,
        suggestions=found,
        refusals=tuple(work.refusals),
        recipe=replace(recipe, stages=tuple(each.stage for each in found)).plain(),
        gain=together([each.gain for each in found]),
        seconds=time.perf_counter() - began,
        warnings=(*warnings, *preflight(probe())),
        environment=environment(),
    )


def usual_goal(data: Data) -> Goal:
    """Return the goal where none is given."""
    batch = next(iter(data.test or ()), {})
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        return Goal(best="latency", limits={"accuracy": "-1pt"})
    return Goal(best="latency", limits={"fidelity": "99"})


def together(gains: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Multiply ranges; their halves in logarithms add up as those of independent errors do."""
    middles = sum((math.log(low) + math.log(high)) / 2 for low, high in gains)
    half = math.sqrt(sum(((math.log(high) - math.log(low)) / 2) ** 2 for low, high in gains))
    return math.exp(middles - half), math.exp(middles + half)


def _own_fit(model: Model, data: Data) -> Fit:
    threads = 1 if data.train is None else trainer.choose_threads(model.net, data.train)

    def fit(*args: Any, **settings: Any) -> nn.Module:
        return trainer.fit(*args, threads=threads, **settings)

    return fit
