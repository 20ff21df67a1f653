"""Channels: structured pruning that makes tensors smaller; coupled layers are cut together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.groups import Coupling, Group, Removal
from tersor.ops.recalibrate import recalibrate
from tersor.ops.selection import (
    Importance,
    Ranking,
    at_ratio,
    check_something,
    coupled,
    free,
    parameters,
    score,
    smaller,
    told,
    until,
)
from tersor.pruning._sensitivity import allocate, assigned, parse, scan

_DEFAULT_RATIO = 0.5
_TIMED = 8
"""Cuts that are exported and timed at most, to find one that reaches a latency."""
_NO_CUT = (("ratio", 0), ("macs", 1), ("parameters", 1))
"""Targets that ask for nothing."""
_TARGETS = ("ratio", "parameters", "macs", "latency")


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Settings of channel pruning: one target, `ratio: 0.5` when none is given."""

    ratio: float | None = None
    """Share of the channels to remove, in [0, 1)."""
    parameters: float | None = None
    """Remove as few as leave at most this share of the parameters, in (0, 1]."""
    macs: float | None = None
    """Remove as few as leave at most this share of the multiply-accumulates, in (0, 1]."""
    latency: float | None = None
    """Remove as few as leave at most this share of the measured latency, in (0, 1]."""
    importance: Importance = "l2"
    """Which channels go: small weights (l1, l2), a small effect on the loss (taylor, fisher: need
    labels), a small batch norm weight (bn_scale), filters that others can stand for (fpgm), small
    activations (activation), or any (random)."""
    ranking: Ranking = "local"
    """local: the same share of each group; global: the least important of all groups together;
    global_normalized: the same with each group's scores divided by their mean; per_cost: that,
    divided by the multiply-accumulates (or parameters) of a channel; sensitivity: each
    group's own share, by what cutting it alone does to the outputs on calibration data."""
    ratios: tuple[str, ...] = ()
    """Shares by pattern over groups, as `"layer1.*=0.25"`, the first that fits, in the place of a
    target; what sensitivity found is in its report in this form. Groups that fit none stay."""
    multiple: int = 8
    """What stays of a group is rounded up to a multiple of this: processors work on several."""
    rounds: int = 1
    """Reach the target in so many cuts, scoring anew before each."""
    recovery: float = 0.0
    """Passes over the training data after each cut but the last; needs labels."""
    layers: Layers = Layers()
    """Layers whose output channels may go."""

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give {' or '.join(given)}, not both")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")
        for name in _TARGETS[1:]:
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        for entry in self.ratios:
            parse(entry)
        if self.ratios and given:
            raise ValueError(f"give ratios or {given[0]}, not both")
        if self.ratios and self.rounds > 1:
            raise ValueError("ratios are reached in one cut; leave rounds at 1")
        if self.ranking == "sensitivity" and self.rounds > 1:
            raise ValueError("ranking sensitivity finds the shares of one cut; leave rounds at 1")
        if self.ratios and self.ranking != "local":
            raise ValueError(f"ratios say what goes from where; leave out ranking: {self.ranking}")
        if self.recovery and self.rounds == 1:
            raise ValueError(
                "recovery is the training between cuts; give rounds of 2 or more, or put a step "
                "that trains after this one"
            )
        if self.recovery < 0:
            raise ValueError(f"recovery must not be negative, got {self.recovery}")

    def weaker(self) -> "Channels | None":
        """Return settings that remove about 30 % less; None when hardly anything would go."""
        if self.ratios:
            return None
        for name in _TARGETS[1:]:
            value = getattr(self, name)
            if value is not None:
                milder = round(1 - 0.7 * (1 - value), 3)
                return replace(self, **{name: milder}) if milder < 0.95 else None
        ratio = round(0.7 * (_DEFAULT_RATIO if self.ratio is None else self.ratio), 3)
        return replace(self, ratio=ratio) if ratio > 0.05 else None

    def target(self) -> tuple[str, float]:
        """Return what is asked for, and how much of it."""
        for name in _TARGETS:
            value = getattr(self, name)
            if value is not None:
                return name, value
        return "ratio", _DEFAULT_RATIO


