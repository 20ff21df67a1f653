"""PyTorch's own options: what they change, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.errors import DependencyError, RecipeError, TargetError
from tersor.core.model import Inputs
from tersor.core.recipe import check_target
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.ops.torch_runner import SWITCHES, TorchRunner
from tests import networks

NAMES = ("torch_eager", "torch_export", "torchscript")
EXAMPLE = Inputs(example={"x": networks.split(0, 64)[0]["x"][:2]}, dynamic={"x": {0: "batch"}})


class Layout(nn.Module):
    """Tells whether its input has its channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([x.is_contiguous(memory_format=torch.channels_last)])


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(y.shape[0], -1)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_those_of_the_runner(name: str) -> None:
    assert plugins.runtime(name).options == ("threads", "precision", *SWITCHES)


@pytest.mark.parametrize("name", ["torch_eager", "torch_export"])
def test_channels_last_changes_no_output(name: str, tmp_path: Path) -> None:
    net, runtime = networks.tiny_cnn(), plugins.runtime(name)
    file = runtime.export(lower(net, runtime.takes, EXAMPLE), tmp_path, EXAMPLE)[0]
    x = networks.split(0, 64)[0]["x"][:7].numpy()
    made = [
        runtime.load(file, Target(runtime=name, options=options)).bind({"x": x})()["output"]
        for options in ({"threads": 1}, {"threads": 1, "channels_last": True})
    ]
    np.testing.assert_allclose(made[1], made[0], rtol=1e-4, atol=1e-5)  # another order of sums


@pytest.mark.parametrize("wanted", [False, True])
def test_channels_last_lays_out_inputs_and_weights(wanted: bool) -> None:
    target = Target(runtime="torch_eager", options={"channels_last": wanted})
    x = np.zeros((2, 3, 4, 5), dtype=np.float32)
    assert TorchRunner(Layout(), ["x"], target).bind({"x": x})()["output"] == wanted
    conv = nn.Conv2d(3, 4, 3)
    TorchRunner(conv, ["input"], target)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_channels_last_names_a_view_that_does_not_allow_it() -> None:
    runner = TorchRunner(
        Views(), ["x"], Target(runtime="torch_eager", options={"channels_last": True})
    )
    with pytest.raises(TargetError, match=r"reshapes with view\(\).*leave out the option"):
        runner.bind({"x": np.zeros((2, 3, 8, 8), dtype=np.float32)})()


@pytest.mark.parametrize("option", ["cudnn_autotune", "cuda_graphs", "stream"])
def test_cuda_options_are_refused_elsewhere(option: str) -> None:
    target = Target(runtime="torch_eager", options={option: True})
    with pytest.raises(
        TargetError,
        match=f"option {option} needs a CUDA device, this target is torch_eager:cpu; use "
        "torch_eager:cuda or leave it out",
    ):
        TorchRunner(nn.Identity(), ["input"], target)
    off = Target(runtime="torch_eager", options={option: False})
    assert TorchRunner(nn.Identity(), ["input"], off).switches == frozenset()


@pytest.mark.parametrize("option", SWITCHES)
def test_switches_are_true_or_false(option: str) -> None:
    target = Target(runtime="torch_eager", device="cuda", options={option: "yes"})
    with pytest.raises(TargetError, match=f"option {option} must be true or false, got 'yes'"):
        TorchRunner(nn.Identity(), ["input"], target)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("option", SWITCHES)
def test_no_cuda_device_is_said(option: str) -> None:
    target = Target(runtime="torch_eager", device="cuda", options={option: True})
    with pytest.raises(DependencyError, match="this PyTorch finds no CUDA device; use :cpu"):
        TorchRunner(nn.Identity(), ["input"], target)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("option", SWITCHES)
def test_on_cuda_no_option_changes_outputs(option: str) -> None:
    net, x = networks.tiny_cnn(), networks.split(0, 64)[0]["x"][:7].numpy()
    made: list[Any] = []
    for options in ({}, {option: True}):
        target = Target(runtime="torch_eager", device="cuda", options=options)
        call = TorchRunner(net, ["x"], target).bind({"x": x})
        made += [call()["output"], call()["output"]]
    for other in made[1:]:
        np.testing.assert_allclose(other, made[0], rtol=1e-2, atol=1e-3)  # TF32 convolutions


def test_misspelt_options_are_named() -> None:
    target = Target(runtime="torch_export", options={"chanels_last": True})
    with pytest.raises(
        RecipeError, match=r"no option 'chanels_last'. Did you mean 'channels_last'"
    ):
        check_target(target)
