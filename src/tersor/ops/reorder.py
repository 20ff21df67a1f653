"""Reorder input channels so that N of every M keep more, where the network allows it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops.groups import Group
from tersor.ops.losses import first_output
from tersor.ops.matrices import input_channels, matrices
from tersor.ops.patterns import Pattern, keep_n_of_m
from tersor.ops.permutation_search import search_order
from tersor.ops.permute import permute

# G groups of a layer, R rows: outputs, C columns: inputs (ops/matrices.py), I input channels

_TOLERANCE = 1e-4
"""Sums in another order round differently; a wrong permutation is off by the outputs' own size."""


@dataclass(frozen=True, kw_only=True)
class Reordered:
    """What `reorder` did."""

    kept: Mapping[str, tuple[float, float]]
    """Layer -> share of its scores that the pattern keeps, before and after."""
    left: Mapping[str, str]
    """Layer -> why its input channels stay in their order."""


def reorder(
    net: nn.Module,
    groups: Iterable[Group],
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    inputs: Inputs,
    *,
    escapes: int,
    seed: int,
) -> Reordered:
    """Permute groups of channels, in the layers that make them and in those that read them.

    Each permuted group is checked on the example: where the network computes something else, the
    order is put back.

    Args:
        net: Changed in place.
        groups: What `ops.groups.find_groups` lists.
        scores: Layer -> score of each weight, in the weight's shape; higher is more important.
        pattern: (N, M), along input channels.
        inputs: How to call the network.
        escapes: Of the search.
        seed: Decides the search.
    """
    kept: dict[str, tuple[float, float]] = {}
    left: dict[str, str] = {}
    layers = {name: net.get_submodule(name) for name in scores}
    with torch.no_grad():
        wanted = first_output(net(**inputs.example))
    for group in groups:
        readers = [name for name in group.layers("in") if name in scores]
        if not readers:
            continue
        if group.protected:
            left |= dict.fromkeys(readers, group.protected)
            continue
        slots = _slots(group, {name: layers[name] for name in readers}, pattern)
        if not slots:
            reason = f"its channels do not fill groups of {pattern[1]} by themselves"
            left |= dict.fromkeys(readers, reason)
            continue
        score_RC = torch.cat(
            [_columns(group, name, layers[name], scores[name], slots) for name in readers]
        )
        found = search_order(score_RC, pattern, escapes=escapes, seed=seed)
        before, after = _kept(score_RC, pattern), _kept(score_RC[:, found], pattern)
        if after <= before:
            left |= dict.fromkeys(readers, "no better order was found")
            continue
        order = list(range(group.size))
        for slot, source in zip(slots, found.tolist(), strict=True):
            order[slot] = slots[source]
        reason = _try(net, group, order, wanted, inputs)
        if reason:
            left |= dict.fromkeys(readers, reason)
        else:
            kept |= dict.fromkeys(readers, (before, after))
    left |= dict.fromkeys(
        (name for name in scores if name not in kept and name not in left),
        "its inputs are not channels that a layer makes",
    )
    return Reordered(kept=kept, left={n: r for n, r in left.items() if n not in kept})


def _slots(group: Group, readers: Mapping[str, nn.Module], pattern: Pattern) -> list[int]:
    """List the channels that fill stripes of M by themselves in all readers, stripe by stripe."""
    common: set[tuple[int, ...]] | None = None
    for name, layer in readers.items():
        stripes: dict[int, list[int]] = {}
        for channel, place in enumerate(_places(group, name, layer)):
            if place is not None:
                stripes.setdefault(place // pattern[1], []).append(channel)
        full = {tuple(s) for s in stripes.values() if len(s) == pattern[1]}
        common = full if common is None else common & full
    return [channel for stripe in sorted(common or ()) for channel in stripe]


def _places(group: Group, name: str, layer: nn.Module) -> list[int | None]:
    """Return the input channel of a reader's matrices that each channel is.

    None: it is several of them, as after a flatten. A convolution of several groups holds each
    channel once in every one of them.
    """
    each = input_channels(layer)
    places: list[int | None] = []
    for own in group.indices[name, "in"]:
        within = {place % each for place in own}
        every = len(own) == len({place // each for place in own})
        places.append(within.pop() if len(within) == 1 and every else None)
    return places


def _columns(
    group: Group, name: str, layer: nn.Module, score: Tensor, slots: Sequence[int]
) -> Tensor:
    """Return a reader's scores with a column for each slot."""
    places = _places(group, name, layer)
    rows_XI = matrices(layer, score).reshape(-1, input_channels(layer))
    return rows_XI[:, [place for slot in slots if (place := places[slot]) is not None]]


def _kept(score_RC: Tensor, pattern: Pattern) -> float:
    total = float(score_RC.double().sum())
    return float((score_RC.double() * keep_n_of_m(score_RC, pattern)).sum()) / (total or 1.0)


def _try(net: nn.Module, group: Group, order: Sequence[int], wanted: Tensor, inputs: Inputs) -> str:
    """Permute a group; return why it cannot be, with the network as it was, or nothing."""
    try:
        permute(net, group, order)
    except ValueError as error:
        return str(error)
    with torch.no_grad():
        found = first_output(net(**inputs.example))
    scale = wanted.abs().max().clamp_min(1e-6)
    difference = float((found - wanted).abs().max() / scale)
    if difference <= _TOLERANCE:
        return ""
    back = sorted(range(len(order)), key=order.__getitem__)
    permute(net, group, back)
    return f"in another order the network's outputs differ by {difference:.2g} of their size"
