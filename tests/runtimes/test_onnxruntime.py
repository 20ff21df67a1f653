"""ONNX Runtime: its options, formats, execution providers, and memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx
import onnxruntime

from tersor.core.errors import DependencyError, ModelError, TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Signature, Target
from tersor.ops.onnx_providers import PROVIDERS, check_placement, provider_options
from tersor.runtimes import onnxruntime as runtime

HERE = onnxruntime.get_available_providers()
X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)


def target(device: str = "cpu", **options: Any) -> Target:
    return Target(runtime="onnxruntime", device=device, options={"threads": 1, **options})


def linear() -> tuple[Any, np.ndarray]:
    """Return y = identity(x) w, and w."""
    weight = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    kind, helper = onnx.TensorProto.FLOAT, onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["x"], ["same"]),
            helper.make_node("MatMul", ["same", "w"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", kind, ["batch", 6])],
        [helper.make_tensor_value_info("y", kind, ["batch", 4])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model, weight


def exported(folder: Path, **options: Any) -> list[Path]:
    return list(runtime.export(linear()[0], folder, Inputs(example={}), target(**options)))


def run(file: Path, **options: Any) -> np.ndarray:
    runner = runtime.load(file, target(**options))
    made = runner.bind({"x": X})()["y"]
    runner.close()
    return made


@pytest.mark.parametrize(("level", "nodes"), [("disable", 2), ("basic", 1), ("all", 1)])
def test_levels_optimize_as_they_say(level: str, nodes: int, tmp_path: Path) -> None:
    (file,) = exported(tmp_path)
    written = tmp_path / "written.onnx"
    runtime._session(file, target(optimization=level), write_to=written)
    assert len(onnx.load(written).graph.node) == nodes
    np.testing.assert_allclose(run(file, optimization=level), X @ linear()[1], rtol=1e-5)


def test_a_bound_call_keeps_its_inputs(tmp_path: Path) -> None:
    (file,) = exported(tmp_path)
    runner, x = runtime.load(file, target()), X.copy()
    call = runner.bind({"x": x})
    before = call()["y"]
    x[:] = 0
    np.testing.assert_array_equal(call()["y"], before)
    assert np.abs(before).max() > 0


def test_format_ort_runs_and_lists_its_operators(tmp_path: Path) -> None:
    file, needed = exported(tmp_path, format="ort")
    assert [f.name for f in (file, needed)] == ["model.ort", "model.required_operators.config"]
    assert "MatMul" in needed.read_text()
    np.testing.assert_allclose(run(file), X @ linear()[1], rtol=1e-5)
    wanted = Signature(shape=("batch", 6), dtype="float32")
    assert runtime.inputs(file) == {"x": wanted}
    with pytest.raises(TargetError, match=r"^ONNX Runtime's own format does not tell what its"):
        runtime.fused(file, target())


def test_saved_graph_is_used_on_the_machine_it_is_for(tmp_path: Path) -> None:
    file, saved = exported(tmp_path, saved_optimized=True)
    np.testing.assert_allclose(run(file, saved_optimized=True), X @ linear()[1], rtol=1e-5)
    graph = onnx.load(saved)
    other = np.ones((6, 4), np.float32)
    graph.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(other, graph.graph.initializer[0].name)
    )
    saved.write_bytes(graph.SerializeToString())
    np.testing.assert_allclose(run(file, saved_optimized=True), X @ other, rtol=1e-5)
    # without the option, or on another machine, the file itself is loaded
    np.testing.assert_allclose(run(file), X @ linear()[1], rtol=1e-5)
    onnx.helper.set_model_props(graph, {"tersor.machine": "another"})
    saved.write_bytes(graph.SerializeToString())
    np.testing.assert_allclose(run(file, saved_optimized=True), X @ linear()[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"saved_optimized": True},
            r"^there is no optimized\.onnx beside model\.onnx; export again with saved_optimized$",
        ),
        ({"format": "ort"}, r"^model\.onnx is not in the format 'ort'; export it again$"),
        (
            {"optimization": "al"},
            r"^optimization must be one of disable, basic, extended, all; got 'al'\. Did you mean "
            r"'all'\?$",
        ),
        ({"fallback": "yes"}, r"^fallback must be true or false; got 'yes'$"),
        (
            {"cuda_graphs": True},
            r"^cuda_graphs needs the device cuda or tensorrt; the target is onnxruntime:cpu$",
        ),
        (
            {"precision": "fp16"},
            r"^precision fp16 needs the device cuda or tensorrt; onnxruntime:cpu has no kernels "
            r"for it$",
        ),
        ({"precision": "fp8"}, r"^precision must be one of fp32, fp16, bf16; got 'fp8'"),
        (
            {"format": "ort", "saved_optimized": True},
            r"^format: ort holds an optimized graph already; leave saved_optimized out$",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: Any, message: str, tmp_path: Path) -> None:
    (file,) = exported(tmp_path)
    with pytest.raises(TargetError, match=message):
        runtime.load(file, target(**options))


@pytest.mark.parametrize(
    "device", [d for d, provider in PROVIDERS.items() if provider.name not in HERE]
)
def test_missing_provider_names_what_has_it(device: str, tmp_path: Path) -> None:
    (file,) = exported(tmp_path)
    provider = PROVIDERS[device]
    with pytest.raises(DependencyError, match=rf"has no {provider.name}, .*: {provider.brings}$"):
        runtime.load(file, target(device))


@dataclass
class Node:
    name: str
    op_type: str


@dataclass
class Part:
    ep_name: str
    nodes: list[Node]

    def get_nodes(self) -> list[Node]:
        return self.nodes


@dataclass
class Session:
    """What ONNX Runtime would say of a session on a device that is not here."""

    providers: list[str]
    parts: list[Part]

    def get_providers(self) -> list[str]:
        return self.providers

    def get_provider_graph_assignment_info(self) -> list[Part]:
        return self.parts


def test_cpu_does_not_take_over_unasked() -> None:
    cuda, cpu = PROVIDERS["cuda"].name, PROVIDERS["cpu"].name
    message = (
        rf"^ONNX Runtime could not start {cuda} and fell back to {cpu}: its driver or libraries "
        r"are missing, or do not fit\. What has it: pip install onnxruntime-gpu$"
    )
    with pytest.raises(TargetError, match=message):
        check_placement(Session([cpu], []), target("cuda"))
    left = Part(cpu, [Node("end", "NonZero"), Node("size", "Shape")])
    mixed = Session([cuda, cpu], [Part(cuda, [Node("conv", "Conv")]), left])
    message = (
        r"^1 operators would run on the CPU, such as 'end'; cuda has no NonZero\. Allow it with "
        r"the option fallback: true, or choose another device$"
    )
    with pytest.raises(TargetError, match=message):
        check_placement(mixed, target("cuda"))
    check_placement(mixed, target("cuda", fallback=True))
    left.nodes.pop(0)
    check_placement(mixed, target("cuda"))  # shapes alone may stay on the CPU


def test_providers_are_told_what_the_options_say() -> None:
    assert provider_options(target("cuda", cuda_graphs=True), 1) == {"enable_cuda_graph": "1"}
    made = provider_options(target("tensorrt", cuda_graphs=True), 1)
    assert made == {"trt_cuda_graph_enable": "1"}
    assert provider_options(target("xnnpack"), 3) == {"intra_op_num_threads": "3"}
    assert provider_options(target(), 3) == {}


def test_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.ort"
    file.write_bytes(b"nothing")
    with pytest.raises(TargetError, match=r"^ONNX Runtime cannot load model\.ort: "):
        runtime.load(file, target())
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot load model\.ort: "):
        runtime.inputs(file)
