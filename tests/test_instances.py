"""Instances in processes of their own: same time, and what happens when one dies or hangs."""

import json
import os
import signal

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from tersor.core.remote import ChildError
from tersor.instances import Apart, together
from tersor.subjects import made_inputs, place
from tersor.sweep import sweep
from tests.command import failing, talk
from tests.runners import linear_onnx


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return place(linear_onnx(tmp_path_factory.mktemp("linear") / "linear.onnx"), threads=1)


def make_of(found):
    return lambda size: made_inputs(found, size, count=2)


def test_two_run_at_the_same_time(found):
    instances = [Apart(found, threads=1) for _ in range(2)]
    bound = [each.bind(made_inputs(found, 4, count=2)) for each in instances]
    one, two = together(instances, bound, seconds=0.1, fewest=5)
    for runs in (one, two):
        assert len(runs.began_ns) >= 5
        assert (runs.service_ms > 0).all()
    # their loops overlap: each begins before the other ends
    assert one.began_ns[0] < two.ended_ns[-1]
    assert two.began_ns[0] < one.ended_ns[-1]
    opened = instances[0].opened(bound[0], np.array([0.0, 0.01]))
    assert opened.due_ns[1] - opened.due_ns[0] == 10_000_000
    for each in instances:
        each.close()


def test_one_that_dies_or_hangs_is_a_row_and_the_rest_goes_on(found):
    """The process of the second batch size is killed; later one is stopped."""
    started = []

    def start(threads: int) -> Apart:
        started.append(Apart(found, threads=threads, patience_s=0.5))
        return started[-1]

    def make(size: int):
        if size == 2:
            os.kill(started[-1].child.process.pid, signal.SIGKILL)
            started[-1].child.process.wait()
        return made_inputs(found, size, count=2)

    result = sweep(start, make, cells=[(1, 1)], batches=(1, 2, 4), seconds=0.05)
    assert [cell.status for cell in result.cells] == ["ran", "failed", "ran"]
    assert "onnxruntime crashed (SIGKILL)" in result.cells[1].reason
    assert len(started) == 2

    hangs = Apart(found, threads=1, patience_s=0.3)
    bound = hangs.bind(made_inputs(found, 1, count=2))
    os.kill(hangs.child.process.pid, signal.SIGSTOP)
    with pytest.raises(ChildError, match=r"onnxruntime did not finish within 0\.4 s"):
        hangs.closed(bound, seconds=0.1)


def test_sweep_on_the_command_line(found, capsys):
    words = ["measure", found.name, "--sweep", "--cells", "1x1", "--batches", "1,4"]
    words += ["--seconds", "0.05", "--latency-limit", "2 s"]
    code, out, _ = talk(capsys, *words)
    assert code == 0
    assert "largest batch within 2000 ms: batch 4" in out
    assert "knee (95% of it): batch" in out
    code, out, _ = talk(capsys, *words, "--json")
    made = json.loads(out)["sweep"]
    assert [cell["batch"] for cell in made["cells"]] == [1, 4]
    for cell in made["cells"]:
        assert cell["samples_per_s"] == pytest.approx(1000 * cell["batch"] / cell["batch_ms"])
    assert made["within_limit"]["batch"] == 4
    code, out, _ = talk(capsys, *words[:-1], "1 ns")
    assert code == 1
    assert "largest batch within 1e-06 ms: none" in out


def test_modes_on_the_command_line(found, capsys):
    words = ["measure", found.name, "--mode", "single", "--mode", "server", "--rate", "50"]
    code, out, _ = talk(capsys, *words, "--seconds", "0.2", "--threads", "1", "--json")
    assert code == 0
    single, server = json.loads(out)["modes"]
    assert (single["mode"], server["mode"]) == ("single", "server")
    assert server["queries"] == 10
    assert server["percentiles"][2]["note"] == "not enough samples (10 of 1,000)"
    code, out, _ = talk(capsys, *words, "--seconds", "0.2", "--threads", "1")
    assert "server: p99: not enough samples (10 of 1,000)" in out
    assert "short: " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "--mode", "single"], "are two measurements; give one of them"),
        (["--seconds", "1"], "say under what load: --sweep, or --mode"),
        (["--mode", "singel"], "is none of single, multi, server, offline. Did you mean 'single'?"),
        (["--mode", "server"], "--mode server needs --rate, or a --latency-limit to search"),
        (["--mode", "single", "--rate", "3"], "are for --mode server and --sweep"),
        (["--mode", "single", "--cells", "1x1"], "--batches and --cells are for --sweep"),
        (["--sweep", "--batches", "1,0"], "--batches '1,0' must be numbers from 1 on"),
        (["--sweep", "--cells", "2"], "--cells '2': '2' is not THREADSxINSTANCES, such as 1x2"),
        (["--sweep", "--latency-limit", "5%"], "--latency-limit: '5%' is not a time"),
        (["--sweep", "--latency-limit", "0 ms"], "--latency-limit '0 ms' must be more than 0"),
    ],
)
def test_bad_words(words, message, found, capsys):
    code, err = failing(capsys, "measure", found.name, *words)
    assert code == 2
    assert message in err
