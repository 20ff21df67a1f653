"""Gradual: prune while training, a little more every few steps, by size or by movement."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, StepError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import masks, projections
from tersor.ops.fake_quantize import late

_KEEP, _SCORE, _STASH = "pruning_keep", "pruning_score", "pruning_stash"
"""Buffers of a layer while it is pruned, so that they are in every checkpoint: the mask; what
movement has summed up; the values of the weights that are gone, in case they come back."""


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Settings of pruning on a schedule."""

    sparsity: float = 0.9
    """Share of the weights that are zero at the end, in [0, 1)."""
    initial: float = 0.0
    """Share that is zero at `start`, where the schedule is polynomial."""
    schedule: Literal["polynomial", "constant"] = "polynomial"
    """polynomial: from initial to sparsity, fast at first; constant: all of it at `start`."""
    power: float = 3.0
    """Of the polynomial; 1 is a straight line."""
    criterion: Literal["magnitude", "movement"] = "magnitude"
    """Which weights go: the smallest, or (movement) those that training moves towards zero."""
    scope: masks.Scope = "layer"
    """layer: the same share of each; global: one threshold for all of them together."""
    start: float = 0.1
    """Share of the steps after which pruning begins."""
    end: float = 0.7
    """Share of the steps after which `sparsity` is reached; the others recover."""
    every: int = 10
    """Steps between two choices of what goes."""
    epochs: float = 1.0
    """Passes over the training data on the task's loss."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""
    layers: Layers = Layers()
    """Linear layers and convolutions that are pruned."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if not 0 <= self.initial <= self.sparsity:
            raise ValueError(f"initial must be in [0, sparsity], got {self.initial}")
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"0 <= start <= end <= 1 must hold, got {self.start} and {self.end}")
        if self.criterion == "movement" and self.start == 0:
            raise ValueError("movement needs steps to see weights move: start must be above 0")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if self.epochs <= 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def weaker(self) -> "Gradual | None":
        """Return settings that leave twice the weights; None when hardly anything would go."""
        sparsity = masks.weaker(self.sparsity)
        if sparsity is None:
            return None
        return replace(self, sparsity=sparsity, initial=min(self.initial, sparsity))

    def asked(self, done: int, total: int) -> float:
        """Return the sparsity after `done` of `total` steps.

        Source:
            Zhu and Gupta, arXiv:1710.01878, equation 1.
        """
        start, end = self.start * total, self.end * total
        if done < start:
            return 0.0
        if self.schedule == "constant" or done >= end:
            return self.sparsity
        left: float = (1 - (done - start) / (end - start)) ** self.power
        return self.sparsity + (self.initial - self.sparsity) * left


@technique(needs=("train", "labels"), paper="arXiv:1710.01878")
def gradual(net: nn.Module, config: Gradual, context: Context) -> nn.Module:
    """Train on the task's loss, and set more and more weights to zero on the way.

    By magnitude a weight that went stays away. By movement weights are ranked by how far training
    pushes them from zero, the sum of -w * gradient over the steps; one that went keeps its value
    aside and comes back with it when its rank rises.

    Raises:
        DataError: no training data.
        RecipeError: a pattern matches no layer.
        StepError: all layers are excluded; loss or gradient is not finite; the trainer did not call
            `on_step`, or ignored the mask.
        UnfitError: no layer has float weights, or one would lose them all.

    Source:
        Zhu and Gupta, arXiv:1710.01878; movement: Sanh et al., arXiv:2005.07683, section 3. We sum
        the scores without a learning rate of their own, and rank by whole layers or all of them.
    """
    if context.data.train is None:
        raise DataError("gradual needs training data; give `train` batches with labels")
    chosen, left = masks.prunable(net, config.layers)
    masks.choose({n: _weight(m).abs() for n, m in chosen.items()}, config.sparsity, config.scope)
    freeze = late(net)
    places = {name: _Place.of(net, name) for name in chosen}
    hooks = [_prepare(place, config) for place in places.values()]

    def on_step(done: int, total: int) -> None:
        if freeze:
            freeze(done, total)
        for place in places.values():
            _apply(place)  # momentum moved what went on the way
        _prune(places, config, done, total)

    try:
        trained = context.fit(
            net,
            context.loss,
            batches=context.data.train,
            epochs=config.epochs,
            lr=config.lr,
            seed=context.seed,
            checkpoint=context.work_dir / "gradual.safetensors",
            on_step=on_step,
        )
        keep = _reached(trained, chosen, config)
    finally:
        for hook in hooks:
            hook.remove()
        _forget(net)
    _forget(trained)
    masks.hold(trained, keep)
    context.record(
        epochs=config.epochs,
        **masks.facts(trained, {name: projections.layer(trained, name) for name in keep}),
        left=left,
    )
    return trained


