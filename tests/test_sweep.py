"""sweep(): the grid, what follows from a cell's time, and what is picked."""

import time
from dataclasses import replace

import numpy as np
import pytest

from tersor.core.errors import RecipeError
from tersor.instances import Here
from tersor.sweep import Cell, Sweep, grid, picked, read_cells, stalls, sweep
from tests.runners import Matmul, batches


def cell(batch: int, ms: float, instances: int = 1, threads: int = 1) -> Cell:
    return Cell(
        batch=batch, threads=threads, instances=instances, batch_ms=ms, low_ms=ms, high_ms=1.1 * ms
    )


class Fixed:
    """A network of a known time: 2 ms and 1 ms a sample."""

    def bind(self, inputs):
        rows = len(inputs["x"])
        if rows == 4:
            raise ValueError("batches of 4 are not for it")
        return lambda: time.sleep(0.002 + 0.001 * rows)

    def close(self) -> None:
        pass


def make(size: int):
    return batches(count=2, rows=size)


def test_all_figures_follow_from_one_time():
    one = cell(8, 4.0, instances=2)
    assert (one.sample_ms, one.batches_per_s, one.samples_per_s) == (0.5, 500.0, 4000.0)
    plain = one.plain()
    assert plain["samples_per_s"] == plain["batch"] * plain["batches_per_s"]
    assert plain["batches_per_s"] == 1000 * plain["instances"] / plain["batch_ms"]
    assert plain["sample_ms"] * plain["batch"] == plain["batch_ms"]
    skipped = replace(one, status="skipped", reason="why").plain()
    assert skipped == {
        "batch": 8, "threads": 1, "instances": 2, "status": "skipped", "reason": "why",
    }  # fmt: skip


def test_knee_pareto_and_limits():
    found = Sweep(
        cells=(
            cell(1, 1.0),  # 1000/s
            cell(8, 4.0),  # 2000/s
            cell(8, 5.0, threads=2),  # 1600/s: beaten in both
            cell(32, 15.5),  # 2065/s
            cell(64, 31.0),  # 2065/s: as much, and slower
            replace(cell(128, 1.0), status="failed"),
        )
    )
    assert found.best == found.cells[3]
    assert found.knee == found.cells[1]  # 2000 of 2065 is 97 %
    assert found.pareto == [found.cells[0], found.cells[1], found.cells[3]]
    assert found.within(16.0) == found.cells[1]  # the interval of 32 ends at 17.05
    assert found.within(17.1) == found.cells[3]
    assert found.within(5.5) == found.cells[1]
    assert found.within(1.0) is None
    words = picked(found, 16.0)
    assert words["largest batch within 16 ms"] == found.cells[1]
    assert Sweep(cells=()).knee is None
    assert Sweep(cells=()).pareto == []


@pytest.mark.slow
def test_a_known_network_is_found():
    found = sweep(
        lambda threads: Here(Fixed()), make, cells=[(1, 1)], batches=(1, 2, 4), seconds=0.1
    )
    one, two, four = found.cells
    assert one.batch_ms >= 3.0
    assert two.batch_ms >= 4.0
    assert one.runs >= 10
    assert one.low_ms <= one.batch_ms <= one.high_ms
    assert two.samples_per_s > one.samples_per_s
    assert (four.status, four.reason) == ("failed", "ValueError: batches of 4 are not for it")


@pytest.mark.slow
def test_instances_run_at_the_same_time():
    """Two that sleep do twice the work of one."""
    found = sweep(
        lambda threads: Here(Fixed()), make, cells=[(1, 1), (1, 2)], batches=(8,), seconds=0.1
    )
    one, two = found.cells
    assert two.runs > one.runs


@pytest.mark.slow
def test_oversubscribed_cells_are_skipped_unless_asked_for():
    def start(threads: int) -> Here:
        return Here(Matmul())

    cells = [(1, 1), (2, 2)]
    found = sweep(start, make, cells=cells, batches=(1,), cores=2, seconds=0.01)
    assert [c.status for c in found.cells] == ["ran", "skipped"]
    assert found.cells[1].reason == "oversubscribed: 2 x 2 on 2 cores"
    found = sweep(start, make, cells=cells, batches=(1,), seconds=0.01)
    assert [c.status for c in found.cells] == ["ran", "ran"]


def test_slow_batches_are_not_tried():
    found = sweep(
        lambda threads: Here(Fixed()), make, cells=[(1, 1)], batches=(8, 4096), seconds=0.01
    )
    assert found.cells[1].status == "skipped"
    assert "expected to take" in found.cells[1].reason


@pytest.mark.parametrize(
    ("cores", "wanted"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])],
)
def test_grid(cores, wanted):
    assert grid(cores) == [(t, i) for i in wanted for t in wanted]


def test_cells_are_read():
    assert read_cells("1x2, 2x1,1x2") == [(1, 2), (2, 1)]
    for text in ("1", "1x", "0x2", "axb", ""):
        with pytest.raises(RecipeError, match="is not THREADSxINSTANCES, such as 1x2"):
            read_cells(text)


def test_stalls_are_counted():
    assert stalls(np.array([1.0] * 20 + [9.9, 10.0, 500.0])) == 2
