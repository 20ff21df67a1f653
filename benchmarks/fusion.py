"""What ONNX Runtime and OpenVINO fuse by themselves, and what each fusion step adds.

    python benchmarks/fusion.py [--networks resnet56,vit,...] [--runtimes onnxruntime,openvino]

For each network and runtime: operators that could be one, counted in the network, in what the
export merges and in the runtime's own optimized graph; and each fusion technique alone, with its
defaults, timed against the network as it is, interleaved. Rows that the report has already are kept
(--again measures them anew). Needs the shared workloads; MiniLM comes from a package in
`.environments/minilm`, made on demand. Writes benchmarks/results/fusion.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _minilm import elsewhere, loaded
from _networks import RESULTS, workload

NETWORKS = {
    "resnet56": ("cifar", "resnet56", "data"),
    "mobilenet_v2": ("fashion", "mobilenet_v2", "data"),
    "vit": ("fashion", "vit", "data"),
    "unet": ("fashion", "unet", "scenes"),
    "lstm": ("speech", "lstm", "data"),
    "gpt": ("language", "gpt", "data"),
    "sentiment": ("sentiment", "transformer", "data"),
}
MINILM = "minilm"
RUNTIMES = ("onnxruntime", "openvino")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join([*NETWORKS, MINILM]))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--seconds", type=float, default=6.0, help="of each contest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--out", type=Path, default=RESULTS / "fusion.json")
    asked = parser.parse_args()
    import torch

    from tersor.core.context import Data
    from tersor.core.hardware import environment
    from tersor.core.runtime import Target
    from tersor.core.schema import to_plain
    from tersor.fusions import fusions

    torch.set_num_threads(asked.threads)
    rows: list[dict[str, Any]] = []
    if asked.out.exists() and not asked.again:
        rows = json.loads(asked.out.read_text(encoding="utf-8"))["results"]
    have = {(row["network"], row["runtime"], row["fusions"]["batch"]) for row in rows}
    for name in asked.networks.split(","):
        if name == MINILM and elsewhere(__file__, name):
            rows = json.loads(asked.out.read_text(encoding="utf-8"))["results"]
            continue
        for runtime in asked.runtimes.split(","):
            if (name, runtime, asked.batch) in have:
                continue
            model, data = given(name)
            found = fusions(
                model,
                Data(calibration=data),
                target=Target(runtime=runtime, options={"threads": asked.threads}),
                batch=asked.batch,
                budget_s=asked.seconds,
            )
            rows.append(
                {
                    "network": name,
                    "runtime": runtime,
                    "fusions": to_plain(found),
                    "environment": environment(),
                }
            )
            print(f"{name} {runtime}: {found.operators} operators")
            for row in found.rows:
                print(
                    f"  {row.kind}: {row.found}, {row.by_export}+{row.by_runtime}, {row.left} left"
                )
            for step in found.steps:
                c = step.comparison
                told = f"{c.speedup:.3f}x [{c.low:.3f}, {c.high:.3f}]" if c else step.reason
                print(f"  - {step.technique}: {told}", flush=True)
            result = {
                "command": "python benchmarks/fusion.py",
                "arguments": {"seconds": asked.seconds, "threads": asked.threads},
                "results": rows,
            }
            asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def given(name: str) -> tuple[Any, Any]:
    """Return a network, and batches of its data."""
    from tersor.core.model import Model

    if name == MINILM:
        model, data, _ = loaded()
        return model, data.calibration
    file, factory, splits = NETWORKS[name]
    module = workload(file)
    model = Model(net=getattr(module, factory)(), form="module", origin=name)
    return model, getattr(module, splits)()["calibration"]


if __name__ == "__main__":
    sys.exit(main())
