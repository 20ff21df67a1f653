"""What `advise` finds for six workloads, beside the recipes that a hand made for them.

    python benchmarks/advice.py [--workloads resnet56,gpt,...] [--minutes 3]

Each workload goes through `tersor compress --recipe auto`, in a process of its own, on one thread,
with the goal of the recipe in benchmarks/recipes. A row holds what benchmarks/handmade.py stores,
and of each stage the gain that was predicted and the one that came out. Needs the shared workloads.
Writes benchmarks/results/advice.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from _networks import RESULTS, stored, write
from handmade import RECIPES, WORKLOADS, run, told


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--minutes", type=float, default=3, help="that a stage may train")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "advice.json")
    asked = parser.parse_args()
    rows = {row["workload"]: row for row in stored(asked.out)}
    for name in asked.workloads.split(","):
        goal = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["goal"]
        words = ["--minutes", f"{asked.minutes:g}", "--best", goal["best"]]
        for metric, limit in goal["limits"].items():
            words += ["--limit", f"{metric}={limit}"]
        rows[name] = run(name, "auto", threads=asked.threads, words=words)
        rows[name]["minutes"] = asked.minutes
        print(told(rows[name]), flush=True)
        for stage in predicted(rows[name]):
            print("  ", stage, flush=True)
        result = {
            "command": "python benchmarks/advice.py",
            "arguments": {"threads": asked.threads, "batch": 1},
            "results": [rows[each] for each in WORKLOADS if each in rows],
        }
        write(asked.out, result)
    return 0


def predicted(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Set the predicted gains of stages beside those measured."""
    return [
        {
            "stage": stage["name"],
            "verdict": stage["verdict"],
            "predicted": stage["predicted"],
            "measured": stage["speed"]["value"],
            "inside": stage["predicted"][0] <= stage["speed"]["value"] <= stage["predicted"][1],
        }
        for stage in row["stages"]
        if stage["predicted"] and stage["speed"]
    ]


if __name__ == "__main__":
    sys.exit(main())
