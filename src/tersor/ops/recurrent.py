"""LSTMs and GRUs whose weights are kept as integers of 8 bits, and computed in float32."""

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn

from tersor.ops.modules import not_float32
from tersor.ops.quantize import channel_scales, symmetric_codes

_OPS = torch.ops.quantized_decomposed
_GATES = {"LSTM": 4, "GRU": 3}
_KINDS = {nn.LSTM: "LSTM", nn.GRU: "GRU"}


class RoundedRecurrent(nn.Module):
    """LSTM or GRU with int8 weights, a scale for each row of each gate; takes what torch's takes.

    Args:
        kind: "LSTM" or "GRU".
        input_size: Of a step.
        hidden_size: Of the state.
        num_layers: One above the other.
        bias: Whether there are biases.
        batch_first: Samples are the first dimension, steps the second.
        bidirectional: Whether there are layers that run backwards.
    """

    kind: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool

    def __init__(
        self,
        kind: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.input_size, self.hidden_size = kind, input_size, hidden_size
        self.num_layers, self.bias = num_layers, bias
        self.batch_first, self.bidirectional = batch_first, bidirectional
        rows = _GATES[kind] * hidden_size
        for i, ends in enumerate(self._names()):
            inputs = input_size if i == 0 else len(ends) * hidden_size
            for end in ends:
                for side, columns in (("ih", inputs), ("hh", hidden_size)):
                    name = f"weight_{side}_{end}"
                    codes = torch.zeros(rows, columns, dtype=torch.int8)
                    self.register_buffer(name, codes)
                    self.register_buffer(f"{name}_scale", torch.ones(rows))
                    if bias:
                        own = nn.Parameter(torch.zeros(rows))
                        self.register_parameter(f"bias_{side}_{end}", own)

    def _names(self) -> list[list[str]]:
        """Return, for each layer, how the names of its weights end."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [[f"l{i}{end}" for end in ends] for i in range(self.num_layers)]

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("kind", "input_size", "hidden_size", "num_layers", "bias", "batch_first")
        return {name: getattr(self, name) for name in (*names, "bidirectional")}

    def values(self) -> list[Tensor]:
        """Return float weights and biases, in the order in which torch's layers hold them."""
        made: list[Tensor] = []
        for end in (end for ends in self._names() for end in ends):
            for side in ("ih", "hh"):
                codes: Tensor = getattr(self, f"weight_{side}_{end}")
                scale: Tensor = getattr(self, f"weight_{side}_{end}_scale")
                made.append(
                    _OPS.dequantize_per_channel(codes, scale, None, 0, -127, 127, torch.int8)
                )
            if self.bias:
                made += [getattr(self, f"bias_{side}_{end}") for side in ("ih", "hh")]
        return made

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Run all layers over a batch of sequences, or over one sequence (T, I)."""
        alone = input.dim() == 2
        batch_first = self.batch_first and not alone
        x = input.unsqueeze(1) if alone else input
        if hx is None:
            sides = self.num_layers * (1 + self.bidirectional)
            zeros = x.new_zeros((sides, x.shape[0 if batch_first else 1], self.hidden_size))
            hx = (zeros, zeros) if self.kind == "LSTM" else zeros
        elif alone:
            hx = tuple(h.unsqueeze(1) for h in hx) if self.kind == "LSTM" else hx.unsqueeze(1)
        run: Any = torch.lstm if self.kind == "LSTM" else torch.gru
        settings = (self.bias, self.num_layers, 0.0, False, self.bidirectional, batch_first)
        y, *last = run(x, hx, self.values(), *settings)
        if alone:
            y, last = y.squeeze(1), [h.squeeze(1) for h in last]
        return y, tuple(last) if self.kind == "LSTM" else last[0]


def why_not(layer: nn.Module) -> str | None:
    """Say why a recurrent layer cannot keep its weights as integers, or None."""
    if isinstance(layer, RoundedRecurrent):
        return "quantized before"
    if type(layer) not in _KINDS:
        return f"{type(layer).__name__} has no form with integer weights here"
    assert isinstance(layer, (nn.LSTM, nn.GRU))
    if layer.proj_size:
        return "an LSTM with a projection"
    weight = layer.weight_ih_l0
    assert isinstance(weight, Tensor)
    return not_float32(weight)


def rounded(layer: nn.LSTM | nn.GRU, *, clip: bool = False) -> RoundedRecurrent:
    """Return a layer like `layer` with integer weights; the biases are shared.

    Args:
        layer: A layer for which `why_not` is None.
        clip: Codes of a row end where its squared error is least, not at its largest weight.

    Raises:
        ValueError: weights are NaN or infinite.
    """
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
    settings: Any = {name: getattr(layer, name) for name in names}
    made = RoundedRecurrent(_KINDS[type(layer)], **settings)
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.dim() == 1:
            made.register_parameter(name, parameter)
            continue
        scale = channel_scales(parameter.detach(), clip=clip)
        setattr(made, name, symmetric_codes(parameter.detach(), scale))
        setattr(made, f"{name}_scale", scale)
    return made.train(layer.training)
