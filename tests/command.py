"""Run the command line in a test."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tersor.__main__ import run

ROOT = Path(__file__).resolve().parent.parent


def talk(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command line here; returns exit code, stdout, stderr."""
    code = run(words)
    done = capsys.readouterr()
    return code, done.out, done.err


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run words that fail; returns exit code and message, checked to be short and no traceback.

    What was under way until then is left out.
    """
    code, out, err = talk(capsys, *words)
    assert out == ""
    under_way, error, message = f"\n{err}".partition("\nerror: ")
    assert error
    assert "Traceback" not in under_way
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 3
    return code, message


def fresh(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a new interpreter."""
    command = [sys.executable, "-m", "tersor", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=more.pop("cwd", ROOT), **more
    )
