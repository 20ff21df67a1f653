"""Find the names that the entries of a file would have in a network."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

_SYNONYMS = {
    "gamma": "weight",
    "kernel": "weight",
    "beta": "bias",
    "in_proj_weight": "weight",
    "in_proj_bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""Last parts of names: TensorFlow's, and those of nn.MultiheadAttention."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A prefix that the file's names have too much, or lack."""

    old: str = ""
    """To be removed."""
    new: str = ""
    """To be added."""

    def __str__(self) -> str:
        """Say what is done."""
        if self.old:
            return f"prefix {self.old!r} removed from its names"
        return f"prefix {self.new!r} added to its names"

    def apply(self, name: str, unexpected: Iterable[str]) -> str:
        """Return a name as the network has it; only unexpected ones change."""
        if name not in unexpected or not name.startswith(self.old):
            return name
        return self.new + name.removeprefix(self.old)


def find_prefix(
    given: Shapes, wanted: Shapes, unexpected: Sequence[str], missing: Sequence[str]
) -> Prefix | None:
    """Find the prefix to remove from, or add to, the file's names, where exactly one fits best.

    Args:
        given: Of the file.
        wanted: Of the network.
        unexpected: Names in the file only.
        missing: Names in the network only.
    """
    votes: Counter[tuple[str, str]] = Counter()
    absent, strange = set(missing), set(unexpected)
    for name in unexpected:
        for start, rest in _cuts(name):
            if rest in absent:
                votes[start, ""] += 1 + (given[name] == wanted[rest])
    for name in missing:
        for start, rest in _cuts(name):
            if rest in strange:
                votes["", start] += 1 + (given[rest] == wanted[name])
    ranked = votes.most_common(2)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    (old, new), count = ranked[0]
    return Prefix(old=old, new=new) if count >= min(len(strange), len(absent)) else None


def find_renames(
    given: Shapes, wanted: Shapes, unexpected: Sequence[str], missing: Sequence[str]
) -> list[tuple[str, str]]:
    """Pair unexpected with missing entries, where numbered layers agree shape by shape.

    Names that differ only in their numbers are one group; a group of the file is a group of the
    network where both have as many entries, with the same shapes in the order of the numbers. Where
    several fit, the more similar name decides; as many equally similar ones on both sides are
    paired in order; else nothing is said. What is left is tried with the numbers of the layers
    themselves (conv1, conv2) kept apart and, where most are paired, entry by entry.

    Args:
        given: Of the file.
        wanted: Of the network.
        unexpected: Names in the file only.
        missing: Names in the network only.
    """
    order = {name: i for i, name in enumerate(wanted)}
    pairs: list[tuple[str, str]] = []
    for mark in (pattern_of, _outer_numbers, str):
        if mark is str and 2 * len(pairs) < min(len(unexpected), len(missing)):
            break
        done = {name for pair in pairs for name in pair}
        theirs = _groups((n for n in unexpected if n not in done), mark)
        ours = _groups((n for n in missing if n not in done), mark)
        edges = {
            (a, b): _similar(a, b)
            for a, group in theirs.items()
            for b, other in ours.items()
            if _last(a) == _last(b) and [given[n] for n in group] == [wanted[n] for n in other]
        }
        for a, b in _matched(edges, {b: order[group[0]] for b, group in ours.items()}):
            pairs += zip(theirs[a], ours[b], strict=True)
    return sorted(pairs, key=lambda pair: order[pair[1]])


def _matched(
    edges: Mapping[tuple[str, str], tuple[int, float]], order: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Choose among the pairs that are possible, the most similar first."""
    chosen: list[tuple[str, str]] = []
    free = dict(edges)
    while free:
        best = max(free.values())
        a, b = next(pair for pair, score in free.items() if score == best)
        left = sorted({x for (x, y), score in free.items() if score == best and y == b})
        right = sorted(
            {y for (x, y), score in free.items() if score == best and x == a}, key=order.__getitem__
        )
        whole = all(free.get((x, y)) == best for x in left for y in right)
        if whole and len(left) == len(right):
            chosen += zip(left, right, strict=True)
        gone = {*left, *right}
        free = {pair: score for pair, score in free.items() if not gone & set(pair)}
    return chosen


def layer_of(name: str) -> str:
    """Return the layer that an entry belongs to."""
    start, _, end = name.rpartition(".")
    for kind in ("_weight", "_bias"):  # of nn.MultiheadAttention: in_proj_weight
        if end.endswith(kind):
            return f"{start}.{end.removesuffix(kind)}" if start else end.removesuffix(kind)
    return start or name


def _cuts(name: str) -> list[tuple[str, str]]:
    """Split a dotted name at each dot."""
    parts = name.split(".")
    return [(".".join(parts[:i]) + ".", ".".join(parts[i:])) for i in range(1, len(parts))]


def pattern_of(name: str) -> str:
    """Return a name with a mark for each number."""
    return re.sub(r"\d+", "#", name)


def _outer_numbers(name: str) -> str:
    """Leave the numbers of the layer itself."""
    outer, _, entry = name.rpartition(".")
    above, _, layer = outer.rpartition(".")
    own = "#" if layer.isdigit() else layer
    return ".".join(part for part in (re.sub(r"\d+", "#", above), own, entry) if part)


def _groups(names: Iterable[str], mark: Callable[[str], str]) -> dict[str, list[str]]:
    """Group names of the same mark; each group in the order of the numbers."""
    groups: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for name in names:
        numbers = tuple(int(n) for n in re.findall(r"\d+", name))
        groups.setdefault(mark(name), []).append((numbers, name))
    return {key: [name for _, name in sorted(group)] for key, group in groups.items()}


def _last(name: str) -> str:
    end = name.rpartition(".")[2]
    return _SYNONYMS.get(end, end)


def _similar(one: str, other: str) -> tuple[int, float]:
    """Count the parts that two names share, from the end, then anywhere."""
    a, b = ([_SYNONYMS.get(p, p) for p in name.split(".")] for name in (one, other))
    end = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        end += 1
    words = [set(re.findall(r"[a-z]+", name.lower())) for name in (one, other)]
    return end, len(words[0] & words[1]) / max(len(words[0] | words[1]), 1)
