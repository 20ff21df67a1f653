"""What the zeros of a weight have in common: N of M, blocks, whole rows and columns."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# O outputs, I inputs, K places of a kernel (1 in a matrix)

GROUPS = (4, 8, 16)
"""Sizes M of the groups in which at most N weights are not zero."""
_SIDES = (1, 2, 4, 8, 16, 32)
_USED = 0.6
"""Share of the places that a pattern allows, N of M, in which there is a weight."""
_ROUNDED = 0.05
"""Share of zeros that rounding to codes makes inside blocks that were kept."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What was found in one weight; rows are its outputs, columns its inputs."""

    n_of_m: tuple[int, int] | None = None
    """(N, M): of each M neighboring inputs at most N are not zero; the tightest such pair, up to
    3:4. None where it allows far more weights than there are: zeros make patterns by chance."""
    block: tuple[int, int] | None = None
    """(outputs, inputs): the largest block for which zeros fill whole blocks, at each place of a
    kernel; None where they are single, or fill whole rows and columns."""
    zero_rows: int = 0
    """Outputs without a weight."""
    zero_columns: int = 0
    """Inputs without a weight, at all places of a kernel."""

    def __str__(self) -> str:
        found = []
        if self.n_of_m:
            found.append(f"{self.n_of_m[0]}:{self.n_of_m[1]}")
        if self.block:
            found.append(f"{self.block[0]}x{self.block[1]} blocks")
        if self.zero_rows:
            found.append(f"{self.zero_rows} rows")
        if self.zero_columns:
            found.append(f"{self.zero_columns} columns")
        return ", ".join(found)


def find_structure(
    zero: NDArray[np.bool_], *, input_axis: int = 1, rounded: bool = False
) -> Structure:
    """Look for structure in the zeros of a weight.

    Args:
        zero: Where a weight is zero; a matrix or kernel of at least two dimensions.
        input_axis: 1 for (outputs, inputs, ...), 0 for (inputs, outputs, ...).
        rounded: Weights are codes: some that were kept are zero, too.

    Returns:
        What was found; nothing for a weight without zeros, or of zeros only.
    """
    if zero.ndim < 2 or not zero.any() or zero.all():
        return Structure()
    ordered = np.moveaxis(np.swapaxes(zero, 0, 1) if input_axis == 0 else zero, 1, -1)
    zero_OKI = ordered.reshape(ordered.shape[0], -1, ordered.shape[-1])
    rows_O, columns_I = zero_OKI.all((1, 2)), zero_OKI.all((0, 1))
    inside_OKI = zero_OKI[~rows_O][:, :, ~columns_I]
    return Structure(
        n_of_m=_n_of_m(zero_OKI),
        block=_block(zero_OKI, rounded) if inside_OKI.any() else None,
        zero_rows=int(rows_O.sum()),
        zero_columns=int(columns_I.sum()),
    )


def _n_of_m(zero_OKI: NDArray[np.bool_]) -> tuple[int, int] | None:
    found = []
    for size in GROUPS:
        if zero_OKI.shape[-1] % size == 0:
            kept = size - zero_OKI.reshape(-1, size).sum(1).min()
            if 4 * kept <= 3 * size and size * (1 - zero_OKI.mean()) >= _USED * kept:
                found.append((int(kept), size))
    return min(found, key=lambda pair: (pair[0] / pair[1], pair[1]), default=None)


def _block(zero_OKI: NDArray[np.bool_], rounded: bool) -> tuple[int, int] | None:
    outputs, places, inputs = zero_OKI.shape
    shapes = [
        (rows, columns)
        for rows in _SIDES
        for columns in _SIDES
        if rows * columns > 1 and outputs % rows == 0 and inputs % columns == 0
    ]
    # of equal areas the squarest
    for rows, columns in sorted(shapes, key=lambda s: (-s[0] * s[1], max(s))):
        blocks = zero_OKI.reshape(outputs // rows, rows, places, inputs // columns, columns)
        zeros = blocks.sum((1, 4))
        area = rows * columns
        whole = zeros == area
        single, kept = int(zeros[~whole].sum()), int(area * (~whole).sum())
        if whole.any() and single <= (min(_ROUNDED * kept, area * whole.sum()) if rounded else 0):
            return rows, columns
    return None
