"""Bias correction: take out the mean error that rounding puts into each channel."""

from dataclasses import dataclass

import torch
from torch import fx, nn

from tersor.core.context import Context
from tersor.core.technique import technique
from tersor.ops.twin import gather, lockstep, twin_of


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Settings of bias correction."""

    samples: int = 256
    """Calibration samples that means are taken over; fewer where activations are very large."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")


@technique(needs=("calibration",), paper="arXiv:1906.04721")
def bias_correction(net: nn.Module, config: BiasCorrection, context: Context) -> nn.Module:
    """Shift each rounded layer's bias so that every channel has its float network's mean again.

    The empirical variant of the paper: means are measured on calibration data, layer after layer,
    each with all layers before it rounded and corrected already. Belongs in the stage of the step
    that rounds: `[static, bias_correction]`.

    Raises:
        DataError: no calibration data.
        UnfitError: nothing was rounded in this stage.

    Source:
        Nagel et al., arXiv:1906.04721, section 4.2 and appendix D.
    """
    twin = twin_of(net, "bias_correction")
    assert isinstance(net, fx.GraphModule)
    batch = gather(net, context.data.calibration, context.inputs, config.samples)
    shifts: dict[str, float] = {}
    for visit in lockstep(net, twin, batch):
        with torch.no_grad():
            error = visit.wanted - visit.layer(visit.x)
        dimension = error.dim() - 1 if visit.channels_last else 1
        shift_O = error.mean([d for d in range(error.dim()) if d != dimension])
        spread = float(visit.wanted.std()) or 1.0
        shifts[visit.name] = float(shift_O.abs().mean()) / spread
        bias = visit.layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        old = torch.zeros_like(shift_O) if bias is None else bias.detach()
        # a new one: the twin shares the old
        visit.layer.bias = nn.Parameter(old + shift_O, requires_grad=True)
    context.record(layers=len(shifts), samples=len(next(iter(batch.values()))), mean_shift=shifts)
    return net
