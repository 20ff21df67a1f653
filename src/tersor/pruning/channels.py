"""Channels: structured pruning that makes tensors smaller; coupled layers are cut together."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, StepError, UnfitError, suggest
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.capture import capture
from tersor.ops.groups import Group, Removal, count_macs, cut, find_groups, mask, removed_places
from tersor.ops.importance import magnitude, taylor
from tersor.ops.losses import first_output
from tersor.ops.recalibrate import recalibrate

_DEFAULT_RATIO = 0.5
_TOLERANCE = 1e-3
"""Sums of fewer terms round differently; a wrong cut is off by the outputs' own size."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Settings of channel pruning: `ratio` or `macs`; `ratio: 0.5` when neither is given."""

    ratio: float | None = None
    """Share of the channels to remove, in [0, 1)."""
    macs: float | None = None
    """Remove as few as leave at most this share of the multiply-accumulates, in (0, 1]."""
    importance: Literal["l1", "l2", "taylor"] = "l2"
    """Which channels go: small weights, or (taylor, needs labels) a small effect on the loss."""
    ranking: Literal["local", "global"] = "local"
    """local: the same share of each group; global: the least important of all groups together."""
    multiple: int = 8
    """What stays of a group is rounded up to a multiple of this: processors work on several."""
    layers: Layers = Layers()
    """Layers whose output channels may go."""

    def __post_init__(self) -> None:
        if self.ratio is not None and self.macs is not None:
            raise ValueError("give ratio or macs, not both")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")
        if self.macs is not None and not 0 < self.macs <= 1:
            raise ValueError(f"macs must be in (0, 1], got {self.macs}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")

    def weaker(self) -> "Channels | None":
        """Return settings that remove about 30 % less; None when hardly anything would go."""
        if self.macs is not None:
            macs = round(1 - 0.7 * (1 - self.macs), 3)
            return replace(self, macs=macs) if macs < 0.95 else None
        ratio = round(0.7 * (_DEFAULT_RATIO if self.ratio is None else self.ratio), 3)
        return replace(self, ratio=ratio) if ratio > 0.05 else None


@technique(paper="arXiv:2301.12900")
def channels(net: nn.Module, config: Channels, context: Context) -> nn.Module:
    """Cut the least important channels out of every layer they run through.

    Channels that reach an operator which needs their number, or mixes them, stay: their groups are
    protected, and the report says by what. The result is of the user's own class, with smaller
    layers; on the example it is compared with the uncut network in which nothing reads the cut
    channels. Where there is calibration data, batch norm statistics are estimated anew.

    Raises:
        DataError: taylor without calibration data or labels.
        UnfitError: everything is protected, or the target cannot be reached.
        StepError: `layers` fits nothing. In both cases the network is unchanged.

    Source:
        Grouping: Fang et al., arXiv:2301.12900. Importance: Li et al., arXiv:1608.08710; Molchanov
        et al., arXiv:1906.10771.
    """
    net.eval()
    captured = capture(net, context.inputs)
    groups = find_groups(captured, net)
    free = _free(groups, net, config)
    scores = _scores(net, free, config, context)
    count = count_macs(captured)
    removal = _choose(free, scores, config, count)
    _check_not_nothing(free, removal, config)
    before = count({})
    _cut_and_compare(net, removal, context)
    if any(gone for _, gone in removal) and context.data.calibration is not None:
        context.record(recalibrated=recalibrate(net, context.data.calibration))
    context.record(
        groups={g.name: f"{g.size} -> {g.size - len(gone)}" for g, gone in removal},
        protected=[str(g) for g in groups if g.protected],
        macs_before=before,
        macs_after=count(removed_places(removal)),
    )
    return net


def _free(groups: Sequence[Group], net: nn.Module, config: Channels) -> list[Group]:
    """Return the groups that may be cut, those with a chosen layer."""
    producers = [name for g in groups for name in (*g.layers("out"), *g.layers("dim"))]
    unused = config.layers.unused(producers)
    if unused:
        raise StepError(
            f"layers: {unused[0]!r} matches no layer with output channels."
            f"{suggest(unused[0].lstrip('!'), producers)}"
        )
    open_groups = [g for g in groups if not g.protected and g.size > 1]
    if not open_groups:
        reasons = {g.protected: g.name for g in groups if g.protected}
        told = "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
        raise UnfitError(
            f"no channels of {type(net).__name__} can be cut, all are protected "
            f"({told or 'no layers'}). "
            "Exclude this step, or write forward with operators that follow the channels' number"
        )
    chosen = [
        g
        for g in open_groups
        if all(config.layers.holds(n) for n in (*g.layers("out"), *g.layers("dim")))
    ]
    if not chosen:
        raise StepError(
            "layers excludes every group that could be cut; a group is cut only when all layers "
            "that make its channels are chosen. Groups: "
            f"{'; '.join(', '.join(g.layers('out')) for g in open_groups)}"
        )
    return chosen


