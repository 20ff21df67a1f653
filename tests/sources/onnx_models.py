"""Small ONNX models for tests, built node by node."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def value(name: str, kind: int = FLOAT, shape: Sequence[Any] | None = ("batch", 3)) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def array(name: str, data: Any, dtype: Any = np.float32) -> Any:
    return numpy_helper.from_array(np.asarray(data, dtype), name)


def model(
    nodes: Sequence[Any],
    *,
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    stored: Sequence[Any] = (),
    opset: int = 21,
    ir: int = 10,
    domains: Sequence[str] = (),
) -> Any:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        list(inputs or [value("x")]),
        list(outputs or [value("y")]),
        list(stored),
    )
    versions = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=versions, ir_version=ir)


def network() -> Any:
    """A convolution, a product and a softmax, with weights."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], "gemm", transB=1),
        helper.make_node("Softmax", ["logits"], ["y"], "softmax", axis=1),
    ]
    stored = [
        array("kernel", rng.standard_normal((4, 1, 3, 3))),
        array("bias", rng.standard_normal(4)),
        array("weight", rng.standard_normal((3, 4))),
    ]
    return model(nodes, inputs=[value("x", shape=("batch", 1, 6, 6))], stored=stored)


def external(name: str, shape: Sequence[int], **entries: str) -> Any:
    """A float initializer whose data are outside."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, text in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return tensor


def adding(*names: str, stored: Sequence[Any]) -> Any:
    """A model that adds initializers to its input, one after the other."""
    nodes, last = [], "x"
    for i, name in enumerate(names):
        out = "y" if i == len(names) - 1 else f"t{i}"
        nodes.append(helper.make_node("Add", [last, name], [out], f"add_{name}"))
        last = out
    return model(nodes, stored=stored)


def save(made: Any, file: Any) -> str:
    file.write_bytes(made.SerializeToString())
    return str(file)


__all__ = [
    "FLOAT",
    "INT64",
    "TensorProto",
    "adding",
    "array",
    "external",
    "helper",
    "model",
    "network",
    "onnx",
    "save",
    "value",
]
