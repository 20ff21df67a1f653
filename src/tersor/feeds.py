"""Batches in, arrays out: run a split, and make batches of one size for timing."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tersor.core.errors import DataError, TargetError
from tersor.core.runtime import Arrays, Runner


def evaluate(
    runner: Runner, batches: Iterable[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run a whole split.

    Args:
        runner: A loaded network.
        batches: Tensors or arrays by name; `labels` is not fed.

    Returns:
        The first output, samples first, and the labels (None where the batches have none).

    Raises:
        DataError: no batches, or they do not fit the network or one another.
    """
    outputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in batches:
        feeds = arrays_of(batch)
        try:
            made = runner.bind(feeds)()
        except KeyError as error:
            raise DataError(
                f"the network takes an input {error.args[0]!r}; the batches hold {', '.join(feeds)}"
            ) from error
        outputs.append(np.array(next(iter(made.values()))))
        if "labels" in batch:
            labels.append(array_of(batch["labels"]))
    if not outputs:
        raise DataError("the split has no batches; it must be a re-iterable, such as a list")
    if labels and len(labels) != len(outputs):
        raise DataError(f"only {len(labels)} of {len(outputs)} batches have labels")
    return _joined(outputs, "outputs"), _joined(labels, "labels") if labels else None


def check_finite(outputs: np.ndarray, split: str) -> None:
    """Refuse outputs that no metric may average away.

    Raises:
        TargetError: some are NaN or infinite; says how many. DataError: there are none.
    """
    if not outputs.size:
        raise DataError(f"the split {split!r} has no samples: outputs have shape {outputs.shape}")
    bad = int(np.count_nonzero(~np.isfinite(outputs)))
    if bad:
        raise TargetError(
            f"{bad} of {outputs.size} outputs over {split} are not finite (NaN or infinite)"
        )


def tell_not_finite(name: str, outputs: Arrays, *, random: bool) -> None:
    """Warn of outputs of a timed batch that are NaN or infinite."""
    floats = [np.asarray(a) for a in outputs.values() if np.asarray(a).dtype.kind == "f"]
    bad = sum(int(np.count_nonzero(~np.isfinite(array))) for array in floats)
    if bad:
        logging.getLogger("tersor").warning(
            "warning: %d of %d outputs of %s are not finite (NaN or infinite) on the first batch%s",
            bad,
            sum(array.size for array in floats),
            name,
            ", which is random; give data to see whether they are on real inputs" * random,
        )


def timing_inputs(
    batches: Iterable[Mapping[str, Any]], batch_size: int, count: int = 16
) -> list[Arrays]:
    """Make distinct input batches of one size from the samples of a split.

    Args:
        batches: Tensors or arrays by name, samples first; `labels` is left out. Only samples of the
            first batch's shape are used.
        batch_size: Samples in each batch made.
        count: Batches to make. With too few samples, each batch is a new draw of them.

    Raises:
        DataError: no batches.
    """
    pools: list[dict[str, np.ndarray]] = []
    sizes: list[int] = []
    for batch in batches:
        arrays = arrays_of(batch)
        if pools and _kinds(arrays) != _kinds(pools[0]):
            continue
        pools.append(arrays)
        sizes.append(_size(batch))
        if sum(sizes) >= count * batch_size:
            break
    rows = sum(sizes)
    if not rows:
        raise DataError("no samples to time with: the split has no batches")
    first = pools[0]
    sampled = [name for name, array in first.items() if array.ndim and len(array) == sizes[0]]
    pool = {name: np.concatenate([arrays[name] for arrays in pools]) for name in sampled}
    rng = np.random.default_rng(0)
    made: list[Arrays] = []
    for i in range(count):
        if rows >= count * batch_size:
            chosen = np.arange(i * batch_size, (i + 1) * batch_size)
        else:
            turns = range(-(-batch_size // rows))
            chosen = np.concatenate([rng.permutation(rows) for _ in turns])[:batch_size]
        made.append(
            {
                name: np.ascontiguousarray(pool[name][chosen]) if name in pool else array
                for name, array in first.items()
            }
        )
    return made


def array_of(value: Any) -> np.ndarray:
    """Turn a tensor or an array into an array."""
    return np.ascontiguousarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def arrays_of(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turn the inputs of a batch into arrays; `labels` is left out."""
    return {name: array_of(value) for name, value in batch.items() if name != "labels"}


def _size(batch: Mapping[str, Any]) -> int:
    """Count a batch's samples: its labels, else its first input."""
    arrays = [batch["labels"]] if "labels" in batch else list(batch.values())
    return next((len(array) for array in arrays if array.ndim), 0)


def _kinds(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in arrays.items()}


def _joined(parts: list[np.ndarray], what: str) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if any(part.ndim == 0 for part in parts) or len(shapes) > 1:
        raise DataError(
            f"{what} of the batches have different shapes beyond the first axis "
            f"({', '.join(str(s) for s in sorted(shapes))}); pad the samples to one shape"
        )
    return np.concatenate(parts)
