"""Cut channels: tensors that hold one become smaller, layers and graphs write the new numbers."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tersor.ops.atoms import Flow, Number, Path, Port
from tersor.ops.capture import drop_dead
from tersor.ops.norms import PartialLayerNorm, without

# C channels at a port, R all other numbers of a tensor


class Place(NamedTuple):
    """Where a tensor of a layer holds channels: `blocks` times in a row along `dim`."""

    leaf: str
    dim: int
    blocks: int = 1


def places(layer: nn.Module, side: str) -> list[Place]:
    """List the tensors that hold the channels at a port, first the ones that make or read them."""
    if side.startswith("dim"):
        raise AssertionError("a bare parameter is not a layer")
    if isinstance(layer, (_BatchNorm, _InstanceNorm)):
        found = [Place(leaf, 0) for leaf in ("weight", "bias", "running_mean", "running_var")]
    elif isinstance(layer, (nn.GroupNorm, nn.RMSNorm, nn.PReLU)):
        found = [Place("weight", 0), Place("bias", 0)]
    elif isinstance(layer, nn.Embedding):
        found = [Place("weight", 1)]
    elif isinstance(layer, (nn.LSTM, nn.GRU)):
        return _recurrent_places(layer, side)
    elif side == "in":
        found = [Place("weight", 0 if isinstance(layer, _ConvTransposeNd) else 1)]
    else:
        first = 1 if isinstance(layer, _ConvTransposeNd) else 0
        found = [Place("weight", first), Place("bias", 0)]
    return [place for place in found if getattr(layer, place.leaf, None) is not None]


def _recurrent_places(layer: nn.LSTM | nn.GRU, side: str) -> list[Place]:
    gates = 4 if isinstance(layer, nn.LSTM) else 3
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    if side == "in":
        return [Place(f"weight_ih_l0{end}", 1) for end in ends]
    found = []
    for number in range(layer.num_layers):
        for end in ends:
            names = [f"{kind}_l{number}{end}" for kind in ("weight_ih", "weight_hh")]
            if layer.bias:
                names += [f"{kind}_l{number}{end}" for kind in ("bias_ih", "bias_hh")]
            found += [Place(name, 0, gates) for name in names]
            found.append(Place(names[1], 1))
            if number:
                found.append(Place(names[0], 1, len(ends)))
    return found


def by_channel(layer: nn.Module, tensor: Tensor, place: Place) -> Tensor:
    """Return a tensor of a layer as (C, R): everything that belongs to each channel.

    Args:
        layer: Its owner.
        tensor: The parameter, or something of its shape, as a gradient.
        place: From `places`.
    """
    if (
        isinstance(layer, _ConvNd)
        and layer.groups > 1
        and place.leaf == "weight"
        and place.dim == 1
    ):
        # one group's worth of channels in dimension 1; the groups lie in dimension 0
        split = tensor.reshape(layer.groups, -1, *tensor.shape[1:])
        return split.transpose(1, 2).flatten(0, 1).flatten(1)
    if place.blocks > 1:
        shape = list(tensor.shape)
        shape[place.dim : place.dim + 1] = [place.blocks, shape[place.dim] // place.blocks]
        return tensor.reshape(shape).movedim(place.dim + 1, 0).flatten(1)
    moved = tensor.movedim(place.dim, 0)
    return moved.flatten(1) if moved.dim() > 1 else moved[:, None]


def cut(net: nn.Module, gone: Mapping[Port, Iterable[int]]) -> None:
    """Remove channels from the layers of a network.

    Args:
        net: Changed in place.
        gone: Port -> which of its channels go.
    """
    with torch.no_grad():
        for (name, side), lost in gone.items():
            if not lost:
                continue
            if side.startswith("dim"):
                owner, _, leaf = name.rpartition(".")
                _keep(net.get_submodule(owner), Place(leaf, int(side[3:])), set(lost))
            elif side == "norm":
                layer = net.get_submodule(name)
                assert isinstance(layer, (nn.LayerNorm, PartialLayerNorm))
                net.set_submodule(_partial(net, name), without(layer, set(lost)))
            else:
                _cut_layer(net.get_submodule(name), side, set(lost))


def _partial(net: nn.Module, name: str) -> str:
    """Name the place of a layer norm without channels: that of the whole, if it holds no others."""
    return f"{name}_partial" if any(True for _ in net.get_submodule(name).children()) else name


def _cut_layer(layer: nn.Module, side: str, gone: set[int]) -> None:
    count, lost = _width(layer, side), len(gone)
    for place in places(layer, side):
        grouped = isinstance(layer, _ConvNd) and layer.groups > 1 and place.dim == 1
        if grouped and place.leaf == "weight":
            assert isinstance(layer, _ConvNd)
            per_group = count // layer.groups
            _keep(layer, place, {i % per_group for i in gone})
        else:
            _keep(layer, place, {b * count + i for b in range(place.blocks) for i in gone})
    _shrink(layer, side, lost)


def _width(layer: nn.Module, side: str) -> int:
    """Return how many channels a layer has at a port."""
    word = _WIDTHS.get((type(layer), side))
    if word is None:
        kind = next(k for k, s in _WIDTHS if isinstance(layer, k) and s == side)
        word = _WIDTHS[kind, side]
    width: int = getattr(layer, word)
    if isinstance(layer, nn.RMSNorm):
        return layer.normalized_shape[0]
    return width


_WIDTHS: dict[tuple[type[nn.Module], str], str] = {
    (nn.Linear, "out"): "out_features",
    (nn.Linear, "in"): "in_features",
    (_ConvNd, "out"): "out_channels",
    (_ConvNd, "in"): "in_channels",
    (_ConvNd, "depthwise"): "out_channels",
    (_BatchNorm, "both"): "num_features",
    (_InstanceNorm, "both"): "num_features",
    (nn.GroupNorm, "both"): "num_channels",
    (nn.RMSNorm, "both"): "normalized_shape",
    (nn.PReLU, "both"): "num_parameters",
    (nn.Embedding, "out"): "embedding_dim",
    **{(kind, "in"): "input_size" for kind in (nn.LSTM, nn.GRU)},
    **{(kind, "hidden"): "hidden_size" for kind in (nn.LSTM, nn.GRU)},
}


def _shrink(layer: nn.Module, side: str, lost: int) -> None:
    """Bring the numbers of a layer in line with its tensors."""
    if isinstance(layer, nn.RMSNorm):
        _shrink_root_mean_square(layer, lost)
        return
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups -= lost * layer.num_groups // layer.num_channels
        layer.num_channels -= lost
        return
    if isinstance(layer, _ConvNd) and side == "depthwise":
        each = layer.out_channels // layer.groups
        layer.out_channels -= lost
        layer.in_channels = layer.groups = layer.out_channels // each
        return
    kind = next(k for k, s in _WIDTHS if isinstance(layer, k) and s == side)
    word = _WIDTHS[kind, side]
    setattr(layer, word, getattr(layer, word) - lost)
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        layer.flatten_parameters()


def _shrink_root_mean_square(layer: nn.RMSNorm, lost: int) -> None:
    """The mean of squares is over fewer: weight and eps hold the factor, so nothing changes."""
    before = layer.normalized_shape[0]
    share = (before - lost) / before
    layer.normalized_shape = (before - lost,)
    if layer.weight is None:  # the factor needs a place
        layer.weight = nn.Parameter(torch.ones(layer.normalized_shape))
        layer.elementwise_affine = True
    eps = torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps
    layer.eps = eps / share
    layer.weight.mul_(math.sqrt(1 / share))


def _keep(owner: nn.Module, place: Place, gone: set[int]) -> None:
    """Drop indices of one tensor of a module."""
    tensor = getattr(owner, place.leaf)
    kept = torch.tensor([i for i in range(tensor.shape[place.dim]) if i not in gone])
    smaller = tensor.detach().index_select(place.dim, kept.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    setattr(owner, place.leaf, smaller)


def rewrite(captured: fx.GraphModule, flow: Flow, gone: set[int]) -> None:
    """Bring the numbers that are written in a graph in line with channels that are gone.

    Args:
        captured: Or a copy of it, with nodes of the same names; changed.
        flow: What `follow` found for it.
        gone: Roots of the atoms that went.
    """
    nodes = {node.name: node for node in captured.graph.nodes}
    lost = flow.lost(gone)
    for number in flow.numbers:
        kept = int((~lost[number.atoms]).sum())
        if kept < len(number.atoms):
            _write(nodes[number.node], number, number.value(kept))
    for name, called in flow.calls.items():
        owner = _partial(captured, called)
        modules = dict(captured.named_modules())
        if isinstance(modules.get(owner), PartialLayerNorm):
            _call_instead(captured.graph, nodes[name], owner)
    for name, atoms in flow.means:
        share = float((~lost[atoms]).mean())
        if share < 1:
            _scale(captured.graph, nodes[name], share)
    drop_dead(captured)
    captured.recompile()


def _call_instead(graph: fx.Graph, node: fx.Node, owner: str) -> None:
    with graph.inserting_before(node):
        made = graph.call_module(owner, (node.args[0],))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _scale(graph: fx.Graph, node: fx.Node, share: float) -> None:
    users = list(node.users)
    with graph.inserting_after(node):
        made = graph.call_function(torch.mul, (node, share))
    made.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, made)


def _write(node: fx.Node, number: Number, value: Any) -> None:
    if number.path[0] == "kwargs":
        node.kwargs = _placed(dict(node.kwargs), number.path[1:], value)
    else:
        node.args = _placed(node.args, number.path[1:], value)


def _placed(tree: Any, path: Path, value: Any) -> Any:
    """Return a copy of an argument with another value at a place."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(tree, slice):
        ends = {word: getattr(tree, word) for word in ("start", "stop", "step")}
        ends[str(head)] = value
        return slice(ends["start"], ends["stop"], ends["step"])
    if isinstance(tree, dict):
        return {**tree, head: _placed(tree.get(head), rest, value)}
    assert isinstance(head, int)
    items = list(tree)
    items[head] = _placed(items[head], rest, value)
    return tuple(items) if isinstance(tree, tuple) else items


