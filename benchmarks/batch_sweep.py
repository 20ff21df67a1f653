"""Batch sizes of three workloads: samples a second, milliseconds a batch, and the knee.

    python benchmarks/batch_sweep.py [--networks resnet20,vit,lstm] [--seconds 1]

Each network runs on ONNX Runtime through `tersor measure --sweep`, one instance on one thread.
Needs the shared workloads. Writes benchmarks/results/batch_sweep.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _networks import RESULTS, SHARED, stored, write

NETWORKS = {"resnet20": "cifar", "vit": "fashion", "lstm": "speech"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "batch_sweep.json")
    asked = parser.parse_args()
    rows = {row["network"]: row for row in stored(asked.out)}
    for name in asked.networks.split(","):
        rows[name] = {"network": name, **swept(name, asked)}
        result = {
            "command": "python benchmarks/batch_sweep.py",
            "arguments": {"batches": asked.batches, "seconds": asked.seconds},
            "results": [rows[each] for each in NETWORKS if each in rows],
        }
        write(asked.out, result)
    return 0


def swept(name: str, asked: Any) -> dict[str, Any]:
    script = SHARED / "workloads" / f"{NETWORKS[name]}.py"
    words = [sys.executable, "-m", "tersor", "measure", f"{script}:{name}"]
    words += ["--data", f"{script}:data", "--sweep", "--batches", asked.batches]
    words += ["--cells", "1x1", "--seconds", str(asked.seconds), "--json"]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    found["subject"] = f"{NETWORKS[name]}.py:{name}"
    print(name, "knee", found["sweep"]["knee"], flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
