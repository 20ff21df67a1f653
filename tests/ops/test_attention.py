"""The parts of nn.MultiheadAttention compute what the module does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops import edits
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 4, 32, batch_first=batch_first, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, empty: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=empty)


class Cross(nn.Module):
    def __init__(self, bias: bool = True, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, bias=bias)
        self.weights = weights

    def forward(self, x: Tensor, y: Tensor) -> Any:
        made = self.attention(x, y, y, need_weights=self.weights)
        return made if self.weights else made[0]


def checked(net: nn.Module, example: dict[str, Tensor], other: dict[str, Tensor]) -> Any:
    net.eval()
    inputs = Inputs(example=example)
    captured = capture(copy.deepcopy(net), inputs)
    count = split_attention(captured, inputs)
    with torch.no_grad():
        torch.testing.assert_close(captured(**other), net(**other), atol=1e-5, rtol=1e-5)
    return captured, count


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_with_padding(batch_first: bool, tmp_path: Path) -> None:
    def batch(count: int) -> dict[str, Tensor]:
        x = torch.randn(count, 6, 16)
        empty = torch.zeros(count, 6, dtype=torch.bool)
        empty[0, 4:] = True
        return {"x": x if batch_first else x.transpose(0, 1), "empty": empty}

    net = Encoder(batch_first)
    captured, count = checked(net, batch(2), batch(5))
    assert count == 2
    assert not any(isinstance(m, nn.MultiheadAttention) for m in captured.modules())
    names = [name for name, m in captured.named_modules() if isinstance(m, nn.Linear)]
    assert "encoder.layers.1.self_attn.in_projection" in names
    edits.store(captured, net, tmp_path)
    again, other = edits.replay(tmp_path, net), batch(3)
    with torch.no_grad():
        assert torch.equal(again(**other), captured(**other))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_across_two_sequences(bias: bool) -> None:
    def batch(count: int) -> dict[str, Tensor]:
        return {"x": torch.randn(5, count, 16), "y": torch.randn(7, count, 16)}

    captured, count = checked(Cross(bias), batch(2), batch(3))
    assert count == 1
    assert captured.attention.in_projection_k.in_features == 16


def test_what_uses_the_weights_stays() -> None:
    def batch(count: int) -> dict[str, Tensor]:
        return {"x": torch.randn(5, count, 16), "y": torch.randn(7, count, 16)}

    _, count = checked(Cross(weights=True), batch(2), batch(2))
    assert count == 0
