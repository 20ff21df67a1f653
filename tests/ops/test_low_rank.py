"""Factors against plain numpy, and against tensorly where it is installed."""

import numpy as np
import pytest
import torch

from tersor.ops import kruskal
from tersor.ops.low_rank import losses, svd_factors, tucker, tucker_losses, vbmf_rank


def test_svd_is_the_nearest_of_its_rank() -> None:
    matrix = torch.randn(7, 5, dtype=torch.float64)
    u, s, v = np.linalg.svd(matrix.numpy())
    wanted = sum(s[i] * np.outer(u[:, i], v[i]) for i in range(3))
    left, right = svd_factors(matrix, 3)
    assert np.allclose((left @ right).numpy(), wanted, atol=1e-12)
    assert losses(torch.from_numpy(s))[3].item() == pytest.approx((s[3:] ** 2).sum() / (s**2).sum())
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1))


def test_whitened_svd_loses_least_of_the_outputs() -> None:
    """The loss of outputs is what the singular values of W L say, and no other rank 2 loses less."""
    matrix = torch.randn(6, 5, dtype=torch.float64)
    inputs = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    root = torch.linalg.cholesky(inputs.mT @ inputs)
    left, right = svd_factors(matrix, 2, root)
    lost = (inputs @ (matrix - left @ right).mT).square().sum()
    # reference: project the outputs themselves
    outputs = (inputs @ matrix.mT).numpy()
    s = np.linalg.svd(outputs, compute_uv=False)
    assert lost.item() == pytest.approx((s[2:] ** 2).sum(), rel=1e-9)
    plain = svd_factors(matrix, 2)
    assert lost < (inputs @ (matrix - plain[0] @ plain[1]).mT).square().sum()


def hooi(weight: np.ndarray, p: int, q: int) -> np.ndarray:
    """Ten plain lines: alternate the two bases, then project."""
    out = np.linalg.svd(weight.reshape(len(weight), -1))[0][:, :p]
    into = np.linalg.svd(weight.transpose(1, 0, 2).reshape(weight.shape[1], -1))[0][:, :q]
    for _ in range(50):
        seen = np.einsum("oik,iq->oqk", weight, into)
        out = np.linalg.svd(seen.reshape(len(weight), -1))[0][:, :p]
        seen = np.einsum("oik,op->ipk", weight, out)
        into = np.linalg.svd(seen.reshape(weight.shape[1], -1))[0][:, :q]
    core = np.einsum("oik,op,iq->pqk", weight, out, into)
    return np.einsum("pqk,op,iq->oik", core, out, into)


def composed(parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    out, core, into = parts
    return torch.einsum("pqk,op,iq->oik", core, out, into)


def test_tucker_is_orthogonal_iteration() -> None:
    weight = torch.randn(8, 6, 9, dtype=torch.float64)
    wanted = hooi(weight.numpy(), 4, 3)
    made = composed(tucker(weight, 4, 3))
    # both stop near the same maximum; how near is what their stopping rules say
    assert np.linalg.norm(made.numpy() - wanted) < 0.02 * np.linalg.norm(wanted)
    lost = (weight - made).square().sum() / weight.square().sum()
    assert lost <= tucker_losses(weight)[4, 3] + 1e-12


def test_tucker_losses_are_those_of_the_truncated_bases() -> None:
    weight = torch.randn(5, 4, 9, dtype=torch.float64)
    out = np.linalg.svd(weight.numpy().reshape(5, -1))[0][:, :3]
    into = np.linalg.svd(weight.numpy().transpose(1, 0, 2).reshape(4, -1))[0][:, :2]
    core = np.einsum("oik,op,iq->pqk", weight.numpy(), out, into)
    wanted = 1 - (core**2).sum() / (weight.numpy() ** 2).sum()
    found = tucker_losses(weight)
    assert found[3, 2].item() == pytest.approx(wanted)
    assert found.shape == (6, 5)
    assert found[5, 4].item() == pytest.approx(0, abs=1e-12)


def test_tensorly_agrees() -> None:
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("numpy")
    weight = torch.randn(8, 6, 9, dtype=torch.float64)
    (core, factors), _ = partial_tucker(weight.numpy(), rank=[4, 3], modes=[0, 1])
    wanted = np.einsum("pqk,op,iq->oik", core, *factors)
    made = composed(tucker(weight, 4, 3)).numpy()
    assert np.linalg.norm(made - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("rank", [2, 5])
def test_vbmf_finds_the_rank_under_noise(rank: int) -> None:
    signal = torch.randn(40, rank, dtype=torch.float64) @ torch.randn(rank, 60, dtype=torch.float64)
    assert vbmf_rank(signal + 0.3 * torch.randn(40, 60, dtype=torch.float64)) == rank


def test_vbmf_of_noise_and_of_zeros_is_one() -> None:
    assert vbmf_rank(torch.zeros(5, 6)) == 1
    assert vbmf_rank(torch.randn(40, 60)) == 1


def test_cp_finds_the_terms_that_made_the_tensor() -> None:
    torch.manual_seed(1)
    factors = [torch.randn(size, 3, dtype=torch.float64) for size in (6, 5, 3, 3)]
    tensor = torch.einsum("ar,br,cr,dr->abcd", *factors)
    made, lost = kruskal.cp(tensor, 3)
    assert lost < 1e-3
    assert torch.allclose(kruskal.compose(made), torch.einsum("ar,br,cr,dr->abcd", *made))
    difference = (kruskal.compose(made) - tensor).square().sum() / tensor.square().sum()
    assert difference.item() == pytest.approx(lost, abs=1e-6)


def test_cp_stays_finite_where_no_best_form_exists() -> None:
    """A tensor of rank 3 that sums of two terms approach without end, with ever larger terms."""
    a, b = torch.eye(2, dtype=torch.float64)
    tensor = (
        torch.einsum("i,j,k->ijk", a, a, b)
        + torch.einsum("i,j,k->ijk", a, b, a)
        + torch.einsum("i,j,k->ijk", b, a, a)
    )
    made, lost = kruskal.cp(tensor, 2)
    largest = max(float(f.norm(dim=0).max()) for f in made)
    assert lost < 0.1
    assert largest < 20


def test_cp_of_zeros_is_zero() -> None:
    made, lost = kruskal.cp(torch.zeros(3, 4, 2), 2)
    assert lost == 0
    assert not any(f.any() for f in made)
