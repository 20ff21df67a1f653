"""Write the measured tables of the README from the reports in benchmarks/results.

    python docs/tables.py [--check]

A table stands between `<!-- results -->` and `<!-- /results -->` (runs of compress) or
`<!-- startup -->` and `<!-- /startup -->`. No figure in it is typed by hand. `--check` changes
nothing and exits with 1 where a page is not up to date.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "README.zh-CN.md", "docs/measuring.md")
Plain = Mapping[str, Any]


def main() -> int:
    """Write the tables, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = rendered(old, chinese="zh" in name)
        if new != old and check:
            print(f"{name} is not up to date; run: python docs/tables.py", file=sys.stderr)
            stale = 1
        elif new != old:
            page.write_text(new, encoding="utf-8")
    return stale


def rendered(text: str, *, chinese: bool) -> str:
    """Return a page with what stands between its markers written anew."""
    tables: dict[str, Callable[[bool], str]] = {"results": results, "startup": startup}
    for marker, table in tables.items():
        begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = head + begin + table(chinese) + end + rest.partition(end)[2]
    return text


def results(chinese: bool) -> str:
    """One row a stored run: before -> after, on the final split."""
    runs = [
        (file, raw)
        for file in sorted(RESULTS.glob("*.json"))
        if isinstance(raw := json.loads(file.read_text(encoding="utf-8")), dict)
        and {"before", "after", "stages", "ratios"} <= set(raw)
    ]
    if not runs:
        return ""
    head = (
        ["network", "target", "size", "latency", "speed, 95 % interval", "accuracy", "stages kept"]
        if not chinese
        else ["网络", "目标", "体积", "延迟", "速度, 95 % 置信区间", "准确率", "保留的阶段"]
    )
    rows = [row(file, raw) for file, raw in runs]
    lines = [head, ["---"] * len(head), *rows]
    source = ", ".join(f"`{file.relative_to(ROOT).as_posix()}`" for file, _ in runs)
    note = f"Rendered from {source}." if not chinese else f"由 {source} 生成。"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def row(file: Path, raw: Plain) -> list[str]:
    """Render the cells of one run."""
    before = {m["metric"]: m for m in raw["before"]}
    after = {m["metric"]: m for m in raw["after"]}
    ratios = {r["metric"]: r for r in raw["ratios"]}
    conditions = before.get("latency", {}).get("conditions", {})
    batch, threads = conditions.get("batch", "?"), conditions.get("threads", "?")
    kept = [s["name"] for s in raw["stages"] if s["verdict"] in ("kept", "weakened", "applied")]
    dropped = [f"~~{s['name']}~~" for s in raw["stages"] if s["verdict"] == "dropped"]
    return [
        file.stem.partition("-")[0],
        f"{raw['target']}, batch {batch}, threads {threads or 'all'}",
        change(before, after, "size", lambda v: f"{v / 1e3:.0f} kB"),
        change(before, after, "latency", lambda v: f"{v:.3f} ms"),
        speed(ratios.get("latency")),
        change(before, after, "accuracy", lambda v: f"{v:.2f} %"),
        ", ".join([*kept, *dropped]),
    ]


def change(before: Plain, after: Plain, metric: str, show: Callable[[float], str]) -> str:
    """Render "before -> after" of a metric, or nothing where it was not measured."""
    if metric not in before or metric not in after:
        return ""
    return f"{show(before[metric]['value'])} → {show(after[metric]['value'])}"


def speed(ratio: Plain | None) -> str:
    """Render a ratio with its interval."""
    return (
        "" if ratio is None else f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )


def startup(chinese: bool) -> str:
    """Render what a fresh interpreter takes, beside a bare one."""
    file = RESULTS / "startup.json"
    if not file.exists():
        return ""
    raw = json.loads(file.read_text(encoding="utf-8"))
    head = ["command", "median", "ratio to `python -c pass`"]
    if chinese:
        head = ["命令", "中位数", "与 `python -c pass` 之比"]
    lines = [head, ["---"] * 3]
    lines += [
        [
            f"`{r['name']}`",
            f"{r['median_s']:.3f} s",
            f"{r['ratio']:.1f} [{r['low']:.1f}, {r['high']:.1f}]",
        ]
        for r in raw["results"]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
