"""Store a compressed network as data and build it again, without pickle.

A result is stored as `network.json`, which layers it is made of and, where it is a captured
graph, its calls; and `weights.safetensors`, every tensor. It is replayed on the network that the
user names again (layers that are as they were come from there), or, for a captured graph whose
layers are all of the allow-list, built from nothing. A class or a function is looked up in fixed
tables here; a file can name nothing else.
"""

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from tersor.core.errors import ArtifactError, ModelError
from tersor.ops import (
    blocks,
    dynamic,
    float8,
    float32,
    modules,
    multi_head,
    norms,
    recurrent,
    sparse,
)
from tersor.ops.notes import note, notes_of

_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ),
    ),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d),
        (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "output_padding",
            "groups",
            "dilation",
        ),
    ),
    nn.Linear: ("in_features", "out_features"),
    nn.Identity: (),
    nn.Sequential: (),  # its layers are written one by one
    nn.Flatten: ("start_dim", "end_dim"),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    ),
    **dict.fromkeys(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    ),
    nn.PReLU: ("num_parameters",),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
    nn.Dropout: ("p",),
    nn.Dropout2d: ("p",),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh), ()
    ),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.GELU: ("approximate",),
    nn.Softmax: ("dim",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
    **dict.fromkeys(
        (nn.LSTM, nn.GRU),
        (
            "input_size",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
        ),
    ),
    nn.MultiheadAttention: ("embed_dim", "num_heads", "dropout", "batch_first"),
}
_HAS_BIAS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
_OURS: Any = (modules, blocks, dynamic, float8, float32, multi_head, norms, recurrent, sparse)
_CLASSES: dict[str, type[nn.Module]] = {
    **{kind.__name__: kind for kind in _ARGUMENTS},
    **{
        name: kind
        for place in _OURS
        for name, kind in vars(place).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "arguments")
    },
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"getattr": getattr, "len": len}
"""Functions a stored graph may call, beside those of `_PLACES`."""
_PLACES: dict[str, Any] = {
    "operator": operator,
    "functional": F,
    "torch": torch,
    "nn": torch._C._nn,
}


