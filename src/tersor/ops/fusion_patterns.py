"""Operators of an ONNX network that a runtime may compute in one pass: found, and named."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.ops.onnx_cover import name_of

_ACTIVATIONS = {
    "Relu": "relu",
    "LeakyRelu": "leaky relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "HardSwish": "hard swish",
    "HardSigmoid": "hard sigmoid",
    "Gelu": "gelu",
    "FastGelu": "gelu",
    "Clip": "clip",
}
_ALONE = {
    "LayerNormalization": "layer norm",
    "RMSNormalization": "rms norm",
    "SimplifiedLayerNormalization": "rms norm",
    "Attention": "attention",
    "MultiHeadAttention": "attention",
    "LSTM": "lstm",
    "GRU": "gru",
}


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Operators that could be one."""

    kind: str
    """Such as "conv + add + relu"."""
    operators: tuple[str, ...]
    """Names, in order; each but the last is read by the next alone."""


def find_patterns(model: Any) -> list[Pattern]:
    """List what could be fused, each at its longest: conv + add + relu is not conv + add, too.

    Args:
        model: onnx.ModelProto.
    """
    return list(_Reader(model).patterns())


def operator_names(model: Any) -> dict[str, str]:
    """Map the name of each tensor that an operator makes to the operator's."""
    return {made: name_of(node) for node in model.graph.node for made in node.output if made}


class _Reader:
    def __init__(self, model: Any) -> None:
        self.nodes = list(model.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}

    def patterns(self) -> Iterator[Pattern]:
        for node in self.nodes:
            if node.op_type in ("Conv", "ConvTranspose"):
                yield from self._conv(node)
            elif node.op_type in ("Gemm", "MatMul") and self._weighted(node):
                yield from self._linear(node)
            elif node.op_type == "Softmax":
                yield from self._attention(node)
            elif node.op_type == "Pow":
                yield from self._rms_norm(node)
            elif node.op_type in _ALONE:
                kind, operators = _ALONE[node.op_type], [node]
                before = self.makers.get(node.input[0])
                if kind.endswith("norm") and before is not None and self._joins(before):
                    # the sum goes on beside the norm: a kernel of both has two outputs
                    yield _pattern(f"add + {kind}", [before, node])
                yield _pattern(kind, operators)

    def _after(self, node: Any) -> Any:
        """Return the one operator that reads an output; None: several do, or the caller."""
        name = node.output[0]
        found = self.users.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def _weighted(self, node: Any) -> bool:
        return any(name in self.constants for name in node.input[:2])

    def _joins(self, node: Any) -> bool:
        """Tell whether a node adds two tensors that are computed."""
        return node.op_type == "Add" and not any(name in self.constants for name in node.input)

    def _activation(self, node: Any) -> tuple[str, list[Any]]:
        """Read the activation that alone follows a node: (its name or "", its operators)."""
        after = self._after(node)
        if after is not None and after.op_type in _ACTIVATIONS:
            kind = _ACTIVATIONS[after.op_type]
            if kind == "clip":
                kind = "relu6" if self._most(after) == 6 else "clip"
            return kind, [after]
        # x * sigmoid(x), where a runtime's own operator does not exist
        name = node.output[0]
        both = self.users.get(name, [])
        kinds = sorted(user.op_type for user in both)
        if kinds == ["Mul", "Sigmoid"] and name not in self.outputs:
            gate = next(user for user in both if user.op_type == "Sigmoid")
            product = self._after(gate)
            if product is not None and any(product is user for user in both):
                return "silu", [gate, product]
        return "", []

    def _most(self, clip: Any) -> float | None:
        import onnx

        tensor = self.constants.get(clip.input[2]) if len(clip.input) > 2 else None
        return None if tensor is None else float(np.max(onnx.numpy_helper.to_array(tensor)))

    def _conv(self, node: Any) -> Iterator[Pattern]:
        words, chain = ["conv" if node.op_type == "Conv" else "transposed conv"], [node]
        after = self._after(node)
        if after is not None and after.op_type == "BatchNormalization":
            words.append("batch norm")
            chain.append(after)
        after = self._after(chain[-1])
        if after is not None and self._joins(after):
            # both branches may end in a convolution; the one that is later takes the sum
            other = [self.makers.get(n) for n in after.input if n not in chain[-1].output]
            later = [o for o in other if o is not None and o.op_type == "Conv"]
            if not any(self._place(o) > self._place(node) for o in later if self._after(o)):
                words.append("add")
                chain.append(after)
        kind, operators = self._activation(chain[-1])
        if kind:
            words.append(kind)
            chain += operators
        if len(chain) > 1:
            yield _pattern(" + ".join(words), chain)

    def _place(self, node: Any) -> int:
        return next(i for i, other in enumerate(self.nodes) if other is node)

    def _linear(self, node: Any) -> Iterator[Pattern]:
        chain, after = [node], self._after(node)
        bias = node.op_type == "Gemm" and len(node.input) > 2
        if node.op_type == "MatMul" and after is not None and after.op_type == "Add":
            bias = any(name in self.constants for name in after.input)
            chain += [after] if bias else []
        if bias:
            yield _pattern("linear + bias", chain)
        kind, operators = self._activation(chain[-1])
        if kind:
            yield _pattern(f"linear + {kind}", [*chain, *operators])

    def _attention(self, softmax: Any) -> Iterator[Pattern]:
        chain, node = [softmax], self.makers.get(softmax.input[0])
        while node is not None and node.op_type in ("Add", "Mul", "Div", "Where"):
            chain.insert(0, node)
            inner = [self.makers.get(name) for name in node.input]
            kinds = ("MatMul", "Add", "Mul", "Div", "Where")
            node = next((n for n in inner if n is not None and n.op_type in kinds), None)
        values = self._after(softmax)
        if node is None or node.op_type != "MatMul" or values is None:
            return
        if values.op_type == "MatMul" and not self._weighted(node):
            yield _pattern("attention", [node, *chain, values])

    def _rms_norm(self, square: Any) -> Iterator[Pattern]:
        chain = [square]
        for kinds in (("ReduceMean",), ("Add",), ("Sqrt",), ("Reciprocal", "Div"), ("Mul",)):
            after = self._after(chain[-1])
            if after is None or after.op_type not in kinds:
                return
            chain.append(after)
        scaled = self._after(chain[-1])
        if scaled is not None and scaled.op_type == "Mul":
            chain += [scaled] if any(n in self.constants for n in scaled.input) else []
        yield _pattern("rms norm", chain)


def _pattern(kind: str, nodes: Sequence[Any]) -> Pattern:
    return Pattern(kind=kind, operators=tuple(name_of(node) for node in nodes))
