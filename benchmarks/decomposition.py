"""What decompositions buy on ONNX Runtime, with distillation, under a limit of accuracy.

    python benchmarks/decomposition.py [--rows resnet56-grouped] [--epochs 1] [--again] [--times]

Tucker and spatial SVD on unet and resnet56, CP and separable convolutions on resnet56, SVD of both
kinds on vit, SVD on mobilenet_v2, each in one stage with `distill_logits`, under "accuracy -1pt"
through the real pipeline, one thread: layers that do not get faster are left as they are, and
stages that do not pay are tried weaker or dropped. resnet56 also by energy in place of a budget:
every layer that keeps it is timed. And resnet56 with every convolution separable
and 40 % fewer multiply-accumulates, without a goal. Figures are of the half of the test split that
no decision has seen. Each row is stored as it is measured; a run that is stopped goes on where it
was, within a row, too. Beside the pipeline's own contest by the clock, artifact and original are
timed in turns by the CPU time of their one thread, which other work on the machine stretches less;
`--times` repeats that for stored artifacts. Needs the shared workloads. Writes
benchmarks/results/decomposition.json.
"""

import argparse
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
from _networks import RESULTS, ROOT, SHARED, stored, ways, workload, write

import tersor
from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.hardware import environment
from tersor.core.recipe import Recipe
from tersor.core.report import Report
from tersor.core.runtime import Target
from tersor.core.schema import to_plain
from tersor.core.statistics import judge
from tersor.ops.lower import lower
from tersor.trainer import fit

GOAL = {"best": "latency", "limits": {"accuracy": "-1pt"}}
EPOCHS = {"unet": 1.0, "resnet56": 0.2, "vit": 0.2, "mobilenet_v2": 0.2}
"""Passes over the training data of each try."""
ROWS: dict[str, dict[str, Any]] = {
    f"{network}-{name}": {
        "network": network,
        "steps": [[{name: {"macs": share}}, {"distill_logits": {"epochs": EPOCHS[network]}}]],
        "goal": GOAL,
    }
    for network, share, names in (
        ("unet", 0.6, ("tucker", "spatial_svd")),
        ("resnet56", 0.8, ("tucker", "spatial_svd", "cp", "grouped_convolution")),
        ("vit", 0.7, ("svd", "activation_svd")),
        ("mobilenet_v2", 0.7, ("svd",)),
    )
    for name in names
}
ROWS["resnet56-tucker_energy"] = {
    "network": "resnet56",
    "steps": [[{"tucker": {"energy": 0.9}}, {"distill_logits": {"epochs": EPOCHS["resnet56"]}}]],
    "goal": GOAL,
}
ROWS["resnet56-grouped"] = {
    "network": "resnet56",
    "steps": [
        [
            {"grouped_convolution": {"macs": 0.6, "convert": "all"}},
            {"distill_logits": {"epochs": 1.0}},
        ]
    ],
}
BLOCKS = 60
"""Turns of each side, of 16 runs."""
IMAGES = {
    "unet": (1, 64, 64),
    "resnet56": (3, 32, 32),
    "vit": (1, 28, 28),
    "mobilenet_v2": (1, 28, 28),
}
PLACES = {
    "unet": ("fashion", "scenes", "mean_iou"),
    "resnet56": ("cifar", "data", None),
    "vit": ("fashion", "data", None),
    "mobilenet_v2": ("fashion", "data", None),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "decomposition")
    parser.add_argument("--out", type=Path, default=RESULTS / "decomposition.json")
    parser.add_argument("--times", action="store_true", help="time stored artifacts again")
    parser.add_argument("--again", action="store_true", help="measure stored rows again")
    parser.add_argument("--epochs", type=float, help="of distillation, in place of the row's own")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.rows.split(","):
        old = next((row for row in stored(asked.out) if row["row"] == name), None)
        if asked.times and old is not None:
            store(asked.out, {**old, "cpu_time": cpu_time(ROWS[name], asked.work / name)})
            continue
        if asked.times or (old is not None and not asked.again):
            continue
        row = {"row": name, **measured(longer(ROWS[name], asked.epochs), asked.work / name)}
        row["cpu_time"] = cpu_time(ROWS[name], asked.work / name)
        print(json.dumps(row)[:2000], file=sys.stderr)
        store(asked.out, row)
    return 0


