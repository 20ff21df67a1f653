"""Write docs/reference/ from the catalog and from the help of the command line.

python docs/generate.py            write the pages
python docs/generate.py --check    exit with 1 where a page on disk differs
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "80"  # help is wrapped to the terminal

from tersor.__main__ import run
from tersor._cli_catalog import about, entries
from tersor.cli import VERBS

FOLDER = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- written by docs/generate.py; do not edit -->"


def pages() -> dict[str, str]:
    """Return the text of every reference page, by file name."""
    return {
        "cli.md": _cli(),
        "techniques.md": _techniques(),
        "recipes.md": _recipes(),
        "metrics.md": _metrics(),
        "runtimes.md": _runtimes(),
        "deployments.md": _deployments(),
    }


def _cli() -> str:
    parts = [
        "# Command line",
        NOTE,
        "Results go to stdout, everything else to stderr. Every verb takes `--json`: one JSON "
        'document with `"schema": 1` on stdout and nothing else; an error is then '
        '`{"schema": 1, "error": {"class", "message", "exit_code"}}`. Progress is drawn only on a '
        "terminal; `NO_COLOR` is honored. `tersor --install-completion` sets up the shell.",
        _table(
            ("exit code", "meaning"),
            [
                ("0", "ok"),
                ("1", "below a limit of yours, or a finding (doctor, compare --gate)"),
                ("2", "bad usage, recipe, data or model"),
                ("3", "something is missing in the environment; the message has the line to paste"),
                ("4", "failure while running"),
                ("130", "interrupted; the message has the command that goes on"),
            ],
        ),
        _fence(_help([])),
    ]
    for verb in VERBS:
        parts += [f"## tersor {verb}", _fence(_help([verb]))]
    return _page(parts)


def _help(words: Sequence[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run([*words, "--help"])
    return out.getvalue().rstrip()


def _techniques() -> str:
    rows = entries("techniques")
    parts = [
        "# Techniques",
        NOTE,
        "The steps of a recipe. `tersor show NAME` prints the same.",
        _table(
            ("name", "family", "what it does"),
            [(f"[{r['name']}](#{r['name']})", r["family"], r["summary"]) for r in rows],
        ),
    ]
    for row in rows:
        found = about("techniques", row["name"])
        facts = [f"Works on: {found['form']}"]
        if found["needs"]:
            facts.append(f"needs: {', '.join(found['needs'])}")
        if found["paper"]:
            facts.append(f"paper: {found['paper']}")
        parts += [f"## {row['name']}", found["text"], f"{'; '.join(facts)}."]
        parts.append(_settings(found["settings"]))
    return _page(parts)


def _settings(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (f"`{s['name']}`", f"`{json.dumps(s['default'])}`", s["type"], s["description"])
        for s in found
    ]
    return _table(("setting", "default", "type", ""), rows) or "No settings."


def _recipes() -> str:
    rows = entries("recipes")
    parts = ["# Recipes", NOTE, "Recipes that come with the package: `--recipe NAME`."]
    for row in rows:
        text = about("recipes", row["name"])["text"].rstrip()
        parts += [f"## {row['name']}", _fence(text, "yaml")]
    return _page(parts)


def _metrics() -> str:
    parts = [
        "# Metrics",
        NOTE,
        "What can be improved (`--best`), limited (`--limit`) or only measured (`--metric`).",
    ]
    for row in entries("metrics"):
        found = about("metrics", row["name"])
        unit = "a plain number" if found["unit"] == "1" else f"in {found['unit']}"
        facts = f"{unit[0].upper()}{unit[1:]}; {found['better']} is better; needs: "
        parts += [f"## {row['name']}", found["text"], facts + (", ".join(found["needs"]) or "-")]
    return _page(parts)


def _runtimes() -> str:
    parts = [
        "# Runtimes",
        NOTE,
        "Where a network runs: `--target RUNTIME[:DEVICE][,OPTION=VALUE...]`.",
    ]
    for row in entries("runtimes"):
        found = about("runtimes", row["name"])
        facts = [
            ("takes the form", found["form"]),
            ("devices", ", ".join(found["devices"])),
            ("options", ", ".join(found["options"])),
            ("packages to export", ", ".join(found["to_export"]) or "-"),
            ("packages to run", ", ".join(found["to_run"]) or "-"),
        ]
        parts += [f"## {row['name']}", found["text"], _table(("", ""), facts)]
    return _page(parts)


def _deployments() -> str:
    parts = [
        "# Deployments",
        NOTE,
        "What runs an artifact elsewhere: `tersor deploy ARTIFACT --to NAME --out DIR "
        "[--option SETTING=VALUE]`. See [how to deploy](../how-to/deploy.md).",
    ]
    for row in entries("deployments"):
        found = about("deployments", row["name"])
        facts = f"Takes artifacts of: {', '.join(found['runtimes'])}."
        parts += [f"## {row['name']}", found["text"], facts, _settings(found["settings"])]
    return _page(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _fence(text: str, kind: str = "text") -> str:
    return f"```{kind}\n{text}\n```"


def _page(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def stale(wanted: Mapping[str, str]) -> list[str]:
    """List the pages whose file is not what it should be."""
    return [
        name
        for name, text in wanted.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != text
    ]


def main(words: Sequence[str]) -> int:
    """Write the pages, or check them."""
    wanted: dict[str, Any] = pages()
    old = stale(wanted)
    if "--check" in words:
        for name in old:
            print(f"docs/reference/{name} is not up to date; run: python docs/generate.py")
        return 1 if old else 0
    FOLDER.mkdir(exist_ok=True)
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
