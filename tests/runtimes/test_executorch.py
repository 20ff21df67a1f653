"""ExecuTorch: what XNNPACK gets, outputs over batches of any size, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import environments, plugins
from tersor.core.errors import ModelError, TargetError
from tersor.core.model import Inputs
from tersor.core.pieces import narrowed
from tersor.core.runtime import Signature, Target
from tersor.ops.lower import lower
from tersor.quantization.dynamic import Dynamic, dynamic
from tersor.quantization.static import Static, static
from tersor.runtimes import executorch as described
from tersor.subjects import what_it_takes
from tests import networks

TARGET = Target(runtime="executorch", options={"threads": 1})


@pytest.fixture(scope="module")
def executorch() -> Any:
    """The runtime, wherever its packages are."""
    found = plugins.runtime("executorch")
    missing = [p for p in (*found.to_export, *found.to_run) if not plugins.installed(p)]
    if missing:
        pytest.skip(f"needs {missing[0]} or the environment 'executorch'")
    return found


def of_one(batch: dict[str, Tensor]) -> Inputs:
    free = {name: {0: "batch"} for name in batch}
    return Inputs(example=narrowed(batch, 1, free))


@pytest.fixture(scope="module")
def int8(executorch: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A network of integers as a file, and its outputs in memory on the first digits."""
    folder = tmp_path_factory.mktemp("executorch")
    net, x = networks.tiny_cnn(), networks.split(0, 64)[0]["x"]
    made = static(net, Static(), networks.context(net, folder / "work")).eval()
    inputs = of_one({"x": x})
    files = executorch.export(lower(made, "exported", inputs), folder, inputs)
    assert [file.name for file in files] == ["model.pte", "operators.json"]
    with torch.no_grad():
        return files[0], made(x=x).numpy()


@pytest.mark.slow
def test_integer_networks_run_in_xnnpack(int8: tuple[Path, np.ndarray]) -> None:
    about = json.loads(int8[0].with_name("operators.json").read_text())
    assert about["portable"] == {}
    assert about["float_weights"] == ["fc"]  # nothing rounds the network's outputs
    assert about["delegated"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 7])
def test_batches_of_any_size_give_the_outputs_of_memory(
    executorch: Any, int8: tuple[Path, np.ndarray], samples: int
) -> None:
    file, wanted = int8
    runner = executorch.open(file, TARGET)
    found = runner.bind({"x": networks.split(0, 64)[0]["x"][:samples].numpy()})()["output"]
    runner.close()
    near = np.abs(found - wanted[:samples]).max()
    assert near < 0.05 * np.abs(wanted).max()  # where a rounding falls the other way


@pytest.mark.slow
def test_a_bare_file_tells_its_inputs(executorch: Any, int8: tuple[Path, np.ndarray]) -> None:
    assert executorch.inputs(int8[0]) == {
        "x": Signature(shape=("batch", 1, 8, 8), dtype="float32", usual=(1, 1, 8, 8))
    }


class Named(nn.Module):
    """Two inputs, one of whole numbers, and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, words: Tensor, scale: Tensor) -> dict[str, Tensor]:
        made = self.table(words) * scale[:, None, None]
        return {"all": made, "mean": made.mean(1)}


@pytest.mark.slow
def test_inputs_go_by_name_and_outputs_keep_theirs(executorch: Any, tmp_path: Path) -> None:
    net = Named().eval()
    inputs = of_one({"words": torch.randint(0, 9, (2, 3)), "scale": torch.ones(2)})
    files = executorch.export(lower(net, "exported", inputs), tmp_path, inputs)
    assert any("embedding" in name for name in json.loads(files[1].read_text())["portable"])
    arrays = {"scale": np.float32([3, 1, 2]), "words": np.arange(9).reshape(3, 3)}
    runner = executorch.open(files[0], TARGET)
    made = runner.bind(arrays)()
    runner.close()
    wanted = net(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    assert list(made) == ["all", "mean"]
    for name, array in made.items():
        np.testing.assert_allclose(array, wanted[name].detach().numpy(), rtol=1e-5)


@pytest.mark.slow
def test_operators_without_a_kernel_are_named(executorch: Any, tmp_path: Path) -> None:
    net = networks.tiny_transformer()
    made = dynamic(net, Dynamic(), networks.context(net, tmp_path / "work")).eval()
    inputs = of_one({"x": networks.split(0, 64)[0]["x"]})
    with pytest.raises(TargetError, match=r"ExecuTorch has no kernel for tersor\.\w+"):
        executorch.export(lower(made, "exported", inputs), tmp_path, inputs)


@pytest.mark.slow
def test_damaged_files_are_errors(
    executorch: Any, int8: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    data = int8[0].read_bytes()
    file = tmp_path / "model.pte"
    for broken in (data[: len(data) // 2], data[:8] + b"\xff" * 400 + data[408:]):
        file.write_bytes(broken)
        with pytest.raises(TargetError, match=r"ExecuTorch cannot load model\.pte|crashed"):
            executorch.open(file, TARGET)


@pytest.mark.slow
def test_a_wrong_shape_is_said(executorch: Any, int8: tuple[Path, np.ndarray]) -> None:
    runner = executorch.open(int8[0], TARGET)
    with pytest.raises(TargetError, match=r"input 'x' must have shape \(1, 1, 8, 8\), got"):
        runner.bind({"x": np.zeros((1, 1, 9, 9), dtype=np.float32)})
    runner.close()


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"PK\3\4 a zip archive"])
def test_other_files_are_not_tried(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.pte"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.pte is not a program of ExecuTorch"):
        what_it_takes(file, lambda: described.inputs(file))
    for read in (described.inputs, lambda path: described.load(path, TARGET)):
        with pytest.raises(
            TargetError, match=r"model\.pte is not a program of ExecuTorch \(\.pte\)"
        ):
            read(file)


def test_its_environment_is_complete() -> None:
    pinned = {line.partition("==")[0].lower() for line in environments.pins("executorch")}
    needed = {"executorch", "torch", "torchao", "numpy", "pyyaml", "safetensors", "jaxtyping"}
    assert needed <= pinned
    assert described.RUNTIME.fixed_batch