def masked(captured: fx.GraphModule, flow: Flow, gone: set[int]) -> fx.GraphModule:
    """Return the uncut network in which nothing that sums over channels sees the ones that go.

    Args:
        captured: Not changed.
        flow: What `follow` found for it.
        gone: Roots of the atoms that are to count for nothing.
    """
    made = copy.deepcopy(captured)
    nodes = {node.name: node for node in made.graph.nodes}
    lost = flow.lost(gone)
    for index, read in enumerate(flow.reads):
        keep = torch.from_numpy(~lost[read.atoms])
        if bool(keep.all()):
            continue
        node, operand = nodes[read.node], nodes[read.operand]
        rank = len(operand.meta["shape"])
        name = f"mask_{index}"
        shape = [-1 if dim == read.dim else 1 for dim in range(rank)]
        made.register_buffer(name, keep.to(operand.meta["dtype"]).reshape(shape))
        with made.graph.inserting_before(node):
            mask = made.graph.get_attr(name)
            seen = made.graph.call_function(torch.mul, (operand, mask))
        node.replace_input_with(operand, seen)
    with torch.no_grad():
        for (name, side), atoms in flow.ports.items():
            if side == "hidden":
                _forget(made.get_submodule(name), lost[atoms].nonzero()[0].tolist())
    made.recompile()
    return made


def _forget(layer: nn.Module, gone: list[int]) -> None:
    """Let a recurrent layer not read some of its own hidden channels."""
    for place in places(layer, "hidden"):
        if place.dim == 1:
            by_channel = getattr(layer, place.leaf).unflatten(1, (place.blocks, -1))
            by_channel[:, :, gone] = 0
