"""TVM tuned within a budget of time, against its default schedule.

    python benchmarks/tvm_tuning.py [--seconds 240] [--budget 20]

ResNet-20 (CIFAR-10), batch 1, one thread: compiled with TVM's default schedule and with the one
found by `tune` within the budget, both compared with PyTorch on test images, then timed in turns by
`benchmark.contest`. On a busy machine the slower of two very different networks waits more often
for the processor; so the sum over operators, each by its fastest run, is told beside it. Needs the
shared workloads, and TVM's environment (`tersor doctor --create tvm`). Writes
benchmarks/results/tvm_tuning.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, test_images, workload, write


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="of tuning")
    parser.add_argument("--budget", type=float, default=20, help="seconds of timing")
    parser.add_argument("--images", type=int, default=500, help="that outputs are compared on")
    parser.add_argument("--out", type=Path, default=RESULTS / "tvm_tuning.json")
    asked = parser.parse_args()
    import torch

    from tersor import benchmark
    from tersor.core import environments, plugins
    from tersor.core.hardware import environment
    from tersor.core.model import Inputs
    from tersor.core.runtime import Target
    from tersor.core.schema import to_plain
    from tersor.ops.lower import lower

    torch.set_num_threads(1)
    net, images, labels = subject(asked.images)
    inputs = Inputs(example={"x": images[:1]})
    with torch.no_grad():
        expected = torch.cat([net(part) for part in images.split(100)]).numpy()
    lowered = lower(net, "onnx", inputs)
    runtime = plugins.runtime("tvm")
    plugins.require("runtimes", "tvm", (*runtime.to_export, *runtime.to_run))
    rows: dict[str, dict[str, Any]] = {}
    runners = []
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in (("default", 0.0), ("tuned", asked.seconds)):
            place = Path(folder) / name
            place.mkdir()
            target = Target(runtime="tvm", options={"threads": 1, "tune": seconds})
            began = time.monotonic()
            files = runtime.write(lowered, place, inputs, target)
            spent = time.monotonic() - began
            runner = runtime.open(files[0], target)
            (made,) = runner.bind({"x": images.numpy()})().values()
            rows[name] = {
                "export_seconds": spent,
                "accuracy": 100 * float((made.argmax(1) == labels).mean()),
                "largest_difference": float(np.abs(made - expected).max()),
                "tuning": json.loads(files[1].read_text(encoding="utf-8")).get("tuning"),
            }
            runners.append(runner)
        batches = [{"x": image[None].numpy()} for image in images[:32]]
        found = benchmark.contest(runners[0], runners[1], batches, budget_s=asked.budget)
        for runner in runners:
            runner.close()
    result = {
        "command": "python benchmarks/tvm_tuning.py",
        "arguments": {"seconds": asked.seconds, "budget": asked.budget, "threads": 1, "batch": 1},
        "network": "resnet20",
        "images": len(images),
        "accuracy_pytorch": 100 * float((expected.argmax(1) == labels).mean()),
        "largest_output": float(np.abs(expected).max()),
        "results": rows,
        "operators_ms": operators(rows["tuned"]["tuning"]),
        "comparison": to_plain(found),
        "environment": {**environment(), "tvm": list(environments.pins("tvm"))},
    }
    write(asked.out, result)
    print(f"tuned {found.speedup:.1f}x [{found.low:.1f}, {found.high:.1f}] as fast as default")
    print(json.dumps(result["operators_ms"]))
    return 0


def operators(tuning: dict[str, Any]) -> dict[str, float]:
    """Add up the operators' fastest runs."""
    return {
        key: sum(each["count"] * each[f"{key}_ms"] for each in tuning["operators"])
        for key in ("default", "tuned")
    }


def subject(count: int) -> tuple[Any, Any, np.ndarray]:
    """Return ResNet-20, test images and their labels."""
    images, labels = test_images(count)
    return workload("cifar").resnet20().eval(), images, labels.numpy()


if __name__ == "__main__":
    sys.exit(main())
