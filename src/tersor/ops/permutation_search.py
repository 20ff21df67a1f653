"""Search for the order of columns in which N of every M keep the most.

N:M sparsity keeps the N best of every M neighbors, so what it costs depends on who the neighbors
are.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersor.ops.patterns import Pattern

# R rows, C columns, M neighbors: a stripe; A one of several columns

_WORK = 2**31
"""Comparisons of values that the first table of gains may take: a few seconds."""
_CHUNK = 2**24
_LEAST = 1e-5
"""Smaller gains, as a share of what is kept, are rounding."""
_KICK = 4
"""Random swaps of an escape: enough that the best swap does not undo them."""


def search_order(
    score_RC: Float[Tensor, "R C"], pattern: Pattern, *, escapes: int, seed: int
) -> Int[Tensor, "C"]:
    """Find an order of the columns in which the N highest of every M sum up to more.

    The best swap of two columns is made until none is of use; then a few random swaps let it start
    again from elsewhere, and the best order found is returned.

    Args:
        score_RC: Not negative; C is a multiple of M. Of very many rows a sample is looked at.
        pattern: (N, M).
        escapes: How often to start again.
        seed: Decides the random swaps.

    Returns:
        Column of `score_RC` at each place.

    Source:
        Pool and Yu, Channel permutations for N:M sparsity, NeurIPS 2021: greedy channel swaps with
        bounded regressions. The gains of all swaps are kept in a table: with a column a taken out
        of its stripe, a column b put there adds max(0, b - the Nth highest of the others), row by
        row, so that a swap is two entries of it.
    """
    n, m = pattern
    rows, columns = score_RC.shape
    generator = torch.Generator().manual_seed(seed)
    if columns == m:
        return torch.arange(columns)
    most = max(_WORK // columns**2, 1)
    if rows > most:
        score_RC = score_RC[torch.randperm(rows, generator=generator)[:most]]
    table = _Table(score_RC.float(), n, m)
    table.climb()
    best, order = table.kept(), table.order.clone()
    for _ in range(escapes):
        for _ in range(_KICK):
            first, second = torch.randint(columns, (2,), generator=generator).tolist()
            if first // m != second // m:
                table.swap(first, second)
        table.climb()
        if table.kept() > best * (1 + _LEAST):
            best, order = table.kept(), table.order.clone()
        else:
            table.put(order)
    return order


class _Table:
    """Columns in some order, and what each swap of two of them would gain."""

    def __init__(self, score_RC: Tensor, n: int, m: int) -> None:
        self.score, self.n, self.m = score_RC, n, m
        self.order = torch.arange(score_RC.shape[1])
        self.now = score_RC.clone()
        columns = score_RC.shape[1]
        self.without = torch.zeros(columns)
        """What a stripe keeps with its column at this place taken out."""
        self.stripe_kept = torch.zeros(columns)
        """What the stripe of this place keeps."""
        self.added = torch.zeros(columns, columns)
        """[a, b]: what column b adds at the place of a."""
        self.refresh(list(range(columns // m)))

    def kept(self) -> float:
        return float(self.stripe_kept.double().sum()) / self.m

    def climb(self) -> None:
        """Make the best swap until there is none."""
        stripe = torch.arange(len(self.order)) // self.m
        same = stripe.unsqueeze(0) == stripe.unsqueeze(1)
        least = _LEAST * max(self.kept(), 1e-30) / len(self.order)
        while True:
            base = self.without - self.stripe_kept
            gains = self.added + self.added.mT + base.unsqueeze(0) + base.unsqueeze(1)
            place = int(gains.masked_fill_(same, 0.0).argmax())
            first, second = divmod(place, len(self.order))
            if gains[first, second] <= least:
                return
            self.swap(first, second)

    def swap(self, first: int, second: int) -> None:
        there, here = [first, second], [second, first]
        self.order[there] = self.order[here]
        self.now[:, there] = self.now[:, here]
        self.added[:, there] = self.added[:, here]
        self.refresh([first // self.m, second // self.m])

    def put(self, order: Tensor) -> None:
        """Go back to an order."""
        changed = (self.order != order).nonzero().flatten().tolist()
        back = torch.argsort(self.order)[order]
        self.added = self.added[:, back]
        self.order = order.clone()
        self.now = self.score[:, order]
        self.refresh(sorted({place // self.m for place in changed}))

    def refresh(self, stripes: list[int]) -> None:
        """Compute anew what depends on the columns of some stripes."""
        rows, columns = self.now.shape
        for part in _parts(stripes, max(_CHUNK // (self.m * rows * columns), 1)):
            index = torch.tensor(part)
            places = (index.unsqueeze(1) * self.m + torch.arange(self.m)).flatten()
            near_RSM = self.now[:, places].view(rows, len(part), self.m)
            kept = near_RSM.topk(self.n, dim=-1).values.sum((0, 2))
            self.stripe_kept[places] = kept.repeat_interleave(self.m)
            others = torch.tensor(
                [[j for j in range(self.m) if j != i] for i in range(self.m)]
            )  # of each column of a stripe
            best = near_RSM[..., others].topk(self.n, dim=-1).values.flatten(1, 2)
            self.without[places] = best.sum((0, 2))
            limit_RA = best[..., -1]
            over = self.now.unsqueeze(1) - limit_RA.unsqueeze(2)
            self.added[places] = over.clamp_min_(0).sum(0)


def _parts(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
