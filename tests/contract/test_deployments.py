"""What every deployment promises."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from tersor._cli_catalog import settings
from tersor.core import environments, plugins
from tersor.core.deployment import Deployment

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = list(plugins.names("deployments"))
every_deployment = pytest.mark.parametrize("name", DEPLOYMENTS)


@every_deployment
def test_is_described_by_its_last_line(name: str) -> None:
    found = plugins.deployment(name)
    assert isinstance(found, Deployment)
    assert found.runtimes
    assert set(found.runtimes) <= set(plugins.names("runtimes"))
    assert found.check.strip()
    assert found.environment in ("", *environments.known())
    source = Path(inspect.getfile(found.write)).read_text(encoding="utf-8")
    last = ast.parse(source).body[-1]
    assert isinstance(last, ast.Assign)
    assert ast.unparse(last.targets[0]) == "DEPLOYMENT"
    summary = {e["name"]: e["summary"] for e in plugins.catalog()["deployments"]}[name]
    assert 10 < len(summary) <= 120
    assert summary.endswith(".")


@every_deployment
def test_its_settings_are_frozen_have_defaults_and_are_described(name: str) -> None:
    options = plugins.deployment(name).options
    assert options.__name__ == "".join(word.title() for word in name.split("_"))
    assert options.__dataclass_params__.frozen
    for field in dataclasses.fields(options):
        assert field.kw_only
        assert field.default is not dataclasses.MISSING
    for row in settings(options):
        assert row["description"].endswith("."), row["name"]


@every_deployment
def test_has_a_test_file_and_a_paragraph(name: str) -> None:
    assert (ROOT / "tests" / "deployments" / f"test_{name}.py").is_file()
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text(encoding="utf-8")
    assert f"--to {name} " in page
