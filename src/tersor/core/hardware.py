"""Machine: cores, instructions, caches, memory; how busy it is, and whether it can time fairly."""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor.core.schema import to_plain

FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""Instruction sets that decide how fast a number format is."""
PACKAGES = (
    "tersor",
    "numpy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "safetensors",
)
"""Packages whose version belongs to a measurement."""
BUSY = 0.3
"""Load average a core above which timing is doubtful."""
STOLEN = 0.02
"""Share of time taken by the hypervisor since boot above which timing is doubtful."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What measurements depend on; what cannot be read is None or empty."""

    cpu: str
    """Model name."""
    architecture: str
    """ "x86_64", "aarch64" ..."""
    cores: int
    """Logical cores of the machine."""
    usable: int
    """Cores this process may use: affinity and container quota respected."""
    threads_per_core: int | None = None
    """2 with simultaneous multithreading."""
    flags: tuple[str, ...] = ()
    """Those of FLAGS that the processor has."""
    caches: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each cache of the first core: {"L1d": 32768, "L2": ...}."""
    memory_bytes: int | None = None
    available_bytes: int | None = None
    quota: float | None = None
    """Cores a container may use on average; None: no limit."""
    governor: str | None = None
    """Frequency governor of the first core."""
    boost: bool | None = None
    """Whether the clock may rise above its nominal value."""
    hypervisor: bool | None = None
    load_1min: float | None = None
    """Load average over the last minute."""
    steal: float | None = None
    """Share of time since boot that the hypervisor gave to others."""


def usable_cores(root: Path = Path("/")) -> int:
    """Count the cores this process may use: its affinity, and a container's quota, at least one.

    Args:
        root: Where /proc and /sys are.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        cores = os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, min(cores, int(quota))) if quota is not None else cores


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Read the container's limit in cores, of control groups version 1 or 2; None: no limit."""
    limits = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, kinds, place = line.split(":", 2)
        if kinds == "":
            for folder in _upwards(root / "sys/fs/cgroup", place):
                words = (_read(folder / "cpu.max") or "").split()
                if len(words) == 2 and words[0] != "max":
                    limits.append(float(words[0]) / float(words[1]))
        elif "cpu" in kinds.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/cpu", place):
                quota = _number(folder / "cpu.cfs_quota_us")
                period = _number(folder / "cpu.cfs_period_us")
                if quota and quota > 0 and period:
                    limits.append(quota / period)
    return min(limits, default=None)


def probe(root: Path = Path("/")) -> Machine:
    """Look at this machine. Reads files only; starts no process.

    Args:
        root: Where /proc and /sys are.
    """
    cpuinfo = _fields(_read(root / "proc/cpuinfo") or "")
    memory = _fields(_read(root / "proc/meminfo") or "")
    flags = f"{cpuinfo.get('flags', '')} {cpuinfo.get('Features', '')}".split()
    cpu0 = root / "sys/devices/system/cpu/cpu0"
    siblings = _read(cpu0 / "topology/thread_siblings_list")
    boost = _read(root / "sys/devices/system/cpu/cpufreq/boost")
    return Machine(
        cpu=cpuinfo.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        usable=usable_cores(root),
        threads_per_core=_count(siblings) if siblings else None,
        flags=tuple(flag for flag in FLAGS if flag in flags),
        caches=_caches(cpu0 / "cache"),
        memory_bytes=_kib(memory.get("MemTotal")),
        available_bytes=_kib(memory.get("MemAvailable")),
        quota=cpu_quota(root),
        governor=_read(cpu0 / "cpufreq/scaling_governor"),
        boost=None if boost is None else boost == "1",
        hypervisor="hypervisor" in flags if flags else None,
        load_1min=_load(root),
        steal=_steal(root),
    )


def preflight(machine: Machine) -> tuple[str, ...]:
    """Say what makes a machine doubtful for timing, each with what to do about it."""
    found = []
    if machine.load_1min is not None and machine.load_1min > BUSY * machine.cores:
        found.append(
            f"the machine is busy: load average {machine.load_1min:.2f} on {machine.cores} cores; "
            "stop other programs, or read only interleaved ratios"
        )
    if machine.steal is not None and machine.steal > STOLEN:
        found.append(
            f"the hypervisor gave {100 * machine.steal:.1f} % of the time to other machines; "
            "latencies vary, read only interleaved ratios"
        )
    if machine.governor not in (None, "performance"):
        found.append(
            f"the frequency governor is {machine.governor!r}; "
            "set it with: sudo cpupower frequency-set --governor performance"
        )
    if machine.quota is not None and machine.quota < machine.cores:
        found.append(
            f"the container may use {machine.quota:g} of {machine.cores} cores and is paused "
            f"beyond; use at most {machine.usable} threads"
        )
    return tuple(found)


def environment(root: Path = Path("/")) -> dict[str, Any]:
    """Return machine, system, Python and package versions as plain data; imports no package."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": to_plain(probe(root)),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}",
        "packages": versions,
    }


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(file: Path) -> float | None:
    text = _read(file)
    return float(text) if text else None


def _fields(text: str) -> dict[str, str]:
    """Read `name : value` lines; the first of each name counts (the first core)."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _upwards(mount: Path, place: str) -> list[Path]:
    """List a control group's folder and those above; a container sees only the mount."""
    parts = [part for part in place.split("/") if part and part != ".."]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _kib(text: str | None) -> int | None:
    return int(text.split()[0]) * 1024 if text else None


def _count(ranges: str) -> int:
    """Count the numbers of a list such as "0-1,4"."""
    ends = [part.split("-") for part in ranges.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def _caches(folder: Path) -> dict[str, int]:
    found = {}
    for index in sorted(folder.glob("index*")):
        size = re.fullmatch(r"(\d+)([KM])", _read(index / "size") or "")
        level, kind = _read(index / "level"), _read(index / "type")
        if size and level:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind or "", "")
            found[f"L{level}{suffix}"] = int(size[1]) * {"K": 2**10, "M": 2**20}[size[2]]
    return found


def _load(root: Path) -> float | None:
    text = _read(root / "proc/loadavg")
    return float(text.split()[0]) if text else None


def _steal(root: Path) -> float | None:
    """Column 8 of /proc/stat's first line is stolen time; guests are inside user time."""
    words = (_read(root / "proc/stat") or "").partition("\n")[0].split()
    if len(words) < 9:
        return None
    ticks = [int(word) for word in words[1:9]]
    return ticks[7] / sum(ticks) if sum(ticks) else None
