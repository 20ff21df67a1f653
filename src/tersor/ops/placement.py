"""Where activations are rounded, so that runtimes fuse the roundings with their integer operators.

ONNX Runtime, OpenVINO and TensorRT compute a layer in integers only if its inputs, and for most
layers its output, are rounded. An operator between two integer layers that is left without
roundings costs a conversion to float and back, more than the integer layer saves. So every tensor
between integer operators is rounded, once:

- inputs of convolutions and linear layers;
- outputs of convolutions, after the ReLU, ReLU6 or clamp that runtimes fuse into them, never before
  it
  (but not where only reshaping follows, as where patches become the tokens of a transformer);
- both inputs and the output of an addition that joins convolutions (its ReLU again included), but
  not the convolution that OpenVINO and TensorRT compute the addition in;
- inputs and output of a concatenation, with one scale where the runtime does not take several;
- what merely moves or selects numbers (max pooling, padding with zeros, slicing, reshaping, nearest
  resizing) keeps the scale of its input;
- average pooling gets a scale of its own.

Everything else stays in float, without roundings around it: normalizations, softmax, GELU, SiLU,
sigmoids, attention (rounding its inputs was tried on ONNX Runtime and OpenVINO, and took longer
than products in integers saved), and the residual additions of transformers, whose linear layers
write float anyway (integer MatMuls of the runtimes do) and whose sum would collect a rounding error
from every block.
"""

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tersor.ops.rectifiers import rectifier

