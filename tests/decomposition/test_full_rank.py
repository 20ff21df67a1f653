"""At full rank every decomposition computes what the layer did, whatever its geometry."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core import plugins
from tests.decomposition.single import CONVOLUTIONS, OTHERS, context, single

LAYERS = {**CONVOLUTIONS, **OTHERS, "linear": lambda: nn.Linear(12, 8)}
EXACT = 1e-5


def full(name: str, layer: Any) -> dict[str, Any] | None:
    """Return the settings of full rank, None where the technique does not know the layer."""
    rows, columns = layer.weight.flatten(1).shape
    groups = getattr(layer, "groups", 1)
    if name in ("svd", "activation_svd"):
        return {"rank": min(rows // groups, columns)}
    if not hasattr(layer, "kernel_size"):
        return None
    inputs = layer.in_channels // groups
    if name == "tucker":
        return {"ranks": (inputs, rows // groups)}
    if name == "spatial_svd" and len(layer.kernel_size) == 2:
        high, wide = layer.kernel_size
        return {"rank": min(rows // groups * wide, inputs * high)}
    if name == "grouped_convolution" and groups == 1:
        return {"multiplier": min(rows, columns // inputs)}
    return None


CASES = [
    (name, kind)
    for name in ("svd", "activation_svd", "spatial_svd", "tucker", "grouped_convolution")
    for kind, make in LAYERS.items()
    if full(name, make())
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_full_rank_is_exact(name: str, kind: str, tmp_path: Path) -> None:
    net, x = single(LAYERS[kind])
    found = plugins.technique(name)
    config = found.config(**full(name, net.layer), convert="all")  # type: ignore[arg-type]
    given = context(net, x, tmp_path)
    made = found.apply(copy.deepcopy(net), config, given)
    wanted = net(x)
    assert made(x).shape == wanted.shape
    assert (made(x) - wanted).norm() <= EXACT * wanted.norm()
    assert given.facts["layers"]["layer"]["loss"] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *OTHERS])
def test_lower_ranks_keep_the_shape_and_lose_what_they_say(kind: str, tmp_path: Path) -> None:
    """White inputs: the share of outputs lost is that of the weights, up to the sample."""
    for name, settings in (
        ("svd", {"rank": 3}),
        ("spatial_svd", {"rank": 3}),
        ("tucker", {"ranks": (3, 4)}),
        ("cp", {"rank": 10}),
    ):
        net, x = single(LAYERS[kind])
        if name == "spatial_svd" and x.dim() != 4:
            continue
        found = plugins.technique(name)
        given = context(net, x, tmp_path)
        made = found.apply(copy.deepcopy(net), found.config(**settings, convert="all"), given)
        assert made(x).shape == net(x).shape
        loss = given.facts["layers"]["layer"]["loss"]
        bias = net.layer.bias
        shift = 0 if bias is None else bias.view(-1, *[1] * (x.dim() - 2))
        seen = (made(x) - net(x)).square().sum() / (net(x) - shift).square().sum()
        assert seen.item() == pytest.approx(loss, rel=0.5), name
        assert all(type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) for m in made.layer)


def test_inputs_that_are_not_white_are_what_activation_svd_looks_at(tmp_path: Path) -> None:
    """Inputs live in few directions: a low rank that knows them loses nothing, svd does."""
    net, x = single(lambda: nn.Linear(12, 8))
    x = torch.randn(200, 2) @ torch.randn(2, 12)
    lost = {}
    for name in ("svd", "activation_svd"):
        found = plugins.technique(name)
        given = context(net, x, tmp_path)
        made = found.apply(copy.deepcopy(net), found.config(rank=2, convert="all"), given)
        lost[name] = ((made(x) - net(x)).norm() / net(x).norm()).item()
    assert lost["activation_svd"] < 0.02 < lost["svd"]
