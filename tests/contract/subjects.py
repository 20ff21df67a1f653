"""What the contract tests look at: every technique, applied to the smallest network it works on."""

import copy
import dataclasses
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core import plugins
from tersor.core.context import Context, Data
from tersor.core.errors import DataError, DependencyError, TargetError, UnfitError
from tersor.core.runtime import Target
from tersor.core.technique import Technique
from tersor.ops.fake_quantize import settle
from tersor.ops.lower import lower
from tests import networks

TECHNIQUES = list(plugins.names("techniques"))
TARGETS = ("onnxruntime", "openvino", "torch_eager")
FACTORIES = {
    "cnn": networks.tiny_cnn,
    "transformer": networks.tiny_transformer,
    "sparse": networks.sparse_cnn,
    "written": networks.written_transformer,
    "deep": networks.deep_perceptron,
}


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A technique's result, and what it was made from."""

    technique: Technique
    config: Any
    original: nn.Module
    """The caller's network; the technique was given a copy."""
    before: dict[str, torch.Tensor]
    """Its tensors as they were."""
    result: Any
    kind: str
    """Which of the small networks."""
    after: str | None
    """The technique before it in the same stage."""
    refused: tuple[str, ...]
    """Runtimes for which it said that they cannot execute its result."""


def quick(technique: Technique) -> Any:
    """Return the default settings, with less training; not decided by a stopwatch."""
    config = technique.config()
    if any(field.name == "convert" for field in dataclasses.fields(config)):
        config = dataclasses.replace(config, convert="all")
    if any(field.name == "epochs" for field in dataclasses.fields(config)):
        config = dataclasses.replace(config, epochs=0.2)
    if any(field.name == "steps" for field in dataclasses.fields(config)):
        config = dataclasses.replace(config, steps=20)
    return config


def honest_context(
    technique: Technique, net: nn.Module, folder: Path, *, runtime: str, labels: bool
) -> Context:
    """Return a context that holds what the technique says that it needs, and nothing else."""
    needs = (*technique.needs, *(("labels",) if labels else ()))
    whole = networks.data()

    def split(name: str) -> Any:
        if name not in needs:
            return None
        batches = list(getattr(whole, name))
        return batches if "labels" in needs else [{"x": batch["x"]} for batch in batches]

    data = Data(**{name: split(name) for name in ("calibration", "train", "validation")})
    return networks.context(
        net,
        folder,
        data=data,
        target=Target(runtime=runtime, options={"threads": 1}),
        reference=copy.deepcopy(net) if {"reference", "teacher"} & set(needs) else None,
        latency=weight_cost,
    )


def weight_cost(nets: Sequence[nn.Module]) -> list[float]:
    """Cost networks by their weights instead of a stopwatch, so that results repeat to the bit."""
    return [sum(parameter.numel() for parameter in net.parameters()) / 1000 for net in nets]


def apply(name: str, kind: str, config: Any = None, after: str | None = None) -> Applied:
    """Apply a technique to a copy of one of the small networks, for a target that has it.

    `after` names a technique that comes before it in the same stage.
    """
    technique = plugins.technique(name)
    config = config or quick(technique)
    original = FACTORIES[kind]()
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    refused = []
    with tempfile.TemporaryDirectory() as folder:
        for runtime in TARGETS:
            try:
                result = _apply(technique, config, original, Path(folder), runtime, after)
            except TargetError:
                if runtime == TARGETS[-1]:
                    raise
                refused.append(runtime)
                continue
            break
    return Applied(
        technique=technique,
        config=config,
        original=original,
        before=before,
        result=result,
        kind=kind,
        after=after,
        refused=tuple(refused),
    )


def _apply(
    technique: Technique,
    config: Any,
    original: nn.Module,
    folder: Path,
    runtime: str,
    after: str | None,
) -> Any:
    for labels in (False, True):
        given: Any = copy.deepcopy(original)
        if after is not None:
            first = plugins.technique(after)
            given = _apply(first, quick(first), original, folder, runtime, None)
        given = lower(given, technique.form, networks.inputs())
        context = honest_context(technique, original, folder, runtime=runtime, labels=labels)
        try:
            return settle(technique.apply(given, config, context))
        except DataError as error:
            # labels that only a setting asks for: the message must name the setting
            if labels or not re.search(r"no labels; .* or set \w+: ", str(error)):
                raise
    raise AssertionError


@cache
def applied(name: str) -> Applied:
    """Apply a technique where it has something to do: one of the networks, or the rounded CNN."""
    for kind in FACTORIES:
        try:
            return apply(name, kind)
        except UnfitError:
            continue
        except DependencyError as error:
            pytest.skip(str(error))
    return apply(name, "cnn", after="static")


def outputs(net: Any, batch: int = 4) -> torch.Tensor:
    """Call a network in memory on real images."""
    call = net.module() if hasattr(net, "module") and not isinstance(net, nn.Module) else net
    with torch.no_grad():
        made = call(x=networks.digits()[0][:batch])
    assert isinstance(made, torch.Tensor)
    return made
