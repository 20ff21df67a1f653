"""Counters of energy that machines have: RAPL of processors, NVML of NVIDIA's devices.

Each counts all that its part of the machine draws, whoever draws it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
PROCESSORS = ("cpu", "openvino", "xnnpack")
"""Devices of targets that are the processor."""
NVIDIA = ("cuda", "tensorrt")


class NoCounterError(Exception):
    """There is no counter of the device here; says why."""


@dataclass(frozen=True, kw_only=True)
class Counter:
    """A counter that only rises."""

    name: str
    joules: Callable[[], float]


def counters(device: str, powercap: Path = POWERCAP) -> list[Counter]:
    """Find the counters of a device, and of the processor that feeds it where it has one.

    Raises:
        NoCounterError: the device itself has none.
    """
    if device in PROCESSORS:
        return _rapl(powercap)
    if device not in NVIDIA:
        raise NoCounterError(f"no counter of a device {device!r} is known")
    found = [_nvml()]
    try:
        return [*found, *_rapl(powercap)]
    except NoCounterError:
        return found


def _rapl(powercap: Path) -> list[Counter]:
    """Find the packages and their memories; other zones are parts of these, or hold them.

    Source:
        Linux, Documentation/power/powercap/powercap.rst.
    """
    if not powercap.is_dir():
        raise NoCounterError("the system has no powercap (RAPL)")
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            if not (name.startswith("package") or name == "dram"):
                continue
            limit = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
            found.append(Counter(name=name, joules=_Zone(zone / "energy_uj", limit).joules))
        except PermissionError:
            raise NoCounterError(
                f"{zone.name}/energy_uj is readable only as root (since Linux 5.10)"
            ) from None
        except (OSError, ValueError) as error:
            raise NoCounterError(f"{zone.name} cannot be read: {error}") from error
    if not any(counter.name.startswith("package") for counter in found):
        raise NoCounterError("powercap has no zone of a processor package (RAPL)")
    return found


class _Zone:
    """A zone of powercap, whose counter starts anew beyond its range."""

    def __init__(self, file: Path, limit: int) -> None:
        self.file, self.limit = file, limit
        self.last, self.total = self._read(), 0

    def joules(self) -> float:
        now = self._read()
        self.total += now - self.last if now >= self.last else now - self.last + self.limit
        self.last = now
        return self.total / 1e6

    def _read(self) -> int:
        return int(self.file.read_text(encoding="ascii"))


def _nvml() -> Counter:
    """Find the device that CUDA numbers 0."""
    try:
        import pynvml
    except ModuleNotFoundError:
        raise NoCounterError(
            "NVML needs the package 'nvidia-ml-py'. Install it with: pip install 'tersor[energy]'"
        ) from None
    try:
        pynvml.nvmlInit()
        device: Any = _first_device(pynvml)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
    except pynvml.NVMLError as error:
        raise NoCounterError(f"NVML has no counter here: {error}") from error
    return Counter(
        name="GPU", joules=lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
    )


def _first_device(pynvml: Any) -> Any:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    if visible and not visible.isdigit():
        return pynvml.nvmlDeviceGetHandleByUUID(visible)
    return pynvml.nvmlDeviceGetHandleByIndex(int(visible or 0))
