"""Sums of rank-one tensors (canonical polyadic form), by stable alternating least squares."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_SWEEPS = 100
_DONE = 1e-4
"""Change of the relative error at which sweeps end."""
_RIDGE = 1e-2
"""First weight of staying near the last factor, as a share of the mean of the normal equations'
diagonal; halved in each sweep, down to the next."""
_RIDGE_END = 1e-9


def cp(
    tensor: Float[Tensor, "..."], rank: int, seed: int = 0
) -> tuple[list[Float[Tensor, "size R"]], float]:
    """Return factors whose outer products sum to the tensor as nearly as was found, and the error.

    Least squares in one factor after the other diverge where two terms grow and cancel. Each update
    therefore also stays near the factor it replaces, less and less, and after each sweep all
    factors of a term get the same norm.

    Args:
        tensor: Two or more dimensions.
        rank: Number of terms.
        seed: Draws the columns beyond those that singular vectors begin with.

    Returns:
        A factor for each dimension, float64; and the share of the energy that is lost.

    Source:
        Kolda and Bader, SIAM Review 51 (2009), section 3.4, for the updates; Li, Kindermann and
        Navasca, Linear Algebra Appl. 438 (2013), for the proximal term; as used on kernels by
        Lebedev et al., arXiv:1412.6553, who report the divergence.
    """
    wide = tensor.double()
    total = float(wide.square().sum())
    generator = torch.Generator().manual_seed(seed)
    factors = [_start(wide, mode, rank, generator) for mode in range(wide.dim())]
    if total == 0:
        return [torch.zeros_like(f) for f in factors], 0.0
    scale = math.sqrt(total / max(float(_composed(factors).square().sum()), 1e-300))
    factors = [f * scale ** (1 / len(factors)) for f in factors]
    best, lowest, before, error, ridge = factors, math.inf, math.inf, math.inf, _RIDGE
    for _ in range(_SWEEPS):
        for mode in range(wide.dim()):
            factors[mode], error = _update(wide, factors, mode, ridge, total)
        factors = _balanced(factors)
        if error < lowest:
            best, lowest = list(factors), error
        if abs(before - error) <= _DONE * max(error, _DONE) and ridge <= _RIDGE_END:
            break
        before, ridge = error, max(ridge / 2, _RIDGE_END)
    return best, lowest


def compose(factors: Sequence[Float[Tensor, "size R"]]) -> Float[Tensor, "..."]:
    """Return the tensor that the factors stand for."""
    return _composed(list(factors))


def _composed(factors: list[Tensor]) -> Tensor:
    made = _khatri_rao(factors).sum(-1)
    return made.view([f.shape[0] for f in factors])


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Return the products of columns, (product of the sizes, R); the last factor varies fastest."""
    made = factors[0]
    for factor in factors[1:]:
        made = (made[:, None, :] * factor[None]).flatten(0, 1)
    return made


def _start(wide: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return leading singular vectors of an unfolding; drawn columns where there are too few."""
    unfolded = wide.movedim(mode, 0).flatten(1)
    left = torch.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
    missing = rank - left.shape[1]
    drawn = torch.randn(len(left), missing, generator=generator, dtype=torch.float64)
    return torch.cat([left, drawn / math.sqrt(len(left))], 1)


def _update(
    wide: Tensor, factors: list[Tensor], mode: int, ridge: float, total: float
) -> tuple[Tensor, float]:
    """Return the least squares factor that stays near the last one, and the error's share."""
    others = [f for i, f in enumerate(factors) if i != mode]
    gram = torch.ones((), dtype=torch.float64)
    for factor in others:
        gram = gram * (factor.mT @ factor)
    target = wide.movedim(mode, 0).flatten(1) @ _khatri_rao(others)
    near = ridge * float(gram.diagonal().mean()) + 1e-300
    eye = torch.eye(len(gram), dtype=torch.float64)
    wanted = target + near * factors[mode]
    made = torch.linalg.solve(gram + near * eye, wanted.mT).mT
    error = total - 2 * float((target * made).sum()) + float(((made.mT @ made) * gram).sum())
    return made, max(error, 0.0) / total


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    norms = [f.norm(dim=0).clamp(min=1e-150) for f in factors]
    mean = torch.stack(norms).log().mean(0).exp()
    return [f / n * mean for f, n in zip(factors, norms, strict=True)]
