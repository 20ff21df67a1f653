"""Faults 38 to 40: odd clocks, languages, homes, networks and machines, and missing packages."""

import locale
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tersor.core import environments, plugins, trust
from tersor.core.artifact import Artifact
from tersor.core.errors import DependencyError
from tersor.core.hardware import usable_cores
from tersor.ops import native
from tests.command import failing
from tests.faults.jobs import fork, run, wait

HERE = {"HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"}
FULL = "/dev/null/nowhere"
"""A folder that nobody can make, not even root."""


def works(folder: Path, before: Callable[[], None]) -> Artifact:
    """Compress in a child whose surroundings `before` changes; return what it wrote."""
    folder.mkdir(exist_ok=True)

    def work() -> None:
        before()
        run(folder / "out", resume=False)

    assert wait(fork(work)) == 0
    assert [each.name for each in folder.iterdir()] == ["out"]
    return Artifact.open(folder / "out", check="hashes")


def weights(artifact: Artifact) -> bytes:
    return (artifact.path / "weights.safetensors").read_bytes()


def zone(name: str) -> Callable[[], None]:
    def change() -> None:
        os.environ["TZ"] = name
        time.tzset()

    return change


def language(name: str) -> Callable[[], None]:
    def change() -> None:
        os.environ.update(LC_ALL=name, LANG=name)
        for each in (name, "C"):
            try:
                locale.setlocale(locale.LC_ALL, each)
                return
            except locale.Error:  # not on this machine: the variables are set all the same
                continue

    return change


def without(**variables: str) -> Callable[[], None]:
    """Return what takes all variables of folders away, and sets these."""

    def change() -> None:
        for name in HERE:
            os.environ.pop(name, None)
        os.environ.update(variables)
        tempfile.tempdir = None

    return change


def shut(**variables: str) -> Callable[[], None]:
    """Return what sets variables, and ends the child where it connects to anything."""

    def refuse(*about: object) -> None:
        raise AssertionError(f"it wants the network: {about}")

    def change() -> None:
        os.environ.update(variables)
        socket.socket.connect = refuse  # type: ignore[method-assign,assignment]  # in the child alone
        socket.getaddrinfo = refuse  # type: ignore[assignment]

    return change


PROXY = "http://127.0.0.1:9"


ODD = {
    "zone": zone("Pacific/Kiritimati"),
    "no-zone": zone("Not/AZone"),
    "c": language("C"),
    "chinese": language("zh_CN.UTF-8"),
    "no-home": without(),
    "full": without(HOME=FULL, TMPDIR=FULL),
    "proxy": shut(http_proxy=PROXY, https_proxy=PROXY, ALL_PROXY=PROXY),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of a run in usual surroundings."""
    return weights(works(tmp_path_factory.mktemp("plain"), lambda: None))


@pytest.mark.parametrize("odd", ODD)
def test_38_odd_surroundings_change_nothing(odd: str, plain: bytes, tmp_path: Path) -> None:
    assert weights(works(tmp_path / odd, ODD[odd])) == plain


@pytest.mark.parametrize("homeless", [False, True])
def test_38_what_is_kept_at_home_is_done_without(homeless: bool) -> None:
    if homeless and os.geteuid() != 0:
        pytest.skip("only root can become a user that has no home")

    def work() -> None:
        without(**({} if homeless else {"HOME": FULL}))()
        os.environ.pop(environments.VARIABLE, None)
        if homeless:
            os.setuid(54321)
        trust.remember(["0" * 64])
        assert not trust.trusted(["0" * 64])
        assert environments.python("ncnn") is None
        native.build.cache_clear()
        built = native.build()
        assert built.library is None or "compiled by" in built.note
        if homeless:
            with pytest.raises(DependencyError, match="no home directory for environments; set"):
                environments.folder()

    assert wait(fork(work)) == 0


def test_38_a_clock_that_goes_back(tmp_path: Path) -> None:
    def back() -> None:
        real, steps = time.time, iter(range(10**9))
        time.time = lambda: real() - 3600.0 * next(steps)

    assert works(tmp_path / "back", back).report.seconds > 0


@pytest.mark.parametrize("threads", ["1", "64"])
def test_39_cores_are_those_that_may_be_used(threads: str) -> None:
    one = min(os.sched_getaffinity(0))
    script = "from tersor.core.hardware import usable_cores; print(usable_cores())"
    made = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{one}]); {script}"],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
    )
    assert (made.stdout, made.returncode) == ("1\n", 0), made.stderr


def test_39_one_core_computes_the_same_and_the_report_names_the_machine(
    plain: bytes, tmp_path: Path
) -> None:
    one = min(os.sched_getaffinity(0))

    def pinned() -> None:
        os.sched_setaffinity(0, [one])
        assert usable_cores() == 1

    made = works(tmp_path / "one", pinned)
    assert weights(made) == plain
    machine = made.report.environment["machine"]
    assert machine["usable"] == 1
    assert machine["cores"] >= 1
    assert machine["cpu"]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_40_a_missing_package_is_told_with_the_line_that_installs_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path))
    plugins.runtime.cache_clear()
    words = ["--data", "digits", "--recipe", "int8-cpu", "--target", name, "--dry-run"]
    try:
        code, err = failing(capsys, "compress", "tersor.demo.network:trained", *words)
    finally:
        plugins.runtime.cache_clear()
    assert code == 3
    assert f"runtime {name!r} needs the package {name!r}. Install it with: pip install" in err
