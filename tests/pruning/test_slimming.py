"""Slimming: scales are driven to zero, and what they silence is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tersor.core.context import Data
from tersor.core.errors import DataError, UnfitError
from tersor.pruning.slimming import Slimming, slimming
from tests import networks

Make = Callable[..., Any]


def test_scales_shrink_and_channels_go(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = slimming(net, Slimming(strength=1e-2, epochs=1.0, multiple=1), context)
    facts = context.facts
    assert facts["scales_after"]["0.5"] < facts["scales_before"]["0.5"]
    sizes = [tuple(map(int, text.split(" -> "))) for text in facts["groups"].values()]
    assert sum(a for a, _ in sizes) == 64
    assert 32 <= sum(b for _, b in sizes) <= 34  # a group keeps one
    assert made(networks.digits()[0][:3]).shape == (3, 10)


def test_the_loss_is_the_paper_s(tiny_context: Make) -> None:
    """Loss and gradient: the sum of absolute scales of every batch norm whose channels may go."""
    net = networks.tiny_cnn()
    context = tiny_context(net)
    seen = []

    def fit(net: Any, loss: Any, **_: Any) -> Any:
        batch = networks.split(0, 8)[0]
        seen.append((loss(net, batch) - context.loss(net, batch)).item())
        return net

    slimming(net, Slimming(strength=0.5), tiny_context(net, fit=fit))
    scales = [m.weight for m in networks.tiny_cnn().modules() if hasattr(m, "running_mean")]
    wanted = 0.5 * sum(float(s.detach().double().abs().sum()) for s in scales)
    assert seen[0] == pytest.approx(wanted, rel=1e-5)


def test_without_training_the_smallest_scales_go(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with torch.no_grad():
        net.block1.bn1.weight[[1, 4, 6]] = 1e-6
    kept = net.block1.conv1.weight.detach()[[0, 2, 3, 5, 7]].clone()
    made = slimming(net, Slimming(ratio=3 / 64, epochs=0, multiple=1), tiny_context(net))
    assert torch.equal(made.block1.conv1.weight, kept)


def test_bad_input(tiny_context: Make) -> None:
    net = networks.tiny_transformer()
    with pytest.raises(UnfitError, match=r"no batch norm of TinyTransformer scales channels"):
        slimming(net, Slimming(), tiny_context(net))
    cnn = networks.tiny_cnn()
    with pytest.raises(UnfitError, match=r"nothing would be removed: groups have 8, 16 channels"):
        slimming(cnn, Slimming(epochs=0, multiple=16), tiny_context(cnn))
    with pytest.raises(DataError, match=r"slimming needs training data with labels"):
        slimming(cnn, Slimming(), tiny_context(cnn, data=Data()))
    for settings, said in (
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"strength": -1.0}, r"strength must not be negative, got -1.0"),
        ({"epochs": -1}, r"epochs must not be negative, got -1"),
        ({"lr": 0.0}, r"lr must be positive, got 0.0"),
        ({"multiple": 0}, r"multiple must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Slimming(**settings)
    assert Slimming(ratio=0.5).weaker() == Slimming(ratio=0.35)
