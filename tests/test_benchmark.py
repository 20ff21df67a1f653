import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tersor import benchmark
from tersor.benchmark import (
    compare,
    contest,
    evaluate,
    measure,
    measure_subject,
    paired,
    self_check,
    slowed,
    timing_inputs,
)
from tersor.core.artifact import Artifact
from tersor.core.context import Data
from tersor.core.errors import DataError, ModelError, RecipeError, TargetError
from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics import latency
from tersor.subjects import made_inputs, place
from tests.runners import Matmul, batches, linear_onnx

TARGET = Target(runtime="onnxruntime", options={"threads": 1})


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.05)


def test_contest_says_which_is_faster_and_how() -> None:
    inputs = batches(width=128)
    found = contest(Matmul(128, 6), Matmul(128, 1), inputs, budget_s=0.5, warm_up_s=0.02)
    assert found.verdict == "faster"
    assert found.speedup > 2
    assert found.low <= found.speedup <= found.high
    assert found.a_ms > found.b_ms
    assert found.blocks == len(found.samples["a"]) == len(found.samples["b"]) >= 8
    assert found.how.startswith(f"median ratio of {found.blocks} interleaved blocks in ")
    assert "95 % block bootstrap, minimum effect 3 %" in found.how


def test_contest_that_does_not_settle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    class Erratic(Matmul):
        def bind(self, inputs):  # type: ignore[no-untyped-def]
            call = super().bind(inputs)

            def erratic():  # type: ignore[no-untyped-def]
                time.sleep(0.02 * rng.random())
                return call()

            return erratic

    found = contest(Erratic(), Erratic(), batches(), budget_s=0.2, warm_up_s=0.01)
    assert not found.stable
    assert "; unstable: the interval is wider than 2 %" in found.how
    assert "blocks, of 30 wanted, in the time given" in found.how


