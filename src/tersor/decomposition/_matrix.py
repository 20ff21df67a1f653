"""Layers as matrices, in two factors: what `svd` and `activation_svd` share."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.errors import UnfitError
from tersor.decomposition._choice import Candidate
from tersor.decomposition._layers import Site
from tersor.ops.hessian import damped
from tersor.ops.low_rank import losses, singular_values, svd_factors
from tersor.ops.matrices import matrices
from tersor.ops.parts import Part, parameters_of, pointwise

_DAMP = 1e-4


def ranks(site: Site, full: int, rank: int | None, multiple: int) -> Sequence[int]:
    """Return the ranks to look at: the given one, or all multiples up to the full rank.

    Raises:
        UnfitError: the given rank is above the full one, which is the nearest that fits.
    """
    if rank is None:
        return range(multiple, full + 1, multiple)
    if rank > full:
        raise UnfitError(
            f"rank {rank} does not fit layer {site.name!r}, whose full rank is {full}; "
            f"use at most {full}, or leave the layer out"
        )
    return [rank]


def matrix_candidates(
    site: Site, moment_GCC: Tensor | None, *, rank: int | None, multiple: int
) -> Sequence[Candidate]:
    """Return the ways to write a layer as two, with the full kernel in the first.

    Args:
        site: Linear layer or convolution.
        moment_GCC: Second moment of its inputs, or None.
        rank: The only rank to look at, or None.
        multiple: Of the ranks that are looked at.
    """
    matrix_GRC = matrices(site.layer).double()
    root_GCC = None
    if moment_GCC is not None:
        root_GCC = torch.linalg.cholesky(damped(moment_GCC, _DAMP))
    full = min(matrix_GRC.shape[1:])
    values = torch.stack(
        [
            singular_values(m, None if root_GCC is None else root_GCC[g])
            for g, m in enumerate(matrix_GRC)
        ]
    )
    lost = losses(values.square().sum(0).sqrt())
    part = site.part
    made = []
    for r in ranks(site, full, rank, multiple):
        parts = _parts(part, r)
        if rank is None and parameters_of(parts) >= part.parameters:
            break

        def weights(r: int = r, parts: tuple[Part, ...] = parts) -> Sequence[Tensor]:
            return _weights(matrix_GRC, root_GCC, r, parts)

        made.append(Candidate(rank=(r,), loss=float(lost[r]), parts=parts, weights=weights))
    return made


def _parts(part: Part, rank: int) -> tuple[Part, ...]:
    middle = part.groups * rank
    first = replace(part, outputs=middle)
    return first, pointwise(middle, part.outputs, len(part.kernel), part.groups)


def _weights(
    matrix_GRC: Tensor, root_GCC: Tensor | None, rank: int, parts: Sequence[Part]
) -> Sequence[Tensor]:
    pairs = [
        svd_factors(m, rank, None if root_GCC is None else root_GCC[g])
        for g, m in enumerate(matrix_GRC)
    ]
    left, right = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    kernel = parts[0].kernel
    if kernel:
        per_group = parts[0].inputs // parts[0].groups
        right = right.view(len(right), *kernel, per_group).movedim(-1, 1)
        left = left.view(*left.shape, *[1] * len(kernel))
    return right, left