def store(net: nn.Module, original: nn.Module, folder: Path) -> None:
    """Write `network.json` and `weights.safetensors` into a folder.

    Args:
        net: The result, in eval mode.
        original: The untouched network; layers of the same class and settings are not written.
        folder: Exists; files of these names are replaced.

    Raises:
        ModelError: a layer's class is not of the allow-list.
    """
    plain = describe(net, original)
    (folder / "network.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    save_file(_tensors(net), folder / "weights.safetensors")


def describe(net: nn.Module, original: nn.Module | None) -> dict[str, Any]:
    """Return the structure of a network as plain data, as far as it differs from `original`."""
    graph = _plain_graph(net) if isinstance(net, fx.GraphModule) else None
    before = dict(original.named_modules()) if original is not None else {}
    layers: dict[str, Any] = {}
    inside = "?"
    for path, layer in list(net.named_modules())[1:]:
        kind = type(layer)
        if path.startswith(inside):
            continue  # made by its owner's constructor
        if kind in _CLASSES.values() and kind not in (nn.Sequential, float32.InFloat32):
            inside = f"{path}."
        if kind is nn.Module or (path in before and _alike(layer, before[path])):
            continue  # an empty holder of a captured graph, or as it was
        if _CLASSES.get(kind.__name__) is not kind:
            raise ModelError(f"layer {path!r} of class {kind.__name__} cannot be stored")
        layers[path] = {"class": kind.__name__, "arguments": _arguments(layer)}
    shapes = {name: list(t.shape) for name, t in _tensors(net).items()}
    return {
        "schema": 1,
        "graph": graph,
        "layers": layers,
        "loose": sorted(_loose(net)),
        "ties": _ties(net),
        "shapes": shapes,
        "notes": dict(notes_of(net)),
    }


def replay(folder: Path, original: nn.Module | None) -> nn.Module:
    """Build a stored network again.

    Args:
        folder: Holds `network.json` and `weights.safetensors`.
        original: The network as the user's factory made it; changed and used. None for a captured
            graph that is to be built from nothing.

    Raises:
        ArtifactError: the files do not fit each other, or name something unknown.
    """
    plain = json.loads((folder / "network.json").read_text(encoding="utf-8"))
    net = original if original is not None else nn.Module()
    for path, entry in sorted(plain["layers"].items()):
        kind = _CLASSES.get(entry["class"])
        if kind is None:
            raise ArtifactError(f"layer {path!r} is of the unknown class {entry['class']!r}")
        _put(net, path, kind(**{k: _untuple(v) for k, v in entry["arguments"].items()}))
    tensors = load_file(folder / "weights.safetensors")
    parameters = set(plain["loose"])
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        holder = _grown(net, owner)
        if leaf in holder._parameters or (leaf not in holder._buffers and name in parameters):
            holder._parameters[leaf] = nn.Parameter(
                tensor, requires_grad=tensor.is_floating_point()
            )
        elif leaf in holder._buffers:
            holder._buffers[leaf] = tensor
        else:
            holder.register_buffer(leaf, tensor)
    for name, known in plain.get("ties", {}).items():
        owner, _, leaf = name.rpartition(".")
        place, _, source = known.rpartition(".")
        shared = _grown(net, place)._parameters.get(source)
        if shared is None:
            raise ArtifactError(f"{name!r} is tied to {known!r}, which is not a parameter")
        _grown(net, owner)._parameters[leaf] = shared
    if plain["graph"] is not None:
        net = fx.GraphModule(net, _build_graph(plain["graph"]))
    note(net, **_notes(plain))
    return net.eval()


def _notes(plain: Mapping[str, Any]) -> dict[str, str | bool]:
    """Return the notes that were stored; of older files, the precision."""
    found = plain.get("notes", {"precision": plain.get("precision")})
    if not isinstance(found, dict) or set(found) - {"precision", "packed", "shared"}:
        raise ArtifactError(f"unknown notes on a network: {found!r}")
    return {key: value for key, value in found.items() if isinstance(value, str | bool)}


def differing(folder: Path, net: nn.Module) -> list[str]:
    """Name the tensors that a stored network and the one replayed from it do not share."""
    plain = json.loads((folder / "network.json").read_text(encoding="utf-8"))
    shapes = {name: list(t.shape) for name, t in _tensors(net).items()}
    names = sorted({*shapes, *plain["shapes"]})
    return [name for name in names if shapes.get(name) != plain["shapes"].get(name)]


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer, also those outside the state dict; shared ones once."""
    found: dict[str, Tensor] = {}
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        found[name] = tensor.detach().contiguous().clone()
    return found


def _ties(net: nn.Module) -> dict[str, str]:
    """Return parameters that are another one, with that one's name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found[name] = known
    return found


def _loose(net: nn.Module) -> set[str]:
    return {name for name, _ in net.named_parameters()}


def _alike(layer: nn.Module, other: nn.Module) -> bool:
    """Tell whether a layer has the class and settings that it had."""
    if type(layer) is not type(other):
        return type(other).__name__ == type(layer).__name__ == "GraphModule"
    if type(layer).__name__ in _CLASSES:
        return _arguments(layer) == _arguments(other)
    return True


def _arguments(layer: nn.Module) -> dict[str, Any]:
    own = getattr(layer, "arguments", None)
    if own is not None:
        return {key: _plain_value(value) for key, value in own().items()}
    found = {name: _plain_value(getattr(layer, name)) for name in _ARGUMENTS[type(layer)]}
    if isinstance(layer, _HAS_BIAS):
        found["bias"] = layer.bias is not None
    return found


def _plain_value(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain_value(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ModelError(f"a setting of type {type(value).__name__} cannot be stored")


def _untuple(value: Any) -> Any:
    return tuple(_untuple(v) for v in value) if isinstance(value, list) else value


def _put(net: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    _grown(net, owner)._modules[leaf] = layer


def _grown(net: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`, making empty ones on the way."""
    for part in path.split(".") if path else ():
        if net._modules.get(part) is None:
            net._modules[part] = nn.Module()
        found = net._modules[part]
        assert found is not None
        net = found
    return net


# --- graphs -------------------------------------------------------------------------------------


def _plain_graph(net: fx.GraphModule) -> list[dict[str, Any]]:
    made = []
    for node in net.graph.nodes:
        target = _name_of(node.target) if node.op == "call_function" else str(node.target)
        made.append(
            {
                "name": node.name,
                "op": node.op,
                "target": target,
                "args": _write(node.args),
                "kwargs": {key: _write(value) for key, value in node.kwargs.items()},
            }
        )
    return made


def _build_graph(plain: list[dict[str, Any]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in plain:
        op = entry["op"]
        if op not in (
            "placeholder",
            "call_function",
            "call_method",
            "call_module",
            "get_attr",
            "output",
        ):
            raise ArtifactError(f"unknown kind of call {op!r}")
        target = _find(entry["target"]) if op == "call_function" else entry["target"]
        if op == "call_method" and not hasattr(Tensor, str(target)):
            raise ArtifactError(f"{target!r} is not a method of a tensor")
        args = _read(entry["args"], nodes)
        if target is getattr and args[1:] not in {(name,) for name in _ATTRIBUTES}:
            raise ArtifactError(f"a stored graph may not read the attribute {args[1:]!r}")
        kwargs = {key: _read(value, nodes) for key, value in entry["kwargs"].items()}
        nodes[entry["name"]] = graph.create_node(op, target, args, kwargs, name=entry["name"])
    return graph


def _name_of(function: Any) -> str:
    for name, known in _FUNCTIONS.items():
        if function is known:
            return name
    name = getattr(function, "__name__", "")
    for place, holder in _PLACES.items():
        if getattr(holder, name, None) is function:
            return f"{place}:{name}"
    raise ModelError(f"a call of {name or function!r} cannot be stored")


def _find(text: str) -> Callable[..., Any]:
    if text in _FUNCTIONS:
        return _FUNCTIONS[text]
    place, _, name = text.partition(":")
    found = None
    if place in _PLACES and name.isidentifier() and name not in _FORBIDDEN:
        found = getattr(_PLACES[place], name, None)
        if not isinstance(found, BuiltinFunctionType | FunctionType | BuiltinMethodType) or (
            isinstance(found, FunctionType) and found.__module__ not in _PYTHON_PLACES
        ):
            found = None
    if found is None:
        raise ArtifactError(f"a stored graph may not call {text!r}")
    return cast(Callable[..., Any], found)


_PYTHON_PLACES = ("torch.functional", "torch.nn.functional", "torch._jit_internal", "torch")
"""Where functions written in Python may come from; all others are builtins of torch."""
_FORBIDDEN = frozenset(
    {"load", "save", "compile", "from_file", "import_ir_module", "import_ir_module_from_buffer"}
)
_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "data", "real", "imag", "is_cuda"}
)
_DTYPES = {str(t): t for t in vars(torch).values() if isinstance(t, torch.dtype)}


def _write(value: Any) -> Any:
    """Turn an argument of a call into JSON: tagged where JSON has no such thing."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_write(item) for item in value]}
    if isinstance(value, list):
        return [_write(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _write(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_write(value.start), _write(value.stop), _write(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    return _plain_value(value)


def _read(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "tuple":
        return tuple(_read(item, nodes) for item in inner)
    if kind == "dict":
        return {key: _read(item, nodes) for key, item in inner.items()}
    if kind == "slice":
        return slice(*(_read(item, nodes) for item in inner))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dtype":
        return _DTYPES[inner]
    if kind == "device":
        return torch.device(inner)
    if kind == "float":
        return float(inner)
    raise ArtifactError(f"unknown kind of argument {kind!r}")
