"""A technique of ten lines in a new file is everywhere, with no other edit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TECHNIQUE = '''"""Halve every weight: an example of the smallest technique."""

from dataclasses import dataclass

from torch import nn

from tersor.core.context import Context
from tersor.core.technique import technique


@dataclass(frozen=True, kw_only=True)
class Halve:
    """Settings of `halve`."""

    factor: float = 0.5
    """What weights are multiplied by."""


@technique()
def halve(net: nn.Module, config: Halve, context: Context) -> nn.Module:
    """Scale the weights of every convolution and linear layer."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.mul_(config.factor)
    return net
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project, with one more file."""
    made = tmp_path_factory.mktemp("project")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tests", "docs"):
        shutil.copytree(ROOT / folder, made / folder, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", made)
    (made / "src/tersor/pruning/halve.py").write_text(TECHNIQUE)
    return made


def run(copy: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_and_shown(copy: Path) -> None:
    assert "halve" in run(copy, "-m", "tersor", "list", "techniques")
    shown = run(copy, "-m", "tersor", "show", "halve")
    assert "factor" in shown
    assert "What weights are multiplied by" in shown
    assert "halve" in run(copy, "-m", "tersor", "list", "--json")


def test_it_is_a_step_of_a_recipe(copy: Path) -> None:
    (copy / "mine.yaml").write_text("steps: [halve: {factor: 0.25}]\ntarget: onnxruntime:cpu\n")
    plain = run(
        copy,
        "-c",
        "import json, tersor; print(json.dumps(tersor.Recipe.load('mine.yaml').plain()))",
    )
    assert json.loads(plain)["steps"] == [{"halve": {"factor": 0.25}}]


def test_it_is_in_the_reference(copy: Path) -> None:
    run(copy, "docs/generate.py")
    pages = "".join(p.read_text(encoding="utf-8") for p in (copy / "docs/reference").rglob("*.md"))
    assert "Halve every weight: an example of the smallest technique." in pages
    assert "What weights are multiplied by." in pages


@pytest.mark.slow
def test_the_contract_tests_look_at_it(copy: Path) -> None:
    words = (
        "-m",
        "pytest",
        "-k",
        "halve",
        "tests/contract/test_techniques.py",
        "-p",
        "no:cacheprovider",
    )
    told = run(copy, *words)
    assert " passed" in told
    assert "failed" not in told


def test_a_package_of_its_own_is_found_by_entry_point(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/halve.py").write_text(TECHNIQUE)
    (tmp_path / "outside/__init__.py").write_text("")
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tersor.techniques]\nhalve = outside.halve\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "tersor", "list", "techniques"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "halve" in done.stdout
