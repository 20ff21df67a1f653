"""A network on disk and inputs for it, from the words that name them."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_talk import tell

if TYPE_CHECKING:
    from tersor.candidate import Candidate
    from tersor.core.context import Data
    from tersor.core.model import Inputs, Model
    from tersor.core.runtime import Arrays, Signature, Target
    from tersor.subjects import Place

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
    from tersor.core.recipe import read_target
    from tersor.subjects import on_disk, place

    asked = read_target(target)
    if on_disk(subject):
        batches = None if data is None else pipeline.load_data(data)
        found = place(subject, target=asked, threads=threads)
        yield found, _maker(found, None if batches is None else split_of(batches, split))
        return
    model, read, inputs = loaded(subject, data, weights=weights, partial=partial)
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        samples = split_of(read, split)
        with exported(model, inputs, Path(folder), samples, asked, batch, threads) as candidate:
            found = _place(subject, candidate, inputs, samples)
        yield found, _maker(found, samples)


def loaded(
    subject: str, data: str | None, *, weights: Path | None, partial: bool
) -> "tuple[Model, Data, Inputs]":
    """Read a network and its data, and call it once.

    A file that says what it takes needs no data: random inputs are then the split `test`.

    Raises:
        DataError: there are no data, or they do not fit.
    """
    from tersor import pipeline
    from tersor.core.errors import DataError
    from tersor.plan import make_inputs, try_forward

    model = pipeline.load(subject, weights=weights, partial=partial)
    for note in model.notes:
        tell(note)
    if data is None and (model.form == "module" or model.inputs is None):
        raise DataError(
            "a network in Python is measured on data; give --data, such as FILE.py:FUNCTION"
        )
    batches = _random(subject, model) if data is None else pipeline.load_data(data)
    inputs = make_inputs(model, batches)
    if model.form == "module":
        try_forward(model.net, inputs)
    return model, batches, inputs


def _random(subject: str, model: "Model") -> "Data":
    """Make inputs up, as a model file is measured on where there are no data."""
    import torch

    from tersor.core.context import Data
    from tersor.core.runtime import Target
    from tersor.subjects import Place, made_inputs

    assert model.inputs is not None
    sample = {name: tensor.numpy() for name, tensor in model.inputs.example.items()}
    signatures = _signatures(model.inputs, sample)
    found = Place(name=subject, target=Target(runtime=""), files=(), inputs=signatures)
    size = len(next(array for array in sample.values() if array.ndim))
    tell("inputs are random: there is no --data")
    return Data(
        test=[
            {name: torch.from_numpy(array) for name, array in batch.items()}
            for batch in made_inputs(found, size)
        ]
    )


@contextmanager
def exported(
    model: "Model",
    inputs: "Inputs",
    folder: Path,
    samples: Iterable[Mapping[str, Any]],
    asked: "Target | None",
    batch: int,
    threads: int | None,
) -> "Iterator[Candidate]":
    """Export a network to a target, ONNX Runtime by default, and close it at the end."""
    from dataclasses import replace

    from tersor.candidate import arrays_of, export
    from tersor.core import plugins
    from tersor.core.runtime import Target

    chosen = asked or Target(runtime="onnxruntime")
    runtime = plugins.runtime(chosen.runtime)
    plugins.require("runtimes", chosen.runtime, (*runtime.to_export, *runtime.to_run))
    if threads is not None:
        chosen = replace(chosen, options={**chosen.options, "threads": threads})
    sample = arrays_of(next(iter(samples)), inputs.example)
    candidate = export(model.net, folder, inputs, chosen, sample, batch=batch)
    try:
        yield candidate
    finally:
        candidate.close()


def _place(
    subject: str,
    candidate: "Candidate",
    inputs: "Inputs",
    samples: Iterable[Mapping[str, Any]],
) -> "Place":
    from tersor.candidate import arrays_of
    from tersor.subjects import Place

    signatures = _signatures(inputs, arrays_of(next(iter(samples)), inputs.example))
    return Place(name=subject, target=candidate.target, files=candidate.files, inputs=signatures)


def _signatures(inputs: "Inputs", sample: "Arrays") -> "dict[str, Signature]":
    from tersor.core.runtime import Signature

    return {
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


def split_of(batches: Any, split: str) -> Iterable[Mapping[str, Any]]:
    """Return the batches of a split.

    Raises:
        DataError: there are none.
    """
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
