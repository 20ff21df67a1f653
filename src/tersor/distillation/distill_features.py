"""Distill features: train the network to see inside what its teacher sees, and to answer alike."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError
from tersor.core.technique import technique
from tersor.ops.fake_quantize import late
from tersor.ops.features import (
    Apprentice,
    Pair,
    find_pairs,
    find_points,
    listening,
    named_pairs,
    projection,
    relative_error,
    spread,
)
from tersor.ops.losses import call, first_output
from tersor.ops.teachers import ask, imitate, teacher_of

# N samples, P positions, C channels


@dataclass(frozen=True, kw_only=True)
class DistillFeatures:
    """Settings of feature distillation."""

    epochs: float = 1.0
    """Passes over the training data; 0.25 is a quarter of it."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""
    match: Literal["attention", "hints"] = "attention"
    """attention: where in its map each looks; hints: every channel, through a projection that is
    trained with the student where it has fewer channels, and thrown away."""
    weight: float = 1.0
    """Weight of the features' loss beside that of the answers."""
    points: int = 1
    """Pairs for each size of map that both networks have, at even depths."""
    pairs: tuple[str, ...] = ()
    """Layers to compare, as "student=teacher" or one name for both, in place of `points`."""
    temperature: float = 4.0
    """Softens both answers, so that the small probabilities count, too."""
    hard: float = 0.1
    """Weight of the loss on the labels, in [0, 1]; the teacher's answers have the rest. 0 needs no
    labels."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        if self.points < 1:
            raise ValueError(f"points must be at least 1, got {self.points}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.hard <= 1:
            raise ValueError(f"hard must be in [0, 1], got {self.hard}")


@technique(needs=("train", "teacher"), paper="arXiv:1612.03928")
def distill_features(net: nn.Module, config: DistillFeatures, context: Context) -> nn.Module:
    """Train on the loss of `distill_logits`, and weight * distance of features, mean over pairs.

    Attention maps: the squared distance between maps of sum over channels of squares, each of
    length 1. Hints: the squared error of the projected features as a share of the teacher's.

    Raises:
        DataError: no training data, or no labels though `hard` is above 0.
        UnfitError: no maps of one size in both networks.
        StepError: no teacher; `pairs` names no layer, or maps of two sizes; loss not finite.

    Source:
        Zagoruyko and Komodakis, arXiv:1612.03928, equation 2, with the distance squared as in the
        authors' code; Romero et al., FitNets, arXiv:1412.6550, equation 3, trained together with
        the answers rather than before them.
    """
    if context.data.train is None:
        raise DataError("distill_features needs training data; give `train` batches")
    teacher = teacher_of(context, "distill_features")
    net.eval()
    pairs = _pairs(net, teacher, config, context)
    parts = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        if config.match == "hints":
            parts.extend(projection(p.student.channels, p.teacher.channels) for p in pairs)
    context.record(
        epochs=config.epochs,
        match=config.match,
        pairs={pair.student.name: pair.teacher.name for pair in pairs},
    )
    with (
        listening(net, [p.student.name for p in pairs]) as ours,
        listening(teacher, [p.teacher.name for p in pairs]) as theirs,
    ):

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            assert isinstance(student, Apprentice)
            wanted = first_output(ask(teacher, batch))
            outputs = first_output(call(student, batch))
            distances = []
            for index, pair in enumerate(pairs):
                one_NPC = spread(net, ours[pair.student.name])
                other_NPC = spread(teacher, theirs[pair.teacher.name])
                if config.match == "hints":
                    part = student.parts.get_submodule(str(index))
                    distances.append(relative_error(part(one_NPC), other_NPC))
                else:
                    distances.append(attention_distance(one_NPC, other_NPC))
            answers = imitate(
                outputs,
                wanted,
                student=student.net,
                batch=batch,
                context=context,
                hard=config.hard,
                temperature=config.temperature,
                technique="distill_features",
            )
            return answers + config.weight * torch.stack(distances).mean()

        trained = context.fit(
            Apprentice(net, parts),
            loss,
            batches=context.data.train,
            epochs=config.epochs,
            lr=config.lr,
            seed=context.seed,
            checkpoint=context.work_dir / "distill_features.safetensors",
            on_step=late(net),
        )
    assert isinstance(trained, Apprentice)
    return trained.net


def attention_distance(
    one: Float[Tensor, "N P C"], other: Float[Tensor, "N P D"]
) -> Float[Tensor, ""]:
    """Return the squared distance of two attention maps, mean over samples; in [0, 2]."""
    maps = [F.normalize(x.float().square().sum(2), dim=1) for x in (one, other)]
    return (maps[0] - maps[1]).square().sum(1).mean()


def _pairs(
    net: nn.Module, teacher: nn.Module, config: DistillFeatures, context: Context
) -> list[Pair]:
    ours, theirs = (find_points(each, context.inputs) for each in (net, teacher))
    if config.pairs:
        return named_pairs(ours, theirs, config.pairs)
    return find_pairs(ours, theirs, config.points, maps=config.match == "attention")
