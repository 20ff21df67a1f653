"""Features inside two networks: where they can be compared, and how to listen to them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import StepError, UnfitError, suggest
from tersor.core.model import Inputs
from tersor.ops.losses import first_output
from tersor.ops.notes import carry_notes

# N samples, P positions (pixels, tokens), C channels


@dataclass(frozen=True, kw_only=True)
class Point:
    """A layer whose output can be listened to."""

    name: str
    """Dotted name in the network."""
    positions: tuple[int, ...]
    """Size of its map: (height, width), (tokens,), or () for one vector a sample."""
    channels: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A point of the student, and the one of the teacher that it is compared with."""

    student: Point
    teacher: Point


def spread(net: nn.Module, features: Tensor) -> Float[Tensor, "N P C"]:
    """Bring features into one form, channels last and positions in a row.

    Args:
        net: Where they come from: with three dimensions, channels are the second one in networks of
            one-dimensional convolutions, else the last.
        features: (N,C), (N,T,C), (N,C,L), (N,C,H,W) or with more positions.
    """
    if features.dim() == 2:
        return features[:, None]
    second = features.dim() > 3 or any(isinstance(m, nn.Conv1d) for m in net.modules())
    return (features.movedim(1, -1) if second else features).flatten(1, -2)


def find_points(net: nn.Module, inputs: Inputs) -> list[Point]:
    """List where features can be heard, in the order in which they are computed.

    Blocks, if there are any: modules that hold other layers; else the layers themselves. Each is
    called once, holds parameters and returns one tensor of floating-point numbers; of those that
    return the same tensor the outermost counts. What the network itself returns is none of them.
    """
    rows = len(next(iter(inputs.example.values())))
    outputs: dict[str, list[Any]] = {}
    handles = [
        module.register_forward_hook(_noting(outputs, name))
        for name, module in net.named_modules()
        if name and any(True for _ in module.parameters())
    ]
    try:
        with torch.no_grad():
            answer = first_output(net(**inputs.example))
    finally:
        for handle in handles:
            handle.remove()
    last: dict[int, tuple[str, Tensor]] = {}
    for name, made in outputs.items():
        own = made[0]
        if len(made) > 1 or not isinstance(own, Tensor) or not own.is_floating_point():
            continue
        if own.dim() > 1 and len(own) == rows and own is not answer:
            last.pop(id(own), None)  # the outermost comes last
            last[id(own)] = (name, own)
    found = [_point(net, name, own) for name, own in last.values()]
    blocks = [p for p in found if any(True for _ in net.get_submodule(p.name).children())]
    return blocks or found


def _noting(outputs: dict[str, list[Any]], name: str) -> Any:
    def note(_: nn.Module, __: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(output)

    return note


def _point(net: nn.Module, name: str, own: Tensor) -> Point:
    shape = own.shape
    if own.dim() == 2:
        positions: tuple[int, ...] = ()
    elif own.dim() > 3 or any(isinstance(m, nn.Conv1d) for m in net.modules()):
        positions = tuple(shape[2:])
    else:
        positions = (shape[1],)
    return Point(name=name, positions=positions, channels=spread(net, own).shape[-1])


def find_pairs(
    student: Sequence[Point], teacher: Sequence[Point], count: int, *, maps: bool
) -> list[Pair]:
    """Pair points of two networks by the size of their maps, and by how deep they lie within it.

    Of `n` points with maps of one size those at 1/count, 2/count, ... of the depth are taken, the
    last one always. In networks made from one another these have the same names.

    Args:
        student: Its points, in order.
        teacher: Its points, in order.
        count: Pairs for each size of map, at most.
        maps: Only points that have positions.

    Raises:
        UnfitError: there is no size that both have.
    """
    pairs = []
    for size in dict.fromkeys(point.positions for point in student):
        ours, theirs = ([p for p in points if p.positions == size] for points in (student, teacher))
        if not theirs or (maps and not size):
            continue
        number = min(count, len(ours), len(theirs))
        pairs += [
            Pair(student=_at(ours, part, number), teacher=_at(theirs, part, number))
            for part in range(1, number + 1)
        ]
    if not pairs:
        told = [
            ", ".join(sorted({"x".join(map(str, p.positions)) or "none" for p in points}))
            for points in (student, teacher)
        ]
        raise UnfitError(
            "no features of student and teacher can be compared: maps have the sizes "
            f"{told[0] or 'none'} in the one and {told[1] or 'none'} in the other"
        )
    return pairs


def _at(points: Sequence[Point], part: int, parts: int) -> Point:
    return points[-(-part * len(points) // parts) - 1]


def named_pairs(
    student: Sequence[Point], teacher: Sequence[Point], wanted: Sequence[str]
) -> list[Pair]:
    """Pair points that are named, as "student=teacher", or one name for both.

    Raises:
        StepError: no such layer, or their maps differ in size.
    """
    pairs = []
    for text in wanted:
        one, _, other = text.partition("=")
        pair = Pair(
            student=_named(student, one, "the student"),
            teacher=_named(teacher, other or one, "the teacher"),
        )
        if pair.student.positions != pair.teacher.positions:
            raise StepError(
                f"pairs: {text!r}: maps of size {pair.student.positions} cannot be compared with "
                f"maps of size {pair.teacher.positions}"
            )
        pairs.append(pair)
    return pairs


def _named(points: Sequence[Point], name: str, whose: str) -> Point:
    known = {point.name: point for point in points}
    if name not in known:
        raise StepError(
            f"pairs: {whose} has no features at {name!r}.{suggest(name, known)} "
            f"There are: {', '.join(known)}"
        )
    return known[name]


@contextmanager
def listening(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Hear what layers return: inside, the dictionary holds each one's latest output."""
    heard: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            heard[name] = output

        return hook

    handles = [net.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


class Apprentice(nn.Module):
    """A student, with what is only needed to compare it with its teacher.

    It is trained as a whole, so that trainers find, store and restore these parts with the student;
    they are thrown away with it.
    """

    net: nn.Module
    parts: nn.Module

    def __init__(self, net: nn.Module, parts: nn.Module) -> None:
        super().__init__()
        self.net, self.parts = net, parts
        carry_notes(net, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as the student does."""
        return self.net(*args, **kwargs)


def projection(student: int, teacher: int) -> nn.Module:
    """Return what brings a student's channels to the number of the teacher's."""
    return nn.Identity() if student == teacher else nn.Linear(student, teacher)


def relative_error(
    found: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Return the squared error as a share of what is wanted, in float32."""
    found, wanted = found.float(), wanted.float()
    return (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
