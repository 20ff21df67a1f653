"""What 8-bit integers buy a CNN, a Transformer and an LSTM, kind of operator by kind.

    python benchmarks/explain_int8.py [--networks resnet20,mobilenet_v2,vit,sentiment,lstm]

Runs `explain` on each network, ONNX Runtime and OpenVINO, batch sizes 1 and 8, and keeps all it
says. Needs the shared workloads. Writes benchmarks/results/explain_int8.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _networks import RESULTS, workload

NETWORKS = {
    "resnet20": ("cifar", "resnet20"),
    "mobilenet_v2": ("fashion", "mobilenet_v2"),
    "vit": ("fashion", "vit"),
    "sentiment": ("sentiment", "transformer"),
    "lstm": ("speech", "lstm"),
}
RUNTIMES = ("onnxruntime", "openvino")
BATCHES = (1, 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seconds", type=float, default=6.0, help="of each contest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "explain_int8.json")
    asked = parser.parse_args()
    import torch

    from tersor.core.context import Data
    from tersor.core.hardware import environment
    from tersor.core.model import Model
    from tersor.core.runtime import Target
    from tersor.core.schema import to_plain
    from tersor.explainer import explain

    torch.set_num_threads(asked.threads)
    rows: list[dict[str, Any]] = []
    for name in asked.networks.split(","):
        file, factory = NETWORKS[name]
        module = workload(file)
        splits = module.data()
        data = Data(calibration=splits["calibration"], test=splits["test"])
        for runtime in RUNTIMES:
            target = Target(runtime=runtime, options={"threads": asked.threads})
            for batch in BATCHES:
                model = Model(net=getattr(module, factory)(), form="module", origin=name)
                found = explain(model, data, target=target, batch=batch, budget_s=asked.seconds)
                rows.append({"network": name, "explanation": to_plain(found)})
                c = found.comparison
                print(
                    f"{name} {runtime} batch {batch}: {c.speedup:.2f}x [{c.low:.2f}, {c.high:.2f}]"
                )
                print(*(f"  - {reason}" for reason in found.reasons), sep="\n", flush=True)
        result = {
            "command": "python benchmarks/explain_int8.py",
            "arguments": {"seconds": asked.seconds, "threads": asked.threads},
            "environment": environment(),
            "results": rows,
        }
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
