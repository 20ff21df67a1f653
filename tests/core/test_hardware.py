import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tersor.core.hardware import (
    Machine,
    cpu_quota,
    preflight,
    probe,
    usable_cores,
)


def _put(root: Path, place: str, text: str) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(text)


def test_usable_cores_is_the_affinity_where_there_is_no_quota(tmp_path: Path) -> None:
    wanted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(tmp_path) == wanted


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_usable_cores_respects_affinity(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("text", "quota"), [("50000 100000", 0.5), ("150000 100000", 1.5), ("max 100000", None)]
)
def test_quota_of_control_groups_version_2(tmp_path: Path, text: str, quota: float | None) -> None:
    _put(tmp_path, "proc/self/cgroup", "0::/pod/box\n")
    _put(tmp_path, "sys/fs/cgroup/pod/box/cpu.max", text)
    assert cpu_quota(tmp_path) == quota
    if quota is not None:
        assert usable_cores(tmp_path) == 1


def test_the_tightest_quota_above_counts(tmp_path: Path) -> None:
    _put(tmp_path, "proc/self/cgroup", "0::/pod/box\n")
    _put(tmp_path, "sys/fs/cgroup/pod/box/cpu.max", "max 100000")
    _put(tmp_path, "sys/fs/cgroup/pod/cpu.max", "200000 100000")
    assert cpu_quota(tmp_path) == 2.0


def test_quota_of_control_groups_version_1_seen_from_inside(tmp_path: Path) -> None:
    _put(tmp_path, "proc/self/cgroup", "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n")
    _put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "25000\n")
    _put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path) == 0.25
    assert usable_cores(tmp_path) == 1
    _put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(tmp_path) is None


def test_probe_reads_a_machine_from_its_files(tmp_path: Path) -> None:
    _put(
        tmp_path,
        "proc/cpuinfo",
        "processor : 0\nmodel name : Example 9000\nflags : fpu avx2 avx512f avx512_vnni hypervisor\n\n"
        "processor : 1\nmodel name : other\n",
    )
    _put(tmp_path, "proc/meminfo", "MemTotal: 2048 kB\nMemAvailable: 1024 kB\n")
    _put(tmp_path, "proc/loadavg", "1.50 1 1 1/1 1\n")
    _put(tmp_path, "proc/stat", "cpu 60 0 20 10 0 0 0 10 0 0\ncpu0 1\n")
    cpu0 = "sys/devices/system/cpu/cpu0"
    _put(tmp_path, f"{cpu0}/topology/thread_siblings_list", "0,4-5\n")
    _put(tmp_path, f"{cpu0}/cpufreq/scaling_governor", "powersave\n")
    _put(tmp_path, "sys/devices/system/cpu/cpufreq/boost", "1\n")
    for index, (level, kind, size) in enumerate([("1", "Data", "32K"), ("3", "Unified", "8M")]):
        _put(tmp_path, f"{cpu0}/cache/index{index}/level", level)
        _put(tmp_path, f"{cpu0}/cache/index{index}/type", kind)
        _put(tmp_path, f"{cpu0}/cache/index{index}/size", size)
    found = probe(tmp_path)
    assert found.cpu == "Example 9000"
    assert found.flags == ("avx2", "avx512f", "avx512_vnni")
    assert found.hypervisor is True
    assert found.memory_bytes == 2048 * 1024
    assert found.available_bytes == 1024 * 1024
    assert found.load_1min == 1.5
    assert found.steal == pytest.approx(0.1)
    assert found.threads_per_core == 3
    assert found.governor == "powersave"
    assert found.boost is True
    assert found.caches == {"L1d": 32768, "L3": 8 << 20}


def test_probe_of_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert found.usable >= 1
    assert found.cpu
    assert found.load_1min is found.steal is found.governor is found.memory_bytes is None


def test_probe_of_this_machine() -> None:
    found = probe()
    assert 1 <= found.usable <= found.cores
    assert found.cpu


def test_preflight_says_what_is_wrong_and_what_to_do() -> None:
    good = Machine(
        cpu="x",
        architecture="x86_64",
        cores=4,
        usable=4,
        load_1min=0.5,
        steal=0.0,
        governor="performance",
    )
    assert preflight(good) == ()
    assert preflight(replace(good, load_1min=2.0)) == (
        "the machine is busy: load average 2.00 on 4 cores; stop other programs, or read only "
        "interleaved ratios",
    )
    assert preflight(replace(good, steal=0.1)) == (
        "the hypervisor gave 10.0 % of the time to other machines; latencies vary, read only "
        "interleaved ratios",
    )
    assert preflight(replace(good, governor="powersave")) == (
        "the frequency governor is 'powersave'; set it with: sudo cpupower frequency-set "
        "--governor performance",
    )
    assert preflight(replace(good, quota=1.5, usable=1)) == (
        "the container may use 1.5 of 4 cores and is paused beyond; use at most 1 threads",
    )


def test_environment_is_plain_and_names_versions_without_importing() -> None:
    import json
    import subprocess

    code = (
        "import json, sys; from tersor.core.hardware import environment; "
        "print(json.dumps([environment(), [m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, loaded = json.loads(done.stdout)
    assert loaded == []
    assert found["packages"]["tersor"]
    assert found["packages"]["numpy"]
    assert found["python"].startswith("CPython 3.")
    assert found["machine"]["usable"] >= 1