def _scores(
    net: nn.Module, groups: Sequence[Group], config: Channels, context: Context
) -> list[Tensor]:
    if config.importance == "taylor":
        if context.data.calibration is None:
            raise DataError("channels: importance taylor needs calibration data with labels")
        return taylor(net, groups, context.loss, context.data.calibration)
    order: Literal[1, 2] = 1 if config.importance == "l1" else 2
    return [magnitude(net, g, order) for g in context.track(groups, "scoring groups", len(groups))]


def _choose(
    groups: Sequence[Group], scores: Sequence[Tensor], config: Channels, count: object
) -> Removal:
    """Turn the target into the channels that go."""
    if config.macs is None:
        ratio = _DEFAULT_RATIO if config.ratio is None else config.ratio
        return _at_ratio(groups, scores, config, ratio)
    assert callable(count)
    full = count({})
    smallest = _at_ratio(groups, scores, config, 1.0)
    reachable = count(removed_places(smallest)) / full
    if reachable > config.macs:
        raise UnfitError(
            f"macs: {config.macs} would empty layers: with {config.multiple} channels left in each "
            f"group {reachable:.3f} of the multiply-accumulates remain. Choose more than that, a "
            "smaller multiple, or take the rest by another step",
            too_strong=True,
        )
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        share = count(removed_places(_at_ratio(groups, scores, config, middle))) / full
        low, high = (low, middle) if share <= config.macs else (middle, high)
    # between the two ratios many groups lose a channel at once: take as few of them as it needs
    removal = list(_at_ratio(groups, scores, config, low))
    for index, harder in enumerate(_at_ratio(groups, scores, config, high)):
        if count(removed_places(removal)) <= config.macs * full:
            break
        removal[index] = harder
    return removal


def _at_ratio(
    groups: Sequence[Group], scores: Sequence[Tensor], config: Channels, ratio: float
) -> Removal:
    """Remove a share of the channels, the least important first; every group keeps some."""
    if config.ranking == "local":
        wanted = [int(ratio * g.size + 1e-9) for g in groups]
    else:
        # comparable between groups: a channel's share of its group, times the group's size
        flat = torch.cat([s * (len(s) / s.sum().clamp_min(1e-30)) for s in scores])
        gone = torch.zeros(len(flat), dtype=torch.bool)
        gone[flat.argsort(stable=True)[: int(ratio * len(flat) + 1e-9)]] = True
        parts = torch.split(gone, [g.size for g in groups])
        wanted = [int(part.sum()) for part in parts]
    removal = []
    for group, score, number in zip(groups, scores, wanted, strict=True):
        kept = max(group.size - number, 1)
        kept = min(-(-kept // config.multiple) * config.multiple, group.size)
        order = score.argsort(stable=True)[: group.size - kept]
        removal.append((group, sorted(order.tolist())))
    return removal


def _check_not_nothing(groups: Sequence[Group], removal: Removal, config: Channels) -> None:
    if any(gone for _, gone in removal) or config.ratio == 0 or config.macs == 1:
        return
    sizes = sorted({g.size for g in groups})
    raise UnfitError(
        f"nothing would be removed: groups have {', '.join(map(str, sizes))} channels, and what "
        f"stays is "
        f"rounded up to a multiple of {config.multiple}; use a smaller multiple or a higher ratio"
    )


def _cut_and_compare(net: nn.Module, removal: Removal, context: Context) -> None:
    """Cut, and make sure that the smaller network computes what was meant."""
    masked = copy.deepcopy(net)
    mask(masked, removal)
    with torch.no_grad():
        wanted = first_output(masked(**context.inputs.example))
        smaller = copy.deepcopy(net)
        cut(smaller, removal)
        try:
            found = first_output(smaller(**context.inputs.example))
        except Exception as error:  # any: this is the user's own forward
            raise UnfitError(
                f"the network does not run with fewer channels ({type(error).__name__}: {error}); "
                "its forward relies on a layer's size. Exclude that layer with layers"
            ) from error
    scale = wanted.abs().max().clamp_min(1e-6)
    difference = ((found - wanted).abs().max() / scale).item()
    if not difference <= _TOLERANCE:
        raise UnfitError(
            f"the cut network's outputs differ by {difference:.2g} of their size from what was "
            "meant; its forward computes with a layer's size. Exclude that layer with layers"
        )
    cut(net, removal)