@technique(paper="arXiv:2301.12900")
def channels(net: nn.Module, config: Channels, context: Context) -> nn.Module:
    """Cut the least important channels out of every layer they run through.

    Channels that reach an operator which needs their number, or mixes them, stay: their groups are
    protected, and the report says by what. The result is of the user's own class, with smaller
    layers, where forward adapts by itself; where numbers are written in it, it is the captured
    graph with new ones. On the example it is compared with the uncut network in which nothing reads
    the cut channels. Where there is calibration data, batch norm statistics are estimated anew.

    Raises:
        DataError: calibration or training data, or labels, that the settings need are missing.
        UnfitError: everything is protected, or the target cannot be reached.
        StepError: `layers` fits nothing. In all cases the network is unchanged.

    Source:
        Grouping: Fang et al., arXiv:2301.12900. Importance: see `ops/importance.py`.
    """
    if config.recovery and context.data.train is None:
        raise DataError("channels: recovery needs training data with labels; give `train` batches")
    original: _Original | None = None
    sizes: dict[str, list[int]] = {}
    for number in range(config.rounds):
        coupling = coupled(net, context)
        if original is None:
            original = _Original(
                net=net,
                macs=coupling.macs(),
                parameters=sum(p.numel() for p in net.parameters()),
                channels=sum(g.size for g in free(coupling, net, config.layers)),
            )
        chosen = _choose(net, coupling, config, context, (number + 1) / config.rounds, original)
        net, removal, left = smaller(net, coupling, chosen, context)
        if removal and context.data.calibration is not None:
            context.record(recalibrated=recalibrate(net, context.data.calibration))
        gone = {group.name: len(channels) for group, channels in removal}
        for group, _ in chosen:
            sizes.setdefault(group.name, [group.size]).append(group.size - gone.get(group.name, 0))
        context.record(**told(coupling, removal, left, net))
        if config.recovery and number < config.rounds - 1:
            net = _recover(net, config, context, number)
    assert original is not None
    if config.rounds > 1 and all(each[0] == each[-1] for each in sizes.values()):
        raise UnfitError(
            f"nothing was removed in {config.rounds} rounds: what stays is rounded up to a "
            f"multiple of {config.multiple}; use a smaller multiple or a higher ratio"
        )
    context.record(
        groups={name: " -> ".join(map(str, each)) for name, each in sizes.items()},
        macs_before=original.macs,
    )
    return net


@dataclass(frozen=True, kw_only=True)
class _Original:
    """The network before the first cut; targets are shares of it."""

    net: nn.Module
    macs: int
    parameters: int
    channels: int


def _recover(net: nn.Module, config: Channels, context: Context, number: int) -> nn.Module:
    assert context.data.train is not None
    return context.fit(
        net,
        context.loss,
        batches=context.data.train,
        epochs=config.recovery,
        seed=context.seed + number,
        checkpoint=context.work_dir / f"channels-{number}.safetensors",
    )


def _choose(
    net: nn.Module,
    coupling: Coupling,
    config: Channels,
    context: Context,
    part: float,
    original: _Original,
) -> Removal:
    """Turn a part of the target into the channels that go in this round."""
    name, target = config.target()
    groups = free(coupling, net, config.layers)
    scores = score(coupling, groups, config.importance, context)

    at = _cuts(coupling, groups, scores, config, context)
    if config.ratios:
        removal = assigned(groups, scores, config.ratios, config.multiple)
    elif name == "ratio":
        # of what is left, so that rounding in one round is made up for in the next
        left = sum(g.size for g in groups) / original.channels
        wanted = max(1 - (1 - part * target) / left, 0.0)
        if config.ranking == "sensitivity":
            removal = until(_channels_left(groups), at, 1 - wanted)
        else:
            removal = at(wanted)
    elif name == "latency":
        removal = _until_fast(net, coupling, at, 1 - part * (1 - target), original.net, context)
    else:
        share = _share_of(name, net, coupling, original)
        removal = _until(share, at, 1 - part * (1 - target), config, name)
    if config.rounds == 1 and not config.ratios and (name, target) not in _NO_CUT:
        check_something(removal, config.multiple)
    if config.ranking == "sensitivity":
        shares = [f"{g.name}={len(gone) / g.size:.6g}" for g, gone in removal if gone]
        fragment = {"importance": config.importance, "multiple": config.multiple, "ratios": shares}
        context.record(recipe={"channels": fragment})
    return removal


