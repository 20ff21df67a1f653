"""Layers with int8 weights whose inputs become bytes while they run, with a scale of the moment.

Each computes what ONNX's DynamicQuantizeLinear and MatMulInteger do, through an operator of torch's
that `ops.onnx_translations` writes as those.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from tersor.ops.modules import QuantLinear
from tersor.ops.quantize import symmetric_codes

# T steps, B samples, D directions, I inputs, H hidden units. Gates of an LSTM come as ONNX has
# them: input, output, forget, cell.


def _bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes less their zero, 0..255 as floats, and the scale of a whole tensor."""
    low, high = torch.aminmax(x)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round().clamp(0, 255)
    return (x / scale).round_().add_(zero).clamp_(0, 255).sub_(zero), scale


@torch.library.custom_op("tersor::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply the bytes of `x` (..., I) by int8 codes (O, I)."""
    taken, step = _bytes(x)
    made = (taken @ codes.to(x.dtype).T) * (step * scale)
    return made if bias is None else made + bias


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    del scale, bias
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("tersor::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    recurrent: Tensor,
    recurrent_scale: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer of an LSTM; its input is rounded as a whole, its hidden state every step.

    Args:
        x: (T, B, I).
        weight: int8 (D, I, 4H).
        weight_scale: (D, 4H).
        recurrent: int8 (D, H, 4H).
        recurrent_scale: (D, 4H).
        bias: (D, 8H), of the input and of the hidden state; None: no bias.
        hidden: (D, B, H).
        cell: (D, B, H).

    Returns:
        Outputs (T, B, D * H), the last hidden state and the last cell state (D, B, H).
    """
    steps = x.shape[0]
    taken, step = _bytes(x)
    sides, hiddens, cells = [], [], []
    for d in range(weight.shape[0]):
        gates = (taken @ weight[d].to(x.dtype)) * (step * weight_scale[d])
        if bias is not None:
            gates = gates + bias[d].view(2, -1).sum(0)
        back = recurrent[d].to(x.dtype)
        h, c = hidden[d], cell[d]
        outputs: list[Tensor] = []
        for t in range(steps) if d == 0 else reversed(range(steps)):
            state, own = _bytes(h)
            now = gates[t] + (state @ back) * (own * recurrent_scale[d])
            i, o, f, g = now.chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        sides.append(torch.stack(outputs if d == 0 else outputs[::-1]))
        hiddens.append(h)
        cells.append(c)
    return torch.cat(sides, dim=2), torch.stack(hiddens), torch.stack(cells)


@dynamic_lstm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    recurrent: Tensor,
    recurrent_scale: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    del weight_scale, recurrent_scale, bias
    width = weight.shape[0] * recurrent.shape[1]
    made = x.new_empty((x.shape[0], x.shape[1], width))
    return made, torch.empty_like(hidden), torch.empty_like(cell)


@register_flop_formula(torch.ops.tersor.dynamic_linear)
def _(x: torch.Size, codes: torch.Size, *rest: Any, **more: Any) -> int:
    del rest, more
    return 2 * x.numel() * codes[0]


@register_flop_formula(torch.ops.tersor.dynamic_lstm)
def _(
    x: torch.Size,
    weight: torch.Size,
    weight_scale: torch.Size,
    recurrent: torch.Size,
    *rest: Any,
    **more: Any,
) -> int:
    del weight_scale, rest, more
    return 2 * x[0] * x[1] * (weight.numel() + recurrent.numel())


class QuantDynamicLinear(QuantLinear):
    """Linear with int8 weights; its input is rounded to 8 bits as it comes."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply in integers."""
        made: Tensor = dynamic_linear(input, self.weight, self.scale, self.bias)
        return made

    @classmethod
    def of(cls, layer: nn.Linear, scale_O: Tensor) -> "QuantDynamicLinear":
        """Round a linear layer; the bias is shared."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        made.weight = symmetric_codes(layer.weight.detach(), scale_O)
        made.scale, made.bias = scale_O, layer.bias
        return made.train(layer.training)


class QuantDynamicLSTM(nn.Module):
    """LSTM with int8 weights, one scale for each row of each gate; takes what nn.LSTM takes."""

    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    bidirectional: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias: bool = bias
        self.batch_first, self.bidirectional = batch_first, bidirectional
        sides, gates = 1 + bidirectional, 4 * hidden_size
        for i in range(num_layers):
            inputs = input_size if i == 0 else sides * hidden_size
            for name, columns in ((f"weight_{i}", inputs), (f"recurrent_{i}", hidden_size)):
                codes = torch.zeros(sides, columns, gates, dtype=torch.int8)
                self.register_buffer(name, codes)
                self.register_buffer(f"{name}_scale", torch.ones(sides, gates))
            both = nn.Parameter(torch.zeros(sides, 2 * gates)) if bias else None
            self.register_parameter(f"bias_{i}", both)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
        }

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run all layers over a batch of sequences, or over one sequence (T, I)."""
        alone = input.dim() == 2
        axis = 1 if alone or not self.batch_first else 0
        x = input.unsqueeze(axis) if alone else input
        x = x if axis == 1 else x.transpose(0, 1)
        sides = 1 + self.bidirectional
        if hx is None:
            zeros = x.new_zeros((self.num_layers * sides, x.shape[1], self.hidden_size))
            hx = zeros, zeros
        elif alone:
            hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
        hiddens, cells = [], []
        for i in range(self.num_layers):
            part = slice(i * sides, (i + 1) * sides)
            own = [
                getattr(self, name.format(i))
                for name in (
                    "weight_{}",
                    "weight_{}_scale",
                    "recurrent_{}",
                    "recurrent_{}_scale",
                    "bias_{}",
                )
            ]
            x, hidden, cell = dynamic_lstm(x, *own, hx[0][part], hx[1][part])
            hiddens.append(hidden)
            cells.append(cell)
        x = x if axis == 1 else x.transpose(0, 1)
        last, last_cell = torch.cat(hiddens), torch.cat(cells)
        if alone:
            return x.squeeze(1), (last.squeeze(1), last_cell.squeeze(1))
        return x, (last, last_cell)
