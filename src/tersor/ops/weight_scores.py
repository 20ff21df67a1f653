"""How much a network would miss each of its weights."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.context import Batch, Loss
from tersor.core.errors import StepError

# a score has the shape of its layer's weight


def magnitude(layers: Mapping[str, nn.Module]) -> dict[str, Float[Tensor, "..."]]:
    """Score weights by their size, |w|."""
    return {name: _weight(layer).abs() for name, layer in layers.items()}


def random(layers: Mapping[str, nn.Module], seed: int) -> dict[str, Float[Tensor, "..."]]:
    """Score weights by chance; those that are zero already come last."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, layer in layers.items():
        weight = _weight(layer)
        score = torch.rand(weight.shape, generator=generator).to(weight.device)
        scores[name] = score.masked_fill(weight == 0, -1.0)
    return scores


def taylor(
    net: nn.Module, layers: Mapping[str, nn.Module], loss: Loss, batches: Iterable[Batch]
) -> dict[str, Float[Tensor, "..."]]:
    """Score weights by the first-order change of the loss when they are zero, |w * gradient|.

    Args:
        net: In eval mode; gradients are left empty.
        layers: Its layers to score.
        loss: (network, batch) -> scalar.
        batches: With whatever `loss` needs.

    Returns:
        For each layer, the mean over batches.

    Raises:
        StepError: loss or a gradient is not finite.

    Source:
        Molchanov et al., arXiv:1611.06440, equation 7, for single weights instead of feature maps.
    """
    totals = {name: torch.zeros_like(_weight(layer)) for name, layer in layers.items()}
    count = 0
    try:
        for batch in batches:
            net.zero_grad(set_to_none=True)
            value = loss(net, batch)
            if not torch.isfinite(value):
                raise StepError(
                    f"the loss is {value.item()} on calibration batch {count + 1}; look for NaN in "
                    "the data and the network's weights"
                )
            torch.autograd.backward(value)
            for name, total in totals.items():
                total += _change(name, layers[name], count)
            count += 1
    finally:
        net.zero_grad(set_to_none=True)
    return {name: total / max(count, 1) for name, total in totals.items()}


def _change(name: str, layer: nn.Module, batch: int) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.grad is None:  # not reached by this batch
        return torch.zeros_like(weight)
    if not torch.isfinite(weight.grad).all():
        raise StepError(
            f"the gradient of layer {name!r} is not finite on calibration batch {batch + 1}; look "
            "for NaN in the data, or use importance: l1"
        )
    return (weight.detach() * weight.grad).abs()


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()
