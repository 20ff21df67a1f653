"""Drop layers: remove the residual blocks that are missed least, until it is fast enough."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, StepError, UnfitError, suggest
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.blocks import Block, bypass, bypassed, find_blocks
from tersor.ops.losses import LABELS, call, class_dimension, divergence, first_output
from tersor.ops.precision import channels_last, gains_from_bf16
from tersor.ops.recalibrate import batch_statistics, recalibrate

_DEFAULT_LATENCY = 0.7
_NO_HARM = 0.01
"""Divergence, in nats, that is as good as none: below it, savings decide."""
_RESCORED = 4
"""Blocks scored again at most in each round."""


@dataclass(frozen=True, kw_only=True)
class DropLayers:
    """Settings of block removal: `latency` or `blocks`; `latency: 0.7` when neither is given."""

    latency: float | None = None
    """Stop when the measured latency is at most this share of what it was, in (0, 1)."""
    parameters: float | None = None
    """With `latency`: go on until at most this share of the parameters is left, in (0, 1)."""
    blocks: int | None = None
    """Stop after this many blocks."""
    samples: int = 256
    """Calibration samples that a block is scored on."""
    layers: Layers = Layers()
    """Names of the blocks that may go."""

    def __post_init__(self) -> None:
        if self.latency is not None and self.blocks is not None:
            raise ValueError("give latency or blocks, not both")
        if self.parameters is not None and self.blocks is not None:
            raise ValueError("give parameters or blocks, not both")
        if self.parameters is not None and not 0 < self.parameters < 1:
            raise ValueError(f"parameters must be in (0, 1), got {self.parameters}")
        if self.latency is not None and not 0 < self.latency < 1:
            raise ValueError(f"latency must be in (0, 1), got {self.latency}")
        if self.blocks is not None and self.blocks < 0:
            raise ValueError(f"blocks must not be negative, got {self.blocks}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def weaker(self) -> "DropLayers | None":
        """Return settings that remove about 30 % less; None when hardly anything would go."""
        if self.blocks is not None:
            fewer = self.blocks * 7 // 10
            return replace(self, blocks=fewer) if fewer else None
        latency = _milder(self.latency or _DEFAULT_LATENCY)
        parameters = None if self.parameters is None else _milder(self.parameters)
        return replace(self, latency=latency, parameters=parameters) if latency < 0.9 else None


def _milder(share: float) -> float:
    """Return a share that removes 30 % less."""
    return round(1 - 0.7 * (1 - share), 3)


@technique(needs=("calibration", "reference"))
def drop_layers(net: nn.Module, config: DropLayers, context: Context) -> nn.Module:
    """Remove the block whose loss moves the outputs least, again and again, until it is enough.

    A block's score is the rise of KL(original || network) on calibration data when it is bypassed
    in addition to those already gone (mean squared error where outputs are numbers), with batch
    norms on each batch's own statistics: what a cut does to means and variances is easily undone,
    and is undone at the end by estimating them anew. Scores of earlier rounds are lower bounds as a
    rule, since blocks stand in for one another; so each round re-scores from the lowest one on,
    until one stays the lowest, four at most. The number of blocks is
    the smallest for which the measured latency is reached, and the share of parameters where one
    is asked for; then blocks go in the order of harm for what they save of both, as in greedy
    covering. Removed blocks become nn.Identity, and all dotted names stay.

    Raises:
        DataError: no calibration data.
        UnfitError: no residual block to remove; too few for what is asked.
        StepError: `layers` names no block.

    Source:
        Veit et al., arXiv:1605.06431 (residual networks survive the loss of blocks); the greedy
        order is that of Men et al., arXiv:2403.03853, with a measured stop instead of a fixed
        number.
    """
    if context.data.calibration is None:
        raise DataError("drop_layers needs calibration data to score blocks on")
    net.eval()
    blocks = _candidates(net, config, context)
    if config.blocks is not None:
        if config.blocks > len(blocks):
            raise UnfitError(
                f"{config.blocks} blocks are to go, but only {len(blocks)} can: "
                f"{', '.join(b.name for b in blocks)}",
                too_strong=True,
            )
        order = list(itertools.islice(_greedy(net, blocks, config, context), config.blocks))
        count = config.blocks
    else:
        order, count = _until_fast(net, blocks, config, context)
    bypass(net, [block for block, _ in order[:count]])
    if count:
        context.record(recalibrated=recalibrate(net, context.data.calibration))
    context.record(
        candidates=len(blocks),
        removed=[{"block": b.name, "score": score} for b, score in order[:count]],
    )
    return net


def _candidates(net: nn.Module, config: DropLayers, context: Context) -> list[Block]:
    found, refused = find_blocks(net, context.inputs)
    names = [*(block.name for block in found), *refused]
    unused = config.layers.unused(names) if names else ()
    if unused:
        raise StepError(
            f"layers: {unused[0]!r} matches no residual block."
            f"{suggest(unused[0].lstrip('!'), names)} Blocks: {', '.join(names)}"
        )
    chosen = [block for block in found if config.layers.holds(block.name)]
    if refused:
        context.record(cannot_be_bypassed=refused)
    if not chosen:
        seen = (
            f"; found {', '.join(b.name for b in found)}, but layers excludes them" if found else ""
        )
        failed = "".join(f"; {name} cannot be bypassed: {why}" for name, why in refused.items())
        raise UnfitError(
            f"{type(net).__name__} has no residual block that could be removed (a module "
            "whose input and output have the same shape, with a shortcut around its layers)"
            f"{seen}{failed}"
        )
    return chosen


def _until_fast(
    net: nn.Module, blocks: list[Block], config: DropLayers, context: Context
) -> tuple[list[tuple[Block, float]], int]:
    """Find the shortest greedy prefix that reaches the latency, with few measurements.

    Blocks cost about the same, so the measured ends of the range predict where to look next.
    """
    wanted = _DEFAULT_LATENCY if config.latency is None else config.latency
    order: list[tuple[Block, float]] = []
    shares = {0: 1.0, len(blocks): _share(net, blocks, context)}
    saving = _Saving(net, blocks, config, (1 - shares[len(blocks)]) / len(blocks))
    if shares[len(blocks)] > wanted:
        raise UnfitError(
            f"latency {wanted} of the original's cannot be reached: without all {len(blocks)} "
            f"blocks that can go it is still {shares[len(blocks)]:.2f}",
            too_strong=True,
        )
    source = _greedy(net, blocks, config, context, saving)
    slow, fast = 0, len(blocks)
    while fast - slow > 1:
        steepness = (shares[slow] - shares[fast]) / (fast - slow)
        guess = slow + round((shares[slow] - wanted) / steepness) if steepness > 0 else 0
        middle = min(max(guess, slow + 1), fast - 1)
        order += itertools.islice(source, middle - len(order)) if middle > len(order) else ()
        shares[middle] = _share(net, [b for b, _ in order[:middle]], context)
        if shares[middle] <= wanted:
            fast = middle
        else:
            slow = middle
    order += itertools.islice(source, fast - len(order)) if fast > len(order) else ()
    while not saving.enough([b for b, _ in order[:fast]]):
        fast += 1
        order += itertools.islice(source, fast - len(order)) if fast > len(order) else ()
    if fast not in shares:
        shares[fast] = _share(net, [b for b, _ in order[:fast]], context)
    context.record(
        latency_share=shares[fast],
        latency_shares={str(count): share for count, share in sorted(shares.items())},
    )
    return order, fast


class _Saving:
    """What a block's removal saves of what is still to be saved."""

    def __init__(
        self, net: nn.Module, blocks: Sequence[Block], config: DropLayers, latency_each: float
    ) -> None:
        self.total = sum(p.numel() for p in net.parameters())
        self.counts = {
            b.name: sum(p.numel() for p in net.get_submodule(b.name).parameters()) for b in blocks
        }
        self.latency = latency_each / (1 - (config.latency or _DEFAULT_LATENCY))
        self.wanted = 0.0 if config.parameters is None else (1 - config.parameters) * self.total
        if self.wanted > sum(self.counts.values()):
            raise UnfitError(
                f"parameters {config.parameters} of the original's cannot be reached: the "
                f"{len(blocks)} blocks that can go hold "
                f"{sum(self.counts.values()) / self.total:.2f} of them",
                too_strong=True,
            )

    def of(self, name: str, gone: Sequence[Block]) -> float:
        """Return the saving of one block: 1 is all that is asked for."""
        left = self.wanted - sum(self.counts[b.name] for b in gone)
        return self.latency + (self.counts[name] / self.wanted if left > 0 else 0.0)

    def enough(self, gone: Sequence[Block]) -> bool:
        """Tell whether the parameters asked for are saved."""
        return sum(self.counts[b.name] for b in gone) >= self.wanted