def test_slowed_is_really_slower_and_computes_the_same() -> None:
    inputs = batches(count=1)[0]
    runner = Matmul(64, 200)
    plain, slow = runner.bind(inputs), slowed(runner, 1.0).bind(inputs)
    assert (plain()["output"] == slow()["output"]).all()

    def seconds(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    pairs = [(seconds(plain), seconds(slow)) for _ in range(15)]
    assert np.median([s / p for p, s in pairs]) > 1.5
    other = slowed(runner, 0.1)
    other.close()
    assert runner.closed


def test_self_check_reports_false_alarms_and_planted_slowdowns() -> None:
    def load() -> Matmul:
        return Matmul(128, 4)

    inputs = batches(width=128)
    aa = self_check(load, inputs, repetitions=2, budget_s=0.1, warm_up_s=0.02)
    assert aa["repetitions"] == 2
    assert aa["faster"] + aa["slower"] <= 2
    assert len(aa["ratios"]) == 2
    assert all(low <= middle <= high for low, middle, high in aa["ratios"])
    assert aa["worst_error"] >= aa["median_error"] >= 0
    planted = self_check(load, inputs, repetitions=1, budget_s=0.1, warm_up_s=0.02, planted=1.0)
    assert planted["slower"] == 1


def test_evaluate_joins_a_split_of_tensors() -> None:
    rng = np.random.default_rng(0)
    images, labels = torch.randn(20, 64), torch.from_numpy(rng.integers(0, 10, 20))
    split = [{"x": images[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 20, 8)]
    runner = Matmul()
    outputs, found = evaluate(runner, split)
    assert outputs.shape == (20, 10)
    assert found is not None
    assert (found == labels.numpy()).all()
    whole = runner.bind({"x": images.numpy()})()["output"]
    assert outputs == pytest.approx(whole, rel=1e-4, abs=1e-4)  # sums of a batch in another order
    assert evaluate(runner, batches())[1] is None


def test_evaluate_refuses_what_does_not_fit() -> None:
    with pytest.raises(
        DataError, match="the split has no batches; it must be a re-iterable, such as a list"
    ):
        evaluate(Matmul(), [])
    with pytest.raises(DataError, match="the network takes an input 'x'; the batches hold image"):
        evaluate(Matmul(), [{"image": np.zeros((1, 64), np.float32)}])
    one, two = batches(count=2)
    with pytest.raises(DataError, match="only 1 of 2 batches have labels"):
        evaluate(Matmul(), [{**one, "labels": np.zeros(8, int)}, two])
    ragged = SimpleNamespace(bind=lambda feeds: lambda: {"y": feeds["x"]})
    with pytest.raises(
        DataError,
        match=r"outputs of the batches have different shapes beyond the first axis .* pad the samples",
    ):
        evaluate(ragged, [{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}])  # type: ignore[arg-type]


def test_timing_inputs_are_distinct_batches_of_real_samples() -> None:
    samples = np.arange(100, dtype=np.float32)[:, None]
    split = [
        {
            "x": torch.from_numpy(samples[i : i + 30]),
            "labels": torch.zeros(len(samples[i : i + 30])),
        }
        for i in range(0, 100, 30)
    ]
    made = timing_inputs(split, 4)
    assert len(made) == 16
    assert all(batch["x"].shape == (4, 1) for batch in made)
    assert len(set(np.concatenate([b["x"].ravel() for b in made]))) == 64
    assert "labels" not in made[0]
    few = timing_inputs(split, 60, count=3)
    assert all(len(set(batch["x"].ravel())) == 60 for batch in few)
    assert (few[0]["x"] != few[1]["x"]).any()
    tiny = timing_inputs([{"x": samples[:3]}], 8, count=2)
    assert tiny[0]["x"].shape == (8, 1)


def test_timing_inputs_keep_to_the_shape_of_the_first_batch_and_to_tables() -> None:
    split = [
        {"x": np.zeros((2, 3)), "table": np.ones(7)},
        {"x": np.ones((2, 4)), "table": np.ones(7)},
    ]
    made = timing_inputs(split, 2, count=2)
    assert all(batch["x"].shape == (2, 3) and batch["table"].shape == (7,) for batch in made)
    with pytest.raises(DataError, match="no samples to time with: the split has no batches"):
        timing_inputs([], 1)


def test_measure_subject_says_what_is_missing() -> None:
    subject = Subject(target=TARGET, outputs=np.eye(3), split="test")
    with pytest.raises(
        DataError,
        match=r"the metric 'accuracy' needs labels; add 'labels' to the batches of the data \(split 'test'\)",
    ):
        measure_subject(subject, ["accuracy"])
    with pytest.raises(
        DataError,
        match="the metric 'quality' needs the data's own quality; give 'quality' next to the splits",
    ):
        measure_subject(replace(subject, labels=np.arange(3)), ["quality"])
    with pytest.raises(ModelError, match="the metric 'parameters' needs the network in memory"):
        measure_subject(subject, ["parameters"])
    with pytest.raises(RecipeError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'\?"):
        measure_subject(subject, ["acuracy"])


def test_paired_accuracy_is_in_points() -> None:
    labels = np.arange(1000) % 4
    right = np.eye(4)[labels]
    worse = right.copy()
    worse[:10] = np.roll(worse[:10], 1, axis=1)
    found = paired("accuracy", right, worse, labels)
    assert found is not None
    assert found.difference == pytest.approx(-1.0)
    assert -2.0 < found.low < -1.0 < found.high < 0.0
    assert found.p == pytest.approx(2 / 2**10)  # ten samples lost, none gained
    assert found.test == "McNemar's exact test"
    assert found.verdict("higher") == "worse"


def test_paired_of_other_metrics() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    before = np.eye(4)[labels] * 2 + rng.normal(size=(400, 4))
    after = before + 0.5 * rng.normal(size=(400, 4))
    f1 = paired("f1", before, after, labels)
    assert f1 is not None
    assert f1.test == "paired bootstrap of 1000 draws"
    assert f1.low < f1.difference < f1.high
    perplexity = paired("perplexity", before, after, labels)
    assert perplexity is not None
    assert perplexity.difference > 0
    assert 0.001 < perplexity.p < 0.05
    assert perplexity.verdict("lower") == "worse"
    own = paired(
        "quality", before, after, labels, quality=lambda o, y: float((o.argmax(1) == y).sum())
    )
    assert own is not None
    assert own.low < own.difference < own.high < 400
    assert paired("size", before, after, labels) is None
    assert paired("f1", before[:4], after[:4], labels[:4]) is None  # too few different draws
    with pytest.raises(DataError, match="outputs are of 400 samples before but 399 after"):
        paired("f1", before, after[1:], labels)


def test_outputs_that_are_not_finite_are_counted_and_refused() -> None:
    outputs = np.eye(3)
    outputs[0, 1], outputs[2] = np.nan, np.inf
    made = Subject(target=TARGET, outputs=outputs, labels=np.arange(3), split="test")
    with pytest.raises(TargetError, match="4 of 9 outputs over test are not finite"):
        measure_subject(made, ["accuracy"])
    with pytest.raises(DataError, match=r"the split 'test' has no samples: outputs have shape"):
        measure_subject(replace(made, outputs=outputs[:0]), ["accuracy"])


def test_measure_a_bare_model_file_without_data(tmp_path: Path, short: None) -> None:
    pytest.importorskip("onnxruntime")
    file = linear_onnx(tmp_path / "m.onnx", width=6, classes=4)
    size, latency_, macs, parameters = measure(
        file, ("size", "latency", "macs", "parameters"), threads=1, batch=3
    )
    assert size.value == file.stat().st_size
    assert latency_.value > 0
    assert latency_.how.endswith("batch 3, 1 thread")
    assert macs.value == 24
    assert parameters.value == 28


def test_measure_quality_over_a_split_and_against_the_original(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = linear_onnx(tmp_path / "m.onnx", width=6, classes=4, name="image")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((40, 6)).astype(np.float32)
    outputs, _ = evaluate(place(file).load(), [{"image": images}])
    labels = outputs.argmax(1)
    labels[:4] = (labels[:4] + 1) % 4
    # the only input of the network takes the only one of the data, whatever its name
    data = Data(
        test=[{"x": torch.from_numpy(images), "labels": torch.from_numpy(labels)}],
        quality=lambda o, y: float((o.argmax(1) == y).double().mean()),
    )
    accuracy, fidelity, quality = measure(
        file, ("accuracy", "fidelity", "quality"), data=data, reference=file
    )
    assert accuracy.value == 90.0
    assert accuracy.conditions["split"] == "test"
    assert fidelity.value == 100.0
    assert quality.value == pytest.approx(0.9)
    with pytest.raises(
        DataError,
        match="the metric 'fidelity' needs the original network's outputs; give the original as reference",
    ):
        measure(file, ["fidelity"], data=data)
    with pytest.raises(
        DataError,
        match="the metric 'accuracy' needs data to run; give data with a split of samples",
    ):
        measure(file, ["accuracy"])
    with pytest.raises(DataError, match=r"the data have no split 'validation'\. They have test"):
        measure(file, ["accuracy"], data=data, split="validation")


def test_compare_model_files_with_different_input_names(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    small = linear_onnx(tmp_path / "small.onnx", width=512, classes=8)
    large = linear_onnx(tmp_path / "large.onnx", width=512, classes=4096, name="image")
    found = compare(large, small, threads=1, batch=4, budget_s=0.2, aa=1)
    assert found.verdict == "faster"
    assert found.conditions["batch"] == 4
    assert found.conditions["threads"] == 1
    assert str(found.conditions["b"]).endswith("small.onnx")
    assert found.self_check is not None
    assert found.self_check["repetitions"] == 1


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'.*nowhere' does not exist; give an artifact or a model file"
    ):
        measure(tmp_path / "nowhere")
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    with pytest.raises(
        ModelError,
        match=r"'notes.txt' is neither an artifact nor a model file that tersor runs \(.*\.onnx.*\)",
    ):
        measure(notes)


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ("torch_export", "torch_export runs .pt2 files, not 'm.onnx'; compress to this target, and give the artifact, or measure this file on onnxruntime or openvino"),
        ("torch_eager", "torch_eager runs artifacts only, not 'm.onnx': the file does not say what it takes, or is code; compress to this target, and give the artifact, or measure this file on onnxruntime or openvino"),
        ("litert", "litert runs .tflite files, not 'm.onnx'; compress to this target, and give the artifact, or measure this file on onnxruntime or openvino"),
    ],
)  # fmt: skip
def test_a_file_of_other_runtimes_is_refused(runtime: str, said: str, tmp_path: Path) -> None:
    file = linear_onnx(tmp_path / "m.onnx")
    with pytest.raises(ModelError) as caught:
        measure(file, target=Target(runtime=runtime))
    assert str(caught.value) == said


def test_openvino_runs_an_onnx_file_as_it_is(tmp_path: Path, short: None) -> None:
    pytest.importorskip("openvino")
    size, latency_ = measure(linear_onnx(tmp_path / "m.onnx"), target=Target(runtime="openvino"))
    assert size.value == (tmp_path / "m.onnx").stat().st_size
    assert latency_.value > 0


def _onnx(file: Path, nodes: list[Any], scale: float = 1.0) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.float32(scale), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, file)
    return file


@pytest.mark.parametrize(("scale", "warned"), [(0.0, True), (-1.0, True), (0.5, False)])
def test_scales_that_are_not_positive_are_told(
    scale: float, warned: bool, tmp_path: Path, short: None, caplog: pytest.LogCaptureFixture
) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], name="round"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    file = _onnx(tmp_path / "m.onnx", nodes, scale)
    measure(file, threads=1)
    told = f"warning: ONNX model {str(file)!r}: scale 's' of node 'round' is not positive"
    assert (told in caplog.messages) == warned


