"""sparsity(): from which share of zeros is a layer faster sparse, on this machine?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tersor.core.context import Track, silent
from tersor.core.errors import RecipeError
from tersor.core.hardware import environment, preflight, probe, usable_cores
from tersor.core.sparsity_page import Curve
from tersor.ops import native
from tersor.ops.sparse_race import Race, Races, Shape, break_even

ZEROS = (50.0, 60.0, 70.0, 80.0, 85.0, 90.0, 95.0, 98.0)
"""Percents of zeros that are measured."""
SHAPES = (
    "256x256",
    "512x512",
    "1024x1024",
    "2048x2048",
    "4096x4096",
    "256x256k1@14",
    "64x64k3@32",
)
_SHAPE = re.compile(r"(\d{1,6})x(\d{1,6})(?:k(\d{1,2})@(\d{1,4}))?")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer shape."""

    name: str
    """As the words asked for it: 1024x1024, 64x64k3@32."""
    shape: Shape
    break_even: float | None
    """Percent of zeros from which sparse is faster than every dense kernel; None: not measured."""
    races: tuple[Race, ...]
    """By percent of zeros."""

    def curve(self) -> Curve:
        """Return what the picture shows."""
        best = [race.against[race.best] for race in self.races]
        return Curve(
            label=self.name,
            zeros=tuple(race.zeros for race in self.races),
            times=tuple(speed.times for speed in best),
            low=tuple(speed.low for speed in best),
            high=tuple(speed.high for speed in best),
            break_even=self.break_even,
        )


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What `sparsity` found."""

    batch: int
    threads: int
    kernel: str
    """Where our sparse kernel comes from, or why there is none."""
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]
    """What made the machine unfit for timing."""
    environment: dict[str, Any]

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown
        from tersor.core.sparsity_page import even_words

        rows = [(layer.name, even_words(layer.curve())) for layer in self.layers]
        title = f"sparse execution: batch {self.batch}, threads {self.threads}"
        return shown(title, ("layer", "faster from"), rows, self.warnings)


def sparsity(
    shapes: Sequence[str] = SHAPES,
    *,
    batch: int = 1,
    threads: int = 0,
    zeros: Sequence[float] = ZEROS,
    display: Track = silent,
) -> Sparsity:
    """Time layers sparse and dense, interleaved, at several shares of zeros.

    What is found is kept for the step `sparse_execution`.

    Args:
        shapes: INPUTSxOUTPUTS of a linear layer, or with kKERNEL@SIZE of a convolution: 64x64k3@32.
        batch: Samples.
        threads: Of a run; 0: all usable cores.
        zeros: Percents in [0, 100), ascending.
        display: Shows progress.

    Raises:
        RecipeError: a shape cannot be read.
    """
    wanted = [(text, read_shape(text, batch)) for text in shapes]
    machine, races = probe(), Races(fresh=True)
    layers = []
    for text, shape in display(wanted, "racing layers", len(wanted)):
        done = races.run(shape, zeros, threads)
        layers.append(Layer(name=text, shape=shape, break_even=break_even(done), races=tuple(done)))
    return Sparsity(
        batch=batch,
        threads=threads or usable_cores(),
        kernel=native.build().note,
        layers=tuple(layers),
        warnings=preflight(machine),
        environment=environment(),
    )


def read_shape(text: str, batch: int) -> Shape:
    """Read "1024x1024" or "64x64k3@32".

    Raises:
        RecipeError: it is neither.
    """
    found = _SHAPE.fullmatch(text.strip())
    numbers = [int(word) for word in found.groups() if word] if found else []
    if not found or not all(numbers):
        raise RecipeError(
            f"shape {text!r} is neither INPUTSxOUTPUTS of a linear layer, such as 1024x1024, nor "
            "INPUTSxOUTPUTSkKERNEL@SIZE of a convolution, such as 64x64k3@32"
        )
    made = Shape(inputs=numbers[0], outputs=numbers[1], batch=batch)
    if len(numbers) == 2:
        return made
    kernel, size = numbers[2:]
    if kernel > size + 2 * (kernel // 2):
        raise RecipeError(f"shape {text!r}: a kernel of {kernel} does not fit images of {size}")
    return replace(
        made,
        kind="conv2d",
        kernel=(kernel, kernel),
        padding=(kernel // 2, kernel // 2),
        size=(size, size),
    )
