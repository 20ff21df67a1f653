"""Faults 33-36: full disks, failing disks, killed and competing writers, flipped bits."""

import contextlib
import errno
import json
import os
import resource
import signal
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tersor.core import files as disk
from tersor.core.artifact import Artifact
from tersor.core.errors import ArtifactError
from tersor.core.files import lock
from tests.core import artifacts
from tests.faults.jobs import fork, wait

EVERY = pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
SEAM = ("open_new", "write", "sync", "make_dir", "rename", "exchange", "unlink", "remove_dir")


@contextlib.contextmanager
def at_operation(act: Callable[[str, int], None]) -> Iterator[list[str]]:
    """Call `act(name, n)` before the n-th operation on the disk; collect the names of all."""
    seen: list[str] = []
    real = {name: getattr(disk, name) for name in SEAM}

    def wrap(name: str) -> Callable[..., object]:
        def operation(*args: object) -> object:
            seen.append(name)
            act(name, len(seen))
            return real[name](*args)

        return operation

    try:
        for name in SEAM:
            setattr(disk, name, wrap(name))
        yield seen
    finally:
        for name, function in real.items():
            setattr(disk, name, function)


def count_operations(out: Path) -> int:
    with at_operation(lambda name, n: None) as seen:
        artifacts.write(out, "two")
    return len(seen)


def left_beside(out: Path) -> set[str]:
    return {p.name for p in out.parent.iterdir() if not p.name.startswith("sources-")} - {out.name}


@EVERY
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])
def test_the_nth_operation_fails(tmp_path, monkeypatch, number, swap, step):
    """33: at every single operation; the old artifact is intact or the new one is whole."""
    out = tmp_path / "out"
    if not swap:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    artifacts.write(out, "one")
    total = count_operations(tmp_path / "counted")
    artifacts.write(tmp_path / "counted", "one")
    total = count_operations(tmp_path / "counted")
    states = set()
    for n in sorted({*range(1, total + 1, step), total}):
        artifacts.write(out, "one")

        def fail(name: str, seen: int, n: int = n) -> None:
            if seen == n:
                raise OSError(number, os.strerror(number))

        with at_operation(fail), contextlib.suppress(ArtifactError):
            artifacts.write(out, "two")
        states.add(artifacts.version(out))
        left = left_beside(out) - {"counted"}
        assert all(".tmp-" in name or ".old-" in name for name in left)
        artifacts.write(out, "three")
        assert artifacts.version(out) == "three"
        assert not left_beside(out) - {"counted"}
    assert states == {"one", "two"}


def test_a_full_disk_is_said_and_leaves_no_rubbish(tmp_path):
    """33: from the k-th write on the disk is full."""
    out = tmp_path / "out"
    artifacts.write(out, "one")
    with at_operation(lambda name, n: None) as seen:
        artifacts.write(tmp_path / "other", "two")
    for k in range(1, seen.count("write") + 1):
        writes = 0

        def fail(name: str, n: int, k: int = k) -> None:
            nonlocal writes
            writes += name == "write"
            if name == "write" and writes >= k:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with at_operation(fail), pytest.raises(ArtifactError) as caught:
            artifacts.write(out, "two")
        assert (
            "no space left on device; what was there before is untouched. Free some space"
            in str(caught.value)
        )
        assert caught.value.exit_code == 4
        assert artifacts.version(out) == "one"
        assert left_beside(out) == {"other"}


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(
        disk, "write", lambda descriptor, data: real(descriptor, data[: max(1, len(data) // 3)])
    )
    artifacts.write(tmp_path / "out")
    assert artifacts.version(tmp_path / "out") == "one"


def test_a_disk_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "write", lambda descriptor, data: 0)
    with pytest.raises(ArtifactError, match="input/output error"):
        artifacts.write(tmp_path / "out")
    assert not left_beside(tmp_path / "out")


def test_the_system_itself_refuses_to_write(tmp_path):
    """33: the kernel's own limit on the size of files, in a child."""
    out = tmp_path / "out"
    artifacts.write(out, "one")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        files = artifacts.sources(tmp_path / "sources-big", "two", size=200_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(ArtifactError, match="file too large"):
            artifacts.write(out, "two", files=files)

    assert wait(fork(work)) == 0
    assert artifacts.version(out) == "one"
    assert not left_beside(out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    files = artifacts.sources(tmp_path / "sources-one")
    folder.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="permission denied"):
            artifacts.write(folder / "out", files=files)
    finally:
        folder.chmod(0o700)


@EVERY
@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("before", [True, False], ids=["over an old one", "fresh"])
def test_killed_at_every_operation(tmp_path, before, swap, step):
    """34: kill -9 at each operation of writing; old, new, or (fresh) nothing, never anything else."""
    reference = tmp_path / "reference"
    if before:
        artifacts.write(reference, "one")
    if not swap:
        real = disk.exchange
        disk.exchange = lambda one, other: False
    try:
        total = count_operations(reference)
        states = []
        for n in sorted({*range(1, total + 1, step), total}):
            out = tmp_path / f"case{n}" / "out"
            out.parent.mkdir()
            if before:
                artifacts.write(out, "one")

            def work(n: int = n, out: Path = out) -> None:
                def die(name: str, seen: int) -> None:
                    if seen == n:
                        os.kill(os.getpid(), signal.SIGKILL)

                with at_operation(die):
                    artifacts.write(out, "two")

            assert wait(fork(work)) == -signal.SIGKILL
            there = out.exists() or bool(disk.left_beside(out, "old"))
            assert there or not before
            states.append(artifacts.version(out) if there else "none")
            artifacts.write(out, "three")
            assert artifacts.version(out) == "three"
            assert not left_beside(out), "the next writer clears away what a dead one left"
        assert {"two", "one" if before else "none"} <= set(states)
    finally:
        if not swap:
            disk.exchange = real


def test_two_processes_write_the_same_output(tmp_path):
    """35: never mixed; a reader meanwhile always finds a whole one."""
    out = tmp_path / "out"
    artifacts.write(out, "zero")

    def writer(word: str) -> Callable[[], None]:
        def work() -> None:
            for _ in range(15):
                artifacts.write(out, word)

        return work

    children = [fork(writer("one")), fork(writer("two"))]
    seen = set()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        seen.add(Artifact.open(out).manifest["origin"])
    assert [wait(child) for child in children] == [0, 0]
    assert artifacts.version(out) in ("one", "two")
    assert seen & {"one", "two"}
    assert not left_beside(out)


def test_a_locked_output_is_refused_with_the_pid(tmp_path):
    """35: in two processes."""
    reader, writer = os.pipe()

    def work() -> None:
        with lock(tmp_path / "out"):
            os.write(writer, b"x")
            time.sleep(30)

    child = fork(work)
    os.read(reader, 1)
    try:
        with (
            pytest.raises(ArtifactError, match=rf"another process \(pid {child}\) is writing"),
            lock(tmp_path / "out"),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)
    with lock(tmp_path / "out"):  # the system freed it when its owner died
        pass
    assert not (tmp_path / "out.lock").exists()


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "report.json", "report.md"])
def test_a_flipped_bit_is_found(tmp_path, name):
    """36: before the model is used."""
    made = artifacts.write(tmp_path / "out")
    file = tmp_path / "out" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"'{name}' was altered|report.json"):
        Artifact.open(tmp_path / "out", check="hashes")
    if name.startswith("model"):
        with pytest.raises(ArtifactError, match=f"'{name}' was altered"):
            made.load()


