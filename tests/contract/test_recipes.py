"""Every recipe of the package, end to end, on the network that ships with it."""

from pathlib import Path

import pytest

import tersor
from tersor.core.recipe import FOLDER, recipes


@pytest.mark.parametrize("name", recipes())
def test_says_what_it_is_for(name: str) -> None:
    recipe = tersor.Recipe.load(name)
    assert tersor.Recipe.parse(recipe.plain()) == recipe
    assert recipe.goal is not None, (
        "a recipe of the package has a goal, so that every stage is judged"
    )
    assert (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_runs(name: str, tmp_path: Path) -> None:
    artifact = tersor.compress(
        tersor.load("tersor.demo.network:trained"),
        name,
        data=tersor.load_data("digits"),
        threads=1,
        out=tmp_path / "out",
    )
    report = artifact.report
    assert len(report.stages) == len(tersor.Recipe.load(name).stages)
    assert all(stage.reason for stage in report.stages)
    assert report.reached
    artifact.verify()
