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

import difflib
from collections.abc import Iterable


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
    """Return " Did you mean 'x'?" for the known name nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
