"""Dynamic: int8 weights of linear layers and LSTMs; inputs become 8 bits while the network runs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import ModelError, UnfitError
from tersor.core.layers import Layers
from tersor.core.runtime import Target
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.dynamic import QuantDynamicLinear, QuantDynamicLSTM
from tersor.ops.modules import check_patterns, why_not
from tersor.ops.quantize import channel_scales, symmetric_codes
from tersor.quantization._integer import embeddings, round_embeddings


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Settings of dynamic quantization."""

    layers: Layers = Layers()
    """Which linear layers, LSTMs and embeddings."""


@technique()
def dynamic(net: nn.Module, config: Dynamic, context: Context) -> nn.Module:
    """Replace linear layers and LSTMs by ones that multiply in integers; no data is needed.

    Weights get one scale for each row, inputs one for the whole tensor, from its smallest and
    largest value each time. That costs a pass over the input, which pays where weights are large
    and inputs few. LSTMs become integers on ONNX Runtime on the CPU alone, which has an operator
    for them; GRUs nowhere. Embeddings get int8 rows. Layers in float are in the facts, with the
    reason.

    Raises:
        UnfitError: no layer can be quantized for this target.
        ModelError: weights are NaN or infinite.
    """
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    called = {str(n.target) for n in captured.graph.nodes if n.op == "call_module"}
    kinds = (
        nn.Linear,
        nn.RNNBase,
        nn.modules.conv._ConvNd,
        nn.MultiheadAttention,
        QuantDynamicLSTM,
    )
    layers = {
        name: layer
        for name, layer in captured.named_modules()
        if name in called and (isinstance(layer, kinds) or why_not(layer) == "quantized before")
    }
    check_patterns(config.layers, [*layers, *embeddings(captured)])
    left: dict[str, str] = {}
    for name, layer in layers.items():
        reason = _why_not(layer, context.target)
        if reason is None and not config.layers.holds(name):
            reason = "excluded by layers"
        if reason is not None:
            left[name] = reason
    chosen = [name for name in layers if name not in left]
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise UnfitError(f"no layer can be quantized dynamically ({why or 'none is linear'})")
    tables, kept = round_embeddings(captured, config.layers)
    for name in context.track(chosen, "rounding weights"):
        try:
            captured.set_submodule(name, _rounded(layers[name]))
        except ValueError as error:
            raise ModelError(f"layer {name!r} cannot be quantized: {error}") from error
    context.record(layers=len(chosen), embeddings=len(tables), left_in_float={**left, **kept})
    return captured


def _why_not(layer: nn.Module, target: Target) -> str | None:
    """Say why a layer stays in float, or None."""
    if isinstance(layer, nn.LSTM):
        if layer.proj_size:
            return "an LSTM with a projection"
        if (target.runtime, target.device) != ("onnxruntime", "cpu"):
            return f"an LSTM, for which {target} has no integer operator"
        return None
    if isinstance(layer, QuantDynamicLSTM):
        return "quantized before"
    if isinstance(layer, nn.RNNBase):
        more = "; `weight_only` stores it in 8 bits" if isinstance(layer, nn.GRU) else ""
        return f"a {type(layer).__name__}, which no runtime here computes in integers{more}"
    if isinstance(layer, nn.modules.conv._ConvNd):
        return "a convolution; `static` quantizes it"
    return why_not(layer)


def _rounded(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return QuantDynamicLinear.of(layer, channel_scales(layer.weight.detach()))
    assert isinstance(layer, nn.LSTM)
    made = QuantDynamicLSTM(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        layer.batch_first,
        layer.bidirectional,
    )
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    for i in range(layer.num_layers):
        for mine, theirs in (("weight", "weight_ih"), ("recurrent", "weight_hh")):
            weights = [_reordered(getattr(layer, f"{theirs}_l{i}{end}")) for end in ends]
            scales = [channel_scales(weight) for weight in weights]
            codes = [symmetric_codes(w, s).T for w, s in zip(weights, scales, strict=True)]
            setattr(made, f"{mine}_{i}", torch.stack(codes))
            setattr(made, f"{mine}_{i}_scale", torch.stack(scales))
        if layer.bias:
            biases = [
                torch.cat(
                    [_reordered(getattr(layer, f"{b}_l{i}{end}")) for b in ("bias_ih", "bias_hh")]
                )
                for end in ends
            ]
            setattr(made, f"bias_{i}", nn.Parameter(torch.stack(biases)))
    return made.eval()


def _reordered(gates: Tensor) -> Tensor:
    """Order gates as ONNX has them: input, output, forget, cell; torch has the output last."""
    i, f, g, o = gates.detach().chunk(4)
    return torch.cat([i, o, f, g])