def _share(net: nn.Module, gone: Sequence[Block], context: Context) -> float:
    """Measure the latency without `gone` as a share of the latency with everything."""
    smaller = _shallow(net)
    bypass(smaller, gone)
    before, after = context.latency([net, smaller])
    return after / before


def _shallow(net: nn.Module) -> nn.Module:
    """Copy the structure of a network; its tensors are shared."""
    shared: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}
    return copy.deepcopy(net, shared)


def _greedy(
    net: nn.Module,
    blocks: Sequence[Block],
    config: DropLayers,
    context: Context,
    saving: _Saving | None = None,
) -> Iterator[tuple[Block, float]]:
    """Yield blocks in the order of removal, each with the rise of the divergence it causes."""
    distance = _distance(config, context)
    gone: list[Block] = []
    base = distance(net)
    scores: dict[str, float] = {}
    for block in context.track(blocks, "scoring blocks", len(blocks)):
        with bypassed(net, [block]):
            scores[block.name] = distance(net) - base
    left = {block.name: block for block in blocks}

    def price(name: str) -> float:
        if saving is None or not saving.wanted:
            return scores[name]
        return (max(scores[name], 0.0) + _NO_HARM) / saving.of(name, gone)

    while left:
        fresh: set[str] = set()
        while True:
            name = min(left, key=price)
            if name in fresh or not gone or len(fresh) == _RESCORED:
                break
            with bypassed(net, [*gone, left[name]]):
                scores[name] = distance(net) - base
            fresh.add(name)
        block = left.pop(name)
        gone.append(block)
        base += scores[name]
        yield block, scores[name]