@dataclass(frozen=True)
class _Place:
    """A weight, and the layer that keeps its buffers."""

    layer: nn.Module
    attribute: str

    @staticmethod
    def of(net: nn.Module, name: str) -> "_Place":
        found = projections.owner(net, name)
        assert found is not None
        return _Place(*found)

    @property
    def weight(self) -> Tensor:
        weight = getattr(self.layer, self.attribute)
        assert isinstance(weight, Tensor)
        return weight

    def name(self, buffer: str) -> str:
        # attention may have three weights
        return buffer if self.attribute == "weight" else f"{buffer}_{self.attribute}"

    def has(self, buffer: str) -> bool:
        return hasattr(self.layer, self.name(buffer))

    def get(self, buffer: str) -> Tensor:
        made: Tensor = getattr(self.layer, self.name(buffer))
        return made

    def add(self, buffer: str, value: Tensor) -> None:
        self.layer.register_buffer(self.name(buffer), value)


def _prepare(place: _Place, config: Gradual) -> Any:
    """Give a layer its buffers, and a hook on the gradient of its weight; return the hook."""
    weight = place.weight
    place.add(_KEEP, torch.ones_like(weight, dtype=torch.bool))
    if config.criterion == "movement":
        place.add(_SCORE, torch.zeros_like(weight, dtype=torch.float32))
        place.add(_STASH, torch.zeros_like(weight))

    def hook(gradient: Tensor) -> Tensor:
        keep = place.get(_KEEP)
        if config.criterion == "movement":
            # the gradient of a weight that is gone is that of the place where it would be
            value = torch.where(keep, place.weight.detach(), place.get(_STASH))
            place.get(_SCORE).sub_(value * gradient)
        return gradient.masked_fill(~keep, 0.0)

    return weight.register_hook(hook)  # type: ignore[no-untyped-call]  # torch


def _prune(places: Mapping[str, _Place], config: Gradual, done: int, total: int) -> None:
    """Choose anew what goes, where it is time to."""
    start, end = round(config.start * total), round(config.end * total)
    last = min(max(end, start, 1), total)
    if not (start <= done <= last and ((done - start) % config.every == 0 or done == last)):
        return
    sparsity = config.sparsity if done == last else config.asked(done, total)
    scores = {name: _score(place, config) for name, place in places.items()}
    for name, keep in masks.choose(scores, sparsity, config.scope).items():
        _change(places[name], keep)


def _score(place: _Place, config: Gradual) -> Tensor:
    weight = place.weight.detach()
    if config.criterion == "magnitude":
        return weight.abs()
    score = place.get(_SCORE)
    value = torch.where(place.get(_KEEP), weight, place.get(_STASH))
    # weights that were zero before anything began stay so
    return score.masked_fill(value == 0, torch.finfo(score.dtype).min)


def _change(place: _Place, keep: Tensor) -> None:
    """Put a new mask in place: some weights go, others may come back."""
    before, weight = place.get(_KEEP), place.weight.detach()
    if place.has(_STASH):
        stash = place.get(_STASH)
        gone, back = before & ~keep, keep & ~before
        stash[gone] = weight[gone]
        weight[back] = stash[back]
    before.copy_(keep)
    _apply(place)


def _apply(place: _Place) -> None:
    place.weight.detach().masked_fill_(~place.get(_KEEP), 0.0)


def _reached(net: nn.Module, names: Iterable[str], config: Gradual) -> dict[str, Tensor]:
    """Return the masks of a trained network, if it was pruned as asked."""
    places: dict[str, _Place] = {}
    for name in names:
        found = projections.owner(net, name)
        if found is None or not _Place(*found).has(_KEEP):
            raise StepError(f"the trainer returned a network without the pruned layer {name!r}")
        places[name] = _Place(*found)
    keep = {name: place.get(_KEEP) for name, place in places.items()}
    gone = sum(int((~mask).sum()) for mask in keep.values())
    count = sum(mask.numel() for mask in keep.values())
    if gone < masks.num_dropped(config.sparsity, count) - len(keep):
        raise StepError(
            f"gradual pruned {gone / count:.2%} of the weights instead of {config.sparsity:.2%}: "
            "the trainer did not call on_step(steps done, of all) after each step, or trained a "
            "copy of the network that it was given"
        )
    for name, mask in keep.items():
        filled = int((places[name].weight.detach()[~mask] != 0).sum())
        if filled:
            raise StepError(
                f"layer {name!r}: {filled} of {int((~mask).sum())} pruned weights are not zero "
                "after training; the trainer changed weights after its last call of on_step"
            )
    return keep


def _forget(net: nn.Module) -> None:
    for layer in net.modules():
        for attribute in projections.ATTRIBUTES:
            for buffer in (_KEEP, _SCORE, _STASH):
                layer._buffers.pop(_Place(layer, attribute).name(buffer), None)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()
