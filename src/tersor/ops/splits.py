"""Which samples decide and which report: the fixed halves of `test`, and leaks between splits."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from tersor.core.context import Batch, Data
from tersor.core.errors import DataError


class Rows:
    """Chosen samples of a split, in ascending order, in batches of its first batch's size."""

    batches: Iterable[Batch]
    rows: np.ndarray

    def __init__(self, batches: Iterable[Batch], rows: np.ndarray) -> None:
        self.batches, self.rows = batches, np.sort(rows)

    def __iter__(self) -> Iterator[Batch]:
        wanted = set(self.rows.tolist())
        waiting: list[dict[str, torch.Tensor]] = []
        held, start, size = 0, 0, 0
        for batch in self.batches:
            count = rows_of(batch)
            size = size or count
            here = [i for i in range(count) if start + i in wanted]
            start += count
            if here:
                waiting.append({name: tensor[here] for name, tensor in batch.items()})
                held += len(here)
            if held >= size:
                joined = _join(waiting)
                yield {name: tensor[:size] for name, tensor in joined.items()}
                waiting = [{name: tensor[size:] for name, tensor in joined.items()}]
                held -= size
        if held:
            yield _join(waiting)

    def __len__(self) -> int:
        first = next(iter(self.batches))
        return -(-len(self.rows) // rows_of(first))


class Picked:
    """Chosen batches of a split whose batches hold one sample each."""

    batches: Iterable[Batch]
    rows: set[int]

    def __init__(self, batches: Iterable[Batch], rows: np.ndarray) -> None:
        self.batches, self.rows = batches, set(rows.tolist())

    def __iter__(self) -> Iterator[Batch]:
        return (batch for i, batch in enumerate(self.batches) if i in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def rows_of(batch: Batch) -> int:
    """Count the samples of a batch, by its first input."""
    return len(next(tensor for name, tensor in batch.items() if name != "labels"))


def split_validation(data: Data) -> tuple[Data, str]:
    """Set a fixed half of `test` aside as `validation`.

    The half is the samples `numpy.random.default_rng(0).permutation(n)[: n // 2]`.

    Returns:
        The data with both splits, and a sentence about it for the report.

    Raises:
        DataError: there is no test split, or it has fewer than two samples.
    """
    if data.test is None:
        raise DataError("the data have no split 'test'")
    sizes = [rows_of(batch) for batch in data.test]
    count = sum(sizes)
    if count < 2:
        raise DataError(f"the split 'test' has {count} samples; at least two are needed")
    order = np.random.default_rng(0).permutation(count)
    kind = Picked if set(sizes) == {1} else Rows
    made = replace(
        data,
        validation=kind(data.test, order[: count // 2]),
        test=kind(data.test, order[count // 2 :]),
    )
    note = (
        f"no validation split was given: {count // 2} of the {count} test samples, chosen by a "
        "fixed seed, decide, and the others report"
    )
    return made, note


def decide_on(data: Data) -> tuple[Data, list[str]]:
    """Make sure that decisions and the final figures come from different samples.

    Raises:
        DataError: there is no split `test`.
    """
    if data.test is None:
        raise DataError("the data have no split 'test'; the final figures are measured on it")
    warnings = leaks(data)
    if data.validation is None:
        data, note = split_validation(data)
        warnings.append(note)
    return data, warnings


def leaks(data: Data) -> list[str]:
    """Warn of splits that must differ and have the same samples in the same order."""
    hashes = {name: _digest(getattr(data, name)) for name in ("calibration", "validation", "test")}
    return [
        f"the splits {a!r} and {b!r} hold the same samples: the figures will flatter"
        for a, b in (("calibration", "test"), ("validation", "test"), ("calibration", "validation"))
        if hashes[a] and hashes[a] == hashes[b]
    ]


def _digest(batches: Iterable[Batch] | None) -> str | None:
    if batches is None:
        return None
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            if name != "labels":
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _join(parts: Sequence[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
