"""diagnose(): seeded cases whose cause is proven (benchmarks/slow_cases.py), and its counts.

Cases that timing decides are slow; those here are decided by bytes, zeros or kinds of operators.
"""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from tersor._causes_size import size_causes
from tersor._size_parts import CODED, GRAPH, VECTORS, gained, size_parts
from tersor.core.errors import RecipeError, TargetError
from tersor.core.packing import pack
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.diagnosis import ADVICE, diagnose
from tersor.ops.file_graph import FileGraph, read_onnx
from tests.command import ROOT, talk
from tests.runners import linear_onnx

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
QUICK = ("rounded_on_disk", "tied_on_disk", "embedding_on_disk")
AT_LEAST = 18
"""Of the 20 cases, whose verified cause must come first."""


def slow_cases() -> ModuleType:
    """Import the cases that the benchmarks prove."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("_slow_cases")
    finally:
        sys.path.remove(folder)


def case(name: str) -> Any:
    return next(each for each in slow_cases().CASES if each.name == name)


def causes(each: Any, folder: Path) -> list[str]:
    before, after, _ = each.build(folder)
    pytest.importorskip(after.runtime.replace("torch_export", "torch"))
    found = diagnose(
        after.file,
        before.file,
        question=each.question,
        target=None
        if each.question == "size"
        else Target(runtime=after.runtime, options=after.options),
        batch=after.batch,
        budget_s=0.4,
    )
    return [cause.cause for cause in found.causes]


@pytest.mark.parametrize("name", QUICK)
def test_the_cause_is_named_first(name: str, tmp_path: Path) -> None:
    assert causes(case(name), tmp_path)[0] == case(name).cause


@pytest.mark.slow
def test_of_twenty_cases_nearly_all_are_named(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    named = {}
    for each in slow_cases().CASES:
        folder = tmp_path / each.name
        folder.mkdir()
        named[each.name] = (causes(each, folder)[:1], each.cause)
    assert len(named) == 20
    wrong = {name: pair for name, pair in named.items() if pair[0] != [pair[1]]}
    assert len(named) - len(wrong) >= AT_LEAST, wrong


def test_every_case_has_a_measured_fix() -> None:
    stored = json.loads((ROOT / "benchmarks/results/slow_cases.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in stored["results"]}
    assert rows.keys() == {each.name for each in slow_cases().CASES}
    for each in slow_cases().CASES:
        assert rows[each.name]["cause"] == each.cause
        assert rows[each.name]["fix_gain"]["low"] > 1


def test_a_file_without_waste_has_no_cause() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    assert size_causes(Path("x.onnx"), FileGraph(constants={"w": weight}), weight.nbytes) == []


def test_the_bytes_of_zeros_are_those_of_shannon() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weight.reshape(-1)[: 64 * 64 // 2] = 0  # one bit each says where
    graph = FileGraph(constants={"w": weight})
    ((name, share, _),) = size_causes(Path("x.onnx"), graph, weight.nbytes)
    assert name == "stored_zeros"
    assert share == pytest.approx(1 - (1 / 8 + 4 / 2) / 4)


def test_a_repeated_weight_counts_once() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = FileGraph(constants={"a": weight, "b": weight.copy(), "c": weight.copy()})
    ((name, share, _),) = size_causes(Path("x.onnx"), graph, 3 * weight.nbytes)
    assert (name, share) == ("duplicates", pytest.approx(2 / 3))


def test_products_are_counted_as_by_hand(tmp_path: Path) -> None:
    _, after, _ = case("odd_channels").build(tmp_path)
    graph = read_onnx(onnx.load(after.file), {"x": np.zeros((2, 3, 16, 16), np.float32)})
    counted = [op.macs for op in graph.operators if op.kind == "Conv"]
    assert counted == [2 * 256 * 57 * 9 * n for n in (3, 57, 57, 57, 57, 57)]
    assert graph.reuse(graph.operators[0]) == 2 * 256


@pytest.mark.parametrize("name", ADVICE)
def test_steps_that_are_advised_exist(name: str) -> None:
    for step in re.findall(r"`- ([^`]+)`", ADVICE[name].fix):
        Recipe.parse({"steps": [yaml.safe_load(step)], "target": "onnxruntime:cpu"})


def test_every_cause_of_a_case_has_advice() -> None:
    assert slow_cases().CAUSES.keys() <= ADVICE.keys()


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"got 'sise'\. Did you mean 'size'\?"):
        diagnose("x.onnx", question="sise")


@pytest.mark.slow
def test_a_program_of_pytorch_is_explained_by_bytes_only(tmp_path: Path) -> None:
    each = case("zeros_on_disk")
    assert causes(each, tmp_path)[0] == each.cause
    with pytest.raises(TargetError, match="torch_export does not tell where its time goes"):
        diagnose(tmp_path / "after.pt2", target=Target(runtime="torch_export"))


def test_the_verb_tells_causes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, _ = case("tied_on_disk").build(tmp_path)
    words = ["explain", str(before.file), str(after.file), "--of", "size"]
    code, out, _ = talk(capsys, *words)
    assert code == 0
    assert "1. duplicates: the same weights are stored more than once (83 % of the bytes" in out
    assert "to do: share them" in out
    code, out, _ = talk(capsys, *words, "--json")
    assert code == 0
    (cause,) = json.loads(out)["diagnosis"]["causes"]
    assert cause.keys() >= {"cause", "share", "evidence", "fix"}
    words = ["explain", str(after.file), "--threads", "1", "--budget", "0.2"]
    code, out, _ = talk(capsys, *words)
    assert code == 0
    assert "onnxruntime:cpu, batch 1, threads 1" in out


def test_every_byte_of_a_file_is_told_and_what_made_it_smaller():
    large, small = np.ones((64, 32), np.float32), np.ones((32, 32), np.int8)
    before = size_parts(FileGraph(constants={"w": large, "b": large[:, 0]}), 64 * 33 * 4 + 500)
    assert [(part.what, part.numbers, part.bytes) for part in before] == [
        ("weights in float32", 64 * 32, 64 * 32 * 4),
        (VECTORS, 64, 64 * 4),
        (GRAPH, 0, 500),
    ]
    after = size_parts(FileGraph(constants={"w": small}), 1024 + 700)
    assert gained(before, after) == "2,048 -> 1,024 weights (2x), 32 -> 8 bits each (4x)"
    assert gained(before, ()) == ""


def test_what_coding_saves_is_told():
    graph = FileGraph(constants={"w": np.zeros((64, 32), np.float32)})
    plain, packed = size_parts(graph, 8192 + 100), size_parts(graph, 2073, 6219)
    assert [(part.what, part.bytes) for part in packed][1:] == [(GRAPH, 100), (CODED, -6219)]
    assert sum(part.bytes for part in packed) == 2073
    assert gained(plain, packed).endswith("32 -> 32 bits each (1x), coded without loss (4x)")


def test_every_byte_of_a_packed_file_is_told(tmp_path: Path):
    plain = linear_onnx(tmp_path / "plain.onnx", width=512, classes=64)
    (tmp_path / "model.onnx").write_bytes(plain.read_bytes())
    packed = pack([tmp_path / "model.onnx"], tmp_path / "model.packed")
    before, after = diagnose(packed, plain, question="size").contents
    assert sum(part.bytes for part in after) == packed.stat().st_size
    assert [part for part in after if part.what != CODED] == list(before)


def test_numbers_of_four_bits_take_half_a_byte():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weight = np.ones((3, 3), ml_dtypes.int4)
    (part, _) = size_parts(FileGraph(constants={"w": weight}), 100)
    assert (part.what, part.bytes) == ("weights in int4", 5)
