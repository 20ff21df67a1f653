"""Faults 3, 16, 17, 27 of files that nobody vouches for, as `tersor measure FILE` meets them.

They are read, loaded and run by a child process first: what hangs, fills the memory or crashes does
so there.
"""

import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tersor import benchmark, subjects
from tersor.core.errors import ModelError, TersorError
from tersor.core.remote import Child
from tests.faults.test_model_files import loop, node
from tests.sources.onnx_models import array, model, network, save


def test_17_a_loop_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "TRIAL_S", 3.0)
    body = [node("Identity", ["go"], ["go2"]), node("Relu", ["state"], ["next"])]
    file = save(loop(body, 2**62), tmp_path / "m.onnx")
    began = time.perf_counter()
    with pytest.raises(
        ModelError, match=r"m\.onnx: onnxruntime did not finish within 3 s on a first"
    ):
        benchmark.measure(file, ["size"])
    assert time.perf_counter() - began < 60


def test_16_what_needs_more_memory_than_there_is(tmp_path):
    shape = array("shape", [2**20, 2**20], np.int64)
    nodes = [
        node("ConstantOfShape", ["shape"], ["big"], "bomb"),
        node("ReduceMax", ["big"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ]
    file = save(model(nodes, stored=[shape]), tmp_path / "m.onnx")
    with pytest.raises(TersorError, match=r"m\.onnx|onnxruntime|ONNX Runtime") as caught:
        benchmark.measure(file, ["size"])
    assert "Traceback" not in str(caught.value)


def test_3_mutated_files_never_take_the_parent_with_them(tmp_path):
    good = network().SerializeToString()
    rng = np.random.default_rng(0)
    ran = refused = 0
    for i in range(4):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 8):
            data[at] ^= int(rng.integers(1, 256))
        file = tmp_path / f"{i}.onnx"
        file.write_bytes(bytes(data))
        try:
            benchmark.measure(file, ["size"])
            ran += 1
        except TersorError:
            refused += 1
    assert ran + refused == 4


def test_a_child_has_a_budget_of_memory(tmp_path):
    nodes = [
        node("ConstantOfShape", ["shape"], ["big"], "large"),
        node("ReduceMax", ["big"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ]
    size = array("shape", [2**8, 2**20], np.int64)  # 1 GiB
    file = save(model(nodes, stored=[size]), tmp_path / "m.onnx")
    child = Child("onnxruntime", sys.executable, memory_bytes=1 << 29)
    about = {"file": str(file), "target": {"runtime": "onnxruntime"}}
    said = [_asked(child, "load", **about)]
    said.append(_asked(child, "bind", {"x": np.ones((1, 3), np.float32)}))
    said.append(_asked(child, "run", call=1))
    assert any("memory" in text.lower() or "alloc" in text.lower() for text in said), said
    child.close()


def _asked(child, what, arrays=None, **fields):
    """Return the message of what went wrong, or nothing."""
    try:
        child.ask(what, arrays, **fields)
    except TersorError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.onnx", b"\x08\x08" + b"\xff" * 64),
        ("m.onnx", b""),
        ("m.xml", b"<?xml version='1.0'?><net/>"),
    ],
)
def test_27_the_command_line_says_it_in_a_line(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "tersor", "measure", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert name in done.stderr
    assert done.stderr.count("\n") <= 3
    assert "Traceback" not in done.stderr
