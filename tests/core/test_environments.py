"""Environments of their own; none is made here."""

import re
import subprocess
import sys
import threading
import time

import pytest

from tersor.core import environments, files, plugins
from tersor.core.errors import DependencyError, RecipeError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path))
    return tmp_path


def test_their_place(tmp_path, monkeypatch):
    monkeypatch.delenv(environments.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert environments.folder() == tmp_path / "tersor/environments"
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "mine"))
    assert environments.folder() == tmp_path / "mine"


def test_one_that_is_not_whole_does_not_count(place):
    (place / "litert/bin").mkdir(parents=True)
    assert environments.python("litert") is None
    (place / "litert/installed").write_text("x==1\n")
    assert environments.python("litert") == place / "litert/bin/python"


def test_an_unknown_one(place):
    with pytest.raises(
        RecipeError, match=r"no environment is called 'litter'. Did you mean 'litert'"
    ):
        environments.create("litter", print)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "file/below"))
    with pytest.raises(DependencyError, match="set TERSOR_ENVIRONMENTS to another folder"):
        environments.create("litert", print)


@pytest.mark.parametrize("name", environments.known())
def test_every_package_has_its_version(name):
    pins = environments.pins(name)
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[\w.+!-]+", p) for p in pins), pins
    names = [p.partition("==")[0].lower() for p in pins]
    assert len(names) == len(set(names))
    kinds = {**plugins.names("runtimes"), **plugins.names("sources")}
    if name in kinds:
        assert "numpy" in names
        assert "pyyaml" in names
    if name in plugins.names("runtimes") and plugins.own_runtime(name).takes != "onnx":
        assert "torch==2.13.0" in pins


def test_one_of_older_versions_is_told(place):
    name = environments.known()[0]
    (place / name).mkdir()
    (place / name / "installed").write_text("numpy==1.0\n")
    assert environments.stale(name)
    (place / name / "installed").write_text("\n".join(environments.pins(name)))
    assert not environments.stale(name)


def test_the_command_line_says_what_to_do(place):
    done = subprocess.run(
        [sys.executable, "-m", "tersor", "doctor", "--create", "litter"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Did you mean 'litert'?" in done.stderr


def test_two_at_once_make_one(place):
    """The second waits, and takes what the first has made."""
    begun, told = threading.Event(), []

    def first():
        with files.lock(place / "keras"):
            begun.set()
            while not told:
                time.sleep(0.01)
            (place / "keras").mkdir()
            (place / "keras/installed").write_text("\n".join(environments.pins("keras")))

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    assert environments.create("keras", told.append) == place / "keras"
    thread.join()
    assert told == [
        f"another process is making {place / 'keras'}; waiting for it",
        f"{place / 'keras'} was made by it",
    ]
    assert [entry.name for entry in place.iterdir()] == ["keras"]


def test_a_folder_of_somebody_else_is_kept(place):
    (place / "keras").mkdir()
    (place / "keras/thesis.txt").write_text("mine")
    with pytest.raises(DependencyError, match=r"keras is there and is no environment; move it"):
        environments.create("keras", print)
    assert (place / "keras/thesis.txt").read_text() == "mine"
