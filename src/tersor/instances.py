"""Copies of a network, each in a process of its own: they run at the same time, and may die."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from tersor.core import loops, plugins
from tersor.core.loops import Runs
from tersor.core.remote import Child
from tersor.core.runtime import Arrays, Runner
from tersor.core.schema import to_plain
from tersor.core.timing import Calls
from tersor.subjects import Place

LOAD_S = 300.0
"""Longest time that loading may take."""
PATIENCE_S = 60.0
"""A loop may take so much longer than it was meant to before its process counts as stalled."""
_AHEAD_NS = 20_000_000
"""Between telling processes to begin and their beginning."""


class Instance(Protocol):
    """A loaded network that runs loops of bound batches."""

    def bind(self, batches: Sequence[Arrays]) -> Any:
        """Bind batches; the answer is what the loops are given."""
        ...

    def closed(self, bound: Any, *, seconds: float, fewest: int = 1, start_ns: int = 0) -> Runs:
        """Run one after the other."""
        ...

    def opened(self, bound: Any, arrivals_s: np.ndarray) -> Runs:
        """Run requests as they arrive."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class Here:
    """A runner of this process."""

    runner: Runner

    def __init__(self, runner: Runner) -> None:
        """Take a loaded network."""
        self.runner = runner

    def bind(self, batches: Sequence[Arrays]) -> Calls:
        """Bind batches."""
        return [self.runner.bind(batch) for batch in batches]

    def closed(self, bound: Calls, *, seconds: float, fewest: int = 1, start_ns: int = 0) -> Runs:
        """Run one after the other."""
        return loops.closed(bound, seconds=seconds, fewest=fewest, start_ns=start_ns)

    def opened(self, bound: Calls, arrivals_s: np.ndarray) -> Runs:
        """Run requests as they arrive."""
        return loops.opened(bound, arrivals_s)

    def close(self) -> None:
        """Free the runner."""
        self.runner.close()


class Apart:
    """A network that is loaded in a child process; the loops run there, and so do their clocks."""

    child: Child
    patience_s: float

    def __init__(self, place: Place, *, threads: int, patience_s: float = PATIENCE_S) -> None:
        """Load it.

        Args:
            place: The network and its target.
            threads: Of a run.
            patience_s: A loop that takes so much longer than it was meant to is ended.

        Raises:
            TargetError: it cannot be loaded. ChildError: the process died, or takes too long.
        """
        self.patience_s, name = patience_s, place.target.runtime
        if place.artifact is not None:
            place.artifact.verify(place.artifact.manifest["model"])
        plugins.check_device(place.target)
        target = replace(place.target, options={**place.target.options, "threads": threads})
        self.child = Child(name, plugins.interpreter(name))
        try:
            self.child.ask(
                "load", seconds=LOAD_S, file=str(place.files[0].resolve()), target=to_plain(target)
            )
        except BaseException:
            self.child.close()
            raise

    def bind(self, batches: Sequence[Arrays]) -> list[int]:
        """Bind batches."""
        return [
            int(self.child.ask("bind", batch, seconds=LOAD_S).fields["call"]) for batch in batches
        ]

    def closed(
        self, bound: Sequence[int], *, seconds: float, fewest: int = 1, start_ns: int = 0
    ) -> Runs:
        """Run one after the other."""
        answer = self.child.ask(
            "closed",
            seconds=seconds + self.patience_s,
            calls=list(bound),
            for_s=seconds,
            fewest=fewest,
            start_ns=start_ns,
        )
        return Runs(**answer.arrays)

    def opened(self, bound: Sequence[int], arrivals_s: np.ndarray) -> Runs:
        """Run requests as they arrive."""
        answer = self.child.ask(
            "opened",
            {"arrivals_s": arrivals_s},
            seconds=2 * float(arrivals_s[-1]) + self.patience_s,
            calls=list(bound),
        )
        return Runs(**answer.arrays)

    def forget(self, bound: Sequence[int]) -> None:
        """Free bound batches, at the next thing that is asked."""
        self.child.dropped.extend(bound)

    def close(self) -> None:
        """End the process."""
        self.child.close()


def together(
    instances: Sequence[Instance], bound: Sequence[Any], *, seconds: float, fewest: int = 1
) -> list[Runs]:
    """Run closed loops of several instances at the same time.

    Raises:
        TersorError: what the first instance that failed raised.
    """
    # processes share a monotonic clock on Linux and macOS; elsewhere they begin when told to
    shared = sys.platform != "win32" and len(instances) > 1
    start_ns = time.perf_counter_ns() + _AHEAD_NS if shared else 0

    def run(pair: tuple[Instance, Any]) -> Runs:
        return pair[0].closed(pair[1], seconds=seconds, fewest=fewest, start_ns=start_ns)

    if len(instances) == 1:
        return [run((instances[0], bound[0]))]
    with ThreadPoolExecutor(len(instances)) as pool:
        return list(pool.map(run, zip(instances, bound, strict=True)))
