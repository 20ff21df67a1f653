"""A network on disk and inputs for it, from the words that name them."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_talk import tell

if TYPE_CHECKING:
    from tersor.core.runtime import Arrays, Target
    from tersor.subjects import Place

_RUN_FILES = (".onnx", ".xml", ".pt2")
_INPUTS = 16
_BYTES = 256e6  # of inputs held at a time

Make = Callable[[int], "Sequence[Arrays]"]


@contextmanager
def placed(
    subject: str,
    *,
    data: str | None,
    target: str | None,
    batch: int,
    threads: int | None,
    split: str,
    weights: Path | None,
    partial: bool,
) -> "Iterator[tuple[Place, Make]]":
    """Find a network's files, exporting it to a folder that is removed again where it has none.

    Yields:
        The network, and a function that makes distinct input batches of so many samples: of the
        data where they are given, else made up from the network's signature.
    """
    from tersor import pipeline
    from tersor.core.packing import is_packed
    from tersor.core.recipe import read_target
    from tersor.subjects import place

    batches = None if data is None else pipeline.load_data(data)
    asked = read_target(target)
    path = Path(subject)
    if path.is_dir() or path.suffix in _RUN_FILES or is_packed(path):
        found = place(subject, target=asked, threads=threads)
        samples = None if batches is None else _split(batches, split)
        yield found, _maker(found, samples)
        return
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        found = _exported(
            subject, Path(folder), batches, asked, batch, threads, split, weights, partial
        )
        yield found, _maker(found, _split(batches, split))


def _exported(
    subject: str,
    folder: Path,
    batches: Any,
    asked: "Target | None",
    batch: int,
    threads: int | None,
    split: str,
    weights: Path | None,
    partial: bool,
) -> "Place":
    from dataclasses import replace

    from tersor import pipeline
    from tersor.candidate import arrays_of, export
    from tersor.core.errors import DataError
    from tersor.core.runtime import Signature, Target
    from tersor.plan import make_inputs, try_forward
    from tersor.subjects import Place

    chosen = asked or Target(runtime="onnxruntime")
    if threads is not None:
        chosen = replace(chosen, options={**chosen.options, "threads": threads})
    model = pipeline.load(subject, weights=weights, partial=partial)
    for note in model.notes:
        tell(note)
    if batches is None:
        raise DataError(
            "a network in Python is measured on data; give --data, such as FILE.py:FUNCTION"
        )
    inputs = make_inputs(model, batches)
    if model.form == "module":
        try_forward(model.net, inputs)
    sample = arrays_of(next(iter(_split(batches, split))), inputs.example)
    candidate = export(model.net, folder, inputs, chosen, sample, batch=batch)
    candidate.close()
    signatures = {
        name: Signature(
            shape=tuple(
                inputs.dynamic.get(name, {}).get(axis, size)
                for axis, size in enumerate(tensor.shape)
            ),
            dtype=str(sample[name].dtype),
            usual=tuple(tensor.shape),
        )
        for name, tensor in inputs.example.items()
    }
    return Place(name=subject, target=candidate.target, files=candidate.files, inputs=signatures)


def _split(batches: Any, split: str) -> Iterable[Mapping[str, Any]]:
    from tersor.core.errors import DataError

    found: Iterable[Mapping[str, Any]] | None = getattr(batches, split, None)
    if found is None or next(iter(found), None) is None:
        raise DataError(f"the data have no split {split!r} to measure on")
    return found


def _maker(found: "Place", samples: Iterable[Mapping[str, Any]] | None) -> Make:
    from tersor.feeds import timing_inputs
    from tersor.subjects import fitting, made_inputs

    def make(size: int) -> "Sequence[Arrays]":
        def some(count: int) -> "Sequence[Arrays]":
            if samples is None:
                return made_inputs(found, size, count=count)
            return fitting(found, timing_inputs(samples, size, count=count))

        (one,) = some(1)
        held = sum(array.nbytes for array in one.values())
        return some(int(max(2, min(_INPUTS, _BYTES // max(1, held)))))

    return make
