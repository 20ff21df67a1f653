"""SmoothQuant: move the outliers of activations into the weights that read them."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.core.context import Context
from tersor.core.errors import DataError, UnfitError
from tersor.core.technique import technique
from tersor.ops.calibrate import sweep
from tersor.ops.capture import capture

# C channels of the tensor between a norm and the layers that read it.

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_TINY = 1e-5


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Settings of SmoothQuant."""

    strength: float = 0.5
    """Share of the difficulty that moves into the weights (alpha of the paper), in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}")


@technique(needs=("calibration",), paper="arXiv:2211.10438")
def smooth_quant(net: nn.Module, config: SmoothQuant, context: Context) -> nn.Module:
    """Divide the channels of a norm's output by s and multiply the columns that read it by s.

    s_c = max|x_c|^strength / max|w_c|^(1 - strength), over calibration data and over all linear
    layers behind the norm. Outputs stay the same; the tensor between has fewer outliers, so that
    one scale fits it. Before `static`, as a stage of its own or in the same one.

    Raises:
        DataError: no calibration data, or it does not fit.
        UnfitError: no layer norm or RMS norm feeds linear layers only.

    Source:
        Xiao et al., arXiv:2211.10438, equation 4.
    """
    captured = capture(net.eval(), context.inputs)
    if context.data.calibration is None:
        raise DataError("smooth_quant needs calibration data: a few hundred samples, no labels")
    places = _places(captured)
    if not places:
        raise UnfitError(
            f"{type(net).__name__} has no layer norm or RMS norm (with weights of its own) whose "
            "output goes to linear layers and nowhere else"
        )
    peaks: dict[fx.Node, Tensor] = {}

    def look(node: fx.Node, value: Tensor) -> None:
        peak_C = value.detach().float().abs().flatten(0, -2).amax(0)
        if not bool(torch.isfinite(peak_C).all()):
            raise ValueError("NaN or infinity")
        peaks[node] = peak_C.maximum(peaks[node]) if node in peaks else peak_C

    batches = context.track(context.data.calibration, "calibrating")
    samples = sweep(captured, places, look, batches, context.inputs)
    ratios: dict[str, float] = {}
    with torch.no_grad():
        for node, (norm, readers) in places.items():
            columns_C = torch.stack([r.weight.abs().amax(0) for r in readers]).amax(0)
            x_C = peaks[node].clamp_min(_TINY)
            s_C = x_C**config.strength / columns_C.clamp_min(_TINY) ** (1 - config.strength)
            s_C = torch.where(peaks[node] > 0, s_C, 1.0)
            norm.weight.div_(s_C)
            if getattr(norm, "bias", None) is not None:
                norm.bias.div_(s_C)  # type: ignore[operator]  # a parameter here
            for reader in readers:
                reader.weight.mul_(s_C)
            # what one scale for the tensor had to span, before and after
            before, after = peaks[node], peaks[node] / s_C
            ratios[str(node.target)] = float(
                (before.max() / before.median().clamp_min(_TINY))
                / (after.max() / after.median().clamp_min(_TINY))
            )
    context.record(norms=len(places), samples=samples, outliers_reduced=ratios)
    return captured


def _places(
    captured: fx.GraphModule,
) -> dict[fx.Node, tuple[nn.LayerNorm | nn.RMSNorm, list[nn.Linear]]]:
    """Find norms that linear layers read and nothing else, each called once."""
    modules = dict(captured.named_modules())
    called = [str(n.target) for n in captured.graph.nodes if n.op == "call_module"]
    found = {}
    for node in captured.graph.nodes:
        if node.op != "call_module":
            continue
        norm = modules[str(node.target)]
        if not isinstance(norm, _NORMS) or norm.weight is None or norm.weight.dim() != 1:
            continue
        readers = [
            modules[str(user.target)] if user.op == "call_module" else None for user in node.users
        ]
        linear = [r for r in readers if type(r) is nn.Linear]
        names = [str(node.target), *(str(user.target) for user in node.users)]
        once = all(called.count(name) == 1 for name in names)
        if linear and len(linear) == len(readers) and once:
            found[node] = (norm, linear)
    return found
