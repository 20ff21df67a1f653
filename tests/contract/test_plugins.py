"""What every metric, source and data set promises."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tersor import benchmark
from tersor.candidate import Candidate, arrays_of, export
from tersor.core import plugins
from tersor.core.context import SPLITS
from tersor.core.metric import Measurement, Subject
from tersor.core.model import Source
from tersor.core.runtime import Target
from tests import networks

METRICS = list(plugins.names("metrics"))
UNITS = ("ms", "B", "%", "1/s", "1", "J", "s")


def pairs(*kinds: str) -> list[tuple[str, str]]:
    return [(kind, name) for kind in kinds for name in plugins.names(kind)]


@pytest.mark.parametrize(("kind", "name"), pairs("metrics", "sources", "datasets"))
def test_is_described(kind: str, name: str) -> None:
    summary = {entry["name"]: entry["summary"] for entry in plugins.catalog()[kind]}[name]
    assert 10 < len(summary) <= 120
    assert summary.endswith(".")


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Candidate]:
    sample = arrays_of(networks.split(0, 8)[0], ["x"])
    target = Target(runtime="onnxruntime", options={"threads": 1})
    made = export(
        networks.tiny_cnn(), tmp_path_factory.mktemp("cnn"), networks.inputs(), target, sample
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def subject(candidate: Candidate) -> Subject:
    batches = networks.split(1200, 1500)
    outputs, labels = benchmark.evaluate(candidate.runner, batches)
    return Subject(
        target=candidate.target,
        net=candidate.net,
        files=candidate.files,
        runner=candidate.runner,
        inputs=benchmark.timing_inputs(batches, 2),
        outputs=outputs,
        labels=labels,
        reference=outputs,
        split="validation",
        quality=lambda made, wanted: 100 * float((made.argmax(1) == wanted).sum()) / len(wanted),
        conditions={"batch": 2, "threads": 1},
    )


def suited(name: str, subject: Subject) -> Subject:
    """Give the metrics of numbers numbers, and those of boxes boxes."""
    assert subject.outputs is not None
    assert subject.labels is not None
    if name in ("mse", "rmse"):
        return dataclasses.replace(subject, labels=np.eye(10)[subject.labels])
    if name == "mean_average_precision":
        boxes = np.tile([[[1.0, 0.1, 0.1, 0.5, 0.5], [-1.0, 0, 0, 0, 0]]], (6, 1, 1))
        found = np.insert(boxes, 1, 0.9, axis=2)
        found[:2, 0, 4:] = 0.2  # too small in two images
        return dataclasses.replace(subject, outputs=found, labels=boxes)
    return subject


@pytest.mark.parametrize("name", METRICS)
def test_metric_declares_itself(name: str) -> None:
    found = plugins.metric(name)
    assert found.measure.__name__ == name
    assert found.unit in UNITS
    assert found.better in ("lower", "higher")
    assert set(found.needs) <= {field.name for field in dataclasses.fields(Subject)}
    if found.proxy:
        assert plugins.metric(found.proxy).needs == found.needs
    if found.score is not None:
        assert set(found.needs) <= {"outputs", "labels", "quality"}


@pytest.mark.parametrize("name", METRICS)
def test_metric_measures(name: str, subject: Subject) -> None:
    found = plugins.metric(name)
    (made,) = benchmark.measure_subject(suited(name, subject), (name,))
    assert isinstance(made, Measurement)
    if made.conditions.get(name) == "unavailable":  # then its proxy is measured, and says so
        assert made.how.startswith(f"{name}: unavailable: ")
        found = plugins.metric(found.proxy)
    assert (made.metric, made.unit, made.better) == (found.name, found.unit, found.better)
    assert np.isfinite(made.value)
    assert made.value >= 0
    assert made.how
    assert made.count >= 1
    if made.spread is not None:
        assert made.spread[0] <= made.value <= made.spread[1]


@pytest.mark.parametrize("name", METRICS)
def test_metric_needs_nothing_that_it_does_not_say(name: str, subject: Subject) -> None:
    found = plugins.metric(name)
    optional = [f.name for f in dataclasses.fields(Subject) if f.default is None]
    bare = dataclasses.replace(
        suited(name, subject), **{n: None for n in optional if n not in found.needs}
    )
    (made,) = benchmark.measure_subject(bare, (name,))
    assert made.metric in (name, found.proxy)


SCORED = [name for name in METRICS if plugins.metric(name).score is not None]


@pytest.mark.parametrize("name", SCORED)
def test_equal_networks_do_not_differ_in_a_paired_test(name: str, subject: Subject) -> None:
    given = suited(name, subject)
    assert given.outputs is not None
    assert given.labels is not None
    found = benchmark.paired(
        name, given.outputs, given.outputs, given.labels, quality=given.quality
    )
    assert found is not None
    assert (found.difference, found.p) == (0, 1)
    assert found.low <= 0 <= found.high
    assert found.verdict("higher") == "no difference"


@pytest.mark.parametrize("name", list(plugins.names("sources")))
def test_source_declares_itself(name: str) -> None:
    found = plugins.source(name)
    assert isinstance(found, Source)
    assert all(suffix.startswith(".") for suffix in found.suffixes)
    names = list(inspect.signature(found.load).parameters)
    assert names[1:3] == ["weights", "partial"]


def test_sources_do_not_share_file_endings() -> None:
    endings = [
        suffix for name in plugins.names("sources") for suffix in plugins.source(name).suffixes
    ]
    assert len(endings) == len(set(endings))


@pytest.mark.parametrize("name", list(plugins.names("datasets")))
def test_dataset_has_a_load(name: str) -> None:
    load: Any = plugins.module("datasets", name).load
    assert next(iter(inspect.signature(load).parameters)) == "place"
    assert (load.__doc__ or "").strip()


def test_digits_give_the_same_batches_every_pass_and_share_none() -> None:
    data = plugins.module("datasets", "digits").load("")
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        batches = getattr(data, split)
        if batches is None or split == "calibration":  # a part of train
            continue
        for first, second in zip(batches, batches, strict=True):
            assert np.array_equal(first["x"].numpy(), second["x"].numpy())
            assert np.array_equal(first["labels"].numpy(), second["labels"].numpy())
        for batch in batches:
            for image in batch["x"].numpy():
                assert seen.setdefault(image.tobytes(), split) == split, (
                    "an image stands in two splits"
                )
