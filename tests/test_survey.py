"""survey(): one network on every runtime."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from tersor.core.errors import DataError, RecipeError
from tersor.core.model import Model
from tersor.survey import survey
from tests import networks
from tests.command import ROOT, failing, talk
from tests.runners import linear_onnx


def test_all_run_agree_and_are_timed():
    model = Model(net=networks.tiny_cnn().eval(), form="module", origin="module:tiny")
    found = survey(
        model,
        data=networks.data(),
        inputs=networks.inputs(),
        runtimes=("onnxruntime", "torch_export"),
        metrics=("size",),
        threads=1,
    )
    assert [row.status for row in found.rows] == ["ran", "ran"], found.rows
    for row in found.rows:
        assert row.exported
        assert row.measurements["fidelity"].value == 100
        assert row.measurements["accuracy"].value > 80
        assert row.measurements["size"].value > 0
        high = row.measurements.get("latency_p90")  # none where a busy machine made few runs
        assert high is None or row.measurements["latency"].value <= high.value
        assert row.speed is not None
        assert row.speed[1] <= row.speed[0] <= row.speed[2]
    assert found.rows[0].speed == (1.0, 1.0, 1.0)


def test_one_that_fails_is_a_row_and_the_others_go_on():
    model = Model(net=networks.sparse_cnn().eval(), form="module", origin="module:sparse")
    from tersor.ops.sparse import sparse

    name, layer = next((n, m) for n, m in model.net.named_modules() if type(m).__name__ == "Linear")
    model.net.set_submodule(name, sparse(layer))
    found = survey(
        model,
        data=networks.data(),
        inputs=networks.inputs(),
        runtimes=("onnxruntime", "torch_export"),
        metrics=("size",),
        threads=1,
    )
    failed, ran = found.rows
    assert failed.status == "failed"
    assert not failed.exported
    assert "layers whose weights are executed sparse cannot be written as ONNX" in failed.reason
    assert ran.status == "ran"
    assert ran.speed == (1.0, 1.0, 1.0)


def test_an_onnx_file_skips_what_takes_earlier_forms():
    from tersor.ops.lower import lower

    net = lower(networks.tiny_cnn().eval(), "onnx", networks.inputs())
    model = Model(net=net, form="onnx", origin="onnx:m.onnx")
    found = survey(
        model,
        data=networks.data(),
        inputs=networks.inputs(),
        runtimes=("torch_eager", "onnxruntime"),
        metrics=("size",),
        threads=1,
    )
    assert found.rows[0].status == "skipped"
    assert found.rows[0].reason == "takes a network of form module, this one is of form onnx"
    assert found.rows[1].status == "ran"


def test_what_cannot_be_asked():
    model = Model(net=networks.tiny_cnn().eval(), form="module", origin="module:tiny")
    with pytest.raises(RecipeError, match="Did you mean 'onnxruntime'"):
        survey(model, data=networks.data(), inputs=networks.inputs(), runtimes=("onnxruntim",))
    with pytest.raises(DataError, match="no split 'tests' to measure on"):
        survey(model, data=networks.data(), inputs=networks.inputs(), split="tests")


def test_the_command_line(tmp_path):
    words = [
        "measure",
        "tersor.demo.network:trained",
        "--data",
        "digits",
        "--runtime",
        "onnxruntime",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tersor", *words, "--json", "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["survey"]["rows"]
    assert row["status"] == "ran"
    assert row["measurements"]["latency"]["value"] > 0
    done = subprocess.run(
        [sys.executable, "-m", "tersor", *words[:2], "--all-runtimes"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "give --data" in done.stderr


def test_inputs_that_one_does_not_take_are_its_row(monkeypatch):
    def unbindable(batches, batch):
        return [{"x": np.array([None])}] if batch == 1 else []

    monkeypatch.setattr("tersor.survey.timing_inputs", unbindable)
    model = Model(net=networks.tiny_cnn().eval(), form="module", origin="module:tiny")
    found = survey(
        model,
        data=networks.data(),
        inputs=networks.inputs(),
        runtimes=("onnxruntime",),
        metrics=("size",),
        threads=1,
    )
    (row,) = found.rows
    assert row.status == "failed"
    assert row.exported
    assert "array 'x' is of object" in row.reason


def test_a_target_is_not_ignored():
    words = ["measure", "m.onnx", "--all-runtimes", "--target", "openvino"]
    done = subprocess.run(
        [sys.executable, "-m", "tersor", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--target openvino cannot be given with --all-runtimes" in done.stderr


def test_a_model_file_needs_no_data(tmp_path, capsys):
    file = linear_onnx(tmp_path / "m.onnx")
    words = ("measure", str(file), "--runtime", "onnxruntime", "--threads", "1")
    code, _, err = talk(capsys, *words, "--data", "none")
    assert (code, "unknown data 'none'" in err) == (2, True)
    code, out, err = talk(capsys, *words, "--batch", "3", "--json")
    (row,) = json.loads(out)["survey"]["rows"]
    assert (code, row["status"]) == (0, "ran")
    assert "inputs are random: there is no --data\n" in err
    code, err = failing(capsys, "measure", f"{ROOT / 'tests' / 'networks.py'}:TinyCnn", *words[2:])
    assert (code, err.startswith("a network in Python is measured on data")) == (2, True)
