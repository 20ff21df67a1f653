import numpy as np
import pytest

from tersor.core.metric import Subject
from tersor.core.runtime import Arrays, Target
from tersor.metrics import throughput as module
from tersor.metrics.throughput import batches_of, throughput
from tests.runners import Matmul, batches


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET_S", 0.2)
    monkeypatch.setattr(module, "BLOCKS", 3)


TARGET = Target(runtime="x", options={"threads": 1})


def test_throughput_names_the_best_batch_and_all_others() -> None:
    found = throughput(
        Subject(
            target=TARGET,
            runner=Matmul(),
            inputs=batches(rows=1),
            conditions={"batch": 1},
        )
    )
    assert found.unit == "1/s"
    best = int(found.conditions["batch"])
    assert best > 1  # one row a call wastes a matrix product
    rates = {s: float(found.conditions[f"batch_{s}_per_s"]) for s in (1, 8, 32, 128)}
    assert max(rates, key=lambda s: rates[s]) == best
    assert found.spread is not None
    assert found.spread[0] <= found.value <= found.spread[1]
    assert found.how.startswith(f"best of batches 1, 8, 32, 128: {best}; median of ")
    assert found.how.endswith(f"{found.count} interleaved blocks, 1 thread")


def test_a_fixed_batch_is_kept_and_said() -> None:
    class Fixed(Matmul):
        def bind(self, inputs: Arrays):  # type: ignore[no-untyped-def]
            if len(inputs["x"]) != 8:
                raise RuntimeError("expected 8 rows")
            return super().bind(inputs)

    found = throughput(Subject(target=TARGET, runner=Fixed(), inputs=batches(rows=8)))
    assert found.conditions["batch"] == 8
    assert found.how.endswith("the network does not take batches of 1, 32, 128")


def test_a_network_that_fails_at_the_batch_asked_for_fails() -> None:
    class Broken(Matmul):
        def bind(self, inputs: Arrays):  # type: ignore[no-untyped-def]
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        throughput(Subject(target=TARGET, runner=Broken(), inputs=batches()))


def test_batches_are_made_of_the_samples_given() -> None:
    inputs = [{"x": np.arange(i * 4, i * 4 + 4.0)[:, None], "table": np.ones(3)} for i in range(5)]
    made = batches_of(inputs, 4, 16)
    assert len(made) == 5
    for batch in made:
        assert batch["x"].shape == (16, 1)
        assert len(set(batch["x"].ravel())) == 16  # none twice
        assert set(batch["x"].ravel()) <= set(range(20))
        assert (batch["table"] == np.ones(3)).all()
    assert batches_of(inputs, 4, 64)[0]["x"].shape == (64, 1)
    assert batches_of(inputs, 4, 4) == inputs
