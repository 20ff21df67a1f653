"""Head pruning: whole heads go, exactly; what cannot be done is said."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tersor.core.context import Data
from tersor.core.errors import DataError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.pruning.attention_heads import AttentionHeads, attention_heads
from tests import networks

Make = Callable[..., Any]


@pytest.mark.parametrize("importance", ["taylor", "l2", "activation"])
def test_half_of_the_heads(importance: Any, tiny_context: Make) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net)
    made = attention_heads(net, AttentionHeads(importance=importance), context)
    assert context.facts["heads"] == {"qkv": "4 -> 2"}
    assert made.qkv.out_features == 48
    assert made.proj.in_features == 16
    assert made.norm1.normalized_shape == (32,)
    assert made(x=networks.digits()[0][:3]).shape == (3, 10)
    assert context.facts["macs_after"] < context.facts["macs_before"]


def test_a_head_that_says_nothing_goes_first(tiny_context: Make) -> None:
    """Silence a head: its outputs are not read any more, so nothing changes when it goes."""
    net = networks.tiny_transformer()
    with torch.no_grad():
        net.proj.weight[:, 8:16] = 0
    x = networks.digits()[0][:20]
    wanted = net(x)
    for importance in ("taylor", "fisher"):
        config = AttentionHeads(ratio=0.25, importance=importance)
        given = copy.deepcopy(net)
        made = attention_heads(given, config, tiny_context(given))
        torch.testing.assert_close(made(x=x), wanted, rtol=1e-4, atol=1e-5)


def test_a_network_without_heads(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    with pytest.raises(UnfitError, match=r"TinyCnn has no attention heads that can be cut"):
        attention_heads(net, AttentionHeads(), tiny_context(net))


def test_bad_settings(tiny_context: Make) -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got 1.0"):
        AttentionHeads(ratio=1.0)
    with pytest.raises(ValueError, match=r"importance fpgm is for filters, not for heads"):
        AttentionHeads(importance="fpgm")
    with pytest.raises(ValueError, match=r"ranking sensitivity is for channels"):
        AttentionHeads(ranking="sensitivity")
    net = networks.tiny_transformer()
    with pytest.raises(UnfitError, match=r"layers have at most 4 heads, and ratio 0.1 of them"):
        attention_heads(net, AttentionHeads(ratio=0.1), tiny_context(net))
    layers = Layers(patterns=("qkw",))
    with pytest.raises(StepError, match=r"'qkw' matches no layer .* Did you mean 'qkv'"):
        attention_heads(net, AttentionHeads(layers=layers), tiny_context(net))
    config = AttentionHeads(importance="taylor")
    with pytest.raises(DataError, match=r"importance taylor needs calibration data with labels"):
        attention_heads(net, config, tiny_context(net, data=Data()))


def test_weaker() -> None:
    assert AttentionHeads(ratio=0.5).weaker() == AttentionHeads(ratio=0.35)
    assert AttentionHeads(ratio=0.06).weaker() is None
