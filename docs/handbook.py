"""Run the examples of the handbook, and write what they print below them.

    python docs/handbook.py [01 02 ...]

The blocks of a page run in order, in an empty folder; a block under `<!-- measured -->` gets what
the block before it printed. Without arguments, every page runs.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGES = Path(__file__).parent / "handbook"
BLOCK = re.compile(r"^```(python|bash|text)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MEASURED = "<!-- measured -->\n"


def main(asked: list[str]) -> int:
    for page in sorted(PAGES.glob("[0-9]*.md")):
        if not asked or page.name.partition("-")[0] in asked:
            print(page.name, flush=True)
            page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def renewed(text: str) -> str:
    """Return a page with what its examples print now."""
    with tempfile.TemporaryDirectory() as folder:
        printed, made, at = "", [], 0
        for block in BLOCK.finditer(text):
            lang, body = block.groups()
            if lang != "text":
                printed = ran(lang, body, folder)
                continue
            if text[: block.start()].endswith(MEASURED):
                made += [text[at : block.start(2)], printed]
                at = block.end(2)
        return "".join([*made, text[at:]])


def ran(lang: str, body: str, folder: str) -> str:
    """Return what a block prints, without blanks at the ends of lines."""
    words = [sys.executable, "-c", body]
    if lang == "bash":
        words = ["bash", "-euo", "pipefail", "-c", body]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PATH": path, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"exit {done.returncode} of:\n{body}\n{done.stdout}\n{done.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.strip("\n").splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