def _distance(config: DropLayers, context: Context) -> Callable[[nn.Module], float]:
    """Return what measures a network's distance to the original on the calibration samples."""
    batches = _first(context.data.calibration or (), config.samples)
    assert context.reference is not None
    reference = context.reference.eval()
    with torch.no_grad():
        wanted = [first_output(call(reference, batch)) for batch in batches]

    low = gains_from_bf16(reference)

    def distance(net: nn.Module) -> float:
        total = 0.0
        count = 0
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=low),
            channels_last(net, low),
            batch_statistics(net),
        ):
            for batch, teacher in zip(batches, wanted, strict=True):
                outputs = first_output(call(net, batch))
                dimension = class_dimension(
                    outputs, batch.get(LABELS) if not context.data.loss else None
                )
                value = divergence(outputs, teacher, dimension).item()
                total += value * len(teacher)
                count += len(teacher)
        # a network that has lost its mind may return NaN: that block must stay
        return total / count if total == total else float("inf")

    return distance


def _first(batches: Any, samples: int) -> list[Mapping[str, Tensor]]:
    """Take the first samples of a split, cutting the last batch."""
    taken: list[Mapping[str, Tensor]] = []
    for batch in batches:
        size = len(next(iter(batch.values())))
        room = samples - sum(len(next(iter(b.values()))) for b in taken)
        if room <= 0:
            break
        taken.append(batch if size <= room else {k: v[:room] for k, v in batch.items()})
    if not taken:
        raise DataError("drop_layers: the calibration data holds no batch")
    return taken
