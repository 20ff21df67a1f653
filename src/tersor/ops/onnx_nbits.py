"""Multiply by integer weights as they are stored: ONNX Runtime's MatMulNBits in an ONNX graph.

ONNX Runtime itself turns 4-bit weights into this operator, and there computes in fp32. For 8 bits
its kernel is fast only where activations are rounded to 8 bits, too, in each block of a row anew
(`accuracy_level` 4); with any other level it unpacks all weights in every run, which takes many
times as long as float weights. So the operator is written here, and says how it computes:

    bits    held in     activations
    8 to 5  a byte      int8, a scale for each block
    3, 2    half a byte fp32

Shapes: I inputs of a layer, O its outputs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.ops.onnx_count import attribute_of

DOMAIN = "com.microsoft"
_ROW_BLOCK = 128
"""Weights of a block where a whole row has one scale, which is then written for each block."""
_SMALLEST, _LARGEST = 16, 256
"""Blocks that the operator's kernels take, powers of two."""
_FP32, _INT8 = 1, 4
"""How activations are taken: ONNX Runtime's numbers for `accuracy_level`."""
_VIEWS = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """Codes (O, I), which mean (code - zero) * scale; scales and zeros of blocks (O, blocks)."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    block: int
    bits: int
    """Of a code in the file: 8 or 4."""


def multiply_codes(model: Any) -> Any:
    """Write products by constant integer weights of a byte as MatMulNBits.

    Products of activations that are integers already, which runtimes fuse, stay as they are, and so
    do weights of 4 bits, groups whose size is no multiple of 16, and rows of less than 16.

    Args:
        model: onnx.ModelProto of opset 21 or later. Not modified.

    Returns:
        The model, or a copy. Weights are the same.
    """
    import onnx

    graph = _Graph(model)
    weights = {name: weight for name in graph.dequantized if (weight := _weight(graph, name))}
    if not weights:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes: list[Any] = []
    added: dict[str, Any] = {}
    for node in model.graph.node:
        name = graph.weight_of(node)
        if name not in weights:
            nodes.append(node)
            continue
        base = graph.dequantized[name].input[0]
        inputs = [node.input[0], *_write(weights[name], base, added)]
        if node.op_type == "Gemm" and len(node.input) > 2:
            inputs += [""] * (5 - len(inputs)) + [node.input[2]]
        rows, columns = weights[name].codes.shape
        nodes.append(
            onnx.helper.make_node(
                "MatMulNBits",
                inputs,
                list(node.output),
                name=node.name,
                domain=DOMAIN,
                K=columns,
                N=rows,
                bits=weights[name].bits,
                block_size=weights[name].block,
                accuracy_level=_INT8 if weights[name].bits == 8 else _FP32,
            )
        )
    nodes = _used(nodes, model.graph)
    taken = {name for node in nodes for name in node.input} | {o.name for o in model.graph.output}
    kept = [t for t in model.graph.initializer if t.name in taken and t.name not in added]
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend([*kept, *added.values()])
    if all(each.domain != DOMAIN for each in made.opset_import):
        made.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return made


class _Graph:
    """What feeds what, and which products are by codes."""

    def __init__(self, model: Any) -> None:
        graph = model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {value.name: [None] for value in graph.output}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.dequantized = {
            node.output[0]: node
            for node in graph.node
            if node.op_type == "DequantizeLinear"
            and all(name in self.constants for name in node.input)
        }

    def array(self, name: str) -> np.ndarray:
        import onnx

        return np.asarray(onnx.numpy_helper.to_array(self.constants[name]))

    def products(self, name: str) -> list[tuple[Any, bool]]:
        """Return who multiplies by a dequantized weight, and whether its rows are outputs, (O, I).

        Empty where anything else reads it.
        """
        found = []
        for user in self.users.get(name, []):
            if user is not None and user.op_type == "Transpose":
                inner = self.products(user.output[0])
                if not inner or any(turned for _, turned in inner):
                    return []
                found += [(node, True) for node, _ in inner]
            elif self._multiplies(user, name):
                turned = user.op_type == "Gemm" and bool(attribute_of(user, "transB", 0))
                found.append((user, turned))
            else:
                return []
        return found

    def weight_of(self, node: Any) -> str:
        """Name the dequantized weight that a product is by, or ""."""
        if node.op_type not in ("MatMul", "Gemm"):
            return ""
        name = node.input[1]
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Transpose":
            name = maker.input[0]
        return name if name in self.dequantized else ""

    def _multiplies(self, node: Any, name: str) -> bool:
        if node is None or node.op_type not in ("MatMul", "Gemm"):
            return False
        if node.input[1] != name or node.input[0] == name or self._rounded(node.input[0]):
            return False
        if node.op_type == "MatMul":
            return True
        plain = attribute_of(node, "alpha", 1.0) == attribute_of(node, "beta", 1.0) == 1.0
        return plain and not attribute_of(node, "transA", 0)

    def _rounded(self, name: str) -> bool:
        """Tell whether activations are integers made floats, seen through changes of shape."""
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in _VIEWS:
            maker = self.makers.get(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"


def _weight(graph: _Graph, name: str) -> _Weight | None:
    """Read a weight that only products take; None where the operator cannot hold it."""
    import onnx

    node, products = graph.dequantized[name], graph.products(name)
    tensor = graph.constants[node.input[0]]
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    if tensor.data_type not in kinds or len(tensor.dims) != 2 or not products:
        return None
    turned = products[0][1]
    if any(other != turned for _, other in products):
        return None
    biases = [p.input[2] for p, _ in products if p.op_type == "Gemm" and len(p.input) > 2]
    if any(b not in graph.constants or len(graph.constants[b].dims) != 1 for b in biases):
        return None
    codes, scale = graph.array(node.input[0]), graph.array(node.input[1])
    zero = graph.array(node.input[2]) if len(node.input) > 2 else np.zeros_like(scale, codes.dtype)
    along = attribute_of(node, "axis", 1) % 2
    if not turned:
        codes, scale, zero, along = codes.T, scale.T, zero.T, 1 - along
    size = int(attribute_of(node, "block_size", 0))
    if (size and along != 1) or (not size and scale.ndim == 1 and along != 0):
        return None
    rows, columns = codes.shape
    if not size:
        scale, zero = (np.broadcast_to(a.reshape(-1, 1), (rows, 1)) for a in (scale, zero))
    block = _block(size or columns, columns)
    if not block or scale.dtype != np.float32:
        return None
    times = -(-columns // block) // scale.shape[1]
    return _Weight(
        codes=codes,
        scale=np.repeat(scale, times, axis=1),
        zero=np.repeat(zero, times, axis=1),
        block=block,
        bits=8 if _wide(codes, zero) else 4,
    )


def _block(size: int, columns: int) -> int:
    """Return the weights of a block of the operator, for groups of `size`; 0: there is none."""
    if columns < _SMALLEST:
        return 0
    if size == columns:
        return min(_ROW_BLOCK, 1 << (columns.bit_length() - 1))
    block = min(size & -size, _LARGEST)
    return block if block >= _SMALLEST else 0


def _wide(codes: np.ndarray, zero: np.ndarray) -> bool:
    """Tell whether codes or zeros need more than 4 bits."""
    low = -8 if codes.dtype == np.int8 else 0
    return any(bool(((a < low) | (a > low + 15)).any()) for a in (codes, zero))


def _write(weight: _Weight, base: str, added: dict[str, Any]) -> list[str]:
    """Add codes, scales and zeros to initializers, and return their names."""
    rows, columns = weight.codes.shape
    blocks = weight.scale.shape[1]
    signed = weight.codes.dtype == np.int8
    lift = (1 << (weight.bits - 1)) if signed else 0
    codes = weight.codes.astype(np.int16) + lift
    zero = weight.zero.astype(np.int16) + lift
    middle = 1 << (weight.bits - 1)
    filled = ((0, 0), (0, blocks * weight.block - columns))
    codes = np.pad(codes, filled, constant_values=middle)
    names = [base, f"{base}.scales"]
    arrays = [
        _bytes(codes, weight.bits).reshape(rows, blocks, -1),
        weight.scale.astype(np.float32),
    ]
    if (zero != middle).any():
        names.append(f"{base}.zeros")
        arrays.append(_bytes(zero, weight.bits))
    import onnx

    for name, array in zip(names, arrays, strict=True):
        added[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    return names


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return rows of codes as bytes; of 4 bits two share one, the first one low."""
    if bits == 8:
        return codes.astype(np.uint8)
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    made: np.ndarray = (even[:, 0::2] | (even[:, 1::2] << 4)).astype(np.uint8)
    return made


def _used(nodes: list[Any], graph: Any) -> list[Any]:
    """Leave out dequantizations and transpositions that nobody reads any more."""
    while True:
        taken = {name for node in nodes for name in node.input} | {o.name for o in graph.output}
        kept = [
            node
            for node in nodes
            if node.op_type not in ("DequantizeLinear", "Transpose")
            or any(name in taken for name in node.output)
        ]
        if len(kept) == len(nodes):
            return kept
        nodes = kept
