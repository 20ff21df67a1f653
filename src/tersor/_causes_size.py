"""Why a file is not smaller: what the bytes of its weights hold twice, or in vain."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.packing import is_packed
from tersor.ops.file_graph import FileGraph

_SMALLEST = 1024
"""Numbers; smaller constants do not matter."""
_ZEROS = 0.3
_LEVELS = 256

Found = tuple[str, float, str]
"""Cause, share of the file's bytes, evidence."""


def size_causes(file: Path, graph: FileGraph, size_bytes: int) -> list[Found]:
    """Assign bytes of a file to what they hold in vain.

    A weight counts under one cause: the one that takes most of it.
    """
    taken: dict[str, float] = {}
    counts: dict[str, list[float]] = {}
    seen: set[str] = set()
    large = [c for c in graph.constants.values() if c.size >= _SMALLEST]
    integers = sum(c.nbytes for c in large if c.dtype.kind in "iu" and c.ndim > 1)
    packed = is_packed(file)
    for constant in large:
        digest = hashlib.sha256(constant.tobytes() + str(constant.shape).encode()).hexdigest()
        ways: dict[str, tuple[float, float]] = {}
        if digest in seen:
            ways["duplicates"] = (constant.nbytes, 1)
        seen.add(digest)
        zeros = float((constant == 0).mean())
        floats = constant.dtype.kind == "f"
        if zeros >= _ZEROS and not packed:
            ways["stored_zeros"] = (constant.nbytes - _coded_bytes(constant, zeros), zeros)
        if floats and not packed:
            levels = _levels(constant)
            if levels <= _LEVELS:
                ways["float_storage"] = (constant.nbytes - constant.size, levels)
        if floats and integers and constant.ndim > 1 and not ways:
            ways["float_layers"] = (constant.nbytes * (1 - 1 / constant.itemsize), 1)
        if ways:
            cause = max(ways, key=lambda name: ways[name][0])
            taken[cause] = taken.get(cause, 0.0) + ways[cause][0]
            counts.setdefault(cause, []).append(ways[cause][1])
    return [
        (cause, min(saved / size_bytes, 1.0), _said(cause, counts[cause], saved, size_bytes))
        for cause, saved in taken.items()
    ]


def _coded_bytes(constant: NDArray[Any], zeros: float) -> float:
    """Estimate the room of a weight whose zeros are coded: Shannon's bound for where they are."""
    rest = 1 - zeros
    bits = -sum(p * math.log2(p) for p in (zeros, rest) if p > 0)
    return constant.size * (bits / 8 + rest * constant.itemsize)


def _levels(constant: NDArray[Any]) -> int:
    """Count distinct values: of the whole, or, where fewer, of the fullest output."""
    rows = constant.reshape(len(constant), -1) if constant.ndim > 1 else constant[None]
    if rows.shape[1] >= 8 * _LEVELS:
        return max(len(np.unique(row)) for row in rows)
    return len(np.unique(constant))


def _said(cause: str, counts: list[float], saved: float, size_bytes: int) -> str:
    of = f"{saved / 1e6:.2f} of {size_bytes / 1e6:.2f} MB"
    many = f"{len(counts)} weight{'s' if len(counts) > 1 else ''}"
    if cause == "duplicates":
        return f"{many} with the same content as another, {of}"
    if cause == "stored_zeros":
        return f"{many} with {100 * float(np.mean(counts)):.0f} % zeros, stored in full: {of}"
    if cause == "float_storage":
        return f"{many} with at most {max(counts):.0f} values, stored as floats: {of}"
    return f"{many} in float beside others in integers; as int8 they would save {of}"
