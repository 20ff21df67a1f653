"""Which rank each layer gets under one budget for all: least loss, found by a price for cost."""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 60
"""Halvings of the price: beyond these a float has no more digits."""


def allocate(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int] | None:
    """Choose one option for each layer so that costs stay within a budget and losses are small.

    The lowest price of cost is searched at which the options of least loss + price * cost fit; this
    is the best choice for the cost that it has. What is left of the budget then goes to the layers
    that lose less for it, in the order of what they gain for a unit of cost.

    Args:
        losses: Of each layer's options; the untouched layer is one of them, with loss 0.
        costs: Of the same options.
        budget: Of the sum of the costs.

    Returns:
        The index of each layer's option; None: not even the cheapest options fit.

    Source:
        Shoham and Gersho, IEEE Trans. ASSP 36 (1988): budgets by Lagrange multipliers.
    """
    loss = [np.asarray(own, dtype=np.float64) for own in losses]
    cost = [np.asarray(own, dtype=np.float64) for own in costs]

    def choice(price: float) -> list[int]:
        made = []
        for own_loss, own_cost in zip(loss, cost, strict=True):
            value = own_loss + price * own_cost
            near = np.flatnonzero(value <= value.min() + 1e-15)
            made.append(int(near[own_cost[near].argmin()]))
        return made

    def total(chosen: list[int]) -> float:
        return float(sum(own[i] for own, i in zip(cost, chosen, strict=True)))

    cheapest = [int(own.argmin()) for own in cost]
    if total(cheapest) > budget:
        return None
    low, high = 0.0, 1.0
    fits = choice(0.0)
    if total(fits) <= budget:
        return fits
    while total(fits := choice(high)) > budget:
        high *= 4
        if high > 1e30:
            fits = cheapest
            break
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        tried = choice(middle)
        if total(tried) <= budget:
            high, fits = middle, tried
        else:
            low = middle
    return _spent(loss, cost, fits, budget)


def _spent(
    loss: list[np.ndarray], cost: list[np.ndarray], chosen: list[int], budget: float
) -> list[int]:
    """Spend what is left of the budget where it saves most loss."""
    chosen = list(chosen)
    left = budget - float(sum(own[i] for own, i in zip(cost, chosen, strict=True)))
    while True:
        best: tuple[float, int, int] | None = None
        for layer, i in enumerate(chosen):
            more = cost[layer] - cost[layer][i]
            less = loss[layer][i] - loss[layer]
            able = np.flatnonzero((more <= left) & (less > 1e-15))
            for option in map(int, able):
                gain = float(less[option] / max(more[option], 1e-30))
                if best is None or gain > best[0]:
                    best = (gain, layer, option)
        if best is None:
            return chosen
        _, layer, taken = best
        left -= float(cost[layer][taken] - cost[layer][chosen[layer]])
        chosen[layer] = taken
