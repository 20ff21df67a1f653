"""Outputs stay, batch norms go, the class is the user's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tersor.core.errors import StepError
from tersor.core.layers import Layers
from tersor.fusion.fuse_batch_norm import FuseBatchNorm, fuse_batch_norm
from tests import networks


def test_outputs_stay_and_batch_norms_go(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_cnn()
    x = networks.digits()[0][:50]
    wanted = net(x)
    context = tiny_context(net)
    fused = fuse_batch_norm(net, FuseBatchNorm(), context)
    assert type(fused) is networks.TinyCnn
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert type(fused.block1.bn1) is nn.Identity
    # float32, seven layers: rounding only
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)
    assert context.facts == {"folded": 7, "left": []}


def test_layers_chooses(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    fuse_batch_norm(net, FuseBatchNorm(layers=Layers(patterns=("block1.*", "!*.conv2"))), context)
    assert context.facts["folded"] == 1
    assert type(net.block1.bn1) is nn.Identity
    assert "block1.bn2" in context.facts["left"]


def test_misspelt_layer(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_cnn()
    config = FuseBatchNorm(layers=Layers(patterns=("block1.conv9",)))
    with pytest.raises(
        StepError,
        match=r"'block1.conv9' matches no layer with a batch norm behind it. Did you mean 'block1.conv",
    ):
        fuse_batch_norm(net, config, tiny_context(net))


def test_nothing_to_fold_is_said(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_transformer(trained=False)
    context = tiny_context(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert fuse_batch_norm(net, FuseBatchNorm(), context) is net
    assert context.facts["folded"] == 0
    assert "no batch norm" in context.facts["note"]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_real_networks(workload: Callable[[str], Any], tiny_context: Callable[..., Any]) -> None:
    from tersor.core.model import Inputs

    for name, factory, shape, count in (
        ("cifar", "resnet20", (2, 3, 32, 32), 19),
        ("fashion", "mobilenet_v2", (2, 1, 28, 28), 52),
    ):
        net = getattr(workload(name), factory)()
        x = torch.randn(shape)
        with torch.no_grad():
            wanted = net(x)
            context = tiny_context(net, inputs=Inputs(example={"x": x}))
            found = fuse_batch_norm(net, FuseBatchNorm(), context)(x)
        assert context.facts["folded"] == count
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
