"""Sparse execution: layers with many zeros skip them, where that was measured to be faster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from tersor.core import plugins
from tersor.core.context import Context
from tersor.core.errors import ModelError, TargetError, UnfitError
from tersor.core.layers import Layers
from tersor.core.runtime import Target
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.modules import check_patterns
from tersor.ops.sparse import padding_of, sparse, why_dense
from tersor.ops.sparse_race import Races, Shape, decide

_TOLD = 4
"""Reasons in an error, and layers of each."""


@dataclass(frozen=True, kw_only=True)
class SparseExecution:
    """Settings of sparse execution."""

    convert: Literal["faster", "all"] = "faster"
    """faster: layers that win their race on this machine; all: every one, for another machine."""
    against: Literal["best", "target"] = "best"
    """What to beat: the fastest dense kernel of all runtimes here, or the target's own."""
    min_zeros: float = 0.5
    """Share of zeros below which a layer stays dense without a race, in (0, 1)."""
    layers: Layers = Layers()
    """Which linear layers and convolutions."""

    def __post_init__(self) -> None:
        if not 0 < self.min_zeros < 1:
            raise ValueError(f"min_zeros must be in (0, 1), got {self.min_zeros}")

    def check_target(self, target: Target) -> None:
        """Refuse a target without an operator for sparse weights.

        Raises:
            TargetError: those that have it are named.
        """
        if plugins.runtime(target.runtime).own_operators and target.device == "cpu":
            return
        able = [name for name in plugins.names("runtimes") if plugins.runtime(name).own_operators]
        raise TargetError(
            f"{target} has no operator for sparse weights: zeros would be multiplied like all "
            f"others; use one of the runtimes {', '.join(able)} on the cpu, or a step that makes "
            "layers smaller, such as channels"
        )


@dataclass(kw_only=True)
class _Plan:
    """What becomes of the layers."""

    chosen: list[str] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    """Layer -> why it stays dense."""


@technique(paper="arXiv:1911.09723")
def sparse_execution(net: nn.Module, config: SparseExecution, context: Context) -> nn.Module:
    """Replace layers whose weights are mostly zero by ones that compute with the others alone.

    A step before it made the zeros. Each shape of layer, at its share of zeros and the target's
    batch and threads, is timed sparse against dense, by this runtime and by the others that are
    installed; one that does not win stays as it is, and the facts say why. Races are kept for the
    machine. The sparse kernel runs on one thread, whatever the target's threads.

    Raises:
        TargetError: the target runs no operator of tersor's own; those that do are named.
        UnfitError: no layer has enough zeros, or none is faster sparse.

    Source:
        Elsen et al., arXiv:1911.09723: weights in compressed rows, positions or samples as the
        vectors' dimension. Instead of a kernel size by size, a convolution is one product over
        shifted images.
    """
    config.check_target(context.target)
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    calls = _calls(captured)
    layers = {name: layer for name, layer in captured.named_modules() if name in calls}
    check_patterns(config.layers, list(layers))
    plan = _plan(layers, calls, config, context)
    if not plan.chosen:
        told = _grouped(plan.dense) or "none is linear or a convolution"
        raise UnfitError(f"all layers stay dense ({told})")
    for name in plan.chosen:
        captured.set_submodule(name, sparse(layers[name]))
    context.record(layers=plan.facts, dense=plan.dense)
    return captured


def _grouped(reasons: Mapping[str, str]) -> str:
    """Tell each reason once, with the layers that it is for."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    told = [
        f"{', '.join(names[:_TOLD])}{' ...' if len(names) > _TOLD else ''}: {reason}"
        for reason, names in layers.items()
    ]
    return "; ".join(told[:_TOLD]) + (f"; {len(told) - _TOLD} more" if len(told) > _TOLD else "")


def _calls(captured: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the first call of each linear layer and convolution."""
    modules = dict(captured.named_modules())
    found: dict[str, fx.Node] = {}
    for node in captured.graph.nodes:
        if node.op == "call_module" and isinstance(
            modules[str(node.target)], (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        ):
            found.setdefault(str(node.target), node)
    return found


def _plan(
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, fx.Node],
    config: SparseExecution,
    context: Context,
) -> _Plan:
    plan, races = _Plan(), Races()
    for name in context.track(list(layers), "racing layers", len(layers)):
        layer, shape = layers[name], None
        reason = why_dense(layer)
        if reason is None and not config.layers.holds(name):
            reason = "excluded by layers"
        if reason is None:
            zeros = _zeros(name, layer)
            shape = _shape(layer, calls[name], context)
            if shape is None:
                reason = "an image without a batch"
            elif zeros < config.min_zeros:
                reason = f"{100 * zeros:.0f} % zeros, below min_zeros {100 * config.min_zeros:g} %"
        if reason is not None or shape is None:
            plan.dense[name] = reason or ""
            continue
        # races are kept for whole percents; rounded down, a race is never kinder than the layer
        percent = math.floor(100 * zeros + 0.01)
        if config.convert == "all":
            plan.chosen.append(name)
            plan.facts[name] = {"shape": str(shape), "zeros": percent, "reason": "convert: all"}
            continue
        (race,) = races.run(shape, [min(percent, 99)], context.target.threads)
        rivals = list(race.against) if config.against == "best" else ["torch"]
        wins, why = decide(race, rivals)
        plan.facts[name] = {
            "shape": str(shape),
            "zeros": percent,
            "executed": "sparse" if wins else "dense",
            "sparse_ms": race.sparse_ms,
            "by": race.executor,
            "against": race.against,
            "reason": why,
        }
        if wins:
            plan.chosen.append(name)
        else:
            plan.dense[name] = f"{shape}: {why}"
    return plan


def _zeros(name: str, layer: nn.Module) -> float:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if not bool(weight.isfinite().all()):
        raise ModelError(f"layer {name!r} has weights that are NaN or infinite")
    return float((weight == 0).double().mean())


def _shape(layer: nn.Module, call: fx.Node, context: Context) -> Shape | None:
    """Describe a layer as it is called on a batch of the target's size."""
    source = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(source, fx.Node)
    given = source.meta["shape"]
    first = next(iter(context.inputs.example.values())).shape[0]
    if isinstance(layer, nn.Linear):
        # a layer may be called on (positions, batch) or on all positions of all samples at once
        rows = torch.Size(given[:-1]).numel()
        positions = max(1, rows // max(1, first))
        return Shape(
            inputs=layer.in_features,
            outputs=layer.out_features,
            batch=context.batch,
            size=() if positions == 1 else (positions,),
        )
    assert isinstance(layer, nn.Conv2d)
    if len(given) != 4:
        return None
    return Shape(
        kind="conv2d",
        inputs=layer.in_channels,
        outputs=layer.out_channels,
        batch=max(1, context.batch * given[0] // max(1, first)),
        size=tuple(given[2:]),
        kernel=layer.kernel_size,
        stride=layer.stride,
        padding=padding_of(layer),
        dilation=layer.dilation,
    )
