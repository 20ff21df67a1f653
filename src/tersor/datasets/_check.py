"""Check batches as they stream, so that a mistake names its split, batch and entry."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tersor.core.context import SPLITS, Batch, Data
from tersor.core.errors import DataError


def check(data: Data, where: str) -> Data:
    """Check the first batch of each split now, and every batch when it is used.

    Args:
        data: What the user gave. A training split of length 0 counts as none.
        where: Its name, for messages.

    Returns:
        The same data; a split passes on what is asked of it (`seed`, for instance).

    Raises:
        DataError: a split is empty, can be read only once, or its first batch is wrong.
    """
    if _is_nothing(data.train):  # data for measuring alone
        data = replace(data, train=None)
    found = {name: getattr(data, name) for name in SPLITS if getattr(data, name) is not None}
    if not found:
        raise DataError(f"data {where!r} have no split; give some of {', '.join(SPLITS)}")
    checked = {name: _split(split, name, where) for name, split in found.items()}
    _check_agreement(checked, where)
    return replace(data, **checked)  # type: ignore[arg-type]  # keys are names of splits


class Checked:
    """A split that checks each batch against its first one."""

    def __init__(self, batches: Iterable[Batch], split: str, where: str) -> None:
        """Wrap `batches`, the split called `split` of the data called `where`."""
        super().__setattr__("batches", batches)
        super().__setattr__("place", f"data {where!r}, split {split!r}")
        super().__setattr__("kind", None)

    def __iter__(self) -> Iterator[Batch]:
        index = 0
        iterator = self._start()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                break
            except DataError:
                raise
            except Exception as error:
                raise DataError(
                    f"{self.place}, batch {index}: reading it failed: {type(error).__name__}: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from error
            self._check(batch, index)
            yield batch
            index += 1
        if not index:
            raise DataError(f"{self.place} is empty")

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # not set yet: while it is being copied
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.batches, name, value)

    def _start(self) -> Iterator[Batch]:
        iterator: Iterator[Batch]
        try:
            iterator = iter(self.batches)
        except TypeError:
            kind = type(self.batches).__name__
            raise DataError(f"{self.place} is {kind}, not a sequence of batches") from None
        if iterator is self.batches:
            raise DataError(
                f"{self.place} is a {type(self.batches).__name__}, which can be read only once; "
                "give a list, or an object whose __iter__ starts again"
            )
        return iterator

    def _check(self, batch: Any, index: int) -> None:
        where = f"{self.place}, batch {index}"
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{where} is {type(batch).__name__}, not a mapping of forward's parameters (and "
                "labels) to tensors"
            )
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise DataError(f"{where}: {name!r} is {type(value).__name__}, not a tensor")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise DataError(f"{where}: {name!r} has NaN or infinite values")
        _check_rows(batch, where)
        kind = {name: (value.dtype, value.dim()) for name, value in batch.items()}
        if self.kind is None:
            super().__setattr__("kind", kind)
        elif kind != self.kind:
            raise DataError(f"{where}: {_difference(self.kind, kind)}")


def _is_nothing(batches: Any) -> bool:
    return isinstance(batches, Sized) and len(batches) == 0


def _split(batches: Any, name: str, where: str) -> Checked:
    """Read the first batch twice: the second pass shows what can be read only once."""
    checked = Checked(batches, name, where)
    next(iter(checked))
    try:
        next(iter(checked))
    except DataError as error:
        raise DataError(
            f"{checked.place} gives nothing when it is read again; every pass must give the same "
            "batches"
        ) from error
    return checked


def _check_rows(batch: Mapping[str, Tensor], where: str) -> None:
    """Every input must hold the same number of samples. Labels may be several a sample (boxes)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not inputs:
        raise DataError(f"{where} has no inputs; name them as forward's parameters")
    rows = {name: len(value) if value.dim() else 0 for name, value in inputs.items()}
    if min(rows.values()) == 0:
        raise DataError(f"{where}: {min(rows, key=lambda n: rows[n])!r} holds no samples")
    if len(set(rows.values())) > 1:
        said = ", ".join(f"{name!r} {count}" for name, count in rows.items())
        raise DataError(f"{where}: its inputs hold different numbers of samples: {said}")
    count = next(iter(rows.values()))
    labels = batch.get("labels")
    if labels is not None and count > 1 and (labels.dim() == 0 or len(labels) != count):
        given = len(labels) if labels.dim() else 1
        raise DataError(f"{where}: {count} samples but {given} labels")


def _check_agreement(checked: Mapping[str, Checked], where: str) -> None:
    """All splits must feed the same parameters; each may have labels or not."""
    kinds = {name: split.kind for name, split in checked.items()}
    first, kind = next(iter(kinds.items()))
    for name, other in kinds.items():
        inputs = {k: v for k, v in kind.items() if k != "labels"}
        others = {k: v for k, v in other.items() if k != "labels"}
        if inputs != others:
            raise DataError(
                f"data {where!r}: splits {first!r} and {name!r} differ: "
                f"{_difference(inputs, others)}"
            )


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say how the entries of a batch differ from those expected."""
    for name in [*one, *other]:
        if name not in other:
            return f"{name!r} is missing"
        if name not in one:
            return f"{name!r} is not in the first batch"
        if one[name] != other[name]:
            return f"{name!r} is {_say(other[name])}, before it was {_say(one[name])}"
    raise AssertionError("the entries do not differ")


def _say(kind: tuple[torch.dtype, int]) -> str:
    return f"{str(kind[0]).removeprefix('torch.')} of {kind[1]} dimensions"
