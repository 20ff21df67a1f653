"""tvm: outputs agree with PyTorch, in any batch; tuning; refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.core.errors import TargetError
from tersor.core.hardware import probe
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.demo.network import trained
from tersor.ops.lower import lower
from tersor.quantization.static import Static, static
from tersor.runtimes._tvm_tuning import same
from tersor.runtimes.tvm import budget, load
from tests import networks
from tests.runtimes.compilers import exported, largest_difference, needs, run

SIZE = 2


@pytest.mark.slow
def test_agrees_with_pytorch_in_any_batch(tmp_path: Path) -> None:
    runtime = needs("tvm")
    net, x = networks.tiny_cnn(), torch.rand(5, 1, 8, 8)
    files = exported(runtime, net, x[:SIZE], tmp_path)
    for count in (SIZE, 5, 1):
        made = run(runtime, "tvm", files[0], {"x": x[:count].numpy()})
        assert largest_difference(net, x[:count], made) < 1e-5


@pytest.mark.slow
def test_rounds_as_memory_does(tmp_path: Path, tiny_context: Any) -> None:
    runtime = needs("tvm")
    net = networks.tiny_cnn()
    quantized = static(net, Static(), tiny_context(net))
    x = torch.rand(5, 1, 8, 8)
    files = exported(runtime, quantized, x[:SIZE], tmp_path)
    made = run(runtime, "tvm", files[0], {"x": x.numpy()})
    assert largest_difference(quantized, x, made) < 0.03  # a rounding may fall the other way


@pytest.mark.slow
def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    runtime = needs("tvm")
    files = exported(runtime, networks.tiny_cnn(), torch.rand(SIZE, 1, 8, 8), tmp_path)
    files[0].write_bytes(b"not a network")
    with pytest.raises(TargetError, match="cannot load model"):
        runtime.load(files[0], Target(runtime="tvm"))


def tuned(net: Any, x: torch.Tensor, folder: Path, seconds: float) -> tuple[list[Path], Any]:
    runtime, inputs = needs("tvm"), Inputs(example={"x": x})
    target = Target(runtime="tvm", options={"threads": 1, "tune": seconds})
    files = list(runtime.write(lower(net, "onnx", inputs), folder, inputs, target))
    return files, json.loads(files[1].read_text(encoding="utf-8"))["tuning"]


@pytest.mark.slow
def test_tuning_ends_in_time_and_keeps_the_outputs(tmp_path: Path) -> None:
    net, x = trained(), torch.rand(1, 1, 8, 8)
    files, about = tuned(net, x, tmp_path, 20)
    made = run(needs("tvm"), "tvm", files[0], {"x": x.numpy()})
    assert largest_difference(net, x, made) < 1e-5
    assert about["spent_seconds"] < 20 + 20  # one candidate, on a busy machine
    assert about["skipped"] == {}
    operators = about["operators"]
    assert about["candidates"] == sum(each["candidates"] for each in operators) > 0
    assert all(each["tuned_ms"] <= each["default_ms"] for each in operators)
    total = {each["name"]: each["count"] * each["default_ms"] for each in operators}
    first = max(operators, key=lambda each: total[each["name"]])
    assert first["candidates"] > 0
    if about["improved"]:
        assert about["outputs_agree"]
        faster = "tuned" if about["tuned_ms"] < about["default_ms"] else "default"
        assert about["kept"] == faster


@pytest.mark.slow
def test_a_budget_too_small_for_anything_keeps_the_default(tmp_path: Path) -> None:
    net, x = networks.tiny_cnn(), torch.rand(1, 1, 8, 8)
    files, about = tuned(net, x, tmp_path, 1e-6)
    assert (about["kept"], about["candidates"], about["improved"]) == ("default", 0, 0)
    made = run(needs("tvm"), "tvm", files[0], {"x": x.numpy()})
    assert largest_difference(net, x, made) < 1e-5


@pytest.mark.parametrize("given", [-1, "60", True, float("inf"), None])
def test_a_budget_that_cannot_be_is_refused(given: Any) -> None:
    with pytest.raises(TargetError, match="tune must be the seconds to search schedules, from 0"):
        budget({"tune": given})


def test_without_a_budget_nothing_is_tuned() -> None:
    assert budget({}) == 0
    assert budget({"tune": 90}) == 90


def test_outputs_may_differ_by_the_order_of_summation_only() -> None:
    terms = np.random.default_rng(0).standard_normal((50, 4000)).astype(np.float32)
    forth, back = np.cumsum(terms, 1)[:, -1], np.cumsum(terms[:, ::-1], 1)[:, -1]
    assert not np.array_equal(forth, back)
    assert same(forth, back)
    wrong = forth.copy()
    wrong[7] += 0.01 * np.abs(forth).max()
    assert not same(wrong, forth)
    forth[3] = np.nan
    assert not same(back, forth)
    assert same(forth, forth)


def test_codes_may_round_the_other_way() -> None:
    codes = np.array([-128, 0, 127], np.int8)
    assert same(codes + np.array([1, -1, 0], np.int8), codes)
    assert not same(codes + np.array([2, 0, 0], np.int8), codes)


def _notes(folder: Path, **changes: Any) -> Path:
    machine = probe()
    about = {
        "architecture": machine.architecture,
        "processor": "znver4",
        "instructions": list(machine.flags),
        "batch": 1,
        "inputs": [{"name": "x", "shape": [1, 4], "dtype": "float32"}],
        "outputs": ["y"],
    }
    (folder / "model.json").write_text(json.dumps({**about, **changes}), encoding="utf-8")
    return folder / "model.so"


def test_a_processor_without_the_instructions_is_refused(tmp_path: Path) -> None:
    file = _notes(tmp_path, instructions=["avx1024", "avx2"])
    with pytest.raises(TargetError, match=r"compiled for znver4 .* this processor lacks avx1024"):
        load(file, Target(runtime="tvm"))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    file = _notes(tmp_path, architecture="riscv128", instructions=[])
    with pytest.raises(TargetError, match="export the network on a machine like the one"):
        load(file, Target(runtime="tvm"))


def test_missing_notes_are_told(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"model.json does not tell what model.so needs"):
        load(tmp_path / "model.so", Target(runtime="tvm"))
