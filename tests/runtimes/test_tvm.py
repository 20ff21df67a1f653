"""tvm: outputs agree with PyTorch, in any batch; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.core.errors import TargetError
from tersor.core.hardware import probe
from tersor.core.runtime import Target
from tersor.quantization.static import Static, static
from tersor.runtimes.tvm import load
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
