"""SparseGPT, against the algorithm written out with an inverse for every column."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.context import Data
from tersor.core.errors import DataError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.ops import masks
from tersor.pruning.magnitude import Magnitude, magnitude
from tersor.pruning.sparsegpt import Sparsegpt, sparsegpt
from tersor.pruning.wanda import Wanda, wanda
from tests import networks


def reference(weight: np.ndarray, x: np.ndarray, config: Sparsegpt) -> np.ndarray:
    """Optimal brain surgeon with fixed columns, in float64.

    Column i is pruned with those before it fixed: the inverse is that of the Hessian of the
    columns from i on (arXiv:2301.00774, equations 3 to 5), computed anew for each of them.
    """
    w = weight.astype(np.float64).copy()
    rows, columns = w.shape
    hessian = 2 * x.astype(np.float64).T @ x.astype(np.float64)
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1.0
            w[:, j] = 0.0
    hessian += config.damp * hessian.diagonal().mean() * np.eye(columns)
    inverses = [np.linalg.inv(hessian[i:, i:]) for i in range(columns)]
    n, m = (int(t) for t in config.pattern.split(":")) if config.pattern else (0, 0)
    keep = np.ones((rows, columns), dtype=bool)
    for i in range(columns):
        if not m and i % config.block_size == 0:
            stop = min(i + config.block_size, columns)
            scores = {
                (r, j): w[r, j] ** 2 / inverses[j][0, 0]
                for r in range(rows)
                for j in range(i, stop)
            }
            share = 0.5 if config.sparsity is None else config.sparsity
            for r, j in sorted(scores, key=lambda at: scores[at])[: int(share * len(scores))]:
                keep[r, j] = False
        for r in range(rows):
            if m and i % m == 0:
                ranked = sorted(range(i, i + m), key=lambda j: w[r, j] ** 2 / inverses[j][0, 0])
                keep[r, ranked[: m - n]] = False
            if not keep[r, i]:
                w[r, i:] -= w[r, i] / inverses[i][0, 0] * inverses[i][0]
                w[r, i] = 0.0
    return w


def layer(tiny_context: Any, config: Sparsegpt, x: torch.Tensor) -> tuple[Any, Any, Any]:
    net = nn.Sequential(nn.Linear(x.shape[1], 7)).eval()
    weight = net[0].weight.detach().clone().numpy()
    context = tiny_context(
        net,
        inputs=Inputs(example={"input": x[:2]}, dynamic={"input": {0: "batch"}}),
        data=Data(calibration=[{"input": part} for part in x.split(30)]),
    )
    sparsegpt(net, config, context)
    return weight, net[0].weight.detach().numpy(), context


def correlated(columns: int = 24, rows: int = 100) -> torch.Tensor:
    return torch.randn(rows, columns) @ torch.randn(columns, columns)


@pytest.mark.parametrize(
    "config",
    [
        Sparsegpt(),
        Sparsegpt(sparsity=0.7, block_size=8),
        Sparsegpt(sparsity=0.3, block_size=10),
        Sparsegpt(sparsity=0.5, block_size=1),
        Sparsegpt(pattern="2:4"),
        Sparsegpt(pattern="1:4", block_size=8),
        Sparsegpt(pattern="4:8", block_size=16, damp=0.1),
    ],
)
def test_weights_are_those_of_the_reference(tiny_context: Any, config: Sparsegpt) -> None:
    x = correlated()
    x[:, 5] = 0  # a dead input
    weight, found, context = layer(tiny_context, config, x)
    wanted = reference(weight, x.numpy(), config)
    assert np.array_equal(found == 0, wanted == 0)
    # the factor is rounded to float32 once, the updates 24 times
    assert np.allclose(found, wanted, atol=1e-4)
    assert (found[:, 5] == 0).all()
    lost = np.square(x.numpy() @ (found - weight).T).sum() / np.square(x.numpy() @ weight.T).sum()
    recorded = context.facts["relative_squared_errors"]["0"]
    assert recorded == pytest.approx(lost, rel=1e-3)


def test_the_error_is_less_than_without_adjusting(tiny_context: Any) -> None:
    x = correlated()
    weight, found, _ = layer(tiny_context, Sparsegpt(), x)
    plain = np.where(found == 0, 0.0, weight)
    error = [np.square(x.numpy() @ (made - weight).T).sum() for made in (found, plain)]
    assert error[0] < 0.75 * error[1]


def test_sparsity_asked_is_sparsity_found(tiny_context: Any) -> None:
    for config, zeros in (
        (Sparsegpt(sparsity=0.6, block_size=8), 3 * int(0.6 * 7 * 8)),
        (Sparsegpt(sparsity=0.0), 0),
        (Sparsegpt(pattern="1:4"), 7 * 18),
    ):
        _, found, _ = layer(tiny_context, config, correlated())
        assert (found == 0).sum() == zeros


def test_nothing_to_prune_changes_nothing(tiny_context: Any) -> None:
    weight, found, _ = layer(tiny_context, Sparsegpt(sparsity=0.0), correlated())
    assert np.array_equal(weight, found)


def test_groups_of_a_convolution_are_layers_of_their_own(tiny_context: Any) -> None:
    net = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, groups=2)).eval()
    x = torch.randn(6, 8, 5, 5)
    context = tiny_context(
        net, inputs=Inputs(example={"input": x}), data=Data(calibration=[{"input": x}])
    )
    weight = net[0].weight.detach().clone()
    config = Sparsegpt(pattern="2:4", block_size=12)
    sparsegpt(net, config, context)
    windows = torch.nn.functional.unfold(x, 3, padding=1).view(6, 2, 4, 9, 25)
    for group in range(2):
        own = slice(group * 3, (group + 1) * 3)
        # columns: kernel position, then input channel
        rows = windows[:, group].permute(0, 3, 2, 1).reshape(-1, 36).numpy()
        wanted = reference(weight[own].permute(0, 2, 3, 1).flatten(1).numpy(), rows, config)
        found = net[0].weight.detach()[own].permute(0, 2, 3, 1).flatten(1).numpy()
        assert np.array_equal(found == 0, wanted == 0)
        assert np.allclose(found, wanted, atol=1e-4)


def test_the_published_order_on_a_trained_network(tiny_context: Any) -> None:
    """Mean squared error of outputs on images that nothing was calibrated on."""
    net = networks.tiny_transformer()
    x = networks.digits()[0][1200:]
    errors = []
    for apply, config in (
        (magnitude, Magnitude(sparsity=0.5)),
        (wanda, Wanda(sparsity=0.5)),
        (sparsegpt, Sparsegpt(sparsity=0.5)),
    ):
        made = apply(copy.deepcopy(net), config, tiny_context(net))  # type: ignore[operator]  # of its own config
        with torch.no_grad():
            errors.append(float((made(x) - net(x)).square().mean()))
        masks.settle(made)
    assert errors[0] > errors[1] > errors[2], errors


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sparsity": 1}, r"sparsity must be in \[0, 1\), got 1"),
        ({"pattern": "4:2"}, 'pattern must be "N:M" with 0 < N < M'),
        ({"pattern": "2:6"}, "block_size must be a multiple of the 6 in pattern '2:6', got 128"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"damp": 0.0}, "damp must be above 0, got 0.0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Sparsegpt(**settings)


def test_weaker_settings() -> None:
    assert Sparsegpt(block_size=64).weaker() == Sparsegpt(sparsity=0.35, block_size=64)
    assert Sparsegpt(pattern="1:4").weaker() == Sparsegpt(pattern="2:4")


def test_a_failure_in_the_middle_leaves_the_network_as_it_was(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    net.block3.conv1.weight.data[0, 0, 0, 0] = float("nan")
    before = copy.deepcopy(net.state_dict())
    context = tiny_context(net)
    with pytest.raises(DataError, match=r"gives NaN or infinity at the input of 'block3.conv2'"):
        sparsegpt(net, Sparsegpt(layers=Layers(patterns=("!block3.conv1",))), context)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[key].nan_to_num())
    net.block3.conv1.weight.data.nan_to_num_()
    with pytest.raises(DataError, match="calibration data is needed"):
        sparsegpt(net, Sparsegpt(), replace(context, data=Data()))
    with pytest.raises(UnfitError, match="sparsegpt: 1:3 needs input channels in multiples of 3"):
        sparsegpt(net, Sparsegpt(pattern="1:3", block_size=9), context)
