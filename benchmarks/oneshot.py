"""What one-shot pruning costs: gpt at 50 to 70 % zeros and at 2:4, in perplexity, without training.

    python benchmarks/oneshot.py [--subsets 3] [--samples 128]

Prunes every linear layer but the last by magnitude, by Wanda (with its score and with RIA's) and by
SparseGPT, and scores each in memory on the whole test split. The methods that look at calibration
data are run on several subsets of the training text: the first is the calibration split, the others
are windows drawn from everything that was trained on. Needs the shared workloads. Writes
benchmarks/results/oneshot.json.
"""

import argparse
import copy
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _networks import RESULTS, context, ways, workload

from tersor.core.hardware import environment
from tersor.core.plugins import technique_of
from tersor.core.recipe import Recipe

LAYERS = ["!lm_head"]
"""As in the papers, which leave embedding and head as they are."""
SHARES = (0.5, 0.6, 0.7)


def steps(samples: int) -> dict[str, dict[str, Any]]:
    """Return what is compared, by amount of zeros and name of the method."""
    calibrated = {"samples": samples, "layers": LAYERS}
    return {
        **{
            f"{share:.0%}".replace("%", " %"): {
                "magnitude": {"magnitude": {"sparsity": share, "layers": LAYERS}},
                "wanda": {"wanda": {"sparsity": share, **calibrated}},
                "wanda, score ria": {"wanda": {"sparsity": share, "score": "ria", **calibrated}},
                "sparsegpt": {"sparsegpt": {"sparsity": share, **calibrated}},
            }
            for share in SHARES
        },
        "2:4": {
            "magnitude": {"semi_structured": {"permute": False, "layers": LAYERS}},
            "magnitude, channels permuted": {"semi_structured": {"layers": LAYERS}},
            "wanda": {"wanda": {"pattern": "2:4", **calibrated}},
            "wanda, score ria": {"wanda": {"pattern": "2:4", "score": "ria", **calibrated}},
            "sparsegpt": {"sparsegpt": {"pattern": "2:4", **calibrated}},
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of a subset")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "oneshot.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for row in measured(asked.subsets, asked.samples):
        print(
            f"{row['zeros']}: {row['way']} ({row['subset']}): {row['value']:.4f}", file=sys.stderr
        )
        rows.append(row)
        result = {
            "command": "python benchmarks/oneshot.py",
            "arguments": {key: getattr(asked, key) for key in ("subsets", "samples", "threads")},
            "environment": environment(),
            "results": rows,
        }
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(subsets: int, samples: int) -> Iterator[dict[str, Any]]:
    """Yield one row for the dense network, and one a method and subset."""
    module = workload("language")
    data, net = module.data(), module.gpt()
    inputs = ways(next(iter(data["calibration"])))
    yield {"zeros": "none", "way": "dense", "subset": 0, **scored(net, data["test"])}
    for zeros, methods in steps(samples).items():
        for way, step in methods.items():
            count = subsets if way.startswith(("wanda", "sparsegpt")) else 1
            for subset in range(count):
                yield {
                    "zeros": zeros,
                    "way": way,
                    "subset": subset,
                    **pruned(net, step, inputs, calibration(module, data, subset, samples), data),
                }


def calibration(module: Any, data: Any, subset: int, samples: int) -> list[Any]:
    """Return batches of training windows: the calibration split, or drawn with a seed."""
    source = data["calibration"]
    if subset:
        source = module.Batches(data["train"].text, train=True, seed=subset)
    return list(itertools.islice(source, -(-samples // module.BATCH)))


def pruned(net: Any, step: Any, inputs: Any, batches: Any, data: Any) -> dict[str, Any]:
    """Apply one step to a copy; return its perplexity, zeros and seconds."""
    (stage,) = Recipe.parse({"steps": [step], "target": "onnxruntime:cpu"}).stages
    (config,) = stage
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        given = context(inputs, Path(folder), calibration=batches, threads=torch.get_num_threads())
        made = technique_of(config).apply(copy.deepcopy(net), config, given)
    seconds = time.perf_counter() - began
    facts = {k: given.facts[k] for k in ("sparsity", "samples") if k in given.facts}
    return {**facts, **scored(made, data["test"]), "seconds": seconds}


def scored(net: Any, batches: Any) -> dict[str, Any]:
    """Return the perplexity of a character."""
    loss, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"].flatten()
            logits = net(batch["tokens"]).flatten(0, 1)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += labels.numel()
    return {"value": math.exp(loss / count), "unit": "perplexity"}


if __name__ == "__main__":
    sys.exit(main())
