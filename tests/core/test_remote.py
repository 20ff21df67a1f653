"""Runtimes in child processes."""

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import torch

from tersor.core import plugins, remote
from tersor.core.errors import ModelError, TargetError
from tersor.core.model import Inputs
from tersor.core.remote import Child, ChildError
from tersor.core.runtime import Target
from tersor.core.timing import cpu_seconds_of, time_runs
from tersor.core.wire import receive
from tersor.ops.lower import lower
from tests import networks

WAY = Inputs(example={"x": torch.ones(2, 1, 8, 8)}, dynamic={"x": {0: "batch"}})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the network, ONNX Runtime in child processes, and a file that it exported there."""
    net = networks.tiny_cnn().eval()
    apart = plugins.apart("onnxruntime")
    folder = tmp_path_factory.mktemp("apart")
    files = apart.export(lower(net, "onnx", WAY), folder, WAY)
    return net, apart, files[0]


def test_it_answers_as_in_memory(exported):
    net, apart, file = exported
    runner = apart.load(file, Target(runtime="onnxruntime", options={"threads": 1}))
    x = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    call = runner.bind({"x": x})
    (made,) = call().values()
    with torch.no_grad():
        assert np.allclose(made, net(torch.from_numpy(x)).numpy(), atol=1e-5)
    assert 0 < time_runs([call], 0, 5).min() < 1000
    assert 0 < cpu_seconds_of([call], 0, 5) < 1  # the child's, not this process's
    runner.close()


@pytest.mark.parametrize("name", ["torch_export", "torch_eager"])
def test_modules_and_programs_are_handed_over(name, tmp_path):
    net = networks.tiny_cnn().eval()
    apart = plugins.apart(name)
    files = apart.export(lower(net, apart.takes, WAY), tmp_path, WAY)
    runner = apart.load(files[0], Target(runtime=name, options={"threads": 1}))
    (made,) = runner.bind({"x": np.ones((3, 1, 8, 8), np.float32)})().values()
    with torch.no_grad():
        assert np.allclose(made, net(torch.ones(3, 1, 8, 8)).numpy(), atol=1e-5)
    runner.close()


def test_profile_fusions_and_inputs_come_through(exported):
    _, apart, file = exported
    target = Target(runtime="onnxruntime", options={"threads": 1})
    batch = {"x": np.ones((2, 1, 8, 8), np.float32)}
    assert any("Conv" in each.kind for each in apart.profile(file, target, [batch, batch]))
    assert any(each.covers for each in apart.fused(file, target))
    assert apart.inputs(file)["x"].shape[1:] == (1, 8, 8)


def test_its_errors_are_ours(exported, tmp_path):
    _, apart, _ = exported
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"ONNX Runtime cannot load bad\.onnx"):
        apart.load(bad, Target(runtime="onnxruntime"))
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load bad\.onnx"):
        apart.inputs(bad)


def test_a_crash_is_an_error_and_names_the_signal(exported):
    _, apart, file = exported
    runner = apart.load(file, Target(runtime="onnxruntime"))
    call = runner.bind({"x": np.ones((2, 1, 8, 8), np.float32)})
    os.kill(runner.child.process.pid, signal.SIGSEGV)
    with pytest.raises(ChildError, match=r"onnxruntime crashed \(SIGSEGV\)"):
        call()
    runner.close()


def test_what_takes_too_long_is_stopped():
    child = Child("onnxruntime", sys.executable)
    os.kill(child.process.pid, signal.SIGSTOP)
    began = time.perf_counter()
    with pytest.raises(ChildError, match=r"onnxruntime did not finish within 0\.2 s"):
        child.ask("inputs", seconds=0.2, file="x")
    assert time.perf_counter() - began < 5
    assert child.process.poll() is not None


def test_calls_that_are_forgotten_are_freed_there(exported):
    _, apart, file = exported
    runner = apart.load(file, Target(runtime="onnxruntime"))
    x = {"x": np.ones((2, 1, 8, 8), np.float32)}
    first, second = runner.bind(x), runner.bind(x)
    del first
    gc.collect()
    assert runner.child.dropped == [1]
    second()
    assert runner.child.dropped == []
    with pytest.raises(TargetError, match="KeyError: 1"):
        runner.child.ask("run", call=1)
    runner.close()


def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('run')\n")
    monkeypatch.chdir(tmp_path)
    child = Child("onnxruntime", sys.executable)
    with pytest.raises(ModelError, match=r"cannot load x\.onnx"):
        child.ask("inputs", file="x.onnx")
    child.close()


def test_it_outlives_the_thread_that_started_it(exported):
    _, apart, file = exported
    loaded = []

    def load():
        loaded.append(apart.load(file, Target(runtime="onnxruntime", options={"threads": 1})))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    (made,) = loaded[0].bind({"x": np.ones((2, 1, 8, 8), np.float32)})().values()
    assert made.shape == (2, 10)
    loaded[0].close()


def test_it_ends_with_the_process_that_started_it():
    # another process holds its pipe open, so that the end of that is not what ends it
    code = (
        "import os, subprocess, sys; from tersor.core.remote import Child; "
        "child = Child('onnxruntime', sys.executable); fd = child.process.stdin.fileno(); "
        "holds = subprocess.Popen(['sleep', '60'], pass_fds=(fd,), stdout=subprocess.DEVNULL); "
        "print(child.process.pid, holds.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child, holds = map(int, done.stdout.split())
    try:
        until = time.monotonic() + 20
        while _lives(child) and time.monotonic() < until:
            time.sleep(0.05)
        assert not _lives(child)
    finally:
        os.kill(holds, signal.SIGKILL)


def _lives(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_what_is_no_answer_ends_it(monkeypatch):
    monkeypatch.setattr(remote, "_LAST_S", 0.2)
    child = Child("onnxruntime", sys.executable)
    monkeypatch.setattr(remote, "receive", lambda stream: receive(io.BytesIO(b"\xff" * 8)))
    with pytest.raises(ChildError, match=r"onnxruntime crashed \(SIGKILL\)"):
        child.ask("inputs", file="x")
    child.close()
    with pytest.raises(ChildError, match="onnxruntime was ended before"):
        child.ask("inputs", file="x")


def test_an_interrupted_question_ends_it(monkeypatch):
    def interrupted(stream):
        raise KeyboardInterrupt

    child = Child("onnxruntime", sys.executable)
    monkeypatch.setattr(remote, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.ask("inputs", file="x")
    assert child.process.poll() is not None


def test_arrays_that_cannot_be_sent_leave_it_as_it_was():
    child = Child("onnxruntime", sys.executable)
    with pytest.raises(TargetError, match="array 'x' is of object"):
        child.ask("bind", {"x": np.array([None])})
    with pytest.raises(ModelError, match=r"cannot load x\.onnx"):
        child.ask("inputs", file="x.onnx")
    child.close()
