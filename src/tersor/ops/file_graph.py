"""What is in a model file: its operators, their weights and multiply-accumulates, its constants.

Reads ONNX files and OpenVINO's `.xml` into one plain form, in which `explain` looks for causes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.runtime import Arrays

LAYERS = ("Conv", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "ConvTranspose")
_OPENVINO = {
    "Convolution": "Conv",
    "GroupConvolution": "Conv",
    "ConvolutionBackpropData": "ConvTranspose",
    "LSTMSequence": "LSTM",
    "GRUSequence": "GRU",
    "RNNSequence": "RNN",
}


@dataclass(frozen=True, kw_only=True)
class FileOperator:
    """One operator of a file."""

    name: str
    kind: str
    """ONNX's word for it."""
    inputs: tuple[str, ...]
    """Tensors; of OpenVINO the names of the operators that make them."""
    outputs: tuple[str, ...]
    weight: str = ""
    """The constant that it multiplies by."""
    unpacked: bool = False
    """Whether that constant is in integers, and made a float before."""
    macs: int = 0
    """Multiply-accumulates of a run."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of its first input and of its output, where known."""
    groups: int = 1
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FileGraph:
    """Operators in the order of the file, and constants by name."""

    operators: tuple[FileOperator, ...] = ()
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def makers(self) -> dict[str, FileOperator]:
        """Map tensors to the operators that make them."""
        return {name: each for each in self.operators for name in each.outputs}

    def users(self) -> dict[str, list[FileOperator]]:
        """Map tensors to the operators that read them."""
        found: dict[str, list[FileOperator]] = {}
        for each in self.operators:
            for name in each.inputs:
                found.setdefault(name, []).append(each)
        return found

    def reuse(self, each: FileOperator) -> float:
        """Count products for each weight of a layer that is read."""
        size = int(self.constants[each.weight].size) if each.weight else 0
        return each.macs / size if size else math.inf


def read_onnx(model: Any, inputs: Arrays | None) -> FileGraph:
    """Read an onnx.ModelProto.

    Args:
        model: With its weights inside.
        inputs: A batch, which decides shapes and multiply-accumulates; None: constants are enough.
    """
    import onnx
    from onnx import numpy_helper

    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    shapes = {} if inputs is None else _shapes(model, inputs)
    shapes.update({name: array.shape for name, array in constants.items()})
    unpacked: dict[str, str] = {}
    made = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            unpacked[node.output[0]] = node.input[0]
        about = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        given = [n for n in node.input if n in constants or n in unpacked]
        weight = next((unpacked.get(n, n) for n in given), "") if node.op_type in LAYERS else ""
        first, last = shapes.get(node.input[0] if node.input else ""), shapes.get(node.output[0])
        made.append(
            FileOperator(
                name=node.name or node.output[0],
                kind=node.op_type,
                inputs=tuple(node.input),
                outputs=tuple(node.output),
                weight=weight,
                unpacked=bool(weight) and given[0] in unpacked,
                macs=_macs(node.op_type, constants.get(weight), first, last),
                shapes=() if first is None or last is None else (first, last),
                groups=int(about.get("group", 1)),
                attributes=about,
            )
        )
    return FileGraph(operators=tuple(made), constants=constants)


def _macs(
    kind: str,
    weight: NDArray[Any] | None,
    first: tuple[int, ...] | None,
    last: tuple[int, ...] | None,
) -> int:
    if weight is None or first is None or last is None:
        return 0
    if kind == "Conv":
        return math.prod(last) * math.prod(weight.shape[1:])
    if kind == "ConvTranspose":
        return math.prod(first) * math.prod(weight.shape[1:])
    if kind in ("LSTM", "GRU", "RNN"):
        return math.prod(first[:2]) * int(weight.size)
    return math.prod(last) * first[-1] if kind in ("MatMul", "Gemm") else 0


def _shapes(model: Any, inputs: Arrays) -> dict[str, tuple[int, ...]]:
    """Run the graph once as it is written, and look at every tensor."""
    import onnx
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    wanted = [name for node in copy.graph.node for name in node.output if name]
    given = {value.name for value in copy.graph.input}
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    made = session.run(wanted, {name: a for name, a in inputs.items() if name in given})
    shapes = {name: np.shape(array) for name, array in zip(wanted, made, strict=True)}
    return {**shapes, **{name: np.shape(array) for name, array in inputs.items()}}


def read_openvino(file: Path, inputs: Arrays | None) -> FileGraph:
    """Read an `.xml` file, and the `.bin` beside it; `inputs` as in `read_onnx`."""
    import openvino

    model = openvino.Core().read_model(file)
    if inputs is not None:
        model.reshape({name: list(array.shape) for name, array in inputs.items()})
    constants: dict[str, NDArray[Any]] = {}
    unpacked: dict[str, str] = {}
    made = []
    for op in model.get_ordered_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        if kind == "Constant":
            constants[name] = np.array(op.data)
            continue
        sources = [port.get_node().get_friendly_name() for port in op.input_values()]
        if kind == "Convert" and sources[0] in constants:
            unpacked[name] = sources[0]
            continue
        if kind in ("Multiply", "Subtract", "Reshape") and sources[0] in unpacked:
            unpacked[name] = unpacked[sources[0]]
            continue
        kind = _OPENVINO.get(kind, kind)
        given = [n for n in sources if n in constants or n in unpacked]
        weight = next((unpacked.get(n, n) for n in given), "") if kind in LAYERS else ""
        ports = [*op.input_values()[:1], *op.outputs()[:1]]
        known = [tuple(p.get_shape()) for p in ports if p.get_partial_shape().is_static]
        first, last = (known[0], known[-1]) if len(known) == 2 else (None, None)
        made.append(
            FileOperator(
                name=name,
                kind=kind,
                inputs=tuple(sources),
                outputs=(name,),
                weight=weight,
                unpacked=bool(weight) and given[0] in unpacked,
                macs=_macs(kind, constants.get(weight), first, last),
                shapes=() if first is None or last is None else (first, last),
            )
        )
    return FileGraph(operators=tuple(made), constants=constants)
