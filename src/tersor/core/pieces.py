"""Batches of any size for networks that take one size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tersor.core.errors import TargetError
from tersor.core.runtime import Arrays, Runner


class InPieces:
    """A runner that cuts batches into those of the size that a network was exported with.

    A batch of that size is bound as it is, so that timing it costs nothing more. The last piece of
    another one is filled up by repeating its first sample, whose outputs are dropped.
    """

    runner: Runner
    size: int
    sampled: frozenset[str] | None

    def __init__(self, runner: Runner, size: int, sampled: frozenset[str] | None = None) -> None:
        """Wrap `runner`.

        Args:
            runner: Takes batches of `size` samples only.
            size: At least 1.
            sampled: Names of the inputs whose first axis is the batch; None: all that have one.
        """
        self.runner, self.size, self.sampled = runner, size, sampled

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        """Bind every piece.

        Raises:
            TargetError: the inputs have different numbers of samples; or, when it is called, an
                output without samples is not the same for all pieces.
        """
        sampled = self.sampled if self.sampled is not None else inputs.keys()
        cut = {n: a for n, a in inputs.items() if n in sampled and a.ndim}
        counts = {len(array) for array in cut.values()}
        if len(counts) > 1:
            raise TargetError(f"inputs have different numbers of samples: {sorted(counts)}")
        count = counts.pop() if counts else self.size
        if count == self.size:
            return self.runner.bind(inputs)
        calls = []
        for start in range(0, count, self.size):
            piece = {n: _filled(a[start : start + self.size], self.size) for n, a in cut.items()}
            calls.append(self.runner.bind({**inputs, **piece}))

        def call() -> Arrays:
            made = [call() for call in calls]
            return {
                name: _joined(name, [part[name] for part in made], self.size, count)
                for name in made[0]
            }

        return call

    def close(self) -> None:
        """Close the runner."""
        self.runner.close()


def in_pieces(runner: Runner, shapes: Mapping[str, Sequence[int]]) -> Runner:
    """Wrap a runner of fixed shapes; as it is where no input has an axis.

    Args:
        runner: Takes inputs of `shapes` only.
        shapes: By input, in their order. The first axis of the first one that has axes is the
            batch; inputs whose first axis has another size have no samples.
    """
    size = next((shape[0] for shape in shapes.values() if shape), 0)
    if not size:
        return runner
    return InPieces(runner, size, frozenset(n for n, s in shapes.items() if s and s[0] == size))


def _filled(piece: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(piece)
    return np.concatenate([piece, np.repeat(piece[:1], missing, axis=0)]) if missing else piece


def _joined(name: str, parts: list[np.ndarray], size: int, count: int) -> np.ndarray:
    """Put the outputs of pieces together; one that has no samples must be the same for all."""
    first = parts[0]
    if first.ndim and len(first) == size:
        return np.concatenate(parts)[:count]
    if not all(np.array_equal(first, part, equal_nan=first.dtype.kind == "f") for part in parts):
        raise TargetError(
            f"output {name!r} of shape {first.shape} has no axis of {size} samples, and differs "
            f"between the pieces that {count} samples are run in; use batches of {size}"
        )
    return first


def narrowed(example: Mapping[str, Any], size: int, free: Mapping[str, Mapping[int, str]]) -> Any:
    """Return example tensors with `size` samples along the axes that are free, repeated if needed.

    Args:
        example: Tensors or arrays by name, at least one sample each.
        size: Samples wanted.
        free: The axes that may change, by input; only axis 0 is the batch.
    """
    made = {}
    for name, tensor in example.items():
        if 0 in free.get(name, {}):
            turns = [i % len(tensor) for i in range(size)]
            tensor = tensor[turns]
        made[name] = tensor
    return made
