"""Targets as they are written."""

from pathlib import Path

import pytest

from tersor.core.errors import RecipeError
from tersor.core.recipe import Recipe, read_target
from tersor.core.runtime import Target


@pytest.mark.parametrize(
    ("text", "device", "options"),
    [
        ("openvino", "cpu", {}),
        ("openvino:gpu", "gpu", {}),
        ("openvino,shapes=fixed", "cpu", {"shapes": "fixed"}),
        ("openvino:cpu,threads=2,sparse_rate=0.7", "cpu", {"threads": 2, "sparse_rate": 0.7}),
        ("openvino,a=true,b=null,c=[1],d=x=y", "cpu",
         {"a": True, "b": "null", "c": "[1]", "d": "x=y"}),
    ],
)  # fmt: skip
def test_targets_are_read(text: str, device: str, options: dict[str, object]) -> None:
    found = Target.parse(text)
    assert found == Target(runtime="openvino", device=device, options=options)


@pytest.mark.parametrize(
    "text", ["", ":cpu", "openvino:", "openvino:,threads=1", "openvino,threads", "openvino,=1",
             "openvino,threads=", "openvino,"],
)  # fmt: skip
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^target must be RUNTIME or RUNTIME:DEVICE, and may go"):
        Target.parse(text)


def test_an_option_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"^target 'x,a=1,b=2,a=3' gives an option twice$"):
        Target.parse("x,a=1,b=2,a=3")


def test_a_target_is_written_as_it_is_read() -> None:
    text = "openvino:cpu,shapes=fixed,sparse_rate=0.7,own=true"
    assert Target.parse(text).text == text
    assert Target.parse("openvino,threads=2").text == "openvino:cpu"


def test_options_are_checked() -> None:
    found = read_target("onnxruntime,threads=2")
    assert found == Target(runtime="onnxruntime", options={"threads": 2})
    with pytest.raises(RecipeError, match=r"no option 'thread'\. Did you mean 'threads'\?$"):
        read_target("onnxruntime,thread=2")
    with pytest.raises(RecipeError, match=r"threads must be a whole number, 0 for all cores; got"):
        read_target("onnxruntime,threads=many")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "openvino,shapes=fix",
            r"^openvino: shapes must be one of free, fixed; got 'fix'\. Did you",
        ),
        ("openvino,streams=0", r"^openvino: streams must be a whole number from 1; got 0$"),
        (
            "onnxruntime,optimization=al",
            r"^onnxruntime: optimization must be one of .*; got 'al'\.",
        ),
        ("tvm,tune=-1", r"^tvm: tune must be the seconds to search schedules, from 0; got -1$"),
        ("hls,clock_ns=0", r"^hls: clock_ns must be the clock's period, 0\.1 to 1000; got 0$"),
        ("tensorrt:cuda,sparse=1", r"^tensorrt: sparse must be true or false; got 1$"),
    ],
)
def test_values_of_options_are_refused_before_any_work(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_target(text)
    with pytest.raises(RecipeError, match=message.replace("^", "recipe: target: ")):
        Recipe.parse({"steps": ["static"], "target": text})


def test_a_recipe_without_a_target_takes_it_with_its_options(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: [fuse_batch_norm]\n")
    target = Target(runtime="onnxruntime", options={"threads": 2})
    made = Recipe.load(file, target)
    assert made.target == target
    assert Recipe.parse(made.plain()) == made
    file.write_text("steps: [fuse_batch_norm]\ntarget: onnxruntime,threads=3\n")
    assert Recipe.load(file).target.options == {"threads": 3}
