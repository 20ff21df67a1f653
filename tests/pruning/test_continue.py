"""What was cut goes on: rebuilt in another process from the factory, trained, quantized, exported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tersor
from tersor.core.errors import ModelError
from tersor.pruning.channels import Channels

FACTORY = """
import torch
from tests import networks


def own():
    return networks.tiny_cnn()


def fixed():
    return networks.tiny_transformer()


def other():
    return networks.TinyCnn(4)
"""

CONTINUE = """
import json, sys, torch, tersor
from tersor.quantization.static import Static
from tersor.distillation.finetune import Finetune

model = tersor.load(sys.argv[1], weights=sys.argv[2])
recipe = tersor.Recipe(
    stages=((Finetune(epochs=1),), (Static(),)),
    target=tersor.Target(runtime="onnxruntime", options={"threads": 1}),
)
made = tersor.compress(model, recipe, data=tersor.load_data("digits"), metrics=("size",), out=sys.argv[3])
count = sum(p.numel() for p in model.net.parameters())
print(json.dumps({"parameters": count, "files": [f.name for f in made.model_files]}))
"""


@pytest.mark.parametrize("factory", ["own", "fixed"])
def test_in_another_process(factory: str, tmp_path: Path) -> None:
    """`fixed` has sizes written in its forward: what is rebuilt is a graph over its layers."""
    file = tmp_path / "factory.py"
    file.write_text(FACTORY, encoding="utf-8")
    place = f"{file}:{factory}"
    recipe = tersor.Recipe(
        stages=((Channels(ratio=0.5, multiple=1),),),
        target=tersor.Target(runtime="onnxruntime", options={"threads": 1}),
    )
    data = tersor.load_data("digits")
    whole = tersor.load(place)
    made = tersor.compress(whole, recipe, data=data, metrics=("size",), out=tmp_path / "cut")
    assert not [f for f in made.path.rglob("*") if f.suffix in (".pt", ".pkl", ".pth")]
    smaller = tersor.load(place, weights=made.path)
    before = sum(p.numel() for p in whole.net.parameters())
    after = sum(p.numel() for p in smaller.net.parameters())
    assert after < 0.6 * before
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, place, str(made.path), str(tmp_path / "next")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"parameters": after, "files": ["model.onnx"]}


def test_another_network_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "factory.py"
    file.write_text(FACTORY, encoding="utf-8")
    recipe = tersor.Recipe(
        stages=((Channels(ratio=0.5, multiple=1),),), target=tersor.Target(runtime="torch_eager")
    )
    data = tersor.load_data("digits")
    model = tersor.load(f"{file}:own")
    made = tersor.compress(model, recipe, data=data, metrics=("size",), out=tmp_path / "cut")
    for factory in ("fixed",):
        with pytest.raises(
            ModelError, match=r"was not made from this network \(.*\); give the fac"
        ):
            tersor.load(f"{file}:{factory}", weights=made.path)
