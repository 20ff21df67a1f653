import numpy as np
import pytest

from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics import latency as module
from tersor.metrics.latency import latency
from tests.runners import Matmul, batches


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.1)


def test_latency_says_how_it_was_measured() -> None:
    found = latency(
        Subject(
            target=Target(runtime="x", options={"threads": 1}),
            runner=Matmul(),
            inputs=batches(),
            conditions={"batch": 8},
        )
    )
    assert found.unit == "ms"
    assert found.spread is not None
    assert found.spread[0] <= found.value <= found.spread[1]
    assert found.count >= module.MIN_RUNS
    assert found.conditions["batch"] == 8
    assert found.conditions["threads"] == 1
    assert found.how.startswith(f"median of {found.count} runs after ")
    assert found.how.endswith(", batch 8, 1 thread")


def test_latency_grows_with_the_work() -> None:
    target = Target(runtime="x")
    once, often = (
        latency(Subject(target=target, runner=Matmul(256, times), inputs=batches(width=256)))
        for times in (1, 8)
    )
    assert often.value > 3 * once.value


def test_a_slow_network_is_not_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_MOST_S", 0.05)
    times_ms = module.timed([lambda: sum(range(1_000_000))], seconds=0.0)
    assert 1 <= times_ms.size < module.MIN_RUNS
    assert (np.asarray(times_ms) > 1).all()
