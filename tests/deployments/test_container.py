"""The image's program runs with the image's packages and nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tersor
from tersor.core.artifact import Artifact
from tersor.core.errors import ArtifactError, RecipeError, TargetError
from tersor.core.runtime import Target
from tersor.deployments import container
from tests.deployments.conftest import expected


def run(python: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program as the image does: nothing of this environment is seen."""
    model = next(f for f in (folder / "model").iterdir() if f.suffix in (".onnx", ".xml"))
    command = [python, "-I", str(folder / "run.py"), "--model", str(model), "--threads", "1"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=clean)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_program_computes_what_the_artifact_does(
    runtime: str, artifact_of: Callable[[str], Artifact], x: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    artifact = artifact_of(runtime)
    out = tmp_path / "out"
    tersor.deploy(artifact, to="container", out=out)
    np.savez(tmp_path / "x.npz", x=x)
    words = ["--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz")]
    done = run(sys.executable, out, *words)
    assert done.returncode == 0, done.stderr
    name, wanted = expected(artifact, x)
    assert done.stdout == f"{name} 5x10 float32\n"
    with np.load(tmp_path / "y.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays[name], wanted)
    assert run(sys.executable, out).stdout == "the network takes: x\n"
    np.savez(tmp_path / "z.npz", z=x)
    done = run(sys.executable, out, "--input", str(tmp_path / "z.npz"))
    assert done.returncode == 2
    assert done.stderr == "error: the network takes x; the file holds z\n"
    np.savez(tmp_path / "text.npz", x=np.full(x.shape, "one"))
    for wrong, said in {
        ("--input", "none.npz"): "--input none.npz: No such file or directory",
        ("--input", str(out / "run.py")): f"--input {out / 'run.py'} is not a .npz file of plain",
        ("--input", str(tmp_path / "text.npz")): "the network cannot be run on x (5, 1, 8, 8) <U3",
        (*words[:2], "--output", "no/y.npz"): "--output no/y.npz: the folder does not exist",
    }.items():
        done = run(sys.executable, out, *wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {said}")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.network
def test_its_packages_are_enough(
    artifact_of: Callable[[str], Artifact], x: np.ndarray, tmp_path: Path
) -> None:
    artifact = artifact_of("onnxruntime")
    out = tmp_path / "out"
    tersor.deploy(artifact, to="container", out=out)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = ["install", "-q", "--disable-pip-version-check", "-r", str(out / "requirements.txt")]
    subprocess.run([python, "-m", "pip", *install], check=True)
    np.savez(tmp_path / "x.npz", x=x)
    words = ["--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz")]
    done = run(python, out, *words)
    assert done.returncode == 0, done.stderr
    name, wanted = expected(artifact, x)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays[name], wanted)


def test_the_file_copies_what_is_there_and_drops_its_rights(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("onnxruntime")
    made = tersor.deploy(artifact, to="container", out=tmp_path / "out")
    assert made.files == ("Containerfile", "model/model.onnx", "requirements.txt", "run.py")
    lines = (tmp_path / "out" / "Containerfile").read_text().splitlines()
    version = ".".join(map(str, sys.version_info[:2]))
    assert lines[0] == f"FROM python:{version}-slim"
    copied = {line.split()[1] for line in lines if line.startswith("COPY")}
    assert all((tmp_path / "out" / name).exists() for name in copied)
    assert copied == {"requirements.txt", "run.py", "model"}
    user = next(i for i, line in enumerate(lines) if line == "USER 1000")
    assert user > max(i for i, line in enumerate(lines) if line.startswith(("RUN", "COPY")))
    assert '"/home/runner/model/model.onnx", "--threads", "1"]' in lines[-1]
    packages = artifact.manifest["environment"]["packages"]
    assert (tmp_path / "out" / "requirements.txt").read_text().splitlines() == [
        f"numpy=={packages['numpy']}",
        f"onnxruntime=={packages['onnxruntime']}",
    ]


def test_another_image(artifact_of: Callable[[str], Artifact], tmp_path: Path) -> None:
    options = {"base": "registry.example/python:3.12"}
    tersor.deploy(artifact_of("onnxruntime"), to="container", out=tmp_path / "out", options=options)
    text = (tmp_path / "out" / "Containerfile").read_text()
    assert text.startswith("FROM registry.example/python:3.12\n")
    with pytest.raises(
        RecipeError, match="container: base must be the name of an image, got 'a b'"
    ):
        tersor.deploy(
            artifact_of("onnxruntime"), to="container", out=tmp_path / "b", options={"base": "a b"}
        )


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"manifest": {}}, ArtifactError, "does not say which version of numpy it was measured with"),
        ({"manifest": {"environment": {"packages": {"numpy": "2", "onnxruntime": "1"}}}}, ArtifactError, "does not say which Python"),
        ({"manifest": {"environment": {"packages": {"numpy": "2\n-r /etc/passwd"}}}}, ArtifactError, "does not say which version of numpy"),
        ({"target": Target(runtime="openvino", options={"precision": "bf16"})}, TargetError, "run.py computes in fp32, not in bf16"),
    ],
)  # fmt: skip
def test_artifacts_that_it_cannot_run(
    change: dict[str, Any], kind: type[Exception], said: str, artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:  # fmt: skip
    artifact = replace(artifact_of("onnxruntime"), **change)
    with pytest.raises(kind, match=said):
        container.write(artifact, tmp_path, container.Container())
