"""How the command line talks: tables and JSON on stdout, words on stderr."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
