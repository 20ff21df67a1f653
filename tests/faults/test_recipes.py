"""Faults 29 and 30: recipes that are broken, or that want more than a recipe may."""

import time
from pathlib import Path

import pytest

from tersor.core.errors import RecipeError
from tersor.core.layers import Layers
from tersor.core.recipe import Recipe

TARGET = "target: onnxruntime\n"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
LONG = f"{TARGET}steps: [static]\n#{'x' * 1_000_000}\n"


def refuse(folder: Path, text: str | bytes, said: str) -> None:
    file = folder / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    assert time.perf_counter() - began < 5
    assert str(caught.value).startswith(f"mine.yaml{said}")
    assert str(caught.value).count("\n") <= 2
    assert caught.value.exit_code == 2
    assert [each.name for each in folder.iterdir()] == ["mine.yaml"]  # nothing ran


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS + "steps: *a9\n", ":1:5: anchors and aliases are not allowed"),
        ("steps: *steps\n", ":1:8: anchors and aliases are not allowed"),
        ("steps:\n\t- static\n" + TARGET, ":2:1: found character '\\t' that cannot start any token"),
        ("steps: [static]\ntarget: tvm\ntarget: openvino\n", ":3:1: 'target' is given twice"),
        ("steps: " + "[" * 5000 + "]" * 5000, ":1:57: nested too deeply"),
        (LONG, ": 1000038 characters is too long for a recipe"),
        (TARGET + "steps: [magnitude: {sparsity: .nan}]\n", ":2:31: step 1 (magnitude): sparsity: expected a finite number, got nan"),
        (TARGET + "steps: [magnitude: {sparsity: 1e999}]\n", ":2:31: step 1 (magnitude): sparsity: expected a finite number, got inf"),
        (TARGET + "steps: [statik]\n", ":2:9: step 1: unknown technique 'statik'. Did you mean 'static'?"),
        (b"\xff\xfe\x00", ": cannot be read: "),
    ],
)  # fmt: skip
def test_29_broken_recipes(text: str | bytes, said: str, tmp_path: Path) -> None:
    refuse(tmp_path, text, said)


def test_29_marks_and_ends_of_lines_of_other_systems(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbfsteps: [static]\r\ntarget: onnxruntime\r\n")
    assert Recipe.load(file).target.runtime == "onnxruntime"


def test_29_patterns_take_no_time_to_speak_of() -> None:
    began = time.perf_counter()
    assert not Layers(patterns=("*a" * 40 + "b",)).holds("a" * 5000)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ('[!!python/object/apply:os.system ["touch canary"]]', ":2:9: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed"),
        ("[!!python/name:os.system x]", ":2:9: the tag 'tag:yaml.org,2002:python/name:os.system' is not allowed"),
        ("[static: {_target_: os.system}]", ":2:18: step 1 (static): unknown field '_target_'."),
        ("[_target_: {path: os.system}]", ":2:9: step 1: unknown technique '_target_'."),
        ("[os.system: {}]", ":2:9: step 1: unknown technique 'os.system'."),
    ],
)  # fmt: skip
def test_30_a_recipe_names_no_code(
    steps: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a canary would appear
    refuse(tmp_path, f"{TARGET}steps: {steps}\n", said)
