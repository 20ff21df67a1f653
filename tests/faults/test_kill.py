"""Kill -9 a short compress job: the output is the old artifact, a whole new one, or resumable."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tersor.core.artifact import Artifact
from tests.faults import jobs

_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def kill_at_operation(number: int) -> None:
    """Kill this process at its n-th operation that changes files."""
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event in _WRITES or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_operations(out: Path) -> int:
    """Count the operations of an undisturbed job."""
    counter = out.with_name("count")

    def work() -> None:
        seen = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal seen
            if event in _WRITES or (
                event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                seen += 1

        sys.addaudithook(hook)
        jobs.run(out, resume=False)
        total = seen
        counter.write_text(str(total))

    assert jobs.wait(jobs.fork(work)) == 0
    return int(counter.read_text())


def model_bytes(out: Path) -> dict[str, bytes]:
    opened = Artifact.open(out, check="hashes")
    return {file.name: file.read_bytes() for file in opened.model_files}


def check_and_resume(out: Path, old: dict[str, bytes] | None, whole: dict[str, bytes]) -> str:
    """Check what a killed job left, resume it, and check that it ends like an undisturbed one."""
    if out.exists():
        found = model_bytes(out)
        assert found in (old, whole)
        state = "new" if found == whole else "old"
    else:
        assert old is None
        state = "none"
    begun = state != "old" or out.with_name(out.name + ".work").exists()
    resumed = jobs.wait(jobs.fork(lambda: jobs.run(out, resume=True) and None))
    assert (resumed == 0) == begun  # else it is the finished artifact of another run
    if not begun:
        assert model_bytes(out) == old
        assert jobs.wait(jobs.fork(lambda: jobs.run(out, resume=False) and None)) == 0
    assert model_bytes(out) == whole
    left = {entry.name for entry in out.parent.iterdir()} - {out.name, "count"}
    assert not left, f"left behind: {left}"
    return state


def study(folder: Path, random_kills: int, planned_kills: int) -> dict[str, int]:
    """Kill `random_kills` + `planned_kills` jobs; return how often each state was found."""
    total = count_operations(folder / "reference")
    whole = model_bytes(folder / "reference")
    started = time.monotonic()
    assert jobs.wait(jobs.fork(lambda: jobs.run(folder / "timed", resume=False) and None)) == 0
    usual = time.monotonic() - started
    assert (
        jobs.wait(jobs.fork(lambda: jobs.run(folder / "old", resume=False, seed=7) and None)) == 0
    )
    old = model_bytes(folder / "old")
    assert old != whole
    draw = random.Random(0)
    found: dict[str, int] = {"none": 0, "old": 0, "new": 0}
    step = max(1, total // max(1, planned_kills))
    planned = [1 + (i * step) % total for i in range(planned_kills)]
    for i, number in enumerate([None] * random_kills + planned):
        case = folder / f"case{i}"
        case.mkdir()
        out = case / "out"
        before = None
        if i % 2:
            shutil.copytree(folder / "old", out)
            before = old

        def job(number: int | None = number, out: Path = out) -> None:
            if number is not None:
                kill_at_operation(number)
            jobs.run(out, resume=False)

        pid = jobs.fork(job)
        if number is None:
            time.sleep(draw.uniform(0, usual))
            os.kill(pid, signal.SIGKILL)
        code = jobs.wait(pid)
        assert code in (-signal.SIGKILL, 0)
        found[check_and_resume(out, before, whole)] += 1
        shutil.rmtree(case)
    return found


def test_a_killed_job_is_old_new_or_resumable(tmp_path):
    found = study(tmp_path, 3, 9)
    assert sum(found.values()) == 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path):
    found = study(tmp_path, 100, 100)
    assert sum(found.values()) == 200
    assert found["none"] + found["old"] > 20