def _cuts(
    coupling: Coupling,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    config: Channels,
    context: Context,
) -> Callable[[float], Removal]:
    """Return the cuts from the mildest (0) to the hardest (1)."""
    ranking, multiple = config.ranking, config.multiple
    if ranking != "sensitivity" or config.ratios:
        costs = _costs(coupling, groups, config) if ranking == "per_cost" else ()
        return lambda far: at_ratio(
            groups, scores, far, ranking=ranking, multiple=multiple, costs=costs
        )
    losses = scan(coupling, groups, scores, context, multiple)
    context.record(
        sensitivities={n: {f"{r:g}": loss for r, loss in own.items()} for n, own in losses.items()}
    )
    return allocate(coupling, groups, scores, losses, multiple)


def _costs(coupling: Coupling, groups: Sequence[Group], config: Channels) -> list[float]:
    """Return what a channel of each group costs: parameters where they are asked for, else MACs."""
    whole: Removal = ()
    if config.parameters is not None:
        full = parameters(coupling.captured, whole)
        return [float(full - parameters(coupling.captured, [(g, [0])])) for g in groups]
    return [float(coupling.macs() - coupling.macs([(g, [0])])) for g in groups]


def _channels_left(groups: Sequence[Group]) -> Callable[[Removal], float]:
    total = sum(g.size for g in groups)
    return lambda removal: 1 - sum(len(gone) for _, gone in removal) / total


def _share_of(
    name: str, net: nn.Module, coupling: Coupling, original: _Original
) -> Callable[[Removal], float]:
    if name == "macs":
        return lambda removal: coupling.macs(removal) / original.macs
    # forward does not use them, so they are not in the graph: they stay
    beside = sum(p.numel() for p in net.parameters()) - parameters(coupling.captured, ())
    return lambda removal: (parameters(coupling.captured, removal) + beside) / original.parameters


def _until(
    share: Callable[[Removal], float],
    at: Callable[[float], Removal],
    target: float,
    config: Channels,
    name: str,
) -> Removal:
    reachable = share(at(1.0))
    if reachable > target:
        words = {"macs": "multiply-accumulates", "parameters": "parameters"}[name]
        raise UnfitError(
            f"{name}: {target:g} would empty layers: with {config.multiple} channels left in each "
            f"group {reachable:.3f} of the {words} remain. Choose more than that, a "
            "smaller multiple, or take the rest by another step",
            too_strong=True,
        )
    return until(share, at, target)


def _until_fast(
    net: nn.Module,
    coupling: Coupling,
    at: Callable[[float], Removal],
    target: float,
    original: nn.Module,
    context: Context,
) -> Removal:
    """Find the mildest cut that reaches a latency, by exporting and timing a few.

    Cuts are timed against the original, interleaved. Rounding to a multiple makes few cuts
    different, so ratios that cut the same are timed once.
    """
    timed: dict[tuple[int, ...], float] = {}

    def share(removal: Removal) -> float:
        key = tuple(len(gone) for _, gone in removal)
        if key not in timed:
            made, _, _ = smaller(net, coupling, removal, context)
            first, now = context.latency([original, made])
            timed[key] = now / first
        return timed[key]

    hardest = share(at(1.0))
    if hardest > target:
        raise UnfitError(
            f"latency {target:g} of the original's cannot be reached: with as few channels as can "
            f"be it is still {hardest:.2f}",
            too_strong=True,
        )
    low, high = 0.0, 1.0
    best = at(1.0)
    while len(timed) < _TIMED and high - low > 0.01:
        middle = (low + high) / 2
        removal = at(middle)
        if not any(gone for _, gone in removal):
            low = middle
        elif share(removal) <= target:
            high, best = middle, removal
        else:
            low = middle
    context.record(latency_share=share(best), timed=len(timed))
    return best
