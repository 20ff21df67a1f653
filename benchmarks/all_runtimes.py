"""One network on every runtime: does it export, run, agree, and what does it cost there?

    python benchmarks/all_runtimes.py [--networks resnet20,resnet20-int8,minilm] [--threads 1]

resnet20 in fp32 and with 8-bit weights and activations (`static`, calibrated on the calibration
split), on the whole test split; MiniLM, whose sentences are those of examples/minilm.py. Runtimes
that have an environment of their own run there: `tersor doctor --create all` makes them. Needs the
shared workloads; MiniLM comes from a package in `.environments/minilm`, made on demand.
Writes benchmarks/results/all_runtimes.json, a network at a time.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from _networks import RESULTS, context, stored, ways, workload, write

from tersor.core.hardware import environment, preflight, probe
from tersor.core.schema import to_plain

NETWORKS = ("resnet20", "resnet20-int8", "minilm")
METRICS = {"resnet20": ("size", "peak_memory")}
"""Beside quality and times; three processes a runtime for the memory take minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--runtimes", default="", help="these only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "all_runtimes.json")
    asked = parser.parse_args()
    for name in asked.networks.split(","):
        if name == "minilm" and elsewhere(__file__, name):
            continue
        made = surveyed(name, asked)
        rows = [row for row in stored(asked.out) if row["network"] != name]
        result = {
            "command": "python benchmarks/all_runtimes.py",
            "arguments": {"threads": asked.threads, "batch": asked.batch},
            "environment": environment(),
            "results": [*rows, {"network": name, **made}],
        }
        write(asked.out, result)
        for row in made["rows"]:
            print(name, row["runtime"], row["status"], row["reason"][:100], flush=True)
    return 0


def surveyed(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    from tersor.core.context import Data
    from tersor.core.model import Model
    from tersor.survey import survey

    if name == "minilm":
        model, data, inputs = loaded()
    else:
        module = workload("cifar")
        splits = module.data()
        net = module.resnet20()
        inputs = ways(next(iter(splits["calibration"])))
        if name.endswith("-int8"):
            net = quantized(net, inputs, splits["calibration"])
        model = Model(net=net, form="module", origin=name)
        data = Data(test=splits["test"])
    found = survey(
        model,
        data=data,
        inputs=inputs,
        runtimes=[x for x in asked.runtimes.split(",") if x],
        metrics=METRICS.get(name, ("size",)),
        batch=asked.batch,
        threads=asked.threads,
        display=told,
    )
    return {**to_plain(found), "subject": name, "warnings": list(preflight(probe()))}


def quantized(net: Any, inputs: Any, calibration: Any) -> Any:
    """Apply `fuse_batch_norm` and `static` as a recipe would."""
    from tersor.core.plugins import technique_of
    from tersor.core.recipe import Recipe
    from tersor.ops.fake_quantize import settle

    recipe = Recipe.parse({"steps": ["fuse_batch_norm", "static"], "target": "onnxruntime:cpu"})
    with tempfile.TemporaryDirectory() as folder:
        given = context(inputs, Path(folder), calibration=calibration)
        for (config,) in recipe.stages:
            net = technique_of(config).apply(net, config, given)
    return settle(net).eval()


def told(items: Any, what: Any, total: Any = None) -> Any:
    for item in items:
        print(what, item, file=sys.stderr, flush=True)
        yield item


if __name__ == "__main__":
    sys.exit(main())
