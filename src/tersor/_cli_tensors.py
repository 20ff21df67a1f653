"""The constants of a network in any form, or in a file of any runtime: what `tersor inspect` lists.

Files that the runtimes write are read with numpy alone, so that an artifact can be looked into
where torch is not installed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from tersor.core.errors import ModelError
from tersor.core.sparsity import Structure, find_structure
from tersor.ops.onnx_count import weight_names, zero_codes

_IR = {"f32": "f4", "f16": "f2", "bf16": "bf16", "i8": "i1", "u8": "u1", "i32": "i4", "i64": "i8"}
_SAFE = {"F32": "f4", "F16": "f2", "BF16": "bf16", "I8": "i1", "U8": "u1", "I32": "i4", "I64": "i8"}
_FLOAT8 = {
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_NAMES = {
    "f4": "float32",
    "f2": "float16",
    "bf16": "bfloat16",
    "i1": "int8",
    "u1": "uint8",
    "i4": "int32",
    "i8": "int64",
}

_BESIDE = ("zero", "scale", "nothing", "running_mean", "running_var")
"""Last parts of names of what stands beside weights, in tersor's layers and batch norms."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One tensor of a network."""

    layer: str
    """Dotted name of what it belongs to."""
    kind: str
    """Class of the layer, or operator that reads the tensor; empty where unknown."""
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    zeros: int
    """Elements that are exactly 0."""
    weight: bool
    """Whether its elements are weights, biases or gains, in floats or codes; not scales, zero
    points, running statistics, or the sizes that a graph computes with."""
    structure: Structure
    """What the zeros of a matrix or kernel have in common."""

    @property
    def count(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


def of_net(net: Any) -> list[Constant]:
    """List the tensors of an nn.Module, an ExportedProgram or an onnx.ModelProto."""
    if type(net).__name__ == "ModelProto":
        return list(_of_onnx(net))
    modules = dict(net.named_modules()) if hasattr(net, "named_modules") else {}
    state = net.state_dict() if callable(net.state_dict) else net.state_dict
    parameters = {name for name, _ in net.named_parameters()}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = []
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        counter = name.endswith("num_batches_tracked")
        if counter or (key in seen and tensor.numel()):  # shared tensors count once
            continue
        seen.add(key)
        layer = name.rpartition(".")[0]
        kind = type(modules[layer]).__name__ if layer in modules else ""
        zero = (tensor == 0).cpu().numpy()
        found.append(
            Constant(
                layer=layer or name,
                kind=kind,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                size_bytes=tensor.numel() * tensor.element_size(),
                zeros=int(zero.sum()),
                weight=name in parameters or _holds_codes(name, str(tensor.dtype)),
                structure=find_structure(
                    zero,
                    input_axis=0 if "ConvTranspose" in kind else 1,
                    rounded=not tensor.is_floating_point(),
                ),
            )
        )
    return found


def _holds_codes(name: str, dtype: str) -> bool:
    """Tell whether a buffer holds a weight in fewer bits."""
    leaf = name.rpartition(".")[2]
    return dtype.removeprefix("torch.").startswith(("int8", "uint8", "float8", "float16")) and (
        leaf not in _BESIDE
    )


def of_file(file: Path) -> list[Constant]:
    """List the tensors of a model file that a runtime wrote.

    Raises:
        ModelError: a file of another kind. DependencyError: a package is missing to read it.
    """
    if file.suffix == ".xml":
        return list(_of_ir(file))
    if file.suffix == ".safetensors":
        return list(_of_safetensors(file))
    if file.suffix in (".onnx", ".pt2"):
        from tersor.core import plugins

        source = "onnx" if file.suffix == ".onnx" else "exported"
        return of_net(plugins.source(source).load(str(file), weights=None, partial=False).net)
    raise ModelError(f"{file.name} cannot be looked into")


def _of_onnx(model: Any) -> Iterator[Constant]:
    from onnx import numpy_helper

    weights = weight_names(model)
    users = {name: node for node in model.graph.node for name in node.input}
    for each in model.graph.initializer:
        array = numpy_helper.to_array(each)
        zero = _zeros(users.get(each.name), each.name, array)
        bits = 4 if "int4" in str(array.dtype) else 8 * array.dtype.itemsize
        yield Constant(
            layer=each.name,
            kind=users[each.name].op_type if each.name in users else "",
            shape=tuple(array.shape),
            dtype=str(array.dtype),
            size_bytes=-(-array.size * bits // 8),
            zeros=int(np.count_nonzero(zero)),
            weight=each.name in weights,
            structure=find_structure(
                zero,
                input_axis=_input_axis(users, each.name),
                rounded=np.issubdtype(array.dtype, np.integer) or bits == 4,
            ),
        )


def _zeros(user: Any, name: str, array: np.ndarray) -> np.ndarray:
    """Mark what stands for zero."""
    if user is not None and user.op_type == "MatMulNBits" and user.input[1] == name:
        found = zero_codes(user, array)
        if found is not None:
            return found
    made: np.ndarray = array == 0
    return made


def _input_axis(users: Mapping[str, Any], name: str) -> int:
    """Tell which dimension of a constant its user sums over."""
    node = users.get(name)
    while node is not None and node.op_type in ("DequantizeLinear", "Cast", "Identity"):
        name = node.output[0]
        node = users.get(name)
    if node is None or node.op_type not in ("MatMul", "Gemm", "ConvTranspose"):
        return 1
    if node.op_type == "Gemm":
        return int(next((a.i for a in node.attribute if a.name == "transB"), 0))
    return 0 if list(node.input).index(name) == 1 else 1


def _of_ir(file: Path) -> Iterator[Constant]:
    """Read the constants of an OpenVINO IR: places in the .bin file beside it."""
    data = np.memmap(file.with_suffix(".bin"), np.uint8, "r")
    root = ElementTree.parse(file).getroot()
    beside = _beside(root)
    for layer in root.iter("layer"):
        place = layer.find("data")
        if layer.get("type") != "Const" or place is None:
            continue
        shape = tuple(int(n) for n in (place.get("shape") or "").split(",") if n.strip())
        start, size = int(place.get("offset", 0)), int(place.get("size", 0))
        kind = place.get("element_type", "")
        if not 0 <= start <= start + size <= len(data):
            raise ModelError(f"{file.name}: constant {layer.get('name')!r} lies outside the .bin")
        raw = data[start : start + size]
        name = layer.get("name", "")
        weight = _is_weight(kind, shape) and layer.get("id", "") not in beside
        yield _constant(name, shape, _IR.get(kind, ""), kind, raw, weight)


def _is_weight(kind: str, shape: tuple[int, ...]) -> bool:
    """Tell by its type whether a constant may be a weight; a single number is none."""
    return kind.lower().startswith(("f", "bf", "i8", "u8", "i4", "u4", "u2", "nf4")) and (
        math.prod(shape) > 1
    )


def _beside(root: ElementTree.Element) -> set[str]:
    """Name the constants of an IR that are zero points or scales of codes."""
    layers = {layer.get("id", ""): layer for layer in root.iter("layer")}
    kinds = {name: layer.get("type", "") for name, layer in layers.items()}
    into: dict[str, list[tuple[int, str]]] = {}
    for edge in root.iter("edge"):
        place = int(edge.get("to-port", 0)), edge.get("from-layer", "")
        into.setdefault(edge.get("to-layer", ""), []).append(place)

    def source(name: str) -> str:
        """Return what a chain of conversions begins with."""
        while kinds.get(name) in ("Convert", "Reshape") and name in into:
            name = min(into[name])[1]
        return name

    def coded(name: str) -> bool:
        place = layers[name].find("data") if kinds.get(name) == "Const" else None
        kind = "" if place is None else place.get("element_type", "")
        return kind in ("i8", "u8", "i4", "u4", "u2", "nf4", "f8e4m3", "f8e5m2")

    found: set[str] = set()
    for name, given in into.items():
        sides = [source(each) for _, each in sorted(given)]
        if kinds.get(name) == "Subtract" and coded(sides[0]):
            found.add(sides[1])
        elif kinds.get(name) == "Multiply":
            inner = [source(min(into[s])[1]) if kinds.get(s) == "Subtract" else s for s in sides]
            found |= {sides[1 - i] for i, side in enumerate(inner[:2]) if coded(side)}
        elif kinds.get(name) == "FakeQuantize":
            found |= set(sides[1:])
    return found


def _of_safetensors(file: Path) -> Iterator[Constant]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ModelError(f"{file.name} is not a safetensors file: its header is too long")
        header: Mapping[str, Any] = json.loads(stream.read(length))
    data = np.memmap(file, np.uint8, "r", offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        kind = entry["dtype"]
        layer = name.rpartition(".")[0] or name
        shape = tuple(entry["shape"])
        leaf = name.rpartition(".")[2]
        beside = leaf in _BESIDE or leaf.endswith("_scale")
        weight = kind.startswith(("F", "BF", "I8", "U8")) and not beside
        yield _constant(layer, shape, _SAFE.get(kind, ""), kind, data[start:stop], weight)


def _constant(
    name: str, shape: tuple[int, ...], code: str, kind: str, raw: np.ndarray, weight: bool
) -> Constant:
    zero = np.zeros(0, bool)
    if kind in _FLOAT8:
        code = "f8"
    if code == "bf16":  # +0 and -0
        zero = (raw.view(np.uint16) & 0x7FFF) == 0
    elif code == "f8":
        zero = (raw & 0x7F) == 0
    elif code:
        zero = raw.view(code) == 0
    return Constant(
        layer=name,
        kind="",
        shape=shape,
        dtype=_FLOAT8.get(kind, _NAMES.get(code, kind)),
        size_bytes=len(raw),
        zeros=int(np.count_nonzero(zero)),
        weight=weight,
        structure=find_structure(zero.reshape(shape) if code else zero, rounded=code[:1] in "iu"),
    )
