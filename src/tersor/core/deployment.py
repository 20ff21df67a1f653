"""Deployment: what a file in `deployments/` offers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.core.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How an artifact becomes what a server, a cluster or a program takes."""

    runtimes: tuple[str, ...]
    """The artifacts it takes: those of these runtimes."""
    options: type[Any]
    """Its settings: a frozen dataclass with defaults."""
    write: Callable[["Artifact", Path, Any], None]
    """Write the files into an empty folder; the artifact's hashes were compared before."""
    check: str
    """What shows that it works: a line to run in the folder; {name} stands for that setting."""
    devices: tuple[str, ...] = ("cpu",)
    """The devices that what it writes computes on."""
    environment: str = ""
    """The environment that `write` needs, by name; "": none."""
