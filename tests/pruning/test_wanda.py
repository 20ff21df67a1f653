"""Wanda, against plain loops."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.context import Data
from tersor.core.errors import DataError, ModelError, RecipeError, StepError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.ops import masks
from tersor.pruning.sparsegpt import Sparsegpt, sparsegpt
from tersor.pruning.wanda import Wanda, wanda
from tersor.quantization.weight_only import WeightOnly, weight_only
from tests import networks


def reference(
    weight: np.ndarray, x: np.ndarray, sparsity: float, n: int = 0, m: int = 0, ria: bool = False
) -> Any:
    """Algorithm 1 of the paper in float64: (outputs, inputs) and (tokens, inputs) -> weights."""
    made = weight.astype(np.float64).copy()
    norms = [np.sqrt(sum(float(v) ** 2 for v in x[:, j])) for j in range(x.shape[1])]
    columns = [sum(abs(float(v)) for v in weight[:, j]) for j in range(x.shape[1])]
    for row in made:
        scores = [abs(row[j]) * norms[j] for j in range(len(row))]
        if ria:
            own = sum(abs(v) for v in row)
            scores = [
                (abs(row[j]) / own + abs(row[j]) / columns[j]) * norms[j] ** 0.5
                for j in range(len(row))
            ]
        spans = [range(i, i + m) for i in range(0, len(row), m)] if m else [range(len(row))]
        for span in spans:
            drop = m - n if m else int(sparsity * len(row))
            for j in sorted(span, key=lambda j: scores[j])[:drop]:
                row[j] = 0.0
    return made


class Two(nn.Module):
    """Two linear layers: the second one's inputs depend on what the first has lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 12)
        self.second = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def two(tiny_context: Any, count: int = 48) -> tuple[nn.Module, torch.Tensor, Any]:
    net = Two().eval()
    x = torch.randn(count, 16) * torch.logspace(-1, 1, 16)
    inputs = Inputs(example={"x": x[:4]}, dynamic={"x": {0: "batch"}})
    batches = [{"x": part} for part in x.split(20)]
    context = tiny_context(net, inputs=inputs, data=Data(calibration=batches))
    return net, x, context


@pytest.mark.parametrize(
    "config",
    [
        Wanda(sparsity=0.4),
        Wanda(),
        Wanda(pattern="2:4"),
        Wanda(sparsity=0.4, score="ria"),
        Wanda(pattern="2:4", score="ria"),
    ],
)
def test_weights_are_those_of_the_reference(tiny_context: Any, config: Wanda) -> None:
    net, x, context = two(tiny_context)
    before = copy.deepcopy(net)
    made: Any = wanda(net, config, context)
    amount: Any = (0.0, 2, 4) if config.pattern else (config.sparsity or 0.5,)
    ria = config.score == "ria"
    first = reference(before.first.weight.detach().numpy(), x.numpy(), *amount, ria=ria)
    assert np.array_equal(made.first.weight.detach().numpy(), first.astype(np.float32))
    hidden = np.tanh(x.double().numpy() @ first.T + before.first.bias.detach().double().numpy())
    second = reference(before.second.weight.detach().numpy(), hidden, *amount, ria=ria)
    assert np.array_equal(made.second.weight.detach().numpy(), second.astype(np.float32))
    assert context.facts["samples"] == 48


def test_rows_and_columns_of_zeros_are_no_trouble(tiny_context: Any) -> None:
    net, _, context = two(tiny_context)
    with torch.no_grad():
        net.first.weight[3] = 0
        net.first.weight[:, 5] = 0
    made: Any = wanda(net, Wanda(score="ria"), context)
    assert torch.isfinite(made.first.weight).all()
    assert ((made.first.weight == 0).sum(dim=1) >= 8).all()


def test_convolutions_are_matrices_over_their_windows(tiny_context: Any) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2)).eval()
    x = torch.randn(5, 4, 6, 6)
    inputs = Inputs(example={"input": x})
    context = tiny_context(net, inputs=inputs, data=Data(calibration=[{"input": x}]))
    weight = net[0].weight.detach().clone()
    wanda(net, Wanda(sparsity=0.5), context)
    windows = torch.nn.functional.unfold(x, 3, padding=1)  # (5, 4 * 9, 36)
    for group in range(2):
        rows = windows[:, group * 18 : (group + 1) * 18].transpose(1, 2).reshape(-1, 18).numpy()
        own = slice(group * 3, (group + 1) * 3)
        wanted = reference(weight[own].flatten(1).numpy(), rows, 0.5)
        found = net[0].weight.detach()[own].flatten(1).numpy()
        assert np.array_equal(found, wanted.astype(np.float32))


