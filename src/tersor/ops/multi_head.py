"""Attention over all heads as one operator, which ONNX Runtime has beyond the ONNX standard.

In memory it is torch's scaled dot product attention, and trains; an exporter sees an operator of
tersor's, which `ops.onnx_translations` writes as ONNX Runtime's Attention or MultiHeadAttention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# B samples, L queries, S keys, N heads, H channels of a head, I channels of an input


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    q, k, v = (x if x.dim() == 4 else _split(x, heads) for x in (query, key, value))
    made = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return made.transpose(1, 2).flatten(2)


def _split(x: Tensor, heads: int) -> Tensor:
    made: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]  # torch has no types for it
    return made


@torch.library.custom_op("tersor::multi_head_attention", mutates_args=())
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """Attend with every head, and put the heads side by side.

    Args:
        query: (B, L, N * H).
        key: (B, S, N * H), or (B, N, S, H) as heads already are.
        value: In the form of `key`.
        mask: Added to the products: (B or 1, N or 1, L, S). None: nothing is.
        heads: N.
        scale: Of the products.
        causal: Whether a query sees no later key.

    Returns:
        (B, L, N * H).
    """
    return _attend(query, key, value, mask, heads, scale, causal).contiguous()


@multi_head_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    del key, value, mask, heads, scale, causal
    return torch.empty_like(query)


@register_flop_formula(torch.ops.tersor.multi_head_attention)
def _(query: torch.Size, key: torch.Size, *rest: Any, **more: Any) -> int:
    del rest, more
    samples, queries, width = query
    return 4 * samples * queries * key[-2] * width


@torch.library.custom_op("tersor::projected_attention", mutates_args=())
def projected_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """Project an input (B, L, I) to queries, keys and values, and attend with every head.

    Args:
        x: (B, L, I).
        weight: (I, 3 * N * H): of queries, keys, values.
        bias: (3 * N * H).
        mask: As of `multi_head_attention`.
        heads: N.
        scale: Of the products.
        causal: Whether a query sees no later key.

    Returns:
        (B, L, N * H).
    """
    q, k, v = (x @ weight + bias).chunk(3, dim=-1)
    return _attend(q, k, v, mask, heads, scale, causal).contiguous()


@projected_attention.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    del bias, mask, heads, scale, causal
    return x.new_empty((*x.shape[:-1], weight.shape[1] // 3))


@register_flop_formula(torch.ops.tersor.projected_attention)
def _(x: torch.Size, weight: torch.Size, *rest: Any, **more: Any) -> int:
    del rest, more
    samples, rows, _ = x
    return 2 * samples * rows * (weight.numel() + 2 * rows * weight[1] // 3)


def _additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Turn a mask of truth values into one that is added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, float("-inf"))


def _full(mask: Tensor | None, rows: int) -> Tensor | None:
    """Give a mask four dimensions and a row for each query, as the operators want it."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask if mask.shape[2] != 1 else mask.expand(-1, -1, rows, -1)


class MultiHead(nn.Module):
    """Scaled dot product attention of several heads, with nothing to learn.

    Args:
        heads: N.
        scale: Of the products of queries and keys.
        causal: Whether a query sees no later key.
    """

    heads: int
    scale: float
    causal: bool

    def __init__(self, heads: int, scale: float, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.scale, self.causal = heads, scale, causal

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"heads": self.heads, "scale": self.scale, "causal": self.causal}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend; as `multi_head_attention`, and a mask may also be of truth values."""
        mask, settings = _additive(mask, query), (self.heads, self.scale, self.causal)
        if not torch.compiler.is_exporting():
            return _attend(query, key, value, mask, *settings)
        full = _full(mask, query.shape[1])
        made: Tensor = multi_head_attention(query, key, value, full, *settings)
        return made


class ProjectedHeads(nn.Module):
    """Self-attention of several heads together with the projections of its one input.

    Args:
        inputs: I.
        width: N * H.
        heads: N.
        scale: Of the products of queries and keys.
        causal: Whether a query sees no later key.
    """

    inputs: int
    width: int
    heads: int
    scale: float
    causal: bool
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, inputs: int, width: int, heads: int, scale: float, causal: bool = False
    ) -> None:
        super().__init__()
        self.inputs, self.width, self.heads = inputs, width, heads
        self.scale, self.causal = scale, causal
        self.weight = nn.Parameter(torch.zeros(inputs, 3 * width))
        self.bias = nn.Parameter(torch.zeros(3 * width))

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("inputs", "width", "heads", "scale", "causal")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Project and attend; as `projected_attention`, and a mask may be of truth values."""
        mask, settings = _additive(mask, x), (self.heads, self.scale, self.causal)
        if not torch.compiler.is_exporting():
            q, k, v = (x @ self.weight + self.bias).chunk(3, dim=-1)
            return _attend(q, k, v, mask, *settings)
        full = _full(mask, x.shape[1])
        made: Tensor = projected_attention(x, self.weight, self.bias, full, *settings)
        return made
