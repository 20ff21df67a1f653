"""int8 by tersor beside ONNX Runtime, NNCF and torchao: accuracy, latency, size, and what it costs.

    python benchmarks/quantization_peers.py [--networks resnet20,vit] [--seconds 4] [--threads 1]

All quantize the same fp32 network with the same calibration samples, `lstm` dynamically. `tersor
mixed` is the stage `[mixed_precision, bias_correction]`, all with their defaults. The peers
run in environments of their own (`.environments/quantization`, `.environments/torchao`, made on
demand), with per-channel weights and min-max ranges where they ask (ONNX Runtime: U8S8 QDQ; NNCF:
its defaults, over all samples; torchao: PT2E with X86InductorQuantizer's default).

**Cost.** Each quantization runs in a process of its own, pinned to `--threads` cores
(`_peers.py`). Its seconds reach from the float network and the batches in memory to the saved
quantized file; all that they import was imported before, as a process before has learned it. For
tersor and torchao they begin at the nn.Module. ONNX Runtime and NNCF begin at an fp32 ONNX file;
the seconds of writing that file with torch.onnx.export, in one more process, are added in
`seconds_with_export`, which is what verdicts compare. `cpu_seconds` is the processor time of the
span, which tells what a busy machine added. `peak_bytes` is the largest resident set of
the process within that span, `before_bytes` the one at its start (packages, network and batches);
`peak_bytes_with_export` is the larger of the two processes' peaks.

**Quality** is of the half of the test split that tersor makes no decisions on: top-1 accuracy with
Wilson's interval and paired differences; for `unet` the mean IoU of the workload, with intervals
from a paired bootstrap over scenes. `divergence_from_fp32` tells how far a file's outputs are from
those it was made from; a quality above or below fp32's with a large divergence is a drift, with a
small one chance. `shift` is how much a file's logits of each class are higher than fp32's on the
mean, and `minus_fp32_without_shift` the difference in quality once that is taken back: mean IoU
rises where rare classes are named more often than they were trained to be, which is another
threshold and no better rounding.

**Latency** is timed interleaved, all ONNX files of a network in one process for each runtime. Only
torch runs torchao's program (Inductor) and torch's dynamic quantization (eager): these are timed in
their own environment, in one process with fp32 and tersor's files on ONNX Runtime, and their rows
give the ratio to fp32 on ONNX Runtime.

Networks are independent of each other: with `--networks`, what a stored report of the same peers
and arguments holds of the others stays.

**Verdicts**, for each runtime and each file of tersor: `not_worse` than every peer in quality (at
most 0.3 point lower, or at most 2 samples); `better_than_every_peer` in quality (interval above
zero) or in latency at a batch size ("faster" by `judge`: interval above 1, and 3 % at least)
without being slower at another; `latency_within_noise` ("slower" than the best peer of that runtime
at no batch size); `time_ratio` of quantization to the fastest peer of all, and
`same_runtime_time_ratio` to the fastest one whose file that runtime runs; both also as processor
time (`cpu_`). Exit code 1 where `not_worse` fails.

Needs the shared workloads. Writes benchmarks/results/quantization_peers.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, ROOT, SHARED
from _networks import workload as script
from _quality import minus, scored, spread, value

HERE = Path(__file__).parent
RESULT = RESULTS / "quantization_peers.json"
RUNTIMES = ("onnxruntime", "openvino")
BATCHES = (1, 8)
TIMEOUT_S = 3600
ENVIRONMENTS = {
    "onnxruntime quantize_static": "quantization",
    "onnxruntime quantize_dynamic": "quantization",
    "nncf quantize": "quantization",
    "torchao pt2e": "torchao",
    "torch quantize_dynamic": "torchao",
}
TORCH = {"torchao pt2e": "torch inductor", "torch quantize_dynamic": "torch eager"}
STATIC = ("onnxruntime quantize_static", "nncf quantize", "torchao pt2e")
DYNAMIC = ("onnxruntime quantize_dynamic", "nncf quantize", "torch quantize_dynamic")


@dataclass(frozen=True, kw_only=True)
class Workload:
    file: str
    factory: str = ""
    data: str = "data"
    metric: str = "metric"
    captured: bool = False
    """Whether peers start from tersor's traced graph: torch's exporter freezes a `len(batch)`."""
    peers: tuple[str, ...] = STATIC
    ours: tuple[str, ...] = ("tersor static", "tersor mixed")


NETWORKS = {
    "resnet20": Workload(file="cifar"),
    "resnet56": Workload(file="cifar"),
    "mobilenet_v2": Workload(file="fashion"),
    "vit": Workload(file="fashion", captured=True),
    "lstm": Workload(file="speech", peers=DYNAMIC, ours=("tersor dynamic",)),
    "sentiment": Workload(file="sentiment", factory="transformer"),
    "unet": Workload(file="fashion", data="scenes", metric="mean_iou"),
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What is known of one file on one runtime."""

    samples: np.ndarray
    """Hits (N,), or confusion counts of each sample (N, C, C)."""
    size_bytes: int
    ms: dict[int, np.ndarray] = field(default_factory=dict)
    """Milliseconds by block, for each batch size; all of one group were timed in turns."""
    unshifted: np.ndarray | None = None
    """Samples after the mean shift of the logits from fp32's is taken back."""
    shift: tuple[float, ...] = ()
    divergence: float | None = None
    """Of the outputs from fp32's on the same runtime; None where only torch runs the file."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, for each table cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quantization_peers")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    for name in sorted(set(ENVIRONMENTS.values())):
        make_environment(name)
    from tersor.core.hardware import environment

    pins = [f"environments/{name}.txt" for name in sorted(set(ENVIRONMENTS.values()))]
    about = {
        "command": "python benchmarks/quantization_peers.py",
        "arguments": {"seconds": arguments.seconds, "threads": arguments.threads},
        "environment": environment(),
        "peers": sorted({p for f in pins for p in (HERE / f).read_text("utf-8").split()}),
    }
    asked = arguments.networks.split(",")
    rows, verdicts = kept(arguments.out, about, asked)
    for name in asked:
        made = of_network(name, arguments)
        rows += made[0]
        verdicts += made[1]
        result = {
            **about,
            "results": sorted(rows, key=in_order),
            "verdicts": sorted(verdicts, key=in_order),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(*map(summary, verdicts), sep="\n")
    return 0 if all(v["not_worse"] for v in verdicts) else 1


def kept(
    file: Path, about: Mapping[str, Any], asked: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what a report of the same peers and arguments holds of networks not asked for."""
    if not file.is_file():
        return [], []
    old = json.loads(file.read_text(encoding="utf-8"))
    if any(old.get(key) != about[key] for key in ("arguments", "peers")) or "verdicts" not in old:
        return [], []
    rows, verdicts = (
        [entry for entry in old[key] if entry["network"] not in asked]
        for key in ("results", "verdicts")
    )
    return rows, verdicts


