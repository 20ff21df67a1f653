"""Mistakes in a recipe file are told where they are."""

from pathlib import Path

import pytest

from tersor.core.errors import RecipeError
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target

STEP = "steps:\n  - static\n"
TARGET = "target: onnxruntime:cpu\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (STEP + TARGET + "gaol: {best: size}\n", "4:1: unknown field 'gaol'. Did you mean 'goal'?"),
        (
            TARGET + "steps:\n  - static: {bits: 8,\n      calibratr: mse}\n",
            "4:7: step 1 (static): unknown field 'calibratr'. Did you mean 'calibrator'?",
        ),
        (
            TARGET + "steps:\n  - wanda:\n      layers: fc\n      sparsity: 2\n",
            "5:17: step 1 (wanda): sparsity must be in [0, 1), got 2.0",
        ),
        (
            STEP + TARGET + "goal:\n  best: size\n  limits:\n    size: 25%\n    accuracy: much\n",
            "8:15: goal: limit on accuracy: 'much' is not a limit",
        ),
        (
            STEP + TARGET + "goal:\n  limits:\n    size: 25%\n    acuracy: -1pt\n",
            "7:5: goal: limits: unknown metric 'acuracy'. Did you mean 'accuracy'?",
        ),
        (
            STEP + TARGET + "training:\n  ema: 0.5\n  accumulate: 0\n",
            "6:15: training: accumulate must be at least 1, got 0",
        ),
        (
            STEP + "target:\n  runtime: onnxruntime\n  options:\n    threds: 1\n",
            "6:5: target: runtime 'onnxruntime' has no option 'threds'. Did you mean 'threads'?",
        ),
        (
            STEP + "target:\n  runtime: onnxruntime\n  device: cup\n",
            "5:11: target: runtime 'onnxruntime' has no device 'cup'. Did you mean 'cpu'?",
        ),
        (
            STEP + "target:\n  runtime: onnxruntim\n",
            "4:12: target: unknown runtime 'onnxruntim'. Did you mean 'onnxruntime'?",
        ),
        (
            TARGET + "steps:\n  - static: {bits: 99}\n",
            "3:20: step 1 (static): bits: expected one of 8, got 99",
        ),
    ],
)
def test_a_mistake_is_told_with_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    (mistake,) = caught.value.mistakes
    assert mistake.startswith(f"mine.yaml:{said}")
    assert not mistake.endswith(".")


def test_a_target_from_outside_leaves_the_lines(tmp_path: Path) -> None:
    file, target = tmp_path / "mine.yaml", Target(runtime="torch_eager")
    file.write_text("# no target\nsteps:\n  - statik\n")
    with pytest.raises(RecipeError, match=r"mine.yaml:3:5: step 1: unknown technique 'statik'"):
        Recipe.load(file, target)
    file.write_text("steps: [fuse_batch_norm]\n")
    assert Recipe.load(file, target).target == target
    file.write_text("steps: [fuse_batch_norm]\ntarget: openvino:cpu\n")
    assert Recipe.load(file, target).target.runtime == "openvino"
