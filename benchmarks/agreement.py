"""Does a quantized network in memory compute what its file computes on the runtime?

    python benchmarks/agreement.py [--networks resnet20,mobilenet_v2] [--threads 1]
    python benchmarks/agreement.py --step static [--runtimes onnxruntime,litert]

Trains each network with `qat` (8 bits, the defaults, for the epochs below) for ONNX Runtime and for
OpenVINO, and compares its outputs in memory with those of the exported file on every image of the
test split: share of outputs within one quantization step (1/255 of the range of the
outputs), share of images with the same class, with Wilson's interval, and both accuracies. Needs
the shared workloads. Writes benchmarks/results/agreement.json.

With `--step static` resnet20 is quantized once, after training, and the very same network goes to
every runtime; those that are not installed, and have no environment of their own, are said and left
out. Writes benchmarks/results/agreement-static.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, ROOT, context, ways, workload, write

NETWORKS = {"resnet20": ("cifar", 1.0), "mobilenet_v2": ("fashion", 0.25)}
RUNTIMES = {
    "qat": ("onnxruntime", "openvino"),
    "static": (
        "onnxruntime",
        "openvino",
        "litert",
        "executorch",
        "torch_compile",
        "torchscript",
        "torch_export",
        "torch_eager",
    ),
}
BATCH = 8
"""Of files that take one batch size only."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step", choices=sorted(RUNTIMES), default="qat")
    parser.add_argument("--networks")
    parser.add_argument("--runtimes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "agreement")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    import torch

    from tersor.core.errors import DependencyError, ModelError, TargetError
    from tersor.core.hardware import environment

    torch.set_num_threads(asked.threads)
    step = asked.step
    suffix = "" if step == "qat" else f"-{step}"
    out = asked.out or RESULTS / f"agreement{suffix}.json"
    networks = (asked.networks or ("resnet20" if step == "static" else ",".join(NETWORKS))).split(
        ","
    )
    runtimes = asked.runtimes.split(",") if asked.runtimes else RUNTIMES[step]
    rows: list[dict[str, Any]] = []
    for name in networks:
        made: Any = None
        for runtime in runtimes:
            folder = asked.work / f"{name}-{step}-{runtime}"
            folder.mkdir(parents=True, exist_ok=True)
            if made is None or step == "qat":
                made = quantized(name, step, runtime, folder, asked.threads)
            try:
                rows.append(compared(made, name, runtime, folder, asked.threads))
            except (DependencyError, ModelError, TargetError) as error:
                rows.append({"network": name, "runtime": runtime, "left_out": str(error)})
            print(json.dumps(rows[-1]), flush=True)
            result = {
                "command": f"python benchmarks/agreement.py{f' --step {step}' * bool(suffix)}",
                "arguments": {"threads": asked.threads},
                "environment": environment(),
                "results": rows,
            }
            write(out, result)
    return 0


def quantized(name: str, step: str, runtime: str, folder: Path, threads: int) -> dict[str, Any]:
    """Make the network of integers, and run it in memory on the test split."""
    import torch

    from tersor.ops.fake_quantize import settle
    from tersor.quantization.qat import Qat, qat
    from tersor.quantization.static import Static, static

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
    trains = step == "qat"
    made = qat(net, Qat(epochs=epochs), given) if trains else static(net, Static(), given)
    made = settle(made).eval()
    facts = {"epochs": epochs, "train_seconds": time.perf_counter() - began} if trains else {}
    test = [{k: v.numpy() for k, v in b.items()} for b in data["test"]]
    with torch.no_grad():
        wanted = np.concatenate([made(x=torch.from_numpy(b["x"])).numpy() for b in test])
    return {"net": made, "inputs": inputs, "test": test, "wanted": wanted, "facts": facts}


def compared(
    made: dict[str, Any], name: str, runtime: str, folder: Path, threads: int
) -> dict[str, Any]:
    """Export; run the file on the test split."""
    from tersor import benchmark
    from tersor.candidate import inputs_for
    from tersor.core import plugins
    from tersor.core.runtime import Target
    from tersor.core.scoring import hits
    from tersor.core.statistics import wilson
    from tersor.ops.lower import lower

    target = plugins.runtime(runtime)
    plugins.require("runtimes", runtime, (*target.to_export, *target.to_run))
    inputs = inputs_for(target, made["inputs"], BATCH)
    files = target.export(lower(made["net"], target.takes, inputs), folder, inputs)
    runner = target.open(files[0], Target(runtime=runtime, options={"threads": threads}))
    found, labels = benchmark.evaluate(runner, made["test"])
    runner.close()
    assert labels is not None
    wanted = made["wanted"]
    step = float(wanted.max() - wanted.min()) / 255
    near = np.abs(found - wanted) <= step
    same = found.argmax(1) == wanted.argmax(1)
    return {
        "network": name,
        "runtime": runtime,
        **made["facts"],
        "images": len(same),
        "within_one_step": 100 * float(near.mean()),
        "same_class": 100 * float(same.mean()),
        "same_class_spread": [100 * x for x in wilson(float(same.sum()), same.size)],
        "accuracy_in_memory": 100 * float(hits(wanted, labels).mean()),
        "accuracy_on_runtime": 100 * float(hits(found, labels).mean()),
    }


if __name__ == "__main__":
    sys.exit(main())
