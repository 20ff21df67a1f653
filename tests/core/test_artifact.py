"""Artifacts: what is in the directory, what a reader accepts, what a writer refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tersor.core.artifact import Artifact, check_out, write_artifact
from tersor.core.errors import ArtifactError, TargetError
from tersor.core.files import lock
from tersor.core.report import Report
from tersor.core.runtime import Target
from tests.core import artifacts


def test_what_is_written_is_read_back(tmp_path):
    made = artifacts.write(tmp_path / "out")
    opened = Artifact.open(tmp_path / "out", check="hashes")
    assert opened.report == made.report == artifacts.report()
    assert opened.recipe == artifacts.RECIPE
    assert opened.target == Target(runtime="onnxruntime")
    assert [f.name for f in opened.model_files] == ["model.onnx", "model.data"]
    assert set(opened.files) == {"model.onnx", "model.data", "report.md", "report.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", "sources-one"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["tool"]["name"] == "tersor"
    assert manifest["files"]["model.onnx"]["bytes"] == 3000


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        artifacts.write(tmp_path / name / "out")
    for file in (tmp_path / "a" / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "out" / file.name).read_bytes()


def test_describe_is_plain_data(tmp_path):
    found = artifacts.write(tmp_path / "out").describe()
    assert json.loads(json.dumps(found)) == found
    assert found["model_bytes"] == 6000
    assert found["stages"][0]["verdict"] == "kept"
    assert found["origin"] == "one"


def test_an_artifact_is_replaced_as_a_whole(tmp_path):
    artifacts.write(tmp_path / "out", "one", texts={"report.md": "# one\n", "extra.html": "x"})
    artifacts.write(tmp_path / "out", "two")
    assert artifacts.version(tmp_path / "out") == "two"
    assert not (tmp_path / "out" / "extra.html").exists()


def test_a_link_to_the_output_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    artifacts.write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert artifacts.version(tmp_path / "real") == "one"


def test_missing_parents_are_made_and_an_empty_folder_is_taken(tmp_path):
    artifacts.write(tmp_path / "a" / "b" / "out")
    (tmp_path / "empty").mkdir()
    artifacts.write(tmp_path / "empty")
    assert artifacts.version(tmp_path / "empty") == "one"


@pytest.mark.parametrize("name", ["模型 \U0001f600", "with space", "n" * 255, "\u00e9", "e\u0301"])
def test_any_name_of_a_folder(tmp_path, name):
    artifacts.write(tmp_path / name)
    artifacts.write(tmp_path / name, "two")
    assert artifacts.version(tmp_path / name) == "two"
    assert {p.name for p in tmp_path.iterdir()} == {name, "sources-one", "sources-two"}


def test_a_folder_with_other_files_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(
        ArtifactError, match=r"exists and is not an artifact \(1 entries, such as 'thesis.txt'\)"
    ):
        artifacts.write(out)
    assert (out / "thesis.txt").read_text() == "precious"
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_an_artifact_with_a_users_file_in_it_is_refused(tmp_path):
    out = tmp_path / "out"
    artifacts.write(out)
    (out / "notes.txt").write_text("precious")
    with pytest.raises(
        ArtifactError, match=r"'notes.txt' in it is not part of it and would be lost"
    ):
        artifacts.write(out, "two")
    assert artifacts.version(out) == "one"


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"is a file; choose another name"):
        check_out(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"cannot be made: .* is a file"):
        check_out(tmp_path / "file" / "out")
    check_out(tmp_path / "fresh")


@pytest.mark.parametrize(
    "name", ["../model.onnx", "a/b/c", "a\\b", "C:model", "manifest.json", "MODEL.onnx"]
)
def test_names_that_leave_the_directory_or_clash_are_refused(tmp_path, name):
    with pytest.raises(
        ArtifactError, match=r"cannot be a file name|two files of the artifact are called"
    ):
        artifacts.write(tmp_path / "out", texts={name: "x"})
    assert not (tmp_path / "out").exists()


def test_a_new_artifact_needs_a_model_file(tmp_path):
    with pytest.raises(ArtifactError, match=r"needs at least one model file"):
        write_artifact(
            tmp_path / "out",
            files=[],
            manifest={"recipe": {}, "target": Target(runtime="onnxruntime")},
            report=Report(),
        )


def test_what_is_not_an_artifact_is_not_opened(tmp_path):
    with pytest.raises(ArtifactError, match=r"does not exist"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(
        ArtifactError, match=r"is not an artifact or is incomplete: it has no manifest.json"
    ):
        Artifact.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        ArtifactError,
        match=r"is a file, not a directory: an artifact is the folder that compress makes",
    ):
        Artifact.open(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"schema": 2},
            "has schema 2, written by tersor 9.9; this tersor .* reads up to 1: install a newer one",
        ),
        ({"schema": True}, "has schema True, which is not a version"),
        ({"tool": {"name": "other"}}, "was not written by tersor"),
        (
            {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
            "list of files that makes no sense",
        ),
        ({"files": {"model.onnx": {"bytes": 1}}}, "list of files that makes no sense"),
        ({"model": ["other.onnx"]}, "does not name its model files"),
        ({"target": None}, "has no recipe or no target"),
        ({"target": {"runtime": "x", "typo": 1}}, "unknown field 'typo'"),
    ],
)
def test_manifests_that_make_no_sense(tmp_path, change, said):
    artifacts.write(tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    raw = json.loads(file.read_text())
    raw["tool"]["version"] = "9.9"
    file.write_text(json.dumps({**raw, **change}))
    with pytest.raises(ArtifactError, match=said):
        Artifact.open(tmp_path / "out")


def test_a_damaged_manifest_or_report(tmp_path):
    out = tmp_path / "out"
    artifacts.write(out)
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        Artifact.open(out)
    (out / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        Artifact.open(out)


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"has no device 'gpu'.* It has cpu"):
        artifacts.write(tmp_path / "out").load(device="gpu")


def test_one_thread_of_control_may_lock_twice(tmp_path):
    with lock(tmp_path / "out"):
        assert (tmp_path / "out.lock").exists()
        with lock(tmp_path / "out"):
            artifacts.write(tmp_path / "out")
        assert (tmp_path / "out.lock").exists()
    assert not (tmp_path / "out.lock").exists()


def test_another_thread_is_kept_out(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def enter() -> None:
        with lock(tmp_path / "out"):
            pass

    with (
        ThreadPoolExecutor(1) as pool,
        lock(tmp_path / "out"),
        pytest.raises(ArtifactError, match=r"another process \(pid \d+\) is writing"),
    ):
        pool.submit(enter).result()


def _scaler(file: Path) -> Path:
    """An ONNX network that doubles its input."""
    node = helper.make_node("Mul", ["x", "two"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file
    )
    return file


def test_it_loads_and_runs_where_torch_cannot_be_imported(tmp_path):
    pytest.importorskip("onnxruntime")
    artifacts.write(tmp_path / "out", files=[_scaler(tmp_path / "model.onnx")])
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from tersor.core.artifact import Artifact\n"
        f"runner = Artifact.open({str(tmp_path / 'out')!r}).load(threads=1)\n"
        "print(runner.bind({'x': np.ones((2, 3), np.float32)})()['y'].tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]", done.stderr


def test_threads_override_the_target(tmp_path):
    pytest.importorskip("onnxruntime")
    made = artifacts.write(tmp_path / "out", files=[_scaler(tmp_path / "model.onnx")])
    runner = made.load(threads=1)
    np.testing.assert_array_equal(runner.bind({"x": np.ones((1, 3), np.float32)})()["y"], 2.0)
    runner.close()
