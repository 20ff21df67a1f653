"""Codebooks: k-means of numbers in one dimension, exact in each step.

Sorted numbers make clusters intervals, so that sums over a cluster are differences of running sums.
"""

from typing import Literal

import numpy as np

Init = Literal["linear", "density", "random"]
_MOST_STEPS = 200


def kmeans(
    values: np.ndarray,
    clusters: int,
    *,
    init: Init = "linear",
    ends: tuple[float, float] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Choose values that others are rounded to with the least squared error (Lloyd's algorithm).

    Args:
        values: (n,) numbers, in any order.
        clusters: How many at most.
        init: linear: at equal distances between the ends; density: at equal numbers of values
            between; random: some of the values.
        ends: The lowest and the highest one, where they are given.
        seed: Of random.

    Returns:
        Increasing float64, fewer than `clusters` where there are fewer distinct values.

    Source:
        Lloyd, 1982; beginnings: Han et al., arXiv:1510.00149, section 3.2.
    """
    given = np.sort(values.astype(np.float64))
    kinds = np.unique(given if ends is None else np.concatenate([given, ends]))
    if len(kinds) <= clusters:
        return kinds
    sums = np.concatenate([[0.0], np.cumsum(given)])
    book = _start(given, clusters, init, ends, seed)
    for _ in range(_MOST_STEPS):
        borders = np.searchsorted(given, (book[1:] + book[:-1]) / 2)
        cuts = np.concatenate([[0], borders, [len(given)]])
        counts = np.diff(cuts)
        means = np.where(counts > 0, np.diff(sums[cuts]) / np.maximum(counts, 1), book)
        if ends is not None:
            means[0], means[-1] = ends
        if np.array_equal(means, book):
            break
        book = np.sort(means)
    return np.unique(book)


def _start(
    given: np.ndarray,
    clusters: int,
    init: Init,
    ends: tuple[float, float] | None,
    seed: int,
) -> np.ndarray:
    low, high = (given[0], given[-1]) if ends is None else ends
    if init == "linear":
        return np.linspace(low, high, clusters)
    if init == "density":
        made = np.quantile(given, (np.arange(clusters) + 0.5) / clusters)
    else:
        made = np.sort(np.random.default_rng(seed).choice(np.unique(given), clusters, False))
    if ends is not None:
        made[0], made[-1] = ends
    return np.asarray(made)


def nearest(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Return the index in an increasing `book` that each value is nearest to."""
    return np.searchsorted((book[1:] + book[:-1]) / 2, values)
