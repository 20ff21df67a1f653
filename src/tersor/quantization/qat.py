"""QAT: train with weights and activations rounded, so that the network learns to live with it."""

from dataclasses import dataclass

from torch import Tensor, nn

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.fake_quantize import Ranges, late
from tersor.ops.losses import LABELS
from tersor.quantization._integer import make_trainable


@dataclass(frozen=True, kw_only=True)
class Qat:
    """Settings of quantization-aware training."""

    epochs: float = 1.0
    """Passes over the training data on the task's loss; 0: a step after it in the same stage
    trains, as in `[qat: {epochs: 0}, distill_logits]`."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""
    weight_bits: int = 8
    """Bits of weights, 2 to 8; runtimes compute with bytes."""
    ranges: Ranges = "learned"
    """Scales are trained (LSQ), or follow moving averages of what is observed."""
    freeze: float = 0.7
    """Share of the steps after which statistics of batch norms, and observed ranges, stay."""
    symmetric: bool = False
    """Activations as int8 around 0, as TensorRT asks for; else uint8 with any zero."""
    layers: Layers = Layers()
    """Which layers get integer weights."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be 2 to 8, got {self.weight_bits}")
        if not 0 <= self.freeze <= 1:
            raise ValueError(f"freeze must be in [0, 1], got {self.freeze}")


@technique(needs=("calibration", "train"), paper="arXiv:1902.08153")
def qat(net: nn.Module, config: Qat, context: Context) -> nn.Module:
    """Round where `static` rounds, train through the rounding, and keep the integers.

    Ranges begin where calibration puts them. Batch norms are folded into the rounded weights from
    the first step on, and their statistics stay after `freeze`. At the end of the stage the trained
    roundings become the layers that `static` makes; in memory and on the target they compute the
    same, up to one step where a value lies between two codes.

    Raises:
        DataError: no calibration or training data, or no labels though `epochs` is above 0.
        StepError: loss or gradient is not finite.
        UnfitError: no layer can get integer weights.

    Source:
        Esser et al., LSQ, arXiv:1902.08153; Jacob et al., arXiv:1712.05877, section 3, for
        `ranges: observed` and the folding.
    """
    if context.data.train is None:
        raise DataError("qat needs training data; give `train` batches")
    captured = make_trainable(
        net,
        context,
        bits=config.weight_bits,
        symmetric=config.symmetric,
        ranges=config.ranges,
        freeze=config.freeze,
        layers=config.layers,
    )
    context.record(epochs=config.epochs, weight_bits=config.weight_bits, ranges=config.ranges)
    if not config.epochs:
        return captured

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        if LABELS not in batch and context.data.loss is None:
            raise DataError(
                "qat: batches have no labels; add them, or set epochs: 0 and let distill_logits "
                "train in the same stage"
            )
        return context.loss(net, batch)

    return context.fit(
        captured,
        loss,
        batches=context.data.train,
        epochs=config.epochs,
        lr=config.lr,
        seed=context.seed,
        checkpoint=context.work_dir / "qat.safetensors",
        on_step=late(captured),
    )
