"""Mixed precision: the choice is the best there is, fits the budget, and can be repeated."""

import copy
import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.context import Data
from tersor.core.errors import DataError, RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.core.recipe import Recipe
from tersor.ops.capture import capture
from tersor.ops.fake_quantize import settle
from tersor.ops.fold import fold_batch_norms
from tersor.ops.knapsack import Budget, solve
from tersor.ops.losses import divergence
from tersor.ops.modules import quantized, rows
from tersor.ops.quantize import channel_scales
from tersor.ops.twin import gather
from tersor.quantization._bits import size_budget, under_latency
from tersor.quantization._integer import make_integer, measure_ranges, weight_scales
from tersor.quantization.mixed_precision import MixedPrecision, mixed_precision
from tersor.quantization.static import Static, static
from tests import networks


def test_the_choice_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        table = torch.rand(5, 3, generator=generator).sort(1).values.tolist()
        losses = {f"l{i}": dict(zip((8, 6, 4), own, strict=True)) for i, own in enumerate(table)}
        counts = dict(zip(losses, (100, 10, 300, 50, 70), strict=True))
        best = min(
            sum(losses[n][b] for n, b in zip(losses, bits, strict=True))
            for bits in itertools.product((8, 6, 4), repeat=5)
            if sum(counts[n] * b for n, b in zip(losses, bits, strict=True)) <= 0.17 * 32 * 530
        )
        made = solve(losses, size_budget(losses, counts, 0.17))
        assert sum(losses[n][b] for n, b in made.items()) == pytest.approx(best)
        assert sum(counts[n] * b for n, b in made.items()) <= 0.17 * 32 * 530


