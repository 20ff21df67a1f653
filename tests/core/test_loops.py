"""Closed and open loops of requests."""

import time

import numpy as np
import pytest

from tersor.core.loops import closed, opened, poisson


class Stalls:
    """A call of about 0.2 ms that sleeps once."""

    def __init__(self, at: int, seconds: float) -> None:
        self.at, self.seconds, self.count = at, seconds, 0

    def __call__(self) -> None:
        self.count += 1
        time.sleep(self.seconds if self.count == self.at else 0.0002)


def test_closed_runs_one_after_the_other_for_so_long():
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    runs = closed(calls, seconds=0.01)
    assert seen[:4] == [0, 1, 2, 0]
    assert len(runs.began_ns) == len(seen)
    assert (runs.began_ns[1:] >= runs.ended_ns[:-1]).all()
    assert (runs.due_ns == runs.began_ns).all()
    assert runs.began_ns[-1] - runs.began_ns[0] <= 10e6
    assert len(closed(calls, seconds=0.0, fewest=5).began_ns) == 5


def test_closed_begins_when_told():
    start_ns = time.perf_counter_ns() + 20_000_000
    runs = closed([lambda: None], seconds=0.0, start_ns=start_ns)
    assert runs.began_ns[0] >= start_ns


def test_latency_of_an_open_loop_counts_from_the_arrival():
    """Three requests at once, 5 ms each: they wait for 0, 5 and 10 ms."""
    runs = opened([lambda: time.sleep(0.005)], [0.0, 0.0, 0.0])
    service, latency = runs.service_ms, runs.latency_ms
    assert np.allclose(np.cumsum(service), latency, atol=1.0)
    assert latency[2] >= 15
    assert (runs.began_ns >= runs.due_ns).all()


def test_a_stall_shows_in_the_open_loop_and_hides_in_the_closed_one():
    arrivals = np.arange(300) / 500  # every 2 ms
    slow = opened([Stalls(100, 0.2)], arrivals).latency_ms
    assert slow.max() >= 200
    # all that arrive during the stall wait for its end: about 100
    assert (slow > 20).sum() >= 60
    hidden = closed([Stalls(100, 0.2)], seconds=0.0, fewest=300).latency_ms
    assert (hidden > 150).sum() == 1


@pytest.mark.parametrize("rate", [10.0, 1000.0])
def test_poisson(rate):
    gaps = np.diff(poisson(rate, 20_000, seed=3))
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)  # 4 standard errors of the mean
    assert gaps.std() == pytest.approx(1 / rate, rel=0.05)  # exponential: as large as the mean
    assert np.array_equal(poisson(rate, 10, seed=3), poisson(rate, 10, seed=3))
    assert not np.array_equal(poisson(rate, 10, seed=3), poisson(rate, 10, seed=4))
