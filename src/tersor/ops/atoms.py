"""Atoms: single channels, united where they are cut together, blocked where they must stay."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Atoms = np.ndarray
"""One int64 an index."""
Dims = dict[int, Atoms]
"""Dimension of a tensor -> atoms along it."""
Value = Dims | tuple["Value", ...]
"""What a node of the graph holds; an operator that returns several tensors gives a tuple."""
Port = tuple[str, str]
"""(layer, side): "out", "in", "both" (norms), "norm" (layer norms), "depthwise", "hidden";
"dimN" of a bare parameter."""
Path = tuple[str | int, ...]
"""Where a number is written in a call: ("args", 1, 2), ("kwargs", "scale")."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number in a call that has to change, or must not change, when atoms go."""

    node: str
    path: Path
    atoms: Atoms
    value: Callable[[int], Any]
    """Kept atoms -> what has to be written."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A call that sums over channels: a layer that reads them, or a product."""

    node: str
    operand: str
    dim: int
    atoms: Atoms


@dataclass(frozen=True, kw_only=True)
class Work:
    """Multiply-accumulates of one call for one sample: a constant times numbers of channels."""

    constant: float
    factors: tuple[Atoms, ...]


class Flow:
    """What was found: the atoms at every port, united, and why some cannot be cut."""

    def __init__(self, choices: Mapping[str, int]) -> None:
        self.choices = choices
        """Node that splits a dimension in several -> which of them, from the last, may shrink."""
        self.parent: list[int] = []
        self.ports: dict[Port, Atoms] = {}
        self.reasons: list[tuple[int, str]] = []
        self.numbers: list[Number] = []
        self.reads: list[Read] = []
        self.work: list[Work] = []
        self.batch = 1
        """Samples in the example: what a call does is shared by so many."""
        self.splits: dict[str, tuple[int, Atoms]] = {}
        """Node that splits a dimension -> in how many, and the atoms there."""
        self.calls: dict[str, str] = {}
        """Node that calls F.layer_norm with a layer's tensors -> the layer."""
        self.heads: list[Atoms] = []
        """What runs along the heads of attention."""
        self.means: list[tuple[str, Atoms]] = []
        """Node that takes a mean over channels, which must go on to divide by all of them."""
        self.derived: dict[Any, Atoms] = {}
        """Node that holds a number -> the atoms whose count it was computed from."""
        self._table = np.zeros(0, np.int64)

    def new(self, count: int) -> Atoms:
        """Make atoms."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, atom: int) -> int:
        """Return the atom that stands for all that are united with `atom`."""
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def unite(self, a: Atoms, b: Atoms) -> None:
        """Make atoms at the same index one."""
        assert len(a) == len(b)
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((self.root(left), self.root(right)))
            self.parent[high] = low

    def unite_rows(self, atoms_RC: np.ndarray) -> Atoms:
        """Make all rows one, so that what stays is a rectangle; return the first row."""
        for row in atoms_RC[1:]:
            self.unite(atoms_RC[0], row)
        first: Atoms = atoms_RC[0]
        return first

    def block(self, atoms: Atoms, reason: str) -> None:
        """Keep atoms from being cut."""
        self.reasons += [(int(atom), reason) for atom in np.unique(atoms)]

    def block_all(self, values: Iterable[Value], reason: str) -> None:
        """Keep every atom of some tensors from being cut."""
        for each in values:
            if isinstance(each, tuple):
                self.block_all(each, reason)
            else:
                for atoms in each.values():
                    self.block(atoms, reason)

    def port(self, layer: str, side: str, atoms: Atoms) -> Atoms:
        """Note the atoms at a port; a layer that is called again sees the same ones."""
        known = self.ports.setdefault((layer, side), atoms)
        if known is not atoms:
            self.unite(known, atoms)
        return known

    def made(self, layer: str, side: str, count: int) -> Atoms:
        """Return the atoms that a layer makes, the same ones each time that it is called."""
        known = self.ports.get((layer, side))
        return self.port(layer, side, self.new(count)) if known is None else known

    def blocked(self) -> dict[int, str]:
        """Map roots that must not be cut to the first reason found."""
        found: dict[int, str] = {}
        for atom, reason in self.reasons:
            found.setdefault(self.root(atom), reason)
        return found

    def close(self) -> None:
        """Fix who stands for whom, once the whole graph was walked."""
        self._table = np.array([self.root(atom) for atom in range(len(self.parent))], np.int64)

    def roots(self, atoms: Atoms) -> Atoms:
        """Return the root of each of some atoms."""
        found: Atoms = self._table[atoms]
        return found

    def lost(self, gone: Collection[int]) -> np.ndarray:
        """Tell of each atom whether its root is gone."""
        marks = np.zeros(len(self.parent), bool)
        marks[list(gone)] = True
        found: np.ndarray = marks[self._table]
        return found
