"""Weight sharing: few values, at the means, kept through what comes after."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.context import Data
from tersor.core.errors import DataError, ModelError, RecipeError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.distillation.finetune import Finetune, finetune
from tersor.fusion.fuse_batch_norm import FuseBatchNorm, fuse_batch_norm
from tersor.ops.codebooks import kmeans as plain_kmeans
from tersor.pruning.gradual import Gradual, gradual
from tersor.quantization.static import Static, static
from tersor.weight_sharing.kmeans import Kmeans, kmeans
from tests import networks

Make = Callable[..., Any]


def kernels(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in net.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("clusters", [2, 5, 16])
def test_each_layer_takes_as_many_values_as_asked(clusters: int, tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = {name: w.clone() for name, w in kernels(net).items()}
    context = tiny_context(net)
    kmeans(net, Kmeans(clusters=clusters), context)
    for name, weight in kernels(net).items():
        few = min(clusters, before[name].numel() // 4)
        book = plain_kmeans(before[name].flatten().numpy(), few)
        assert len(weight.unique()) <= few
        nearest = book[np.abs(before[name].flatten().numpy()[:, None] - book).argmin(1)]
        np.testing.assert_allclose(weight.flatten().numpy(), nearest, rtol=1e-6)
    assert context.facts["layers"] == len(before)
    assert set(context.facts["clusters"].values()) == {clusters}


def test_zeros_stay_and_come_in_addition(tiny_context: Make) -> None:
    net = networks.sparse_cnn()
    before = {name: w == 0 for name, w in kernels(net).items()}
    kmeans(net, Kmeans(clusters=4), tiny_context(net))
    for name, weight in kernels(net).items():
        assert torch.equal(weight == 0, before[name])
        assert len(weight.unique()) <= 4 + 1


def test_one_table_for_the_network(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    kmeans(net, Kmeans(clusters=8, scope="network"), tiny_context(net))
    together = torch.cat([w.flatten() for w in kernels(net).values()])
    assert len(together.unique()) <= 8


def test_tables_with_scales_survive_folding_and_make_few_codes(tiny_context: Make) -> None:
    """Folding scales rows; int8 codes are then the same few in every row."""
    net = networks.tiny_cnn()
    kmeans(net, Kmeans(clusters=8, scope="channel"), tiny_context(net))
    folded = fuse_batch_norm(net, FuseBatchNorm(), tiny_context(net))
    made = static(folded, Static(), tiny_context(net))
    for layer in made.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dtype == torch.int8 and weight.dim() > 1:
            assert len(weight.unique()) <= 8


def test_transposed_convolutions_get_a_table_without_scales(tiny_context: Make) -> None:
    net = nn.ConvTranspose2d(6, 10, 3)
    kmeans(net, Kmeans(clusters=8, scope="channel"), tiny_context(networks.tiny_cnn()))
    assert len(net.weight.unique()) <= 8


def test_a_computed_weight_is_left_with_the_reason(tiny_context: Make) -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16))
    context = tiny_context(networks.tiny_cnn())
    kmeans(net, Kmeans(clusters=4), context)
    assert context.facts["left"] == {"0": "it has no float weights of its own"}


def test_pruning_after_sharing_keeps_both(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    kmeans(net, Kmeans(clusters=8), context)
    gradual(net, Gradual(sparsity=0.6, epochs=2, every=1), context)
    for weight in kernels(net).values():
        assert (weight == 0).double().mean() >= 0.55
        assert len(weight.unique()) <= 8 + 1


def test_training_afterwards_moves_the_values_only(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    kmeans(net, Kmeans(clusters=8), context)
    before = {name: w.clone() for name, w in kernels(net).items()}
    finetune(net, Finetune(epochs=1, lr=0.01), context)
    for name, weight in kernels(net).items():
        for value in before[name].unique():
            assert len(weight[before[name] == value].unique()) == 1
        assert not torch.equal(weight, before[name])


def test_a_size_gives_sensitive_layers_more_values(tiny_context: Make) -> None:
    pytest.importorskip("scipy")
    net = networks.tiny_cnn()
    context = tiny_context(net)
    kmeans(net, Kmeans(size=0.1), context)
    clusters, losses = context.facts["clusters"], context.facts["sensitivities"]
    counts = {n: m.weight.numel() for n, m in net.named_modules() if n in clusters}
    bits = {name: int(np.log2(k)) for name, k in clusters.items()}
    total = sum(counts.values())
    assert sum(counts[n] * b for n, b in bits.items()) <= 0.1 * 32 * total
    assert len(set(bits.values())) > 1
    even = dict.fromkeys(bits, 3)  # what the same size gives to all alike
    assert sum(losses[n][str(b)] for n, b in bits.items()) <= sum(
        losses[n][str(b)] for n, b in even.items()
    )


def test_layers_without_enough_weights_are_named(tiny_context: Make) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10), nn.Linear(7, 1))
    context = tiny_context(net)
    kmeans(net, Kmeans(clusters=4, layers=Layers(patterns=("*", "!2"))), context)
    assert context.facts["left"] == {"2": "excluded by layers", "3": "only 7 weights"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"clusters": 1}, "clusters must be 2 to 256, got 1; use 2"),
        ({"clusters": 300}, "clusters must be 2 to 256, got 300; use 256"),
        ({"size": 0.3}, r"size must be from 1/32 \(one bit for each weight\) to 0.25, got 0.3"),
        ({"size": 0.03}, r"size must be from 1/32 \(one bit for each weight\) to 0.25, got 0.03"),
        ({"size": 0.1, "scope": "network"}, "size chooses a table for each layer"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Kmeans(**settings)


def test_what_cannot_be_shared_is_refused(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    untouched = copy.deepcopy(net.state_dict())
    with pytest.raises(RecipeError, match="pattern 'fx' matches no layer"):
        kmeans(net, Kmeans(layers=Layers(patterns=("fx",))), tiny_context(net))
    with pytest.raises(StepError, match="layers excludes everything that could be shared: conv1"):
        kmeans(net, Kmeans(layers=Layers(patterns=("!*",))), tiny_context(net))
    empty = Data()
    with pytest.raises(DataError, match="kmeans: size needs calibration data"):
        kmeans(net, Kmeans(size=0.1), tiny_context(net, data=empty))
    with pytest.raises(UnfitError, match="ReLU has no layer whose weights could be shared"):
        kmeans(nn.ReLU(), Kmeans(), tiny_context(net))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, untouched[name])
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(ModelError, match="layer 'fc' has weights that are NaN or infinite"):
        kmeans(net, Kmeans(), tiny_context(net))


def test_weaker_settings_end(tiny_context: Make) -> None:
    assert Kmeans(clusters=16).weaker() == Kmeans(clusters=32)
    assert Kmeans(clusters=200).weaker() == Kmeans(clusters=256)
    assert Kmeans(clusters=256).weaker() is None
    assert Kmeans(size=0.1).weaker() == Kmeans(size=0.13)
    assert Kmeans(size=0.25).weaker() is None


def test_projections_of_attention_share_too(tiny_context: Make) -> None:
    net = networks.AttendingRows(add_bias_kv=True)
    added = net.attention.bias_k.detach().clone()
    context = tiny_context(net)
    kmeans(net, Kmeans(clusters=8), context)
    assert len(net.attention.in_proj_weight.unique()) == 8
    assert torch.equal(net.attention.bias_k, added)
    assert list(context.facts["clusters"]) == ["embed", "attention", "attention.out_proj", "fc"]
    trained = finetune(net, Finetune(epochs=0.3), tiny_context(net))
    assert len(trained.attention.in_proj_weight.unique()) <= 8


def test_what_attention_holds_has_a_sensitivity_of_its_own(tiny_context: Make) -> None:
    net = networks.AttendingRows()
    context = tiny_context(net)
    kmeans(net, Kmeans(size=0.1), context)
    found = context.facts["sensitivities"]
    assert found.keys() == {"embed", "attention", "attention.out_proj", "fc"}
    assert all(losses["1"] > losses["4"] > losses["8"] > 0 for losses in found.values())
