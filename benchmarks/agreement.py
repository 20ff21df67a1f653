"""Does the network in memory after `qat` compute what its file computes on the runtime?

    python benchmarks/agreement.py [--networks resnet20,mobilenet_v2] [--threads 1]

Trains each network with `qat` (8 bits, the defaults, for the epochs below) for ONNX Runtime and for
OpenVINO, and compares its outputs in memory with those of the exported file on every image of the
test split: share of outputs within one quantization step (1/255 of the range of the
outputs), share of images with the same class, with Wilson's interval, and both accuracies. Needs
the shared workloads. Writes benchmarks/results/agreement.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, ROOT, context, ways, workload

NETWORKS = {"resnet20": ("cifar", 1.0), "mobilenet_v2": ("fashion", 0.25)}
RUNTIMES = ("onnxruntime", "openvino")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "agreement")
    parser.add_argument("--out", type=Path, default=RESULTS / "agreement.json")
    asked = parser.parse_args()
    import torch

    from tersor.core.hardware import environment

    torch.set_num_threads(asked.threads)
    rows: list[dict[str, Any]] = []
    for name in asked.networks.split(","):
        for runtime in RUNTIMES:
            folder = asked.work / f"{name}-{runtime}"
            folder.mkdir(parents=True, exist_ok=True)
            rows.append(compared(name, runtime, folder, asked.threads))
            print(json.dumps(rows[-1]), flush=True)
            result = {
                "command": "python benchmarks/agreement.py",
                "arguments": {"threads": asked.threads},
                "environment": environment(),
                "results": rows,
            }
            asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def compared(name: str, runtime: str, folder: Path, threads: int) -> dict[str, Any]:
    """Train, settle, export; run both on the test split."""
    import torch

    from tersor import benchmark
    from tersor.core import plugins
    from tersor.core.runtime import Target
    from tersor.core.scoring import hits
    from tersor.core.statistics import wilson
    from tersor.ops.fake_quantize import settle
    from tersor.ops.lower import lower
    from tersor.quantization.qat import Qat, qat

    file, epochs = NETWORKS[name]
    module = workload(file)
    data, net = module.data(), getattr(module, name)()
    calibration = list(data["calibration"])
    inputs = ways(calibration[0])
    given = context(
        inputs,
        folder,
        calibration=calibration,
        train=data["train"],
        runtime=runtime,
        threads=threads,
    )
    began = time.perf_counter()
    made = settle(qat(net, Qat(epochs=epochs), given)).eval()
    seconds = time.perf_counter() - began
    target = plugins.runtime(runtime)
    files = target.export(lower(made, target.takes, inputs), folder, inputs)
    runner = target.load(files[0], Target(runtime=runtime, options={"threads": threads}))
    test = [{k: v.numpy() for k, v in b.items()} for b in data["test"]]
    found, labels = benchmark.evaluate(runner, test)
    runner.close()
    with torch.no_grad():
        wanted = np.concatenate([made(x=torch.from_numpy(b["x"])).numpy() for b in test])
    assert labels is not None
    step = float(wanted.max() - wanted.min()) / 255
    near = np.abs(found - wanted) <= step
    same = found.argmax(1) == wanted.argmax(1)
    return {
        "network": name,
        "runtime": runtime,
        "epochs": epochs,
        "train_seconds": seconds,
        "images": len(same),
        "within_one_step": 100 * float(near.mean()),
        "same_class": 100 * float(same.mean()),
        "same_class_spread": [100 * x for x in wilson(float(same.sum()), same.size)],
        "accuracy_in_memory": 100 * float(hits(wanted, labels).mean()),
        "accuracy_on_runtime": 100 * float(hits(found, labels).mean()),
    }


if __name__ == "__main__":
    sys.exit(main())
