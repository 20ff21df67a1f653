"""What a runtime executes: the kind of each operator, and which of the network's it computes."""

import re
from collections.abc import Container, Mapping, Sequence

from tersor.core.runtime import OperatorTime, RanOperator

_PARTS: Mapping[str, tuple[str, ...]] = {
    "convolutions": (
        "Conv",
        "FusedConv",
        "NhwcFusedConv",
        "QLinearConv",
        "ConvInteger",
        "ConvTranspose",
        "Convolution",
        "GroupConvolution",
        "ConvolutionBackpropData",
        "Deconvolution",
    ),
    "recurrent layers": (
        "LSTM",
        "GRU",
        "RNN",
        "DynamicQuantizeLSTM",
        "LSTMSequence",
        "GRUSequence",
        "RNNSequence",
        "LSTMCell",
        "GRUCell",
        "RNNCell",
        "RNNSeq",
    ),
    "linear layers": (
        "Gemm",
        "QGemm",
        "MatMulNBits",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "FullyConnected",
    ),
    "attention": ("Softmax", "ScaledDotProductAttention", "MultiHeadAttention", "Attention"),
    "rounding": ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize"),
}
_PRODUCTS = ("MatMul", "FusedMatMul", "QLinearMatMul")
REST = "everything else"
_TOKEN = re.compile(r"_token_\d+$")


def part_of(operator: OperatorTime) -> str:
    """Name the kind of work that an operator does: "convolutions", "rounding" ..."""
    if operator.kind in _PRODUCTS:
        # a product of activations has heads, too; weights packed beforehand have no shape
        return "attention" if len(operator.weight) > 2 else "linear layers"
    for part, kinds in _PARTS.items():
        if operator.kind in kinds:
            return part
    return REST


def covered(
    times: Sequence[OperatorTime], ran: Sequence[RanOperator], known: Container[str]
) -> dict[str, tuple[str, ...]]:
    """Tell which operators of the network each timed one computes.

    ONNX Runtime's profiler calls those without a name KIND_NUMBER; they are matched in order. Where
    it changed the layout of integers, the tensors between have new names and only the operators'
    own names, which end with _token_NUMBER, tell where they come from; all that would then be
    laid on the transposition at the end, which computes nothing.
    """
    covers = {each.name: each.covers for each in ran if each.name}
    unknown = [t for t in times if t.name not in covers]
    for kind in {t.kind for t in unknown}:
        numbered = [(re.fullmatch(re.escape(kind) + r"_(\d+)", t.name), t) for t in unknown]
        timed = sorted((int(found[1]), t.name) for found, t in numbered if found)
        nameless = [each.covers for each in ran if not each.name and each.kind == kind]
        if len(timed) == len(nameless):
            covers.update(zip((name for _, name in timed), nameless, strict=True))
    moved = {t.name: _TOKEN.sub("", t.name) for t in times if _TOKEN.search(t.name)}
    for name, base in moved.items():
        covers[name] = (base,) if base in known and not base.startswith("Transpose") else ()
    return covers
