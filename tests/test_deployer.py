"""deploy() writes a folder whole or not at all, and nothing over what is not ours."""

import contextlib
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import tersor
from tersor.core import files as disk
from tersor.core.artifact import Artifact
from tersor.core.errors import ArtifactError, RecipeError, TargetError
from tests.command import failing, talk
from tests.deployments.conftest import write
from tests.faults.test_artifacts import at_operation


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    pytest.importorskip("onnxruntime")
    return write(tmp_path_factory.mktemp("deployer"), "onnxruntime")


def name_of(out: Path) -> str:
    """Return the name of the model in a repository, having compared all its files."""
    record = json.loads((out / "deployment.json").read_text())
    present = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert present == {*record["files"], "deployment.json"}
    for name, entry in record["files"].items():
        assert disk.sha256(out / name) == entry["sha256"]
        assert (out / name).stat().st_size == entry["bytes"]
    return str(record["options"]["name"])


def deploy(artifact: Artifact, out: Path, name: str) -> None:
    tersor.deploy(artifact, to="triton", out=out, options={"name": name})


def test_the_record_says_what_it_was_made_of(artifact: Artifact, tmp_path: Path) -> None:
    made = tersor.deploy(artifact.path, to="triton", out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert record["schema"] == 1
    assert record["tool"] == {"name": "tersor", "version": tersor.__version__}
    assert record["artifact"]["model"] == {"model.onnx": artifact.files["model.onnx"]}
    assert record["artifact"]["sha256"] == disk.sha256(artifact.path / "manifest.json")
    assert set(made.files) == set(record["files"])
    assert made.path == tmp_path / "out"


def test_an_altered_artifact_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"'model\.onnx' was altered"):
        tersor.deploy(copy, to="triton", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ours_is_replaced_as_a_whole(artifact: Artifact, tmp_path: Path) -> None:
    deploy(artifact, tmp_path / "out", "one")
    (tmp_path / "out" / "one" / "1" / "__pycache__").mkdir()
    (tmp_path / "out" / "one" / "1" / "__pycache__" / "x.pyc").write_bytes(b"")
    deploy(artifact, tmp_path / "out", "two")
    assert name_of(tmp_path / "out") == "two"
    assert not (tmp_path / "out" / "one").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_not_ours_stays(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(
        ArtifactError, match=r"was not written by tersor deploy \(it holds 'thesis.txt'\)"
    ):
        deploy(artifact, out, "one")
    (out / "deployment.json").write_text('{"tool": {"name": "other"}, "files": {"thesis.txt": {}}}')
    with pytest.raises(ArtifactError, match="was not written by tersor deploy"):
        deploy(artifact, out, "one")
    assert (out / "thesis.txt").read_text() == "mine"
    deploy(artifact, tmp_path / "other", "one")
    (tmp_path / "other" / "one" / "thesis.txt").write_text("mine")
    with pytest.raises(
        ArtifactError,
        match=r"holds 'one/thesis\.txt', which tersor deploy did not write and which would be lost",
    ):
        deploy(artifact, tmp_path / "other", "two")
    assert (tmp_path / "other" / "one" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="is a file; choose another name"):
        deploy(artifact, out / "thesis.txt", "one")
    with pytest.raises(ArtifactError, match="was not written by tersor deploy"):
        deploy(artifact, artifact.path, "one")


def test_a_full_disk_is_said(artifact: Artifact, tmp_path: Path) -> None:
    deploy(artifact, tmp_path / "out", "one")

    def fail(name: str, count: int) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = "no space left on device; what was there before is untouched"
    with at_operation(fail), pytest.raises(ArtifactError, match=said) as caught:
        deploy(artifact, tmp_path / "out", "two")
    assert caught.value.exit_code == 4
    assert name_of(tmp_path / "out") == "one"


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "two renames"])
def test_the_nth_operation_fails(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    """The old folder is intact or the new one is whole, and the next call cleans up."""
    if not swap:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    out = tmp_path / "out"
    deploy(artifact, out, "one")
    with at_operation(lambda name, n: None) as seen:
        deploy(artifact, out, "two")
    states = set()
    for n in range(1, len(seen) + 1):
        deploy(artifact, out, "one")

        def fail(name: str, count: int, n: int = n) -> None:
            if count == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with at_operation(fail), contextlib.suppress(ArtifactError):
            deploy(artifact, out, "two")
        states.add(name_of(out))
    deploy(artifact, out, "three")
    assert name_of(out) == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert states == {"one", "two"}


def test_on_the_command_line(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["deploy", str(artifact.path), "--to", "triton", "--out", str(tmp_path / "out")]
    code, out, err = talk(
        capsys, *words, "--option", "name=digits", "--option", "instances=2", "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["deployment"] == "triton"
    assert [f["name"] for f in found["files"]] == ["digits/1/model.onnx", "digits/config.pbtxt"]
    assert found["check"] == "tritonserver --model-repository=$PWD"
    assert "count: 2" in (tmp_path / "out" / "digits" / "config.pbtxt").read_text()
    code, out, err = talk(capsys, *words)
    assert code == 0
    assert "net/config.pbtxt" in out
    assert "to see that it works, in " in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "tritn"], "unknown deployment 'tritn'. Did you mean 'triton'? `tersor list deployments` shows all"),
        (["--to", "triton", "--option", "name"], "--option must be NAME=VALUE, got 'name'"),
        (["--to", "triton", "--option", "name=a", "--option", "name=b"], "--option name is given twice"),
        (["--to", "triton", "--option", "name=["], "--option name: '[' cannot be read as a value"),
        (["--to", "triton", "--option", "instances=x"], "triton: "),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(
    words: list[str], said: str, artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    code, err = failing(
        capsys, "deploy", str(artifact.path), *words, "--out", str(tmp_path / "out")
    )
    assert code == 2
    assert said in err
    assert not (tmp_path / "out").exists()


def test_packed_artifacts_are_deployed_unpacked(artifact: Artifact, tmp_path: Path) -> None:
    from tersor.core.artifact import write_artifact
    from tersor.core.packing import SUFFIX, pack

    (tmp_path / "files").mkdir()
    shutil.copy(artifact.path / "model.onnx", tmp_path / "files")
    packed = pack([tmp_path / "files" / "model.onnx"], tmp_path / "files" / f"model.onnx{SUFFIX}")
    made = write_artifact(
        tmp_path / "packed",
        files=[packed],
        manifest={**artifact.manifest, "target": artifact.target},
        report=artifact.report,
    )
    deploy(made, tmp_path / "out", "net")
    found = (tmp_path / "out" / "net" / "1" / "model.onnx").read_bytes()
    assert found == (artifact.path / "model.onnx").read_bytes()


def test_the_same_artifact_gives_the_same_files(artifact: Artifact, tmp_path: Path) -> None:
    for out in ("a", "b"):
        deploy(artifact, tmp_path / out, "net")
    a, b = ((tmp_path / out / "deployment.json").read_bytes() for out in ("a", "b"))
    assert a == b


def test_an_unknown_setting_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"triton: unknown field 'nam'\. Did you mean 'name'"):
        tersor.deploy(tmp_path / "nothing", to="triton", out=tmp_path / "out", options={"nam": "x"})


@pytest.mark.parametrize("to", ["triton", "container", "embedded"])
def test_another_device_is_refused(to: str, artifact: Artifact, tmp_path: Path) -> None:
    other = replace(artifact, target=replace(artifact.target, device="cuda"))
    message = rf"{to} computes on cpu, and .* was made for onnxruntime:cuda; compress with --target"
    with pytest.raises(TargetError, match=message):
        tersor.deploy(other, to=to, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