def test_budget_holds_and_the_report_repeats_it(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    config = MixedPrecision(size=0.16, calibrator="mse", layers=Layers(patterns=("!fc",)))
    made = mixed_precision(copy.deepcopy(net), config, context)
    facts = context.facts
    assert facts["size"] <= 0.16
    table = facts["sensitivities"]
    assert len(table) == facts["layers"] == 8
    assert all(own["4"] > own["8"] for own in table.values())
    bits = {m.bits for m in made.modules() if hasattr(m, "bits")}
    assert len(bits) > 1
    target = {"runtime": "onnxruntime"}
    pasted = Recipe.parse({"steps": [facts["recipe"]], "target": target}).stages[0][0]
    again = mixed_precision(copy.deepcopy(net), pasted, tiny_context(net))
    x = networks.digits()[0][:64]
    with torch.no_grad():
        assert torch.equal(made(x), again(x))


def test_a_sensitivity_is_the_loss_of_one_layer_alone(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    mixed_precision(copy.deepcopy(net), MixedPrecision(samples=64), context)
    captured = capture(copy.deepcopy(net), context.inputs)
    fold_batch_norms(captured, context.inputs)
    batch = gather(captured, context.data.calibration, context.inputs, 64)
    for name in ("conv1", "block2.shortcut", "fc"):
        layer = captured.get_submodule(name)
        scale_O = channel_scales(rows(layer), bits=4, clip=True)
        with torch.no_grad():
            wanted = captured(**batch)
            captured.set_submodule(name, quantized(layer, scale_O, 4))
            direct = float(divergence(captured(**batch), wanted, 1))
        captured.set_submodule(name, layer)
        found = context.facts["sensitivities"][name]["4"]
        assert found == pytest.approx(direct, rel=1e-3)


def test_a_choice_of_float_counts_the_rounding_of_activations(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    config = MixedPrecision(weight_bits=(32, 8), size=1, samples=64)
    mixed_precision(copy.deepcopy(net), config, context)
    captured = capture(copy.deepcopy(net), context.inputs)
    fold_batch_norms(captured, context.inputs)
    batch = gather(captured, context.data.calibration, context.inputs, 64)
    few = dataclasses.replace(context, data=Data(calibration=[batch]))
    for name in ("block1.conv1", "fc"):
        alone = copy.deepcopy(captured)
        rounded, _ = measure_ranges(alone, [name], few, calibrator="min_max")
        scales = {name: weight_scales(alone, name, rounded, bits=8, clip=True)}
        make_integer(alone, scales, {name: 8}, rounded, context)
        with torch.no_grad():
            direct = float(divergence(alone(**batch), captured(**batch), 1))
        found = context.facts["sensitivities"][name]
        assert found == {"32": 0.0, "8": pytest.approx(direct, rel=1e-2)}


def test_layers_may_stay_in_float(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    config = MixedPrecision(weight_bits=(32, 8), size=0.5)
    mixed_precision(copy.deepcopy(net), config, context)
    left = context.facts["left_in_float"]
    assert 0 < len(left) < 9
    assert set(left.values()) == {"float has the least loss here"}


class _Clock:
    """Times networks by a table: the layers in float, and a conversion where they begin."""

    def __init__(self, costs: dict[str, float], integers: float, conversion: float) -> None:
        self.costs, self.integers, self.conversion = costs, integers, conversion
        self.calls = 0

    def share(self, floats: Collection[str]) -> float:
        names = list(self.costs)
        if len(floats) == len(names):
            return 1.0
        begins = sum(
            n in floats and (i == 0 or names[i - 1] not in floats) for i, n in enumerate(names)
        )
        return self.integers + self.conversion * begins + sum(self.costs[n] for n in floats)

    def __call__(self, nets: Sequence[Any]) -> list[float]:
        self.calls += 1
        return [3.0 * self.share(net) for net in nets]


def test_latency_is_used_up_for_the_most_sensitive_layers(tiny_context: Any) -> None:
    """Ten layers; work says nothing about what they cost, and conversions are not additive."""
    costs = {f"l{i}": c for i, c in enumerate((4, 9, 1, 2, 6, 3, 8, 5, 2, 4))}
    costs = {n: 0.5 * c / 44 for n, c in costs.items()}
    losses = {n: {32: 0.0, 8: (1.0 + i * 7 % 10)} for i, n in enumerate(costs)}
    clock = _Clock(costs, integers=0.4, conversion=0.005)
    context = tiny_context(networks.tiny_cnn(), latency=clock)
    made = under_latency(losses, dict.fromkeys(costs, 1.0), 0.7, frozenset, context)
    floats = {n for n, bits in made.items() if bits == 32}
    reached = context.facts["latency"]
    assert reached == pytest.approx(clock.share(floats))
    assert reached <= 0.7
    best = min(
        sum(losses[n][8] for n in losses if n not in chosen)
        for count in range(11)
        for chosen in itertools.combinations(losses, count)
        if clock.share(chosen) <= 0.7
    )
    assert sum(losses[n][8] for n in losses if n not in floats) <= 1.15 * best
    assert clock.calls <= 7


def test_size_and_latency_hold_together() -> None:
    losses = {f"l{i}": {32: 0.0, 8: 1.0 + i, 4: 9.0 - i} for i in range(6)}
    counts = dict.fromkeys(losses, 10)
    time = {n: {b: 0.1 if b == 32 else 0.0 for b in own} for n, own in losses.items()}
    made = solve(losses, size_budget(losses, counts, 0.5), Budget(costs=time, most=0.2))
    assert sum(b == 32 for b in made.values()) == 2
    assert sum(counts[n] * b for n, b in made.items()) <= 0.5 * 32 * 60


def test_a_latency_is_held_on_the_runtime(tiny_context: Any) -> None:
    """With the contract's clock: a network costs what its float weights cost."""
    net = networks.tiny_cnn()

    def weights(nets: Sequence[nn.Module]) -> list[float]:
        return [sum(float(p.numel()) for p in one.parameters()) for one in nets]

    context = tiny_context(net, latency=weights)
    made = mixed_precision(copy.deepcopy(net), MixedPrecision(latency=0.6), context)
    facts = context.facts
    loss = {name: own["8"] for name, own in facts["sensitivities"].items()}
    captured = capture(copy.deepcopy(net), context.inputs)
    fold_batch_norms(captured, context.inputs)
    counts = {name: captured.get_submodule(name).weight.numel() for name in loss}
    whole = weights([captured])[0]
    assert facts["latency"] == pytest.approx(weights([made])[0] / whole)
    room = 0.6 * whole - (whole - sum(counts.values()))
    best = min(
        sum(loss[n] for n in loss if n not in chosen)
        for count in range(10)
        for chosen in itertools.combinations(loss, count)
        if sum(counts[n] for n in chosen) <= room
    )
    left = facts["left_in_float"]
    assert sum(loss[n] for n in loss if n not in left) == pytest.approx(best)
    again = MixedPrecision(assign=tuple(facts["recipe"]["mixed_precision"]["assign"]))
    repeated = mixed_precision(copy.deepcopy(net), again, tiny_context(net))
    x = networks.digits()[0][:64]
    with torch.no_grad():
        assert torch.equal(made(x), repeated(x))
    with pytest.raises(UnfitError, match=r"latency 0.01 cannot be reached: with all 9 layers in"):
        mixed_precision(copy.deepcopy(net), MixedPrecision(latency=0.01), context)


def test_most_sensitive_layers_stay_in_float_until_the_drop_holds(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    coarse = MixedPrecision(drop=0.4, weight_bits=(32, 2))
    made = mixed_precision(copy.deepcopy(net), coarse, context)
    facts = context.facts
    steps = facts["exclusion"]
    assert steps[0]["left_in_float"] == 0
    assert steps[0]["drop"] > 0.4
    held = min(step["left_in_float"] for step in steps if step["drop"] <= 0.4)
    table = facts["sensitivities"]
    order = sorted(table, key=lambda name: table[name]["2"], reverse=True)
    assert set(facts["left_in_float"]) == set(order[:held])
    right = seen = 0
    settle(made)
    with torch.no_grad():
        for batch in context.data.validation:
            right += int((made(batch["x"]).argmax(1) == batch["labels"]).sum())
            seen += len(batch["labels"])
    assert facts["float"]["accuracy"] - 100 * right / seen <= 0.4


def test_a_drop_without_labels_is_of_equal_answers(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    unlabeled = [{"x": batch["x"]} for batch in networks.data().validation or ()]
    data = Data(calibration=networks.data().calibration, validation=unlabeled)
    context = tiny_context(net, data=data)
    mixed_precision(copy.deepcopy(net), MixedPrecision(drop=5), context)
    assert context.facts["float"] == {"fidelity": 100.0}
    assert context.facts["exclusion"][-1]["drop"] <= 5
    assert context.facts["layers"] == 9
    nothing = tiny_context(net, data=Data(calibration=networks.data().calibration))
    with pytest.raises(DataError, match="drop is decided on validation data, and there is none"):
        mixed_precision(copy.deepcopy(net), MixedPrecision(drop=5), nothing)


def test_a_drop_that_no_layer_holds_is_refused(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    data = dataclasses.replace(
        networks.data(), quality=lambda outputs, labels: _exact(outputs, net)
    )
    context = tiny_context(net, data=data)
    with pytest.raises(UnfitError, match=r"drop 0 cannot be held: with layer '[\w.]+' alone in"):
        mixed_precision(copy.deepcopy(net), MixedPrecision(drop=0, weight_bits=(32, 2)), context)
    assert [step["left_in_float"] for step in context.facts["exclusion"]] == [0, 4, 6, 7, 8]


def _exact(outputs: torch.Tensor, net: nn.Module) -> float:
    """A quality that any change of the outputs lowers."""
    with torch.no_grad():
        wanted = torch.cat([net(batch["x"]) for batch in networks.data().validation or ()])
    return -float((outputs - wanted).abs().max() > 1e-4)


def test_ranges_keep_the_percentile_that_is_asked(tiny_context: Any) -> None:
    """With 8 bits everywhere it is static quantization, which has the same setting."""
    net = networks.tiny_cnn()
    x = networks.digits()[0][:64]
    outputs = []
    for percentile in (99.0, 99.99):
        own: Any = {"calibrator": "percentile", "percentile": percentile}
        made = mixed_precision(
            copy.deepcopy(net), MixedPrecision(assign=("*=8",), **own), tiny_context(net)
        )
        wanted = static(copy.deepcopy(net), Static(weight_range="mse", **own), tiny_context(net))
        with torch.no_grad():
            assert torch.equal(made(x), wanted(x))
            outputs.append(made(x))
    assert not torch.equal(*outputs)
    with pytest.raises(ValueError, match=r"percentile must be in \(50, 100\], got 0.99"):
        MixedPrecision(percentile=0.99)


def test_settings_that_do_not_fit_together_are_refused() -> None:
    for wrong, text in (
        ({"latency": 1.0}, r"latency must be in \(0, 1\), got 1.0"),
        ({"drop": -1.0}, "drop must not be negative, got -1.0"),
        ({"drop": 1.0, "size": 0.2}, "give drop, or size and latency, not both"),
        ({"latency": 0.5, "weight_bits": (8, 4)}, "add 32 to weight_bits, got"),
        ({"weight_bits": (32,)}, "or 32 beside others, got"),
    ):
        with pytest.raises(ValueError, match=text):
            MixedPrecision(**wrong)


def test_what_cannot_be_is_refused(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(UnfitError, match=r"size 0.1 cannot be reached: .* take 0.125") as error:
        mixed_precision(copy.deepcopy(net), MixedPrecision(size=0.1), tiny_context(net))
    assert error.value.too_strong
    with pytest.raises(RecipeError, match=r"assign says nothing for layer 'block1.conv1'"):
        mixed_precision(
            copy.deepcopy(net), MixedPrecision(assign=("conv1=8", "fc=8")), tiny_context(net)
        )
    with pytest.raises(RecipeError, match="pattern 'cov' matches no layer"):
        mixed_precision(
            copy.deepcopy(net), MixedPrecision(assign=("cov=8", "*=8")), tiny_context(net)
        )
    with pytest.raises(ValueError, match="assign takes entries as"):
        MixedPrecision(assign=("conv1=9",))
    with pytest.raises(UnfitError, match="no layer of this network"):
        mixed_precision(
            copy.deepcopy(net), MixedPrecision(layers=Layers(patterns=("!*",))), tiny_context(net)
        )


@pytest.mark.parametrize(
    ("setting", "start", "end"),
    [("size", 0.13, 0.25), ("latency", 0.5, 0.938), ("drop", 1.0, 0.0625)],
)
def test_weaker_goes_towards_float(setting: str, start: float, end: float) -> None:
    found = []
    config: MixedPrecision | None = MixedPrecision(**{setting: start})
    while config is not None:
        found.append(getattr(config, setting))
        config = config.weaker()
    assert found == sorted(found, reverse=setting == "drop")
    assert found[-1] == end
    assert len(found) > 2
    assert MixedPrecision().weaker() == MixedPrecision(size=0.225)
