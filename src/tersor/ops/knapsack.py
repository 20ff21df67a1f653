"""Choose one setting for each layer: the least loss that budgets allow, exactly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.core.errors import DependencyError, StepError

Losses = Mapping[str, Mapping[int, float]]
"""Layer -> setting, such as bits -> loss."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the layers may cost together."""

    costs: Mapping[str, Mapping[int, float]]
    """Of each layer with each number of bits, never negative."""
    most: float


def solve(losses: Losses, *budgets: Budget) -> dict[str, int]:
    """Choose one number of bits for each layer: least sum of losses, no budget exceeded.

    Of equal losses the fewest bits are taken. Each budget alone can be kept by integers throughout.

    Raises:
        DependencyError: scipy is not installed.
        StepError: a loss is not finite.
    """
    optimize = solver()
    names = list(losses)
    pairs = [(name, bits) for name in names for bits in _useful(losses[name], name, budgets)]
    cost = np.array([losses[name][bits] for name, bits in pairs])
    one_each = np.array([[float(name == own) for own, _ in pairs] for name in names])
    limits = [optimize.LinearConstraint(one_each, 1, 1)]
    for budget in budgets:
        row = np.array([budget.costs[name][bits] for name, bits in pairs])
        limits.append(optimize.LinearConstraint(row, 0, max(budget.most, 0.0) * (1 + 1e-9)))
    # the solver stops at relative differences; sensitivities may be of any size
    made: Any = optimize.milp(
        cost / max(cost.max(), 1e-30),
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 0.0},
    )
    assert made.success, made.message
    return {name: bits for (name, bits), taken in zip(pairs, made.x, strict=True) if taken > 0.5}


def _useful(own: Mapping[int, float], name: str, budgets: Sequence[Budget]) -> list[int]:
    """Return the settings of a layer that no smaller one is as good and as cheap as."""
    kept: list[int] = []
    for setting in sorted(own):
        if not math.isfinite(own[setting]):
            raise StepError(f"layer {name!r}: its loss is {own[setting]}; look for NaN in the data")
        if not any(
            own[k] <= own[setting]
            and all(b.costs[name][k] <= b.costs[name][setting] for b in budgets)
            for k in kept
        ):
            kept.append(setting)
    return kept


def solver() -> Any:
    """Import scipy.optimize.

    Raises:
        DependencyError: scipy is not installed.
    """
    try:
        import scipy.optimize
    except ImportError as error:
        raise DependencyError(
            "the integer program of a budget needs scipy: pip install 'tersor[solver]'"
        ) from error
    return scipy.optimize
