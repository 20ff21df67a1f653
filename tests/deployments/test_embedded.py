"""The C program is compiled, and runs the network without Python."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tersor
from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.errors import RecipeError, TargetError
from tersor.deployments import embedded
from tests.deployments.conftest import expected


@pytest.fixture(scope="module")
def built(artifact_of: Callable[[str], Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose program is compiled."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if not (shutil.which("cc") and shutil.which("make")):
        pytest.skip("needs a C compiler and make")
    out = tmp_path_factory.mktemp("embedded") / "out"
    tersor.deploy(artifact_of("onnxruntime"), to="embedded", out=out)
    place = Path(onnxruntime.__file__).parent / "capi"
    if not list(place.glob("libonnxruntime.so*")):
        pytest.skip("this onnxruntime brings no shared library")
    words = [
        "make",
        "--no-print-directory",
        "check",
        f"ORT={place}",
        "CFLAGS=-O2 -Wall -Wextra -Wpedantic -Werror",
    ]
    done = subprocess.run(words, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")
    return out


def run(folder: Path) -> tuple[int, str]:
    done = subprocess.run([str(folder / "example")], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_expected_outputs_are_those_of_the_artifact(
    built: Path, artifact_of: Callable[[str], Artifact]
) -> None:
    x = np.fromfile(built / "input_0.bin", "<f4").reshape(2, 1, 8, 8)
    _, wanted = expected(artifact_of("onnxruntime"), x)
    np.testing.assert_array_equal(
        np.fromfile(built / "expected_0.bin", "<f4").reshape(2, 10), wanted
    )
    code, said = run(built)
    assert code == 0
    assert "largest difference 0, largest value " in said


@pytest.mark.parametrize(
    ("file", "value", "said"),
    [
        ("expected_0.bin", 7.0, "the outputs differ"),
        ("expected_0.bin", np.nan, "the outputs differ"),
        ("input_0.bin", 7.0, "the outputs differ"),
    ],
)
def test_it_says_when_the_outputs_differ(
    built: Path, tmp_path: Path, file: str, value: float, said: str
) -> None:
    shutil.copytree(built, tmp_path / "copy", symlinks=True)
    array = np.fromfile(tmp_path / "copy" / file, "<f4")
    array[3] = value
    array.tofile(tmp_path / "copy" / file)
    code, text = run(tmp_path / "copy")
    assert code == 1
    assert said in text


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.onnx", "error: "),
        ("input_0.bin", "error: cannot read 512 bytes of input_0.bin"),
    ],
)
def test_it_says_what_is_missing(built: Path, tmp_path: Path, file: str, said: str) -> None:
    shutil.copytree(built, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy" / file).unlink()
    code, text = run(tmp_path / "copy")
    assert code == 1
    assert said in text


def test_the_table_of_functions_has_no_gap() -> None:
    """Each function of ort.h is at the place that the comment behind it says."""
    text = Path(embedded.__file__).with_name("_embedded_ort.h").read_text(encoding="utf-8")
    table = text.partition("typedef void (*OrtUncalled)(void);")[2].partition("} OrtApi;")[0]
    entries = re.findall(r"uncalled_(\d+)\[(\d+)\];|\(\*\w+\)[^;]*; /\* \[(\d+)\] \*/", table)
    assert len(entries) == table.count(";")
    place = 0
    for start, count, said in entries:
        assert int(start or said) == place
        place += int(count or 1)
    assert place == 131


def test_types_that_c_lacks_are_refused() -> None:
    with pytest.raises(TargetError, match="no 1-dimensional tensors of float16, such as 'x'"):
        embedded._tensors("INPUTS", "input", {"x": np.zeros(3, "float16")})


def test_a_negative_tolerance_is_refused(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="embedded: tolerance must not be negative, got -1"):
        tersor.deploy(
            artifact_of("onnxruntime"),
            to="embedded",
            out=tmp_path / "o",
            options={"tolerance": -1.0},
        )


def test_other_runtimes_are_refused_with_the_target_to_take(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("torch_export")
    with pytest.raises(TargetError) as caught:
        tersor.deploy(artifact, to="embedded", out=tmp_path / "out")
    assert "embedded takes artifacts of onnxruntime, and" in str(caught.value)
    assert "is one of torch_export; compress with --target onnxruntime" in str(caught.value)
    assert "onnxruntime" in plugins.deployment("embedded").runtimes
