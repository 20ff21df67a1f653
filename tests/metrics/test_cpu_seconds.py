import time
from collections.abc import Callable

import pytest

from tersor.core.errors import TargetError
from tersor.core.metric import Subject
from tersor.core.runtime import Arrays, Target
from tersor.core.timing import cpu_seconds_of
from tersor.metrics import cpu_seconds as module
from tersor.metrics.cpu_seconds import cpu_seconds
from tests.runners import Matmul, batches


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.1)
    monkeypatch.setattr(module, "BLOCK_MS", 10.0)


class Busy:
    """A network that computes for 1 ms of the processor and then waits for 3 ms."""

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        def call() -> Arrays:
            began = time.process_time()
            while time.process_time() - began < 0.001:
                pass
            time.sleep(0.003)
            return {}

        return call

    def close(self) -> None:
        pass


def test_computing_counts_and_waiting_does_not() -> None:
    target = Target(runtime="x", options={"threads": 1})
    found = cpu_seconds(Subject(target=target, runner=Busy(), inputs=batches()))
    assert 1.0 <= found.value < 2.0  # 1,000 runs of 1 ms
    assert found.unit == "s"
    assert found.spread is not None
    assert found.spread[0] <= found.value <= found.spread[1]
    assert found.conditions["runs"] == 1000
    assert found.how.startswith("CPU-seconds of 1000 runs: median of ")
    assert found.how.endswith(", 1 thread")


def test_twice_the_work_takes_about_twice_as_much() -> None:
    target = Target(runtime="x")
    once, often = (
        cpu_seconds(Subject(target=target, runner=Matmul(256, times), inputs=batches(width=256)))
        for times in (1, 8)
    )
    assert often.value > 3 * once.value


def test_another_device_is_said_to_be_left_out() -> None:
    target = Target(runtime="x", device="cuda", options={"threads": 1})
    found = cpu_seconds(Subject(target=target, runner=Matmul(), inputs=batches()))
    assert found.how.startswith("CPU-seconds of 1000 runs, without the work of cuda: ")


def test_calls_that_run_elsewhere_tell_their_own_time() -> None:
    class Elsewhere:
        def run_ns(self) -> int:
            raise AssertionError("not asked for here")

        def cpu_ns(self) -> int:
            return 250

        def __call__(self) -> None:
            raise AssertionError("not asked for here")

    assert cpu_seconds_of([Elsewhere()], 0, 4) == pytest.approx(1e-6)


def test_calls_that_run_elsewhere_and_cannot_tell_are_refused() -> None:
    class Silent:
        def run_ns(self) -> int:
            return 1

        def __call__(self) -> None:
            raise AssertionError("not asked for here")

    with pytest.raises(TargetError, match="cpu_seconds: unavailable: the network runs in another"):
        cpu_seconds_of([Silent()], 0, 4)
