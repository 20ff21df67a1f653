"""Follow channels through a network: which entries of which weights belong to one another.

Every output channel of a layer is an atom. Walking the captured graph, each tensor carries, for the
dimensions that hold channels, the atom at each index. Operators move atoms (flatten, concat,
transpose), unite them (an addition makes its operands' channels one) or block them: an operator
that is not known, or that mixes channels, leaves the channels that reach it as they are, and says
why.

Where a dimension is split in several (heads and their depth), what stays must be a rectangle: one
of the new dimensions may shrink, the same for all others. The last is tried first; where something
blocks that, the one before it.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.ops import channel_functions, channel_shapes, channel_sizes
from tersor.ops.atoms import Atoms, Dims, Flow, Value
from tersor.ops.blocks import PassThrough
from tersor.ops.channel_step import Step
from tersor.ops.norms import PartialLayerNorm


def follow(captured: fx.GraphModule, net: nn.Module, *, heads: bool = False) -> Flow:
    """Walk the graph.

    Args:
        captured: What `ops.capture.capture` returned for `net`.
        net: The network; a parameter it uses bare can be cut only if it is one of its own.
        heads: Where a dimension is split, begin with the last but one: heads, not their depth.
    """
    flow = _walk(captured, net, {})
    best: dict[str, int] = {}
    if heads:
        other = _walk(captured, net, dict.fromkeys(flow.splits, 1))
        found = {root for atoms in other.heads for root in other.roots(atoms).tolist()}
        best = {
            name: 1
            for name, (_, atoms) in other.splits.items()
            if found.intersection(other.roots(atoms).tolist())
        }
        flow = _walk(captured, net, best)
    for place in (1, 2):
        stuck = _stuck(flow, place)
        if not stuck:
            continue
        other = _walk(captured, net, {**best, **dict.fromkeys(stuck, place)})
        still = set(_stuck(other, 0))
        best = {**best, **{name: place for name in stuck if name not in still}}
        flow = _walk(captured, net, best)
    return flow


def _stuck(flow: Flow, place: int) -> list[str]:
    """Name the splits in more than `place` parts whose channels are blocked."""
    blocked = flow.blocked()
    return [
        name
        for name, (count, atoms) in flow.splits.items()
        if count > place and any(root in blocked for root in flow.roots(atoms).tolist())
    ]


def _walk(captured: fx.GraphModule, net: nn.Module, choices: dict[str, int]) -> Flow:
    flow = Flow(choices)
    values: dict[fx.Node, Value] = {}
    given = [n.meta.get("shape") for n in captured.graph.nodes if n.op == "placeholder"]
    flow.batch = next((shape[0] for shape in given if shape), 1)
    for node in captured.graph.nodes:
        channel_sizes.note(flow, node, values)
        if node.op == "get_attr" and "shape" not in node.meta:
            _note_bare(captured, node)
        values[node] = _visit(Step(flow, captured, net, node, values))
    _block_tied(flow, net)
    flow.close()
    return flow


def _note_bare(captured: fx.GraphModule, node: fx.Node) -> None:
    """Write shape and dtype of a tensor that the graph reads by name; buffers come without."""
    owner, _, leaf = str(node.target).rpartition(".")
    found = getattr(captured.get_submodule(owner), leaf)
    node.meta["shape"] = None
    if isinstance(found, Tensor):
        node.meta.update(shape=tuple(found.shape), dtype=found.dtype)


def _block_tied(flow: Flow, net: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for tensor in module.parameters(recurse=False):
            owners.setdefault(id(tensor), []).append(name)
    for names in owners.values():
        if len(names) > 1:
            for (layer, _), atoms in flow.ports.items():
                if layer in names or layer.rpartition(".")[0] in names:
                    flow.block(atoms, f"{' and '.join(names)} share a weight")


def _visit(step: Step) -> Value:
    node = step.node
    if node.op == "placeholder":
        return {}
    if node.op == "get_attr":
        return _bare(step)
    if node.op == "output":
        held = [value for n in node.all_input_nodes if (value := step.values.get(n))]
        step.flow.block_all(held, "the network's output")
        return {}
    if node.op == "call_module":
        name = str(node.target)
        layer = step.captured.get_submodule(name)
        rule = _LAYERS.get(type(layer))
        if rule is not None:
            return rule(step, name, layer)
        return step.unknown(type(layer).__name__)
    return _call(step)


def _call(step: Step) -> Value:
    """A function or a method."""
    node, known = step.node, _FUNCTIONS.get(step.name)
    if step.shape is None and step.name in _SHAPE_ONLY:
        return {}
    source = node.args[0] if node.args else None
    if step.name == "getitem" and isinstance(source, fx.Node) and _several(step, source):
        return channel_shapes.getitem(step)
    if step.name == "getattr" and node.args[1] in ("mT", "T"):
        return channel_shapes.transpose(step)
    if step.name in _CALLS:
        made = _layer_call(step)
        if made is not None:
            return made
    if known is None:
        return step.unknown(step.name)
    return known(step) if any(step.dims) else {}


_CALLS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "group_norm": (nn.GroupNorm,),
    "layer_norm": (nn.LayerNorm,),
    "prelu": (nn.PReLU,),
    "embedding": (nn.Embedding,),
}
"""Functions that forwards of a layer's own kind call with its tensors."""


