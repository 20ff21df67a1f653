"""scenario(): the four modes, their percentiles, and a planted stall."""

import time

import numpy as np
import pytest

from tersor.core.errors import TargetError
from tersor.instances import Here
from tersor.scenario import percentiles, scenario
from tests.runners import Matmul, batches


class Sleeps:
    """A network that takes a time, and once a long one."""

    def __init__(self, seconds: float, stall_at: int = 0, stall_s: float = 0.0) -> None:
        self.seconds, self.stall_at, self.stall_s, self.count = seconds, stall_at, stall_s, 0

    def bind(self, inputs):
        def call():
            self.count += 1
            time.sleep(self.stall_s if self.count == self.stall_at else self.seconds)

        return call

    def close(self) -> None:
        pass


def make(size: int):
    return batches(count=2, rows=size)


def test_single_and_multi():
    found = scenario(Here(Matmul()), make, "single", seconds=0.1)
    assert found.batch == 1
    assert found.queries == len(found.latencies_ms)
    assert found.at(50).ms == pytest.approx(np.median(found.latencies_ms), rel=1e-2)
    assert found.at(90).low_ms <= found.at(90).ms <= found.at(90).high_ms
    assert found.samples_per_s == pytest.approx(found.queries / found.seconds)
    assert found.short.startswith("short: 0.1 s, MLPerf asks for 600 s")
    many = scenario(Here(Matmul()), make, "multi", seconds=0.05)
    assert many.batch == 8
    assert many.samples_per_s == pytest.approx(8 * many.queries / many.seconds)


def test_offline_runs_everything_at_once():
    found = scenario(Here(Matmul()), make, "offline", batch=8, samples=100)
    assert found.queries == 13
    assert found.samples_per_s == pytest.approx(13 * 8 / found.seconds)
    assert "104 samples, MLPerf asks for 24,576" in found.short
    latencies = np.array(found.latencies_ms)
    assert (np.diff(latencies) > 0).all()  # all were there at the beginning
    swept = scenario(Here(Matmul()), make, "offline", seconds=0.1)
    assert "the fastest of 1, 8, 32, 128" in swept.note


@pytest.mark.slow
def test_a_planted_stall_shows_in_server_mode():
    """A stall of 1 s at 300 queries/s: hundreds of queries wait; in a closed loop one does."""
    # the warm-up of 0.5 s comes first: at most 500 runs of 1 ms
    network = Sleeps(0.0005, stall_at=1500, stall_s=1.0)
    found = scenario(Here(network), make, "server", rate=300.0, seconds=6.0)
    assert found.queries == 1800
    assert found.slowest_ms >= 1000
    assert found.stalls >= 1
    assert sum(ms > 100 for ms in found.latencies_ms) >= 200
    assert found.at(99).ms is not None
    assert found.at(99).ms >= 700
    closed = scenario(Here(Sleeps(0.0005, 1500, 1.0)), make, "single", seconds=3.0)
    assert sum(ms > 500 for ms in closed.latencies_ms) == 1


def test_server_runs_at_the_rate_asked_for():
    found = scenario(Here(Sleeps(0.0002)), make, "server", rate=500.0, seconds=0.3)
    assert found.rate == 500.0
    assert found.queries == 150
    assert min(found.latencies_ms) >= 0.2
    assert found.seconds == pytest.approx(0.3, abs=0.2)  # Poisson: 150 gaps, 8 % of spread


@pytest.mark.slow
def test_the_rate_is_searched():
    found = scenario(Here(Sleeps(0.0005)), make, "server", limit_ms=50.0, seconds=1.0)
    assert found.rate is not None
    assert 100 < found.rate < 2000
    assert found.queries >= 1000
    if not found.note.startswith("not confirmed"):
        assert found.at(99).ms <= 50.0
    with pytest.raises(TargetError, match="no rate keeps the 99th percentile of latency within"):
        scenario(Here(Sleeps(0.0005)), make, "server", limit_ms=0.01, seconds=0.1)


def test_percentiles_need_enough_samples():
    ms = np.random.default_rng(0).exponential(size=999)
    p50, p90, p99, p999 = percentiles(ms)
    assert p50.ms == np.quantile(ms, 0.5)
    assert p90.ms == np.quantile(ms, 0.9)
    assert p99.ms is None
    assert p99.note == "not enough samples (999 of 1,000)"
    assert p999.note == "not enough samples (999 of 10,000)"
    p99 = percentiles(np.append(ms, 1.0))[2]
    assert p99.low_ms <= p99.ms <= p99.high_ms
    assert all(each.ms is None for each in percentiles(ms[:5]))
    assert percentiles(np.random.default_rng(0).exponential(size=10_000))[3].ms is not None


def test_the_slowest_is_of_the_kind_of_the_percentiles():
    """Queries that come faster than they are answered wait, and so does the slowest one."""
    found = scenario(Here(Sleeps(0.002)), make, "server", rate=2000.0, seconds=0.05)
    assert found.slowest_ms == pytest.approx(max(found.latencies_ms), abs=1e-4)
    assert found.slowest_ms > 50
