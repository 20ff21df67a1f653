"""Mixed precision: the choice is the best there is, fits the budget, and can be repeated."""

import copy
import itertools
from typing import Any

import pytest
import torch

from tersor.core.errors import RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.ops.capture import capture
from tersor.ops.fold import fold_batch_norms
from tersor.ops.losses import divergence
from tersor.ops.modules import quantized, rows
from tersor.ops.quantize import channel_scales
from tersor.ops.twin import gather
from tersor.quantization.mixed_precision import MixedPrecision, mixed_precision, solve
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
        made = solve(losses, counts, 0.17)
        assert sum(losses[n][b] for n, b in made.items()) == pytest.approx(best)
        assert sum(counts[n] * b for n, b in made.items()) <= 0.17 * 32 * 530


def test_budget_holds_and_the_report_repeats_it(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = mixed_precision(copy.deepcopy(net), MixedPrecision(size=0.16), context)
    facts = context.facts
    assert facts["size"] <= 0.16
    table = facts["sensitivities"]
    assert len(table) == facts["layers"] == 9
    assert all(own["4"] > own["8"] for own in table.values())
    bits = {m.bits for m in made.modules() if hasattr(m, "bits")}
    assert len(bits) > 1
    entry = facts["recipe"]["mixed_precision"]
    again = mixed_precision(
        copy.deepcopy(net), MixedPrecision(assign=tuple(entry["assign"])), tiny_context(net)
    )
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


def test_layers_may_stay_in_float(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    config = MixedPrecision(weight_bits=(32, 8), size=0.5)
    mixed_precision(copy.deepcopy(net), config, context)
    left = context.facts["left_in_float"]
    assert 0 < len(left) < 9
    assert set(left.values()) == {"float has the least loss here"}


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


def test_weaker_goes_towards_bytes() -> None:
    first = MixedPrecision(size=0.13)
    sizes = [first.size]
    weaker = first.weaker()
    while weaker is not None:
        sizes.append(weaker.size)
        weaker = weaker.weaker()
    assert sizes == sorted(sizes)
    assert sizes[-1] == 0.25