def test_cut_off_missing_and_linked_files_are_found(tmp_path):
    out = tmp_path / "out"
    for change, said in [
        (
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            "has 2999 bytes, the manifest says 3000; it was altered or cut off",
        ),
        (lambda f: f.unlink(), "is incomplete: 'model.onnx' is missing"),
        (lambda f: (f.unlink(), f.symlink_to("/etc/passwd")), "'model.onnx' is a link, not a file"),
    ]:
        artifacts.write(out)
        change(out / "model.onnx")
        with pytest.raises(ArtifactError, match=said):
            Artifact.open(out)


def test_rubbish_with_a_similar_name_is_not_touched(tmp_path):
    out = tmp_path / "out"
    for name in (
        "out.tmp-mine",
        "out.tmp-0123456789abcdeg",
        "out.tmp-0123456789abcdef0",
        "xout.tmp-0123456789abcdef",
    ):
        (tmp_path / name).mkdir()
    stale = tmp_path / "out.tmp-0123456789abcdef"
    stale.mkdir()
    (stale / "model.onnx").write_text("half")
    artifacts.write(out)
    assert not stale.exists()
    assert len(left_beside(out)) == 4


def test_an_artifact_moved_aside_comes_back(tmp_path):
    """34: without an atomic exchange a writer can die while neither name is there."""
    out = tmp_path / "out"
    artifacts.write(out, "one")
    out.rename(tmp_path / "out.old-0123456789abcdef")
    assert artifacts.version(out) == "one"
    assert not left_beside(out)


def test_a_manifest_is_not_believed_about_names(tmp_path):
    out = tmp_path / "out"
    artifacts.write(out)
    raw = json.loads((out / "manifest.json").read_text())
    raw["files"]["../secret"] = {"bytes": 6, "sha256": "0" * 64}
    (out / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="list of files that makes no sense"):
        Artifact.open(out)


@pytest.mark.parametrize(
    "name",
    [
        "模型",
        "a b \U0001f600",
        "n" * 255,
        "/".join(["d" * 100] * 4),
        unicodedata.normalize("NFC", "é"),
        unicodedata.normalize("NFD", "é"),
    ],
    ids=["chinese", "emoji", "255 bytes", "long path", "NFC", "NFD"],
)
def test_28_any_name_of_an_output(tmp_path, name):
    artifacts.write(tmp_path / name, "one")
    artifacts.write(tmp_path / name, "two")  # replaced
    Artifact.open(tmp_path / name, check="hashes")
    assert not left_beside(tmp_path / name)


def test_28_two_spellings_of_one_letter_are_two_outputs(tmp_path):
    one, other = (tmp_path / unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    artifacts.write(one, "one")
    artifacts.write(other, "two")
    Artifact.open(one, check="hashes")  # the same folder, or its neighbor: as the disk has it
    assert Artifact.open(other, check="hashes").manifest["origin"] == "two"


def test_28_a_name_too_long(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot write .*too long") as caught:
        artifacts.write(tmp_path / ("n" * 256), "one")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["sources-one"]
