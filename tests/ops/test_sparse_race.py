"""Races: the decision and the break-even of given figures, and what is kept between runs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.ops import sparse_race
from tersor.ops.sparse_race import Race, Races, Shape, Speed, break_even, decide

SHAPE = Shape(inputs=1024, outputs=1024, batch=8)


def speed(times: float, verdict: str = "", dense_ms: float = 1.0) -> Speed:
    verdict = verdict or (
        "faster" if times > 1.03 else "slower" if times < 0.97 else "no difference"
    )
    return Speed(
        dense_ms=dense_ms, times=times, low=times - 0.01, high=times + 0.01, verdict=verdict
    )


def race_of(zeros: float, **against: float) -> Race:
    """Sparse takes 1 ms; dense as many as it is slower."""
    found = {name: speed(times, dense_ms=times) for name, times in against.items()}
    return Race(
        shape=SHAPE, zeros=zeros, threads=1, sparse_ms=1.0, executor="our kernel", against=found
    )


def test_sparse_has_to_beat_every_rival() -> None:
    race = race_of(90, torch=3.0, onnxruntime=1.4)
    wins, why = decide(race, ["torch", "onnxruntime"])
    assert wins
    assert (
        why
        == "faster at 90 % zeros: sparse 1.000 ms, dense 1.400 ms (onnxruntime): 1.40x as fast (1.39 to 1.41)"
    )
    race = race_of(70, torch=3.0, onnxruntime=0.8)
    wins, why = decide(race, ["torch", "onnxruntime"])
    assert not wins
    assert why.startswith(
        "slower at 70 % zeros: sparse 1.000 ms, dense 0.800 ms (onnxruntime): 0.80x"
    )
    assert decide(race, ["torch"])[0]
    assert decide(race_of(80, torch=2.0), ["torch", "openvino"])[0], "a rival that is not installed"


def test_noise_is_no_gain() -> None:
    race = replace(race_of(80, torch=1.0), against={"torch": speed(1.05, "no difference")})
    wins, why = decide(race, ["torch"])
    assert not wins
    assert why.startswith("not faster beyond the noise at 80 % zeros")


def test_break_even_lies_where_the_ratio_is_one() -> None:
    curve = [race_of(z, torch=9.0, onnxruntime=t) for z, t in ((50, 0.5), (70, 0.8), (90, 2.0))]
    share = math.log(1 / 0.8) / math.log(2.0 / 0.8)
    assert break_even(curve[::-1]) == pytest.approx(70 + 20 * share)
    assert break_even(curve[:2]) is None
    assert break_even(curve[2:]) == 90


def test_names_of_shapes() -> None:
    assert str(SHAPE) == "linear 1024 -> 1024, batch 8"
    assert str(replace(SHAPE, size=(256,))) == "linear 1024 -> 1024 on 256 positions, batch 8"
    conv = Shape(kind="conv2d", inputs=16, outputs=32, size=(8, 9), kernel=(3, 3), stride=(2, 2))
    assert str(conv) == "convolution 3x3 stride 2x2 16 -> 32 on 8x9, batch 1"


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An empty cache, and a list of what is measured: figures that a stopwatch gave before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[Any] = []

    def given(shape: Shape, zeros: Any, threads: int) -> list[Race]:
        asked.append((shape, list(zeros), threads))
        return [replace(race_of(z, torch=100 / (100 - z)), shape=shape) for z in zeros]

    monkeypatch.setattr(sparse_race, "race", given)
    return asked


def test_races_are_kept(measured: list[Any]) -> None:
    first = Races().run(SHAPE, [80, 90], 1)
    assert Races().run(SHAPE, [90, 95, 80], 1)[::2] == [first[1], first[0]]
    assert measured == [(SHAPE, [80, 90], 1), (SHAPE, [95], 1)]
    Races().run(SHAPE, [90], 2)
    Races().run(replace(SHAPE, batch=1), [90], 1)
    Races(fresh=True).run(SHAPE, [90], 1)
    assert len(measured) == 5


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1, "races": [{"zeros": "x"}, 3]}', "\x00"]
)
def test_a_damaged_file_is_made_anew(text: str, measured: list[Any]) -> None:
    races = Races()
    first = races.run(SHAPE, [90], 1)
    races.file.write_text(text)
    assert Races().run(SHAPE, [90], 1) == first
    assert len(measured) == 2
    assert Races().run(SHAPE, [90], 1) == first
    assert len(measured) == 2


def test_the_file_stays_small_and_keeps_what_is_sure(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_race, "_MOST_KEPT", 3)
    races = Races()
    for zeros in range(10, 20):
        races.run(SHAPE, [zeros], 1)
    kept = json.loads(races.file.read_text())["races"]
    assert [row["zeros"] for row in kept] == [17, 18, 19]
    unsure = replace(race_of(50, torch=1.0), stable=False)
    monkeypatch.setattr(sparse_race, "race", lambda *_: [unsure])
    assert races.run(SHAPE, [50], 1) == [unsure]
    monkeypatch.setattr(sparse_race, "race", lambda *_: [race_of(50, torch=9.0)])
    assert races.run(SHAPE, [50], 1) == [unsure], "one shape has one fate within a run"
    assert Races().run(SHAPE, [50], 1) != [unsure]
    assert [row["zeros"] for row in json.loads(races.file.read_text())["races"]] == [18, 19, 50]


def test_a_folder_that_cannot_be_written_costs_only_time(
    measured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Races().run(SHAPE, [90], 1)
    assert Races().run(SHAPE, [90], 1)
    assert len(measured) == 2


def test_a_real_race_measures_every_dense_kernel() -> None:
    before = torch.get_num_threads()
    shape = Shape(kind="conv2d", inputs=4, outputs=8, size=(6, 6), kernel=(3, 3), padding=(1, 1))
    (made,) = sparse_race.race(shape, [90], 1)
    assert "torch" in made.against
    assert made.sparse_ms > 0
    for found in made.against.values():
        assert found.low <= found.times <= found.high
        assert found.dense_ms > 0
    assert torch.get_num_threads() == before
