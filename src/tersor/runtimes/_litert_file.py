"""Edits of a TFLite file: what the converter leaves in float, or outside of the graph.

The converter makes floats of integer weights whose layer does not compute in integers alone, and
has integer networks take and return codes. Both are put right here, on the file's own tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.runtimes._litert_program import Kept

_LAYOUTS: Mapping[int, Sequence[tuple[int, ...]]] = {
    2: [(0, 1)],
    3: [(0, 2, 1), (1, 2, 0)],
    4: [(0, 2, 3, 1), (1, 2, 3, 0)],
}
"""How the file may order the axes of weights: of convolutions; of depthwise and transposed ones."""


def finish(file: Path, kept: Iterable[Kept], inputs: Mapping[str, str]) -> None:
    """Put `kept` weights into a file, and let the network take and return floats.

    Args:
        file: What the converter wrote; rewritten.
        kept: Weights to find by their float values.
        inputs: numpy dtype of each input by name, as the network takes it.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(file))
    edit = _Edit(model, schema)
    edit.keep(kept)
    edit.take_floats(inputs)
    edit.return_floats()
    edit.name_outputs()
    file.write_bytes(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))


class _Edit:
    """The tables of a model with one subgraph."""

    def __init__(self, model: Any, schema: Any) -> None:
        self.model, self.schema = model, schema
        self.graph = model.subgraphs[0]

    def keep(self, kept: Iterable[Kept]) -> None:
        """Replace constants of the values that are kept in fewer bits."""
        wanted: dict[bytes, tuple[Kept, tuple[int, ...]]] = {}
        for weights in kept:
            for axes in _LAYOUTS.get(weights.values.ndim, ()):
                key = np.ascontiguousarray(weights.values.transpose(axes)).tobytes()
                wanted.setdefault(key, (weights, axes))
        lookup = {len(key) for key in wanted}
        for index, tensor in enumerate(list(self.graph.tensors)):
            data = self.model.buffers[tensor.buffer].data
            if tensor.type != self.schema.TensorType.FLOAT32 or data is None:
                continue
            if len(data) in lookup and (found := wanted.get(np.asarray(data).tobytes())):
                self._replace(index, *found)

    def _replace(self, index: int, weights: Kept, axes: tuple[int, ...]) -> None:
        readers = [o for o in self.graph.operators if o.inputs is not None and index in o.inputs]
        linear = [o for o in readers if self._code(o) == self._builtin("FULLY_CONNECTED")]
        if weights.in_integers and readers and len(linear) == len(readers):
            self._drop(self.graph.tensors[index])
            self._store(self.graph.tensors[index], weights, axes)
            for operator in linear:
                operator.builtinOptions.asymmetricQuantizeInputs = True
            return
        floats = self.graph.tensors[index]
        self._drop(floats)
        packed = self._like(floats, b"_packed")
        self._store(self.graph.tensors[packed], weights, axes)
        self._insert(0, "DEQUANTIZE", packed, index)

    def _drop(self, tensor: Any) -> None:
        """Empty the memory of a constant, where it is the last that has it."""
        sharing = [other for other in self.graph.tensors if other.buffer == tensor.buffer]
        if len(sharing) == 1:
            self.model.buffers[tensor.buffer].data = None
        tensor.buffer = 0

    def _store(self, tensor: Any, weights: Kept, axes: tuple[int, ...]) -> None:
        codes = np.ascontiguousarray(weights.codes.transpose(axes))
        kinds = self.schema.TensorType
        tensor.type = kinds.FLOAT16 if weights.scale is None else kinds.INT8
        buffer = self.schema.BufferT()
        buffer.data = codes.reshape(-1).view(np.uint8)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1
        if weights.scale is not None:
            grid = self.schema.QuantizationParametersT()
            grid.scale = weights.scale.astype(np.float32)
            grid.zeroPoint = np.zeros(len(weights.scale), np.int64)
            grid.quantizedDimension = _channels(axes, weights.axis, len(tensor.shape))
            tensor.quantization = grid

    def take_floats(self, inputs: Mapping[str, str]) -> None:
        """Round floats that come in inside the graph, so that it is timed with it."""
        for entry in self.model.signatureDefs[0].inputs:
            tensor = self.graph.tensors[entry.tensorIndex]
            if inputs.get(entry.name.decode()) == "float32" and self._is_code(tensor):
                codes, entry.tensorIndex = entry.tensorIndex, self._floats(entry.tensorIndex)
                self._exchange(self.graph.inputs, codes, entry.tensorIndex)
                self._insert(0, "QUANTIZE", entry.tensorIndex, codes)

    def return_floats(self) -> None:
        """Return the values that codes stand for."""
        for entry in self.model.signatureDefs[0].outputs:
            if self._is_code(self.graph.tensors[entry.tensorIndex]):
                codes, entry.tensorIndex = entry.tensorIndex, self._floats(entry.tensorIndex)
                self._exchange(self.graph.outputs, codes, entry.tensorIndex)
                self._insert(len(self.graph.operators), "DEQUANTIZE", codes, entry.tensorIndex)

    def name_outputs(self) -> None:
        """Call outputs without names as PyTorch's runners do: output, output_1 ..."""
        entries = self.model.signatureDefs[0].outputs
        if {entry.name for entry in entries} == {b"output_%d" % i for i in range(len(entries))}:
            for entry in entries:
                entry.name = entry.name.removesuffix(b"_0")

    def _is_code(self, tensor: Any) -> bool:
        grid = tensor.quantization
        rounded = grid is not None and grid.scale is not None and len(grid.scale) > 0
        return rounded and tensor.type == self.schema.TensorType.INT8

    def _floats(self, index: int) -> int:
        made = self._like(self.graph.tensors[index], b"_float")
        self.graph.tensors[made].type = self.schema.TensorType.FLOAT32
        return made

    def _like(self, tensor: Any, suffix: bytes) -> int:
        """Add a tensor of the same shape; return its index."""
        made = self.schema.TensorT()
        made.shape, made.shapeSignature = tensor.shape, tensor.shapeSignature
        made.name, made.type, made.buffer = bytes(tensor.name) + suffix, tensor.type, 0
        made.hasRank = tensor.hasRank
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def _insert(self, at: int, kind: str, read: int, written: int) -> None:
        """Add an operator of one input and one output."""
        code = self._builtin(kind)
        codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in self.model.operatorCodes]
        if code not in codes:
            made = self.schema.OperatorCodeT()
            made.builtinCode, made.deprecatedBuiltinCode, made.version = code, code, 3
            self.model.operatorCodes.append(made)
            codes.append(code)
        operator = self.schema.OperatorT()
        operator.opcodeIndex = codes.index(code)
        operator.inputs, operator.outputs = [read], [written]
        self.graph.operators.insert(at, operator)

    def _code(self, operator: Any) -> int:
        code = self.model.operatorCodes[operator.opcodeIndex]
        return int(max(code.builtinCode, code.deprecatedBuiltinCode))

    def _builtin(self, kind: str) -> int:
        return int(getattr(self.schema.BuiltinOperator, kind))

    @staticmethod
    def _exchange(indices: Any, old: int, new: int) -> None:
        indices[[int(i) for i in indices].index(old)] = new


def _channels(axes: tuple[int, ...], axis: int, rank: int) -> int:
    """Tell where the channels are; a convolution of one dimension has one more axis in the file."""
    at = axes.index(axis)
    return at if at == 0 else at + rank - len(axes)
