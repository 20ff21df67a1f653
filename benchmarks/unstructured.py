"""Unstructured pruning on MNIST: Deep Compression's sparsity, and what each way is worth.

    python benchmarks/unstructured.py [--parts target,effect] [--networks lenet5] [--seeds 0,1,2]

`target`: LeNet-300-100 with 8 % of its weights left, pruned while training and then distilled, and
LeNet-5 with 8 %, pruned in one shot and distilled. The recipes were chosen on the validation half
of the test split (the samples that compress sets aside); accuracy is that of the whole split beside
the original's, and of the other half alone. `effect`: LeNet-300-100 with 2 % of the weights left,
in one shot and trained again, gradually by size and by movement, and with rewinding, all with the
same passes over the training data. Each row is stored as it is measured, so that a run can be
stopped and go on. Needs the shared workloads. Writes benchmarks/results/unstructured.json.
"""

import argparse
import copy
import dataclasses
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import RESULTS, context, stored, ways, workload, write

from tersor.core.hardware import environment
from tersor.core.plugins import technique_of
from tersor.core.recipe import Recipe, stage_name
from tersor.ops import masks
from tersor.trainer import fit

TARGET: dict[str, list[Any]] = {
    "lenet_300_100": [
        {"gradual": {"sparsity": 0.92, "scope": "global", "epochs": 6, "lr": 0.002}},
        {"distill_logits": {"epochs": 2, "lr": 0.001}},
    ],
    "lenet5": [
        {"magnitude": {"sparsity": 0.92, "scope": "global"}},
        {"distill_logits": {"epochs": 8, "lr": 0.001}},
    ],
}
PRECISION = {"lenet_300_100": "fp32", "lenet5": "bf16"}
"""Of the forward passes while training; LeNet-5 trains twice as fast with bfloat16 where the
processor has it. All figures are of float32."""
LEFT = 0.02
"""Share of the weights left where ways are compared."""
EPOCHS = 4
"""Passes over the training data that each way gets."""


def effect() -> dict[str, list[Any]]:
    """Return the stages that are compared: the same sparsity, ranking and passes."""
    common: dict[str, Any] = {"sparsity": 1 - LEFT, "scope": "global"}
    trained: dict[str, Any] = {**common, "epochs": EPOCHS, "lr": 0.002}
    rounds: dict[str, Any] = {**trained, "rounds": EPOCHS, "epochs": 1}
    return {
        "one shot, then finetune": [
            {"magnitude": common},
            {"finetune": {"epochs": EPOCHS, "lr": 0.002}},
        ],
        "gradual, by size": [{"gradual": trained}],
        "gradual, by movement": [{"gradual": {**trained, "criterion": "movement"}}],
        "rounds, learning rate rewound": [{"lottery_ticket": rounds}],
        "rounds, rewound to the given weights": [{"lottery_ticket": {**rounds, "rewind": "given"}}],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="target,effect")
    parser.add_argument("--networks", default=",".join(TARGET), help="of the part target")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=RESULTS / "unstructured.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    jobs: list[tuple[str, str, str, list[Any]]] = []
    if "target" in asked.parts:
        jobs += [("target", n, "recipe", TARGET[n]) for n in asked.networks.split(",")]
    if "effect" in asked.parts:
        jobs += [("effect", "lenet_300_100", way, stage) for way, stage in effect().items()]
    for seed in map(int, asked.seeds.split(",")):
        for part, network, way, stage in jobs:
            key = {"part": part, "network": network, "way": way, "seed": seed}
            if any(key.items() <= row.items() for row in stored(asked.out)):
                continue
            row = {**key, **measured(network, stage, seed)}
            print(json.dumps(row), file=sys.stderr)
            store(asked.out, row)
    return 0


def store(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a report, in place of one of the same way and seed."""
    found = {_key(old): old for old in [*stored(file), row]}
    rows = [found[key] for key in sorted(found)]
    result = {
        "command": "python benchmarks/unstructured.py",
        "left": LEFT,
        "epochs": EPOCHS,
        "environment": environment(),
        "results": rows,
    }
    write(file, result)


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["part"], row["network"], row["way"], row["seed"]


def measured(network: str, stage: list[Any], seed: int) -> dict[str, Any]:
    """Apply a stage to a network; return what is left of it."""
    module = workload("mnist")
    data, net = module.data(), getattr(module, network)()
    original = accuracies(net, data["test"])
    reference = copy.deepcopy(net)
    began = time.perf_counter()
    (configs,) = Recipe.parse({"steps": [stage], "target": "onnxruntime:cpu"}).stages
    for number, config in enumerate(configs):
        with tempfile.TemporaryDirectory() as folder:
            given = context(
                ways(next(iter(data["calibration"]))),
                Path(folder),
                calibration=data["calibration"],
                train=data["train"],
                reference=reference,
            )
            train: Any = functools.partial(fit, threads=1, precision=PRECISION[network])
            given = dataclasses.replace(given, seed=1000 * seed + number, fit=masks.holding(train))
            net = technique_of(config).apply(net, config, given)
    masks.settle(net)
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    kept = {name: int(p.count_nonzero()) for name, p in weights.items()}
    total = sum(p.numel() for p in weights.values())
    return {
        "stage": stage_name(configs),
        "settings": stage,
        "precision": PRECISION[network],
        "weights_left": sum(kept.values()) / total,
        "weights_left_by_layer": {n: kept[n] / p.numel() for n, p in weights.items()},
        "original": original,
        "accuracy": accuracies(net, data["test"]),
        "seconds": time.perf_counter() - began,
    }


def accuracies(net: Any, batches: Any) -> dict[str, float]:
    """Return accuracy in percent on the whole test split, its validation half and the other."""
    with torch.no_grad():
        right = torch.cat([net(b["x"]).argmax(1) == b["labels"] for b in batches]).double()
    order = np.random.default_rng(0).permutation(len(right))
    half = len(order) // 2
    return {
        "whole": 100 * right.mean().item(),
        "validation": 100 * right[order[:half]].mean().item(),
        "other": 100 * right[order[half:]].mean().item(),
    }


if __name__ == "__main__":
    sys.exit(main())