def _layer_call(step: Step) -> Dims | None:
    """Follow F.linear(x, a.weight, a.bias) as a call of the layer `a`; None: it is not one."""
    owners = {str(n.target).rpartition(".")[0] for n in step.sources if n.op == "get_attr"}
    if len(owners) != 1:
        return None
    (owner,) = owners
    layer = _owner(step, owner)
    kind = next((k for k in _CALLS[step.name] if isinstance(layer, k)), None)
    if kind is None or any(step.of(n) for n in step.sources[1:]):
        return None
    _keep_layer(step, owner, layer)
    made = _LAYERS[kind](step, owner, layer)
    assert isinstance(made, dict)
    if isinstance(layer, _ConvNd) and (owner, "depthwise") in step.flow.ports:
        place = "groups" if "groups" in step.node.kwargs else 6
        each = layer.out_channels // layer.groups
        path = ("kwargs", place) if isinstance(place, str) else ("args", place)
        step.number(path, step.flow.ports[owner, "depthwise"], lambda kept: kept // each)
    if isinstance(layer, nn.GroupNorm) and 1 in made:
        share = layer.num_groups / layer.num_channels
        step.number(("args", 1), made[1], lambda kept: round(kept * share))
    return made


def _keep_layer(step: Step, name: str, layer: nn.Module) -> None:
    """Let the graph, which had a layer's tensors alone, have the layer."""
    if type(step.captured.get_submodule(name)) is nn.Module:
        step.captured.set_submodule(name, layer)


def _owner(step: Step, name: str) -> nn.Module:
    try:
        return step.net.get_submodule(name)
    except AttributeError:  # a layer that only the graph has
        return step.captured.get_submodule(name)


def _used_as_layer(node: fx.Node, layer: nn.Module) -> bool:
    """Tell whether a layer's tensor is only given to the function that the layer stands for."""
    for user in node.users:
        name = str(getattr(user.target, "__name__", user.target)).rstrip("_")
        if not isinstance(layer, _CALLS.get(name, ())) or user.args[0] is node:
            return False
        owners = {str(n.target).rpartition(".")[0] for n in user.all_input_nodes[1:]}
        if any(n.op != "get_attr" for n in user.all_input_nodes[1:]) or len(owners) != 1:
            return False
    return True


def _several(step: Step, node: fx.Node) -> bool:
    return isinstance(step.values.get(node), tuple)


_SHAPE_ONLY = frozenset(
    {"getattr", "size", "dim", "len", "numel", "ndimension", "is_floating_point"}
)


_FUNCTIONS = {**channel_functions.RULES, **channel_shapes.RULES}


# --- parameters and buffers used by themselves ----------------------------------------------------


def _bare(step: Step) -> Dims:
    target = str(step.node.target)
    if step.shape is None:
        return {}
    owner, _, leaf = target.rpartition(".")
    holder = _owner(step, owner)
    own = leaf in holder._parameters or leaf in holder._buffers
    if _used_as_layer(step.node, holder):
        return {}
    if isinstance(holder, tuple(_LAYERS)):
        return _bare_of_layer(step, owner, holder, leaf)
    dims = {
        dim: step.flow.made(target, f"dim{dim}", size)
        for dim, size in enumerate(step.shape)
        if size > 1
    }
    if not own:
        step.flow.block_all([dims], f"{target} is a constant")
    return dims


def _bare_of_layer(step: Step, name: str, layer: nn.Module, leaf: str) -> Dims:
    """A weight that is not read by a call of its layer, as in F.linear(x, a.weight)."""
    if isinstance(layer, nn.Linear):
        _keep_layer(step, name, layer)
        out = step.flow.made(name, "out", layer.out_features)
        if leaf == "bias":
            return {0: out}
        return {0: out, 1: step.flow.made(name, "in", layer.in_features)}
    assert step.shape is not None
    dims = {dim: step.flow.new(size) for dim, size in enumerate(step.shape) if size > 1}
    step.flow.block_all([dims], f"{name}.{leaf} is used outside its layer")
    for (other, _), atoms in step.flow.ports.items():
        if other == name:
            step.flow.block(atoms, f"{name}.{leaf} is used outside its layer")
    return dims


# --- layers: (step, name, layer) -> what the result holds ----------------------------------------


def _linear(step: Step, name: str, layer: nn.Linear) -> Dims:
    last = len(step.shapes[0]) - 1
    dims = dict(step.dims[0])
    seen = dims.pop(last, None)
    if seen is not None:
        step.flow.port(name, "in", seen)
        step.read(step.sources[0], last, seen)
    made = step.flow.made(name, "out", layer.out_features)
    places = math.prod(step.shapes[0][:-1])
    step.work(places, made, layer.in_features if seen is None else seen)
    return {**dims, last: made}


def _convolution(step: Step, name: str, layer: _ConvNd) -> Dims:
    rank = len(layer.kernel_size)
    channel = len(step.shapes[0]) - 1 - rank
    dims = dict(step.dims[0])
    seen = dims.pop(channel, None)
    step.flow.block_all([dims], f"{type(layer).__name__} ({step.node.name})")
    groups = layer.groups
    transposed = isinstance(layer, _ConvTransposeNd)
    grid = step.shapes[0] if transposed else step.shape
    assert grid is not None
    cost = math.prod(grid[:channel] + grid[channel + 1 :]) * math.prod(layer.kernel_size)
    if groups > 1 and groups == layer.in_channels and not transposed:
        return _depthwise(step, name, layer, seen, channel, cost)
    made = step.flow.made(name, "out", layer.out_channels)
    if seen is not None:
        step.flow.port(name, "in", seen)
        step.flow.unite_rows(seen.reshape(groups, -1))
        step.read(step.sources[0], channel, seen)
    step.flow.unite_rows(made.reshape(groups, -1))
    step.work(cost / groups, made, layer.in_channels if seen is None else seen)
    return {channel: made}


def _depthwise(
    step: Step, name: str, layer: _ConvNd, seen: Atoms | None, channel: int, cost: float
) -> Dims:
    if seen is None:
        step.work(cost, layer.out_channels)
        return {}
    made = np.repeat(seen, layer.out_channels // layer.groups)
    step.flow.port(name, "depthwise", made)
    step.work(cost, made)
    return {channel: made}


def _norm(step: Step, name: str, layer: nn.Module) -> Dims:
    del layer
    if 1 in step.dims[0]:
        step.flow.port(name, "both", step.dims[0][1])
    return step.dims[0]


def _group_norm(step: Step, name: str, layer: nn.GroupNorm) -> Dims:
    """Whole groups of a norm may go: the others' means stay as they are."""
    atoms = step.dims[0].get(1)
    if any(d > 1 for d in step.dims[0]):
        return step.unknown("GroupNorm")
    if atoms is not None:
        step.flow.unite_rows(atoms.reshape(layer.num_groups, -1).T)
        step.flow.port(name, "both", atoms)
    return step.dims[0]


def _root_mean_square(step: Step, name: str, layer: nn.RMSNorm) -> Dims:
    """A root mean square over fewer channels differs by a factor, which its weight can hold."""
    last = len(step.shapes[0]) - 1
    if len(layer.normalized_shape) > 1:
        rank = len(step.shapes[0])
        over = range(rank - len(layer.normalized_shape), rank)
        return channel_functions.mixing(step, "RMSNorm", over)
    if last in step.dims[0]:
        step.flow.port(name, "both", step.dims[0][last])
        step.read(step.sources[0], last, step.dims[0][last])
    return step.dims[0]


def _layer_norm(step: Step, name: str, layer: nn.LayerNorm) -> Dims:
    """What is cut is counted as zero from then on: see `ops/norms.py`."""
    rank = len(step.shapes[0])
    if len(layer.normalized_shape) > 1:
        over = range(rank - len(layer.normalized_shape), rank)
        return channel_functions.mixing(step, type(layer).__name__, over)
    return _partial_norm(step, name, layer)


def _partial_norm(step: Step, name: str, layer: nn.Module) -> Dims:
    del layer
    last = len(step.shapes[0]) - 1
    if last in step.dims[0]:
        step.flow.port(name, "norm", step.dims[0][last])
        step.read(step.sources[0], last, step.dims[0][last])
        if step.node.op != "call_module":
            step.flow.calls[step.node.name] = name
    return step.dims[0]


def _embedding(step: Step, name: str, layer: nn.Embedding) -> Dims:
    assert step.shape is not None
    made = step.flow.made(name, "out", layer.embedding_dim)
    if layer.max_norm is not None:
        step.block(made, "an embedding with max_norm mixes channels")
    return {len(step.shape) - 1: made}


def _prelu(step: Step, name: str, layer: nn.PReLU) -> Dims:
    if layer.num_parameters > 1 and 1 in step.dims[0]:
        step.flow.port(name, "both", step.dims[0][1])
    return step.dims[0]


def _recurrent(step: Step, name: str, layer: nn.LSTM | nn.GRU) -> Value:
    """One hidden size for all layers and directions: a hidden channel goes from each of them."""
    if getattr(layer, "proj_size", 0) or not step.shapes:
        return step.unknown(f"{type(layer).__name__} with projections")
    seen = dict(step.dims[0])
    last = seen.pop(len(step.shapes[0]) - 1, None)
    step.flow.block_all([seen], f"{type(layer).__name__} ({step.node.name})")
    if last is not None:
        step.flow.port(name, "in", last)
        step.read(step.sources[0], len(step.shapes[0]) - 1, last)
    hidden = step.flow.made(name, "hidden", layer.hidden_size)
    for dims, shape in zip(step.dims[1:], step.shapes[1:], strict=True):
        if len(shape) - 1 in dims:
            step.flow.unite(hidden, dims[len(shape) - 1])
        else:
            step.block(hidden, "a state that is not channels")
    given = step.argument(1, "hx")
    whole = step.values.get(given) if isinstance(given, fx.Node) else None
    for state_of in whole if isinstance(whole, tuple) else ():  # of another layer, as it is
        assert isinstance(state_of, dict)
        step.flow.unite(hidden, state_of[len(step.shapes[0]) - 1])
    _recurrent_work(step, layer, hidden, last)
    rank = len(step.shapes[0])
    outputs = {rank - 1: np.tile(hidden, 2 if layer.bidirectional else 1)}
    state: Dims = {rank - 1: hidden}
    return (outputs, (state, state) if isinstance(layer, nn.LSTM) else state)


def _recurrent_work(step: Step, layer: nn.LSTM | nn.GRU, hidden: Atoms, seen: Atoms | None) -> None:
    shape = step.shapes[0]
    steps = math.prod(shape[:-1])
    directions = 2 if layer.bidirectional else 1
    cost = steps * directions * (4 if isinstance(layer, nn.LSTM) else 3)
    step.work(cost, hidden, layer.input_size if seen is None else seen)
    step.work(cost * layer.num_layers, hidden, hidden)
    step.work(cost * directions * (layer.num_layers - 1), hidden, hidden)


def _softmax(step: Step, name: str, layer: nn.Softmax | nn.LogSoftmax) -> Dims:
    del name
    return channel_functions.mixing(step, type(layer).__name__, step.listed(layer.dim))


def _elementwise(step: Step, name: str, layer: nn.Module) -> Dims:
    del name, layer
    return channel_functions.elementwise(step)


def _pool(step: Step, name: str, layer: nn.Module) -> Dims:
    del name
    return channel_functions.spatial(step, type(layer).__name__)


def _flatten(step: Step, name: str, layer: nn.Flatten) -> Dims:
    del name, layer
    return channel_shapes.regroup(step, None)


def _shuffle(step: Step, name: str, layer: nn.ChannelShuffle) -> Dims:
    """Groups of channels are interleaved; each loses the same ones."""
    del name
    atoms = step.dims[0].get(1)
    if atoms is None:
        return dict(step.dims[0])
    table = atoms.reshape(layer.groups, -1)
    step.flow.unite_rows(table)
    return {**step.dims[0], 1: table.T.reshape(-1)}


def _pixel(step: Step, name: str, layer: nn.PixelShuffle | nn.PixelUnshuffle) -> Dims:
    del name
    if isinstance(layer, nn.PixelShuffle):
        return channel_shapes.pixel_shuffle(step, layer.upscale_factor)
    return channel_shapes.pixel_unshuffle(step, layer.downscale_factor)


def _gated(step: Step, name: str, layer: nn.GLU) -> Dims:
    del name
    return channel_functions.gated(step, layer.dim)


Rule = Callable[..., Value]
_LAYERS: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _norm),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    PartialLayerNorm: _partial_norm,
    nn.RMSNorm: _root_mean_square,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    **dict.fromkeys((nn.LSTM, nn.GRU), _recurrent),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _softmax),
    **dict.fromkeys(
        (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
            *(nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.Tanh, nn.Hardswish),
            *(nn.Hardsigmoid, nn.Hardtanh, nn.Identity, PassThrough, nn.Dropout, nn.Dropout1d),
            *(nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        (
            *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
            *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
            *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.UpsamplingBilinear2d),
            *(nn.UpsamplingNearest2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
        ),
        _pool,
    ),
    nn.Flatten: _flatten,
    nn.ChannelShuffle: _shuffle,
    nn.GLU: _gated,
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle), _pixel),
}
