"""Which channels go, and the cut: what all techniques that make tensors smaller share."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tersor.core.context import Context
from tersor.core.errors import DataError, StepError, UnfitError, suggest
from tersor.core.layers import Layers
from tersor.ops import importance as scores_of
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.cutting import cut
from tersor.ops.groups import Coupling, Group, Removal, couple, removed_places
from tersor.ops.notes import carry_notes

Importance = Literal["l1", "l2", "taylor", "fisher", "bn_scale", "fpgm", "activation", "random"]
Ranking = Literal["local", "global", "global_normalized", "per_cost", "sensitivity"]

_TOLERANCE = 1e-3
"""Sums of fewer terms round differently; a wrong cut is off by the outputs' own size."""


def coupled(net: nn.Module, context: Context, *, heads: bool = False) -> Coupling:
    """Capture a network and find its groups; attention modules are split into their projections."""
    net.eval()
    captured = capture(net, context.inputs)
    split_attention(captured, context.inputs)
    return couple(captured, net, heads=heads)


def free(coupling: Coupling, net: nn.Module, layers: Layers) -> list[Group]:
    """Return the groups that may be cut, those with all makers among the chosen layers.

    Raises:
        UnfitError: everything is protected; says by what.
        StepError: `layers` names no layer, or leaves nothing.
    """
    producers = [name for g in coupling.groups for name in g.makers]
    unused = layers.unused(producers)
    if unused:
        raise StepError(
            f"layers: {unused[0]!r} matches no layer with output channels."
            f"{suggest(unused[0].lstrip('!'), producers)}"
        )
    open_groups = [g for g in coupling.groups if not g.protected and g.size > 1]
    if not open_groups:
        reasons = {g.protected: g.name for g in coupling.groups if g.protected}
        told = "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
        raise UnfitError(
            f"no channels of {type(net).__name__} can be cut, all are protected "
            f"({told or 'no layers'}). "
            "Exclude this step, or write forward with operators that follow the channels' number"
        )
    chosen = [g for g in open_groups if all(layers.holds(n) for n in g.makers)]
    if not chosen:
        raise StepError(
            "layers excludes every group that could be cut; a group is cut only when all layers "
            "that make its channels are chosen. Groups: "
            f"{'; '.join(', '.join(g.makers) for g in open_groups)}"
        )
    return chosen


def score(
    coupling: Coupling,
    groups: Sequence[Group],
    importance: Importance,
    context: Context,
) -> list[Tensor]:
    """Score each channel of each group; larger matters more.

    Raises:
        DataError: calibration data, or labels, that the importance needs are missing.
        StepError: a loss or gradient is not finite.
        UnfitError: bn_scale on a group without batch norm.
    """
    net = coupling.captured
    batches = context.data.calibration
    if importance in ("taylor", "fisher", "activation") and batches is None:
        labels = "" if importance == "activation" else " with labels"
        raise DataError(f"importance {importance} needs calibration data{labels}")
    if importance in ("taylor", "fisher"):
        assert batches is not None
        fisher = importance == "fisher"
        return scores_of.taylor(net, groups, context.loss, batches, fisher=fisher)
    if importance == "activation":
        assert batches is not None
        return scores_of.activation(coupling, groups, batches)
    generator = torch.Generator().manual_seed(context.seed)
    each: dict[str, Callable[[Group], Tensor]] = {
        "l1": lambda g: scores_of.magnitude(net, g, 1),
        "l2": lambda g: scores_of.magnitude(net, g, 2),
        "fpgm": lambda g: scores_of.median_distance(net, g),
        "bn_scale": lambda g: _norm_scale(net, g),
        "random": lambda g: torch.rand(g.size, generator=generator),
    }
    rule = each[importance]
    return [rule(g) for g in context.track(groups, "scoring groups", len(groups))]


def _norm_scale(net: nn.Module, group: Group) -> Tensor:
    found = scores_of.norm_scale(net, group)
    if found is None:
        raise UnfitError(
            f"importance bn_scale: no batch norm scales the channels of {group.name!r}; exclude it "
            f'with layers: ["!{group.name}"], or use importance: l2'
        )
    return found


def at_ratio(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    ratio: float,
    *,
    ranking: Ranking,
    multiple: int,
    costs: Sequence[float] = (),
) -> Removal:
    """Remove a share of the channels, the least important first; every group keeps some.

    Args:
        groups: Those that may be cut.
        scores: Of each group's channels.
        ratio: Share of all channels, in [0, 1].
        ranking: Local, or over all groups together.
        multiple: What a layer keeps is rounded up to this.
        costs: For per_cost: what one channel of each group costs.
    """
    if ranking == "local":
        wanted = [int(ratio * g.size + 1e-9) for g in groups]
    else:
        if ranking == "global":
            flat = torch.cat(list(scores))
        else:
            prices = costs if ranking == "per_cost" else [1.0] * len(scores)
            parts = [s / s.mean().clamp_min(1e-30) for s in scores]
            flat = torch.cat([s / price for s, price in zip(parts, prices, strict=True)])
        gone = torch.zeros(len(flat), dtype=torch.bool)
        gone[flat.argsort(stable=True)[: int(ratio * len(flat) + 1e-9)]] = True
        wanted = [int(part.sum()) for part in torch.split(gone, [g.size for g in groups])]
    return [
        (group, least(group, score, number, multiple))
        for group, score, number in zip(groups, scores, wanted, strict=True)
    ]


