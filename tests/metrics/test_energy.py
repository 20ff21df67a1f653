"""Energy, on made-up counters: a tree of files as the kernel has it, and a power that is known."""

import builtins
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tersor.core.metric import Measurement, Subject
from tersor.core.runtime import Arrays, Target
from tersor.core.timing import Calls
from tersor.metrics import _counters, cpu_seconds
from tersor.metrics import energy as module
from tersor.metrics._counters import Counter, NoCounterError, counters
from tersor.metrics.energy import energy
from tests.runners import Matmul, batches


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 3)
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    monkeypatch.setattr(module, "RUN_S", 0.1)
    monkeypatch.setattr(cpu_seconds, "SECONDS", 0.05)


def zone(root: Path, place: str, name: str, used_uj: int, limit_uj: int = 10_000_000) -> Path:
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit_uj}\n")
    (folder / "energy_uj").write_text(f"{used_uj}\n")
    return folder / "energy_uj"


def subject(device: str = "cpu") -> Subject:
    target = Target(runtime="x", device=device, options={"threads": 1})
    return Subject(
        target=target, runner=Matmul(), inputs=batches(), conditions={"batch": 8, "threads": 1}
    )


def test_packages_and_their_memories_are_read_and_nothing_twice(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)  # a part of the package
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 500_000)
    zone(tmp_path, "intel-rapl:1", "psys", 1)  # holds the package
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)  # the same by another way
    found = counters("cpu", tmp_path)
    assert [c.name for c in found] == ["package-0", "dram"]
    assert [c.joules() for c in found] == [0, 0]
    first.write_text("3500000\n")
    memory.write_text("500250\n")
    assert [c.joules() for c in found] == [2.5, 0.00025]


def test_a_counter_that_starts_anew_goes_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    (counter,) = counters("cpu", tmp_path)
    for used, wanted in ((9_500_000, 0.5), (1_000_000, 2.0), (500_000, 11.5)):
        file.write_text(str(used))
        assert counter.joules() == pytest.approx(wanted)


def test_where_there_is_no_counter_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoCounterError, match=r"the system has no powercap \(RAPL\)"):
        counters("cpu", tmp_path / "powercap")
    with pytest.raises(NoCounterError, match="powercap has no zone of a processor package"):
        counters("cpu", tmp_path)
    with pytest.raises(NoCounterError, match="no counter of a device 'npu' is known"):
        counters("npu", tmp_path)
    file = zone(tmp_path, "intel-rapl:0", "package-0", 1)

    def refuse(self: Path, **_: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return original(self, **_)

    original = Path.read_text
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NoCounterError, match="intel-rapl:0/energy_uj is readable only as root"):
        counters("cpu", tmp_path)
    monkeypatch.undo()
    file.write_text("nothing\n")
    with pytest.raises(NoCounterError, match="intel-rapl:0 cannot be read: invalid literal"):
        counters("cpu", tmp_path)


def test_a_device_without_nvml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *rest: Any) -> Any:
        if name == "pynvml":
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        NoCounterError, match=r"NVML needs the package 'nvidia-ml-py'.*'tersor\[energy\]'"
    ):
        counters("cuda")


@pytest.mark.parametrize(
    ("visible", "chosen"), [("", "0"), ("3,1", "3"), ("GPU-ab12,GPU-cd34", "GPU-ab12")]
)
def test_the_device_is_the_first_that_cuda_sees(
    visible: str, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: asked.append(str(i)),
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (counter,) = counters("cuda", tmp_path / "none")
    assert asked == [chosen]
    assert (counter.name, counter.joules()) == ("GPU", 2.5)
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    assert [c.name for c in counters("cuda", tmp_path)] == ["GPU", "package-0"]
    assert [c.name for c in counters("tensorrt", tmp_path)] == ["GPU", "package-0"]
    assert [c.name for c in counters("openvino", tmp_path)] == ["package-0"]


def powered(run_j: float, idle_w: float) -> tuple[Calls, Counter]:
    """Make calls that draw so much each, and the counter of a machine that draws power meanwhile."""
    runs = 0

    def call() -> None:
        nonlocal runs
        time.sleep(0.001)
        runs += 1

    return [call], Counter(name="made", joules=lambda: idle_w * time.perf_counter() + run_j * runs)


def test_what_idling_draws_is_taken_off() -> None:
    calls, counter = powered(run_j=0.5, idle_w=20)
    rounds = module.measured(calls, [counter])
    assert len(rounds) == 3
    for each in rounds:
        assert each.joules == pytest.approx(0.5, rel=0.02)
        assert each.idle_w == pytest.approx(20, rel=0.02)
        assert each.run_w > each.idle_w


def test_power_that_runs_do_not_change_is_no_measurement() -> None:
    calls, _ = powered(run_j=1, idle_w=20)
    still = Counter(name="still", joules=lambda: 7.0)
    with pytest.raises(
        NoCounterError, match=r"the counters show no more power in runs \(0 W\) than idle \(0 W\)"
    ):
        module.measured(calls, [still])


def test_a_measurement_names_its_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    class Counted(Matmul):
        def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
            inner = super().bind(inputs)

            def call() -> Arrays:
                nonlocal runs
                runs += 1
                return inner()

            return call

    made = Counter(name="package-0", joules=lambda: 20 * time.perf_counter() + 0.5 * runs)
    monkeypatch.setattr(module, "counters", lambda device: [made])
    found = energy(dataclasses.replace(subject(), runner=Counted()))
    assert found.metric == "energy"
    assert found.unit == "J"
    assert found.value == pytest.approx(0.5, rel=0.02)
    assert found.spread is not None
    assert found.spread[0] <= found.value <= found.spread[1]
    assert found.conditions["counters"] == "package-0"
    assert found.conditions["idle_w"] == pytest.approx(20, rel=0.01)
    assert found.how.startswith("joules of a run beyond idling, counters package-0: median of 3")


def test_without_a_counter_the_proxy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "counters", lambda device: _counters.counters(device, tmp_path / "none")
    )
    found: Measurement = energy(subject())
    assert found.metric == "cpu_seconds"
    assert found.conditions["energy"] == "unavailable"
    assert found.how.startswith(
        "energy: unavailable: the system has no powercap (RAPL); in its place CPU-seconds of 1000 runs"
    )
