"""Machines described in data: the shipped ones, and what is refused."""

from pathlib import Path

import pytest

from tersor.core.errors import RecipeError
from tersor.core.machine import FOLDER, WIDTHS, Machine, find, machines

GOOD = """\
name: mine
kind: npu
what: a chip
gops: {int8: 100}
memory_gb_s: 2
sources: [its data sheet]
"""


@pytest.mark.parametrize("name", machines())
def test_shipped_machines(name: str) -> None:
    found = find(name)
    assert found.name == name
    assert found.what
    assert found.sources
    assert found.runtimes
    assert found.formats
    assert set(found.gops) <= set(WIDTHS)
    if found.sparse_2_4:
        assert {"fp16", "int8"} <= set(found.gops)
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")  # what `tersor list machines` shows


def test_every_kind_of_hardware_is_there() -> None:
    kinds = {find(name).kind for name in machines()}
    assert kinds == {"cpu", "gpu", "npu", "tpu", "fpga", "microcontroller"}


def test_speed_derived_from_the_core() -> None:
    pi = find("raspberry-pi-5")  # cores x clock x pipelines x lanes x 2 operations
    assert pi.gops["fp32"] == pytest.approx(4 * 2.4 * 2 * 4 * 2)
    assert pi.gops["fp16"] == pytest.approx(4 * 2.4 * 2 * 8 * 2)
    assert pi.gops["int8"] == pytest.approx(4 * 2.4 * 2 * 16 * 2)
    dpu = find("zynq-dpu")  # pixels x channels in x channels out x 2 operations x clock
    assert dpu.gops["int8"] == pytest.approx(8 * 16 * 16 * 2 * 0.3)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert find(file) == Machine(
        name="mine",
        kind="npu",
        what="a chip",
        gops={"int8": 100.0},
        memory_gb_s=2.0,
        sources=("its data sheet",),
    )
    assert find(file).formats == ("int8",)


def test_all_mistakes_at_once_with_line_and_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = GOOD.replace("memory_gb_s: 2", "memory_gbs: 2").replace("kind: npu", "kind: nqu")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        find(file)
    assert caught.value.exit_code == 2
    assert sorted(caught.value.mistakes) == [
        "mine.yaml:1:1: field 'memory_gb_s' is missing",
        "mine.yaml:2:7: kind: expected one of 'cpu', 'gpu', 'npu', 'tpu', 'fpga', "
        "'microcontroller', got 'nqu'. Did you mean 'npu'?",
        "mine.yaml:5:1: unknown field 'memory_gbs'. Did you mean 'memory_gb_s'?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "{int8: 100}",
            "{int9: 100}",
            "unknown number format 'int9' in gops. Did you mean 'int8'?",
        ),
        ("{int8: 100}", "{int8: 0}", "gops of int8 must be more than 0, got 0"),
        ("{int8: 100}", "{}", "gops names no number format"),
        ("memory_gb_s: 2", "memory_gb_s: -1", "memory_gb_s must be more than 0, got -1"),
        ("kind: npu", "kind: npu\nwatts: -1", "watts must not be negative, got -1"),
        ("{int8: 100}", "{fp16: 1}\nneeds_full_int8: true", "needs_full_int8, but gops has no"),
        ("kind: npu", "kind: npu\nruntimes: [litrt]", "unknown runtime 'litrt'. Did you mean 'li"),
        ("[its data sheet]", "[]", "sources is empty; say which documents the numbers come from"),
    ],
)
def test_bad_values(old: str, new: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        find(file)
    assert said in str(caught.value)


def test_unknown_machines() -> None:
    with pytest.raises(RecipeError) as caught:
        find("raspberry-pi-4")
    assert str(caught.value) == (
        "unknown machine 'raspberry-pi-4'. Did you mean 'raspberry-pi-5'? "
        "Give a .yaml file or a name that `tersor list machines` shows"
    )
    with pytest.raises(RecipeError, match=r"machine file 'none\.yaml' does not exist"):
        find("none.yaml")
