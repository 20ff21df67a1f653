"""Goal: what to improve, within which limits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tersor.core.metric import Better

_FACTORS = {
    "ms": {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3},
    "B": {
        "B": 1,
        "kB": 1e3,
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
    },
    "1/s": {"1/s": 1.0, "/s": 1.0},
    "J": {"J": 1.0, "mJ": 1e-3},
    "s": {"ms": 1e-3, "s": 1.0},
    "%": {},
    "1": {"k": 1e3, "M": 1e6, "G": 1e9},
}
_TEXT = re.compile(r"\s*([+-]?)\s*(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d{1,3}))?\s*([A-Za-z%/1]*)\s*")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A limit as read from its text.

    "-1pt": at most one point below the original (metrics in percent). "-1%": at most 1 % of its
    value worse. "+2%": the same where lower is better: at most 2 % of the original's value above
    it. "25%": at most a quarter of the original where lower is better, at least that share where
    higher is. "3 ms", "2 MB", "90": the value.
    """

    kind: Literal["points", "worse", "above", "share", "value"]
    amount: float
    unit: str = ""

    @staticmethod
    def parse(text: str) -> "Limit":
        """Read a limit.

        Raises:
            ValueError: the text is not a limit.
        """
        found = _TEXT.fullmatch(str(text))
        if not found:
            raise ValueError(
                f"{text!r} is not a limit; write for instance -1pt, -1%, +2%, 25%, '3 ms' or '2 MB'"
            )
        sign, digits, exponent, unit = found.groups()
        amount = float(digits) * 10.0 ** int(exponent or 0)
        if unit == "pt":
            if sign != "-":
                raise ValueError(f"{text!r}: points are a loss allowed; write -{digits}pt")
            return Limit(kind="points", amount=amount)
        if unit == "%":
            kind: Literal["worse", "above", "share"] = (
                "above" if sign == "+" else "worse" if sign else "share"
            )
            return Limit(kind=kind, amount=amount / 100)
        if sign:
            raise ValueError(
                f"{text!r}: a signed limit is in pt or %; write -{digits}pt or -{digits}%"
            )
        return Limit(kind="value", amount=amount, unit=unit)

    def bound(self, original: float, unit: str, better: Better) -> float:
        """Return the worst value allowed, in the metric's `unit`.

        Args:
            original: The untouched network's value.
            unit: Unit of the metric.
            better: Its better direction.

        Raises:
            ValueError: the limit's unit is not one of the metric's, or its sign.
        """
        direction = -1.0 if better == "higher" else 1.0
        if self.kind == "points":
            if unit != "%":
                raise ValueError(f"points are for metrics in percent, not in {unit!r}")
            return original + direction * self.amount
        if self.kind == "above" and better == "higher":
            raise ValueError(
                f"+{100 * self.amount:g}% is for metrics where lower is better; "
                f"write -{100 * self.amount:g}%"
            )
        if self.kind in ("worse", "above"):
            return original + direction * self.amount * abs(original)
        if self.kind == "share":
            return original * self.amount
        known = {unit: 1.0, **_FACTORS.get(unit, {})}
        if self.unit and self.unit not in known:
            raise ValueError(f"unit {self.unit!r} does not fit; use one of {', '.join(known)}")
        return self.amount * (known[self.unit] if self.unit else 1.0)


def inside(value: float, bound: float, better: Better) -> bool:
    """Tell whether a value keeps a bound. The slack absorbs the rounding of percentages only."""
    slack = 1e-9 * max(1.0, abs(bound))
    return value >= bound - slack if better == "higher" else value <= bound + slack


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What to improve, within which limits."""

    best: str = "latency"
    """The metric to improve."""
    limits: Mapping[str, str] = field(default_factory=dict)
    """Metric -> limit: "-1pt", "-1%", "+2%", "25%", "3 ms", "2 MB"."""

    def __post_init__(self) -> None:
        for name, text in self.limits.items():
            try:
                Limit.parse(text)
            except ValueError as error:
                raise ValueError(f"limit on {name}: {error}") from None

    def parsed(self) -> dict[str, Limit]:
        """Return the limits as read."""
        return {name: Limit.parse(text) for name, text in self.limits.items()}
