"""What the bytes of a model file are: weights by their number format, vectors, the graph."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.ops.file_graph import FileGraph

VECTORS = "biases, scales and other vectors"
GRAPH = "operators, names and the rest"
CODED = "saved by coding without loss (pack)"


@dataclass(frozen=True, kw_only=True)
class SizePart:
    """A share of a file's bytes."""

    what: str
    """ "weights in int8", or one of VECTORS, GRAPH, CODED."""
    numbers: int
    bytes: int
    """Less than 0: what coding takes off."""


def size_parts(graph: FileGraph, size_bytes: int, coded_bytes: int = 0) -> tuple[SizePart, ...]:
    """Assign every byte of a file, or of a packed file that holds this graph.

    Args:
        graph: Its constants.
        size_bytes: Of the file.
        coded_bytes: What packing took off.

    Returns:
        The parts, which add up to `size_bytes`: the largest first, then the rest, then what packing
        took off.
    """
    found: dict[str, list[int]] = {}
    for constant in graph.constants.values():
        vector = constant.size == max(constant.shape, default=1)
        counts = found.setdefault(VECTORS if vector else f"weights in {constant.dtype}", [0, 0])
        counts[0] += constant.size
        counts[1] += _bytes(constant)
    made = [SizePart(what=what, numbers=n, bytes=size) for what, (n, size) in found.items()]
    made.sort(key=lambda part: -part.bytes)
    rest = size_bytes + coded_bytes - sum(part.bytes for part in made)
    made.append(SizePart(what=GRAPH, numbers=0, bytes=rest))
    if coded_bytes:
        made.append(SizePart(what=CODED, numbers=0, bytes=-coded_bytes))
    return tuple(made)


def gained(before: Sequence[SizePart], after: Sequence[SizePart]) -> str:
    """Say what made a file smaller, or larger: fewer weights, fewer bits each, or coding."""
    (n, a), (m, b) = (_weights(parts) for parts in (before, after))
    if not (n and m):
        return ""
    bits_n, bits_m = 8 * a / n, 8 * b / m
    coded = sum(part.bytes for part in after if part.what == CODED)
    whole = sum(part.bytes for part in after)
    words = [
        f"{n:,} -> {m:,} weights ({n / m:.3g}x)",
        f"{bits_n:.3g} -> {bits_m:.3g} bits each ({bits_n / bits_m:.3g}x)",
        *([f"coded without loss ({(whole - coded) / whole:.3g}x)"] if coded else []),
    ]
    return ", ".join(words)


def _weights(parts: Sequence[SizePart]) -> tuple[int, int]:
    own = [part for part in parts if part.what.startswith("weights")]
    return sum(part.numbers for part in own), sum(part.bytes for part in own)


def _bytes(constant: NDArray[Any]) -> int:
    """Count bytes as files hold them: numbers of less than a byte side by side."""
    bits = re.search(r"int([124])$", str(constant.dtype))
    return int(np.ceil(constant.size * int(bits[1]) / 8)) if bits else constant.nbytes
