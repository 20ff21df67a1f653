"""Context, Data, Fit: all a technique may read besides the network and its settings."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tersor.core.model import Inputs
from tersor.core.runtime import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
Batch = Mapping[str, "Tensor"]
"""Names of forward's parameters, and `labels`, to tensors."""
Loss = Callable[["nn.Module", Batch], "Tensor"]
"""(network, batch) -> scalar; the batch holds its `labels`."""
What = str | Callable[[], str]
"""Words for what is under way, or a function that says them anew."""
SPLITS = ("calibration", "train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Batches by role. Each is re-iterable; every pass gives the same batches."""

    calibration: Iterable[Batch] | None = None
    """A few hundred samples; labels not needed."""
    train: Iterable[Batch] | None = None
    """Recovery, distillation, quantization-aware training."""
    validation: Iterable[Batch] | None = None
    """Decisions: verdicts, sensitivity, search."""
    test: Iterable[Batch] | None = None
    """The final report, and nothing else."""
    loss: Loss | None = None
    """The user's own loss; else inferred from the labels."""
    quality: Callable[[Any, Any], float] | None = None
    """The user's own quality: (outputs, labels) of a whole split -> number, higher is better."""
    origin: str = ""
    """Where it came from."""

    def without_test(self) -> "Data":
        """Return the same data as techniques may see it."""
        return replace(self, test=None)


class Fit(Protocol):
    """A trainer: the user's, or tersor.trainer.fit."""

    def __call__(
        self,
        net: "nn.Module",
        loss: Loss,
        *,
        batches: Iterable[Batch],
        epochs: float,
        lr: float | None = None,
        groups: Any = None,
        seed: int = 0,
        checkpoint: Path | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> "nn.Module":
        """Train `net` to a lower `loss`; return it in eval mode.

        `on_step` is called after each step with the number of steps done, and of all.
        """
        ...


class Track(Protocol):
    """A progress display."""

    def __call__(self, items: Iterable[T], what: What, total: int | None = None) -> Iterator[T]:
        """Yield `items` while showing how far we are."""
        ...


def silent(items: Iterable[T], what: What, total: int | None = None) -> Iterator[T]:
    """Track nothing."""
    del what, total
    return iter(items)


@contextmanager
def under_way(display: Track, what: What) -> Iterator[None]:
    """Show that one thing is being done, for as long as it takes."""
    yield from display((None,), what, 1)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a technique is given."""

    inputs: Inputs
    """How to call the network."""
    data: Data
    """Batches by role; `test` is always None here."""
    target: Target
    """What we compress for."""
    loss: Loss
    """The user's loss, or the one inferred from the labels."""
    fit: Fit
    """The trainer."""
    latency: Callable[[Sequence[Any]], Sequence[float]]
    """Measured milliseconds a batch of each network, exported to the target, timed interleaved."""
    work_dir: Path
    """A folder of this step's own, for checkpoints."""
    seed: int = 0
    """Decides every random number."""
    reference: Any = None
    """The untouched original: the yardstick. Must not be changed."""
    teacher: Any = None
    """The network to learn from, where the user gives one; else the reference is it."""
    batch: int = 1
    """Samples in a timed batch."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Filled by `record`; goes into the report."""
    display: Track = silent
    """Set by the pipeline."""

    def track(self, items: Iterable[T], what: What, total: int | None = None) -> Iterator[T]:
        """Yield `items`, showing progress where somebody looks."""
        return self.display(items, what, total)

    def record(self, **facts: Any) -> None:
        """Put facts about this step into the report. Values: plain data."""
        self.facts.update(facts)
