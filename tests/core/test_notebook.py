"""Results in a notebook: small tables, all texts escaped."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tersor.core.notebook import shown
from tersor.core.statistics import Comparison
from tests.core.artifacts import write
from tests.core.report_sample import report

BAD = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Every tag closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(text: str) -> set[str]:
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    return parser.seen


def test_a_table_escapes_everything() -> None:
    text = shown(BAD, (BAD,), [(BAD, 3)], (BAD, ""))
    assert "<script" not in text
    assert tags(text) == {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert text.count("<p>") == 2  # an empty note is none


def test_a_report_and_an_artifact(tmp_path: Path) -> None:
    text = report(warnings=(BAD,))._repr_html_()
    tags(text)
    assert "3.85x faster, 5.01x smaller" in text
    assert "<td>weight_only</td><td>dropped</td>" in text
    assert "<script" not in text
    made = write(tmp_path / "out", report=report())
    assert made._repr_html_() == report()._repr_html_()


def test_a_measurement_and_a_comparison() -> None:
    text = report().before[0]._repr_html_()
    assert "<td>latency</td><td>2.31 ms (2.26 to 2.38)</td>" in text
    found = Comparison(
        speedup=2.0,
        low=1.9,
        high=2.1,
        verdict="faster",
        min_effect=0.03,
        blocks=9,
        a_ms=2.0,
        b_ms=1.0,
        stable=True,
        how=BAD,
    )
    text = found._repr_html_()
    tags(text)
    assert "2.000x [1.900, 2.100]" in text
    assert "<script" not in text


def results() -> list[Any]:
    """One of each result above `core`."""
    pytest.importorskip("torch")
    from tersor.core.runtime import Target
    from tersor.deployer import Deployed
    from tersor.diagnosis import Cause, Diagnosis
    from tersor.explainer import Explanation, Part
    from tersor.fusions import Fused, Fusions, Step
    from tersor.ops.ceilings import Ceilings
    from tersor.plan import Plan
    from tersor.roofline import Layer, Profile
    from tersor.scenario import Percentile, Scenario
    from tersor.survey import Row, Survey
    from tersor.sweep import Cell, Sweep

    size = report().before[1]
    target = Target(runtime="onnxruntime")
    contest = Comparison(
        speedup=1.5,
        low=1.4,
        high=1.6,
        verdict="faster",
        min_effect=0.03,
        blocks=9,
        a_ms=3.0,
        b_ms=2.0,
        stable=True,
    )
    cause = Cause(cause="padding", share=0.5, evidence=BAD, meaning="m", fix="f")
    part = Part(name="convolutions", float_ms=2.0, int8_ms=1.0, why_float=BAD)
    layer = Layer(name=BAD, kind="Conv", what="w", covers=(), ms=1.0, share=1.0)
    row = Row(runtime="openvino", status="ran", measurements={"size": size}, reason=BAD)
    return [
        Deployed(path=Path("out"), files=(BAD,), check="run it"),
        Diagnosis(question="latency", causes=(cause,), name="x"),
        Explanation(
            target=target, batch=1, threads=1, technique="static", comparison=contest, parts=(part,)
        ),
        Fusions(
            target=target,
            batch=1,
            threads=1,
            rows=(Fused(kind=BAD, found=2),),
            operators=3,
            steps=(Step(technique="fuse_qkv", comparison=contest), Step(technique="t", reason=BAD)),
        ),
        Plan(
            stages=(BAD,),
            metrics=(),
            seconds=(1.0, 2.0),
            memory_bytes=1,
            disk_bytes=1,
            notes=(),
        ),
        Profile(
            subject="x",
            target="onnxruntime:cpu",
            batch=1,
            threads=1,
            latency_ms=1.0,
            operators_ms=1.0,
            cached=True,
            layers=(layer,),
            ceilings=Ceilings(threads=1, memory_gb_s=1.0, cache_gb_s=1.0),
            words=(),
            warnings=(),
            environment={},
        ),
        Scenario(
            mode="single",
            queries=1,
            batch=1,
            seconds=1.0,
            percentiles=(Percentile(percent=90.0, ms=2.0), Percentile(percent=99.0, ms=None)),
            samples_per_s=5.0,
            stalls=0,
            slowest_ms=2.0,
            note=BAD,
        ),
        Survey(subject=BAD, batch=1, threads=1, split="test", rows=(row,), how="h"),
        Sweep(
            cells=(
                Cell(batch=1, threads=1, instances=1, batch_ms=2.0),
                Cell(batch=2, threads=1, instances=1, status="failed", reason=BAD),
            )
        ),
    ]


def test_every_other_result() -> None:
    for made in results():
        text = made._repr_html_()
        assert "table" in tags(text), type(made)
        assert "<script" not in text
        assert "alert(1)" in text, type(made)


def test_the_profile_of_sparsity() -> None:
    pytest.importorskip("torch")
    from tersor.profiler import Sparsity

    made = Sparsity(batch=1, threads=1, kernel="k", layers=(), warnings=(BAD,), environment={})
    assert "&lt;script&gt;" in replace(made)._repr_html_()
