"""k-means in one dimension against plain loops."""

from typing import Any

import numpy as np
import pytest

from tersor.ops.codebooks import kmeans, nearest


def plain(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm as in a textbook."""
    for _ in range(500):
        owner = np.abs(values[:, None] - book).argmin(1)
        means = [values[owner == k].mean() if (owner == k).any() else b for k, b in enumerate(book)]
        if np.allclose(means, book, rtol=0, atol=0):
            break
        book = np.array(means)
    return np.unique(book)


def test_against_plain_loops() -> None:
    values = np.random.default_rng(0).normal(size=400)
    wanted = plain(values, np.linspace(values.min(), values.max(), 8))
    np.testing.assert_allclose(kmeans(values, 8), wanted, rtol=1e-12)


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_no_value_is_better_moved(init: Any) -> None:
    values = np.random.default_rng(1).normal(size=2000)
    book = kmeans(values, 16, init=init)
    assert len(book) <= 16
    assert (np.diff(book) > 0).all()
    np.testing.assert_allclose(plain(values, book), book, rtol=1e-9)


def test_more_values_lose_less() -> None:
    values = np.random.default_rng(2).normal(size=3000)
    losses = []
    for clusters in (2, 4, 8, 16, 32, 64):
        book = kmeans(values, clusters)
        losses.append(((book[nearest(values, book)] - values) ** 2).mean())
    assert losses == sorted(losses, reverse=True)


def test_few_distinct_values_are_kept_as_they_are() -> None:
    np.testing.assert_array_equal(kmeans(np.array([3.0, 1, 3, 1, 2]), 5), [1, 2, 3])
    assert len(kmeans(np.array([]), 4)) == 0


def test_ends_that_are_given_stay() -> None:
    values = np.random.default_rng(3).uniform(-0.8, 0.9, 500)
    book = kmeans(values, 8, ends=(-1, 1))
    assert book[0] == -1
    assert book[-1] == 1


def test_random_beginnings_follow_the_seed() -> None:
    values = np.random.default_rng(4).normal(size=300)
    first, again, other = (kmeans(values, 8, init="random", seed=s) for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