def least(group: Group, score: Tensor, number: int, multiple: int) -> list[int]:
    """Return the least important channels; what a layer keeps is rounded up to a multiple."""
    unit = multiple // math.gcd(multiple, group.width)
    kept = max(group.size - number, 1)
    kept = min(-(-kept // unit) * unit, group.size)
    order = score.argsort(stable=True)[: group.size - kept]
    return sorted(order.tolist())


def check_something(removal: Removal, multiple: int) -> None:
    """Refuse a cut that cuts nothing.

    Raises:
        UnfitError: says why.
    """
    if any(gone for _, gone in removal):
        return
    sizes = sorted({g.size for g, _ in removal})
    raise UnfitError(
        f"nothing would be removed: groups have {', '.join(map(str, sizes))} channels, and what "
        f"stays is rounded up to a multiple of {multiple}; use a smaller multiple or a higher ratio"
    )


def until(
    share: Callable[[Removal], float], at: Callable[[float], Removal], target: float
) -> Removal:
    """Find the mildest cut whose share (of parameters, multiply-accumulates) is at most a target.

    Args:
        share: What is left after a cut, as a share of what was; never rises with the ratio.
        at: The cut at a ratio of channels.
        target: Reachable.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if share(at(middle)) <= target else (middle, high)
    # between the two ratios many groups lose a channel at once: take as few of them as it needs
    removal = list(at(low))
    for index, harder in enumerate(at(high)):
        if share(removal) <= target:
            break
        removal[index] = harder
    return removal


def parameters(net: nn.Module, removal: Removal) -> int:
    """Count the parameters that are left after a cut, without making it."""
    made = copy.deepcopy(net).to("meta")
    cut(made, removed_places(removal))
    return sum(p.numel() for p in made.parameters())


def smaller(
    net: nn.Module, coupling: Coupling, removal: Removal, context: Context
) -> tuple[nn.Module, Removal, dict[str, str]]:
    """Cut, and make sure that the smaller network computes what was meant.

    What is meant is the uncut network in which nothing reads the channels that go. Where forward
    adapts by itself the result is of the user's own class; else it is the captured graph, with the
    numbers in it rewritten. Groups with which neither agrees are left uncut.

    Returns:
        The network, the cut that was made, and the groups left out with the reason.

    Raises:
        UnfitError: no group can be cut so that the outputs agree. `net` is unchanged.
    """
    removal = [(g, gone) for g, gone in removal if gone]
    if not removal:
        return net, [], {}
    wanted = _run(coupling.masked(removal), context)
    made, reason = _attempt(net, coupling, removal, wanted, context)
    left: dict[str, str] = {}
    if made is None:
        kept = []
        for group, gone in removal:
            alone = [(group, gone)]
            result, why = _attempt(
                net, coupling, alone, _run(coupling.masked(alone), context), context
            )
            if result is None:
                left[group.name] = why
            else:
                kept.append((group, gone))
        removal = kept
        if removal:
            wanted = _run(coupling.masked(removal), context)
            made, reason = _attempt(net, coupling, removal, wanted, context)
    if made is None:
        raise UnfitError(f"{reason}. Exclude that layer with layers")
    return made, removal, left


def _run(net: nn.Module, context: Context) -> list[Tensor]:
    """Return all outputs on the example."""
    with torch.no_grad():
        made = tree_leaves(net(**context.inputs.example))
    return [tensor for tensor in made if isinstance(tensor, Tensor)]


def _attempt(
    net: nn.Module, coupling: Coupling, removal: Removal, wanted: Sequence[Tensor], context: Context
) -> tuple[nn.Module | None, str]:
    """Return the smaller network, of the own class where that is right, or why there is none."""
    reason = ""
    for make in _ways(net, coupling, removal):
        try:
            made = make()
            found = _run(made, context)
        except Exception as error:  # any: this is the user's own forward
            reason = (
                f"the network does not run with fewer channels ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}); its forward relies on a layer's size"
            )
            continue
        difference = max((_difference(a, b) for a, b in zip(wanted, found, strict=True)), default=0)
        if difference <= _TOLERANCE:
            return made, ""
        reason = (
            f"the cut network's outputs differ by {difference:.2g} of their size from what was "
            "meant; its forward computes with a layer's size"
        )
    return None, reason


def _difference(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    wanted = wanted.float()
    scale = wanted.abs().max().clamp_min(1e-6)
    return float((found.float() - wanted).abs().max() / scale)


def _ways(
    net: nn.Module, coupling: Coupling, removal: Removal
) -> Iterator[Callable[[], nn.Module]]:
    gone = removed_places(removal)
    names = {name for name, _ in net.named_modules()}

    def own() -> nn.Module:
        made = copy.deepcopy(net)
        cut(made, gone)
        return made

    def graph() -> nn.Module:
        made = coupling.cut(removal)
        carry_notes(net, made)
        return made

    inside = all(side.startswith("dim") or name in names for name, side in gone)
    # `groups` of a class of the user's own would not be stored with it
    inside &= all(
        side != "depthwise" or type(net.get_submodule(name)).__module__.startswith("torch.nn.")
        for name, side in gone
        if name in names
    )
    if inside and not isinstance(net, fx.GraphModule):
        yield own
    yield graph


def told(
    coupling: Coupling, removal: Removal, left: dict[str, str], made: nn.Module
) -> dict[str, Any]:
    """Return the facts of a cut, for the report."""
    return {
        "protected": [str(g) for g in coupling.groups if g.protected],
        "left_out": left,
        "macs_before": coupling.macs(),
        "macs_after": coupling.macs(removal),
        "form": "graph" if isinstance(made, fx.GraphModule) else "own class",
    }
