"""Compiled code of others is not loaded before the user says so."""

import pytest

from tersor.core import plugins, trust
from tersor.core.artifact import Artifact, write_artifact
from tersor.core.errors import ArtifactError, TersorError
from tersor.core.report import Report
from tersor.core.runtime import Target


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Return an artifact of a runtime that runs code; the file is none, so loading it fails."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file = tmp_path / "model.pt"
    file.write_bytes(b"compiled")
    manifest = {"recipe": {}, "target": Target(runtime="torchscript")}
    return write_artifact(tmp_path / "out", files=[file], manifest=manifest, report=Report())


def test_what_was_made_here_is_trusted(compiled):
    with pytest.raises(TersorError) as caught:
        compiled.load()
    assert "was not made by you" not in str(caught.value)


def test_what_comes_from_elsewhere_is_not(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(
        ArtifactError, match=r"holds compiled code \(torchscript\) that was not made"
    ):
        compiled.load()
    Artifact.open(compiled.path).trust()
    with pytest.raises(TersorError) as caught:
        compiled.load()
    assert "was not made by you" not in str(caught.value)


def test_another_file_is_not_trusted_with_it(compiled, tmp_path):
    (tmp_path / "out/model.pt").write_bytes(b"other!!!")
    with pytest.raises(ArtifactError, match="was altered"):
        compiled.load()
    with pytest.raises(ArtifactError, match="was altered"):
        compiled.trust()


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    trust.remember(["0" * 64])
    assert "cannot be remembered as trusted" in caplog.text
    assert not trust.trusted(["0" * 64])


def test_who_runs_code():
    runs = {n for n in plugins.names("runtimes") if plugins.own_runtime(n).runs_code}
    assert runs == {"torch_compile", "torchscript", "tvm"}
    assert not any(plugins.own_runtime(n).suffixes for n in runs)
