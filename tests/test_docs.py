"""Every Python and shell block of the documentation runs; every YAML block is a recipe that parses.

The blocks of a page run in order, in one folder that is empty at first: what one writes, the next one
reads. Each Python block is complete: it runs as pasted into a new interpreter. `<!-- skip: why -->` above a block leaves it out, `<!-- file: x -->`
writes it to a file first, `<!-- exit: 1 -->` says how a shell block ends, and the lines of a block under
`<!-- output -->` are among those that the shell block before it printed; those under `<!-- measured -->`
are, but for their numbers, among those that any block before it printed (docs/handbook.py writes them). A page that has
`<!-- slow -->` in it takes longer than a second.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import tersor
from tersor.core.report import Report
from tersor.core.schema import to_plain

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *(f for f in sorted((ROOT / "docs").rglob("*.md")) if "reference" not in f.parts),
]
BLOCK = re.compile(
    r"^(?P<marks>(?:[ \t]*<!--(?:(?!-->).)*-->\n)*)(?P<indent>[ \t]*)```(?P<lang>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
SHELLS = ("bash", "sh", "shell", "console")


@dataclass(frozen=True, kw_only=True)
class Block:
    lang: str
    body: str
    line: int
    skip: bool
    file: str
    exit: int
    output: bool
    measured: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    made = []
    for found in BLOCK.finditer(text):
        marks, indent = found["marks"], found["indent"]
        file = re.search(r"<!-- file: (\S+) -->", marks)
        ends = re.search(r"<!-- exit: (\d+) -->", marks)
        lines = [line.removeprefix(indent) for line in found["body"].splitlines()]
        made.append(
            Block(
                lang=found["lang"],
                body="\n".join(lines) + "\n",
                line=text.count("\n", 0, found.start("body")) + 1,
                skip="<!-- skip:" in marks,
                file=file[1] if file else "",
                exit=int(ends[1]) if ends else 0,
                output="<!-- output -->" in marks,
                measured="<!-- measured -->" in marks,
            )
        )
    return made


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runnable() -> list[object]:
    pages = []
    for page in PAGES:
        if any(b.lang in ("python", *SHELLS) and not b.skip for b in blocks(page)):
            slow = [pytest.mark.slow] if "<!-- slow -->" in page.read_text(encoding="utf-8") else []
            pages.append(pytest.param(page, id=name_of(page), marks=slow))
    return pages


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", runnable())
def test_blocks_run(page: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = tmp_path_factory.getbasetemp() / "demo-of-the-docs"
    printed = ""
    for block in blocks(page):
        if block.file:
            place = tmp_path / block.file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(block.body, encoding="utf-8")
        if block.skip or block.file:
            continue
        where = f"{name_of(page)}:{block.line}"
        if block.lang == "python":
            printed = run([sys.executable, "-c", block.body], tmp_path, where, block.exit)
        elif block.lang in SHELLS:
            body = without_demo(block.body, tmp_path, made)
            printed = run(["bash", "-euo", "pipefail", "-c", body], tmp_path, where, block.exit)
        elif block.output:
            absent = [line for line in block.body.splitlines() if line not in printed.splitlines()]
            assert not absent, f"{where}: not printed: {absent}; but:\n{printed}"
        elif block.measured:
            absent = [line for line in masked(block.body) if line not in masked(printed)]
            assert not absent, f"{where}: not printed: {absent}; but:\n{printed}"


def masked(text: str) -> list[str]:
    """Return the lines without what differs from one measurement to the next: numbers, units, blanks."""
    numbers = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ?(us|ms|s|[kMG]?B)\b)?", "#", text)
    return [re.sub(r"(#|[-─━]|\s)+", " ", line).strip() for line in numbers.splitlines()]


DEMO = "tersor demo --out demo\n"


def without_demo(body: str, folder: Path, made: Path) -> str:
    """Make the demo's artifact once a session; later pages that begin with it get a copy."""
    if not body.startswith(DEMO):
        return body
    if not made.exists():
        run(["bash", "-euo", "pipefail", "-c", DEMO], folder, "the demo", 0)
        shutil.copytree(folder / "demo", made)
    elif not (folder / "demo").exists():
        shutil.copytree(made, folder / "demo")
    return body.removeprefix(DEMO) or "true"


def run(words: list[str], folder: Path, where: str, wanted: int) -> str:
    binaries = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "NO_COLOR": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == wanted, (
        f"{where}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_data_blocks_parse(page: Path) -> None:
    for block in blocks(page):
        if block.skip:
            continue
        if block.lang == "yaml":
            raw = yaml.safe_load(block.body)
            if "steps" in raw:
                recipe = tersor.Recipe.parse(raw, f"{name_of(page)}:{block.line}")
                assert tersor.Recipe.parse(recipe.plain()) == recipe
        if block.lang == "json":
            json.loads(block.body)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(
        r"^[ \t]*```.*?^[ \t]*```",
        "",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if not path or "://" in path or "reference/" in path:
            continue
        assert (page.parent / path).exists(), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("README.md", "README.zh-CN.md"),
        *(
            (f"docs/{p}", f"docs/zh/{Path(p).name}")
            for p in ("first-result.md", "how-to/compress-your-model.md")
        ),
    ],
)
def test_translations_have_the_same_blocks(english: str, chinese: str) -> None:
    """A translation may not fall behind: its code is that of the original."""
    ours, theirs = blocks(ROOT / english), blocks(ROOT / chinese)
    assert [(b.lang, b.body) for b in ours] == [(b.lang, b.body) for b in theirs]


def test_the_python_page_names_what_the_package_offers() -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8").splitlines()
    shown = {line.removeprefix("::: ") for line in page if line.startswith("::: ")}
    for place in shown:
        module, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(module), name), place
    offered = {f"{place}.{name}" for name, place in tersor._PLACES.items()}
    assert offered <= shown


def test_readme_shows_the_stored_results() -> None:
    done = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_report_page_names_every_field() -> None:
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    for name in to_plain(Report()):
        assert f"`{name}`" in page, name
