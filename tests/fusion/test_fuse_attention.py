"""Attention in each of its spellings becomes one operator, and computes what it computed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.candidate import arrays_of, export
from tersor.core.errors import UnfitError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.fusion.fuse_attention import FuseAttention, fuse_attention
from tersor.ops import edits
from tersor.ops.multi_head import MultiHead, ProjectedHeads
from tests import networks

ALL = FuseAttention(convert="all")
ONNXRUNTIME = Target(runtime="onnxruntime", options={"threads": 1})
OPENVINO = Target(runtime="openvino", options={"threads": 1})


class Spelled(nn.Module):
    """One layer of attention; `how` says in which spelling."""

    def __init__(self, how: str, heads: int = 2, width: int = 16) -> None:
        super().__init__()
        self.how, self.heads = how, heads
        self.q, self.k, self.v = (nn.Linear(8, width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("lower", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        batch, rows, _ = x.shape
        q, k, v = (
            layer(x).view(batch, rows, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        width = q.size(-1)
        if self.how == "scaled before":
            scores = (q * width**-0.5) @ k.transpose(-2, -1)
        elif self.how == "scaled keys":
            scores = q @ (k.permute(0, 1, 3, 2) / math.sqrt(width))
        else:
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(width)
        if self.how == "added mask":
            scores = scores + mask
        if self.how == "added before scaling":
            scores = (q @ k.transpose(2, 3) + mask) / 2.0
        if self.how == "causal fill":
            scores = scores.masked_fill(self.lower[:, :, :rows, :rows] == 0, float("-inf"))
        if self.how == "where":
            scores = torch.where(mask > 0, scores, -1e9)
        shares = self.dropout(F.softmax(scores, dim=2 if self.how == "wrong axis" else -1))
        made = (shares @ v).transpose(1, 2).reshape(batch, rows, -1)
        return (made, shares) if self.how == "shares read" else made


def inputs(how: str) -> Inputs:
    example = {"x": torch.randn(2, 5, 8)}
    if how in ("added mask", "added before scaling", "where"):
        example["mask"] = torch.randn(2, 1, 5, 5)
    return Inputs(example=example, dynamic={name: {0: "batch"} for name in example})


def by_hand(net: Spelled, x: Tensor, add: Tensor | None) -> Tensor:
    """Attend head by head, query by query, in float64."""
    x = x.double()
    made = torch.zeros(len(x), x.shape[1], net.q.out_features, dtype=torch.float64)
    width = net.q.out_features // net.heads
    for b in range(len(x)):
        q, k, v = (x[b] @ m.weight.double().T + m.bias.double() for m in (net.q, net.k, net.v))
        for h in range(net.heads):
            own = slice(h * width, (h + 1) * width)
            for i in range(x.shape[1]):
                scores = k[:, own] @ q[i, own] / math.sqrt(width)
                if add is not None:
                    scores = scores + add[min(b, len(add) - 1), 0, i].double()
                shares = scores.exp() / scores.exp().sum()
                made[b, i, own] = shares @ v[:, own]
    return made


@pytest.mark.parametrize(
    "how",
    ["plain", "scaled before", "scaled keys", "added mask", "causal fill", "where"],
)
@pytest.mark.parametrize("target", [ONNXRUNTIME, OPENVINO], ids=["onnxruntime", "openvino"])
def test_spellings_compute_attention(
    how: str, target: Target, tiny_context: Callable[..., Any], tmp_path: Path
) -> None:
    net, given = Spelled(how).eval(), inputs(how)
    x, mask = given.example["x"], given.example.get("mask")
    add = mask
    if how == "causal fill":
        add = torch.full((1, 1, 5, 5), float("-inf")).triu(1)
    elif how == "where":
        assert mask is not None
        add = torch.where(mask > 0, 0.0, -1e9)
    wanted = by_hand(net, x, add)
    context = tiny_context(net, inputs=given, target=target)
    made = fuse_attention(net, ALL, context)
    assert context.facts["written_out"] == 1
    calls = [n for n in made.graph.nodes if n.target in (torch.matmul, torch.softmax, F.softmax)]
    assert not calls
    one = type(made.attention) if target is ONNXRUNTIME else None
    assert one in (ProjectedHeads, None)
    with torch.no_grad():
        # float32 over sums of at most 16 products
        torch.testing.assert_close(made(**given.example).double(), wanted, rtol=1e-4, atol=1e-5)
    edits.store(made, Spelled(how).eval(), tmp_path)
    again = edits.replay(tmp_path, Spelled(how).eval())
    with torch.no_grad():
        assert torch.equal(again(**given.example), made(**given.example))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shares read", r"its probabilities are read more than once"),
        ("wrong axis", r"a softmax over another dimension than the last"),
        ("added before scaling", r"what comes before it is not a product of queries and keys"),
    ],
)
def test_what_cannot_be_fused_is_said(
    how: str, message: str, tiny_context: Callable[..., Any]
) -> None:
    net = Spelled(how).eval()
    with pytest.raises(UnfitError, match=rf"no attention that can be fused \(softmax: {message}"):
        fuse_attention(net, ALL, tiny_context(net, inputs=inputs(how)))


def test_no_attention(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_cnn(trained=False)
    with pytest.raises(UnfitError, match=r"the network has no attention that can be fused$"):
        fuse_attention(net, FuseAttention(), tiny_context(net))


def test_a_call_stays_a_call_where_no_kernel_is_chosen(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_transformer(trained=False)
    context = tiny_context(net, target=Target(runtime="torch_eager"))
    with pytest.raises(UnfitError, match=r"attention is one call already, .* and torch_eager:cpu"):
        fuse_attention(net, ALL, context)


def test_a_kernel_that_is_not_faster_is_not_taken(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_transformer(trained=False)
    context = tiny_context(net, latency=lambda nets: [1.0] * len(nets))
    with pytest.raises(
        UnfitError,
        match=r"not faster here \(plain 1.000 ms, Attention 1.000 ms, MultiHeadAttention",
    ):
        fuse_attention(net, FuseAttention(), context)
    context = tiny_context(net, latency=lambda nets: [1.0, 0.9, 0.8])
    made = fuse_attention(net, FuseAttention(), context)
    assert context.facts["kernels"] == {"MultiHeadAttention": 1}
    assert isinstance(made.attention, MultiHead)


@pytest.mark.parametrize(
    "factory", [networks.tiny_transformer, networks.written_transformer], ids=["call", "written"]
)
def test_onnxruntime_computes_the_same(
    factory: Callable[[], nn.Module], tiny_context: Callable[..., Any], tmp_path: Path
) -> None:
    net, x = factory(), networks.digits()[0][:16]
    with torch.no_grad():
        wanted = net(x)
    made = fuse_attention(net, ALL, tiny_context(net))
    assert isinstance(made.attention, ProjectedHeads)
    candidate = export(made, tmp_path, networks.inputs(), ONNXRUNTIME, arrays_of({"x": x}, ["x"]))
    found = next(iter(candidate.runner.bind({"x": x.numpy()})().values()))
    candidate.close()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-4)
    import onnx

    kinds = [n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Attention") == 1
    assert "Softmax" not in kinds


class Masked(nn.Module):
    """An encoder of torch's own, with padding, and a causal layer on it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor, empty: Tensor) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=empty)
        q, k, v = (m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        # keys are turned, as by a rotary embedding: the projection cannot go into the kernel
        made = F.scaled_dot_product_attention(q, k.roll(1, -1), v, is_causal=True)
        return made.transpose(1, 2).flatten(2)


def test_masks_and_causality_reach_the_kernel(
    tiny_context: Callable[..., Any], tmp_path: Path
) -> None:
    net = Masked().eval()
    example = {"x": torch.randn(3, 6, 16), "empty": torch.zeros(3, 6, dtype=torch.bool)}
    example["empty"][0, 4:] = True
    given = Inputs(example=example, dynamic={name: {0: "batch"} for name in example})
    context = tiny_context(net, inputs=given)
    made = fuse_attention(net, ALL, context)
    assert context.facts["kernels"] == {"Attention": 1, "MultiHeadAttention": 1}
    export(made, tmp_path, given, ONNXRUNTIME, arrays_of(example, ["x", "empty"])).close()


def test_what_is_fused_still_learns(tiny_context: Callable[..., Any]) -> None:
    net = networks.tiny_transformer(trained=False)
    made = fuse_attention(net, ALL, tiny_context(net))
    made(networks.digits()[0][:4]).sum().backward()
    gradient = made.attention.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
