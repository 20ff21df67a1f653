"""How the command line talks: tables and JSON on stdout, words and progress on stderr."""

import json
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
KINDS = (
    "techniques",
    "recipes",
    "runtimes",
    "metrics",
    "sources",
    "datasets",
    "deployments",
    "machines",
)
"""What `tersor list` lists."""
_GREEN, _YELLOW, _RED, _BLUE = 32, 33, 31, 34
_COLORS = {
    "kept": _GREEN,
    "faster": _GREEN,
    "holds": _GREEN,
    "applied": _BLUE,
    "weakened": _YELLOW,
    "missing": _YELLOW,
    "dropped": _RED,
    "slower": _RED,
    "not reached": _RED,
}
_SHORTEST_S = 0.1  # between two refreshes: cheap beside what is tracked


def tell(text: str) -> None:
    """Say something on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(text: str = "") -> None:
    """Print a result on stdout."""
    print(text)


def show_json(content: Mapping[str, Any]) -> None:
    """Print the one JSON document of a `--json` run; `schema` comes first."""
    from tersor.core.schema import to_plain

    plain = {"schema": 1, **to_plain(content)}
    print(json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False))


def check_out(out: Path | None, suffix: str) -> None:
    """Refuse a file that cannot be written, before there is work.

    Raises:
        RecipeError: its name ends otherwise, or its folder is not there.
    """
    from tersor.core.errors import RecipeError

    if out is None:
        return
    if out.suffix != suffix:
        raise RecipeError(f"--out {str(out)!r} must end in {suffix}")
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"--out {str(out)!r}: the folder does not exist")


def colored(word: str, kind: str = "", file: Any = None) -> str:
    """Color a word for a terminal; the word itself stays."""
    code = _COLORS.get(kind or word)
    if code is None or not plays_colors(file or sys.stdout):
        return word
    return f"\033[{code}m{word}\033[0m"


def plays_colors(file: Any) -> bool:
    """Tell whether colors may be written to a file: a terminal, and nobody said no."""
    no = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not no and bool(file.isatty())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align rows in columns two spaces apart; on a terminal the last one is wrapped."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    start = sum(widths[:-1]) + 2 * (len(widths) - 1)
    room = shutil.get_terminal_size((100, 24)).columns - start if sys.stdout.isatty() else 0
    if room >= 20:
        lines = [[*line[:-1], f"\n{' ' * start}".join(_wrapped(line[-1], room))] for line in lines]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def paragraph(text: str, indent: str = "   ") -> str:
    """Wrap a text to 100 columns."""
    return textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)


class Progress:
    """What is under way, on stderr: how far, and the time left. Silent unless it is a terminal.

    Nothing is drawn between two items, so that no thread of ours runs inside a timed section.
    """

    def __init__(self) -> None:
        self.live: Any = None
        self.depth = 0
        self.drawn = 0.0

    def __call__(
        self, items: Iterable[T], what: str | Callable[[], str], total: int | None = None
    ) -> Iterator[T]:
        """Yield `items`, drawing a line for them; a function says its words anew each time."""
        if not sys.stderr.isatty():
            yield from items
            return
        if total is None and isinstance(items, Sized):
            total = len(items)
        live = self._started()
        say = what if callable(what) else lambda: what
        task = live.add_task(say(), total=total)
        self.depth += 1
        try:
            for item in items:
                yield item
                live.update(task, advance=1, description=say())
                self._draw()
        finally:
            self.depth -= 1
            live.remove_task(task)
            if self.depth == 0:
                live.stop()
                self.live = None

    def _started(self) -> Any:
        if self.live is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Live

            self.live = Live(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True, no_color=not plays_colors(sys.stderr)),
                auto_refresh=False,
                transient=True,
            )
            self.live.start()
        return self.live

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self.drawn >= _SHORTEST_S:
            self.drawn = now
            self.live.refresh()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C ask for a stop and the second one stop.

    Yields:
        A function that tells whether somebody asked.
    """
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # not print: the signal may arrive in the middle of one
        os.write(2, b"\nstopping after this step; Ctrl-C again stops now\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
