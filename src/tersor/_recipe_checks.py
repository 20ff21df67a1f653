"""What is wrong with the steps of a recipe for a network, data and a target, without any work."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from tersor.core import plugins
from tersor.core.context import Batch, Data
from tersor.core.errors import DataError, RecipeError, TargetError, TersorError
from tersor.core.layers import Layers
from tersor.core.model import Model, may_lower
from tersor.core.recipe import Recipe
from tersor.core.technique import Technique
from tersor.ops.modules import check_patterns


def step_mistakes(model: Model, recipe: Recipe, data: Data) -> list[TersorError]:
    """List the mistakes of all steps, with their place in the recipe's file where there is one.

    Names of layers are those of the network, until a step gives them others.
    """
    mistakes: list[TersorError] = []
    form = model.form
    names = _names(model.net) if form == "module" else []
    number = 0
    for i, stage in enumerate(recipe.stages):
        for j, config in enumerate(stage):
            number += 1
            try:
                step = plugins.technique_of(config)
            except TersorError as error:
                mistakes.append(error)
                continue
            if not may_lower(form, step.form):
                mistakes.append(
                    RecipeError(
                        f"step {number} ({step.name}) works on a network of form {step.form!r}, "
                        f"but there it has form {form!r}; forms only go module -> exported -> onnx"
                    )
                )
            else:
                form = step.form
            mistakes += _lacking(number, step, data)
            told = [*_off_target(config, recipe), *_misspelt(config, names)]
            mistakes += [RecipeError(recipe.at(i, j, text, *inside)) for text, *inside in told]
            names = [] if step.renames else names
    return mistakes


def has_labels(batches: Iterable[Batch] | None) -> bool:
    """Tell whether batches hold labels, from the first one."""
    if batches is None:
        return False
    for batch in batches:
        return "labels" in batch
    return False


def _lacking(number: int, step: Technique, data: Data) -> Iterator[DataError]:
    """Say which batches a step needs that are not there."""
    for need in step.needs:
        if need in ("calibration", "train", "validation") and getattr(data, need) is None:
            yield DataError(f"step {number} ({step.name}) needs {need} batches; the data have none")
        if need == "labels" and not has_labels(data.train or data.calibration):
            yield DataError(f"step {number} ({step.name}) needs labels, and the batches have none")


def _off_target(config: Any, recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Say why a step cannot work for the target."""
    if not hasattr(config, "check_target") or recipe.target.runtime not in plugins.names(
        "runtimes"
    ):
        return  # a target that does not exist is told apart
    try:
        config.check_target(recipe.target)
    except TargetError as error:
        yield (str(error),)


def _misspelt(config: Any, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Say which patterns match nothing in the network, and in which setting they are."""
    for field in dataclasses.fields(config):
        layers = getattr(config, field.name)
        if not names or not isinstance(layers, Layers):
            continue
        try:
            check_patterns(layers, list(names))
        except RecipeError as error:
            yield str(error).removeprefix("layers: "), field.name


def _names(net: nn.Module) -> list[str]:
    """List what a pattern may name: modules, parameters, and the parts of attention."""
    modules = dict(net.named_modules(remove_duplicate=False))
    inner = [
        f"{name}.in_projection{part}".lstrip(".")
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        for part in ("", "_q", "_k", "_v")
    ]
    parameters = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    return [*filter(None, modules), *inner, *parameters]
