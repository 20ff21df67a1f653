"""Linear layers and convolutions as the matrices that they multiply their inputs with."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# G groups of a convolution, 1 for a linear layer
# R rows: outputs of a group
# C columns: weights of an output; input channels vary fastest, kernel positions slowest, so that
#   neighbors are input channels: what sparse matrix units take together
# N inputs of the matrix: tokens, or places of images

_CHUNK = 2**24
"""Numbers of unfolded inputs that are held at once: 64 MB."""


def matrices(layer: nn.Module, tensor: Tensor | None = None) -> Shaped[Tensor, "G R C"]:
    """Return a layer's weight, or a tensor of its shape, as one matrix for each group.

    Args:
        layer: Linear layer or convolution, also a transposed one.
        tensor: A mask or score; None: the weight, without its gradient.
    """
    weight = layer.weight if tensor is None else tensor
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if isinstance(layer, nn.Linear):
        return weight.unsqueeze(0)
    assert isinstance(layer, _ConvNd)
    grouped = weight.view(layer.groups, -1, *weight.shape[1:])
    if not isinstance(layer, _ConvTransposeNd):
        grouped = grouped.transpose(1, 2)
    return grouped.movedim(1, -1).flatten(2)


def unmatrices(layer: nn.Module, matrix_GRC: Shaped[Tensor, "G R C"]) -> Shaped[Tensor, "..."]:
    """Return matrices in the shape of the layer's weight: the inverse of `matrices`."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        return matrix_GRC[0]
    assert isinstance(layer, _ConvNd)
    per_group = layer.in_channels // layer.groups
    rows = layer.out_channels // layer.groups
    grouped = matrix_GRC.view(layer.groups, rows, *layer.kernel_size, per_group).movedim(-1, 1)
    if not isinstance(layer, _ConvTransposeNd):
        grouped = grouped.transpose(1, 2)
    return grouped.reshape(weight.shape)


def input_channels(layer: nn.Module) -> int:
    """Return how many neighboring columns are the input channels of one kernel position."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(layer, _ConvNd)
    return layer.in_channels // layer.groups


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[Float[Tensor, "G N C"]]:
    """Yield the inputs of the layer's matrices, in float32 and in parts that fit the memory.

    `rows @ matrices(layer).mT` is what the layer computes, without its bias.

    Args:
        layer: Linear layer or convolution, not a transposed one.
        x: Its input.
    """
    if isinstance(layer, nn.Linear):
        flat = x.detach().reshape(-1, layer.in_features)
        for part in torch.split(flat, max(_CHUNK // layer.in_features, 1)):
            yield part.float().unsqueeze(0)
        return
    assert isinstance(layer, _ConvNd)
    assert not isinstance(layer, _ConvTransposeNd)
    if x.dim() == len(layer.kernel_size) + 1:
        x = x.unsqueeze(0)
    grows = math.prod(layer.kernel_size) / math.prod(layer.stride)
    each = max(int(_CHUNK / (x[0].numel() * max(grows, 1.0))), 1)
    for part in torch.split(x.detach(), each):
        yield _unfold(layer, part.float())


def _unfold(layer: _ConvNd, x: Tensor) -> Tensor:
    """Lay out every place of the kernel, (B, I, *size) -> (G, B * places, C)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    rank = len(layer.kernel_size)
    for dim, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        padded = padded.unfold(2 + dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    batch, channels = padded.shape[:2]
    places = padded.shape[2 : 2 + rank]
    grouped = padded.view(batch, layer.groups, channels // layer.groups, *padded.shape[2:])
    # (B, G, I, *places, *kernel) -> (G, B, *places, *kernel, I)
    ordered = grouped.movedim(1, 0).movedim(2, -1)
    return ordered.reshape(layer.groups, batch * math.prod(places), -1)
