"""Layers: which layers a step touches, as patterns over dotted names."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A choice of layers. In a recipe: `layers: ["encoder.*", "!*.head"]`."""

    patterns: tuple[str, ...] = ("*",)
    """fnmatch patterns over dotted layer names; one that starts with "!" excludes."""

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("layers needs at least one pattern")

    def holds(self, name: str) -> bool:
        """Tell whether the layer called `name` is chosen."""
        wanted = [p for p in self.patterns if not p.startswith("!")] or ["*"]
        unwanted = [p[1:] for p in self.patterns if p.startswith("!")]
        return any(fnmatch.fnmatchcase(name, p) for p in wanted) and not any(
            fnmatch.fnmatchcase(name, p) for p in unwanted
        )

    def without(self, *names: str) -> "Layers":
        """Return the same choice without the layers called `names`."""
        return Layers(patterns=(*self.patterns, *(f"!{name}" for name in names)))

    def unused(self, names: Iterable[str]) -> tuple[str, ...]:
        """List the patterns that match none of `names`: most likely misspelt."""
        known = list(names)
        return tuple(
            p
            for p in self.patterns
            if not any(fnmatch.fnmatchcase(n, p.lstrip("!")) for n in known)
        )
