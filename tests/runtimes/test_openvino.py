"""OpenVINO: options, streams, memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino")

from tersor.core.errors import TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.deployments import _container_run as container
from tersor.runtimes import openvino as runtime
from tests.runners import linear_onnx

X = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)


def target(**options: Any) -> Target:
    return Target(runtime="openvino", options={"threads": 2, **options})


def exported(folder: Path, batch: Any = "batch") -> Path:
    import onnx

    net = onnx.load(linear_onnx(folder / "source.onnx", batch=batch))
    return runtime.export(net, folder, Inputs(example={}))[0]


def wanted() -> np.ndarray:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((6, 4)), rng.standard_normal(4)
    return X @ weight.astype(np.float32) + bias.astype(np.float32)


@pytest.mark.parametrize(
    ("options", "requests"),
    [({}, 1), ({"hint": "throughput", "streams": 2}, 2), ({"streams": 2}, 2)],
)
def test_samples_are_shared_among_streams(options: Any, requests: int, tmp_path: Path) -> None:
    runner: Any = runtime.load(exported(tmp_path), target(**options))
    assert runner.most == requests
    np.testing.assert_allclose(runner.bind({"x": X})()["y"], wanted(), rtol=1e-5)
    np.testing.assert_allclose(runner.bind({"x": X[:1]})()["y"], wanted()[:1], rtol=1e-5)
    runner.close()


def flattening(file: Path) -> Path:
    """Write y = relu(x) whose first operator is a flatten that changes nothing, as ONNX."""
    from onnx import TensorProto, helper, numpy_helper

    ports = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 6]) for n in "xy")
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "shape"], ["flatten"]),
            helper.make_node("Relu", ["flatten"], ["y"]),
        ],
        "flattening",
        *([port] for port in ports),
        [numpy_helper.from_array(np.array([-1, 6]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize("options", [{}, {"shapes": "fixed"}])
def test_a_merged_tensor_keeps_the_name_it_was_exported_with(options: Any, tmp_path: Path) -> None:
    import onnx

    net = onnx.load(flattening(tmp_path / "source.onnx"))
    file = runtime.export(net, tmp_path, Inputs(example={}))[0]
    merged = runtime._compiled(file, target()).inputs[0]
    assert merged.get_names() == {"x", "flatten"}  # else this tests nothing
    runner = runtime.load(file, target(**options))
    np.testing.assert_array_equal(runner.bind({"x": X})()["y"], np.maximum(X, 0))
    assert list(runtime.inputs(file)) == ["x"]
    program = [sys.executable, container.__file__, "--model", str(file), "--threads", "1"]
    np.savez(tmp_path / "x.npz", x=X)
    done = subprocess.run(
        [*program, "--input", str(tmp_path / "x.npz")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "y 7x6 float32\n"), done.stderr


def test_throughput_leaves_the_number_of_streams_to_openvino(tmp_path: Path) -> None:
    assert "NUM_STREAMS" not in runtime.settings(target(hint="throughput"), ())
    runner = runtime.load(exported(tmp_path), target(hint="throughput"))
    np.testing.assert_allclose(runner.bind({"x": X})()["y"], wanted(), rtol=1e-5)


def test_a_fixed_batch_is_not_cut(tmp_path: Path) -> None:
    runner = runtime.load(exported(tmp_path, batch=7), target(streams=2))
    np.testing.assert_allclose(runner.bind({"x": X})()["y"], wanted(), rtol=1e-5)


def test_fixed_shapes_are_compiled_for_each_that_is_met(tmp_path: Path) -> None:
    runner: Any = runtime.load(exported(tmp_path), target(shapes="fixed"))
    for _ in range(2):
        for size in (7, 1):
            made = runner.bind({"x": X[:size]})()["y"]
            np.testing.assert_allclose(made, wanted()[:size], rtol=1e-5)
    assert runner.kept.cache_info().misses == 2
    shape = runner.compiled_for({"x": X[:1]}).input(0).get_partial_shape()
    assert shape.is_static
    assert tuple(shape.to_shape()) == (1, 6)
    runner.close()


def test_fixed_shapes_outlive_the_file(tmp_path: Path) -> None:
    file = exported(tmp_path)
    runner = runtime.load(file, target(shapes="fixed"))
    for each in tmp_path.iterdir():
        each.unlink()
    np.testing.assert_allclose(runner.bind({"x": X})()["y"], wanted(), rtol=1e-5)


def test_shapes_that_the_network_cannot_have(tmp_path: Path) -> None:
    runner = runtime.load(exported(tmp_path), target(shapes="fixed"))
    with pytest.raises(TargetError, match=r"^OpenVINO cannot fix the shapes of this network: .*"):
        runner.bind({"x": X[:, :5].copy()})


def test_operators_of_fixed_shapes_are_timed(tmp_path: Path) -> None:
    times = runtime.profile(exported(tmp_path), target(shapes="fixed"), [{"x": X}, {"x": X[:2]}])
    assert "FullyConnected" in {each.kind for each in times}


def test_a_signal_is_handled_after_networks_were_closed(tmp_path: Path) -> None:
    code = (
        "import gc, signal\n"
        "from pathlib import Path\n"
        "from tersor.core.runtime import Target\n"
        "from tersor.runtimes import openvino as runtime\n"
        f"file, target = Path({str(exported(tmp_path))!r}), Target(runtime='openvino')\n"
        "signal.signal(signal.SIGINT, lambda *about: print('handled'))\n"
        "first, second = runtime.load(file, target), runtime.load(file, target)\n"
        "for name in ('first', 'second'):\n"
        "    globals().pop(name).close()\n"
        "    gc.collect()\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_a_bound_call_keeps_its_inputs(tmp_path: Path) -> None:
    runner, x = runtime.load(exported(tmp_path), target()), X.copy()
    call = runner.bind({"x": x})
    before = call()["y"]
    x[:] = 0
    np.testing.assert_array_equal(call()["y"], before)


def test_sparse_weights_are_asked_for_where_they_help() -> None:
    made = runtime.settings(target(sparse_rate=0.7), ("avx2", "amx_int8"))
    assert made["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] == 0.7
    with pytest.raises(TargetError, match=r"^sparse_rate needs a processor with AMX, which this"):
        runtime.settings(target(sparse_rate=0.7), ("avx2",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hint": "latncy"},
            r"^hint must be one of latency, throughput; got 'latncy'\. Did you mean 'latency'\?$",
        ),
        (
            {"shapes": "fix"},
            r"^shapes must be one of free, fixed; got 'fix'\. Did you mean",
        ),
        ({"shapes": "fixed", "streams": 2}, r"^shapes: fixed runs a batch whole, as one request;"),
        (
            {"shapes": "fixed", "hint": "throughput"},
            r"^shapes: fixed runs a batch whole, as one request; leave out streams and hint, or",
        ),
        ({"precision": "int8"}, r"^precision must be one of fp32, bf16, fp16; got 'int8'"),
        ({"streams": 0}, r"^streams must be a whole number from 1; got 0$"),
        ({"streams": True}, r"^streams must be a whole number from 1; got True$"),
        ({"sparse_rate": 70}, r"^sparse_rate must be a share of zeros, 0 to 1; got 70$"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        runtime.settings(target(**options), ("amx_int8",))
