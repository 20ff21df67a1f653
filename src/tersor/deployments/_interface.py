"""What an artifact takes and gives, found by running it once more for each free size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.core.artifact import Artifact
from tersor.core.errors import ArtifactError
from tersor.core.runtime import Arrays

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Port:
    """One input or output."""

    name: str
    dtype: str
    """numpy's name."""
    shape: tuple[int | str, ...]
    """A word where the size is free."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Inputs and outputs of an artifact, and one example of both."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: Arrays
    made: Arrays
    """What the artifact makes of the example."""

    @property
    def batched(self) -> bool:
        """Whether the first size of all inputs and outputs is the same free one: the batch."""
        first = {port.shape[0] if port.shape else 0 for port in (*self.inputs, *self.outputs)}
        return len(first) == 1 and isinstance(next(iter(first)), str)


def interface(artifact: Artifact) -> Interface:
    """Run an artifact on made-up inputs, in each free size, and see what comes out.

    Floats are drawn from a normal distribution with a fixed seed, integers are ones: a token that
    most networks know and few take for padding, and a mask that hides nothing.

    Raises:
        ArtifactError: the manifest does not describe inputs. DependencyError: its runtime is not
            installed. TargetError: it does not run.
    """
    entries = artifact.manifest.get("inputs")
    if not isinstance(entries, Mapping) or not entries:
        raise ArtifactError(
            f"artifact {str(artifact.path)!r}: its manifest does not describe inputs; compress the "
            "network again"
        )
    inputs = tuple(_input(name, entry) for name, entry in entries.items())
    usual = {
        word: size
        for port, entry in zip(inputs, entries.values(), strict=True)
        for word, size in zip(port.shape, entry["shape"], strict=True)
        if isinstance(word, str)
    }
    runner = artifact.load()
    try:
        example = _draw(inputs, usual)
        made = dict(runner.bind(example)())
        shapes: dict[str, list[int | str]] = {name: [*a.shape] for name, a in made.items()}
        for word, size in usual.items():
            # networks bound lengths from above; one of 1 can only grow
            larger = word == _batch(inputs) or size == 1
            changed = {**usual, word: size + 1 if larger else size - 1}
            for name, array in runner.bind(_draw(inputs, changed))().items():
                for axis, found in enumerate(array.shape):
                    if found != made[name].shape[axis]:
                        same = found == changed[word]
                        shapes[name][axis] = word if same else f"{word}_of_{name}"
    finally:
        runner.close()
    outputs = tuple(
        Port(name=name, dtype=str(array.dtype), shape=tuple(shapes[name]))
        for name, array in made.items()
    )
    return Interface(inputs=inputs, outputs=outputs, example=example, made=made)


def _input(name: str, entry: Mapping[str, Any]) -> Port:
    free = entry.get("dynamic", {})
    shape = tuple(free.get(str(axis), size) for axis, size in enumerate(entry["shape"]))
    return Port(name=name, dtype=entry["dtype"], shape=shape)


def _batch(inputs: tuple[Port, ...]) -> int | str:
    return inputs[0].shape[0] if inputs[0].shape else 0


def _draw(inputs: tuple[Port, ...], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(SEED)
    arrays = {}
    for port in inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in port.shape)
        floats = np.dtype(port.dtype).kind == "f"
        made = drawn.standard_normal(shape) if floats else np.ones(shape)
        arrays[port.name] = made.astype(port.dtype)
    return arrays
