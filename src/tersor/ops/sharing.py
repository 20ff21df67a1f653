"""Sharing: weights that take few values, found by those values and kept so through training.

`kmeans` notes on the network that weights share. From then on a weight is shared when its elements
take few values, or its rows are multiples of rows that do. Every training goes through `holding`:
gradients are projected onto what keeps the sharing, and so are the weights at the end. An element
that is exactly zero stays zero, one that training prunes becomes so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.context import Fit
from tersor.core.errors import StepError
from tersor.ops import masks
from tersor.ops.notes import notes_of

MOST = 256
"""Values of a shared weight, beside zero."""
FEWEST = 4
"""Elements of a shared weight for each of its values, at least."""
_SAMPLE = 4096
_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Difference, as a share of a value, that a product's rounding explains; by type of the weight."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """How a weight is made of few values: book[codes], times the scale of the row."""

    codes: Tensor
    """int64, of the weight's shape."""
    book: Tensor
    """(K,), increasing, float64."""
    scale: Tensor | None = None
    """Of each row, so that it multiplies the weight; None: one for all."""

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight."""
        made = self.book[self.codes]
        return (made if self.scale is None else made * self.scale).to(dtype)

    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest weight that shares as this one does: least squares for each value.

        Values that are exactly zero stay so, and with scales those at the ends, -1 and 1. Elements
        that are zero now, since they were pruned meanwhile, stay zero, too.
        """
        given = weight.detach().double().cpu()
        ones = torch.ones_like(given) if self.scale is None else self.scale.expand_as(given)
        ones = ones.masked_fill(given == 0, 0.0)
        flat = self.codes.flatten()
        sums = torch.zeros_like(self.book).index_add_(0, flat, (given * ones).flatten())
        squares = torch.zeros_like(self.book).index_add_(0, flat, ones.square().flatten())
        book = torch.where(self.fixed() | (squares == 0), self.book, sums / squares)
        made = Shared(codes=self.codes, book=book, scale=self.scale).values(weight.dtype)
        return made.masked_fill(given == 0, 0.0).to(weight.device)

    def fixed(self) -> Tensor:
        """Tell which values do not move: zero, and with scales the ends."""
        ends = self.book.abs() == 1 if self.scale is not None else torch.zeros_like(self.book) > 0
        return (self.book == 0) | ends


def find(weight: Tensor) -> Shared | None:
    """Find out how a weight shares values; None: it does not.

    What is found reproduces the weight but for rounding.

    Args:
        weight: At least two dimensions; rows are its first.
    """
    given = weight.detach().double().cpu()
    if given.dim() < 2 or given.numel() < 2 * FEWEST or not bool(torch.isfinite(given).all()):
        return None
    plain = _table(given, given.flatten()[:_SAMPLE], 0.0)
    if plain is not None and len(plain.book) <= len(given):
        return plain
    scale = given.flatten(1).abs().amax(1).view(-1, *[1] * (given.dim() - 1))
    ratios = given / torch.where(scale > 0, scale, 1.0)
    few = ratios[: 1 + _SAMPLE // given[0].numel()].flatten()[:_SAMPLE]
    same = _ROUNDING.get(weight.dtype, 0.0)
    scaled = _table(ratios, few, same)
    if scaled is None or (plain is not None and len(plain.book) <= len(scaled.book) + len(given)):
        return plain
    made = Shared(codes=scaled.codes, book=scaled.book, scale=scale)
    error = (made.values(torch.float64) - given).abs()
    return made if bool((error <= 2 * same * given.abs()).all()) else plain


def _table(values: Tensor, sample: Tensor, same: float) -> Shared | None:
    """Return values as those of a short table, neighbors nearer than `same` as one, if there is."""
    if int(_steps(torch.unique(sample), same).sum()) > MOST:
        return None
    kinds, inverse = torch.unique(values, return_inverse=True)
    group = torch.cumsum(_steps(kinds, same), 0)
    count = int(group[-1]) + 1
    others = count - int((kinds == 0).any())
    if not 1 <= others <= min(MOST, max(values.numel() // FEWEST, 2)):
        return None
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, group, kinds)
    book = sums / torch.bincount(group, minlength=count)
    if same:
        book = torch.where((book.abs() - 1).abs() < same, book.sign(), book)
    return Shared(codes=group[inverse], book=book)


def _steps(kinds: Tensor, same: float) -> Tensor:
    """Return 1 where a sorted distinct value is more than rounding from the one before, else 0."""
    near = same * torch.maximum(kinds[1:].abs(), kinds[:-1].abs())
    return torch.cat([torch.zeros(1, dtype=torch.int64), (kinds.diff() > near).long()])


def shared_weights(net: nn.Module) -> dict[str, Shared]:
    """Find the trained weights of a network that share values, by parameter name.

    A network without the note of `kmeans` has none.
    """
    found: dict[str, Shared] = {}
    if not notes_of(net).get("shared"):
        return found
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and parameter.dim() > 1 and parameter.is_floating_point():
            shared = find(parameter)
            if shared is not None:
                found[name] = shared
    return found


def keeping(fit: Fit) -> Fit:
    """Return a trainer that does as `fit`, fills no zeros and keeps what weights share."""
    return holding(masks.holding(fit))


def holding(fit: Fit) -> Fit:
    """Return a trainer that does as `fit` and keeps what weights share.

    The gradient of each value is the mean over the elements that have it: the projection onto
    networks that share, so that learning rates mean what they did (the paper sums).

    Raises (the returned trainer, when called):
        StepError: `fit` returned another network.

    Source:
        Han et al., arXiv:1510.00149, section 3.3.
    """

    def held(net: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        shared = shared_weights(net)
        if not shared:
            return fit(net, *args, **settings)
        after = settings.get("on_step")
        scaled = {name: each for name, each in shared.items() if each.scale is not None}

        def on_step(done: int, total: int) -> None:
            # optimizers that divide by a gradient's size leave the plane of shared rows
            _project(net, scaled)
            if after is not None:
                after(done, total)

        if scaled:
            settings["on_step"] = on_step
        averages = {name: _averaging(each) for name, each in shared.items()}
        with masks.changed_gradients(net, averages):
            trained = fit(net, *args, **settings)
        missing = [name for name in shared if name not in dict(trained.named_parameters())]
        if missing:
            raise StepError(f"the trainer returned a network without {missing[0]!r}")
        _project(trained, shared)
        return trained

    return held


def _project(net: nn.Module, shared: Mapping[str, Shared]) -> None:
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, each in shared.items():
            parameters[name].copy_(each.project(parameters[name]))


def _averaging(shared: Shared) -> Callable[[Tensor], Tensor]:
    flat, fixed = shared.codes.flatten(), shared.fixed()
    scale = None if shared.scale is None else shared.scale.float()
    ones = torch.ones(shared.codes.shape) if scale is None else scale.expand(shared.codes.shape)
    squares = torch.zeros(len(fixed)).index_add_(0, flat, ones.square().flatten())
    weight = torch.where(fixed, 0.0, 1 / squares.clamp_min(1e-30))

    def average(gradient: Tensor) -> Tensor:
        given = gradient.float().cpu()
        sums = torch.zeros(len(fixed)).index_add_(0, flat, (given * ones).flatten())
        made = (sums * weight)[shared.codes] * ones
        return made.to(gradient.device, gradient.dtype)

    return average
