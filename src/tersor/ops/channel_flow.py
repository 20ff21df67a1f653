"""Follow channels through a network: which entries of which weights belong to one another.

Every output channel of a layer is an atom. Walking the captured graph, each tensor carries, for the
dimensions that hold channels, the atom at each index. Operators move atoms (flatten, concat,
transpose), unite them (an addition makes its operands' channels one) or block them: an operator
that is not known, or that mixes channels, leaves the channels that reach it as they are, and says
why.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.ops.atoms import Atoms, Dims, Flow
from tersor.ops.blocks import PassThrough


def follow(captured: fx.GraphModule, net: nn.Module) -> Flow:
    """Walk the graph.

    Args:
        captured: What `ops.capture.capture` returned for `net`.
        net: The network; a parameter it uses bare can be cut only if it is one of its own.
    """
    flow = Flow()
    values: dict[fx.Node, Dims] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr" and "shape" not in node.meta:
            node.meta["shape"] = _bare_shape(captured, str(node.target))
        values[node] = _Step(flow, captured, net, node, values).run()
    _block_tied(flow, net)
    return flow


def _bare_shape(captured: fx.GraphModule, target: str) -> tuple[int, ...] | None:
    """Return the shape of a tensor that the graph reads by name; buffers come without a note."""
    owner, _, leaf = target.rpartition(".")
    found = getattr(captured.get_submodule(owner), leaf)
    return tuple(found.shape) if isinstance(found, Tensor) else None


def _block_tied(flow: Flow, net: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for tensor in module.parameters(recurse=False):
            owners.setdefault(id(tensor), []).append(name)
    for names in owners.values():
        if len(names) > 1:
            for (layer, _), atoms in flow.ports.items():
                if layer in names:
                    flow.block(atoms, f"{' and '.join(names)} share a weight")


class _Step:
    """One node of the graph."""

    def __init__(
        self,
        flow: Flow,
        captured: fx.GraphModule,
        net: nn.Module,
        node: fx.Node,
        values: dict[fx.Node, Dims],
    ) -> None:
        self.flow, self.captured, self.net, self.node = flow, captured, net, node
        self.values = values
        self.sources = [n for n in node.all_input_nodes if n.meta.get("shape") is not None]
        self.dims = [values[n] for n in self.sources]
        self.shapes: list[tuple[int, ...]] = [n.meta["shape"] for n in self.sources]
        self.shape: tuple[int, ...] | None = node.meta.get("shape")

    def run(self) -> Dims:
        node = self.node
        if node.op == "placeholder":
            return {}
        if node.op == "get_attr":
            return self.bare()
        if node.op == "output":
            self.flow.block_all(self.dims, "the network's output")
            return {}
        if node.op == "call_module":
            layer = self.captured.get_submodule(str(node.target))
            return self.module(str(node.target), layer)
        # a method's target is its name already
        name = str(getattr(node.target, "__name__", node.target))
        return self.function(name.rstrip("_"))

    def unknown(self, what: str) -> Dims:
        carries = [dims for dims in self.dims if dims]
        if carries:
            self.flow.block_all(carries, f"{what} ({self.node.name})")
        return {}

    # -- layers

    def module(self, name: str, layer: nn.Module) -> Dims:
        kind = type(layer)
        if kind in _CONVOLUTIONS:
            return self.convolution(name, layer)  # type: ignore[arg-type]  # checked by its kind
        if kind is nn.Linear:
            return self.linear(name, layer)  # type: ignore[arg-type]  # checked by its kind
        if isinstance(layer, _BatchNorm) and kind in _BATCH_NORMS:
            return self.norm(name)
        if kind in _NORMS:
            return self.mixing(kind.__name__, _normalized(layer, self.shapes[0]))
        if kind in _POOLS:
            return self.spatial(kind.__name__)
        if isinstance(layer, nn.Flatten):
            return self.flatten(layer.start_dim, layer.end_dim)
        if isinstance(layer, (nn.Softmax, nn.LogSoftmax)):
            return self.mixing(kind.__name__, self.listed(layer.dim))
        if kind in _ELEMENTWISE_LAYERS:
            return self.elementwise(kind.__name__)
        return self.unknown(kind.__name__)

    def convolution(self, name: str, layer: _ConvNd) -> Dims:
        rank = len(layer.kernel_size)
        channel = len(self.shapes[0]) - 1 - rank
        dims = dict(self.dims[0])
        seen = dims.pop(channel, None)
        made: Atoms | None
        self.flow.block_all([dims], f"{type(layer).__name__} ({self.node.name})")
        groups = layer.groups
        if groups > 1 and groups == layer.in_channels and not isinstance(layer, _ConvTransposeNd):
            if seen is None:
                return {}
            made = np.repeat(seen, layer.out_channels // groups)
            self.flow.port(name, "depthwise", made)
            return {channel: made}
        if seen is not None:
            self.flow.port(name, "in", seen)
            self.unite_groups(seen, groups)
        made = self.flow.ports.get((name, "out"))
        if made is None:
            made = self.flow.port(name, "out", self.flow.new(layer.out_channels))
        self.unite_groups(made, groups)
        return {channel: made}

    def unite_groups(self, atoms: Atoms, groups: int) -> None:
        """Let every group of a grouped convolution lose as many channels as the others."""
        for row in atoms.reshape(groups, -1)[1:]:
            self.flow.unite(atoms.reshape(groups, -1)[0], row)

    def linear(self, name: str, layer: nn.Linear) -> Dims:
        last = len(self.shapes[0]) - 1
        dims = dict(self.dims[0])
        seen = dims.pop(last, None)
        if seen is not None:
            self.flow.port(name, "in", seen)
        made = self.flow.ports.get((name, "out"))
        if made is None:
            made = self.flow.port(name, "out", self.flow.new(layer.out_features))
        return {**dims, last: made}

    def norm(self, name: str) -> Dims:
        if 1 in self.dims[0]:
            self.flow.port(name, "both", self.dims[0][1])
        return self.dims[0]

    def bare(self) -> Dims:
        """A parameter or buffer used by itself."""
        target = str(self.node.target)
        if self.shape is None:
            return {}
        owner, _, leaf = target.rpartition(".")
        dims = {}
        try:
            holder = self.net.get_submodule(owner)
            own = isinstance(getattr(holder, leaf, None), nn.Parameter)
        except AttributeError:
            own = False
        for dim, size in enumerate(self.shape):
            if size > 1:
                dims[dim] = self.flow.port(target, f"dim{dim}", self.flow.new(size))
        if not own or type(holder) in _LAYERS:
            self.flow.block_all([dims], f"{target} is used outside a layer")
            for (layer, _), atoms in self.flow.ports.items():
                if layer == owner:
                    self.flow.block(atoms, f"{target} is used outside its layer")
        return dims

    # -- functions

    def function(self, name: str) -> Dims:
        if name in _SHAPE_ONLY and self.shape is None:
            return {}
        if not any(self.dims):
            return {}
        if name in _ELEMENTWISE:
            return self.elementwise(name)
        if name in _SPATIAL:
            return self.spatial(name)
        if name in _MIXING:
            return self.mixing(name, self.listed(self.argument(1, _MIXING[name])))
        rule: Callable[[], Dims] | None = getattr(self, f"on_{name}", None)
        return rule() if rule else self.unknown(name)

    def argument(self, place: int, keyword: str, default: Any = None) -> Any:
        if keyword in self.node.kwargs:
            return self.node.kwargs[keyword]
        return self.node.args[place] if len(self.node.args) > place else default

    def listed(self, dims: Any) -> list[int]:
        """Turn a `dim` argument into dimensions counted from the front; None means all."""
        rank = len(self.shapes[0])
        if dims is None:
            return list(range(rank))
        return [int(d) % rank for d in (dims if isinstance(dims, (tuple, list)) else [dims])]

    def elementwise(self, name: str) -> Dims:
        """Unite what meets at the same index; dimensions are aligned at the end."""
        if self.shape is None:
            return self.unknown(name)
        made: Dims = {}
        for dim, size in enumerate(self.shape):
            if size == 1:
                continue
            met = []
            fixed = False
            for dims, shape in zip(self.dims, self.shapes, strict=True):
                own = dim - (len(self.shape) - len(shape))
                if own < 0 or shape[own] == 1:
                    continue
                if own in dims:
                    met.append(dims[own])
                else:
                    fixed = True
            for atoms in met[1:]:
                self.flow.unite(met[0], atoms)
            if met:
                made[dim] = met[0]
            if met and fixed:
                self.flow.block(
                    met[0], f"{name} with values that are not channels ({self.node.name})"
                )
        return made

    def spatial(self, name: str) -> Dims:
        """Pooling and resizing: batch and channels pass, nothing else may carry atoms."""
        digit = next((int(c) for c in name if c.isdigit()), len(self.shapes[0]) - 2)
        kept = len(self.shapes[0]) - digit
        if self.shape is None or any(dim >= kept for dim in self.dims[0]):
            return self.unknown(name)
        return dict(self.dims[0])

    def mixing(self, name: str, over: Sequence[int]) -> Dims:
        """Operators that mix all values along some dimensions."""
        for dim, atoms in self.dims[0].items():
            if dim in over:
                self.flow.block(atoms, f"{name} mixes channels ({self.node.name})")
        self.flow.block_all(self.dims[1:], f"{name} ({self.node.name})")
        return dict(self.dims[0])

    def flatten(self, start: int, end: int) -> Dims:
        shape, dims = self.shapes[0], self.dims[0]
        rank = len(shape)
        start, end = start % rank, end % rank
        made = {d: a for d, a in dims.items() if d < start}
        made |= {d - (end - start): a for d, a in dims.items() if d > end}
        inside = [d for d in dims if start <= d <= end]
        if start == 0 and inside and end > 0:
            return self.unknown("flatten of the batch dimension")
        if len(inside) > 1:
            return self.unknown("flatten of two channel dimensions")
        if inside:
            (dim,) = inside
            along = dims[dim].reshape([-1 if d == dim else 1 for d in range(start, end + 1)])
            made[start] = np.broadcast_to(along, shape[start : end + 1]).reshape(-1)
        return made

    def on_flatten(self) -> Dims:
        return self.flatten(self.argument(1, "start_dim", 0), self.argument(2, "end_dim", -1))

    def on_reshape(self) -> Dims:
        sizes = self.node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        before, dims = self.shapes[0], self.dims[0]
        if self.shape is None or not sizes:
            return self.unknown("reshape")
        same = 0
        while same < min(len(before), len(self.shape)) and before[same] == self.shape[same]:
            same += 1
        free = [isinstance(size, fx.Node) or size == -1 for size in sizes]
        # (N, C, ...) -> (N, -1): all that is left goes into the last dimension
        if same and same == len(self.shape) - 1 and sizes[-1] == -1:
            fixed = [d for d in dims if d < same and not free[d]]
            return self.flatten(same, -1) if not fixed else self.unknown("reshape to a fixed size")
        if any(dim >= same or not free[dim] for dim in dims):
            return self.unknown("reshape")
        return dict(dims)

    on_view = on_reshape

    def reduce(self) -> Dims:
        over = self.listed(self.argument(1, "dim"))
        name = str(getattr(self.node.target, "__name__", self.node.target))
        if self.shape is None or any(dim in self.dims[0] for dim in over):
            return self.unknown(f"{name} over channels")
        keep = bool(self.argument(2, "keepdim", False))
        if keep:
            return dict(self.dims[0])
        return {d - sum(o < d for o in over): a for d, a in self.dims[0].items()}

    on_mean = on_sum = on_amax = on_amin = reduce

    def on_cat(self) -> Dims:
        tensors = self.argument(0, "tensors")
        if self.shape is None or not isinstance(tensors, (tuple, list)):
            return self.unknown("cat")
        along = int(self.argument(1, "dim", 0)) % len(self.shape)
        made: Dims = {}
        for dim in range(len(self.shape)):
            given = [self.values[n].get(dim) for n in tensors]
            if all(atoms is None for atoms in given):
                continue
            if dim == along:
                made[dim] = np.concatenate(
                    [
                        self.flow.new(n.meta["shape"][dim]) if atoms is None else atoms
                        for n, atoms in zip(tensors, given, strict=True)
                    ]
                )
                continue
            known = [atoms for atoms in given if atoms is not None]
            for atoms in known[1:]:
                self.flow.unite(known[0], atoms)
            if len(known) < len(given):
                self.flow.block(
                    known[0], f"cat with values that are not channels ({self.node.name})"
                )
            made[dim] = known[0]
        return made

    on_concat = on_cat

    def on_pad(self) -> Dims:
        amounts = self.argument(1, "pad")
        rank = len(self.shapes[0])
        if not isinstance(amounts, (tuple, list)):
            return self.unknown("pad")
        made = {}
        for dim, atoms in self.dims[0].items():
            place = 2 * (rank - 1 - dim)
            if any(isinstance(a, fx.Node) or a != 0 for a in amounts[place : place + 2]):
                self.flow.block(atoms, f"pad adds channels ({self.node.name})")
            else:
                made[dim] = atoms
        return made

    def on_getitem(self) -> Dims:
        index = self.node.args[1]
        items = list(index) if isinstance(index, tuple) else [index]
        rank = len(self.shapes[0])
        if self.shape is None or any(isinstance(i, (Tensor, list, fx.Node)) for i in items):
            return self.unknown("indexing")
        taken = sum(i is not None and i is not Ellipsis for i in items)
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = [slice(None)] * (rank - taken)
        else:
            items += [slice(None)] * (rank - taken)
        made: Dims = {}
        old = new = 0
        for item in items:
            atoms = None if item is None else self.dims[0].get(old)
            if atoms is not None and item != slice(None):
                self.flow.block(atoms, f"indexing selects channels ({self.node.name})")
            elif atoms is not None:
                made[new] = atoms
            old += item is not None
            new += item is None or isinstance(item, slice)
        return made

    def on_permute(self) -> Dims:
        order = self.argument(1, "dims")
        order = order if isinstance(order, (tuple, list)) else self.node.args[1:]
        places = self.listed(order)
        return {new: self.dims[0][old] for new, old in enumerate(places) if old in self.dims[0]}

    def on_transpose(self) -> Dims:
        a, b = self.listed([self.argument(1, "dim0"), self.argument(2, "dim1")])
        swap = {a: b, b: a}
        return {swap.get(d, d): atoms for d, atoms in self.dims[0].items()}

    def on_unsqueeze(self) -> Dims:
        at = int(self.argument(1, "dim")) % (len(self.shapes[0]) + 1)
        return {d + (d >= at): atoms for d, atoms in self.dims[0].items()}

    def on_squeeze(self) -> Dims:
        over = self.listed(self.argument(1, "dim"))
        gone = [d for d in over if self.shapes[0][d] == 1]
        return {d - sum(g < d for g in gone): a for d, a in self.dims[0].items()}

    def on_expand(self) -> Dims:
        sizes = self.node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        shift = len(sizes) - len(self.shapes[0])
        for dim, atoms in self.dims[0].items():
            if sizes[dim + shift] != -1 and not isinstance(sizes[dim + shift], fx.Node):
                self.flow.block(atoms, f"expand to a fixed size ({self.node.name})")
        return {d + shift: atoms for d, atoms in self.dims[0].items()}


def _normalized(layer: nn.Module, shape: tuple[int, ...]) -> list[int]:
    """Return the dimensions over which a norm takes its mean."""
    if isinstance(layer, nn.GroupNorm):
        return list(range(1, len(shape)))
    assert isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    return list(range(len(shape) - len(layer.normalized_shape), len(shape)))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_LAYERS = (*_CONVOLUTIONS, nn.Linear, *_BATCH_NORMS, *_NORMS)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
)
_ELEMENTWISE_LAYERS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.Identity, PassThrough, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
_ELEMENTWISE = _words("""
    relu relu6 leaky_relu elu gelu silu mish softplus sigmoid tanh hardswish hardsigmoid hardtanh
    dropout dropout1d dropout2d dropout3d clamp clamp_min clamp_max abs neg exp sqrt rsqrt square
    pow contiguous clone detach float to type_as add iadd sub isub rsub mul imul div truediv
    itruediv maximum minimum
""")
_SPATIAL = _words("""
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_max_pool2d interpolate upsample
""")
_MIXING = {"softmax": "dim", "log_softmax": "dim"}
_SHAPE_ONLY = frozenset({"getattr", "size", "dim", "len", "numel", "ndimension"})