def test_outputs_that_are_not_finite_are_told(
    tmp_path: Path, short: None, caplog: pytest.LogCaptureFixture
) -> None:
    from onnx import helper

    file = _onnx(tmp_path / "m.onnx", [helper.make_node("Log", ["x"], ["y"])])
    measure(file, threads=1, data=Data(test=[{"x": np.full((2, 4), 0.5, np.float32)}]))
    assert not caplog.messages
    mixed = Data(test=[{"x": np.array([[1, 2, -1, 0]], np.float32)}])
    measure(file, threads=1, data=mixed)
    said = f"warning: 2 of 4 outputs of {file} are not finite (NaN or infinite) on the first batch"
    assert caplog.messages == [said]
    measure(file, threads=1)
    assert caplog.messages[-1].endswith(
        "on the first batch, which is random; give data to see whether they are on real inputs"
    )


def test_broken_and_fixed_model_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load broken\.onnx: "):
        measure(broken)
    fixed = linear_onnx(tmp_path / "fixed.onnx", batch=1)
    with pytest.raises(
        DataError,
        match=r"input 'x' of .*fixed.onnx has a fixed batch of 1; ask for --batch 1 instead of 4",
    ):
        measure(fixed, ["latency"], batch=4)
    with pytest.raises(
        TargetError,
        match=r"runtime 'onnxruntime' has no device 'cpus'. Did you mean 'cpu'\? It has cpu, cuda",
    ):
        measure(fixed, ["latency"], target=Target(runtime="onnxruntime", device="cpus"))
    free = linear_onnx(tmp_path / "free.onnx", width=6)
    with pytest.raises(DataError, match=r".*free.onnx takes the inputs x; the batches hold a, b"):
        measure(free, ["latency"], data=Data(test=[{"a": np.zeros((2, 6)), "b": np.zeros(2)}]))


