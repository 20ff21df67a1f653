"""Progressive: lower the bits of the weights in stages, training after each."""

from dataclasses import dataclass

from torch import nn

from tersor.core.context import Context
from tersor.core.errors import DataError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.fake_quantize import FakeLayer, late
from tersor.quantization._integer import make_trainable


@dataclass(frozen=True, kw_only=True)
class Progressive:
    """Settings of progressive quantization."""

    weight_bits: tuple[int, ...] = (8, 6, 4)
    """Bits of weights, stage by stage, each 2 to 8 and fewer than the one before."""
    epochs: float = 1.0
    """Passes over the training data in all; every stage gets an equal share."""
    lr: float | None = None
    """Peak learning rate of each stage; the trainer's own default where not given."""
    freeze: float = 0.7
    """Share of a stage's steps after which statistics of batch norms stay."""
    symmetric: bool = False
    """Activations as int8 around 0, as TensorRT asks for; else uint8 with any zero."""
    layers: Layers = Layers()
    """Which layers get integer weights."""

    def __post_init__(self) -> None:
        bits = self.weight_bits
        if not bits or not all(2 <= b <= 8 for b in bits) or list(bits) != sorted({*bits})[::-1]:
            raise ValueError(f"weight_bits must fall from at most 8 to at least 2, got {bits}")
        if self.epochs <= 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.freeze <= 1:
            raise ValueError(f"freeze must be in [0, 1], got {self.freeze}")


@technique(needs=("calibration", "train", "labels"), paper="arXiv:1711.00205")
def progressive(net: nn.Module, config: Progressive, context: Context) -> nn.Module:
    """Train with rounding as `qat` does, with fewer bits from stage to stage.

    Each stage begins at the weights of the one before, with scales of least squared error.

    Raises:
        DataError: no calibration or training data.
        StepError: loss or gradient is not finite.
        UnfitError: no layer can get integer weights.

    Source:
        Zhuang et al., arXiv:1711.00205, section 3.2: from high to low precision; the rounding is
        that of LSQ (arXiv:1902.08153).
    """
    if context.data.train is None:
        raise DataError("progressive needs training data; give `train` batches with labels")
    captured: nn.Module = make_trainable(
        net,
        context,
        bits=config.weight_bits[0],
        symmetric=config.symmetric,
        ranges="learned",
        freeze=config.freeze,
        layers=config.layers,
    )
    context.record(epochs=config.epochs, weight_bits=list(config.weight_bits))
    for bits in config.weight_bits:
        for layer in captured.modules():
            if isinstance(layer, FakeLayer) and layer.bits != bits:
                layer.restart(bits)
        captured = context.fit(
            captured,
            context.loss,
            batches=context.data.train,
            epochs=config.epochs / len(config.weight_bits),
            lr=config.lr,
            seed=context.seed,
            checkpoint=context.work_dir / f"progressive-{bits}.safetensors",
            on_step=late(captured),
        )
    return captured
