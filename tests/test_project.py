"""The project around the code: pins, extras, files that ship, and what must not be in the tree."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import tersor
from tersor.core import environments

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# packages that torch takes for itself on some platforms, never chosen by us
PLATFORM = re.compile(r"(nvidia|cuda|triton)")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def tree() -> list[Path]:
    """Files that git has or would take."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


ELSEWHERE = {*environments.known(), "tensorrt", "huggingface", "tensorboard", "mlflow"}
"""Extras whose packages are pinned in an environment of their own, or that the tests skip."""


def text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_every_package_of_the_environment_is_pinned() -> None:
    """Everything that the extras bring, directly or not, at the version that the tests run with."""
    known = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pins().items()}
    here = [lines for extra, lines in EXTRAS.items() if extra not in ELSEWHERE]
    waiting = [*PROJECT["dependencies"], *(line for lines in here for line in lines)]
    seen: set[str] = set()
    while waiting:
        wanted = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        asked = [{"extra": extra} for extra in wanted.extras] or [{"extra": ""}]
        if wanted.marker and not any(wanted.marker.evaluate(e) for e in asked):
            continue
        if key in seen or PLATFORM.match(name):
            continue
        seen.add(key)
        assert name in known, f"{wanted.name} is not in constraints.txt"
        assert wanted.specifier.contains(known[name]), (
            f"{name}=={known[name]} does not fit {wanted}"
        )
        for line in distribution(wanted.name).requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in (wanted.extras or {""})
            ):
                waiting.append(
                    f"{inner.name}{'[' + ','.join(inner.extras) + ']' if inner.extras else ''}"
                )


def test_pins_have_no_local_versions() -> None:
    assert not [pin for pin in pins().values() if "+" in pin]
    assert pins()["torch"] == version("torch").partition("+")[0]


def test_every_import_of_the_package_is_provided() -> None:
    """`core` by the dependencies alone; all else by an extra, or in an environment of its own."""
    owners = {
        module: {o.lower() for o in names} for module, names in packages_distributions().items()
    }

    def names_of(lines: list[str]) -> set[str]:
        return {Requirement(line).name.lower() for line in lines}

    base = names_of(PROJECT["dependencies"])
    users = [extra for extra in EXTRAS if extra not in ("dev", "docs")]
    everything = base | {name for extra in users for name in names_of(EXTRAS[extra])}
    # brought by a dependency that cannot work without it
    brought = {"rich": "typer", "click": "typer", "onnx_ir": "onnxscript", "cuda": "cuda-bindings"}
    brought["pynvml"] = "nvidia-ml-py"  # its other name
    brought["mlflow"] = "mlflow-skinny"  # without its server
    # modules of packages that are pinned under another name
    pinned_as = {
        "tensorflow": "tensorflow_cpu",
        "tvm": "apache-tvm",
        "triton_python_backend_utils": "nvidia-pytriton",
    }
    pinned = {
        Requirement(pin).name for name in environments.known() for pin in environments.pins(name)
    }
    for file in SOURCES:
        allowed = base if "/tersor/core/" in file.as_posix() else everything
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                top = module.partition(".")[0]
                if (
                    top == "tersor"
                    or top in sys.stdlib_module_names
                    or in_type_checking(file, node)
                ):
                    continue
                named = brought.get(top, top)
                provided = owners.get(named, {named.replace("_", "-")})
                apart = pinned_as.get(top, top) in pinned and allowed is everything
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                assert provided & allowed or apart, f"{where} imports {top!r}"


def in_type_checking(file: Path, node: ast.stmt) -> bool:
    for block in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING"):
            last = block.body[-1].end_lineno or 0
            if block.lineno <= node.lineno <= last:
                return True
    return False


def test_files_are_short() -> None:
    long = {
        f.name: n for f in SOURCES if (n := len(f.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long


def test_code_is_ascii() -> None:
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        assert text.isascii(), (
            f"{file.relative_to(ROOT)}: {[c for c in text if not c.isascii()][:5]}"
        )


UNSAFE = re.compile(
    r"(?<![\w.])(pickle|cloudpickle|marshal|joblib|dill)\.\w|import (pickle|marshal|joblib|dill)"
    r"|allow_pickle=True|weights_only=False|yaml\.load\(|shell=True|(?<![\w.])(eval|exec)\("
)


def test_nothing_unsafe_is_called() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in SOURCES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if UNSAFE.search(line)
    ]
    assert not found


def test_nothing_of_this_machine_is_in_the_tree() -> None:
    here = [
        f"{ROOT.parent}/",
        f"{Path.home()}/",
        "index-" + "url",
        "find-" + "links",
        "trusted-" + "host",
    ]
    found = [
        f"{file.relative_to(ROOT)}: {word}"
        for file in tree()
        if file.suffix not in (".safetensors", ".png", ".npz")
        for word in here
        if word in text_of(file)
    ]
    assert not found


def test_version_stands_in_the_changelog() -> None:
    assert f"## [{tersor.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_license_is_the_one_that_is_named() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_two_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "check", "test-all", "docs", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    ci = (ROOT / ".ci/run").read_text()
    assert ci.index("make check") < ci.index("make test")
    assert ci.rstrip().endswith("make test"), "pytest's closing line must be the last"


def test_recipes_parse() -> None:
    from tersor.core.recipe import FOLDER, recipes

    assert {"cnn-int8-cpu", "demo"} <= set(recipes())
    for name in recipes():
        recipe = tersor.Recipe.load(name)
        assert tersor.Recipe.parse(recipe.plain()) == recipe
        head = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        assert head.startswith("# "), f"{name}.yaml does not say what it is for"


def test_extras_name_the_file_that_uses_them() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extra in EXTRAS:
        (line,) = [row for row in block.splitlines() if row.startswith(f"{extra} =")]
        comment = line.partition("#")[2]
        assert comment.strip(), f"extra {extra!r} does not say what needs it"
        for place in re.findall(r"[\w/]+\.py", comment):
            assert (ROOT / "src/tersor" / place).exists(), place


def test_site_navigation_names_every_page() -> None:
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, whose tags name functions of its plugins."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: None)
    loader = Loader((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    nav = loader.get_single_data()["nav"]

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        assert isinstance(inner, list) or hasattr(inner, "__iter__")
        return [page for item in inner for page in pages(item)]  # type: ignore[attr-defined]  # either of the two

    named = set(pages(nav))
    written = {
        f.relative_to(ROOT / "docs").as_posix()
        for f in (ROOT / "docs").rglob("*.md")
        if "reference" not in f.parts
    }
    assert written <= named, f"not in the navigation: {written - named}"


@pytest.mark.slow
def test_the_wheel_holds_what_the_package_reads(tmp_path: Path) -> None:
    words = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run([sys.executable, *words], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tersor/")}
    written = {
        f.relative_to(ROOT / "src").as_posix()
        for f in (ROOT / "src/tersor").rglob("*")
        if f.is_file() and "__pycache__" not in f.parts
    }
    assert written == held


@pytest.mark.slow
def test_startup_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "startup.json"
    words = ["benchmarks/startup.py", "--rounds", "2", "--out", str(out)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    made = json.loads(out.read_text(encoding="utf-8"))
    assert {row["name"] for row in made["results"]} == set(made["samples_s"])
    assert all(len(samples) == 2 for samples in made["samples_s"].values())
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in made["results"])
