"""The settings that all decompositions share: how ranks are chosen, and what weaker means."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from tersor.core.layers import Layers

DEFAULT_MACS = 0.7
"""Where no way to choose the ranks is given."""
_MILDEST = 0.95
"""A share above which hardly anything would change."""


class Settings(Protocol):
    """What the settings of every decomposition hold."""

    @property
    def energy(self) -> float | None:
        """Share of each layer's energy that is kept at least."""

    @property
    def macs(self) -> float | None:
        """Share of the network's multiply-accumulates that may stay."""

    @property
    def parameters(self) -> float | None:
        """Share of the network's parameters that may stay."""

    @property
    def latency(self) -> float | None:
        """Share of the measured latency that may stay."""

    @property
    def multiple(self) -> int:
        """Ranks are multiples of it."""

    @property
    def convert(self) -> Literal["faster", "all"]:
        """Whether layers are timed."""

    @property
    def layers(self) -> Layers:
        """Which layers."""


SHARES = ("energy", "macs", "parameters", "latency")


def check(config: Settings, **fixed: object) -> None:
    """Refuse settings that contradict one another.

    Args:
        config: Settings.
        fixed: Ways to choose ranks that only some techniques have; None where not given.

    Raises:
        ValueError: says which.
    """
    given = [name for name in SHARES if getattr(config, name) is not None]
    given += [name for name, value in fixed.items() if value not in (None, False)]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join((*SHARES, *fixed))}, not {' and '.join(given)}")
    for name in SHARES:
        value = getattr(config, name)
        if name == "energy" and value is not None and not 0 < value <= 1:
            raise ValueError(f"energy must be in (0, 1], got {value}")
        if name != "energy" and value is not None and not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}")
    rank = fixed.get("rank")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if config.multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {config.multiple}")


def weaker(config: Settings) -> dict[str, Any] | None:
    """Return what changes in milder settings: about 30 % less goes, half the energy is lost.

    None where ranks are fixed, or hardly anything would change.
    """
    wanted: Mapping[str, float | None] = {name: getattr(config, name) for name in SHARES}
    if config.energy is not None:
        kept = round(1 - (1 - config.energy) / 2, 4)
        return {"energy": kept} if kept < 0.995 else None
    for name, share in wanted.items():
        if share is not None:
            milder = round(1 - 0.7 * (1 - share), 3)
            return {name: milder} if milder < _MILDEST else None
    return {"macs": round(1 - 0.7 * (1 - DEFAULT_MACS), 3)}
