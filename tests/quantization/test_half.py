"""Half precision: noted on the network, computed by the runtime, refused where it cannot be."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core import plugins
from tersor.core.errors import ModelError, RecipeError, StepError, TargetError, UnfitError
from tersor.core.layers import Layers
from tersor.core.runtime import Target
from tersor.ops import edits
from tersor.ops.float8 import DTYPES, float8
from tersor.ops.lower import lower
from tersor.ops.notes import notes_of
from tersor.quantization.half import Half, check_weights, half
from tests import networks


def test_format_is_noted(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net, target=Target(runtime="openvino"))
    made = half(net, Half(format="fp16"), context)
    assert notes_of(made)["precision"] == "fp16"
    assert context.facts == {"format": "fp16"}


def test_runtime_without_it_is_refused(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net, target=Target(runtime="onnxruntime"))
    with pytest.raises(
        TargetError,
        match=r"onnxruntime:cpu has no kernels that compute in bf16; use one of the targets onnxruntime:cuda, onnxruntime:tensorrt, openvino:cpu, .*, or the step static",
    ):
        half(net, Half(), context)


@pytest.mark.parametrize("runtime", ["torch_eager", "openvino"])
def test_outputs_are_near_and_not_equal(runtime: str, tiny_context: Any, tmp_path: Path) -> None:
    found = plugins.runtime(runtime)
    for package in found.to_run:
        pytest.importorskip(package)
    target = Target(runtime=runtime, options={"threads": 1})
    net = half(networks.tiny_cnn(), Half(), tiny_context(networks.tiny_cnn(), target=target))
    files = found.export(lower(net, found.takes, networks.inputs()), tmp_path, networks.inputs())
    try:
        runner = found.load(
            files[0], Target(runtime=runtime, options={"threads": 1, "precision": "bf16"})
        )
    except TargetError as error:
        pytest.skip(str(error))
    x = networks.digits()[0][:64]
    with torch.no_grad():
        wanted = net(x).numpy()
    moved = np.abs(next(iter(runner.bind({"x": x.numpy()})().values())) - wanted).max()
    assert 0 < moved < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_keeps_the_nearest_number_of_the_format(format: str, tiny_context: Any) -> None:
    """Against a search through all numbers of the format, in float64."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, bias=False)
    layer.weight.data[1] = 0
    made = float8(layer, format)
    every = torch.arange(256, dtype=torch.uint8).view(DTYPES[format]).double()
    numbers = every[every.isfinite()]
    for channel in (0, 2):
        weight_I = layer.weight.detach()[channel].flatten().double()
        scale = float(made.scale[channel])
        assert scale == pytest.approx(float(weight_I.abs().max()) / float(numbers.max()))
        error_I = (made.values()[channel].flatten().double() - weight_I).abs()
        best_I = (numbers[:, None] * scale - weight_I).abs().amin(0)
        torch.testing.assert_close(error_I, best_I, rtol=0, atol=1e-6)
    assert not made.values()[1].any()
    assert made.scale[1] == 1


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch_eager", "torch_export"])
def test_fp8_is_small_and_computes_the_same_on_the_runtime(
    runtime: str, tiny_context: Any, tmp_path: Path
) -> None:
    found = plugins.runtime(runtime)
    for package in found.to_run:
        pytest.importorskip(package)
    target = Target(runtime=runtime, options={"threads": 1})
    net = networks.tiny_cnn(width=32)
    context = tiny_context(net, target=target)
    made = half(copy.deepcopy(net), Half(format="fp8_e4m3"), context)
    assert context.facts["layers"] == 9
    sizes = []
    for i, one in enumerate((net, made)):
        folder = tmp_path / str(i)
        folder.mkdir()
        lowered = lower(one, found.takes, networks.inputs())
        files = found.export(lowered, folder, networks.inputs())
        sizes.append(sum(file.stat().st_size for file in files))
    assert sizes[1] < 0.45 * sizes[0]
    runner = found.load(files[0], target)
    x = networks.digits()[0][:64]
    with torch.no_grad():
        wanted, floats = made(x), net(x)
    got = torch.from_numpy(next(iter(runner.bind({"x": x.numpy()})().values())))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert 0 < float((wanted - floats).abs().max()) < 0.1 * float(floats.abs().max())


def test_fp8_is_stored_and_replayed(tiny_context: Any, tmp_path: Path) -> None:
    net = networks.tiny_transformer()
    made = half(copy.deepcopy(net), Half(format="fp8_e5m2"), tiny_context(net))
    edits.store(made, net, tmp_path)
    again = edits.replay(tmp_path, copy.deepcopy(net))
    x = networks.digits()[0][:8]
    with torch.no_grad():
        assert torch.equal(made(x), again(x))


def test_fp16_weights_are_those_of_the_format(tiny_context: Any, tmp_path: Path) -> None:
    """Where the runtime reads them and does not compute in fp16 itself; stored and replayed, too."""
    net = networks.tiny_cnn()
    context = tiny_context(net, target=Target(runtime="litert"))
    made = half(copy.deepcopy(net), Half(format="fp16"), context)
    assert context.facts["layers"] == 9
    weights = [m for m in made.modules() if getattr(m, "format", "") == "fp16"]
    assert {m.weight.dtype for m in weights} == {torch.float16}
    edits.store(made, net, tmp_path)
    x = networks.digits()[0][:8]
    with torch.no_grad():
        assert torch.equal(made(x), edits.replay(tmp_path, copy.deepcopy(net))(x))
        torch.testing.assert_close(made(x), net(x), rtol=0, atol=0.02)


