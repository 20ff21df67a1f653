"""What an operator of a runtime has to do: multiply-accumulates, and bytes that it cannot avoid.

Bytes are compulsory traffic: every tensor that a fused operator takes from outside or hands on is
moved once, weights included; what stays inside it is not moved at all.

Source:
    Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore
    architectures", CACM 2009: operational intensity. We count 2 operations for one
    multiply-accumulate, and none for element-wise operators.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersor.core.runtime import Arrays
from tersor.ops import onnx_count

_BITS = {
    "BOOL": 8, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16, "INT32": 32, "UINT32": 32,
    "INT64": 64, "UINT64": 64, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT": 32, "DOUBLE": 64,
    "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one fused operator has to do in a run."""

    macs: int
    weight_bytes: int
    moved_bytes: int
    """Of what it takes and gives, beside weights."""
    shape: tuple[int, ...] = ()
    """Of the weight that it multiplies with: (out, in, height, width) of a convolution, (in, out)
    of a product."""
    groups: int = 1
    """Of a convolution."""
    integers: bool = False
    """Whether it multiplies integers."""

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return 2 * self.macs / max(1, self.weight_bytes + self.moved_bytes)


class Counter:
    """The shapes and types of a graph, for one size of inputs."""

    nodes: dict[str, Any]
    makers: dict[str, Any]
    outputs: set[str]
    users: dict[str, set[int]]
    weights: dict[str, Any]
    constants: set[str]
    types: dict[str, int]
    shapes: dict[str, onnx_count.Shape]
    names: dict[int, str]

    def __init__(self, model: Any, inputs: Arrays) -> None:
        """Infer them, running the network once where inference does not know an operator.

        Args:
            model: onnx.ModelProto. Not modified.
            inputs: By the names of the graph's inputs.

        Raises:
            ModelError: a shape cannot be told.
        """
        import onnx

        graph = model.graph
        self.nodes = {}
        for node in graph.node:
            for name in (node.name, *node.output):
                if name:
                    self.nodes[name] = node
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.outputs = {value.name for value in graph.output}
        self.users = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, set()).add(id(node))
        self.weights = {t.name: t for t in graph.initializer}
        self.constants = {n.output[0] for n in graph.node if n.op_type == "Constant"}
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.types = {
            v.name: v.type.tensor_type.elem_type
            for v in (*inferred.input, *inferred.value_info, *inferred.output)
        }
        self.types.update({t.name: t.data_type for t in graph.initializer})
        self.shapes = dict(onnx_count.shapes_of(model, inputs))
        self.names = {code: word for word, code in onnx.TensorProto.DataType.items()}

    def work(self, covers: Iterable[str], others: Iterable[str] = ()) -> Work:
        """Tell what the operators of the graph with these names, fused into one, have to do.

        Args:
            covers: Names of operators, or of their outputs.
            others: All that any fused operator covers. A dequantization that none of them does was
                moved into its user, and belongs to it. Empty: nothing is added.
        """
        nodes = self._named(covers)
        run_by_some = {id(node) for node in self._named(others)}
        todo = list(nodes) if run_by_some else []
        while todo:
            for name in todo.pop().input:
                maker = self.makers.get(name)
                if maker is None or maker.op_type != "DequantizeLinear" or maker in nodes:
                    continue
                if id(maker) not in run_by_some:
                    nodes.append(maker)
                    todo.append(maker)
        inside = {id(node) for node in nodes}
        made = {name for node in nodes for name in node.output if name}
        taken = {name for node in nodes for name in node.input if name} - made - self.constants
        given = {
            name for name in made if name in self.outputs or self.users.get(name, set()) - inside
        }
        weights = taken & set(self.weights)
        counted = [node for node in nodes if node.op_type in onnx_count.COUNTED]
        heavy = max(counted, key=self._macs, default=None)
        return Work(
            macs=sum(map(self._macs, counted)),
            weight_bytes=sum(map(self.bytes_of, weights)),
            moved_bytes=sum(map(self.bytes_of, (taken - weights) | given)),
            shape=() if heavy is None else self._weight_shape(heavy),
            groups=1 if heavy is None else int(onnx_count.attribute_of(heavy, "group", 1)),
            integers=heavy is not None and self._integers(heavy, nodes),
        )

    def _named(self, names: Iterable[str]) -> list[Any]:
        found = (self.nodes.get(name) for name in names)
        return list({id(node): node for node in found if node is not None}.values())

    def _macs(self, node: Any) -> int:
        return onnx_count.macs_of(node, self.shapes)

    def bytes_of(self, name: str) -> int:
        """Tell the bytes of a tensor."""
        word = self.names.get(self.types.get(name, 1), "FLOAT")
        return math.ceil(math.prod(self.shapes.get(name, ())) * _BITS.get(word, 32) / 8)

    def _weight_shape(self, node: Any) -> tuple[int, ...]:
        at = 3 if node.op_type.startswith("QLinear") else 1
        shape = self.shapes.get(node.input[at], ()) if len(node.input) > at else ()
        if len(shape) != 2 and "Conv" not in node.op_type:
            return ()  # a product of two activations, or packed weights
        turned = node.op_type == "Gemm" and onnx_count.attribute_of(node, "transB", 0)
        return tuple(shape[::-1] if turned else shape)

    def _integers(self, heavy: Any, nodes: Sequence[Any]) -> bool:
        """Both sides come from integers, inside the operator."""
        if "Integer" in heavy.op_type or heavy.op_type.startswith("QLinear"):
            return True
        makers: Mapping[str, str] = {o: n.op_type for n in nodes for o in n.output}
        return all(makers.get(name) == "DequantizeLinear" for name in heavy.input[:2])
