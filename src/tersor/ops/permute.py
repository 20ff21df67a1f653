"""Put the channels of a group into another order, in every layer that holds them.

The layers that make the channels write them in the new order, those that read them expect it, so
the network computes what it did.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tersor.ops.groups import Group
from tersor.ops.norms import PartialLayerNorm

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, PartialLayerNorm)
_LEAVES = ("weight", "bias", "running_mean", "running_var")


def permute(net: nn.Module, group: Group, order: Sequence[int]) -> None:
    """Reorder the channels of a group, in place.

    Args:
        net: The network that the group was found in.
        group: Its channels.
        order: For each channel of the group, which one comes to its place.

    Raises:
        ValueError: some layer's weights cannot be reordered like that; says why. The network is
            unchanged.
    """
    changes = [
        change
        for (name, side), places in group.indices.items()
        for change in _changes(net, name, side, _moves(name, places, order))
    ]
    with torch.no_grad():
        for tensor, made in changes:
            tensor.copy_(made)


def _moves(name: str, places: Sequence[tuple[int, ...]], order: Sequence[int]) -> dict[int, int]:
    """Map places to the ones whose content they get."""
    if any(len(places[k]) != len(places[source]) for k, source in enumerate(order)):
        raise ValueError(f"{name} holds some of its channels more often than others")
    return {
        place: came
        for k, source in enumerate(order)
        for place, came in zip(places[k], places[source], strict=True)
    }


def _changes(
    net: nn.Module, name: str, side: str, moves: dict[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Return tensors of a layer, and what is to be in them."""
    if side.startswith("dim"):
        owner, _, leaf = name.rpartition(".")
        tensor: Any = getattr(net.get_submodule(owner), leaf)
        return [_along(tensor, int(side[3:]), moves)]
    layer: Any = net.get_submodule(name)
    if isinstance(layer, _NORMS):
        leaves = [getattr(layer, leaf, None) for leaf in _LEAVES]
        return [_along(leaf, 0, moves) for leaf in leaves if leaf is not None]
    if not isinstance(layer, (nn.Linear, _ConvNd)) or side not in ("out", "in", "depthwise"):
        raise ValueError(f"{name} is a {type(layer).__name__}, whose channels ({side}) stay")
    made = [_along(layer.bias, 0, moves)] if side != "in" and layer.bias is not None else []
    # the weight has one group's worth of channels in dimension 1, all of them in dimension 0
    first = (side == "in") == isinstance(layer, _ConvTransposeNd)
    if first:
        return [*made, _along(layer.weight, 0, moves)]
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return [*made, _within_groups(name, layer.weight, groups, moves)]


def _along(tensor: Tensor, dim: int, moves: dict[int, int]) -> tuple[Tensor, Tensor]:
    index = torch.arange(tensor.shape[dim])
    index[list(moves)] = torch.tensor(list(moves.values()))
    return tensor, tensor.detach().index_select(dim, index.to(tensor.device))


def _within_groups(
    name: str, weight: Tensor, groups: int, moves: dict[int, int]
) -> tuple[Tensor, Tensor]:
    each = weight.shape[1]
    if any(place // each != came // each for place, came in moves.items()):
        raise ValueError(f"{name} holds its channels in groups that they cannot leave")
    made = weight.detach().clone()
    rows = weight.shape[0] // groups
    for group in range(groups):
        index = torch.tensor(
            [moves.get(i, i) % each for i in range(group * each, (group + 1) * each)]
        )
        own = slice(group * rows, (group + 1) * rows)
        made[own] = weight.detach()[own].index_select(1, index.to(weight.device))
    return weight, made
