"""What --dry-run promises: mistakes that can be seen before any work are told there."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.core import plugins
from tersor.core.errors import DependencyError, RecipeError, TargetError, TersorError
from tersor.core.model import Model
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.pipeline import compress, plan
from tests import networks

PLACES = "onnxruntime:cuda, onnxruntime:tensorrt, openvino:cpu, tensorrt:cuda, torch_eager:cpu"


class Small(nn.Module):
    """Two layers with names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute."""
        made: torch.Tensor = self.fc(self.conv1(x).flatten(1))
        return made


def planned(folder: Path, text: str, net: nn.Module | None = None) -> None:
    """Plan a recipe that stands in a file; nothing is written, whatever comes of it."""
    file = folder / "mine.yaml"
    file.write_text(text)
    model = Model(net=net or networks.tiny_cnn(trained=False), form="module", origin="module:test")
    try:
        plan(model, Recipe.load(file), data=networks.data(), out=folder / "out")
    finally:
        assert [each.name for each in folder.iterdir()] == ["mine.yaml"]


CASES = [
    (
        "steps:\n  - fuse_batch_norm\n  - half: {format: bf16}\ntarget: onnxruntime:cpu\n",
        f"mine.yaml:3:11: step 2 (half): onnxruntime:cpu has no kernels that compute in bf16; use one of the targets {PLACES}",
    ),
    (
        "steps: [sparse_execution]\ntarget: onnxruntime\n",
        "mine.yaml:1:9: step 1 (sparse_execution): onnxruntime:cpu has no operator for sparse weights",
    ),
    (
        "steps:\n  - static:\n      layers: ['*', '!fcc']\ntarget: onnxruntime\n",
        "mine.yaml:3:15: step 1 (static): layers: pattern '!fcc' matches no layer. Did you mean 'fc'?",
    ),
    (
        "steps:\n  - [magnitude: {layers: ['conv1*']}, finetune]\n  - - fuse_batch_norm\n    - static: {layers: [nonexist*]}\ntarget: onnxruntime\n",
        "mine.yaml:4:24: step 2 (static): layers: pattern 'nonexist*' matches no layer.",
    ),
    (
        "steps: [static]\ntarget: onnxruntime\ngoal: {best: size, limits: {latency: 0 ms}}\n",
        "mine.yaml:3:38: goal: limits: limit on latency: '0 ms' cannot be kept, since no network has a latency of 0; write what is allowed",
    ),
    (
        "steps: [static]\ntarget: onnxruntime\ngoal: {best: size, limits: {latency: 3 MB}}\n",
        "mine.yaml:3:38: goal: limits: limit on latency: unit 'MB' does not fit; use one of ms, ns, us, s",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), CASES)
def test_mistakes_are_told_with_their_place(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(tmp_path, text, Small().eval())
    assert str(caught.value).startswith(said)
    assert caught.value.exit_code == 2


def test_every_target_is_named_once() -> None:
    config = plugins.technique("half").config()
    with pytest.raises(TargetError) as caught:
        config.check_target(Target(runtime="onnxruntime"))
    named = str(caught.value).partition("targets ")[2].partition(", or the step")[0].split(", ")
    assert len(set(named)) == len(named)
    for each in named:
        runtime, _, device = each.partition(":")
        assert plugins.runtime(runtime).halves(device)


def test_what_may_be_meant_is_left_to_the_step(tmp_path: Path) -> None:
    """Names that a decomposition makes, and those of the parts of attention."""
    later = "steps: [svd, static: {layers: ['*.layer1']}]\ntarget: onnxruntime\n"
    planned(tmp_path, later)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 10)

        def forward(self, x):  # type: ignore[no-untyped-def]
            rows = x.flatten(1, 2)
            return self.fc(self.mix(rows, rows, rows)[0].mean(1))

    parts = "steps: [static: {layers: [mix.in_projection, mix.out_proj]}]\ntarget: onnxruntime\n"
    planned(tmp_path, parts, Attends().eval())
    with pytest.raises(RecipeError, match=r"pattern 'mix\.inprojection' matches no layer\. Did"):
        planned(tmp_path, parts.replace("in_p", "inp"), Attends().eval())


def test_a_target_of_the_words_counts(tmp_path: Path) -> None:
    recipe = Recipe.parse({"steps": ["half"], "target": "onnxruntime"}, where="mine.yaml")
    asked = {"data": networks.data(), "out": tmp_path / "out"}
    model = Model(net=networks.tiny_cnn(trained=False), form="module", origin="module:test")
    assert plan(model, recipe, target=Target(runtime="torch_eager"), **asked).stages == ("half",)
    with pytest.raises(RecipeError, match=r"^mine\.yaml: step 1 \(half\): onnxruntime:cpu has no"):
        compress(networks.tiny_cnn(trained=False), recipe, **asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("onnxruntime:directml", "has no DmlExecutionProvider, which the device 'directml' is. What has it: pip install onnxruntime-directml"),
        ("torch_export:cuda", "this PyTorch finds no CUDA device; use :cpu"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_here_is_missed_before_work(
    target: str, text: str, tmp_path: Path
) -> None:
    runtime = plugins.own_runtime(target.partition(":")[0])
    assert runtime.present is not None
    try:
        runtime.present(Target.parse(target))
    except TersorError:
        with pytest.raises(DependencyError, match=text) as caught:
            planned(tmp_path, f"steps: [static]\ntarget: {target}\n")
        assert caught.value.exit_code == 3
    else:
        pytest.skip(f"{target} is here")
