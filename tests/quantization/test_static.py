"""Static quantization of small trained networks: accuracy, facts, runtimes, bad input."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.errors import DataError, ModelError, RecipeError
from tersor.core.layers import Layers
from tersor.core.runtime import Target
from tersor.ops.capture import capture
from tersor.ops.lower import lower
from tersor.ops.modules import QuantConv2d, Quantize, QuantLinear
from tersor.ops.notes import notes_of
from tersor.quantization.half import Half, half
from tersor.quantization.static import Static, static
from tersor.quantization.weight_only import WeightOnly, weight_only
from tests import networks


def accuracy(net: nn.Module) -> float:
    batches = networks.split(1200, 1797)
    with torch.no_grad():
        right = [(net(b["x"]).argmax(1) == b["labels"]).float() for b in batches]
    return 100 * float(torch.cat(right).mean())


@pytest.mark.parametrize(
    "calibrator", ["min_max", "moving_average", "percentile", "entropy", "mse"]
)
def test_accuracy_stays_with_every_calibrator(calibrator: Any, tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    before = accuracy(net)
    made = static(copy.deepcopy(net), Static(calibrator=calibrator), tiny_context(net))
    assert accuracy(made) >= before - 1


@pytest.mark.parametrize(
    "config",
    [
        Static(symmetric=True),
        Static(symmetric=True, power_of_two=True),
        Static(per_channel=False),
        Static(float_ends=True),
    ],
)
def test_accuracy_stays_with_other_settings(config: Static, tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    assert accuracy(static(copy.deepcopy(net), config, tiny_context(net))) >= accuracy(net) - 2


def test_layers_hold_integers_and_facts_are_told(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = static(net, Static(), context)
    kinds = [type(m).__name__ for m in made.modules()]
    assert kinds.count("QuantConv2d") == 8
    assert kinds.count("QuantLinear") == 1
    assert "BatchNorm2d" not in kinds
    assert not made.training
    assert context.facts["layers"] == 9
    assert context.facts["samples"] == 256
    assert context.facts["batch_norms_folded"] == 7
    assert context.facts["left_in_float"] == {}
    assert context.facts["calibrator"] == "min_max"
    for layer in made.modules():
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            assert layer.weight.dtype == torch.int8
            assert int(layer.weight.min()) >= -127
    assert context.facts["roundings"] == kinds.count("Quantize")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("make", [networks.tiny_cnn, networks.tiny_transformer])
def test_runtimes_agree_with_memory(
    make: Any, runtime: str, tiny_context: Any, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    net = make()
    made = static(net, Static(), tiny_context(net))
    found = plugins.runtime(runtime)
    files = found.export(lower(made, "onnx", networks.inputs()), tmp_path, networks.inputs())
    runner = found.load(files[0], Target(runtime=runtime, options={"threads": 1}))
    x = networks.digits()[0][1200:1400]
    with torch.no_grad():
        wanted = made(x).numpy()
    got = next(iter(runner.bind({"x": x.numpy()})().values()))
    assert np.sqrt(np.mean((got - wanted) ** 2)) < 0.05 * np.sqrt(np.mean(wanted**2))
    assert (got.argmax(1) == wanted.argmax(1)).mean() >= 0.98


def test_rounding_is_the_only_change(tiny_context: Any) -> None:
    """With weights and inputs that are codes already nothing changes but the last bits of sums."""
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[127.0, -127, 3, 8]] * 3) / 127)
    x = torch.randint(0, 256, (64, 4)) / 255.0
    x[0, 0], x[0, 1] = 0.0, 1.0
    inputs = replace(networks.inputs(), example={"input": x[:2]}, dynamic={"input": {0: "batch"}})
    context = tiny_context(net)
    context = replace(
        context, inputs=inputs, data=replace(context.data, calibration=[{"input": x}])
    )
    before = net(x).detach()
    assert torch.allclose(static(net, Static(), context)(x), before, atol=1e-5)


def test_result_can_be_copied_captured_and_quantized_again(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = static(net, Static(), context)
    x = networks.digits()[0][:8]
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    assert capture(twin, networks.inputs()) is twin
    again = tiny_context(net)
    other = static(twin, Static(), again)
    assert again.facts["layers"] == 0
    assert set(again.facts["left_in_float"].values()) == {"quantized before"}
    assert torch.equal(other(x), made(x))


def test_follows_weight_only_and_half(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net, target=Target(runtime="openvino"))
    first = half(
        weight_only(net, WeightOnly(layers=Layers(patterns=("fc1", "fc2"))), context),
        Half(),
        context,
    )
    made = static(first, Static(), context)
    assert context.facts["left_in_float"]["fc1"] == "quantized before"
    assert type(made.get_submodule("qkv")).__name__ == "QuantLinear"
    assert notes_of(made)["precision"] == "bf16"
    assert notes_of(copy.deepcopy(made))["precision"] == "bf16"


def test_layers_excluded_and_attention_are_told(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net)
    static(net, Static(layers=Layers(patterns=("!head",))), context)
    left = context.facts["left_in_float"]
    assert left["head"] == "excluded by layers"
    assert any(reason.startswith("attention: its softmax is float") for reason in left.values())
    assert context.facts["layers"] == 5


def test_float_ends_leaves_first_and_last_layer(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    static(net, Static(float_ends=True), context)
    assert context.facts["left_in_float"] == {
        "conv1": "first or last layer",
        "fc": "first or last layer",
    }


def test_clipped_activation_keeps_its_codes_below_the_clip(tiny_context: Any) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        net[0].weight.mul_(100)
    inputs = replace(
        networks.inputs(),
        example={"input": networks.digits()[0][:2]},
        dynamic={"input": {0: "batch"}},
    )
    context = tiny_context(net)
    data = replace(context.data, calibration=[{"input": networks.digits()[0][:64]}])
    made = static(net, Static(), replace(context, inputs=inputs, data=data))
    roundings = [m for m in made.modules() if isinstance(m, Quantize)]
    tops = [float(torch.tensor(m.scale) * (m.high - m.zero)) for m in roundings]
    assert 5.99 < tops[1] <= 6.0


def test_weaker_first_calibrates_better_then_leaves_the_ends() -> None:
    first = Static().weaker()
    assert first == Static(calibrator="mse")
    second = first.weaker()
    assert second == Static(calibrator="mse", float_ends=True)
    assert second.weaker() is None


def test_missing_calibration(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    context = replace(context, data=replace(context.data, calibration=None))
    with pytest.raises(
        DataError, match="calibration data is needed: a few hundred samples, without labels"
    ):
        static(net, Static(), context)


def test_misspelt_layer(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(
        RecipeError,
        match=r"layers: pattern 'block1.conv3' matches no layer. Did you mean 'block1.conv",
    ):
        static(net, Static(layers=Layers(patterns=("block1.conv3",))), tiny_context(net))


def test_nan_weights(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with torch.no_grad():
        net.fc.weight[0, 0] = torch.nan
    with pytest.raises(
        ModelError, match="layer 'fc' cannot be quantized: its weights hold NaN or infinity"
    ):
        static(net, Static(), tiny_context(net))


def test_percentile_is_checked() -> None:
    with pytest.raises(ValueError, match=r"percentile must be in \(50, 100\], got 40"):
        Static(percentile=40)


def test_network_without_layers_is_told(tiny_context: Any) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    context = tiny_context(Sum())
    static(Sum(), Static(), context)
    assert context.facts["layers"] == 0


def test_dead_channels_and_constant_inputs_run(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with torch.no_grad():
        net.bn1.weight[0], net.bn1.bias[0] = 0.0, 0.5
        net.block1.bn2.weight[:], net.block1.bn2.bias[:] = 0.0, 0.0
    before = accuracy(net)
    context = tiny_context(net)
    made = static(net, Static(), context)
    assert all(bool((m.scale > 0).all()) for m in made.modules() if isinstance(m, QuantConv2d))
    assert abs(accuracy(made) - before) <= 2
    assert bool(torch.isfinite(made(networks.digits()[0])).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "vit"])
def test_real_networks_stay_within_a_point(name: str, workload: Any, tiny_context: Any) -> None:
    script = workload("cifar" if name == "resnet20" else "fashion")
    net, data = getattr(script, name)(), script.data()
    example = next(iter(data["calibration"]))["x"][:2]
    inputs = replace(networks.inputs(), example={"x": example}, dynamic={"x": {0: "batch"}})
    context = tiny_context(net)
    context = replace(
        context, inputs=inputs, data=replace(context.data, calibration=data["calibration"])
    )
    made = static(copy.deepcopy(net), Static(), context)
    right: dict[str, list[Tensor]] = {"before": [], "after": []}
    with torch.no_grad():
        for batch in list(data["test"])[:24]:
            for key, one in (("before", net), ("after", made)):
                right[key].append((one(batch["x"]).argmax(1) == batch["labels"]).float())
    assert torch.cat(right["after"]).mean() >= torch.cat(right["before"]).mean() - 0.01


def test_scales_are_the_next_power_of_two(tiny_context: Any) -> None:
    """Codes then are fixed-point numbers, and no value that fitted before is clipped."""
    net = networks.tiny_cnn()
    plain = static(copy.deepcopy(net), Static(symmetric=True), tiny_context(net))
    made = static(copy.deepcopy(net), Static(symmetric=True, power_of_two=True), tiny_context(net))
    before, after = dict(plain.named_modules()), dict(made.named_modules())
    seen = 0
    for name, module in after.items():
        if isinstance(module, (Quantize, QuantConv2d, QuantLinear)):
            wide = torch.as_tensor(module.scale, dtype=torch.float64)
            narrow = torch.as_tensor(before[name].scale, dtype=torch.float64)
            assert bool((wide.log2() % 1 == 0).all())
            # scales without the option are near the range's, within 0.1 %
            assert bool(((wide >= narrow * 0.999) & (wide < narrow * 2.002)).all())
            seen += 1
    assert seen > 10


def test_powers_of_two_are_refused_with_zero_points() -> None:
    with pytest.raises(ValueError, match=r"^power_of_two needs symmetric: fixed-point numbers "):
        Static(power_of_two=True)
