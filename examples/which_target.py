"""The same network and recipe for two runtimes: which one serves it better on this machine?

    python examples/which_target.py

What pays on one runtime may not on another, so verdicts are made for each; the two results are then
timed against each other, interleaved.
"""

import sys
from pathlib import Path

import tersor

RUNTIMES = ("onnxruntime", "openvino")


def main(out: Path) -> None:
    data = tersor.load_data("digits")
    for runtime in RUNTIMES:
        recipe = tersor.Recipe.parse(
            {
                "steps": ["fuse_batch_norm", "static"],
                "target": {"runtime": runtime, "options": {"threads": 1}},
                "goal": {"best": "latency", "limits": {"accuracy": "-1pt"}},
            }
        )
        model = tersor.load("tersor.demo.network:trained")
        report = tersor.compress(model, recipe, data=data, out=out / runtime).report
        print(runtime, [f"{stage.name}: {stage.verdict}" for stage in report.stages])
    first, second = (out / runtime for runtime in RUNTIMES)
    found = tersor.compare(first, second, data=data)
    interval = f"[{found.low:.2f}, {found.high:.2f}]"
    print(f"{RUNTIMES[1]} is {found.speedup:.2f}x {interval}: {found.verdict}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/which_target"))