def test_fp16_weights_out_of_range_are_refused(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    net.fc.weight.data[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"layer 'fc' .*in fp16: weights reach 1e\+06, fp16 65504"):
        half(net, Half(format="fp16"), tiny_context(net, target=Target(runtime="litert")))


def test_fp8_says_what_it_cannot(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    broken = copy.deepcopy(net)
    broken.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="layer 'fc' cannot be kept in fp8: weights are NaN or"):
        half(broken, Half(format="fp8_e4m3"), context)
    with pytest.raises(UnfitError, match="no layer of this network can keep its weights in fp8"):
        half(_Twice(), Half(format="fp8_e4m3"), context)


def test_fp8_is_refused_for_a_runtime_that_does_not_read_it() -> None:
    runtimes = {name: plugins.runtime(name) for name in plugins.names("runtimes")}
    old = dataclasses.replace(runtimes["openvino"], weights=("fp8_e5m2",))
    with pytest.raises(
        TargetError,
        match=r"openvino:cpu does not read weights in fp8_e4m3; use .*onnxruntime.*, or the step",
    ):
        check_weights("fp8_e4m3", Target(runtime="openvino"), {**runtimes, "openvino": old})
    check_weights("fp8_e5m2", Target(runtime="openvino"), {**runtimes, "openvino": old})


def test_fp8_leaves_layers_that_are_excluded(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = half(net, Half(format="fp8_e4m3", layers=Layers(patterns=("!fc",))), context)
    assert isinstance(made.get_submodule("fc"), nn.Linear)
    assert context.facts["layers"] == 8
    assert context.facts["left_in_float"] == {"fc": "excluded by layers"}
    with pytest.raises(RecipeError, match=r"pattern '!fcc' matches no layer. Did you mean 'fc'"):
        half(net, Half(format="fp8_e4m3", layers=Layers(patterns=("!fcc",))), context)
    with pytest.raises(StepError, match="layers excludes everything that has weights: conv1, "):
        half(net, Half(format="fp8_e4m3", layers=Layers(patterns=("!*",))), context)


def test_recurrent_layers_that_stay_are_told(tiny_context: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.GRU(8, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.fc(self.rnn(x.flatten(1, 2))[0].mean(1))
            return made

    context = tiny_context(net := Net())
    half(net, Half(format="fp8_e4m3"), context)
    assert context.facts["left_in_float"] == {
        "rnn": "GRU has no form with 8-bit floating point here"
    }


@pytest.mark.parametrize("runtime", ["torch_eager", "torch_export"])
def test_sensitive_layers_compute_in_fp32(runtime: str, tiny_context: Any, tmp_path: Path) -> None:
    """The first layer alone in bf16: the network is as far off as when it is computed by hand."""
    net = networks.tiny_cnn()
    target = Target(runtime=runtime, options={"threads": 1, "precision": "bf16"})
    context = tiny_context(net, target=target)
    config = Half(layers=Layers(patterns=("conv1",)))
    made = half(copy.deepcopy(net), config, context)
    assert context.facts["layers"] == 1
    assert context.facts["left_in_float"]["fc"] == "excluded by layers"
    x = networks.digits()[0][:64]
    with torch.no_grad():
        plain = net(x)
        torch.testing.assert_close(made(x), plain, rtol=0, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            whole = net(x).float()
            net.conv1.register_forward_hook(lambda *call: call[2].float())
            first = net.conv1(x)
        net.conv1._forward_hooks.clear()
        net.conv1.register_forward_hook(lambda *call: first)
        wanted = net(x)
    found = plugins.runtime(runtime)
    files = found.export(lower(made, found.takes, networks.inputs()), tmp_path, networks.inputs())
    got = next(iter(found.load(files[0], target).bind({"x": x.numpy()})().values()))
    assert got.dtype == np.float32
    error = np.abs(got - wanted.numpy()).max()
    assert error < 1e-4 * float(wanted.abs().max())
    assert error < 0.05 * float((whole - wanted).abs().max())
    assert not np.allclose(got, plain.numpy(), atol=1e-5)


def test_layers_in_fp32_are_stored_and_replayed(tiny_context: Any, tmp_path: Path) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net, target=Target(runtime="torch_eager"))
    made = half(copy.deepcopy(net), Half(layers=Layers(patterns=("!embed",))), context)
    edits.store(made, net, tmp_path)
    again = edits.replay(tmp_path, copy.deepcopy(net))
    x = networks.digits()[0][:8]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), again(x))
        assert not torch.equal(made(x), net(x))
    assert notes_of(again)["precision"] == "bf16"


def test_runtimes_that_turn_whole_networks_refuse_layers(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net, target=Target(runtime="openvino"))
    with pytest.raises(
        TargetError,
        match=r"openvino:cpu turns a network to bf16 as a whole, so `layers` has no meaning "
        r"there. Leave `layers` out, or take one of the runtimes torch_eager, torch_export, or the ",
    ):
        half(net, Half(layers=Layers(patterns=("!fc",))), context)


class _Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2
