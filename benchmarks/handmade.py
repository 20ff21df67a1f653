"""The best recipes that a hand made for six workloads, run for real.

    python benchmarks/handmade.py [--workloads resnet56,gpt,...] [--recipes FOLDER]

Each recipe of benchmarks/recipes (a file NAME.yaml for each workload; its first lines say what else
was tried) goes through `tersor compress` in a process of its own, on one thread. A row holds the
speed against the untouched network on the same runtime, interleaved; the goal's quality on samples
that no decision has seen, before and after; size; the verdict of each stage; seconds. Rows are
stored as they come, one for each workload and recipe. Needs the shared workloads. Writes
benchmarks/results/handmade.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _networks import RESULTS, SHARED, stored, write

KEPT = ("name", "verdict", "reason", "settings", "seconds", "speed", "predicted")
RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is compressed: a factory and a data function of the shared workloads."""

    file: str
    factory: str
    data: str
    quality: str
    """The metric that the goal's limit is on."""


WORKLOADS = {
    "resnet56": Workload(file="cifar", factory="resnet56", data="data", quality="accuracy"),
    "mobilenet_v2": Workload(
        file="fashion", factory="mobilenet_v2", data="data", quality="accuracy"
    ),
    "vit": Workload(file="fashion", factory="vit", data="data", quality="accuracy"),
    "unet": Workload(file="fashion", factory="unet", data="scenes", quality="iou"),
    "lstm": Workload(file="speech", factory="lstm", data="data", quality="accuracy"),
    "gpt": Workload(file="language", factory="gpt", data="data", quality="perplexity"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="a folder of NAME.yaml")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "handmade.json")
    asked = parser.parse_args()
    names = asked.workloads.split(",")
    if unknown := sorted({*names} - {*WORKLOADS}):
        parser.error(f"unknown workloads {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    rows = {row["workload"]: row for row in stored(asked.out)}
    for name in names:
        rows[name] = run(name, asked.recipes / f"{name}.yaml", threads=asked.threads)
        print(told(rows[name]), flush=True)
        result = {
            "command": "python benchmarks/handmade.py",
            "arguments": {"threads": asked.threads, "batch": 1},
            "results": [rows[each] for each in WORKLOADS if each in rows],
        }
        write(asked.out, result)
    return 0


def run(
    name: str, recipe: Path | str, *, threads: int = 1, words: Sequence[str] = ()
) -> dict[str, Any]:
    """Compress a workload with a recipe, and return what the report says of it.

    Args:
        name: Of the workload.
        recipe: A file, or a name.
        threads: Of the target.
        words: Further ones of the command line.

    Raises:
        RuntimeError: `tersor compress` wrote no artifact, with what it said.
    """
    workload = WORKLOADS[name]
    script = SHARED / "workloads" / f"{workload.file}.py"
    with tempfile.TemporaryDirectory(prefix="handmade-") as folder:
        out = Path(folder, "out")
        command = [sys.executable, "-m", "tersor", "compress", f"{script}:{workload.factory}"]
        command += ["--data", f"{script}:{workload.data}", "--recipe", str(recipe)]
        command += ["--threads", str(threads), "--batch", "1", "--out", str(out), "--json"]
        command += words
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if not (out / "report.json").is_file():
            raise RuntimeError(f"tersor compress of {name} exited {done.returncode}: {done.stderr}")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return row(name, report)


def row(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a run's report that recipes are compared by."""
    metrics = ("latency", "size", WORKLOADS[name].quality)
    ratios = {ratio["metric"]: ratio for ratio in report["ratios"]}
    return {
        "workload": name,
        "recipe": report["recipe"],
        "speed": ratios["latency"],
        "quality": ratios[WORKLOADS[name].quality],
        "before": _measured(report["before"], metrics),
        "after": _measured(report["after"], metrics),
        "stages": [
            {
                **{key: stage.get(key) for key in KEPT},
                "attempts": [
                    {"settings": attempt["settings"], "reason": attempt["reason"]}
                    for attempt in stage["attempts"]
                ],
            }
            for stage in report["stages"]
        ],
        "limits": report["limits"],
        "reached": report["reached"],
        "seconds": report["seconds"],
        "warnings": report["warnings"],
        "environment": report["environment"],
    }


def told(row: dict[str, Any]) -> str:
    """Say a row in a few lines."""
    metric = WORKLOADS[row["workload"]].quality
    before, after = row["before"], row["after"]
    speed = row["speed"]
    lines = [
        f"{row['workload']}: {speed['value']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}], "
        f"{before['latency']['value']:.3f} -> {after['latency']['value']:.3f} ms, "
        f"{metric} {before[metric]['value']:.3f} -> {after[metric]['value']:.3f}, "
        f"{before['size']['value'] / 1000:.0f} -> {after['size']['value'] / 1000:.0f} kB, "
        f"limits {'hold' if row['reached'] else 'do NOT hold'}, {row['seconds']:.0f} s"
    ]
    lines += [
        f"  {stage['verdict']}: {stage['name']} ({stage['seconds']:.0f} s): {stage['reason']}"
        for stage in row["stages"]
    ]
    return "\n".join(lines)


def _measured(measurements: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    return {one["metric"]: one for one in measurements if one["metric"] in names}


if __name__ == "__main__":
    sys.exit(main())