def _artifact(tmp_path: Path, width: int, name: str) -> Path:
    from tersor.core.artifact import write_artifact
    from tersor.core.report import Report

    file = linear_onnx(tmp_path / "model.onnx", width=width, classes=8)
    manifest = {
        "target": TARGET,
        "recipe": {"steps": []},
        "inputs": {"x": {"shape": [2, width], "dtype": "float32", "dynamic": {"0": "batch"}}},
    }
    return write_artifact(tmp_path / name, files=[file], manifest=manifest, report=Report()).path


def test_artifacts_and_their_folders_are_measured(tmp_path: Path, short: None) -> None:
    pytest.importorskip("onnxruntime")
    folder = _artifact(tmp_path, 16, "out")
    opened = Artifact.open(folder)
    for subject in (folder, str(folder), opened, folder / "manifest.json"):
        size, latency_ = measure(subject, batch=4)
        assert size.value == (folder / "model.onnx").stat().st_size
        assert latency_.how.endswith("batch 4, 1 thread")
        assert {m.conditions["target"] for m in (size, latency_)} == {"onnxruntime:cpu"}
    with pytest.raises(
        TargetError,
        match=r"was made for onnxruntime:cpu, not for openvino:cpu; leave the target out, or compress again with --target openvino:cpu",
    ):
        measure(folder, target=Target(runtime="openvino"))


