"""What ONNX Runtime's profiler costs is measured, and grows with the inputs of an operator."""

import json
from pathlib import Path
from typing import Any

import pytest

from tersor.ops.onnx_profiler import NOTHING, Cost, kernel_events, measure_cost

onnxruntime = pytest.importorskip("onnxruntime")


def event(inputs: int, **more: Any) -> dict[str, Any]:
    return {"args": {"input_type_shape": [{"float": [1]}] * inputs}, **more}


def test_it_grows_along_a_line() -> None:
    cost = Cost(fixed=0.002, each_input=0.0001)
    assert cost.of(event(3)) == pytest.approx(0.0023)
    assert cost.of({"args": {}}) == pytest.approx(0.002)
    assert NOTHING.of(event(3)) == 0
    assert Cost(fixed=-1.0, each_input=0.0).of(event(1)) == 0


def test_only_executions_of_operators_count(tmp_path: Path) -> None:
    kept = event(1, cat="Node", name="conv_kernel_time", dur=3)
    others = [
        {"cat": "Session", "name": "model_run", "dur": 9},
        {"cat": "Node", "name": "conv_fence_before", "dur": 9},
    ]
    (tmp_path / "profile.json").write_text(json.dumps([*others, kept]))
    assert kernel_events(tmp_path / "profile.json") == [kept]


def test_the_profiler_is_not_free() -> None:
    loaded: list[bool] = []

    def session(file: Path, profile_to: Path | None) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        loaded.append(profile_to is not None)
        if profile_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_to)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    cost = measure_cost(session)
    assert cost.of(event(2)) > 0
    assert loaded.count(True) == len(loaded) // 3
