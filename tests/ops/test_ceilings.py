"""The machine's roofs: measured, kept, never lowered."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime

from tersor.ops import ceilings as roofs
from tersor.ops.ceilings import Ceilings, product


def some(**more):
    made = {"threads": 1, "gflops": {"fp32": 100.0, "int8": 400.0}, "memory_gb_s": 10.0}
    by = {"fp32": "onnxruntime", "int8": "onnxruntime"}
    return Ceilings(**{**made, "by": by, "cache_gb_s": 50.0, **more})


def test_the_roof_is_the_lower_of_two():
    """Williams et al.: min(peak, bandwidth x intensity); the ridge is at 10 operations a byte."""
    made = some()
    assert made.roof(1.0, "fp32", cached=False) == 10.0
    assert made.roof(10.0, "fp32", cached=False) == 100.0
    assert made.roof(1000.0, "fp32", cached=False) == 100.0
    assert made.roof(1.0, "fp32", cached=True) == 50.0
    assert made.roof(1000.0, "int8", cached=False) == 400.0
    assert made.peak("bf16") == 100.0  # not measured: that of fp32


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_products_are_products(kind):
    model = product(kind, 8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(0).integers(-64, 64, size=(8, 8)).astype(np.float32) / 64
    (made,) = session.run(None, {"x": x})
    (weight,) = [t for t in model.graph.initializer if t.name == "w"]
    from onnx import numpy_helper

    w = numpy_helper.to_array(weight).astype(np.float64) / (1 if kind == "fp32" else 64)
    assert np.allclose(made, x.astype(np.float64) @ w, atol=1e-4)


def test_a_bandwidth_is_plausible():
    assert 0.01 < roofs.add(1 << 16, 2) < 1e5


def test_they_are_kept_and_only_raised(tmp_path, monkeypatch):
    """What a busy machine gave is measured again, and the higher values stay."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = iter(
        [
            some(busy=True),
            some(gflops={"fp32": 90.0, "int8": 500.0}, memory_gb_s=20.0),
            some(memory_gb_s=1.0),
        ]
    )
    monkeypatch.setattr(roofs, "_measure", lambda threads: next(answers))
    assert roofs.ceilings(1).busy
    second = roofs.ceilings(1)
    assert (second.gflops["fp32"], second.gflops["int8"], second.memory_gb_s) == (100, 500, 20)
    assert not second.busy
    assert roofs.ceilings(1) == second  # kept: nothing is measured
    assert roofs.ceilings(1, fresh=True).memory_gb_s == 1.0
    (file,) = tmp_path.rglob("ceilings-*.json")
    file.write_text("{")
    with pytest.raises(StopIteration):  # damaged: measured anew
        roofs.ceilings(1)
    file.write_text(json.dumps({"schema": 0}))
    with pytest.raises(StopIteration):
        roofs.ceilings(1)
    assert replace(second, busy=True).busy


def test_nothing_is_kept_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(roofs, "_measure", lambda threads: some())
    assert roofs.ceilings(1) == some()


@pytest.mark.slow
def test_this_machine_has_roofs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = roofs.ceilings(1)
    assert found.gflops["fp32"] > 0.1
    assert found.gflops["int8"] > 0.1
    assert found.memory_gb_s > 0.01
