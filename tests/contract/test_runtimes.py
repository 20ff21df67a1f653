"""What every runtime promises."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tersor.core import plugins
from tersor.core.runtime import FORMS, Runtime

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = list(plugins.names("runtimes"))
every_runtime = pytest.mark.parametrize("name", RUNTIMES)


@every_runtime
def test_is_described_by_its_last_line(name: str) -> None:
    found = plugins.own_runtime(name)
    assert isinstance(found, Runtime)
    assert found.takes in FORMS
    assert "cpu" in found.devices or found.devices == ("cuda",)
    assert "threads" in found.options
    source = Path(inspect.getfile(found.export)).read_text(encoding="utf-8")
    last = ast.parse(source).body[-1]
    assert isinstance(last, ast.Assign)
    assert ast.unparse(last.targets[0]) == "RUNTIME"
    summary = {e["name"]: e["summary"] for e in plugins.catalog()["runtimes"]}[name]
    assert 10 < len(summary) <= 120
    assert summary.endswith(".")


@every_runtime
def test_its_extra_is_what_it_imports(name: str) -> None:
    """`pip install 'tersor[NAME]'`, or tersor[torch], brings what a device needs to run."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    def provided(extra: str) -> set[str]:
        words = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in extras.get(extra, [])}
        names = packages_distributions()
        missing = words - {owner.lower() for owners in names.values() for owner in owners}
        # what is not installed is taken at its words: cuda-bindings brings cuda, apache-tvm tvm
        named = {part for word in missing for part in (word.replace("-", "_"), *word.split("-"))}
        return named | {m for m, owners in names.items() if words & {o.lower() for o in owners}}

    found = plugins.own_runtime(name)
    to_run = provided(name) | provided("torch")
    assert set(found.to_run) <= to_run
    to_export = to_run | provided("onnx")
    assert set(found.to_export) <= to_export
    if not {"torch"} & set(found.to_run):
        assert set(found.to_run) <= provided(name), "a device that only runs must not need torch"


def test_their_packages_are_imported_inside_export_and_load() -> None:
    packages = {
        p
        for name in RUNTIMES
        for r in [plugins.own_runtime(name)]
        for p in (*r.to_export, *r.to_run)
    }
    code = (
        "import sys\n"
        "from tersor.core import plugins\n"
        f"for name in {RUNTIMES!r}: plugins.runtime(name)\n"
        f"print(sorted(set(sys.modules) & {packages!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
