"""The error tree.

TersorError
|-- RecipeError        the recipe cannot be read or its order makes no sense
|-- ModelError         the network cannot be loaded, traced or lowered
|-- DataError          a step needs batches it was not given, or they do not fit
|-- DependencyError    a package is missing (also ImportError)
|-- TargetError        the runtime or device cannot do this
|-- StepError          a technique failed; which, where; __cause__ is the original
|   `-- UnfitError     the step does not fit this network, or asks more than it can give
`-- ArtifactError      a directory is not an artifact, or was altered
"""

from collections.abc import Iterable

from tersor.core.nearest import nearest


class TersorError(Exception):
    """Anything tersor raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 4


class RecipeError(TersorError):
    """The recipe cannot be read or its order makes no sense. `mistakes` lists all of them."""

    exit_code = 2

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class ModelError(TersorError):
    """The network cannot be loaded, traced or lowered."""

    exit_code = 2


class DataError(TersorError):
    """A step needs batches it was not given, or they do not fit."""

    exit_code = 2


class DependencyError(TersorError, ImportError):
    """A package is missing."""

    exit_code = 3


class TargetError(TersorError):
    """The runtime or device cannot do this."""

    exit_code = 4


class StepError(TersorError):
    """A technique failed; which, where; `__cause__` is the original."""

    exit_code = 4


class UnfitError(StepError):
    """The step does not fit this network; with a goal its stage is dropped, for this reason.

    `too_strong`: weaker settings may fit.
    """

    def __init__(self, message: str, *, too_strong: bool = False) -> None:
        super().__init__(message)
        self.too_strong = too_strong


class ArtifactError(TersorError):
    """A directory is not an artifact, or was altered."""

    exit_code = 2


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name near to `word`, or an empty string."""
    near = nearest(word, known)
    return "" if near is None else f" Did you mean {near!r}?"


def first_lines(error: BaseException, count: int = 1) -> str:
    """Return the first lines of a foreign error that say something, cut to what a message holds."""
    return " ".join(_lines(error)[:count])[:300]


def named_lines(error: BaseException, count: int = 1) -> str:
    """Return the first lines of a foreign error after the name of its class."""
    return f"{type(error).__name__}: {first_lines(error, count)}"


def last_line(error: BaseException) -> str:
    """Return the last line of a foreign error, for libraries that say there what is wrong."""
    return _lines(error)[-1][:300]


def _lines(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]
