"""TorchScript: the trace computes what the network computes, or is refused."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.quantization.static import Static, static
from tersor.runtimes import torchscript
from tests import networks

TARGET = Target(runtime="torchscript", options={"threads": 1})
INPUTS = Inputs(example={"x": networks.split(0, 64)[0]["x"][:2]}, dynamic={"x": {0: "batch"}})


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if len(x) == 2 else x * 3


class Two(nn.Module):
    """Two inputs, one of them whole numbers, and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, words: Tensor, scale: Tensor) -> dict[str, Tensor]:
        made = self.table(words) * scale[:, None, None]
        return {"all": made, "mean": made.mean(1)}


def run(
    net: nn.Module, inputs: Inputs, folder: Path, **arrays: np.ndarray
) -> dict[str, np.ndarray]:
    files = torchscript.export(net.eval(), folder, inputs)
    return dict(torchscript.load(files[0], TARGET).bind(arrays)())


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_outputs_are_those_of_the_network(kind: str, tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    context = networks.context(net, tmp_path / "work")
    if kind == "int8":
        net = static(net, Static(), context)
    x = networks.split(0, 64)[0]["x"][:5]
    made = run(net, INPUTS, tmp_path, x=x.numpy())["output"]
    with torch.no_grad():
        np.testing.assert_allclose(made, net(x=x).numpy(), rtol=1e-4, atol=1e-5)


def test_inputs_go_by_name_and_outputs_keep_theirs(tmp_path: Path) -> None:
    net = Two()
    words, scale = torch.randint(0, 9, (2, 3)), torch.tensor([1.0, 2.0])
    inputs = Inputs(
        example={"words": words, "scale": scale},
        dynamic={"words": {0: "batch"}, "scale": {0: "batch"}},
    )
    more = {"scale": np.float32([3, 1, 2]), "words": np.arange(9).reshape(3, 3)}
    made = run(net, inputs, tmp_path, **more)
    wanted = net(**{name: torch.from_numpy(array) for name, array in more.items()})
    assert list(made) == ["all", "mean"]
    for name, array in made.items():
        np.testing.assert_allclose(array, wanted[name].detach().numpy(), rtol=1e-6)


def test_a_frozen_branch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="the trace differs from the network on a batch of 3"):
        torchscript.export(Branches(), tmp_path, INPUTS)


def test_deprecation_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torchscript._say_deprecated.cache_clear()
    with caplog.at_level(logging.WARNING, logger="tersor"):
        for _ in range(2):
            torchscript.export(nn.Identity(), tmp_path, Inputs(example={"input": torch.ones(2, 1)}))
    assert [r.message for r in caplog.records] == [
        "PyTorch has deprecated TorchScript; prefer torch_export, or torch_compile for speed"
    ]


def test_files_that_are_no_trace_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"not an archive")
    with pytest.raises(TargetError, match=r"model.pt has no readable model.json beside it"):
        torchscript.load(file, TARGET)
    file.with_suffix(".json").write_text(json.dumps({"inputs": ["x"]}))
    with pytest.raises(TargetError, match=r"TorchScript cannot load model\.pt"):
        torchscript.load(file, TARGET)


def test_bare_files_are_not_run() -> None:
    assert torchscript.RUNTIME.suffixes == ()
    assert torchscript.RUNTIME.inputs is None


class Undefined(nn.Module):
    """Gives NaN for batches that it was not traced on."""

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) > 2 else x * float("nan")


def test_a_trace_of_nan_is_not_taken_for_equal(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="the trace differs from the network on a batch of 3"):
        torchscript.export(Undefined(), tmp_path, INPUTS)
