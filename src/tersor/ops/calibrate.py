"""Look at activations while batches run through a network, in memory that does not grow."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.context import Batch
from tersor.core.errors import DataError
from tersor.core.model import Inputs
from tersor.ops.calibrators import Histogram


def histograms(
    captured: fx.GraphModule,
    observed: Sequence[Sequence[fx.Node]],
    batches: Iterable[Batch],
    inputs: Inputs,
    *,
    bins: int = 2048,
    each: bool = False,
) -> tuple[list[Histogram], int]:
    """Run the batches once and count the values at nodes.

    Args:
        captured: Network in eval mode.
        observed: For each histogram the nodes whose values go into it.
        batches: Calibration data; `labels` are not looked at.
        inputs: How to call the network.
        bins: Of each histogram; 0: its ends alone.
        each: Whether they average the ends of each sample.

    Returns:
        The histograms and the number of samples seen.

    Raises:
        DataError: no batch; a batch without an input, of another shape or dtype, with NaN or
        infinity, or
            that the network refuses; or the iterable raised. Names the batch, and the layer.
    """
    made = [Histogram(bins, each) for _ in observed]
    sinks: dict[fx.Node, list[Histogram]] = {}
    for histogram, nodes in zip(made, observed, strict=True):
        for node in nodes:
            sinks.setdefault(node, []).append(histogram)

    def look(node: fx.Node, value: Tensor) -> None:
        for histogram in sinks[node]:
            histogram.add(value)

    return made, sweep(captured, sinks, look, batches, inputs)


def sweep(
    captured: fx.GraphModule,
    nodes: Iterable[fx.Node],
    look: Callable[[fx.Node, Tensor], None],
    batches: Iterable[Batch],
    inputs: Inputs,
) -> int:
    """Run the batches once and show `look` the values of some nodes; returns the number of samples.

    Raises:
        DataError: as `histograms` says. A ValueError from `look` is reported with batch and layer.
    """
    runner = _Watcher(captured, set(nodes), look)
    samples = 0
    with torch.no_grad():
        for index, (batch, rows) in enumerate(checked(batches, inputs)):
            samples += rows
            runner.run_batch(batch, index)
    return samples


def checked(batches: Iterable[Batch], inputs: Inputs) -> Iterator[tuple[Batch, int]]:
    """Yield each batch that fits, with its number of samples.

    Raises:
        DataError: as `histograms` says.
    """
    samples = 0
    for index, batch in enumerate(_drawn(batches)):
        rows = _check(batch, index, inputs)
        samples += rows
        yield batch, rows
    if samples == 0:
        raise DataError("the calibration data holds no batch; give a few hundred samples")


class _Watcher(fx.Interpreter):
    def __init__(
        self,
        captured: fx.GraphModule,
        nodes: set[fx.Node],
        look: Callable[[fx.Node, Tensor], None],
    ) -> None:
        super().__init__(captured)
        self.watched, self.look, self.index = nodes, look, 0
        self.order = [str(n.target) for n in captured.graph.nodes if n.op == "placeholder"]

    def run_batch(self, batch: Batch, index: int) -> None:
        self.index = index
        self.at = ""
        try:
            self.run(*(batch.get(name) for name in self.order), enable_io_processing=False)
        except DataError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            text = str(error).strip().partition("\n")[0]
            raise DataError(
                f"calibration batch {index} fails in the network at {self.at!r}: {text}"
            ) from error

    def run_node(self, n: fx.Node) -> Any:
        self.at = _layer(n)
        value = super().run_node(n)
        if n in self.watched:
            try:
                self.look(n, value)
            except ValueError as error:
                raise DataError(
                    f"calibration batch {self.index} gives {error} at {self.at!r}; leave that "
                    "sample out, or check the weights before that layer"
                ) from error
        return value


def _layer(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "placeholder") else node.name


def _drawn(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches; an error of the user's generator becomes one that names the batch."""
    index = 0
    try:
        for batch in batches:
            yield batch
            index += 1
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"the calibration data raised at batch {index}: {type(error).__name__}: {error}"
        ) from error


def _check(batch: Batch, index: int, inputs: Inputs) -> int:
    """Compare a batch with the example; returns its number of samples."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"calibration batch {index} is a {type(batch).__name__}, not a mapping of input names"
        )
    samples = 0
    for name, example in inputs.example.items():
        if name not in batch:
            raise DataError(
                f"calibration batch {index} has no {name!r}; it holds {', '.join(sorted(batch))}"
            )
        tensor, free = batch[name], {0, *inputs.dynamic.get(name, {})}
        shape = tuple(tensor.shape)
        same = len(shape) == example.dim() and all(
            have == want or axis in free
            for axis, (have, want) in enumerate(zip(shape, example.shape, strict=True))
        )
        if not same:
            expected = ", ".join(
                "any" if i in free else str(s) for i, s in enumerate(example.shape)
            )
            raise DataError(
                f"calibration batch {index}: {name!r} has shape {shape}, expected ({expected})"
            )
        if tensor.dtype != example.dtype:
            raise DataError(
                f"calibration batch {index}: {name!r} is {tensor.dtype}, expected {example.dtype}"
            )
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())):
            _check_values(tensor, name, index)
        samples = max(samples, shape[0] if shape else 1)
    return samples


def _check_values(tensor: Tensor, name: str, index: int) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise DataError(
            f"calibration batch {index}: {name!r} holds NaN or infinity in {bad} of "
            f"{tensor.numel()} values"
        )
