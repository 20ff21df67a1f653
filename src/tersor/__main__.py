"""The command `tersor`, also as `python -m tersor`: exit codes and messages of everything it does.

0 ok; 1 below the user's limit, or a finding; 2 bad usage, recipe, data or model; 3 something
missing in the environment; 4 failure while running; 130 interrupted, resumable.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence

LINES = 3
"""Longest message of an error, except where it lists several mistakes."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and end the process."""
    sys.exit(run(sys.argv[1:] if words is None else words))


def run(words: Sequence[str]) -> int:
    """Run the command line.

    Args:
        words: What was typed after `tersor`.

    Returns:
        The exit code.
    """
    from tersor.cli import app

    if "--debug" not in words and not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries say about themselves
    try:
        code = app(list(words), prog_name="tersor", standalone_mode=False, obj={"words": [*words]})
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader, `head` for instance, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, words)


def _failed(error: Exception, words: Sequence[str]) -> int:
    """Say what went wrong, in few lines, and return the exit code."""
    import typer

    from tersor.core.errors import TersorError

    as_typed = isinstance(error, typer.TyperException)
    if isinstance(error, typer.TyperException):
        lines = [error.format_message(), f"`tersor {_verb(words)}--help` shows what there is"]
        code = 2
    elif isinstance(error, TersorError):
        lines, code = _lines(error), error.exit_code
    else:
        lines, code = _unforeseen(error), 4
    if "--debug" in words and not as_typed:
        import traceback

        traceback.print_exception(error)
    print("error: " + "\n".join(lines), file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    if "--json" in words:
        content = {"class": type(error).__name__, "message": "\n".join(lines), "exit_code": code}
        print(json.dumps({"schema": 1, "error": content}, indent=1))
    return code


def _lines(error: Exception) -> list[str]:
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    mistakes = getattr(error, "mistakes", ())
    if len(mistakes) > 1 or len(lines) <= LINES:
        return lines or [type(error).__name__]
    return [*lines[: LINES - 1], f"... ({len(lines) - LINES + 1} more lines; --debug shows them)"]


def _unforeseen(error: Exception) -> list[str]:
    if isinstance(error, MemoryError):
        return ["out of memory; use smaller batches in the data, or a machine with more"]
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, OSError) and error.errno is not None:
        return [first]
    return [f"{type(error).__name__}: {first}", "this is not foreseen; --debug shows where"]


def _verb(words: Sequence[str]) -> str:
    verb = next((word for word in words if not word.startswith("-")), "")
    from tersor.cli import VERBS

    return f"{verb} " if verb in VERBS else ""


if __name__ == "__main__":
    main()
