"""resnet56 at 2.1 times fewer MACs: tersor's `channels` beside Torch-Pruning, and by latency.

    python benchmarks/pruning_peers.py [--only METHOD[:SEED],...] [--seeds 0,1,2] [--report]

Each run cuts the trained resnet56 (`_pruning_runs.py` lists the methods), trains it for exactly one
epoch on plain labels with the same trainer, learning rate, batches and seeds, quantizes it with
`static`, and scores both files on ONNX Runtime. It takes minutes, and is stored when it is done
under benchmarks/results/pruning_peers/; what is stored is not run again. `--report` only puts
together what there is.

- Torch-Pruning 1.6.1 prunes as in its own reproduction on CIFAR-10: BasePruner, L1 magnitude or
  group norm (p=2), global ranking, 400 small steps until the MACs are reached. `inner` protects the
  layers that write to the shortcuts.
- `from scratch` trains the architecture of tersor's default with new weights, same budget.
- MACs are counted by one counter for all (torch's FlopCounterMode over the network).
- Choices (which importance is the default, which network is steered by latency) look at the
  validation half of the test split, `numpy.random.default_rng(0).permutation(n)[: n // 2]`;
  figures are of the other half.

Differences are pooled over seeds and paired over images: the mean over seeds of each image's
difference in hits, with the 95 % interval of its mean over images; seeds apart are listed beside
it. Latency is timed in turns, all networks of the first seed in one process, one thread. The second
verdict: among the networks steered by measured latency (blocks, and widths rounded to what kernels
want), the fastest in int8 that on validation is at most 0.3 point below the MACs-steered one, also
in int8, and how many times faster it is.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, ROOT, SHARED, workload
from quantization_peers import make_environment

HERE = Path(__file__).parent
PARTS = RESULTS / "pruning_peers"
RESULT = RESULTS / "pruning_peers.json"
PYTHON = ROOT / ".environments" / "pruning" / "bin" / "python"
BATCHES = (1, 8)
EQUAL = 0.3
"""Points of validation accuracy that count as about equal."""
FASTER = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="methods, METHOD or METHOD:SEED")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--again", action="store_true", help="also what is stored already")
    parser.add_argument("--limit-batches", type=int, default=0, help="to try the script out")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of timing, for each batch size"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pruning_peers")
    parser.add_argument("--parts", type=Path, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    make_environment("pruning")
    if not arguments.report:
        for method, seed in asked(arguments.only, arguments.seeds):
            run(method, seed, arguments)
    report(arguments)
    return 0


def methods() -> list[str]:
    told = "import _pruning_runs; print('\\n'.join(_pruning_runs.METHODS))"
    found = subprocess.run(
        [str(PYTHON), "-c", told],
        cwd=HERE,
        env=setting(),
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip().split("\n")


def asked(only: str, seeds: str) -> list[tuple[str, int]]:
    """Turn `--only` and `--seeds` into runs, seed by seed."""
    known = methods()
    runs = []
    for entry in only.split(",") if only else known:
        method, _, seed = entry.partition(":")
        if method not in known:
            raise SystemExit(f"no method {method!r}; there are: {', '.join(known)}")
        runs += [(method, int(s)) for s in ([seed] if seed else seeds.split(","))]
    return sorted(runs, key=lambda run: run[1])


def setting() -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT / "src"), "TERSOR_SHARED": str(SHARED), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def place(method: str, seed: int) -> str:
    return f"{method.replace(' ', '-')}.{seed}"


def run(method: str, seed: int, arguments: argparse.Namespace) -> None:
    """Do one run in a process of its own, unless it is stored."""
    name = place(method, seed)
    part, folder = arguments.parts / f"{name}.json", arguments.work / name
    if part.exists() and not arguments.again:
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        str(PYTHON),
        str(HERE / "_pruning_runs.py"),
        method,
        str(seed),
        str(folder),
        str(part),
    ]
    done = subprocess.run(
        [*command, str(arguments.limit_batches)],
        env=setting(),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        print(f"{name}: fails: {last}", flush=True)
        return
    (folder / "fit.safetensors").unlink(missing_ok=True)
    print(line(json.loads(part.read_text(encoding="utf-8"))), flush=True)


def line(row: Mapping[str, Any]) -> str:
    cells = [f"{row['method']:32}{row['seed']}  {row['times_fewer_macs']:.2f} x fewer MACs"]
    for form in ("fp32", "int8"):
        halves = row[form]
        cells.append(
            f"{form} {halves['validation']['accuracy']:.2f} % validation, "
            f"{halves['test']['accuracy']:.2f} % test"
        )
    return "  ".join([*cells, f"{row['train_seconds']:.0f} s"])


# --- report --------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace) -> None:
    """Put the stored runs together."""
    rows: dict[str, dict[int, Any]] = {}
    for file in sorted(arguments.parts.glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        rows.setdefault(row["method"], {})[row["seed"]] = row
    if not rows:
        raise SystemExit("no run is stored yet")
    latency = timed(rows, arguments)
    table = {method: entry(own) for method, own in rows.items()}
    ours = [m for m, own in rows.items() if m.startswith("tersor") and steered(own) == "macs"]
    # a way that ran with one seed was tried; only those with all are compared
    most = max((len(rows[m]) for m in ours), default=0)
    tried = [m for m in ours if len(rows[m]) < most]
    ours = [m for m in ours if m not in tried]
    made: dict[str, Any] = {"command": "python benchmarks/pruning_peers.py", "methods": table}
    if ours:
        chosen = max(ours, key=lambda m: table[m]["fp32"]["validation"])
        others = [m for m in rows if m not in (*ours, *tried) and steered(rows[m]) == "macs"]
        made["chosen_on_validation"] = chosen
        made["chosen_minus"] = {m: pooled(rows[m], rows[chosen], "fp32") for m in others}
        made["by_latency"] = by_latency(chosen, rows, table, latency)
    made["latency"] = {f"{form} batch {batch}": v for (form, batch), v in latency.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    told = {key: made.get(key) for key in ("chosen_on_validation", "chosen_minus", "by_latency")}
    print(json.dumps(told, indent=1))


def steered(own: Mapping[int, Any]) -> str:
    return str(next(iter(own.values()))["steered"])


def entry(own: Mapping[int, Any]) -> dict[str, Any]:
    """Figures of one method over its seeds."""
    first = next(iter(own.values()))
    made: dict[str, Any] = {
        "seeds": sorted(own),
        "limit_batches": first["limit_batches"],
        "times_fewer_macs": [own[s]["times_fewer_macs"] for s in sorted(own)],
        "parameters": [own[s]["parameters"] for s in sorted(own)],
    }
    for form in ("fp32", "int8"):
        made[form] = {
            half: float(np.mean([own[s][form][half]["accuracy"] for s in own]))
            for half in ("validation", "test")
        }
        made[form]["test_by_seed"] = [own[s][form]["test"]["accuracy"] for s in sorted(own)]
        made[form]["size_bytes"] = first[form]["size_bytes"]
    return made


def unpacked(row: Mapping[str, Any], form: str, half: str) -> np.ndarray:
    found = row[form][half]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["hits"]), dtype=np.uint8))
    return bits[: found["samples"]].astype(np.float64)


def pooled(
    before: Mapping[int, Any], after: Mapping[int, Any], form: str, half: str = "test"
) -> dict[str, Any]:
    """Return after - before in points over the seeds that both have; see the top of the file."""
    from tersor.core.statistics import mean_interval

    seeds = sorted(set(before) & set(after))
    each = np.array(
        [unpacked(after[s], form, half) - unpacked(before[s], form, half) for s in seeds]
    )
    low, high = mean_interval(each.mean(0))
    return {
        "points": 100 * float(each.mean()),
        "low": 100 * low,
        "high": 100 * high,
        "seeds": seeds,
        "by_seed": [100 * float(x) for x in each.mean(1)],
    }


def timed(
    rows: Mapping[str, Mapping[int, Any]], arguments: argparse.Namespace
) -> dict[tuple[str, int], dict[str, Any]]:
    """Time the networks of the first seed in turns, fp32 and int8 apart from each other's files."""
    from tersor import benchmark
    from tersor.core.runtime import Target
    from tersor.core.statistics import judge
    from tersor.runtimes.onnxruntime import load

    target = Target(runtime="onnxruntime", options={"threads": 1})
    batches = [{"x": b["x"].numpy()} for b in workload("cifar").data()["calibration"]]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for form in ("fp32", "int8"):
        files = {m: arguments.work / place(m, min(own)) / f"{form}.onnx" for m, own in rows.items()}
        names = [name for name, file in files.items() if file.exists()]
        if "original" not in names:
            continue
        runners = [load(files[name], target) for name in names]
        for batch in BATCHES:
            feeds = benchmark.timing_inputs(batches, batch)
            calls = [[runner.bind(feed) for feed in feeds] for runner in runners]
            times = dict(
                zip(
                    names,
                    benchmark.interleave(calls, budget_s=arguments.seconds, seed=0),
                    strict=True,
                )
            )
            found[form, batch] = {
                "samples_ms": {n: [round(float(x), 5) for x in t] for n, t in times.items()},
                "times_faster_than_original": {
                    n: race(times["original"], t, judge) for n, t in times.items()
                },
            }
    return found


