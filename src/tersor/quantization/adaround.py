"""AdaRound: learn whether to round each weight up or down, layer by layer, without labels."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.core.context import Context
from tersor.core.technique import technique
from tersor.ops.modules import Grid
from tersor.ops.twin import Visit, gather, lockstep, twin_of

_STRETCH = (-0.1, 1.1)
"""Ends of the stretched sigmoid, zeta and gamma of the paper."""
_BETA = (20.0, 2.0)
_WARM_UP = 0.2
"""Share of the steps without regularization."""
_PENALTY = 0.01
_RATE = 1e-2
_BATCH = {True: 256, False: 32}
"""Rows of a step: tokens of linear layers, images of convolutions."""


@dataclass(frozen=True, kw_only=True)
class Adaround:
    """Settings of AdaRound."""

    steps: int = 1000
    """Steps of Adam for each layer; the paper takes 10,000."""
    samples: int = 512
    """Calibration samples; fewer where activations are very large."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")


@technique(needs=("calibration",), paper="arXiv:2004.10568")
def adaround(net: nn.Module, config: Adaround, context: Context) -> nn.Module:
    """Choose the rounding of each weight so that the layer's output is nearest to the float one.

    Scales stay. For each layer in order the squared error of its output, after the ReLU that
    follows, is minimized over a soft rounding that is pressed towards up or down; the input is that
    of the network with all earlier layers rounded, the output wanted that of the float network. A
    layer keeps its nearest rounding where the learned one is not better. Belongs in the stage of
    the step that rounds: `[static, adaround]` or `[weight_only, adaround]`.

    Raises:
        DataError: no calibration data.
        UnfitError: nothing was rounded in this stage.

    Source:
        Nagel et al., arXiv:2004.10568: equations 21 to 25.
    """
    twin = twin_of(net, "adaround")
    assert isinstance(net, fx.GraphModule)
    batch = gather(net, context.data.calibration, context.inputs, config.samples)
    generator = torch.Generator().manual_seed(context.seed)
    errors: dict[str, list[float]] = {}
    changed = total = 0
    count = sum(1 for _ in lockstep(net, twin, {k: v[:1] for k, v in batch.items()}))
    for visit in context.track(lockstep(net, twin, batch), "learning to round", count):
        layer: Any = visit.layer
        nearest, before = layer.weight, _error(visit, layer.values())
        learned = _learn(visit, config.steps, generator)
        layer.weight = learned
        after = _error(visit, layer.values())
        if after >= before:
            layer.weight, after = nearest, before
        errors[visit.name] = [before, after]
        changed += int((layer.weight != nearest).sum())
        total += nearest.numel()
    context.record(
        layers=len(errors),
        samples=len(next(iter(batch.values()))),
        share_of_weights_changed=changed / max(total, 1),
        squared_errors=errors,
    )
    return net


def _learn(visit: Visit, steps: int, generator: torch.Generator) -> Tensor:
    """Return the codes of a layer, rounded as learned."""
    layer: Any = visit.layer
    grid: Grid = layer.grid()
    weight = _weights(visit).detach()
    exact = weight / grid.scale + grid.zero
    floor = exact.floor()
    low, high = _STRETCH
    share = ((exact - floor) - low) / (high - low)
    soft = torch.log(share / (1 - share)).requires_grad_()
    optimizer = torch.optim.Adam([soft], lr=_RATE)
    warm = int(_WARM_UP * steps)
    x, wanted = visit.x, _activated(visit, visit.wanted)
    if visit.channels_last:
        x, wanted = x.flatten(0, -2), wanted.flatten(0, -2)
    channels = wanted.shape[1]
    for step in range(steps):
        rows = torch.randint(0, len(x), (_BATCH[visit.channels_last],), generator=generator)
        with torch.enable_grad():
            up = _stretched(soft)
            codes = (floor + up).clamp(grid.low, grid.high)
            outputs = layer.compute(x[rows], (codes - grid.zero) * grid.scale, layer.bias)
            difference = (_activated(visit, outputs) - wanted[rows]).square()
            # the paper sums over output channels; a sum over all would change with the image size
            loss = difference.mean() * channels
            if step >= warm:
                done = (step - warm) / max(steps - warm, 1)
                beta = _BETA[1] + 0.5 * (_BETA[0] - _BETA[1]) * (1 + math.cos(math.pi * done))
                loss = loss + _PENALTY * (1 - (2 * up - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
    hard = (floor + (_stretched(soft.detach()) >= 0.5)).clamp(grid.low, grid.high)
    made: Tensor = hard.to(layer.weight.dtype)
    return made


def _stretched(soft: Tensor) -> Tensor:
    low, high = _STRETCH
    return (torch.sigmoid(soft) * (high - low) + low).clamp(0, 1)


def _weights(visit: Visit) -> Tensor:
    weight = visit.twin.weight
    assert isinstance(weight, Tensor)
    return weight


def _activated(visit: Visit, outputs: Tensor) -> Tensor:
    if visit.activation is None:
        return outputs
    return F.relu6(outputs) if visit.activation == "relu6" else F.relu(outputs)


def _error(visit: Visit, weight: Tensor) -> float:
    layer: Any = visit.layer
    with torch.no_grad():
        outputs = _activated(visit, layer.compute(visit.x, weight, layer.bias))
        return float((outputs - _activated(visit, visit.wanted)).square().mean())
