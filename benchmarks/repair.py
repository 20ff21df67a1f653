"""What repair without labels brings back: weights of 4 and 3 bits on mobilenet_v2 and gpt.

    python benchmarks/repair.py [--networks mobilenet_v2,gpt] [--ways "nearest;adaround"]

Rounds each network in several ways, from nearest rounding to learned rounding, the last one of
mobilenet_v2 trained with labels for comparison, and scores all in memory on every second batch of
the test split: accuracy in percent for mobilenet_v2 (weights of 4 and of 3 bits, activations of 8),
perplexity of a character for gpt (4-bit weights, groups of 32). Needs the shared workloads. Writes
benchmarks/results/repair.json.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _networks import RESULTS, context, ways, workload

from tersor.core.hardware import environment
from tersor.core.plugins import technique_of
from tersor.core.recipe import Recipe, stage_name
from tersor.ops.fake_quantize import settle

NETWORKS = {"mobilenet_v2": "fashion", "gpt": "language"}


def stages(network: str, steps: int) -> dict[str, list[Any]]:
    """Return the stages that are compared, by name."""
    learned: dict[str, Any] = {"adaround": {"steps": steps}}
    if network == "gpt":
        nearest = {"weight_only": {"bits": 4}}
        clipped = {"weight_only": {"bits": 4, "weight_range": "mse"}}
        return {
            "nearest": [nearest],
            "mse clipping": [clipped],
            "mse clipping, bias_correction": [clipped, "bias_correction"],
            "nearest, adaround": [nearest, learned],
            "mse clipping, adaround": [clipped, learned],
        }
    tensor = {"static": {"weight_bits": 4, "per_channel": False}}
    channel = {"static": {"weight_bits": 4}}
    clipped = {"static": {"weight_bits": 4, "weight_range": "mse"}}
    equal: dict[str, Any] = {"equalize": {"replace_relu6": True}}
    three: dict[str, Any] = {"static": {"weight_bits": 3}}
    return {
        "nearest, a scale a layer": [tensor],
        "equalize, a scale a layer": [equal, tensor],
        "equalize, a scale a layer, bias_correction": [equal, tensor, "bias_correction"],
        "nearest": [channel],
        "mse clipping": [clipped],
        "bias_correction": [channel, "bias_correction"],
        "adaround": [channel, learned],
        "adaround, bias_correction": [channel, learned, "bias_correction"],
        "qat, one epoch": [{"qat": {"weight_bits": 4}}],
        "3 bits: nearest, a scale a layer": [{"static": {"weight_bits": 3, "per_channel": False}}],
        "3 bits: nearest": [three],
        "3 bits: bias_correction": [three, "bias_correction"],
        "3 bits: adaround": [three, learned],
        "3 bits: qat, one epoch": [{"qat": {"weight_bits": 3}}],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--ways", default="", help="separated by ';'; a stored report keeps others")
    parser.add_argument("--steps", type=int, default=1000, help="of adaround, for each layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "repair.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    wanted = [way.strip() for way in asked.ways.split(";") if way.strip()]
    rows: list[dict[str, Any]] = []
    if wanted and asked.out.is_file():
        stored = json.loads(asked.out.read_text(encoding="utf-8"))["results"]
        rows = [r for r in stored if r["network"] not in asked.networks or r["way"] not in wanted]
    for network in asked.networks.split(","):
        for row in network_rows(network, asked.steps, wanted):
            print(f"{network}: {row['way']}: {row['value']:.3f} {row['unit']}", file=sys.stderr)
            rows.append(row)
            result = {
                "command": "python benchmarks/repair.py",
                "arguments": {"steps": asked.steps, "threads": asked.threads},
                "environment": environment(),
                "results": sorted(rows, key=lambda r: list(NETWORKS).index(r["network"])),
            }
            asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def network_rows(network: str, steps: int, wanted: list[str]) -> Any:
    """Yield one row for the float network and one for each way, or for those wanted."""
    module = workload(NETWORKS[network])
    data, net = module.data(), getattr(module, network)()
    test = [b for i, b in enumerate(data["test"]) if i % 2]
    inputs = ways(next(iter(data["calibration"])))
    if not wanted:
        yield {"network": network, "way": "fp32", **scored(network, net, test), "seconds": 0.0}

    for way, stage in stages(network, steps).items():
        if wanted and way not in wanted:
            continue
        made: Any = copy.deepcopy(net)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            given = context(
                inputs,
                Path(folder),
                calibration=data["calibration"],
                train=data["train"],
                threads=torch.get_num_threads(),
            )
            (configs,) = Recipe.parse({"steps": [stage], "target": "onnxruntime:cpu"}).stages
            for config in configs:
                made = technique_of(config).apply(made, config, given)
            made = settle(made).eval()
        seconds = time.perf_counter() - began
        yield {
            "network": network,
            "way": way,
            "stage": stage_name(configs),
            **scored(network, made, test),
            "seconds": seconds,
        }


def scored(network: str, net: Any, batches: Any) -> dict[str, Any]:
    """Return accuracy, or perplexity where characters are predicted."""
    right = count = 0
    loss = 0.0
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"]
            logits = net(**{k: v for k, v in batch.items() if k != "labels"})
            count += labels.numel()
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
    if network == "gpt":
        return {"value": math.exp(loss / count), "unit": "perplexity"}
    return {"value": 100 * right / count, "unit": "%"}


if __name__ == "__main__":
    sys.exit(main())
