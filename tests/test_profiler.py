"""profile: words of shapes, and a real measurement of one small layer."""

import json
from pathlib import Path

import pytest

from tersor.core.errors import RecipeError
from tersor.ops import native
from tersor.profiler import read_shape
from tests.command import failing, talk


def test_shapes_are_read() -> None:
    assert str(read_shape("1024x512", 8)) == "linear 1024 -> 512, batch 8"
    assert str(read_shape("64x32k3@28", 1)) == "convolution 3x3 64 -> 32 on 28x28, batch 1"
    assert read_shape("64x32k3@28", 1).padding == (1, 1)


@pytest.mark.parametrize(
    "text", ["1024", "0x4", "axb", "4x4k3", "4x4k0@3", "4x4@3", "4x4k3@0", "-1x4"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(
        RecipeError, match=r"shape '.*' is neither INPUTSxOUTPUTS of a linear layer"
    ):
        read_shape(text, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to profile: a network, or --sparsity"),
        (["--sparsity", "--out", "x.txt"], "--out 'x.txt' must end in .html"),
        (["--sparsity", "--out", "no/x.html"], "the folder does not exist"),
        (["--sparsity", "--shapes", "12"], "shape '12' is neither"),
        (["--sparsity", "--shapes", ","], "--shapes names no layer"),
    ],
)
def test_mistakes_end_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = failing(capsys, "profile", *words)
    assert code == 2
    assert message in err


def test_a_layer_is_measured_and_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["profile", "--sparsity", "--shapes", "12x10", "--threads", "1", "--batch", "2"]
    code, out, _ = talk(capsys, *words, "--out", str(tmp_path / "x.html"))
    assert code == 0
    head, row = out.splitlines()[:2]
    assert head.split()[:3] == ["layer", "best", "dense"]
    assert "98 %" in head
    assert row.startswith("12x10 ")
    assert "12x10" in (tmp_path / "x.html").read_text()
    assert list((tmp_path / "tersor").glob("sparse-races-*.json"))


def test_doctor_says_what_executes_sparse_layers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = talk(capsys, "doctor", "--json")
    found = json.loads(out)["sparse_kernel"]
    assert found == {"built": native.build().library is not None, "note": native.build().note}
    none = native.Build(library=None, note="no C compiler here: install gcc or clang")
    monkeypatch.setattr(native, "build", lambda: none)
    _, out, _ = talk(capsys, "doctor")
    wanted = "sparse kernel  none, sparse layers run on torch's, which seldom pays: no C compiler"
    assert wanted in out


@pytest.mark.slow
def test_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, _ = talk(capsys, "profile", "--sparsity", "--shapes", "12x10", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["schema"] == 1
    (layer,) = found["sparsity"]["layers"]
    assert layer["name"] == "12x10"
    assert [race["zeros"] for race in layer["races"]] == [50, 60, 70, 80, 85, 90, 95, 98]
