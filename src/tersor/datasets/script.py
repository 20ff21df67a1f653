"""The user's own function that returns batches: "file.py:function" or "package.module:function"."""

from collections.abc import Mapping

from tersor.core.context import SPLITS, Data
from tersor.core.errors import DataError, suggest
from tersor.core.imports import call_object
from tersor.datasets._check import check

_EXTRAS = ("loss", "quality")


def load(place: str) -> Data:
    """Call a function without arguments that returns a mapping of splits.

    Args:
        place: "file.py:function" or "package.module:function". The mapping has some of calibration,
            train, validation and test, each a re-iterable of batches (mappings of forward's
            parameters and `labels` to tensors), and may have `loss` and `quality`.

    Raises:
        DataError: it cannot be imported, fails, returns something else, or a batch is wrong.
    """
    found = call_object(place, error=DataError, what="data function")
    if isinstance(found, Data):
        found = {name: getattr(found, name) for name in (*SPLITS, *_EXTRAS)}
        found = {name: value for name, value in found.items() if value is not None}
    if not isinstance(found, Mapping):
        raise DataError(
            f"data function {place!r} returned {type(found).__name__}, not a mapping with "
            "calibration, train and test"
        )
    for name in found:
        if name not in (*SPLITS, *_EXTRAS):
            raise DataError(
                f"data function {place!r} returned the unknown entry {name!r}."
                f"{suggest(str(name), (*SPLITS, *_EXTRAS))} "
                f"It may have {', '.join((*SPLITS, *_EXTRAS))}"
            )
    for name in _EXTRAS:
        if found.get(name) is not None and not callable(found[name]):
            raise DataError(
                f"data function {place!r}: {name!r} is {type(found[name]).__name__}, not a function"
            )
    return check(Data(**found, origin=f"script:{place}"), place)