def test_artifacts_are_compared_with_bare_files(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = _artifact(tmp_path, 32, "out")
    again = linear_onnx(tmp_path / "same.onnx", width=32, classes=8)
    found = compare(folder, again, threads=1, budget_s=0.3)
    assert found.verdict in ("faster", "slower", "no difference")
    assert 0.2 < found.speedup < 5  # the same network; its time here is mostly that of the call
    assert found.conditions["a"] == str(folder)


def test_inputs_are_made_from_the_signature(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = place(linear_onnx(tmp_path / "m.onnx"))
    made = made_inputs(found, 5)
    assert len(made) == 16
    assert made[0]["x"].shape == (5, 6)
    assert made[0]["x"].dtype == np.float32
    assert (made[0]["x"] != made[1]["x"]).any()
    assert (made[0]["x"] == made_inputs(found, 5)[0]["x"]).all()


def test_openvino_files_are_measured_too(tmp_path: Path, short: None) -> None:
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(linear_onnx(tmp_path / "m.onnx"))
    openvino.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
    size, latency_ = measure(tmp_path / "m.xml", threads=1, batch=2)
    assert size.value == (tmp_path / "m.xml").stat().st_size + (tmp_path / "m.bin").stat().st_size
    assert latency_.value > 0
    with pytest.raises(
        ModelError,
        match=r"m\.xml cannot be looked into; ask for parameters and macs of the network",
    ):
        measure(tmp_path / "m.xml", ["macs"])


def test_measuring_onnx_does_not_import_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = linear_onnx(tmp_path / "m.onnx")
    code = (
        "import sys; from tersor import measure; measure(sys.argv[1], ['size', 'latency']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


@pytest.mark.slow
def test_a_real_network_against_itself_and_a_planted_slowdown(
    tmp_path: Path, workload: Callable[[str], ModuleType]
) -> None:
    from tersor.core import plugins
    from tersor.core.model import Inputs
    from tersor.ops.lower import lower

    module = workload("cifar")
    split = module.data()["test"]
    example = {"x": next(iter(split))["x"][:2]}
    runtime = plugins.runtime("onnxruntime")
    how = Inputs(example=example, dynamic={"x": {0: "batch"}})
    file = runtime.export(lower(module.resnet20(), "onnx", how), tmp_path, how)[0]
    inputs = timing_inputs(split, 1)

    def load():  # type: ignore[no-untyped-def]
        return runtime.load(file, TARGET)

    aa = self_check(load, inputs, repetitions=10)
    assert aa["faster"] + aa["slower"] <= 1
    assert self_check(load, inputs, repetitions=10, planted=0.05)["slower"] >= 8
    found = benchmark.measure(file, ["accuracy"], data=Data(test=split))
    assert found[0].value == pytest.approx(88.06)