def test_sparsity_asked_is_sparsity_found(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = wanda(copy.deepcopy(net), Wanda(sparsity=0.75), context)
    for name, layer in made.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            row = layer.weight[0].numel()
            assert ((layer.weight.flatten(1) == 0).sum(1) == int(0.75 * row)).all(), name
            assert context.facts["sparsity_by_layer"][name] == pytest.approx(
                int(0.75 * row) / row, abs=1e-4
            )
    masks.settle(made)


def test_nothing_to_do_changes_nothing(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    made = wanda(copy.deepcopy(net), Wanda(sparsity=0.0), tiny_context(net))
    for key, tensor in net.state_dict().items():
        assert torch.equal(made.state_dict()[key], tensor)


def test_zeros_stay_through_training_in_the_stage(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = wanda(copy.deepcopy(net), Wanda(pattern="2:4"), context)
    weight = made.get_submodule("block1.conv1").weight
    zero = weight == 0
    before = weight.detach().clone()
    trained = context.fit(made, context.loss, batches=context.data.train, epochs=1, seed=0)
    after = trained.get_submodule("block1.conv1").weight
    assert torch.equal(after == 0, zero)
    assert not torch.equal(after, before)
    masks.settle(trained)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.5}, r"sparsity must be in \[0, 1\), got -0.5"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give sparsity or pattern, not both"),
        ({"pattern": "4:4"}, 'pattern must be "N:M" with 0 < N < M, such as "2:4", got \'4:4\''),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Wanda(**settings)


def test_weaker_settings() -> None:
    assert Wanda().weaker() == Wanda(sparsity=0.35)
    assert Wanda(sparsity=0.9).weaker() == Wanda(sparsity=0.8)
    assert Wanda(pattern="2:4").weaker() == Wanda(pattern="3:4")
    assert Wanda(pattern="3:4").weaker() is None


def test_bad_calibration_data(tiny_context: Any) -> None:
    net, x, context = two(tiny_context)
    before = copy.deepcopy(net.state_dict())
    spoiled = x.clone()
    spoiled[30, 3] = float("nan")
    for batches, text in (
        (None, "calibration data is needed: a few hundred samples"),
        ([], "the calibration data holds no batch"),
        ([{"x": x[:, :8]}], r"calibration batch 0: 'x' has shape \(48, 8\), expected \(any, 16\)"),
        ([{"x": x[:9]}, {"x": spoiled}], "calibration batch 1: 'x' holds NaN or infinity in 1"),
    ):
        bad = replace(context, data=Data(calibration=batches))
        with pytest.raises(DataError, match=text):
            wanda(net, Wanda(), bad)
    with torch.no_grad():
        net.first.bias[2] = float("nan")  # tanh keeps it
    with pytest.raises(
        DataError, match="calibration batch 0 gives NaN or infinity at the input of 'second'"
    ):
        wanda(net, Wanda(), context)
    with torch.no_grad():
        net.first.bias.copy_(before["first.bias"])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_networks_that_do_not_fit(tiny_context: Any) -> None:
    net, _, context = two(tiny_context)
    with pytest.raises(RecipeError, match=r"pattern 'secnd' matches no layer. Did you mean 'secon"):
        wanda(net, Wanda(layers=Layers(patterns=("secnd",))), context)
    with pytest.raises(StepError, match="layers excludes everything that could be pruned: first"):
        wanda(net, Wanda(layers=Layers(patterns=("!*",))), context)
    with pytest.raises(UnfitError, match="wanda: 2:5 needs input channels in multiples of 5, but"):
        wanda(net, Wanda(pattern="2:5"), context)

    with torch.no_grad():
        net.second.weight[1, 3] = float("nan")
    with pytest.raises(StepError, match="layer 'second': 1 of 72 weights are NaN or infinite; rep"):
        wanda(net, Wanda(), context)
    net.second.weight.data[1, 3] = 0.0

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    with pytest.raises(ModelError, match="the content of a tensor is used as a condition"):
        wanda(Decides().eval(), Wanda(), context)
    rounded = weight_only(networks.tiny_transformer(), WeightOnly(), tiny_context(net))
    with pytest.raises(
        UnfitError, match=r"no layer of TinyTransformer can be pruned .'embed': its"
    ):
        wanda(rounded, Wanda(), tiny_context(net))


def test_projections_of_attention_are_pruned_in_the_users_own_class(tiny_context: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
            return made

    net = Net().eval()
    x = torch.randn(6, 5, 16)
    inputs = Inputs(example={"x": x}, dynamic={"x": {0: "batch"}})
    context = tiny_context(net, inputs=inputs, data=Data(calibration=[{"x": x}]))
    before = net.attention.in_proj_weight.detach().clone()
    made = wanda(net, Wanda(), context)
    assert made is net
    found = net.attention.in_proj_weight.detach().numpy()
    wanted = reference(before.numpy(), x.flatten(0, 1).numpy(), 0.5)
    assert np.array_equal(found, wanted.astype(np.float32))
    assert ((net.attention.out_proj.weight == 0).sum(1) == 8).all()


def test_weights_of_another_float_type_keep_it(tiny_context: Any) -> None:
    net, x, context = two(tiny_context)
    net, x = net.bfloat16(), x.bfloat16()
    inputs = Inputs(example={"x": x[:4]}, dynamic={"x": {0: "batch"}})
    context = replace(context, inputs=inputs, data=Data(calibration=[{"x": x}]))
    for apply, config in ((wanda, Wanda()), (sparsegpt, Sparsegpt(pattern="2:4"))):
        made: Any = apply(copy.deepcopy(net), config, context)  # type: ignore[operator]  # of its own config
        assert made.first.weight.dtype is torch.bfloat16
        assert int((made.first.weight == 0).sum()) == 12 * 8


def test_attention_that_is_not_split_is_told(tiny_context: Any) -> None:
    context = tiny_context(net := networks.AttendingRows(add_bias_kv=True).eval())
    wanda(net, Wanda(), context)
    reason = "inside attention of a form that is not split into layers, so its inputs are unknown"
    assert context.facts["left"] == {
        "attention.in_projection": reason,
        "attention.out_proj": reason,
    }
