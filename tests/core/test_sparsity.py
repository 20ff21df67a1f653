"""Structure of zeros: against plain loops, on patterns that were put there, and on none."""

import itertools
from typing import Any

import numpy as np
import pytest

from tersor.core.sparsity import Structure, find_structure

Bools = Any


def kept_n_of_m(rng: np.random.Generator, outputs: int, inputs: int, n: int, m: int) -> Bools:
    """Exactly N of each M inputs stay."""
    score = rng.random((outputs, inputs // m, m))
    return (score.argsort(-1).argsort(-1) >= n).reshape(outputs, inputs)


def blocks(
    rng: np.random.Generator, outputs: int, inputs: int, rows: int, columns: int, share: float
) -> Bools:
    coarse = rng.random((outputs // rows, inputs // columns)) < share
    return np.kron(coarse, np.ones((rows, columns), bool)).astype(bool)


def plain_n_of_m(zero: Bools) -> tuple[int, int] | None:
    best = None
    for m in (4, 8, 16):
        if zero.shape[1] % m:
            continue
        most = 0
        for row in zero:
            for start in range(0, len(row), m):
                most = max(most, sum(not z for z in row[start : start + m]))
        used = sum(not z for row in zero for z in row) / (zero.size * most / m)
        if most <= 0.75 * m and used >= 0.6 and (best is None or most / m < best[0] / best[1]):
            best = (most, m)
    return best


def plain_fills(zero: Bools, rows: int, columns: int) -> bool:
    """Every zero lies in a block of zeros."""
    if zero.shape[0] % rows or zero.shape[1] % columns:
        return False
    for i, j in itertools.product(range(zero.shape[0]), range(zero.shape[1])):
        top, left = i - i % rows, j - j % columns
        if zero[i, j] and not zero[top : top + rows, left : left + columns].all():
            return False
    return True


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (3, 8), (5, 16), (1, 16)])
def test_n_of_m(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    zero = kept_n_of_m(rng, 24, 48, n, m)
    assert find_structure(zero).n_of_m == plain_n_of_m(zero) == (n, m)
    assert find_structure(zero.T, input_axis=0).n_of_m == (n, m)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.97])
def test_unstructured_zeros_are_no_pattern(share: float) -> None:
    rng = np.random.default_rng(5)
    found = find_structure(rng.random((64, 64)) < share)
    assert found == Structure(zero_rows=found.zero_rows, zero_columns=found.zero_columns)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.97])
def test_single_zeros_against_plain_loops(share: float) -> None:
    rng = np.random.default_rng(1)
    for shape in ((8, 16), (6, 40), (5, 7)):
        zero = rng.random(shape) < share
        if not zero.any() or zero.all():
            continue
        found = find_structure(zero)
        assert found.n_of_m == plain_n_of_m(zero)
        assert found.zero_rows == sum(all(row) for row in zero)
        assert found.zero_columns == sum(all(column) for column in zero.T)
        sides = (1, 2, 4, 8, 16, 32)
        shapes = [(r, c) for r in sides for c in sides if plain_fills(zero, r, c)]
        area = max(r * c for r, c in shapes)
        if found.block is not None:
            assert plain_fills(zero, *found.block)
            assert found.block[0] * found.block[1] == area
        else:
            lines = zero.all(1)[:, None] | zero.all(0)
            assert area == 1 or (zero == lines).all()


@pytest.mark.parametrize("shape", [(4, 1), (1, 16), (8, 8), (2, 4), (1, 2)])
def test_blocks(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    zero = blocks(rng, 64, 96, *shape, share=0.6)
    found = find_structure(zero)
    assert found.block == shape
    assert f"{shape[0]}x{shape[1]} blocks" in str(found)


def test_kernels() -> None:
    rng = np.random.default_rng(3)
    # (outputs, inputs, height, width): groups and blocks run along the inputs at each place
    zero = np.stack([kept_n_of_m(rng, 8, 16, 2, 4) for _ in range(9)], -1).reshape(8, 16, 3, 3)
    assert find_structure(zero).n_of_m == (2, 4)
    assert find_structure(np.swapaxes(zero, 0, 1), input_axis=0).n_of_m == (2, 4)
    zero = np.stack([blocks(rng, 8, 16, 4, 4, 0.5) for _ in range(9)], -1).reshape(8, 16, 3, 3)
    assert find_structure(zero).block == (4, 4)


def test_whole_rows_and_columns_are_not_blocks() -> None:
    zero = np.zeros((8, 16), bool)
    zero[[1, 5]] = True
    zero[:, 3] = True
    assert find_structure(zero) == Structure(zero_rows=2, zero_columns=1)
    assert str(find_structure(zero)) == "2 rows, 1 columns"


def test_codes_have_zeros_of_their_own() -> None:
    rng = np.random.default_rng(4)
    zero = blocks(rng, 64, 64, 8, 8, 0.5)
    zero |= rng.random(zero.shape) < 0.02
    assert find_structure(zero).block is None
    assert find_structure(zero, rounded=True).block == (8, 8)
    # single zeros, however many, are no blocks of codes
    for share in (0.02, 0.5, 0.9, 0.99):
        assert find_structure(rng.random((256, 256)) < share, rounded=True).block is None


@pytest.mark.parametrize(
    "zero", [np.zeros((4, 8), bool), np.ones((4, 8), bool), np.ones(8, bool), np.ones((0, 3), bool)]
)
def test_nothing_to_find(zero: Bools) -> None:
    assert find_structure(zero) == Structure()
    assert str(Structure()) == ""
