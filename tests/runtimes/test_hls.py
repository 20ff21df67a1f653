"""HLS projects: options, refusals, and the emulation against ONNX Runtime."""

import copy
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.context import Data
from tersor.core.errors import TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Arrays, Target
from tersor.ops.fake_quantize import settle
from tersor.ops.lower import lower
from tersor.quantization.static import Static, static
from tersor.runtimes import hls
from tests import networks

FIXED = Static(symmetric=True, power_of_two=True)


def needs_hls() -> None:
    try:
        runtime = plugins.runtime("hls")
        plugins.require("runtimes", "hls", (*runtime.to_export, *runtime.to_run))
    except ImportError as missing:
        pytest.skip(str(missing))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """Strides, padding, a residual addition, a pointwise convolution, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.shortcut, self.conv3 = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))
        y = torch.relu(self.conv3(y) + y)
        return self.fc(self.pool(y).flatten(1))


class Picture(nn.Module):
    """Gives out an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def quantized(net: nn.Module, x: Tensor, folder: Path, config: Static = FIXED) -> Any:
    inputs = Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}})
    context = networks.context(net, folder, inputs=inputs, data=Data(calibration=[{"x": x}]))
    made = settle(static(copy.deepcopy(net.eval()), config, context))
    return lower(made, "onnx", inputs), inputs


def run(name: str, net: Any, inputs: Inputs, folder: Path, x: Tensor, **options: Any) -> np.ndarray:
    runtime = plugins.runtime(name)
    folder.mkdir()
    target = Target(runtime=name, options={"threads": 1, **options})
    runner = runtime.open(runtime.write(net, folder, inputs, target)[0], target)
    try:
        batch: Arrays = {"x": x.numpy()}
        (made,) = runner.bind(batch)().values()
        (one,) = runner.bind({"x": x[:1].numpy()})().values()
    finally:
        runner.close()
    np.testing.assert_array_equal(one, made[:1])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("make", [Perceptron, Residual, Picture])
def test_agrees_with_onnxruntime_to_the_last_bit(make: Any, tmp_path: Path) -> None:
    needs_hls()
    net = make()
    shape = (1, 8, 8) if make is Perceptron else (2, 8, 8)
    x = torch.randn(64, *shape)
    made, inputs = quantized(net, x, tmp_path)
    # beyond the calibrated range, and halfway between two codes
    hard = torch.cat([x, x * 3, (x * 64).round() / 128])
    wanted = run("onnxruntime", made, inputs, tmp_path / "a", hard)
    np.testing.assert_array_equal(run("hls", made, inputs, tmp_path / "b", hard), wanted)


@pytest.mark.slow
def test_shares_multipliers_without_changing_results(tmp_path: Path) -> None:
    needs_hls()
    x = torch.randn(32, 2, 8, 8)
    made, inputs = quantized(Residual(), x, tmp_path)
    wanted = run("onnxruntime", made, inputs, tmp_path / "a", x)
    found = run("hls", made, inputs, tmp_path / "b", x, reuse_factor=3, clock_ns=10)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_float_layers_are_as_exact_as_their_bits(tmp_path: Path) -> None:
    """A product of two numbers of 8 bits behind the point is cut at 2**-8, 64 times over."""
    needs_hls()
    net, x = Perceptron().eval(), torch.randn(16, 1, 8, 8)
    inputs = Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}})
    made = lower(net, "onnx", inputs)
    wanted = net(x).detach().numpy()
    fine = run("hls", made, inputs, tmp_path / "a", x, bits=[32, 8])
    coarse = run("hls", made, inputs, tmp_path / "b", x, bits=[16, 8])
    assert np.abs(fine - wanted).max() < 1e-4
    assert 1e-3 < np.abs(coarse - wanted).max() < 64 * 2**-7


@pytest.mark.slow
def test_project_is_the_same_each_time_and_tells_no_paths(tmp_path: Path) -> None:
    needs_hls()
    x = torch.randn(16, 1, 8, 8)
    made, inputs = quantized(Perceptron(), x, tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plugins.runtime("hls").export(made, tmp_path / name, inputs)
    first, second = (tmp_path / name / "project.zip" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as packed:
        assert {"build_prj.tcl", "project.tcl", "firmware/network.cpp"} <= set(packed.namelist())
        assert b"clock_period 5" in packed.read("project.tcl")
        assert not [n for n in packed.namelist() if b"/tmp" in packed.read(n)]


@pytest.mark.slow
def test_emulates_only_the_project_beside_it(tmp_path: Path) -> None:
    needs_hls()
    x = torch.randn(16, 1, 8, 8)
    made, inputs = quantized(Perceptron(), x, tmp_path)
    runtime = plugins.runtime("hls")
    file, archive = runtime.export(made, tmp_path, inputs)
    other = Target(runtime="hls", options={"reuse_factor": 2})
    message = (
        r"^project\.zip was written for \{.*'reuse_factor': 1.*\}, not for \{.*; export it again"
    )
    with pytest.raises(TargetError, match=message):
        runtime.open(file, other)
    archive.write_bytes(b"nothing")
    with pytest.raises(TargetError, match=r"^project\.zip is damaged: BadZipFile: "):
        runtime.open(file, Target(runtime="hls"))


@pytest.mark.slow
def test_damaged_file_is_named(tmp_path: Path) -> None:
    needs_hls()
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x08\x0a\x12 nothing")
    with pytest.raises(TargetError, match=r"^model\.onnx is no ONNX file: "):
        plugins.runtime("hls").open(file, Target(runtime="hls"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "x; exec rm"}, r"^part must be an FPGA's name, .*; got 'x; exec rm'$"),
        ({"clock_ns": 0}, r"^clock_ns must be the clock's period, 0\.1 to 1000; got 0$"),
        ({"clock_ns": True}, r"^clock_ns .* got True$"),
        ({"reuse_factor": 1.5}, r"^reuse_factor must be a whole number from 1; got 1\.5$"),
        ({"bits": [8, 9]}, r"^bits must be \[TOTAL, INTEGER\] with .*; got \[8, 9\]$"),
        ({"bits": "24,8"}, r"^bits .*; got '24,8'$"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        hls.settings(options)


def test_options_are_read() -> None:
    assert hls.settings({}) == hls.Settings()
    given = {"part": "xc7z020clg400-1", "clock_ns": 4, "reuse_factor": 8, "bits": [16, 6]}
    assert hls.settings(given) == replace(
        hls.Settings(), part="xc7z020clg400-1", clock_ns=4, reuse_factor=8, bits=(16, 6)
    )


def test_more_threads_than_it_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="the emulation runs on one thread, not on 2"):
        hls.load(tmp_path / "model.onnx", Target(runtime="hls", options={"threads": 2}))
