"""Atoms: single channels, united where they are cut together, blocked where they must stay."""

from collections.abc import Sequence

import numpy as np

Atoms = np.ndarray
"""One int64 an index."""
Dims = dict[int, Atoms]
"""Dimension of a tensor -> atoms along it."""
Port = tuple[str, str]
"""(layer, side): "out", "in", "both" (norms), "depthwise"; "dimN" of a bare parameter."""


class Flow:
    """What was found: the atoms at every port, united, and why some cannot be cut."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.ports: dict[Port, Atoms] = {}
        self.reasons: list[tuple[int, str]] = []

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

    def block(self, atoms: Atoms, reason: str) -> None:
        """Keep atoms from being cut."""
        self.reasons += [(int(atom), reason) for atom in np.unique(atoms)]

    def block_all(self, dims: Sequence[Dims], reason: str) -> None:
        """Keep every atom of some tensors from being cut."""
        for each in dims:
            for atoms in each.values():
                self.block(atoms, reason)

    def port(self, layer: str, side: str, atoms: Atoms) -> Atoms:
        """Note the atoms at a port; a layer that is called again sees the same ones."""
        known = self.ports.setdefault((layer, side), atoms)
        if known is not atoms:
            self.unite(known, atoms)
        return known

    def blocked(self) -> dict[int, str]:
        """Map roots that must not be cut to the first reason found."""
        found: dict[int, str] = {}
        for atom, reason in self.reasons:
            found.setdefault(self.root(atom), reason)
        return found
