"""tersor's loads beside MLPerf's own load generator, on the demo network.

    python benchmarks/loadgen.py [--pairs 12] [--seconds 1.0]

Both drive the same loaded network in the same process, in turns (whose first is drawn anew), for
the modes single (median and 90th percentile of latency) and offline (samples per second, batches
of 32). The load generator runs in `.environments/loadgen`, made of benchmarks/environments/
loadgen.txt. Writes benchmarks/results/loadgen.json: the median over pairs of tersor / loadgen with
its order-statistic interval, and all pairs. Exit code 1: a median is more than 3 % off.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "loadgen.json"
PYTHON = HERE.parent / ".environments" / "loadgen" / "bin" / "python"
WITHIN = 0.03
BATCH = 32
SAMPLES = 256
"""Distinct samples that either rotates through."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measured(arguments.worker, arguments.pairs, arguments.seconds)))
        return 0
    if not PYTHON.exists():
        sys.exit(f"make {PYTHON.parent.parent} of benchmarks/environments/loadgen.txt first")
    from tersor.core.hardware import environment

    with tempfile.TemporaryDirectory() as folder:
        model = exported(Path(folder))
        words = [__file__, "--worker", str(model)]
        words += ["--pairs", str(arguments.pairs), "--seconds", str(arguments.seconds)]
        done = subprocess.run(
            [str(PYTHON), *words],
            check=True,
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(HERE.parent / "src")},
        )
    pairs = json.loads(done.stdout.splitlines()[-1])
    result = {
        "command": f"python benchmarks/loadgen.py --pairs {arguments.pairs} "
        f"--seconds {arguments.seconds:g}",
        "peer": (HERE / "environments" / "loadgen.txt").read_text("utf-8").split(),
        "environment": environment(),
        "ratios": {name: ratio(pairs[name]) for name in pairs},
        "pairs": pairs,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, row in result["ratios"].items():
        print(
            f"{name:12} tersor / loadgen {row['median']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        )
    return int(any(abs(row["median"] - 1) > WITHIN for row in result["ratios"].values()))


def exported(folder: Path) -> Path:
    """Write the demo network as ONNX."""
    import torch

    from tersor.core import plugins
    from tersor.core.model import Inputs
    from tersor.demo.network import trained
    from tersor.ops.lower import lower

    way = Inputs(example={"x": torch.ones(2, 1, 8, 8)}, dynamic={"x": {0: "batch"}})
    runtime = plugins.runtime("onnxruntime")
    return Path(runtime.export(lower(trained().eval(), "onnx", way), folder, way)[0])


def ratio(pairs: list[list[float]]) -> dict[str, float]:
    """Return the median of the pairs' ratios with its interval."""
    from tersor.core.statistics import median_interval

    ratios = np.array([ours / theirs for ours, theirs in pairs])
    low, high = median_interval(ratios)
    return {"median": float(np.median(ratios)), "low": low, "high": high, "pairs": len(pairs)}


def measured(model: Path, pairs: int, seconds: float) -> dict[str, Any]:
    """Take turns; this runs in the load generator's environment."""
    from tersor.core import plugins
    from tersor.core.runtime import Target
    from tersor.instances import Here
    from tersor.scenario import scenario

    target = Target(runtime="onnxruntime", options={"threads": 1})
    runner = plugins.runtime("onnxruntime").open(model, target)
    rng = np.random.default_rng(0)
    ones = [{"x": rng.standard_normal((1, 1, 8, 8)).astype("float32")} for _ in range(SAMPLES)]
    batches = [
        {"x": np.concatenate([ones[i + j]["x"] for j in range(BATCH)])}
        for i in range(0, SAMPLES, BATCH)
    ]
    here = Here(runner)

    def ours(mode: str) -> dict[str, float]:
        made = scenario(
            here,
            lambda size: ones if size == 1 else batches,
            mode,
            seconds=seconds,
            batch=1 if mode == "single" else BATCH,
        )
        return {
            "p50": float(np.quantile(made.latencies_ms, 0.5)),
            "p90": float(np.quantile(made.latencies_ms, 0.9)),
            "rate": made.samples_per_s,
        }

    calls = {"single": [runner.bind(x) for x in ones], "offline": [runner.bind(x) for x in batches]}
    found: dict[str, list[list[float]]] = {"single p50": [], "single p90": [], "offline": []}
    order = random.Random(0)
    for _ in range(pairs):
        for mode in ("single", "offline"):
            both: dict[str, dict[str, float]] = {}
            for who in order.sample(["ours", "theirs"], 2):
                both[who] = ours(mode) if who == "ours" else theirs(mode, calls[mode], seconds)
            keys = ("p50", "p90") if mode == "single" else ("rate",)
            for key in keys:
                name = mode if key == "rate" else f"{mode} {key}"
                found[name].append([both["ours"][key], both["theirs"][key]])
    return found


def theirs(mode: str, calls: list[Any], seconds: float) -> dict[str, float]:
    """Let the load generator drive the bound calls, and read its summary."""
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario = (
        lg.TestScenario.SingleStream if mode == "single" else lg.TestScenario.Offline
    )
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = int(1000 * seconds)
    settings.min_query_count = 1
    began = [0]

    def run(samples: list[Any]) -> None:
        """Run one sample, or all of them in batches."""
        step = 1 if mode == "single" else BATCH
        for i in range(0, len(samples), step):
            calls[began[0] % len(calls)]()
            began[0] += 1
            some = samples[i : i + step]
            lg.QuerySamplesComplete([lg.QuerySampleResponse(s.id, 0, 0) for s in some])

    rate = _warmed(calls)
    if mode == "offline":
        settings.offline_expected_qps = rate
    log = lg.LogSettings()
    log.enable_trace = False
    sut = lg.ConstructSUT(run, lambda: None)
    qsl = lg.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
    lg.StartTestWithLogSettings(sut, qsl, settings, log)
    lg.DestroyQSL(qsl)
    lg.DestroySUT(sut)
    lines = Path("mlperf_log_summary.txt").read_text(encoding="utf-8").splitlines()
    said = {n.strip(): v.strip() for n, colon, v in (x.partition(":") for x in lines) if colon}
    if mode == "single":
        return {
            "p50": float(said["50.00 percentile latency (ns)"]) / 1e6,
            "p90": float(said["90.00 percentile latency (ns)"]) / 1e6,
        }
    return {"rate": float(said["Samples per second"])}


def _warmed(calls: list[Any]) -> float:
    """Warm up as tersor does; tell about how many samples there will be in a second."""
    from tersor.core.loops import closed

    return BATCH * 1000 / float(np.mean(closed(calls, seconds=0.5, fewest=3).service_ms))


if __name__ == "__main__":
    sys.exit(main())
