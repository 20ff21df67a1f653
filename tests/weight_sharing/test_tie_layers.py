"""Tied layers: one set of matrices for neighbors, through training, storage and export."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.errors import RecipeError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.distillation.finetune import Finetune, finetune
from tersor.ops import edits
from tersor.ops.lower import lower
from tersor.weight_sharing.tie_layers import TieLayers, tie_layers
from tests import networks

Make = Callable[..., Any]


def linear(net: Any, index: int) -> nn.Parameter:
    found: nn.Parameter = net.blocks[index].linear.weight
    return found


def test_pairs_share_the_mean_of_their_matrices(tiny_context: Make) -> None:
    net = networks.deep_perceptron(trained=False)
    before = [linear(net, i).detach().clone() for i in range(4)]
    context = tiny_context(net)
    tie_layers(net, TieLayers(), context)
    assert linear(net, 0) is linear(net, 1)
    assert linear(net, 2) is linear(net, 3)
    assert linear(net, 0) is not linear(net, 2)
    torch.testing.assert_close(linear(net, 0).detach(), (before[0] + before[1]) / 2)
    assert net.blocks[0].norm.weight is not net.blocks[1].norm.weight  # type: ignore[union-attr]
    assert context.facts["groups"] == [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]
    count = sum(p.numel() for p in networks.DeepPerceptron().parameters())
    assert context.facts["parameters"] == pytest.approx(1 - 2 * 64 * 64 / count)


def test_all_blocks_or_three_of_them_and_the_first_ones_matrices(tiny_context: Make) -> None:
    net = networks.deep_perceptron(5, trained=False)
    first = linear(net, 0).detach().clone()
    tie_layers(net, TieLayers(share=0, start="first"), tiny_context(net))
    assert all(linear(net, i) is linear(net, 0) for i in range(5))
    assert torch.equal(linear(net, 0), first)
    net = networks.deep_perceptron(5, trained=False)
    tie_layers(net, TieLayers(share=3), tiny_context(net))
    assert linear(net, 2) is linear(net, 0)
    assert linear(net, 4) is linear(net, 3)


def test_tied_weights_stay_tied_through_training_storage_and_export(
    tiny_context: Make, tmp_path: Path
) -> None:
    net = networks.deep_perceptron(trained=False)
    original = copy.deepcopy(net)
    context = tiny_context(net)
    tie_layers(net, TieLayers(), context)
    finetune(net, Finetune(epochs=1), context)
    assert linear(net, 0) is linear(net, 1)
    edits.store(net, original, tmp_path)
    again = edits.replay(tmp_path, copy.deepcopy(original))
    x = networks.split(0, 8)[0]["x"]
    assert linear(again, 0) is linear(again, 1)
    assert torch.equal(again(x), net(x))
    model = lower(net, "onnx", Inputs(example={"x": x}, dynamic={"x": {0: "batch"}}))
    squares = [t for t in model.graph.initializer if list(t.dims) == [64, 64]]
    assert len(squares) == 2


def test_a_file_that_ties_to_nothing_is_refused(tiny_context: Make, tmp_path: Path) -> None:
    net = networks.deep_perceptron(trained=False)
    original = copy.deepcopy(net)
    tie_layers(net, TieLayers(), tiny_context(net))
    edits.store(net, original, tmp_path)
    file = tmp_path / "network.json"
    file.write_text(file.read_text().replace('"blocks.0.linear.weight"', '"blocks.9.x"'))
    with pytest.raises(Exception, match=r"is tied to 'blocks\.9\.x', which is not a parameter"):
        edits.replay(tmp_path, original)


def test_a_tie_inside_of_blocks_stays(tiny_context: Make) -> None:
    net: Any = networks.deep_perceptron(2, trained=False)
    for block in net.blocks:
        block.add_module("again", nn.Linear(64, 64))
        block.again.weight = block.linear.weight
    tie_layers(net, TieLayers(), tiny_context(net))
    weights = {id(w) for b in net.blocks for w in (b.linear.weight, b.again.weight)}
    assert len(weights) == 1


def test_blocks_that_are_tied_already_are_said_to_be(tiny_context: Make) -> None:
    net = networks.deep_perceptron(trained=False)
    tie_layers(net, TieLayers(), tiny_context(net))
    with pytest.raises(UnfitError, match="use the same matrices already"):
        tie_layers(net, TieLayers(), tiny_context(net))


def test_bad_input_is_refused(tiny_context: Make) -> None:
    with pytest.raises(ValueError, match="share must be 0 or at least 2, got 1"):
        TieLayers(share=1)
    net = networks.tiny_cnn()
    with pytest.raises(UnfitError, match="has no two blocks of one class and shape"):
        tie_layers(net, TieLayers(), tiny_context(net))
    net = networks.deep_perceptron(trained=False)
    with pytest.raises(RecipeError, match=r"pattern 'block\.0' matches no layer"):
        tie_layers(net, TieLayers(layers=Layers(patterns=("block.0",))), tiny_context(net))
    with pytest.raises(
        StepError, match=r"layers excludes everything that could be tied: blocks\.0"
    ):
        tie_layers(net, TieLayers(layers=Layers(patterns=("blocks.0",))), tiny_context(net))


def test_weaker_settings_end() -> None:
    assert TieLayers(share=0).weaker() == TieLayers(share=2)
    assert TieLayers(share=4).weaker() == TieLayers(share=3)
    assert TieLayers(share=2).weaker() is None
