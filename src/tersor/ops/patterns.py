"""Which weights stay: a share of each row, or N of every M neighboring input channels."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tersor.core.errors import UnfitError
from tersor.ops.masks import num_dropped, weaker
from tersor.ops.matrices import input_channels

# G groups of a layer, R rows: outputs, C columns: inputs (ops/matrices.py)

_TOLD = 4
"""So many layers are named in an error."""
Pattern = tuple[int, int]
"""(N, M): N of every M weights may be other than zero."""


def parse_pattern(text: str) -> Pattern:
    """Read "2:4".

    Raises:
        ValueError: it is not N:M with 0 < N < M.
    """
    n, colon, m = str(text).partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise ValueError(f'pattern must be "N:M" with 0 < N < M, such as "2:4", got {text!r}')
    return int(n), int(m)


def check_amount(sparsity: float | None, pattern: str | None) -> None:
    """Refuse settings that do not say how much is pruned.

    Raises:
        ValueError: both are given, or one that has no meaning.
    """
    if sparsity is not None and pattern is not None:
        raise ValueError("give sparsity or pattern, not both")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if pattern is not None:
        parse_pattern(pattern)


def weaker_amount(sparsity: float, pattern: str | None) -> dict[str, float | str] | None:
    """Return a setting with fewer zeros; None: there is none, or hardly any would be left."""
    if pattern is not None:
        n, m = parse_pattern(pattern)
        return {"pattern": f"{n + 1}:{m}"} if n + 1 < m else None
    less = weaker(sparsity)
    return None if less is None else {"sparsity": less}


def keep_highest(
    score_GRC: Float[Tensor, "G R C"], sparsity: float, pattern: Pattern | None
) -> Bool[Tensor, "G R C"]:
    """Keep the highest scores: N of every M where there is a pattern, else a share of each row."""
    return keep_n_of_m(score_GRC, pattern) if pattern else keep_share(score_GRC, sparsity)


def keep_share(score_GRC: Float[Tensor, "G R C"], sparsity: float) -> Bool[Tensor, "G R C"]:
    """Drop the same share of every row, the lowest scores first, of equal ones the first.

    Args:
        score_GRC: Higher is more important.
        sparsity: Share, in [0, 1); rounded down to whole weights.
    """
    gone = score_GRC.argsort(dim=-1, stable=True)[..., : num_dropped(sparsity, score_GRC.shape[-1])]
    return torch.ones_like(score_GRC, dtype=torch.bool).scatter_(-1, gone, False)


def keep_n_of_m(score: Float[Tensor, "... C"], pattern: Pattern) -> Bool[Tensor, "... C"]:
    """Keep the N highest scores of every M neighboring columns; of equal ones the last.

    Args:
        score: Higher is more important; C is a multiple of M.
        pattern: (N, M).
    """
    n, m = pattern
    near = score.reshape(*score.shape[:-1], -1, m)
    gone = near.argsort(dim=-1, stable=True)[..., : m - n]
    keep = torch.ones_like(near, dtype=torch.bool).scatter_(-1, gone, False)
    return keep.view(score.shape)


def fitting(
    chosen: dict[str, nn.Module], pattern: Pattern, technique: str
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Leave out layers with one input channel, whose weights have no neighbors.

    Args:
        chosen: Name -> layer.
        pattern: (N, M), along input channels.
        technique: For the message.

    Returns:
        (name -> layer, name -> why it is left as it is).

    Raises:
        UnfitError: M does not divide the input channels of a layer; says what fits.
    """
    n, m = pattern
    left = {
        name: "it has one input channel, so no neighbors to choose from"
        for name, layer in chosen.items()
        if input_channels(layer) == 1
    }
    kept = {name: layer for name, layer in chosen.items() if name not in left}
    wrong = {name: c for name, layer in kept.items() if (c := input_channels(layer)) % m}
    if wrong:
        told = ", ".join(
            f"{name!r} has {channels}" for name, channels in list(wrong.items())[:_TOLD]
        )
        more = f" and {len(wrong) - _TOLD} others" if len(wrong) > _TOLD else ""
        ways = []
        every = math.gcd(*(input_channels(layer) for layer in kept.values()))
        divisors = [d for d in range(n + 1, every + 1) if every % d == 0]
        if divisors:
            ways.append(f"use {n}:{min(divisors, key=lambda d: (abs(d - m), d))}")
        if len(wrong) < len(kept):
            excluded = ", ".join(f'"!{name}"' for name in wrong)
            ways.append(f"leave out what does not fit: layers: [{excluded}]")
        raise UnfitError(
            f"{technique}: {n}:{m} needs input channels in multiples of {m}, but {told}{more}; "
            f"{', or '.join(ways) or 'no pattern of this N fits all of them'}"
        )
    if not kept:
        raise UnfitError(f"{technique}: every chosen layer has one input channel; nothing to do")
    return kept, left
