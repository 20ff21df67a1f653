"""Plan: everything that can be checked before the first minute of work, and a forecast."""

import inspect
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor._recipe_checks import has_labels, step_mistakes
from tersor.core import plugins
from tersor.core.context import Batch, Data, Fit
from tersor.core.errors import (
    DataError,
    DependencyError,
    ModelError,
    RecipeError,
    TargetError,
    TersorError,
)
from tersor.core.hardware import usable_cores
from tersor.core.model import Inputs, Model, may_lower
from tersor.core.plugins import technique_of
from tersor.core.recipe import Recipe, check_target, impossible, stage_name
from tersor.core.report_words import human
from tersor.core.runtime import Target
from tersor.core.schema import changed
from tersor.core.scoring import tasks_of
from tersor.core.training import Training
from tersor.ops.losses import first_output, task_loss

_WARM_UP, _TIMED, _TIMED_S = 2, 20, 1.0
"""Calls and seconds that the network is timed for, before a forecast."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, and about how long it takes here."""

    stages: tuple[str, ...]
    """Names, in order."""
    metrics: tuple[str, ...]
    """Measured after every stage and at the end."""
    seconds: tuple[float, float]
    """Predicted wall time: a range."""
    memory_bytes: int
    """Predicted peak."""
    disk_bytes: int
    """Predicted size of work folder and artifact."""
    notes: tuple[str, ...]
    """What a reader should know before starting."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        rows = [(number, name) for number, name in enumerate(self.stages, 1)]
        took = f"{self.seconds[0]:.0f} to {self.seconds[1]:.0f} s"
        size = f"{self.memory_bytes / 1e9:.2f} GB of memory, {self.disk_bytes / 1e9:.2f} GB of disk"
        return shown(f"about {took}, {size}", ("", "stage"), rows, self.notes)


def make_inputs(model: Model, data: Data) -> Inputs:
    """Return how to call the network: as the source says, else from the first batch.

    Raises:
        DataError: no batches, or a batch's names are not parameters of forward.
    """
    batch = _first_batch(data)
    if batch is None:
        if model.inputs is not None:
            return model.inputs
        raise DataError("the data have no batches; give at least calibration or test")
    example = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if model.form == "module":
        _check_names(model.net, example)
    elif model.inputs is not None:
        strange = set(example) ^ set(model.inputs.example)
        if strange:
            raise DataError(
                f"the network takes {', '.join(model.inputs.example)}; "
                f"batches hold {', '.join(example)}"
            )
        return model.inputs
    sizes = {len(tensor) for tensor in example.values() if tensor.dim()}
    count = min(sizes, default=1)
    if count == 1:
        return Inputs(example=example)
    # two samples: a batch of one would be frozen by the exporters
    two = {n: t[:2].clone() if t.dim() and len(t) == count else t for n, t in example.items()}
    free = {} if model.inputs is None else model.inputs.dynamic  # what the source knows besides
    dynamic = {
        n: {**free.get(n, {}), 0: "batch"}
        for n, t in example.items()
        if t.dim() and len(t) == count
    }
    return Inputs(example=two, dynamic=dynamic)


def check(model: Model, recipe: Recipe, data: Data, metrics: Sequence[str], out: Path) -> None:
    """Check recipe, data, packages, device and output folder against each other.

    Raises:
        RecipeError, DataError, DependencyError, ...: every mistake found, in one message.
    """
    mistakes: list[TersorError] = []
    try:
        check_target(recipe.target)
        runtime = plugins.runtime(recipe.target.runtime)
        _check_system(recipe.target.runtime, runtime.system)
        plugins.require("runtimes", recipe.target.runtime, (*runtime.to_export, *runtime.to_run))
        _check_device(recipe.target)
        if not may_lower(model.form, runtime.takes):
            mistakes.append(
                RecipeError(
                    f"{recipe.target.runtime} takes a network of form {runtime.takes!r}; this one "
                    f"is of form {model.form!r}, and forms only go module -> exported -> onnx"
                )
            )
    except TersorError as error:
        mistakes.append(error)
    mistakes += step_mistakes(model, recipe, data)
    if recipe.goal is not None:
        mistakes += [RecipeError(text) for _, text in impossible(recipe.goal)]
    for name in metrics:
        try:
            needs = plugins.metric(name).needs
            if "labels" in needs and not has_labels(data.test):
                mistakes.append(
                    DataError(f"the metric {name!r} needs labels, and the test batches have none")
                )
        except TersorError as error:
            mistakes.append(error)
    if not _writable(out):
        mistakes.append(DataError(f"the output folder {out} cannot be written"))
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        narrowest = {type(m) for m in mistakes}
        kind = narrowest.pop() if len(narrowest) == 1 else RecipeError
        if all(isinstance(m, DependencyError) for m in mistakes):
            kind = DependencyError
        raise kind("\n".join(str(m) for m in mistakes))


def check_metrics(model: Model, data: Data, names: Sequence[str]) -> None:
    """Refuse metrics that mean nothing for the labels, after one forward pass.

    Networks in other forms than a module are not run here, and their metrics not looked at.

    Raises:
        DataError: names them, and those that fit.
    """
    batch = next(iter(data.test or ()), None)
    known = {name: plugins.metric(name).tasks for name in names}
    if model.form != "module" or batch is None or "labels" not in batch or not any(known.values()):
        return
    count = len(batch["labels"])
    two = {n: t[:2] if t.dim() and len(t) == count else t for n, t in batch.items()}
    labels = two.pop("labels").cpu().numpy()
    with torch.no_grad():
        made = model.net(**two)
    outputs = first_output(made).float().cpu().numpy()
    tasks = tasks_of(outputs, labels, [tensor.cpu().numpy() for tensor in two.values()])
    wrong = [name for name, of in known.items() if of and not tasks.intersection(of)]
    if not tasks or not wrong:
        return
    fitting = [n for n in plugins.names("metrics") if tasks.intersection(plugins.metric(n).tasks)]
    raise DataError(
        f"the metric {', '.join(map(repr, wrong))} means nothing for these data: the network "
        f"answers {outputs.shape} for {len(labels)} samples, with labels {labels.shape} of type "
        f"{labels.dtype}, which are {' or '.join(sorted(tasks))}. Metrics that fit: "
        f"{', '.join(fitting)}"
    )


def check_training(recipe: Recipe, data: Data, fit: Fit | None) -> None:
    """Refuse settings of training that nothing would read.

    Raises:
        RecipeError: there is a trainer of the user's own, which does not know them.
        DataError: labels are to be smoothed, but the data bring their own loss.
    """
    task_loss(data, recipe.training.label_smoothing)
    own = replace(recipe.training, label_smoothing=0.0)
    if fit is not None and own != Training():
        raise RecipeError(
            f"training: {', '.join(changed(own))}: these are settings of tersor's trainer, but fit "
            "gives another one; set them there, and leave them out of the recipe"
        )


def check_teacher(teacher: Model, model: Model, recipe: Recipe, inputs: Inputs) -> None:
    """Make sure that the network can learn from the teacher, and that a step does.

    Raises:
        RecipeError: no step learns from a teacher.
        ModelError: the teacher is not a module, fails, or answers in another shape.
        DataError: it takes other inputs.
    """
    learns = [c for stage in recipe.stages for c in stage if "teacher" in technique_of(c).needs]
    if not learns:
        raise RecipeError(
            "a teacher was given, but no step of the recipe learns from one; add a step of "
            "distillation, such as distill_logits"
        )
    if teacher.form != "module":
        raise ModelError(
            f"the teacher is of form {teacher.form!r}; steps that train need it as a module"
        )
    teacher.net.eval()
    _check_names(teacher.net, inputs.example)
    try_forward(teacher.net, inputs)
    if model.form != "module":
        return  # the step that cannot work on this form was refused before
    with torch.no_grad():
        answer, wanted = (first_output(n(**inputs.example)) for n in (model.net, teacher.net))
    if answer.shape != wanted.shape:
        raise ModelError(
            f"the teacher {type(teacher.net).__name__} answers in shape {tuple(wanted.shape)}, the "
            f"network in {tuple(answer.shape)}; a student has the same outputs as its teacher"
        )


def forecast(
    model: Model, recipe: Recipe, data: Data, inputs: Inputs, metrics: Sequence[str], out: Path
) -> Plan:
    """Predict time, memory and disk from a timed network on this machine.

    Training is taken as three forward passes a sample and, for distillation, one more of the
    teacher; measuring as one pass over validation per stage and two over test.
    """
    per_sample = _seconds_a_sample(model, inputs, recipe.target.threads)
    counts = {s: _count(getattr(data, s)) for s in ("calibration", "train", "validation", "test")}
    seconds = (counts["validation"] + 2 * counts["test"]) * per_sample + 20.0
    for stage in recipe.stages:
        seconds += 15.0 + counts["validation"] * per_sample
        for config in stage:
            epochs = float(getattr(config, "epochs", 0.0))
            needs = plugins.technique_of(config).needs
            passes = 4.0 if "teacher" in needs else 3.0
            seconds += epochs * counts["train"] * per_sample * passes
            if "calibration" in needs:
                seconds += 2 * counts["calibration"] * per_sample
    size = _bytes_of(model)
    notes = [f"predicted from {human(per_sample * 1e3, 'ms')} a sample in this process"]
    if recipe.goal is None:
        notes.append("no goal: every stage is applied as written")
    free = shutil.disk_usage(_existing(out)).free
    disk = size * (3 + 2 * len(recipe.stages))
    if disk > free:
        notes.append(f"only {free / 1e6:.0f} MB are free where {out} will be")
    return Plan(
        stages=tuple(stage_name(stage) for stage in recipe.stages),
        metrics=tuple(metrics),
        seconds=(0.5 * seconds, 2.0 * seconds),
        memory_bytes=int(6 * size + 1e9),
        disk_bytes=disk,
        notes=tuple(notes),
    )


def _check_system(name: str, system: str) -> None:
    """Refuse a runtime whose files cannot run here: every step is measured.

    Raises:
        TargetError: says where they do.
    """
    if system and system != sys.platform:
        there, machine = {"darwin": ("macOS", "a Mac")}.get(system, (system, system))
        raise TargetError(
            f"{name} runs on {there} only, and compress keeps no step that it did not measure on "
            f"its target: give the same command on {machine}. Or compress here for another target, "
            f"and run the result there: tersor measure MODEL --weights OUT --data DATA --runtime "
            f"{name}"
        )


def _check_device(target: Target) -> None:
    """Refuse a device that is not on this machine.

    What a runtime with an environment of its own finds there shows when it is used.

    Raises:
        DependencyError: it is not there.
    """
    runtime = plugins.own_runtime(target.runtime)
    if runtime.present is not None and all(map(plugins.installed, runtime.to_run)):
        runtime.present(target)


def _first_batch(data: Data) -> Batch | None:
    for batches in (data.calibration, data.train, data.validation, data.test):
        if batches is not None:
            for batch in batches:
                return batch
    return None


def _check_names(net: nn.Module, example: Mapping[str, Tensor]) -> None:
    parameters = inspect.signature(net.forward).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    strange = [name for name in example if name not in parameters]
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in example
    ]
    if (strange and not free) or needed:
        raise DataError(
            f"forward takes {', '.join(parameters)}; "
            f"the batches hold {', '.join(example) or 'nothing'}"
            + (f"; missing: {', '.join(needed)}" if needed else "")
        )


def try_forward(net: nn.Module, inputs: Inputs) -> None:
    """Call the network once.

    Raises:
        ModelError: forward fails, or its output is not finite.
    """
    try:
        with torch.no_grad():
            made = net(**inputs.example)
    except Exception as error:
        frame = inspect.trace()[-1]
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.example.items())
        raise ModelError(
            f"forward of {type(net).__name__} fails on the first batch ({shapes}): "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''} "
            f"({Path(frame.filename).name}:{frame.lineno})"
        ) from error
    tensors = (
        [made]
        if isinstance(made, Tensor)
        else list(made.values() if isinstance(made, Mapping) else made)
    )
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise ModelError(
            f"forward of {type(net).__name__} must return a tensor, or tensors; "
            f"got {type(made).__name__}"
        )


def _count(batches: Iterable[Batch] | None) -> int:
    """Count samples; of a long split with a length, from its first batch."""
    if batches is None:
        return 0
    first = next(iter(batches), None)
    if first is None:
        return 0
    size = len(next(iter(first.values())))
    try:
        return size * len(batches)  # type: ignore[arg-type]  # tried
    except TypeError:
        return sum(len(next(iter(batch.values()))) for batch in batches)


def _seconds_a_sample(model: Model, inputs: Inputs, threads: int) -> float:
    """Time the network after warming up: the best of a few calls, which others disturb least."""
    if model.form != "module":
        return 0.005
    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cores())
    clock = time.perf_counter
    best, spent = math.inf, 0.0
    try:
        with torch.no_grad():
            for _ in range(_WARM_UP + _TIMED):
                began = clock()
                model.net(**inputs.example)
                took = clock() - began
                best, spent = min(best, took), spent + took
                if spent > _TIMED_S:
                    break
    finally:
        torch.set_num_threads(before)
    count = len(next(iter(inputs.example.values())))
    # larger batches are about twice as fast a sample
    return best / count / 2


def _bytes_of(model: Model) -> int:
    if model.form == "onnx":
        return int(model.net.ByteSize())
    tensors = (
        model.net.state_dict()
        if callable(getattr(model.net, "state_dict", None))
        else model.net.state_dict
    )
    return sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _writable(out: Path) -> bool:
    parent = _existing(out)
    return os.access(parent, os.W_OK) and (parent.is_dir() or out.is_dir())
