"""Find the names that the entries of a file would have in a network."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

_SYNONYMS = {
    "gamma": "weight",
    "kernel": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""Last parts of names in TensorFlow, and in PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Rename:
    """Something of the file's names that stands for something of the network's."""

    old: str
    new: str


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
    several fit, the more similar name decides; where none is more similar, nothing is said.

    Args:
        given: Of the file.
        wanted: Of the network.
        unexpected: Names in the file only.
        missing: Names in the network only.
    """
    theirs, ours = _groups(unexpected), _groups(missing)
    scored = []
    for a, group in theirs.items():
        for b, other in ours.items():
            if _last(a) == _last(b) and [given[n] for n in group] == [wanted[n] for n in other]:
                scored.append((_similar(a, b), a, b))
    scored.sort(key=lambda each: each[0], reverse=True)
    pairs: list[tuple[str, str]] = []
    used: set[str] = set()
    for score, a, b in scored:
        free = [s for s in scored if {s[1], s[2]} & {a, b} and not {s[1], s[2]} & used]
        rivals = [s for s in free if s[0] == score and s[1:] != (a, b)]
        if {a, b} & used or rivals:
            continue
        used |= {a, b}
        pairs += zip(theirs[a], ours[b], strict=True)
    order = {name: i for i, name in enumerate(wanted)}
    return sorted(pairs, key=lambda pair: order[pair[1]])


def layer_of(name: str) -> str:
    """Return the layer that an entry belongs to."""
    return name.rpartition(".")[0] or name


def _cuts(name: str) -> list[tuple[str, str]]:
    """Split a dotted name at each dot."""
    parts = name.split(".")
    return [(".".join(parts[:i]) + ".", ".".join(parts[i:])) for i in range(1, len(parts))]


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ in numbers only; each group in the order of the numbers."""
    groups: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for name in names:
        numbers = tuple(int(n) for n in re.findall(r"\d+", name))
        groups.setdefault(re.sub(r"\d+", "#", name), []).append((numbers, name))
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
