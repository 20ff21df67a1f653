"""Times by operator, before and after: with the names of layers, or with the reason why not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from torch import nn

from tersor.candidate import Candidate
from tersor.core import plugins
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.operator_times import operator_times
from tersor.pipeline import compress
from tests import networks
from tests.runners import linear_onnx

FEEDS = [{"x": np.zeros((2, 6), np.float32)}]


def candidate(file: Path, runtime: str = "onnxruntime") -> Candidate:
    target = Target(runtime=runtime, options={"threads": 1})
    runner = plugins.runtime("onnxruntime").load(file, replace_runtime(target))
    return Candidate(net=None, files=(file,), target=target, runner=runner)


def replace_runtime(target: Target) -> Target:
    return Target(runtime="onnxruntime", device=target.device, options=target.options)


def test_two_networks_are_timed(tmp_path: Path) -> None:
    before = candidate(linear_onnx(tmp_path / "a.onnx"))
    after = candidate(linear_onnx(tmp_path / "b.onnx", classes=2))
    found = operator_times(before, after, FEEDS)
    assert found.how.startswith("onnxruntime's profiler, the quieter of 2 turns")
    for side in (found.before, found.after):
        assert [each.part for each in side] == ["linear layers"]
        assert side[0].ms > 0


def test_a_runtime_without_a_profiler_says_so(tmp_path: Path) -> None:
    one = candidate(linear_onnx(tmp_path / "a.onnx"), "torch_eager")
    found = operator_times(one, one, FEEDS)
    assert found.how == "torch_eager does not tell where its time goes"
    assert found.before == ()


def test_a_profiler_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    one = candidate(linear_onnx(tmp_path / "a.onnx"))

    def bind(arrays: Any) -> Any:
        raise RuntimeError("no room")

    broken = Candidate(
        net=None, files=one.files, target=one.target, runner=SimpleNamespace(bind=bind)
    )
    assert operator_times(one, broken, FEEDS).how == "onnxruntime's profiler failed: no room"


def test_a_report_names_the_layers(tmp_path: Path) -> None:
    made = compress(
        networks.tiny_cnn(),
        Recipe.parse({"steps": ["fuse_batch_norm"], "target": "onnxruntime"}),
        data=networks.data(),
        out=tmp_path / "out",
        metrics=("size",),
        threads=1,
    )
    found = made.report.operators
    assert found is not None
    names = [{each.layer for each in side if each.layer} for side in (found.before, found.after)]
    layers = dict(networks.tiny_cnn().named_modules())
    assert names[0] == names[1]
    assert names[0] <= set(layers)
    convolutions = {name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    assert convolutions <= names[0]
