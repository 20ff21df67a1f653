"""Bits layer by layer: the least loss that budgets allow, of size and of measured latency."""

from collections.abc import Callable, Collection, Mapping

import numpy as np
from torch import nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.ops.knapsack import Budget, Losses, solve, solver
from tersor.quantization._sensitivity import FLOAT

Bits = Mapping[str, int]
_GROUPS = 8
"""Groups of layers that are timed in float, each in a network of its own."""
_CHECKS = 6
"""Networks found by the program that are timed at most, to correct the costs."""
_PRIOR = 1e-3
"""Weight of the belief that time goes by multiply-accumulates. In the square of a share of the
latency: measured differences of less than about 0.03 are not trusted more than it."""


def size_budget(losses: Losses, counts: Mapping[str, int], size: float) -> Budget:
    """Return costs in shares of all weights in float32.

    Raises:
        UnfitError: the fewest bits take more.
    """
    total = FLOAT * sum(counts.values())
    smallest = sum(counts[n] * min(losses[n]) for n in losses) / total
    if smallest > size:
        raise UnfitError(
            f"size {size:g} cannot be reached: the fewest bits allowed take {smallest:.4g} of "
            "float32",
            too_strong=True,
        )
    costs = {n: {b: counts[n] * b / total for b in losses[n]} for n in losses}
    return Budget(costs=costs, most=size)


def under_latency(
    losses: Losses,
    work: Mapping[str, float],
    latency: float,
    build: Callable[[Collection[str]], nn.Module],
    context: Context,
    *budgets: Budget,
) -> dict[str, int]:
    """Choose bits for the least loss with a measured latency, and budgets of other kinds.

    What a layer in float costs is measured in whole networks, since neighbors in integers save
    conversions: one with all layers in integers, and for each of a few groups of neighboring layers
    one with that group in float, all timed in turns. A group's cost is divided among its layers by
    their work at first. Then the choice itself is timed, again and again; each time corrects the
    costs of the layers that it left in float, and so the next choice. The one with the least loss
    among those measured to be fast enough is returned.

    Args:
        losses: Of each layer with each number of bits; more than one number for each.
        work: Multiply-accumulates of each layer, in the order of the graph.
        latency: Share of the float network's.
        build: Makes the network with these layers in float, all others in integers. With all of
            them it is the network that shares are of.
        context: Measures; gets the facts.
        budgets: Others that hold, too.

    Raises:
        UnfitError: all layers in integers take longer.
    """
    names = list(work)
    integers = {n: {b: loss for b, loss in losses[n].items() if b != FLOAT} for n in names}
    choices = {frozenset[str](): solve(integers, *budgets)}
    groups = [frozenset(group) for group in _groups(work)]
    whole, fastest, *others = context.latency(
        [build(names), build(()), *(build(group) for group in groups)]
    )
    shares = {frozenset[str](): fastest / whole}
    shares |= {g: other / whole for g, other in zip(groups, others, strict=True)}
    if shares[frozenset()] > latency:
        raise UnfitError(
            f"latency {latency:g} cannot be reached: with all {len(names)} layers in integers it "
            f"is still {shares[frozenset()]:.2f} of the float network's",
            too_strong=True,
        )
    for _ in context.track(range(_CHECKS), "timing choices", _CHECKS):
        costs = _costs(shares, work)
        budget = Budget(
            costs={n: {b: costs[n] if b == FLOAT else 0.0 for b in losses[n]} for n in names},
            most=latency - shares[frozenset()],
        )
        bits = solve(losses, *budgets, budget)
        floats = frozenset(n for n in names if bits[n] == FLOAT)
        if floats in choices:
            break
        choices[floats] = bits
        before, after = context.latency([build(names), build(floats)])
        shares[floats] = after / before
    held = [floats for floats in choices if shares[floats] <= latency]
    best = min(held, key=lambda f: sum(losses[n][b] for n, b in choices[f].items()))
    context.record(
        latency=shares[best],
        latencies=[{"left_in_float": sorted(f), "latency": s} for f, s in shares.items()],
        latency_costs=_costs(shares, work),
    )
    return choices[best]


def _groups(work: Mapping[str, float]) -> list[list[str]]:
    """Cut the layers into neighborhoods of about the same work."""
    groups: list[list[str]] = [[] for _ in range(_GROUPS)]
    total, done = sum(work.values()), 0.0
    for name, own in work.items():
        groups[min(int(_GROUPS * (done + own / 2) / total), _GROUPS - 1)].append(name)
        done += own
    return [group for group in groups if group]


def _costs(shares: Mapping[frozenset[str], float], work: Mapping[str, float]) -> dict[str, float]:
    """Tell what each layer in float adds to the latency from the networks that were timed.

    Least squares with costs of at least 0, and a ridge towards costs in proportion to the work.
    """
    names = list(work)
    fastest = shares[frozenset()]
    prior = np.array([work[n] for n in names]) * (1 - fastest) / sum(work.values())
    prior = np.maximum(prior, 1e-9)
    timed = [floats for floats in shares if floats]
    inside = np.array([[float(n in floats) for n in names] for floats in timed])
    ridge = np.sqrt(_PRIOR * prior)
    factors, _ = solver().nnls(
        np.vstack([inside * prior, np.diag(ridge)]),
        np.concatenate([[shares[floats] - fastest for floats in timed], ridge]),
    )
    return dict(zip(names, (factors * prior).tolist(), strict=True))
