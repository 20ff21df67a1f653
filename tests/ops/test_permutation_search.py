"""The search for a better order of columns."""

import itertools

import pytest
import torch

from tersor.ops.patterns import keep_n_of_m
from tersor.ops.permutation_search import _Table, search_order


def kept(score: torch.Tensor, pattern: tuple[int, int]) -> float:
    return float((score * keep_n_of_m(score, pattern)).double().sum())


def test_the_best_order_of_a_small_matrix_is_found() -> None:
    """Against all orders: 6 columns in two stripes of 3, of which 10 splits differ."""
    for seed in range(10):
        score = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed))
        best = max(
            kept(score[:, list(order)], (1, 3)) for order in itertools.permutations(range(6))
        )
        found = search_order(score, (1, 3), escapes=20, seed=0)
        assert kept(score[:, found], (1, 3)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_it_is_an_order_and_keeps_no_less(pattern: tuple[int, int]) -> None:
    score = torch.rand(20, 32)
    found = search_order(score, pattern, escapes=5, seed=0)
    assert sorted(found.tolist()) == list(range(32))
    assert kept(score[:, found], pattern) >= kept(score, pattern)
    assert torch.equal(found, search_order(score, pattern, escapes=5, seed=0))


def test_what_stands_in_one_stripe_is_spread() -> None:
    """Large columns next to each other: 2:4 would drop half of them."""
    score = torch.full((10, 16), 0.01) * torch.rand(10, 16)
    score[:, :8] += 1
    found = search_order(score, (2, 4), escapes=0, seed=0)
    assert kept(score, (2, 4)) < 45
    assert kept(score[:, found], (2, 4)) > 80


def test_the_table_says_what_each_swap_gains() -> None:
    score = torch.rand(7, 12, dtype=torch.float64).float()
    table = _Table(score, 2, 4)
    table.swap(1, 9)
    table.swap(5, 2)
    table.put(torch.randperm(12))
    now = score[:, table.order]
    assert table.kept() == pytest.approx(kept(now, (2, 4)), rel=1e-5)
    for a, b in itertools.combinations(range(12), 2):
        if a // 4 == b // 4:
            continue
        order = list(range(12))
        order[a], order[b] = b, a
        wanted = kept(now[:, order], (2, 4)) - kept(now, (2, 4))
        base = table.without - table.stripe_kept
        found = table.added[a, b] + table.added[b, a] + base[a] + base[b]
        assert float(found) == pytest.approx(wanted, abs=1e-4)


def test_very_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.ops.permutation_search._WORK", 16**2 * 3)
    rows: list[int] = []
    start = _Table.__init__

    def spy(self: _Table, score: torch.Tensor, n: int, m: int) -> None:
        rows.append(len(score))
        start(self, score, n, m)

    monkeypatch.setattr(_Table, "__init__", spy)
    search_order(torch.rand(100, 16), (2, 4), escapes=0, seed=0)
    assert rows == [3]
