"""Technique: a function (net, config, context) -> net in a file named after it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tersor.core.runtime import Form

if TYPE_CHECKING:
    from tersor.core.context import Context

Need = Literal["calibration", "train", "validation", "labels", "reference", "teacher"]
A = TypeVar("A", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Technique:
    """What is known of a technique; all but `needs`, `renames` and `paper` is read off its file."""

    name: str
    """The file's name."""
    family: str
    """The folder's name."""
    form: Form
    """From the type of the function's first parameter."""
    config: type[Any]
    """From the type of the function's second parameter."""
    needs: tuple[Need, ...]
    """What the context must hold."""
    renames: bool
    """Whether its layers get names that the network did not have."""
    paper: str | None
    """Source, such as "arXiv:2306.11695"."""
    summary: str
    """First line of the file's docstring."""
    apply: Callable[[Any, Any, "Context"], Any]
    """The function."""


def technique(
    *, needs: tuple[Need, ...] = (), renames: bool = False, paper: str | None = None
) -> Callable[[A], A]:
    """Mark a function as the technique of its file.

    The pipeline copies the caller's network once; a technique may change the one it is given, and
    must return it (or another).

    Args:
        needs: Splits and facts that the context must hold: "calibration", "train", "validation",
            "labels" (in those splits), "reference" (the original network), "teacher" (the one the
            user gives, else the original).
        renames: Whether layers get names that the network did not have; patterns of steps after it
            are then not compared with the network's before there is work.
        paper: Where the method comes from.
    """

    def mark(apply: A) -> A:
        apply.__technique__ = {"needs": needs, "renames": renames, "paper": paper}  # type: ignore[attr-defined]  # read back by plugins.technique
        return apply

    return mark
