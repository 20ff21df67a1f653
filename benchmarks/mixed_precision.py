"""`mixed_precision` under size budgets beside `static` with the same bits everywhere.

    python benchmarks/mixed_precision.py [--networks resnet56,mobilenet_v2]

Both round the same network with the same 1,024 calibration images, weights with the range of least
squared error, activations in 8 bits, and are scored as files on ONNX Runtime, on the test split,
which neither looks at. Size is that of the file. Sensitivities are measured once for a network and
serve every budget. Accuracies of networks that differ in a few roundings differ by chance, too: the
divergence (Kullback-Leibler, of the float network's classes) tells them apart sooner. A point of
uniform bits is dominated when some mixed file is no larger and no less accurate; `dominated_in`
says whether that holds for accuracy, and for divergence in its place. Exit code 1 where it does not
hold for accuracy.
Needs the shared workloads. Writes benchmarks/results/mixed_precision.json.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, ROOT, context, ways, workload

NETWORKS = {"resnet56": "cifar", "mobilenet_v2": "fashion"}
UNIFORM = (8, 6, 5, 4)
SIZES = (0.249, 0.22, 0.187, 0.17, 0.156, 0.14, 0.124)
BITS = (8, 6, 5, 4, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mixed_precision")
    parser.add_argument("--out", type=Path, default=RESULTS / "mixed_precision.json")
    arguments = parser.parse_args()
    from tersor.core.hardware import environment

    points: list[dict[str, Any]] = []
    for name in arguments.networks.split(","):
        points += marked(network_points(name, arguments.work / name))
        result = {
            "command": "python benchmarks/mixed_precision.py",
            "environment": environment(),
            "weight_bits": BITS,
            "results": points,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    held = [p["dominated_in"]["accuracy"] for p in points if p["kind"] == "uniform"]
    return 0 if all(held) else 1


def marked(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of each uniform point of one network whether a mixed one is as small and as good."""
    mixed = [p for p in points if p["kind"] == "mixed"]
    for point in (p for p in points if p["kind"] == "uniform"):
        small = [p for p in mixed if p["size_bytes"] <= point["size_bytes"]]
        point["dominated_in"] = {
            "accuracy": any(p["accuracy"] >= point["accuracy"] for p in small),
            "divergence": any(p["divergence"] <= point["divergence"] for p in small),
        }
    return points


def network_points(name: str, folder: Path) -> list[dict[str, Any]]:
    """Quantize a network in every way, and score the files."""
    from tersor import benchmark
    from tersor.core import plugins
    from tersor.core.runtime import Target
    from tersor.core.scoring import hits
    from tersor.core.statistics import paired_difference, wilson
    from tersor.ops.lower import lower
    from tersor.quantization._bits import size_budget, solve
    from tersor.quantization.mixed_precision import MixedPrecision, mixed_precision
    from tersor.quantization.static import Static, static

    module = workload(NETWORKS[name])
    data, net = module.data(), getattr(module, name)()
    calibration = list(data["calibration"])
    inputs = ways(calibration[0])
    test = [{k: v.numpy() for k, v in b.items()} for b in data["test"]]
    target = Target(runtime="onnxruntime", options={"threads": 1})
    folder.mkdir(parents=True, exist_ok=True)

    tried: list[tuple[str, float, Any, Any]] = [("float", 1.0, None, None)]
    tried += [
        ("uniform", b / 32, static, Static(weight_bits=b, weight_range="mse")) for b in UNIFORM
    ]
    tried += [
        ("mixed", s, mixed_precision, MixedPrecision(size=s, weight_bits=BITS)) for s in SIZES
    ]
    table: dict[str, dict[int, float]] = {}
    points = []
    right: dict[str, Any] = {}
    floats = np.zeros(0)
    for kind, share, apply, config in tried:
        given = context(inputs, folder, calibration=calibration)
        if kind == "mixed" and table:
            counts = {n: net.get_submodule(n).weight.numel() for n in table}
            bits = solve(table, size_budget(table, counts, share))
            config = MixedPrecision(assign=tuple(f"{n}={b}" for n, b in bits.items()))
        began = time.perf_counter()
        made = copy.deepcopy(net) if apply is None else apply(copy.deepcopy(net), config, given)
        seconds = time.perf_counter() - began
        for layer, own in given.facts.get("sensitivities", {}).items():
            table[layer] = {int(b): loss for b, loss in own.items()}
        runtime = plugins.runtime("onnxruntime")
        files = runtime.export(lower(made, "onnx", inputs), folder, inputs)
        runner = runtime.load(files[0], target)
        outputs, labels = benchmark.evaluate(runner, test)
        runner.close()
        assert labels is not None
        found = hits(outputs, labels)
        right.setdefault(kind, found)
        floats = outputs if kind == "float" else floats
        difference, ends = paired_difference(right["float"], found)
        points.append(
            {
                "network": name,
                "kind": kind,
                "weights": share,
                "size_bytes": files[0].stat().st_size,
                "accuracy": 100 * float(found.mean()),
                "accuracy_spread": [100 * x for x in wilson(float(found.sum()), found.size)],
                "minus_float": [100 * x for x in (difference, *ends)],
                "divergence": divergence(outputs, floats),
                "samples": int(found.size),
                "quantize_seconds": seconds,
                "bits": given.facts.get("recipe", {}).get("mixed_precision", {}).get("assign"),
            }
        )
        print(
            f"{name:13}{kind:8}{share:6.3f}  {points[-1]['accuracy']:6.2f} %  "
            f"{points[-1]['divergence']:.5f}  {points[-1]['size_bytes'] / 1e3:7.1f} kB  "
            f"{seconds:5.1f} s",
            flush=True,
        )
    return points


def divergence(outputs: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean Kullback-Leibler divergence of the classes' probabilities."""
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (wanted, outputs))
    return float((np.exp(p) * (p - q)).sum(1).mean())


if __name__ == "__main__":
    sys.exit(main())
