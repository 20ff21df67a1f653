"""Arrays in a NumPy .npz file: "arrays:FILE.npz"."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.core.context import SPLITS, Data
from tersor.core.errors import DataError
from tersor.core.sniffing import foreign, zip_problem
from tersor.datasets._batches import CALIBRATION, Batches, of_tensors, roles
from tersor.datasets._check import check

_BUDGET = 16 << 30


def load(place: str) -> Data:
    """Read arrays whose first dimension counts samples.

    Names such as `train_x`, `train_labels`, `test_x` say the split and the name (a parameter of
    forward, or `labels`); where no name starts with a split, all samples are dealt 80 / 10 / 10 to
    train, validation and test. Without calibration arrays, it is the first 256 training samples.
    Floats become float32, whole numbers int64; inputs of type uint8 are taken for pixels and become
    float32 in [0, 1].

    Args:
        place: The .npz file.

    Raises:
        DataError: unreadable, unsafe or too large (before anything is allocated), objects, NaN, or
            arrays of different lengths.
    """
    file = Path(place)
    reason = foreign(file, "a zip archive") or zip_problem(file)
    if not reason:
        reason = _problem(file)
    if reason:
        raise DataError(f"data file {place!r} {reason}")
    where = f"arrays:{place}"
    with np.load(file, allow_pickle=False) as pack:
        try:
            arrays = {name: pack[name] for name in pack.files}
        except (ValueError, zipfile.BadZipFile, OSError, EOFError) as error:
            raise DataError(f"data file {place!r} is damaged: {error}") from error
    tensors = {name: _tensor(array, name, place) for name, array in arrays.items()}
    splits = _splits(tensors, place)
    made: dict[str, Batches] = {
        name: of_tensors(found, shuffle=name == "train") for name, found in splits.items()
    }
    if "calibration" not in made and "train" in splits:
        made["calibration"] = of_tensors({n: t[:CALIBRATION] for n, t in splits["train"].items()})
    return check(Data(**made, origin=where), where)  # type: ignore[arg-type]  # keys are names of splits


def _problem(file: Path) -> str:
    """Read the headers alone; say what makes the arrays unreadable, or nothing."""
    total = 0
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                return f"has an entry that is no array: {entry.filename!r}"
            name = entry.filename.removesuffix(".npy")
            try:
                with archive.open(entry) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        read = np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stream)
                    begin = stream.tell()
            except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
                return f"has a damaged array {name!r}: {str(error).partition(chr(10))[0]}"
            if dtype.hasobject:
                return (
                    f"has an array of Python objects, {name!r}, which could run code; store numbers"
                )
            needed = math.prod(shape) * dtype.itemsize
            if needed != entry.file_size - begin:
                return (
                    f"has an array {name!r} whose shape {shape} needs {needed} bytes, "
                    f"but {entry.file_size - begin} bytes of data"
                )
            total += needed
    if not total:
        return "holds no arrays"
    if total > _BUDGET:
        return f"needs {total / 2**30:.0f} GiB, more than the budget of {_BUDGET >> 30} GiB"
    return ""


def _tensor(array: np.ndarray[Any, Any], name: str, place: str) -> Tensor:
    if array.ndim == 0:
        raise DataError(f"data file {place!r}: {name!r} is a single value, not samples")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array.reshape(len(array), -1)).all(1))[0, 0])
            raise DataError(
                f"data file {place!r}: {name!r} has NaN or infinite values, first in sample {row}"
            )
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if array.dtype.kind == "b":
        return torch.from_numpy(array)
    if array.dtype == np.uint8 and not _is_label(name) and array.ndim > 1:
        return torch.from_numpy(array.astype(np.float32) / 255)
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.ascontiguousarray(array, np.int64))
    raise DataError(f"data file {place!r}: {name!r} has type {array.dtype}, not numbers")


def _splits(tensors: dict[str, Tensor], place: str) -> dict[str, dict[str, Tensor]]:
    """Group the arrays by split; deal them out where no name has one."""
    splits: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        split, _, rest = name.partition("_")
        if split in SPLITS and rest:
            splits.setdefault(split, {})[_name(rest)] = tensor
        else:
            plain[_name(name)] = tensor
    if splits and plain:
        raise DataError(
            f"data file {place!r}: {', '.join(map(repr, plain))} name no split, but others do; "
            f"write SPLIT_NAME with one of {', '.join(SPLITS)}"
        )
    for split, found in (splits or {"": plain}).items():
        lengths = {name: len(tensor) for name, tensor in found.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name!r} {count}" for name, count in lengths.items())
            raise DataError(
                f"data file {place!r}: arrays{f' of split {split!r}' * bool(split)} have different "
                f"lengths: {said}"
            )
    if splits:
        return splits
    labels = plain.get("labels")
    classes = None
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        classes = labels.tolist()
    count = len(next(iter(plain.values())))
    dealt = roles(count, classes)
    if not len(dealt["test"]):
        raise DataError(
            f"data file {place!r} has {count} samples, too few to deal out; name the splits"
        )
    return {
        split: {name: tensor[torch.from_numpy(rows)] for name, tensor in plain.items()}
        for split, rows in dealt.items()
        if len(rows)
    }


def _is_label(name: str) -> bool:
    return name.rpartition("_")[2] in ("labels", "label")


def _name(name: str) -> str:
    return "labels" if name == "label" else name
