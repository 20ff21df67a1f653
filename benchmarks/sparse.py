"""Sparse execution beside the best dense path: a network of linear layers, gpt, and where it pays.

    python benchmarks/sparse.py [--parts mlp,gpt,break_even]

mlp: four linear layers of 1024, batch 8, magnitudes below a percentile set to zero, run through
`compress` with the step sparse_execution, against ONNX Runtime's fp32 of the same network,
interleaved. gpt: the same with 90 % zeros in the feed-forward layers, 60 % in the attention's;
needs the shared workloads. break_even: what `tersor profile --sparsity` measures, at batch 1, 8
and 32. Writes benchmarks/results/sparse.json.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import RESULTS, ways, workload
from torch import nn

from tersor import benchmark, profiler
from tersor.candidate import arrays_of
from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.context import Data
from tersor.core.goal import Goal
from tersor.core.hardware import environment, preflight, probe
from tersor.core.model import Model
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.core.schema import to_plain
from tersor.ops.lower import lower
from tersor.pipeline import compress
from tersor.pruning.sparse_execution import SparseExecution

RUNTIMES = ("torch_eager", "torch_export")
WIDTH, BATCH = 1024, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="mlp,gpt,break_even")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    result = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    for part in asked.parts.split(","):
        warnings = preflight(probe())
        made = {"mlp": mlp, "gpt": gpt, "break_even": break_even}[part](asked.threads)
        result = {
            "schema": 1,
            "command": "python benchmarks/sparse.py",
            **{key: value for key, value in result.items() if key in ("mlp", "gpt", "break_even")},
            part: {"rows": to_plain(made), "warnings": list(warnings)},
            "environment": environment(),
        }
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def mlp(threads: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1]).eval()
    batches = [{"input": torch.randn(BATCH, WIDTH)} for _ in range(32)]
    rows = []
    for zeros in (50, 90, 95):
        pruned = prune(net, lambda name, zeros=zeros: zeros)
        for runtime in RUNTIMES:
            row = raced(pruned, batches, runtime, threads)
            rows.append({"zeros": f"{zeros} %", **row})
            tell("mlp", rows[-1])
    return rows


def gpt(threads: int) -> list[dict[str, Any]]:
    module = workload("language")
    data = module.data()
    wanted = {"feed_forward": 90, "attention": 60}
    pruned = prune(
        module.gpt(), lambda name: next((z for word, z in wanted.items() if word in name), 0)
    )
    batches = [{"tokens": b["tokens"]} for b in list(data["calibration"])[:16]]
    rows = []
    for runtime in RUNTIMES:
        row = raced(pruned, batches, runtime, threads)
        rows.append({"zeros": "feed-forward 90 %, attention 60 %", **row})
        tell("gpt", rows[-1])
    return rows


def break_even(threads: int) -> list[profiler.Sparsity]:
    return [profiler.sparsity(batch=batch, threads=threads) for batch in (1, BATCH, 32)]


def prune(net: nn.Module, percent: Callable[[str], int]) -> nn.Module:
    """Set the smallest weights of each linear layer to zero; nothing is trained afterwards."""
    made = copy.deepcopy(net)
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.data
            count = round(percent(name) / 100 * weight.numel())
            weight.view(-1)[weight.abs().flatten().argsort()[:count]] = 0
    return made


def raced(
    net: nn.Module, batches: list[dict[str, Any]], runtime: str, threads: int
) -> dict[str, Any]:
    """Compress for latency on a runtime; race what came out against ONNX Runtime's dense fp32."""
    options = {"threads": threads}
    recipe = Recipe(
        stages=((SparseExecution(),),),
        target=Target(runtime=runtime, options=options),
        goal=Goal(best="latency"),
    )
    inputs, batch = ways(batches[0]), len(next(iter(batches[0].values())))
    data = Data(calibration=batches, validation=batches, test=batches)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        model = Model(net=net, form="module", origin="benchmark", inputs=inputs)
        artifact = compress(model, recipe, data=data, out=out, metrics=("latency",), batch=batch)
        dense = plugins.runtime("onnxruntime")
        (Path(folder) / "dense").mkdir()
        files = dense.export(lower(net, "onnx", inputs), Path(folder) / "dense", inputs)
        rival = dense.load(files[0], Target(runtime="onnxruntime", options=options))
        ours = Artifact.open(out).load()
        timed = benchmark.timing_inputs(batches, batch)
        found = benchmark.contest(rival, ours, timed, budget_s=12.0)
        sample = arrays_of(batches[0], list(inputs.example))
        wanted, made = (next(iter(r.bind(sample)().values())) for r in (rival, ours))
        rival.close()
        ours.close()
    stage = artifact.report.stages[0]
    facts: Mapping[str, Any] = stage.facts.get("sparse_execution", {})
    return {
        "runtime": runtime,
        "batch": batch,
        "threads": threads,
        "verdict": stage.verdict,
        "reason": stage.reason,
        "layers": facts.get("layers", {}),
        "dense": facts.get("dense", {}),
        "difference": float(np.abs(wanted - made).max() / np.abs(wanted).max()),
        "comparison": {**to_plain(found), "samples": {}},
    }


def tell(network: str, row: Mapping[str, Any]) -> None:
    c = row["comparison"]
    print(
        f"{network} {row['zeros']} {row['runtime']}: {c['speedup']:.2f}x "
        f"[{c['low']:.2f}, {c['high']:.2f}] of ONNX Runtime's {c['a_ms']:.3f} ms; "
        f"{row['verdict']}: {row['reason']}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
