"""How much a network would miss each channel of a group."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.context import Batch, Loss
from tersor.core.errors import StepError
from tersor.ops.groups import Group, in_slice, out_slice

# K channels of a group


def magnitude(net: nn.Module, group: Group, order: Literal[1, 2]) -> Float[Tensor, "K"]:
    """Score channels by the size of the weights that make and read them.

    Each layer's norms are divided by their mean, so that large layers do not drown small ones; the
    score is the mean over layers.

    Args:
        net: The network.
        group: Its channels.
        order: 1: sum of absolute weights; 2: Euclidean norm.

    Source:
        Li et al., arXiv:1608.08710 (filters by their L1 norm); the mean over all coupled layers
        follows Fang et al., arXiv:2301.12900.
    """
    rows = []
    for (name, side), places in group.indices.items():
        if side not in ("out", "in", "depthwise"):
            continue
        layer = net.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        take = in_slice if side == "in" else out_slice
        norms_K = torch.stack(
            [
                torch.stack([take(layer, weight, i).norm(order) for i in own]).norm(order)
                for own in places
            ]
        )
        rows.append(norms_K / norms_K.mean().clamp_min(1e-12))
    return torch.stack(rows).mean(0)


def taylor(
    net: nn.Module, groups: Sequence[Group], loss: Loss, batches: Iterable[Batch]
) -> list[Float[Tensor, "K"]]:
    """Score channels by the squared first-order change of the loss when they are taken out.

    Taking a channel out means that nothing reads it: the change is the sum of weight * gradient
    over the weights that read it, in all layers that do.

    Args:
        net: In eval mode; gradients are left empty.
        groups: Its channels.
        loss: (network, batch) -> scalar.
        batches: With whatever `loss` needs.

    Returns:
        For each group, the mean over batches.

    Raises:
        StepError: loss or a gradient is not finite.

    Source:
        Molchanov et al., arXiv:1906.10771, equation 8 with a gate on each channel.
    """
    totals = [torch.zeros(group.size) for group in groups]
    count = 0
    for batch in batches:
        net.zero_grad(set_to_none=True)
        value = loss(net, batch)
        if not torch.isfinite(value):
            raise StepError(f"the loss is {value.item()} on calibration batch {count + 1}")
        torch.autograd.backward(value)
        for total, group in zip(totals, groups, strict=True):
            total += _change(net, group, count).square()
        count += 1
    net.zero_grad(set_to_none=True)
    return [total / max(count, 1) for total in totals]


def _change(net: nn.Module, group: Group, batch: int) -> Float[Tensor, "K"]:
    change_K = torch.zeros(group.size)
    for (name, side), places in group.indices.items():
        if side != "in":
            continue
        layer = net.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if weight.grad is None:
            continue
        product = weight.detach() * weight.grad
        if not torch.isfinite(product).all():
            raise StepError(
                f"the gradient of layer {name!r} is not finite on calibration batch {batch + 1}; "
                "look for NaN in the data, or use importance: l2"
            )
        for k, own in enumerate(places):
            change_K[k] += sum(in_slice(layer, product, i).sum() for i in own)
    return change_K
