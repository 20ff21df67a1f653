"""Distill self-supervised: match the teacher's features without labels, centered and sharpened."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.context import Batch, Context
from tersor.core.errors import DataError, StepError
from tersor.core.model import Inputs
from tersor.core.technique import technique
from tersor.ops.fake_quantize import late
from tersor.ops.features import Apprentice, projection, relative_error, spread
from tersor.ops.losses import call, first_output
from tersor.ops.teachers import ask, teacher_of

# N samples, P positions, C channels, K prototypes

_MOMENTUM = 0.9
"""Of the running center; arXiv:2104.14294, appendix D."""


@dataclass(frozen=True, kw_only=True)
class DistillSelfSupervised:
    """Settings of distillation without labels."""

    epochs: float = 1.0
    """Passes over the training data; 0.25 is a quarter of it."""
    lr: float | None = None
    """Peak learning rate; the trainer's own default where not given."""
    prototypes: int = 256
    """Fixed random directions that features are compared with."""
    sharp: float = 0.04
    """Temperature of the teacher; lower is sharper."""
    temperature: float = 0.1
    """Temperature of the student."""
    match: float = 1.0
    """Weight of the squared error of features and outputs beside the loss on prototypes."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.prototypes < 2:
            raise ValueError(f"prototypes must be at least 2, got {self.prototypes}")
        if self.sharp <= 0:
            raise ValueError(f"sharp must be positive, got {self.sharp}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.match < 0:
            raise ValueError(f"match must not be negative, got {self.match}")


@technique(needs=("train", "teacher"), paper="arXiv:2104.14294")
def distill_self_supervised(
    net: nn.Module, config: DistillSelfSupervised, context: Context
) -> nn.Module:
    """Train the features before the last linear layer to fall among prototypes as the teacher's do.

    A feature's cosines with K fixed directions are turned into probabilities. The teacher's are
    centered by a running mean, so that no direction wins always, and sharpened; the student's
    cross-entropy with them is the loss. Squared errors of features and outputs, each as a share of
    the teacher's, are added, so that the last layer is trained, too. Where the network does not end
    with a linear layer, its output is the feature. Labels are never read.

    Raises:
        DataError: no training data.
        StepError: no teacher; features have other positions; loss or gradient is not finite.

    Source:
        Caron et al., DINO, arXiv:2104.14294, equations 1 and 4. There the teacher is an average of
        the student, and both learn a head; here the teacher is a trained network, so the head is a
        fixed random projection, and both see the same view.
    """
    if context.data.train is None:
        raise DataError("distill_self_supervised needs training data; give `train` batches")
    teacher = teacher_of(context, "distill_self_supervised")
    net.eval()
    heads = _head(net, context.inputs), _head(teacher, context.inputs)
    with _features(net, heads[0]) as ours, _features(teacher, heads[1]) as theirs:
        widths = []
        for each, heard in ((net, ours), (teacher, theirs)):
            with torch.no_grad():
                output = first_output(each(**context.inputs.example))
            widths.append(_feature(each, heard, output).shape[-1])
        parts = Prototypes(widths[0], widths[1], config.prototypes, context.seed)
        context.record(
            epochs=config.epochs,
            features={"student": heads[0] or "output", "teacher": heads[1] or "output"},
        )

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            assert isinstance(student, Apprentice)
            assert isinstance(student.parts, Prototypes)
            wanted = first_output(ask(teacher, batch))
            outputs = first_output(call(student, batch))
            own_NPC, its_NPC = _feature(net, ours, outputs), _feature(teacher, theirs, wanted)
            if own_NPC.shape[:2] != its_NPC.shape[:2] or outputs.shape != wanted.shape:
                shapes = [tuple(x.shape) for x in (own_NPC, its_NPC, outputs, wanted)]
                raise StepError(
                    "distill_self_supervised compares features of shape {} with the teacher's {}, "
                    "and outputs {} with {}; positions and outputs must be the same".format(*shapes)
                )
            own_NPC = student.parts.project(own_NPC.float())
            value = student.parts(own_NPC, its_NPC, config.sharp, config.temperature)
            error = relative_error(own_NPC, its_NPC) + relative_error(outputs, wanted)
            return value + config.match * error  # type: ignore[no-any-return]  # torch

        trained = context.fit(
            Apprentice(net, parts),
            loss,
            batches=context.data.train,
            epochs=config.epochs,
            lr=config.lr,
            seed=context.seed,
            checkpoint=context.work_dir / "distill_self_supervised.safetensors",
            on_step=late(net),
        )
    assert isinstance(trained, Apprentice)
    return trained.net


class Prototypes(nn.Module):
    """Fixed directions, the running center of the teacher's cosines with them, and a projection."""

    directions: Tensor
    """(C, K), each of length 1."""
    center: Tensor
    """(K,)"""
    project: nn.Module
    """From the student's channels to the teacher's."""

    def __init__(self, student: int, teacher: int, count: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = projection(student, teacher)
            self.register_buffer("directions", F.normalize(torch.randn(teacher, count), dim=0))
        self.register_buffer("center", torch.zeros(count))

    def forward(
        self,
        own: Float[Tensor, "N P C"],
        its: Float[Tensor, "N P C"],
        sharp: float,
        temperature: float,
    ) -> Float[Tensor, ""]:
        """Return the cross-entropy of the student's with the teacher's place among prototypes.

        Each call moves the center, after it was used, towards the mean of its batch.
        """
        with torch.autocast(its.device.type, enabled=False):  # cosines over 0.04 need their digits
            its_NPK = F.normalize(its.float(), dim=2) @ self.directions
            own_NPK = F.normalize(own.float(), dim=2) @ self.directions
        wanted_NPK = F.softmax((its_NPK - self.center) / sharp, 2)
        with torch.no_grad():
            self.center.lerp_(its_NPK.mean((0, 1)), 1 - _MOMENTUM)
        return -(wanted_NPK * F.log_softmax(own_NPK / temperature, 2)).sum(2).mean()


def _head(net: nn.Module, inputs: Inputs) -> str:
    """Name the linear layer whose output is the network's; empty: there is none."""
    found: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda _, __, output: found.append((name, output))

    handles = [
        module.register_forward_hook(note(name))
        for name, module in net.named_modules()
        if name and isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            answer = first_output(net(**inputs.example))
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, output in found if output is answer), "")


@contextmanager
def _features(net: nn.Module, head: str) -> Iterator[list[Tensor]]:
    """Hear what comes into the head: inside, the list holds the latest input of it."""
    heard: list[Tensor] = []
    if not head:
        yield heard
        return

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        heard[:] = [args[0] if args else kwargs["input"]]

    handle = net.get_submodule(head).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()


def _feature(net: nn.Module, heard: list[Tensor], output: Tensor) -> Float[Tensor, "N P C"]:
    if heard:
        own = heard[0]
        return own.flatten(1, -2) if own.dim() > 2 else own[:, None]
    return spread(net, output if output.dim() > 1 else output[:, None])
