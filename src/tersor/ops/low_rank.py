"""Low-rank factors of weights: singular values of matrices, and the Tucker-2 form of kernels.

All in float64; the tensors are those of single layers.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# O outputs, I inputs of a layer, K places of its kernel, R rank
# P, Q ranks of the outputs and of the inputs in a Tucker-2 form

_HOOI_SWEEPS = 20
_HOOI_DONE = 1e-7
"""Growth of the core's energy, as a share of the tensor's, at which sweeps end."""
_GRID = 400
"""Noise levels that are tried in each of two rounds."""


def svd_factors(
    matrix_OI: Float[Tensor, "O I"], rank: int, root_II: Float[Tensor, "I I"] | None = None
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """Return left and right with left @ right nearest to the matrix among all of this rank.

    Args:
        matrix_OI: Weights.
        rank: At most min(O, I).
        root_II: Lower triangular L with L L^T the second moment of the inputs; what is nearest is
            then the outputs. None: the weights.

    Source:
        Eckart and Young, 1936. With inputs: Wang et al., SVD-LLM, arXiv:2403.07378, section 3.1:
        the singular values of W L are the losses of outputs. Both factors get the square root of
        the singular values, so that their sizes are balanced for training.
    """
    wide = matrix_OI.double()
    seen = wide if root_II is None else wide @ root_II
    left, values, right = torch.linalg.svd(seen, full_matrices=False)
    scale = values[:rank].sqrt()
    left_OR, right_RI = left[:, :rank] * scale, scale[:, None] * right[:rank]
    if root_II is not None:
        right_RI = torch.linalg.solve_triangular(root_II, right_RI, upper=False, left=False)
    return left_OR, right_RI


def singular_values(
    matrix_OI: Float[Tensor, "O I"], root_II: Float[Tensor, "I I"] | None = None
) -> Float[Tensor, "R"]:
    """Return all singular values, largest first; of matrix times root where there is one."""
    wide = matrix_OI.double()
    made: Tensor = torch.linalg.svdvals(wide if root_II is None else wide @ root_II)
    return made


def losses(values_R: Float[Tensor, "R"]) -> Float[Tensor, "R_plus_1"]:
    """Return the share of the energy that each rank loses, from rank 0 (all) to full (none)."""
    energy = values_R.double().square()
    total = energy.sum()
    left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    return left / total if total > 0 else torch.zeros_like(left)


def tucker_losses(
    weight_OIK: Float[Tensor, "O I K"],
) -> Float[Tensor, "O_plus_1 I_plus_1"]:
    """Return the share of the energy that each pair of ranks loses, by the truncated HOSVD.

    Entry (p, q) is for rank p of the outputs and q of the inputs. The iterations of `tucker` lose
    at most as much.
    """
    wide = weight_OIK.double()
    core = torch.einsum("oik,op,iq->pqk", wide, _leading(wide, 0), _leading(wide, 1))
    energy = core.square().sum(2)
    total = energy.sum()
    kept = energy.new_zeros(wide.shape[0] + 1, wide.shape[1] + 1)
    kept[1 : energy.shape[0] + 1, 1 : energy.shape[1] + 1] = energy.cumsum(0).cumsum(1)
    # beyond the rank of an unfolding there is nothing more to keep
    kept[energy.shape[0] + 1 :] = kept[energy.shape[0]]
    kept[:, energy.shape[1] + 1 :] = kept[:, energy.shape[1] : energy.shape[1] + 1]
    return (1 - kept / total).clamp(min=0) if total > 0 else torch.zeros_like(kept)


def tucker(
    weight_OIK: Float[Tensor, "O I K"], rank_out: int, rank_in: int
) -> tuple[Float[Tensor, "O P"], Float[Tensor, "P Q K"], Float[Tensor, "I Q"]]:
    """Return out, core and inputs with W[o, i, k] ~ sum out[o, p] core[p, q, k] inputs[i, q].

    Source:
        De Lathauwer et al., 2000 (higher-order orthogonal iteration), on the two channel modes, as
        in Kim et al., arXiv:1511.06530, section 3.1; begins at the truncated HOSVD.
    """
    wide = weight_OIK.double()
    out_OP, in_IQ = _leading(wide, 0)[:, :rank_out], _leading(wide, 1)[:, :rank_in]
    total, before = float(wide.square().sum()), -math.inf
    for _ in range(_HOOI_SWEEPS):
        out_OP = _leading(torch.einsum("oik,iq->oqk", wide, in_IQ), 0)[:, :rank_out]
        in_IQ = _leading(torch.einsum("oik,op->pik", wide, out_OP), 1)[:, :rank_in]
        core_PQK = torch.einsum("oik,op,iq->pqk", wide, out_OP, in_IQ)
        energy = float(core_PQK.square().sum())
        if energy - before <= _HOOI_DONE * total:
            break
        before = energy
    return out_OP, core_PQK, in_IQ


def _leading(tensor: Tensor, mode: int) -> Tensor:
    """Return the left singular vectors of an unfolding, (size, rank), strongest first."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    left: Tensor = torch.linalg.svd(unfolded, full_matrices=False)[0]
    return left


def vbmf_rank(matrix: Float[Tensor, "rows columns"]) -> int:
    """Estimate how many singular values are above the noise, at least 1.

    Source:
        Nakajima et al., JMLR 14 (2013), theorem 2 and corollary 1: the global solution of empirical
        variational Bayesian matrix factorization, with the noise found by a search over one number.
        2.5129 is their approximation of the threshold's root.
    """
    rows, columns = sorted(matrix.shape)
    values = torch.linalg.svdvals(matrix.double())
    alpha = rows / columns
    root = 2.5129 * math.sqrt(alpha)
    above = (1 + root) * (1 + alpha / root)
    energy = values.square()
    if float(energy.sum()) == 0:
        return 1
    tail = min(math.ceil(rows / (1 + alpha)) - 1, rows - 1)
    upper = float(energy.sum()) / (rows * columns)
    lower = max(float(energy[tail] / (columns * above)), float(energy[tail:].mean() / columns))
    lower = max(lower, 1e-12 * upper)
    noise = upper
    for _ in range(2):
        levels = torch.logspace(math.log10(lower), math.log10(upper), _GRID, dtype=torch.float64)
        best = int(_free_energy(energy, levels, rows, columns, above).argmin())
        noise = float(levels[best])
        lower, upper = float(levels[max(best - 1, 0)]), float(levels[min(best + 1, _GRID - 1)])
    return max(1, int((energy > columns * noise * above).sum()))


def _free_energy(energy: Tensor, levels: Tensor, rows: int, columns: int, above: float) -> Tensor:
    """Return the objective of the noise variance (their equation 29) for each level."""
    alpha = rows / columns
    x = (energy / (columns * levels[:, None])).clamp(min=1e-300)
    shifted = (x - (1 + alpha)).clamp(min=2 * math.sqrt(alpha))
    tau = (shifted + (shifted.square() - 4 * alpha).clamp(min=0).sqrt()) / 2
    noise = x - x.log()
    signal = x - tau + ((tau + 1) / x).log() + alpha * (tau / alpha + 1).log()
    return torch.where(x > above, signal, noise).sum(1)
