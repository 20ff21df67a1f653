"""Which compiled files the user trusts: those made here, and those that were said to be.

Loading compiled code runs whatever is in it, and the hashes of an artifact only say that it is as
its maker left it. So what is written on this machine is remembered by its hash, in the user's own
folder, and what comes from elsewhere is loaded only after the user has said so.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

_log = logging.getLogger("tersor")


def folder() -> Path:
    """Return where hashes are remembered, each as an empty file; it may not exist."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path("~/.local/state").expanduser()) / "tersor/trusted"


def remember(hashes: Iterable[str]) -> None:
    """Trust files from now on; where that cannot be written down, say so in the log."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        for each in hashes:
            (folder() / each).touch()
    except (OSError, RuntimeError) as error:  # no home
        _log.warning("what is compiled here cannot be remembered as trusted: %s", error)


def trusted(hashes: Iterable[str]) -> bool:
    """Tell whether all of these files are trusted."""
    try:
        return all((folder() / each).is_file() for each in hashes)
    except (OSError, RuntimeError):
        return False
