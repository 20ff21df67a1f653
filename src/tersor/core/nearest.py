"""Which known name a misspelt word is near to, if any: better none than one far away."""

import difflib
import re
from collections.abc import Iterable

_ALIKE = 0.7
"""Ratio of difflib from which longer words are near: "onnxrt" is short for "onnxruntime"."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the name that a word most likely stands for; the first of equals, None if none is.

    Near are names that are the word but for one mistake in four letters, that it begins or is a
    part of, and those that begin as it does and are much alike.
    """
    far = {name: _distance(word, name) for name in known}
    near = {name: distance for name, distance in far.items() if distance is not None}
    return min(near, key=lambda name: near[name]) if near else None


def _distance(word: str, name: str) -> tuple[int, int, float] | None:
    """Say how near a name is: the kind of nearness, inside it, as written; None where it is far."""
    a, b = (re.sub(r"[-_ ]", "", text.lower()) for text in (word, name))
    alike = difflib.SequenceMatcher(None, word, name).ratio()
    long_enough = min(len(a), len(b)) >= 3
    if a == b:
        return 0, 0, -alike
    if long_enough and b.startswith(a):
        return 1, len(b), -alike
    typos = _typos(a, b)
    if typos <= max(1, min(len(a), len(b)) // 4):
        return 2, typos, -alike
    if long_enough and a.startswith(b):
        return 3, -len(b), -alike
    if long_enough and word.lower() in re.split(r"[-_.: ]", name.lower()):
        return 4, 0, -alike
    return (5, 0, -alike) if alike >= _ALIKE and a[:2] == b[:2] else None


def _typos(a: str, b: str) -> int:
    """Count letters to insert, delete, replace, or swap with the next one, to make `b` of `a`.

    Source:
        Damerau, A technique for computer detection and correction of spelling errors, CACM 7(3),
        1964; in the restricted form, where no part is changed twice.
    """
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