def race(slow: np.ndarray, fast: np.ndarray, judge: Any) -> dict[str, Any]:
    ratio = judge(slow, fast)
    return {key: getattr(ratio, key) for key in ("speedup", "low", "high", "verdict", "blocks")}


def by_latency(
    chosen: str,
    rows: Mapping[str, Mapping[int, Any]],
    table: Mapping[str, Any],
    latency: Mapping[tuple[str, int], Mapping[str, Any]],
) -> dict[str, Any]:
    """Compare the network steered by latency with the one steered by MACs, both in int8."""
    from tersor.core.statistics import judge

    times = {b: latency[form, b]["samples_ms"] for form, b in latency if form == "int8"}
    able = [
        m
        for m in rows
        if steered(rows[m]) == "latency"
        and m in times.get(1, {})
        and table[m]["int8"]["validation"] >= table[chosen]["int8"]["validation"] - EQUAL
    ]
    if not able or chosen not in times.get(1, {}):
        return {"against": chosen, "fails": "no network steered by latency is about as accurate"}
    fastest = min(able, key=lambda m: float(np.median(times[1][m])))
    ratios = {
        f"batch {b}": race(np.array(ms[chosen]), np.array(ms[fastest]), judge)
        for b, ms in times.items()
    }
    return {
        "against": chosen,
        "network": fastest,
        "accuracy": pooled(rows[chosen], rows[fastest], "int8"),
        "validation": pooled(rows[chosen], rows[fastest], "int8", "validation"),
        "times_faster": ratios,
        "at_least_1.5": bool(ratios["batch 1"]["speedup"] >= FASTER),
    }


if __name__ == "__main__":
    sys.exit(main())
