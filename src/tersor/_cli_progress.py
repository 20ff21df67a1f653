"""What is under way, on stderr, where that is a terminal; and what Ctrl-C does."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tersor._cli_talk import plays_colors

T = TypeVar("T")
_SHORTEST_S = 0.1
"""Between two refreshes of a terminal: cheap beside what is tracked."""


@dataclass(kw_only=True, eq=False)
class _Task:
    say: Callable[[], str]
    total: int | None
    began: float
    done: int = 0
    bar: Any = None

    def told(self) -> str:
        """Say what it is, how far, and how long it takes yet."""
        return ": ".join(filter(None, (self.say(), self.far())))

    def far(self) -> str:
        """Say how far it is; nothing of a task of one piece."""
        from tersor.core.report_words import human_seconds

        if self.total == 1 or not self.done:
            return ""
        if self.total is None:
            return f"{self.done}"
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"{self.done} of {self.total}, about {human_seconds(left)} left"


class Progress:
    """What is under way, on stderr: how far, and the time left. Silent unless it is a terminal.

    Nothing is written between two items, so that no thread of ours runs inside a timed section.
    """

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.live: Any = None
        self.drawn = 0.0

    def __call__(
        self, items: Iterable[T], what: str | Callable[[], str], total: int | None = None
    ) -> Iterator[T]:
        """Yield `items`, telling of them; a function says its words anew each time."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = self._begun(what if callable(what) else lambda: what, total)
        try:
            for item in items:
                yield item
                task.done += 1
                self._draw(_SHORTEST_S)
        finally:
            self._end(task)

    def now(self) -> str:
        """Say what is under way, from the whole to its parts."""
        return ", ".join(task.told() for task in self.tasks)

    def _begun(self, say: Callable[[], str], total: int | None) -> _Task:
        task = _Task(say=say, total=total, began=time.monotonic())
        self.tasks.append(task)
        if sys.stderr.isatty():
            task.bar = self._started().add_task(say(), total=None if total == 1 else total, far="")
            self._draw(0.0)
        return task

    def _end(self, task: _Task) -> None:
        if task not in self.tasks:
            return
        at = self.tasks.index(task)
        gone = self.tasks[at:]  # with loops inside it that an error has left open
        del self.tasks[at:]
        if self.live is None:
            return
        for each in gone:
            self.live.remove_task(each.bar)
        if not self.tasks:
            self.live.stop()
            self.live = None

    def _started(self) -> Any:
        if self.live is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live

            self.live = Live(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[far]}"),
                console=Console(stderr=True, no_color=not plays_colors(sys.stderr)),
                auto_refresh=False,
                transient=True,
            )
            self.live.start()
        return self.live

    def _draw(self, every_s: float) -> None:
        """Show the present state, unless that was done a moment ago."""
        now = time.monotonic()
        if self.live is None or now - self.drawn < every_s:
            return
        self.drawn = now
        for task in self.tasks:
            self.live.update(task.bar, completed=task.done, description=task.say(), far=task.far())
        self.live.refresh()


@contextmanager
def interruptible(now: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C ask for a stop, and say what is waited for; the second one stops.

    Args:
        now: Says what is under way.

    Yields:
        A function that tells whether somebody asked.
    """
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        words = (
            "\nstopping after the training step or the stage that is under way, so that nothing "
            f"is lost\nwaiting for: {now()}\nCtrl-C again stops at once; --resume then goes on "
            "from what is saved by now\n"
        )
        # not print: the signal may arrive in the middle of one
        os.write(2, words.encode())

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