def in_order(entry: Mapping[str, Any]) -> int:
    return list(NETWORKS).index(entry["network"])


def make_environment(name: str) -> None:
    """Install peers apart from tersor's own packages; torch first, as this machine has it."""
    folder = ROOT / ".environments" / name
    if (folder / "installed").exists():
        return
    pins = (HERE / "environments" / f"{name}.txt").read_text(encoding="utf-8").split()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
    for wanted in ([p for p in pins if p.startswith("torch==")], pins):
        if wanted:
            subprocess.run([*pip, *wanted], check=True)
    (folder / "installed").touch()


def of_network(name: str, arguments: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Make the files of a network and measure them; return rows and verdicts."""

    workload = NETWORKS[name]
    module = script(workload.file)
    data = getattr(module, workload.data)()
    metric = getattr(module, workload.metric)
    folder = arguments.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    calibration, test = joined(data["calibration"]), other_half(data["test"])
    np.savez(folder / "calibration.npz", **calibration)
    np.savez(folder / "test.npz", **test)
    order = {
        "workloads": str(SHARED / "workloads"),
        "workload": workload.file,
        "factory": workload.factory or name,
        "inputs": [key for key in calibration if key != "labels"],
        "captured": workload.captured,
        "threads": arguments.threads,
        "seconds": arguments.seconds,
        "beside": ["fp32", *workload.ours],
    }
    (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
    contestants = ["fp32", *workload.peers, *workload.ours]
    costs, failed = {}, {}
    for contestant in contestants:
        reason = job("learn", contestant, folder, arguments.threads) or job(
            "quantize", contestant, folder, arguments.threads
        )
        if reason:
            failed[contestant] = reason
        else:
            file = folder / f"{contestant}.json"
            costs[contestant] = json.loads(file.read_text(encoding="utf-8"))
    add_export(costs)
    groups, broken = measure(contestants, failed, folder, test, metric, arguments)
    rows, verdicts = [], []
    for runtime, group in groups.items():
        for contestant in contestants:
            if (contestant in TORCH) != (runtime not in RUNTIMES):
                continue
            row = {"network": name, "runtime": runtime, "contestant": contestant}
            reason = failed.get(contestant) or broken.get((runtime, contestant))
            row |= {"fails": reason} if reason else figures(contestant, group)
            row["quantize"] = costs.get(contestant)
            rows.append(row)
            print(line(row), flush=True)
        peers = [p for p in workload.peers if p in group]
        for our in workload.ours:
            if our in group and peers:
                found = verdict(our, peers, group, costs)
                verdicts.append({"network": name, "runtime": runtime, **found})
                print(summary(verdicts[-1]), flush=True)
    return rows, verdicts


def joined(batches: Any) -> dict[str, np.ndarray]:
    """Return a split as arrays, samples first."""
    every = list(batches)
    return {key: np.concatenate([b[key].numpy() for b in every]) for key in every[0]}


def other_half(batches: Any) -> dict[str, np.ndarray]:
    """Return the half of the test split that is not set aside for decisions."""
    whole = joined(batches)
    count = len(whole["labels"])
    chosen = np.sort(np.random.default_rng(0).permutation(count)[count // 2 :])
    return {key: array[chosen] for key, array in whole.items()}


def job(verb: str, contestant: str, folder: Path, threads: int) -> str:
    """Run a part of _peers.py in the contestant's environment; return why it failed, or ""."""
    own = ENVIRONMENTS.get(contestant)
    python = str(ROOT / ".environments" / own / "bin" / "python") if own else sys.executable
    setting = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(threads)}
    log = folder / f"{contestant} {verb}.log"
    with log.open("w", encoding="utf-8") as out:
        try:
            code = subprocess.run(
                [python, str(HERE / "_peers.py"), verb, contestant, str(folder)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **setting},
                timeout=TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"took more than {TIMEOUT_S} s"
    if code == 0:
        return ""
    lines = [text for text in log.read_text(encoding="utf-8").splitlines() if text.strip()]
    raised = [text for text in lines if re.match(r"[\w.]+(Error|Exception|Fail)\b", text)]
    return without_paths((raised or lines or [f"exit code {code}"])[-1])


def without_paths(text: str) -> str:
    return re.sub(r"(/[\w.+-]+){2,}", "...", text)[:300]


def add_export(costs: dict[str, Any]) -> None:
    """Add what the fp32 file costs to those that start from it."""
    for contestant, cost in costs.items():
        other = dict(costs["fp32"]) if contestant.startswith(("onnxruntime", "nncf")) else {}
        cost["seconds_with_export"] = cost["seconds"] + other.get("seconds", 0.0)
        cost["cpu_seconds_with_export"] = cost["cpu_seconds"] + other.get("cpu_seconds", 0.0)
        cost["peak_bytes_with_export"] = max(cost["peak_bytes"], other.get("peak_bytes", 0))


def measure(
    contestants: list[str],
    failed: Mapping[str, str],
    folder: Path,
    test: dict[str, np.ndarray],
    metric: Any,
    arguments: argparse.Namespace,
) -> tuple[dict[str, dict[str, Contestant]], dict[tuple[str, str], str]]:
    """Score and time every file on its runtimes; also return who cannot be loaded where, and why.

    A group holds its runtime's contestants, and without times those that only torch runs; the group
    of a runtime of torch holds the files on ONNX Runtime that were timed beside.
    """
    alive = [c for c in contestants if c not in failed]
    groups: dict[str, dict[str, Contestant]] = {}
    broken: dict[tuple[str, str], str] = {}
    for runtime in RUNTIMES:
        files = [c for c in alive if c not in TORCH]
        groups[runtime] = on_runtime(runtime, files, folder, test, metric, broken, arguments)
    for contestant in (c for c in contestants if c in TORCH):
        runtime = TORCH[contestant]
        group = groups.setdefault(runtime, {})
        reason = failed.get(contestant) or job("run_torch", contestant, folder, arguments.threads)
        if reason:
            broken[runtime, contestant] = reason
            continue
        outputs = np.load(folder / f"{contestant}.npy")
        times = json.loads((folder / f"{contestant}.run.json").read_text("utf-8"))["times_ms"]
        samples = scored(outputs, test["labels"], metric)
        size = next(folder.glob(f"{contestant}.pt*")).stat().st_size
        for each in times["1"]:
            ms = {batch: np.array(times[str(batch)][each]) for batch in BATCHES}
            beside = groups["onnxruntime"].get(each)
            group[each] = Contestant(
                samples=beside.samples if beside else samples,
                size_bytes=beside.size_bytes if beside else size,
                ms=ms,
            )
        for other in RUNTIMES:
            groups[other][contestant] = Contestant(samples=samples, size_bytes=size)
    return groups, broken


def on_runtime(
    runtime: str,
    files: list[str],
    folder: Path,
    test: dict[str, np.ndarray],
    metric: Any,
    broken: dict[tuple[str, str], str],
    arguments: argparse.Namespace,
) -> dict[str, Contestant]:
    """Load the ONNX files on a runtime, score and time them."""
    import onnx

    from tersor import benchmark
    from tersor.core import plugins
    from tersor.core.errors import TersorError
    from tersor.core.model import Inputs
    from tersor.core.runtime import Target

    inputs = Inputs(example={})  # not read: the files are ONNX already
    target = Target(runtime=runtime, options={"threads": arguments.threads})
    batches = [
        {k: v[i : i + 128] for k, v in test.items()} for i in range(0, len(test["labels"]), 128)
    ]
    runners, found = {}, {}
    floats = None
    for contestant in files:
        place = folder / f"{runtime} {contestant}"
        place.mkdir(exist_ok=True)
        try:
            model = onnx.load(folder / f"{contestant}.onnx")
            made = plugins.runtime(runtime).export(model, place, inputs)
            runner = plugins.runtime(runtime).load(made[0], target)
            outputs, labels = benchmark.evaluate(runner, batches)
        except (TersorError, RuntimeError) as error:
            broken[runtime, contestant] = without_paths(str(error))
            continue
        assert labels is not None
        runners[contestant] = runner
        floats = outputs if contestant == "fp32" else floats
        moved = np.zeros(()) if floats is None else shift(outputs, floats)
        found[contestant] = Contestant(
            samples=scored(outputs, labels, metric),
            unshifted=scored(outputs - moved, labels, metric),
            shift=tuple(round(float(x), 4) for x in moved.reshape(-1)),
            divergence=None if floats is None else apart(outputs, floats),
            size_bytes=sum(f.stat().st_size for f in made),
        )
    for batch in BATCHES:
        feeds = benchmark.timing_inputs(batches, batch)
        calls = [[runner.bind(feed) for feed in feeds] for runner in runners.values()]
        times = benchmark.interleave(calls, budget_s=arguments.seconds, seed=0)
        for contestant, ms in zip(runners, times, strict=True):
            found[contestant].ms[batch] = ms
    return found


def shift(outputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return how much higher the outputs of each class, dimension 1, are on the mean."""
    others = tuple(axis for axis in range(outputs.ndim) if axis != 1)
    return (outputs - wanted).mean(others, keepdims=True, dtype=np.float64).astype(np.float32)


def apart(outputs: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean divergence (Kullback-Leibler) from the classes' probabilities of fp32."""
    import torch

    from tersor.ops.losses import class_dimension, divergence

    ours, theirs = torch.from_numpy(outputs), torch.from_numpy(wanted)
    return float(divergence(ours, theirs, class_dimension(theirs, None)))


def race(slow: Contestant, fast: Contestant, batch: int) -> dict[str, Any]:
    """Say how many times faster the second is."""
    from tersor.core.statistics import judge

    found = judge(slow.ms[batch], fast.ms[batch])
    return {key: getattr(found, key) for key in ("speedup", "low", "high", "verdict", "blocks")}


def figures(contestant: str, group: dict[str, Contestant]) -> dict[str, Any]:
    """Put together what a row says of a contestant."""
    mine, fp32 = group[contestant], group["fp32"]
    latency = {}
    for batch, ms in mine.ms.items():
        latency[f"batch {batch}"] = {
            "ms": float(np.median(ms)),
            "fp32_ms": float(np.median(fp32.ms[batch])),
            "times_faster_than_fp32": race(fp32, mine, batch),
            "samples_ms": [round(float(x), 5) for x in ms],
        }
    return {
        "metric": "accuracy" if mine.samples.ndim == 1 else "mean IoU",
        "accuracy": value(mine.samples),
        "accuracy_spread": spread(mine.samples),
        "samples": len(mine.samples),
        "accuracy_minus_fp32": minus(fp32.samples, mine.samples),
        "divergence_from_fp32": mine.divergence,
        "shift": mine.shift,
        "minus_fp32_without_shift": (
            None if mine.unshifted is None else minus(fp32.samples, mine.unshifted)
        ),
        "size_bytes": mine.size_bytes,
        "latency": latency,
    }


def verdict(
    our: str, peers: list[str], group: dict[str, Contestant], costs: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare a file of tersor with each peer of a group; see the top of this file."""
    mine = group[our]
    against, noisy, better_ms = {}, [], []
    for peer in peers:
        change = minus(group[peer].samples, mine.samples)
        lost = -change["points"] / 100 * len(mine.samples)
        few = mine.samples.ndim == 1 and lost <= 2 + 1e-6
        against[peer] = {
            "accuracy": change,
            "not_worse": bool(change["points"] >= -0.3 or few),
            "latency": {f"batch {b}": race(group[peer], mine, b) for b in group[peer].ms},
        }
    timed = [peer for peer in peers if group[peer].ms]
    for batch in BATCHES if timed else ():
        best = min(timed, key=lambda peer: float(np.median(group[peer].ms[batch])))
        raced = {peer: against[peer]["latency"][f"batch {batch}"]["verdict"] for peer in timed}
        noisy.append(raced[best] != "slower")
        better_ms.append(all(word == "faster" for word in raced.values()))
    better = all(each["accuracy"]["low"] > 0 for each in against.values())
    faster = any(better_ms) and all(noisy)
    ratios = {}
    for word, others in (("", peers), ("same_runtime_", timed or peers)):
        for kind, key in (("", "seconds_with_export"), ("cpu_", "cpu_seconds_with_export")):
            fastest = min(costs[peer][key] for peer in others)
            ratios[f"{word}{kind}time_ratio"] = costs[our][key] / fastest
    return {
        "contestant": our,
        "peers": against,
        "not_worse": all(each["not_worse"] for each in against.values()),
        "better_in_accuracy": better,
        "better_in_latency": faster,
        "better_than_every_peer": better or faster,
        "latency_within_noise": all(noisy),
        **ratios,
    }


def line(row: dict[str, Any]) -> str:
    """Write a row for people."""
    head = f"{row['network']:13}{row['runtime']:15}{row['contestant']:28}"
    if "fails" in row:
        return f"{head}fails: {row['fails']}"
    cells = [f"{head}{row['accuracy']:6.2f} %"]
    for batch, entry in row["latency"].items():
        fp32 = entry["times_faster_than_fp32"]["speedup"]
        cells.append(f"{batch}: {entry['ms']:.3f} ms x{fp32:.2f}")
    cost = row["quantize"]
    cells += [f"{row['size_bytes'] / 1e3:.0f} kB", f"{cost['seconds_with_export']:.1f} s"]
    return "  ".join([*cells, f"{cost['peak_bytes_with_export'] / 1e6:.0f} MB"])


def summary(found: dict[str, Any]) -> str:
    """Write a verdict for people."""
    points = ", ".join(
        f"{peer} {{points:+.2f}} [{{low:+.2f}}, {{high:+.2f}}]".format(**each["accuracy"])
        for peer, each in found["peers"].items()
    )
    words = [
        "not worse" if found["not_worse"] else "WORSE",
        "better than every peer" if found["better_than_every_peer"] else "not better",
        "latency ok" if found["latency_within_noise"] else "SLOWER",
        f"quantizes in {found['time_ratio']:.2f} x the fastest peer's time, "
        f"{found['same_runtime_time_ratio']:.2f} x that of the fastest on this runtime",
    ]
    return (
        f"{found['network']} {found['runtime']} {found['contestant']}: {'; '.join(words)}; {points}"
    )


if __name__ == "__main__":
    sys.exit(main())
