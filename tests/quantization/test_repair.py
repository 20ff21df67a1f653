"""Repair without labels: equalize, smooth_quant, bias_correction, adaround."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.ops.edits import replay, store
from tersor.ops.modules import QUANTIZED
from tersor.ops.twin import gather, lockstep, twin_of
from tersor.quantization.adaround import Adaround, adaround
from tersor.quantization.bias_correction import BiasCorrection, bias_correction
from tersor.quantization.equalize import Equalize, equalize
from tersor.quantization.smooth_quant import SmoothQuant, smooth_quant
from tersor.quantization.static import Static, static
from tersor.quantization.weight_only import WeightOnly, weight_only
from tests import networks

COARSE = Static(weight_bits=3)


def output_error(net: nn.Module, other: nn.Module) -> float:
    """Root-mean-square difference of outputs on images that nothing was calibrated on."""
    x = networks.digits()[0][1200:]
    with torch.no_grad():
        wanted = other(x)
        return float((net(x) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def rounded(tiny_context: Any, config: Any = COARSE) -> tuple[nn.Module, nn.Module, Any]:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    step = static if isinstance(config, Static) else weight_only
    return step(copy.deepcopy(net), config, context), net, context


class Chain(nn.Module):
    """A 1x1, a depthwise and a grouped convolution with ReLU between, at very different scales."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)
        self.act = activation or nn.ReLU()
        self.fc = nn.Linear(6 * 64, 10)
        with torch.no_grad():
            scale = torch.logspace(-2, 2, 8)
            self.expand.weight.copy_(scale.view(-1, 1, 1, 1))
            self.expand.bias.copy_(-0.1 * scale)
            self.depthwise.weight.div_(scale.view(-1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.depthwise(self.act(self.expand(x))))
        return self.fc(self.act(self.grouped(x)).flatten(1))


# --- equalize ------------------------------------------------------------------------------------


def test_equalize_keeps_outputs_and_levels_ranges(tiny_context: Any) -> None:
    torch.manual_seed(0)
    net = Chain().eval()
    context = tiny_context(net)
    made = equalize(copy.deepcopy(net), Equalize(), context)
    assert output_error(made, net) < 1e-5
    assert context.facts["pairs"] == 2  # the linear layer reads a flattened tensor
    first = made.get_submodule("expand").weight.flatten(1).abs().amax(1)
    second = made.get_submodule("depthwise").weight.flatten(1).abs().amax(1)
    assert torch.allclose(first, second, rtol=0.02)
    coarse = Static(weight_bits=8, per_channel=False)
    plain = output_error(static(copy.deepcopy(net), coarse, tiny_context(net)), net)
    level = output_error(static(made, coarse, tiny_context(net)), net)
    assert level < 0.5 * plain


def test_equalize_folds_batch_norms_and_leaves_dead_channels(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with torch.no_grad():
        net.block1.conv1.weight[0] = 0
        net.block1.bn1.running_mean[0] = net.block1.bn1.bias[0] = 0
    context = tiny_context(net)
    made = equalize(copy.deepcopy(net), Equalize(), context)
    assert context.facts["batch_norms_folded"] == 7
    assert context.facts["pairs"] == 3
    assert output_error(made, net) < 1e-4


def test_equalize_stops_at_relu6_unless_told(tiny_context: Any) -> None:
    net = Chain(nn.ReLU6()).eval()
    with pytest.raises(UnfitError, match="but over ReLU6, which replace_relu6 would make a ReLU"):
        equalize(copy.deepcopy(net), Equalize(), tiny_context(net))
    context = tiny_context(net)
    made = equalize(copy.deepcopy(net), Equalize(replace_relu6=True), context)
    assert context.facts["relu6_replaced"] == 3  # calls of one module
    assert not any(isinstance(m, nn.ReLU6) for m in made.modules())


def test_equalize_leaves_shared_weights_alone(tiny_context: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(1, 1, 3, padding=1)
            self.fc = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.one(self.one(x).relu()).relu().flatten(1))

    net = Twice().eval()
    with pytest.raises(UnfitError, match="in Twice no two convolutions or linear layers"):
        equalize(net, Equalize(), tiny_context(net))


# --- smooth_quant --------------------------------------------------------------------------------


def test_smooth_quant_keeps_outputs_and_reduces_outliers(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    norms = [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
    with torch.no_grad():
        # an outlier channel that the next layers undo, as in large language models
        for norm in norms:
            norm.weight[3] *= 50
    context = tiny_context(net)
    made = smooth_quant(copy.deepcopy(net), SmoothQuant(), context)
    assert output_error(made, net) < 1e-4
    assert context.facts["norms"] >= 1
    assert all(ratio > 2 for ratio in context.facts["outliers_reduced"].values())
    plain = output_error(static(copy.deepcopy(net), Static(), tiny_context(net)), net)
    smooth = output_error(static(made, Static(), tiny_context(net)), net)
    assert smooth < plain


def test_smooth_quant_wants_a_norm_before_linear_layers(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(UnfitError, match="TinyCnn has no layer norm or RMS norm"):
        smooth_quant(net, SmoothQuant(), tiny_context(net))


# --- bias_correction -----------------------------------------------------------------------------


def test_bias_correction_restores_the_means(tiny_context: Any) -> None:
    made, net, context = rounded(tiny_context)
    before = output_error(made, net)
    shared = twin_of(made, "a test").get_submodule("conv1").bias.clone()
    made = bias_correction(made, BiasCorrection(), context)
    assert output_error(made, net) < before
    assert torch.equal(twin_of(made, "a test").get_submodule("conv1").bias, shared)
    batch = gather(made, context.data.calibration, context.inputs, 256)
    for visit in lockstep(made, twin_of(made, "a test"), batch):
        with torch.no_grad():
            error = visit.layer(visit.x) - visit.wanted
        dimension = -1 if error.dim() == 2 else 1
        means = error.movedim(dimension, 0).flatten(1).mean(1)
        assert float(means.abs().max()) < 1e-4 * max(1.0, float(visit.wanted.abs().max()))


def test_bias_correction_gives_a_bias_where_there_was_none(tiny_context: Any) -> None:
    made, _, context = rounded(tiny_context, WeightOnly(bits=4))
    layer = made.get_submodule("fc")
    layer.bias = None
    twin_of(made, "a test").get_submodule("fc").bias = None
    made = bias_correction(made, BiasCorrection(), context)
    assert made.get_submodule("fc").bias is not None


# --- adaround ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [COARSE, WeightOnly(bits=4)])
def test_adaround_is_nearer_than_nearest(config: Any, tiny_context: Any) -> None:
    made, net, context = rounded(tiny_context, config)
    before = output_error(made, net)
    old = {n: m.weight.clone() for n, m in made.named_modules() if isinstance(m, QUANTIZED)}
    made = adaround(made, Adaround(steps=200), context)
    assert output_error(made, net) < before
    assert all(after <= start for start, after in context.facts["squared_errors"].values())
    assert 0 < context.facts["share_of_weights_changed"] < 0.5
    twin = twin_of(made, "a test")
    for name, codes in old.items():
        layer: Any = made.get_submodule(name)
        grid = layer.grid()
        weight: Any = twin.get_submodule(name).weight.detach()
        exact = (weight / grid.scale + grid.zero).clamp(grid.low, grid.high)
        assert float((layer.weight - exact).abs().max()) < 1  # up or down, no further
        assert layer.weight.dtype == codes.dtype


def test_adaround_repeats_with_its_seed(tiny_context: Any) -> None:
    results = []
    for _ in range(2):
        made, _, context = rounded(tiny_context)
        made = adaround(made, Adaround(steps=20), context)
        results.append(made.state_dict())
    assert all(torch.equal(results[0][k], v) for k, v in results[1].items())


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "config"), [(bias_correction, BiasCorrection()), (adaround, Adaround())]
)
def test_nothing_rounded_in_this_stage(step: Any, config: Any, tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(UnfitError, match=r"write them as one stage: \[static, \w+\]"):
        step(net, config, tiny_context(net))


def test_calibration_data_that_does_not_fit(tiny_context: Any) -> None:
    made, _, context = rounded(tiny_context)
    empty = replace(context, data=replace(context.data, calibration=[]))
    with pytest.raises(DataError, match="holds no batch"):
        bias_correction(made, BiasCorrection(), empty)
    wrong = replace(context, data=replace(context.data, calibration=[{"y": torch.zeros(1)}]))
    with pytest.raises(DataError, match="calibration batch 0 has no 'x'"):
        adaround(made, Adaround(), wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adaround(steps=0),
        lambda: Adaround(samples=0),
        lambda: BiasCorrection(samples=0),
        lambda: Equalize(sweeps=0),
        lambda: SmoothQuant(strength=1.5),
        lambda: Static(weight_bits=9),
    ],
)
def test_settings_are_checked(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


def test_fewer_samples_where_activations_are_large(tiny_context: Any, monkeypatch: Any) -> None:
    made, _, context = rounded(tiny_context)
    monkeypatch.setattr("tersor.ops.twin._LIVE_BYTES", 6 * 4 * 8 * 64 * 10)
    assert len(gather(made, context.data.calibration, context.inputs, 256)["x"]) == 10


def test_two_steps_that_round_share_one_twin(tiny_context: Any) -> None:
    """`static` folds no batch norm under the twin that `weight_only` has remembered."""
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = weight_only(copy.deepcopy(net), WeightOnly(layers=Layers(patterns=("fc",))), context)
    made = static(made, Static(layers=Layers(patterns=("!fc",))), context)
    assert output_error(twin_of(made, "a test"), net) < 1e-4
    before = output_error(made, net)
    assert output_error(bias_correction(made, BiasCorrection(), context), net) < 1.5 * before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"x": torch.full((4, 1, 8, 8), float("nan"))}, "batch 0: 'x' holds NaN or infinity"),
        ({"x": torch.zeros(4, 1, 9, 8)}, r"batch 0: 'x' has shape \(4, 1, 9, 8\)"),
        ({"x": torch.zeros(4, 1, 8, 8, dtype=torch.long)}, "batch 0: 'x' is torch.int64"),
    ],
)
def test_bad_batches_are_named(bad: Any, message: str, tiny_context: Any) -> None:
    made, _, context = rounded(tiny_context)
    context = replace(context, data=replace(context.data, calibration=[bad]))
    with pytest.raises(DataError, match=message):
        adaround(made, Adaround(steps=1), context)


def test_fewer_bits_survive_storing(tiny_context: Any, tmp_path: Path) -> None:
    made, net, _ = rounded(tiny_context)
    store(made, net, tmp_path)
    again = replay(tmp_path, copy.deepcopy(net))
    for name, layer in made.named_modules():
        if isinstance(layer, QUANTIZED):
            assert again.get_submodule(name).bits == layer.bits == 3
