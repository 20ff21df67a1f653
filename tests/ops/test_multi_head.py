"""The operators that exporters see compute what the modules compute in memory."""

import pytest
import torch
from torch import Tensor

from tersor.ops.multi_head import (
    MultiHead,
    ProjectedHeads,
    multi_head_attention,
    projected_attention,
)


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float
) -> Tensor:
    """One head and one query at a time, in float64; q, k, v (B, L, N * H)."""
    q, k, v = q.double(), k.double(), v.double()
    made, width = torch.zeros_like(q), q.shape[-1] // heads
    for b in range(len(q)):
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            for i in range(q.shape[1]):
                scores = scale * (k[b, :, own] @ q[b, i, own])
                if mask is not None:
                    scores = scores + mask.expand(len(q), heads, -1, -1)[b, h, i]
                shares = (scores - scores.max()).exp()
                made[b, i, own] = (shares / shares.sum()) @ v[b, :, own]
    return made


def causal(rows: int) -> Tensor:
    return torch.full((1, 1, rows, rows), float("-inf")).triu(1)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", ["none", "added", "causal"])
def test_multi_head(apart: bool, kind: str) -> None:
    q, k, v = torch.randn(3, 2, 5, 8)
    mask = torch.randn(2, 1, 5, 5) if kind == "added" else None
    wanted = by_hand(q, k, v, causal(5) if kind == "causal" else mask, 2, 0.3)
    if apart:
        k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (k, v))
    # float32 over sums of at most 5 products
    made = multi_head_attention(q, k, v, mask, 2, 0.3, kind == "causal")
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-5)
    layer = MultiHead(2, 0.3, causal=kind == "causal")
    torch.testing.assert_close(layer(q, k, v, mask), made)


def test_a_mask_of_truth_values_is_added() -> None:
    q, k, v = torch.randn(3, 2, 5, 8)
    seen = torch.rand(2, 1, 1, 5) > 0.4
    seen[..., 0] = True
    mask = torch.zeros(2, 1, 1, 5).masked_fill(~seen, float("-inf")).expand(-1, -1, 5, -1)
    wanted = by_hand(q, k, v, mask, 2, 0.3)
    made = MultiHead(2, 0.3)(q, k, v, seen)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-5)


def test_projections_of_one_input() -> None:
    layer = ProjectedHeads(6, 8, 2, 0.3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 6)
    q, k, v = (
        x.double() @ layer.weight[:, part].double() + layer.bias[part].double()
        for part in (slice(0, 8), slice(8, 16), slice(16, 24))
    )
    wanted = by_hand(q, k, v, None, 2, 0.3)
    made = projected_attention(x, layer.weight, layer.bias, None, 2, 0.3, False)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), made)
    assert ProjectedHeads(**layer.arguments()).arguments() == layer.arguments()


def test_shapes_are_known_without_computing() -> None:
    x = torch.empty(2, 5, 6, device="meta")
    weight, bias = torch.empty(6, 24, device="meta"), torch.empty(24, device="meta")
    assert projected_attention(x, weight, bias, None, 2, 1.0, False).shape == (2, 5, 8)
    assert multi_head_attention(x, x, x, None, 2, 1.0, True).shape == (2, 5, 6)
