"""Small real runners and model files for tests of measuring."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.runtime import Arrays


class Matmul:
    """A network in numpy: scores = relu(x w) v, a few times over."""

    def __init__(self, width: int = 64, times: int = 1, classes: int = 10) -> None:
        rng = np.random.default_rng(0)
        self.w = rng.standard_normal((width, width)).astype(np.float32)
        self.v = rng.standard_normal((width, classes)).astype(np.float32)
        self.times = times
        self.closed = False

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        x = np.array(inputs["x"])

        def call() -> Arrays:
            for _ in range(self.times):
                y = np.maximum(x @ self.w, 0) @ self.v
            return {"output": y}

        return call

    def close(self) -> None:
        self.closed = True


def batches(count: int = 16, rows: int = 8, width: int = 64) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((rows, width)).astype(np.float32)} for _ in range(count)]


def linear_onnx(
    file: Path, *, width: int = 6, classes: int = 4, batch: Any = "batch", name: str = "x"
) -> Path:
    """Write y = x w + b as ONNX."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((width, classes)).astype(np.float32), "w")
    bias = numpy_helper.from_array(rng.standard_normal(classes).astype(np.float32), "b")
    graph = helper.make_graph(
        [helper.make_node("Gemm", [name, "w", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, classes])],
        [weight, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())
    return file
