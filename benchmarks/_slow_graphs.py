"""Small ONNX graphs, written operator by operator: what the slow cases are made of."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, shape_inference

Array = np.ndarray


class Graph:
    """A network of one input and one output; every method returns the name of a tensor."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        """Take `shape` without the batch, which is free."""
        self.rng = np.random.default_rng(seed)
        self.shape: tuple[int, ...] = shape
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.count = 0

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        self.count += 1
        names = [f"{kind}_{self.count}" + (f"_{i}" if i else "") for i in range(outputs)]
        domain = attributes.pop("domain", "")
        self.nodes.append(
            helper.make_node(kind, inputs, names, name=names[0], domain=domain, **attributes)
        )
        return names[0]

    def constant(self, array: Array, name: str = "constant") -> str:
        self.count += 1
        named = f"{name}_{self.count}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), named))
        return named

    def weight(self, *shape: int, zeros: float = 0.0, fan: int | None = None) -> Array:
        """Draw a weight; `zeros` of it, the smallest ones, are set to zero."""
        fan = fan or int(np.prod(shape[1:]))
        made = self.rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(fan))
        if zeros:
            made[np.abs(made) < np.quantile(np.abs(made), zeros)] = 0
        return made

    def conv(self, x: str, weight: Array | str, *, size: int | None = None, groups: int = 1) -> str:
        name = weight if isinstance(weight, str) else self.constant(weight, "weight")
        side = size if size is not None else np.asarray(weight).shape[-1]
        pad = side // 2
        return self.op("Conv", x, name, pads=[pad] * 4, group=groups, kernel_shape=[side, side])

    def linear(self, x: str, weight_IO: Array | str) -> str:
        name = weight_IO if isinstance(weight_IO, str) else self.constant(weight_IO, "weight")
        return self.op("MatMul", x, name)

    def rounded(self, x: str, scale: float = 0.02, zero: int = 128) -> str:
        """Quantize activations to 8 bits and back."""
        pair = (
            self.constant(np.float32(scale), "scale"),
            self.constant(np.uint8(zero), "zero"),
        )
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *pair), *pair)

    def stored(self, weight: Array, axis: int = 0) -> str:
        """Store a weight in int8, one scale for each output."""
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.abs(weight).max(axis=others, keepdims=True) / 127
        codes = np.rint(weight / scale).astype(np.int8)
        return self.op(
            "DequantizeLinear",
            self.constant(codes, "codes"),
            self.constant(scale.reshape(-1).astype(np.float32), "scale"),
            self.constant(np.zeros(scale.size, np.int8), "zero"),
            axis=axis,
        )

    def save(self, path: Path, y: str) -> Path:
        """Write the graph that ends in `y`."""
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        told = shape_inference.infer_shapes(model).graph.output[0]
        model.graph.output[0].CopyFrom(told)  # a valid file tells the rank of its output
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path


def to_openvino(file: Path) -> Path:
    """Write an ONNX file as OpenVINO reads it, weights as they are."""
    import openvino

    made = file.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(file), made, compress_to_fp16=False)
    return made


def chain(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Pair sizes with those that follow."""
    return list(itertools.pairwise(sizes))