def longer(row: dict[str, Any], epochs: float | None) -> dict[str, Any]:
    """Return a row with these epochs of distillation."""
    ((cut, recover),) = row["steps"]
    own = recover["distill_logits"] if epochs is None else {"epochs": epochs}
    return {**row, "steps": [[cut, {"distill_logits": own}]]}


def store(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a report."""
    rows = {old["row"]: old for old in [*stored(file), row]}
    result = {
        "command": "python benchmarks/decomposition.py",
        "environment": environment(),
        "results": [rows[name] for name in ROWS if name in rows],
    }
    write(file, result)


def measured(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one recipe; return what the report says of it."""
    file, function, quality = PLACES[row["network"]]
    place = SHARED / "workloads" / f"{file}.py"
    data = tersor.load_data(f"{place}:{function}")
    if quality is not None:
        data = dataclasses.replace(data, quality=getattr(workload(file), quality))
    plain = {"steps": row["steps"], "target": "onnxruntime:cpu"}
    recipe = Recipe.parse(plain if "goal" not in row else {**plain, "goal": row["goal"]})
    metrics = ["accuracy", "latency", "size", "macs", "parameters", "fidelity"]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    made = tersor.compress(
        tersor.load(f"{place}:{row['network']}"),
        recipe,
        data=data,
        out=folder / "out",
        metrics=[*metrics, "quality"] if quality else metrics,
        fit=functools.partial(fit, threads=1),
        threads=1,
        resume=(folder / "out.work").exists(),
    )
    return {"network": row["network"], "seconds": time.perf_counter() - began, **told(made.report)}


def cpu_time(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare the CPU time of a run of the artifact with that of the original, in turns."""
    file, *_ = PLACES[row["network"]]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, *IMAGES[row["network"]], generator=generator) for _ in range(16)]
    inputs = ways({"x": images[0]})
    runtime = plugins.runtime("onnxruntime")
    target = Target(runtime="onnxruntime", options={"threads": 1})
    samples = [{"x": x[:1].numpy()} for x in images]
    with tempfile.TemporaryDirectory() as aside:
        net = getattr(workload(file), row["network"])()
        files = runtime.export(lower(net, "onnx", inputs), Path(aside), inputs)
        runners = [runtime.load(files[0], target), Artifact.open(folder / "out").load()]
        calls = [[runner.bind(x) for x in samples] for runner in runners]
        times: list[list[float]] = [[], []]
        for block in range(BLOCKS + 5):
            for side in (0, 1) if block % 2 else (1, 0):
                began = time.thread_time_ns()
                for call in calls[side]:
                    call()
                times[side].append((time.thread_time_ns() - began) / 1e6 / len(calls[side]))
        for runner in runners:
            runner.close()
    found = judge(np.array(times[0][5:]), np.array(times[1][5:]))
    names = ("speedup", "low", "high", "a_ms", "b_ms", "blocks", "stable")
    return {name: getattr(found, name) for name in names}


def told(report: Report) -> dict[str, Any]:
    """Return verdict, figures on the final split, and what became of each layer."""
    (stage,) = report.stages
    return {
        "stage": stage.name,
        "verdict": stage.verdict,
        "reason": stage.reason,
        "settings": to_plain(list(stage.settings)),
        "attempts": to_plain(list(stage.attempts)),
        "facts": to_plain(dict(stage.facts)),
        "before": {m.metric: m.value for m in report.before},
        "after": {m.metric: m.value for m in report.after},
        "ratios": {r.metric: [r.value, r.low, r.high] for r in report.ratios},
        "limits": to_plain(list(report.limits)),
        "reached": report.reached,
        "warnings": list(report.warnings),
    }


if __name__ == "__main__":
    sys.exit(main())
