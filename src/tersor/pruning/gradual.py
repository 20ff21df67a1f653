"""Gradual: prune while training, a little more every few steps, by size or by movement."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, StepError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops import masks
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
    hooks = [_prepare(layer, config) for layer in chosen.values()]

    def on_step(done: int, total: int) -> None:
        if freeze:
            freeze(done, total)
        for layer in chosen.values():
            _apply(layer)  # momentum moved what went on the way
        _prune(chosen, config, done, total)

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
        **masks.facts(trained, {name: trained.get_submodule(name) for name in keep}),
        left=left,
    )
    return trained


def _prepare(layer: nn.Module, config: Gradual) -> Any:
    """Give a layer its buffers, and a hook on the gradient of its weight; return the hook."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.register_buffer(_KEEP, torch.ones_like(weight, dtype=torch.bool))
    if config.criterion == "movement":
        layer.register_buffer(_SCORE, torch.zeros_like(weight, dtype=torch.float32))
        layer.register_buffer(_STASH, torch.zeros_like(weight))

    def hook(gradient: Tensor) -> Tensor:
        keep: Tensor = getattr(layer, _KEEP)
        if config.criterion == "movement":
            # the gradient of a weight that is gone is that of the place where it would be
            value = torch.where(keep, _weight(layer), getattr(layer, _STASH))
            getattr(layer, _SCORE).sub_(value * gradient)
        return gradient.masked_fill(~keep, 0.0)

    return weight.register_hook(hook)  # type: ignore[no-untyped-call]  # torch


def _prune(layers: Mapping[str, nn.Module], config: Gradual, done: int, total: int) -> None:
    """Choose anew what goes, where it is time to."""
    start, end = round(config.start * total), round(config.end * total)
    last = min(max(end, start, 1), total)
    if not (start <= done <= last and ((done - start) % config.every == 0 or done == last)):
        return
    sparsity = config.sparsity if done == last else config.asked(done, total)
    scores = {name: _score(layer, config) for name, layer in layers.items()}
    for name, keep in masks.choose(scores, sparsity, config.scope).items():
        _change(layers[name], keep)


def _score(layer: nn.Module, config: Gradual) -> Tensor:
    weight = _weight(layer)
    if config.criterion == "magnitude":
        return weight.abs()
    score: Tensor = getattr(layer, _SCORE)
    value = torch.where(getattr(layer, _KEEP), weight, getattr(layer, _STASH))
    # weights that were zero before anything began stay so
    return score.masked_fill(value == 0, torch.finfo(score.dtype).min)


def _change(layer: nn.Module, keep: Tensor) -> None:
    """Put a new mask in place: some weights go, others may come back."""
    before: Tensor = getattr(layer, _KEEP)
    weight = _weight(layer)
    if hasattr(layer, _STASH):
        stash: Tensor = getattr(layer, _STASH)
        gone, back = before & ~keep, keep & ~before
        stash[gone] = weight[gone]
        weight[back] = stash[back]
    before.copy_(keep)
    _apply(layer)


def _apply(layer: nn.Module) -> None:
    _weight(layer).masked_fill_(~getattr(layer, _KEEP), 0.0)


def _reached(net: nn.Module, layers: Mapping[str, nn.Module], config: Gradual) -> dict[str, Tensor]:
    """Return the masks of a trained network, if it was pruned as asked."""
    trained = dict(net.named_modules())
    keep: dict[str, Tensor] = {}
    for name in layers:
        mask = getattr(trained.get(name), _KEEP, None)
        if mask is None:
            raise StepError(f"the trainer returned a network without the pruned layer {name!r}")
        keep[name] = mask
    gone = sum(int((~mask).sum()) for mask in keep.values())
    count = sum(mask.numel() for mask in keep.values())
    if gone < masks.num_dropped(config.sparsity, count) - len(keep):
        raise StepError(
            f"gradual pruned {gone / count:.2%} of the weights instead of {config.sparsity:.2%}: "
            "the trainer did not call on_step(steps done, of all) after each step, or trained a "
            "copy of the network that it was given"
        )
    for name, mask in keep.items():
        filled = int((_weight(trained[name])[~mask] != 0).sum())
        if filled:
            raise StepError(
                f"layer {name!r}: {filled} of {int((~mask).sum())} pruned weights are not zero "
                "after training; the trainer changed weights after its last call of on_step"
            )
    return keep


def _forget(net: nn.Module) -> None:
    for layer in net.modules():
        for name in (_KEEP, _SCORE, _STASH):
            layer._buffers.pop(name, None)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()
