"""Batches of a data set whose samples are read by their row."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tersor.core.context import Batch

SIZE = 64
CALIBRATION = 256
"""Samples of the training split that calibration uses, where none are given."""


class Batches:
    """A re-iterable of batches; every pass gives the same ones.

    Setting `seed` gives another order where the split is shuffled.
    """

    def __init__(
        self, read: Callable[[np.ndarray], Batch], count: int, *, shuffle: bool = False
    ) -> None:
        """Read samples with `read(rows)`; there are `count` of them."""
        self.read, self.count, self.shuffle, self.seed = read, count, shuffle, 0

    def __len__(self) -> int:
        return -(-self.count // SIZE)

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng(self.seed).permutation(self.count)
        for start in range(0, self.count, SIZE):
            yield self.read(order[start : start + SIZE])


def of_tensors(tensors: Mapping[str, Tensor], *, shuffle: bool = False) -> Batches:
    """Make batches of tensors that hold one sample a row."""

    def read(rows: np.ndarray) -> Batch:
        chosen = torch.from_numpy(rows)
        return {name: tensor[chosen] for name, tensor in tensors.items()}

    return Batches(read, len(next(iter(tensors.values()))), shuffle=shuffle)


def roles(
    count: int, labels: Sequence[int] | None = None, seed: int = 0, *, parts: int = 10
) -> dict[str, np.ndarray]:
    """Deal samples to train, validation and test (of each class, where known).

    Validation and test get one part in `parts` each. The same count, labels and seed give the same
    rows, in ascending order.
    """
    rng = np.random.default_rng(seed)
    kinds = np.zeros(count, np.int64) if labels is None else np.asarray(labels)
    dealt: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for kind in np.unique(kinds):
        rows = rng.permutation(np.flatnonzero(kinds == kind))
        part = len(rows) // parts
        dealt["validation"].append(rows[:part])
        dealt["test"].append(rows[part : 2 * part])
        dealt["train"].append(rows[2 * part :])
    return {name: np.sort(np.concatenate(parts)) for name, parts in dealt.items()}
