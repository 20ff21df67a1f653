"""What a call in a captured graph does, however it is written: module, function or method."""

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_FUNCTIONS: Mapping[str, tuple[Any, ...]] = {
    "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
    "sub": (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"),
    "mul": (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"),
    "div": (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"),
    "pow": (operator.pow, torch.pow, "pow"),
    "square": (torch.square, "square"),
    "sqrt": (torch.sqrt, "sqrt"),
    "rsqrt": (torch.rsqrt, "rsqrt"),
    "mean": (torch.mean, "mean"),
    "matmul": (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"),
    "softmax": (F.softmax, torch.softmax, "softmax"),
    "sdpa": (F.scaled_dot_product_attention,),
    "linear": (F.linear,),
    "conv": (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d),
    "batch_norm": (F.batch_norm,),
    "layer_norm": (F.layer_norm,),
    "rms_norm": (F.rms_norm,),
    "dropout": (F.dropout, F.dropout1d, F.dropout2d, torch.dropout),
    "relu": (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    "relu6": (F.relu6,),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "hardswish": (F.hardswish,),
    "hardsigmoid": (F.hardsigmoid,),
    "leaky_relu": (F.leaky_relu,),
    "sigmoid": (F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"),
    "tanh": (F.tanh, torch.tanh, "tanh", "tanh_"),
    "erf": (torch.erf, torch.special.erf, "erf"),
    "clamp": (torch.clamp, torch.clip, F.hardtanh, "clamp", "clip", "clamp_"),
    "transpose": (torch.transpose, torch.swapaxes, "transpose", "swapaxes", "swapdims"),
    "permute": (torch.permute, "permute"),
    "reshape": (torch.reshape, torch.flatten, "reshape", "view", "flatten", "unflatten"),
    "where": (torch.where,),
    "masked_fill": (torch.masked_fill, "masked_fill", "masked_fill_"),
    "same": ("contiguous", "detach", "clone"),
}
_KIND_OF = {target: kind for kind, targets in _FUNCTIONS.items() for target in targets}
_LAYERS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (_ConvNd, "conv"),
    (nn.Linear, "linear"),
    (_BatchNorm, "batch_norm"),
    (nn.LayerNorm, "layer_norm"),
    (nn.RMSNorm, "rms_norm"),
    (nn.ReLU6, "relu6"),
    (nn.ReLU, "relu"),
    (nn.Hardtanh, "clamp"),
    (nn.GELU, "gelu"),
    (nn.SiLU, "silu"),
    (nn.Hardswish, "hardswish"),
    (nn.Hardsigmoid, "hardsigmoid"),
    (nn.LeakyReLU, "leaky_relu"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
    (nn.Softmax, "softmax"),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "dropout"),
    (nn.Identity, "same"),
    (nn.LSTM, "lstm"),
    (nn.GRU, "gru"),
    (nn.MultiheadAttention, "sdpa"),
)


def kind_of(node: Any, modules: Mapping[str, nn.Module]) -> str:
    """Name what a node does; "" for anything that has no name here.

    Args:
        node: Of a captured graph; anything else has no kind.
        modules: The graph's modules by name.
    """
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_module":
        layer = modules[str(node.target)]
        return next((kind for types, kind in _LAYERS if isinstance(layer, types)), "")
    if node.op in ("call_function", "call_method"):
        return _KIND_OF.get(node.target, "")
    return ""


def given(node: fx.Node, *names: str) -> list[Any]:
    """Return the arguments of a call in the order of `names`, whether given by place or by name."""
    return [
        node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for i, name in enumerate(names)
    ]


def number(value: Any) -> float | None:
    """Return a plain number, also one that the graph computes from the shapes it was given."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and not value.meta.get("shape") and "value" in value.meta:
        return float(value.meta["value"])
    return None


def with_number(node: fx.Node) -> tuple[fx.Node | None, float | None]:
    """Split a call on a tensor and a written number, in either order; (None, None): it is none.

    A number that the graph computes is none here: it may be another one for another batch.
    """
    if len(node.args) != 2:
        return None, None
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, (int, float)):
        return left, float(right)
    if isinstance(right, fx.Node) and isinstance(left, (int, float)):
        return right, float(left)
    return None, None


def swaps_last_two(node: Any, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """Return what a node transposes in its last two dimensions; None: it does something else."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target is getattr and node.args[1] == "mT":
        return source
    shape = source.meta.get("shape")
    if shape is None or len(shape) < 2:
        return None
    return source if axes_of(node, modules) == swapped(len(shape), -1, -2) else None


def swapped(rank: int, first: int, second: int) -> tuple[int, ...]:
    """Return the order of axes when two of them change places."""
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def axes_of(node: Any, modules: Mapping[str, nn.Module]) -> tuple[int, ...] | None:
    """Return the order in which a transpose or permute puts the axes of its input."""
    kind = kind_of(node, modules)
    if kind not in ("transpose", "permute") or not isinstance(node.args[0], fx.Node):
        return None
    shape = node.args[0].meta.get("shape")
    if shape is None or node.kwargs:
        return None
    rank, rest = len(shape), node.args[1:]
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = tuple(rest[0])
    if not all(isinstance(axis, int) for axis in rest):
        return None
    order = [int(axis) % rank for axis in rest]  # type: ignore[call-overload]  # ints, just looked
    return swapped(rank, order[0], order[1]) if kind == "transpose" else tuple(order)


def unwrapped(node: Any, modules: Mapping[str, nn.Module]) -> Any:
    """Go back through calls that change nothing in eval mode: dropout, contiguous, Identity."""
    while kind_of(node, modules) in ("dropout", "same") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def reads_shape(node: fx.Node) -> bool:
    """Tell whether a call looks at a tensor's shape or format, never at its numbers."""
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.target in ("size", "dim", "numel", len)


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the one call that reads a node; None: none does, or several do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def free_name(captured: fx.GraphModule, name: str) -> str:
    """Return a dotted name for a new module: `name`, with a number where it is taken."""
    taken = {n for n, _ in captured.named_modules()}
    made, count = name, 0
    while made in taken:
        count += 1
        made = f"{name}_{count}"
    return made


def attribute(captured: fx.GraphModule, name: str) -> Any:
    """Return what a `get_attr` node reads."""
    owner, _, leaf = name.rpartition(".")
    return getattr(captured.get_submodule(owner), leaf)


def readers(captured: fx.GraphModule) -> Counter[int]:
    """Count the calls that read each parameter and buffer, by its `id`."""
    modules = dict(captured.named_modules(remove_duplicate=False))
    counted: Counter[int] = Counter()
    for node in captured.graph.nodes:
        if node.op == "call_module":
            layer = modules[str(node.target)]
            counted.update({id(t) for t in (*layer.parameters(), *layer.buffers())})
        elif node.op == "get_attr":
            counted[id(attribute(captured, str(node.target)))] += len(node.users)
    return counted


def foldable(node: Any, modules: Mapping[str, nn.Module], counted: Counter[int]) -> bool:
    """Tell whether a call is of a linear layer whose weights nothing else reads.

    Args:
        node: A call in a captured graph.
        modules: The graph's modules by name.
        counted: What `readers` returned.
    """
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1:
        return False
    layer = modules[str(node.target)]
    return type(layer) is nn.Linear and all(counted[id(p)] == 1 for p in layer.parameters())
