"""How much each group's channels are missed, one group at a time; and what to take from which."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError, RecipeError, suggest
from tersor.ops.groups import Coupling, Group, Removal
from tersor.ops.losses import call, class_dimension, divergence, first_output
from tersor.ops.recalibrate import batch_statistics
from tersor.ops.selection import least

LEVELS = tuple(step / 8 for step in range(1, 8))
"""Shares of a group's channels that are tried."""
SAMPLES = 256
Losses = Mapping[str, Mapping[float, float]]
"""Group -> share that is removed -> divergence from the uncut network's outputs."""


def scan(
    coupling: Coupling,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    context: Context,
    multiple: int,
) -> dict[str, dict[float, float]]:
    """Cut each group alone, by several shares, and compare the outputs on calibration data.

    Batch norms use each batch's own statistics, on both sides, since what a cut does to means and
    variances is easily undone.

    Raises:
        DataError: no calibration data.

    Source:
        Li et al., arXiv:1608.08710, section 3.2, with the divergence of outputs in the place of
        accuracy: it needs no labels, and is not in steps.
    """
    if context.data.calibration is None:
        raise DataError("ranking: sensitivity needs calibration data")
    batches = _first(context.data.calibration, SAMPLES)
    if not batches:
        raise DataError("ranking: sensitivity needs calibration batches of 2 samples at least")
    wanted = _outputs(coupling.captured, batches)
    losses: dict[str, dict[float, float]] = {}
    pairs = list(zip(groups, scores, strict=True))
    for group, score in context.track(pairs, "measuring sensitivities", len(pairs)):
        own = losses.setdefault(group.name, {})
        seen: dict[int, float] = {0: 0.0}
        for level in LEVELS:
            gone = least(group, score, int(level * group.size), multiple)
            if len(gone) not in seen:
                outputs = _outputs(coupling.cut([(group, gone)]), batches)
                seen[len(gone)] = _distance(outputs, wanted)
            own[level] = seen[len(gone)]
    return losses


def _first(batches: Iterable[Batch], samples: int) -> list[Batch]:
    taken: list[Batch] = []
    count = 0
    for batch in batches:
        samples_here = len(next(iter(batch.values())))
        if samples_here < 2:  # has no variance
            continue
        taken.append(batch)
        count += samples_here
        if count >= samples:
            break
    return taken


def _outputs(net: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    with torch.no_grad(), batch_statistics(net):
        return [first_output(call(net, batch)) for batch in batches]


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    each = [
        float(divergence(a, b, class_dimension(b, None)))
        for a, b in zip(found, wanted, strict=True)
    ]
    return sum(each) / len(each)


def allocate(
    coupling: Coupling,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    losses: Losses,
    multiple: int,
) -> Callable[[float], Removal]:
    """Order all steps of all groups by the loss that they add for what they save.

    A step takes a group from one share to a larger one; the next is always the one with the least
    rise of loss for each multiply-accumulate saved from there on, as in greedy covering. Groups'
    losses are taken to add up.

    Returns:
        (how far to go, 0 to 1) -> the cut.
    """
    reached = dict.fromkeys((g.name for g in groups), 0.0)
    path = [dict(reached)]

    def removal(shares: Mapping[str, float]) -> Removal:
        return [
            (g, least(g, s, int(shares[g.name] * g.size), multiple) if shares[g.name] else [])
            for g, s in zip(groups, scores, strict=True)
        ]

    now = coupling.macs()
    while True:
        steps = []
        for group in groups:
            for level in LEVELS:
                if level <= reached[group.name]:
                    continue
                left = coupling.macs(removal({**reached, group.name: level}))
                if left < now:
                    rise = losses[group.name][level] - losses[group.name].get(
                        reached[group.name], 0.0
                    )
                    steps.append((max(rise, 0.0) / (now - left), group.name, level, left))
        if not steps:
            break
        _, name, level, now = min(steps)
        reached[name] = level
        path.append(dict(reached))
    return lambda far: removal(path[round(far * (len(path) - 1))])


def assigned(
    groups: Sequence[Group], scores: Sequence[Tensor], ratios: Sequence[str], multiple: int
) -> Removal:
    """Return the cut that a recipe writes down, as `"layer1.*=0.25"`; the first that fits counts.

    Raises:
        RecipeError: a pattern fits no group.
    """
    parsed = [parse(entry) for entry in ratios]
    names = [g.name for g in groups]
    for pattern, _ in parsed:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(f"ratios: {pattern!r} fits no group.{suggest(pattern, names)}")
    found = []
    for group, score in zip(groups, scores, strict=True):
        share = next((r for p, r in parsed if fnmatch.fnmatchcase(group.name, p)), 0.0)
        gone = least(group, score, round(share * group.size), multiple) if share else []
        found.append((group, gone))
    return found


def parse(entry: str) -> tuple[str, float]:
    """Read `"layer1.*=0.25"`.

    Raises:
        ValueError: it does not have this form, or the share is not in [0, 1).
    """
    pattern, _, share = entry.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not pattern or not 0 <= value < 1:
        raise ValueError(f'ratios: write "layer1.*=0.25", a share in [0, 1); got {entry!r}')
    return pattern, value
