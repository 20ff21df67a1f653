"""How far can `tersor compare` be trusted on this machine?

    python benchmarks/aa.py cifar.py:resnet20 --data cifar.py:data

Compares a network with a second copy of itself, again and again: any difference is a false alarm.
Then slows the second copy down by 5 %, by really waiting that long after each run: any other
verdict than "slower" is a miss. Writes a report with all ratios, and ends with 1 if more than 5 of
100 are false alarms or fewer than 90 of 100 slowdowns are found.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tersor.benchmark import MIN_EFFECT, self_check, timing_inputs
from tersor.core import plugins
from tersor.core.hardware import environment, preflight, probe
from tersor.core.runtime import Target
from tersor.pipeline import load, load_data
from tersor.plan import make_inputs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="as for tersor compress")
    parser.add_argument("--data", required=True, help="as for tersor compress")
    parser.add_argument("--target", default="onnxruntime:cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--planted", type=float, default=0.05)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of a contest")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "aa.json")
    asked = parser.parse_args()

    machine = probe()
    warnings = preflight(machine)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    parsed = Target.parse(asked.target)
    target = Target(
        runtime=parsed.runtime, device=parsed.device, options={"threads": asked.threads}
    )
    with tempfile.TemporaryDirectory() as folder:
        file, inputs = export(asked.model, asked.data, target, asked.batch, Path(folder))
        runtime = plugins.runtime(target.runtime)
        checks = {}
        for name, planted in (("same", 0.0), ("slowed", asked.planted)):
            checks[name] = check = self_check(
                lambda: runtime.load(file, target),
                inputs,
                repetitions=asked.repetitions,
                min_effect=MIN_EFFECT,
                budget_s=asked.budget,
                planted=planted,
            )
            told = {k: v for k, v in check.items() if k != "ratios"}
            print(f"{name}: {json.dumps(told)}", file=sys.stderr)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    false_alarms = checks["same"]["faster"] + checks["same"]["slower"]
    report = {
        "schema": 1,
        "what": "A/A self check and planted slowdown",
        "command": f"python benchmarks/aa.py {Path(asked.model).name} "
        f"--data {Path(asked.data).name} --target {target} "
        f"--threads {asked.threads} --batch {asked.batch} --repetitions {asked.repetitions} "
        f"--planted {asked.planted:g} --budget {asked.budget:g}",
        "model": Path(asked.model).name,
        "model_sha256": digest,
        "target": str(target),
        "threads": asked.threads,
        "batch": asked.batch,
        "false_alarms": false_alarms,
        "false_alarms_without_minimum_effect": checks["same"]["interval_without_1"],
        "slowdowns_found": checks["slowed"]["slower"],
        "load_average": {"before": machine.load_1min, "after": probe().load_1min},
        "warnings": list(warnings),
        "checks": {name: rounded(check) for name, check in checks.items()},
        "environment": environment(),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{false_alarms} false alarms in {asked.repetitions} "
        f"({checks['same']['interval_without_1']} with a minimum effect of 0); "
        f"{checks['slowed']['slower']} of {asked.repetitions} slowdowns of "
        f"{100 * asked.planted:g} % found; report: {asked.out}"
    )
    good = false_alarms <= 0.05 * asked.repetitions
    return 0 if good and checks["slowed"]["slower"] >= 0.9 * asked.repetitions else 1


def export(model: str, data: str, target: Target, batch: int, folder: Path) -> tuple[Path, Any]:
    """Export a network to the target and make its inputs."""
    from tersor.ops.lower import lower

    loaded, batches = load(model), load_data(data)
    inputs = make_inputs(loaded, batches)
    runtime = plugins.runtime(target.runtime)
    net = lower(loaded.net, runtime.takes, inputs)
    file = runtime.export(net, folder, inputs)[0]
    split = batches.test or batches.calibration or ()
    names = list(inputs.example)
    return file, timing_inputs(({n: b[n] for n in names} for b in split), batch)


def rounded(check: dict[str, Any]) -> dict[str, Any]:
    """Keep five digits of the ratios: low, median, high."""
    return {**check, "ratios": [[round(x, 5) for x in row] for row in check["ratios"]]}


if __name__ == "__main__":
    raise SystemExit(main())
