"""What an artifact takes and gives is found by running it in each free size."""

from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from tersor.core.artifact import write_artifact
from tersor.core.runtime import Target
from tersor.deployments._interface import interface
from tests.core.artifacts import report


@pytest.mark.parametrize("shape", [[2, 4, 3], [1, 1, 3]])
def test_free_sizes_of_outputs_are_found(shape: list[int], tmp_path: Path) -> None:
    value, free = onnx.helper.make_tensor_value_info, ["batch", "length", 3]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "net",
        [value("x", onnx.TensorProto.FLOAT, free)],
        [value("y", onnx.TensorProto.FLOAT, free)],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    dynamic = {"0": "batch", "1": "length"}
    manifest = {
        "recipe": {},
        "target": Target(runtime="onnxruntime", options={"threads": 1}),
        "inputs": {"x": {"shape": shape, "dtype": "float32", "dynamic": dynamic}},
    }
    files = [tmp_path / "model.onnx"]
    made = write_artifact(tmp_path / "out", files=files, manifest=manifest, report=report())
    found = interface(made)
    assert found.outputs[0].shape == ("batch", "length", 3)
    assert found.batched