_ADD: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONCAT: set[Any] = {torch.cat, torch.concat, torch.concatenate}
_SHARE_MODULES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)
_SHARE: set[Any] = {
    operator.getitem,
    F.max_pool1d,
    F.max_pool2d,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.squeeze,
    torch.unsqueeze,
    "flatten",
    "reshape",
    "view",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "contiguous",
}
_POOL_MODULES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_POOL: set[Any] = {
    F.avg_pool1d,
    F.avg_pool2d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    torch.mean,
    "mean",
}
_CLAMP: set[Any] = {torch.clamp, torch.clip, "clamp", "clamp_", "clip", F.hardtanh}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Tensors that are rounded with one scale."""

    places: Mapping[fx.Node, tuple[fx.Node, ...] | None]
    """Node -> those of its users that read the rounded tensor; None: all."""
    observed: tuple[fx.Node, ...]
    """Nodes whose values make the range."""
    ceiling: float | None = None
    """Upper end of the clip before it, where there is one."""
    name: str = field(default="")
    """Of the first node."""


ADDS_IN_CONVOLUTIONS = ("openvino", "tensorrt")
"""Runtimes that add a residual inside the convolution before it, on its unrounded sums."""
CONCATENATES_SCALES = ("onnxruntime",)
"""Runtimes that concatenate codes of several scales. One scale for all would be too coarse for
some, and give a ReLU before it a zero that is not its lowest code, which then fuses nowhere."""


def place(captured: fx.GraphModule, layers: Collection[str], runtime: str = "") -> list[Point]:
    """Decide where to round.

    Args:
        captured: Network in eval mode with shapes and dtypes in `meta`, batch norms folded.
        layers: Names of the convolutions and linear layers that get integer weights.
        runtime: Of the target. Where it is one of `ADDS_IN_CONVOLUTIONS`, a convolution that is
            added to another tensor is not rounded before: it would not be there either.

    Returns:
        Points in the order of the graph.
    """
    return _Placement(captured, layers, runtime).points()


def insert(captured: fx.GraphModule, rounded: Iterable[tuple[Point, nn.Module]]) -> None:
    """Put a call of each rounding behind its places; modules become `rounding.0` and so on."""
    for i, (point, module) in enumerate(rounded):
        name = f"rounding.{_first_free(captured, i)}"
        captured.add_submodule(name, module)
        for node, users in point.places.items():
            readers = list(node.users) if users is None else list(users)
            with captured.graph.inserting_after(node):
                made = captured.graph.call_module(name, (node,))
            made.meta.update({k: v for k, v in node.meta.items() if k in ("shape", "dtype")})
            for reader in readers:
                reader.replace_input_with(node, made)
    captured.recompile()
    captured.graph.lint()


def _first_free(captured: fx.GraphModule, start: int) -> int:
    taken = {
        name.rpartition(".")[2]
        for name, _ in captured.named_modules()
        if name.startswith("rounding.")
    }
    while str(start) in taken:
        start += 1
    return start


class _Placement:
    def __init__(self, captured: fx.GraphModule, layers: Collection[str], runtime: str) -> None:
        adds_inside = runtime in ADDS_IN_CONVOLUTIONS
        self.one_scale = runtime not in CONCATENATES_SCALES
        self.modules = dict(captured.named_modules())
        self.nodes = list(captured.graph.nodes)
        self.layers = set(layers)
        self.kinds = {node: self._kind(node) for node in self.nodes}
        self.integer: dict[fx.Node, bool] = {}
        for node in self.nodes:
            self.integer[node] = self._may_be_integer(node)
        self.wanted_memo: dict[fx.Node, bool] = {}
        self.inside = {found for n in self.nodes if adds_inside and (found := self._added(n))}

    def points(self) -> list[Point]:
        places: dict[fx.Node, set[fx.Node] | None] = {}

        def round_all(node: fx.Node) -> None:
            places[node] = None

        def round_for(node: fx.Node, user: fx.Node) -> None:
            chosen = places.setdefault(node, set())
            if chosen is not None:
                chosen.add(user)

        shared = _Sets()
        for node in self.nodes:
            kind = self.kinds[node]
            if kind == "layer":
                round_for(_first(node), node)
                if node in self.inside:
                    continue
                if self._is_convolution(node) and self._writes_codes(node):
                    round_all(self._tail(node))
            elif not (self.integer[node] and self._wanted(node)):
                continue
            elif kind in ("add", "concat"):
                for operand in _operands(node):
                    if operand in self.inside:
                        continue
                    round_for(operand, node)
                    if kind == "concat" and self.one_scale:
                        shared.join(node, operand)
                round_all(node if kind == "concat" else self._tail(node))
            elif kind == "share":
                round_all(node)
                shared.join(node, _first(node))
            elif kind == "pool" or (kind == "activation" and self._tail(_first(node)) is not node):
                round_all(node)
        return self._grouped(places, shared)

    def _grouped(self, places: dict[fx.Node, set[fx.Node] | None], shared: "_Sets") -> list[Point]:
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node in places:
                groups.setdefault(shared.root(node), []).append(node)
        made = []
        for nodes in groups.values():
            observed = [n for n in nodes if self.kinds[n] != "share" or not self.integer[n]]
            ceilings = [c for n in nodes if (c := self._ceiling(n)) is not None]
            made.append(
                Point(
                    places={n: self._readers(n, places[n]) for n in nodes},
                    observed=tuple(observed or nodes),
                    ceiling=min(ceilings, default=None),
                    name=nodes[0].name,
                )
            )
        return made

    def _readers(self, node: fx.Node, users: set[fx.Node] | None) -> tuple[fx.Node, ...] | None:
        return None if users is None else tuple(u for u in node.users if u in users)

    def _kind(self, node: fx.Node) -> str:
        if "shape" not in node.meta or not node.meta["dtype"].is_floating_point:
            return "other"
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if str(node.target) in self.layers:
                return "layer"
            if rectifier(node, self.modules) or _clips(module):
                return "activation"
            if isinstance(module, _SHARE_MODULES) or _nearest(module):
                return "share"
            return "pool" if isinstance(module, _POOL_MODULES) else "other"
        target = node.target
        if node.op == "call_function" and target in _CONCAT:
            return "concat" if _operands(node) else "other"
        if node.op not in ("call_function", "call_method") or not isinstance(_first(node), fx.Node):
            return "other"
        if target in _ADD:
            return "add" if self._is_residual(node) else "other"
        if rectifier(node, self.modules) or (target in _CLAMP and _clamp_bounds(node)[0] == 0):
            return "activation"
        if "shape" not in _first(node).meta:
            return "other"
        if target in _SHARE or _pads_zero(node) or _resizes_nearest(node):
            return "share"
        return "pool" if target in _POOL else "other"

    def _is_residual(self, node: fx.Node) -> bool:
        operands = _operands(node)
        shapes = {operand.meta.get("shape") for operand in operands}
        return len(operands) == 2 and len(shapes) == 1 and not node.kwargs.get("alpha")

    def _is_convolution(self, node: fx.Node) -> bool:
        return self.kinds[node] == "layer" and isinstance(
            self.modules[str(node.target)], _CONVOLUTIONS
        )

    def _may_be_integer(self, node: fx.Node) -> bool:
        """Tell whether a runtime can have this tensor as codes; operands come first in a graph."""
        kind = self.kinds[node]
        if kind == "layer":
            return self._is_convolution(node)
        if kind in ("add", "concat"):
            operands = _operands(node)
            ready = [self.integer[o] or self._feeds_layer(o) for o in operands]
            return all(ready) and any(self.integer[o] for o in operands)
        if kind in ("share", "activation", "pool"):
            return self.integer[_first(node)]
        return False

    def _added(self, node: fx.Node) -> fx.Node | None:
        """Return the convolution that an integer addition can be computed in."""
        if self.kinds[node] != "add" or not (self.integer[node] and self._wanted(node)):
            return None
        alone = [o for o in _operands(node) if self._is_convolution(o) and len(o.users) == 1]
        return alone[-1] if alone else None

    def _feeds_layer(self, node: fx.Node) -> bool:
        return any(self.kinds[user] == "layer" for user in node.users)

    def _wanted(self, node: fx.Node) -> bool:
        """Tell whether an integer operator reads this tensor, directly or through others."""
        if node not in self.wanted_memo:
            self.wanted_memo[node] = any(
                self.kinds[user] == "layer"
                or (self.kinds[user] != "other" and self.integer[user] and self._wanted(user))
                for user in node.users
            )
        return self.wanted_memo[node]

    def _writes_codes(self, node: fx.Node) -> bool:
        """Tell whether a convolution's output is rounded.

        Also where float operators such as SiLU follow: ONNX Runtime has no integer convolution that
        writes float. Not before the output of the network, nor where patches become float tokens.
        """
        users = self._tail(node).users
        return self._wanted(node) or all(
            user.op != "output" and self.kinds[user] == "other" for user in users
        )

    def _tail(self, node: fx.Node) -> fx.Node:
        """Return the activation that runtimes fuse into `node`, or `node`."""
        users = list(node.users)
        fuses = self.kinds[node] in ("layer", "add") and len(users) == 1
        return users[0] if fuses and self.kinds[users[0]] == "activation" else node

    def _ceiling(self, node: fx.Node) -> float | None:
        if self.kinds[node] != "activation":
            return None
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return float(module.max_val) if isinstance(module, nn.Hardtanh) else None
        if node.target is F.relu6:
            return 6.0
        return _clamp_bounds(node)[1] if node.target in _CLAMP else None


class _Sets:
    """Disjoint sets of nodes."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def join(self, one: fx.Node, other: fx.Node) -> None:
        one, other = self.root(one), self.root(other)
        if one is not other:
            self.parent[one] = other


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return the tensors joined, or nothing if one of them is no tensor of the graph."""
    if node.target in _CONCAT:
        items = _first(node)
        tensors = list(items) if isinstance(items, (list, tuple)) else []
    else:
        tensors = [
            *node.args[:2],
            *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs),
        ]
    fine = all(isinstance(t, fx.Node) and "shape" in t.meta for t in tensors)
    return tensors if fine else []


def _clips(module: nn.Module) -> bool:
    return type(module) is nn.Hardtanh and module.min_val == 0


def _clamp_bounds(node: fx.Node) -> tuple[Any, float | None]:
    low, high = ("min_val", "max_val") if node.target is F.hardtanh else ("min", "max")
    bounds = [*node.args[1:3], None, None][:2]
    lowest, highest = node.kwargs.get(low, bounds[0]), node.kwargs.get(high, bounds[1])
    if isinstance(highest, (int, float)) and math.isfinite(highest):
        return lowest, float(highest)
    return lowest, None


def _nearest(module: nn.Module) -> bool:
    return isinstance(module, nn.Upsample) and module.mode == "nearest"


def _resizes_nearest(node: fx.Node) -> bool:
    return node.target is F.interpolate and node.kwargs.get("mode", "nearest") == "nearest"


def _pads_zero(node: fx.Node) -> bool:
    if node.target not in (F.pad, torch.nn.functional.pad):
        return False
    mode, value = [*node.args[2:4], None, None][:2]
    mode, value = node.kwargs.get("mode", mode), node.kwargs.get("value", value)
    return mode in (None, "constant") and value in (None, 0, 0.0)
