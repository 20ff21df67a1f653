"""Magnitude pruning: the sparsity asked for, of the weights that matter least."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.context import Data
from tersor.core.errors import DataError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.distillation.finetune import Finetune, finetune
from tersor.ops import masks
from tersor.pruning.magnitude import Magnitude, magnitude
from tests import networks

Make = Callable[..., Any]
IMPORTANCES = ("l1", "l2", "taylor", "random")


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_sparsity_asked_is_sparsity_found(importance: Any, scope: Any, tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = weights(net)
    context = tiny_context(net)
    config = Magnitude(sparsity=0.6, importance=importance, scope=scope)
    after = weights(magnitude(net, config, context))
    zeros = {name: int((w == 0).sum()) for name, w in after.items()}
    total = sum(w.numel() for w in after.values())
    if scope == "layer":
        assert zeros == {name: int(0.6 * w.numel()) for name, w in after.items()}
    else:
        assert sum(zeros.values()) == int(0.6 * total)
    for name, weight in after.items():
        assert torch.equal(weight[weight != 0], before[name][weight != 0])
    assert context.facts["sparsity"] == round(sum(zeros.values()) / total, 5)
    assert context.facts["sparsity_by_layer"]["fc"] == round(zeros["fc.weight"] / 160, 5)
    assert context.facts["left"] == {}


def test_small_weights_go(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = weights(net)
    after = weights(magnitude(net, Magnitude(sparsity=0.5), tiny_context(net)))
    for name, weight in after.items():
        ordered = sorted(before[name].abs().flatten().tolist())
        threshold = ordered[len(ordered) // 2]
        wanted = [w if abs(w) >= threshold else 0.0 for w in before[name].flatten().tolist()]
        assert weight.flatten().tolist() == wanted


def test_taylor_against_plain_loops(tiny_context: Make) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    batches = [
        {"input": b["x"].double(), "labels": b["labels"]} for b in networks.split(0, 96, size=32)
    ]
    score = torch.zeros(10, 64, dtype=torch.float64)
    weight, bias = net[1].weight.detach(), net[1].bias.detach()  # type: ignore[union-attr, operator]
    for batch in batches:
        x = batch["input"].flatten(1)
        probability = (x @ weight.T + bias).softmax(1)
        error = (probability - torch.eye(10, dtype=torch.float64)[batch["labels"]]) / len(x)
        score += (weight * (error.T @ x)).abs() / 3
    order = score.flatten().argsort(stable=True)[:448]
    from tersor.ops.losses import labelled_loss

    context = tiny_context(net, data=Data(calibration=batches), loss=labelled_loss)
    magnitude(net, Magnitude(sparsity=0.7, importance="taylor"), context)
    found = (net[1].weight.flatten() == 0).nonzero().flatten()  # type: ignore[union-attr, operator]
    assert found.tolist() == sorted(order.tolist())


def test_random_is_decided_by_the_seed(tiny_context: Make) -> None:
    def pruned(seed: int) -> Tensor:
        net = networks.tiny_cnn()
        magnitude(net, Magnitude(importance="random"), tiny_context(net, seed=seed))
        return net.fc.weight  # type: ignore[return-value]

    assert torch.equal(pruned(1), pruned(1))
    assert not torch.equal(pruned(1), pruned(2))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_pruning_more_keeps_what_was_zero(importance: Any, tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    magnitude(net, Magnitude(sparsity=0.4, importance="random"), tiny_context(net))
    first = weights(net)
    config = Magnitude(sparsity=0.7, importance=importance)
    second = weights(magnitude(net, config, tiny_context(net)))
    for name, weight in second.items():
        assert (weight[first[name] == 0] == 0).all()
        assert int((weight == 0).sum()) == int(0.7 * weight.numel())


def test_nothing_asked_changes_nothing(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = weights(net)
    after = weights(magnitude(net, Magnitude(sparsity=0), tiny_context(net)))
    assert all(torch.equal(before[name], weight) for name, weight in after.items())


def test_chosen_layers_only(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    magnitude(net, Magnitude(layers=Layers(patterns=("block*", "!*.conv2"))), context)
    pruned = {n for n, w in weights(net).items() if (w == 0).any()}
    assert pruned == {
        "block1.conv1.weight",
        "block2.conv1.weight",
        "block3.conv1.weight",
        "block2.shortcut.weight",
    }
    assert context.facts["left"]["fc"] == "excluded by layers"


def test_training_after_it_leaves_the_zeros(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    magnitude(net, Magnitude(sparsity=0.8), tiny_context(net))
    before = weights(net)
    after = weights(finetune(net, Finetune(epochs=0.5), tiny_context(net)))
    for name, weight in after.items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert not torch.equal(weight, before[name])
    masks.settle(net)


def test_a_setting_that_cannot_be_is_refused() -> None:
    for sparsity in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"sparsity must be in \[0, 1\), got {sparsity}"):
            Magnitude(sparsity=sparsity)


def test_weaker_leaves_twice_the_weights() -> None:
    tried = [Magnitude(sparsity=0.95)]
    while (weaker := tried[-1].weaker()) is not None:
        tried.append(weaker)
    assert [c.sparsity for c in tried[:4]] == [0.95, 0.9, 0.8, 0.6]
    assert all(b.sparsity < a.sparsity for a, b in itertools.pairwise(tried))


def test_errors_leave_the_network_as_it_was(tiny_context: Make) -> None:
    net = networks.tiny_cnn()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DataError, match="importance taylor needs calibration data with labels"):
        magnitude(net, Magnitude(importance="taylor"), tiny_context(net, data=Data()))
    bad = [{**b, "x": b["x"] * float("nan")} for b in networks.split(0, 64)]
    with pytest.raises(StepError, match="the loss is nan on calibration batch 1; look for NaN"):
        magnitude(
            net, Magnitude(importance="taylor"), tiny_context(net, data=Data(calibration=bad))
        )
    with pytest.raises(UnfitError, match="would leave no weight in layer"):
        magnitude(net, Magnitude(sparsity=0.999, scope="global"), tiny_context(net))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_gradients_that_are_not_numbers_are_named(tiny_context: Make) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x.flatten(1))
            # finite forward, but the gradient of sqrt at 0 is infinite, and 0 * inf is NaN
            return y + (y * 0).abs().sqrt()

    net = Broken()
    with pytest.raises(
        StepError,
        match="the gradient of layer 'fc' is not finite on calibration batch 1; look for NaN in the "
        "data, or use importance: l1",
    ):
        magnitude(net, Magnitude(importance="taylor"), tiny_context(net))


def test_integer_weights_are_refused(tiny_context: Make) -> None:
    from tersor.quantization.weight_only import WeightOnly, weight_only

    net = networks.tiny_cnn()
    context = tiny_context(net)
    rounded = weight_only(net, WeightOnly(), context)
    with pytest.raises(UnfitError, match=r"'conv1': its weights are int8; prune before they are r"):
        magnitude(rounded, Magnitude(), context)


def test_projections_of_attention_are_pruned(tiny_context: Make) -> None:
    net = networks.AttendingRows().eval()
    before = net.attention.in_proj_weight.detach().clone()
    context = tiny_context(net)
    assert magnitude(net, Magnitude(sparsity=0.8), context) is net
    after = net.attention.in_proj_weight.detach()
    assert int((after == 0).sum()) == int(0.8 * after.numel())
    assert float(after[after != 0].abs().min()) >= float(before[after == 0].abs().max())
    assert context.facts["sparsity_by_layer"].keys() == {
        "embed",
        "attention.in_projection",
        "attention.out_proj",
        "fc",
    }
    assert context.facts["sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert context.facts["left"] == {}
    net.attention.in_proj_weight.data[after == 0] = 1.0
    with pytest.raises(
        StepError, match=r"layer 'attention' was pruned to 79\.95% zeros, but 614 of"
    ):
        masks.settle(net)


def test_projections_of_other_widths_are_pruned_by_name(tiny_context: Make) -> None:
    net = networks.AttendingRows(kdim=16, vdim=12)
    layers = Layers(patterns=("*.in_projection_?", "!*_k"))
    context = tiny_context(net)
    magnitude(net, Magnitude(layers=layers), context)
    own = net.attention
    shares = [
        float((w == 0).float().mean())
        for w in (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight, own.out_proj.weight)
    ]
    assert shares == [0.5, 0, 0.5, 0]
    assert context.facts["left"]["attention.in_projection_k"] == "excluded by layers"
    assert masks.settle(net) is net
    assert not [name for name in vars(own) if name.startswith("tersor")]


def test_layers_that_cannot_be_pruned_are_told(tiny_context: Make) -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "gru": nn.GRU(4, 4), "fc": nn.Linear(4, 2)})
    context = tiny_context(net)
    magnitude(net, Magnitude(), context)
    assert context.facts["left"] == {
        "embed": "Embedding: only linear layers and convolutions are pruned",
        "gru": "GRU: only linear layers and convolutions are pruned",
    }
