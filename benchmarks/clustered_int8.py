"""Clustering and int8 together on mobilenet_v2, without training: what is lost, what is saved.

    python benchmarks/clustered_int8.py [--ways "int8,32 clusters then int8"]

The pattern of TensorFlow Model Optimization's collaborative table: int8 alone, then weights that
share few values before they are rounded. Each way is a recipe through `compress` on ONNX Runtime,
without a goal, with 512 calibration images. `file_bytes` is the file as the runtime reads it,
`zip_bytes` that file zipped, `packed_bytes` packed. Accuracy is of the whole test split (Fashion-
MNIST, 10,000 images), which no step looks at; its difference to the float network and to int8 alone
has a paired interval. Needs the shared workloads. Writes benchmarks/results/clustered_int8.json.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, workload
from deep_compression import zipped

import tersor
from tersor.core import packing
from tersor.core.hardware import environment
from tersor.core.recipe import Recipe
from tersor.core.statistics import paired_difference

WAYS: dict[str, list[Any]] = {
    "float": [],
    "int8": ["static"],
    "32 clusters then int8": [{"kmeans": {"clusters": 32, "scope": "channel"}}, "static"],
    "16 clusters then int8": [{"kmeans": {"clusters": 16, "scope": "channel"}}, "static"],
    "32 clusters, no scale for channels, then int8": [{"kmeans": {"clusters": 32}}, "static"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path, default=RESULTS / "clustered_int8.json")
    asked = parser.parse_args()
    module = workload("fashion")
    data = module.data()
    hits: dict[str, np.ndarray] = {}
    rows = []
    for way, steps in WAYS.items():
        recipe = {"steps": ["fuse_batch_norm", *steps, "pack"], "target": "onnxruntime:cpu"}
        with tempfile.TemporaryDirectory() as folder:
            made = tersor.compress(
                module.mobilenet_v2(),
                Recipe.parse(recipe),
                data=tersor.Data(**data),
                metrics=("size", "accuracy"),
                threads=1,
                out=Path(folder) / "out",
            )
            hits[way] = right(made, data["test"])
            (file,) = made.model_files
            with packing.unpacked(file) as inner:
                plain = inner.read_bytes()
            row = {
                "way": way,
                "steps": recipe["steps"],
                "file_bytes": len(plain),
                "zip_bytes": zipped(plain),
                "packed_bytes": file.stat().st_size,
                "accuracy": 100 * hits[way].mean(),
            }
        for other in ("float", "int8"):
            if other in hits and other != way:
                value, (low, high) = paired_difference(hits[other], hits[way])
                points = {"value": 100 * value, "low": 100 * low, "high": 100 * high}
                row[f"points_to_{other}"] = points
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
        result = {
            "command": "python benchmarks/clustered_int8.py",
            "environment": environment(),
            "results": rows,
        }
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def right(artifact: Any, batches: Any) -> np.ndarray:
    """Tell for each sample whether the artifact's answer is right."""
    runner = artifact.load()
    found = []
    for batch in batches:
        outputs = next(iter(runner.bind({"x": batch["x"].numpy()})().values()))
        found.append(outputs.argmax(1) == batch["labels"].numpy())
    runner.close()
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(main())
