"""What a teacher is worth: students that were taught, beside labels alone; and the trainer itself.

    python benchmarks/distillation.py [--parts choice,teacher,half,sentiment,precision,resume]

- `choice`: settings for the next part, each tried for one epoch with a seed of its own, and judged
  on the half of the test split that decides.
- `teacher`: resnet20 goes on from its weights for one epoch, on labels (`finetune`) and taught by
  resnet56 (`distill_logits` with a teacher), each with the settings that were best for it, or all
  defaults where nothing was tried; same trainer, batches and seeds. Twice: from the weights as they
  were published, which have never seen a JPEG image, and from the workload's own, which have been
  fine-tuned on these very images, so that little is left to learn. The teacher is the workload's.
- `half`: a student of resnet56 with half the channels, taught for one epoch by resnet56; one seed.
- `sentiment`: a student of the sentiment transformer with half its blocks, taught by it; accuracy,
  and the speed of both files on ONNX Runtime, one thread, in turns.
- `precision`: resnet8 for a part of an epoch in float32 and in bfloat16, steps timed in turns, and
  the accuracy both come to.
- `resume`: resnet8, killed in the middle of a training and resumed: sha256 of its weights.

Other settings are the defaults of the package: nothing was chosen, so figures are of the whole test
split. Differences are pooled over seeds and paired over images, as in pruning_peers.py; after a
choice over the images that decided nothing, with the whole split beside them. Each row is stored as
it is measured, so that a run can be stopped and go on. Needs the shared workloads. Writes
benchmarks/results/distillation.json.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import RESULTS, context, stored, ways, workload, write
from safetensors.torch import load_file

from tersor import trainer
from tersor.core.hardware import environment
from tersor.core.plugins import technique_of
from tersor.core.recipe import Recipe
from tersor.core.statistics import judge, mean_interval
from tersor.ops.losses import labelled_loss

WAYS: dict[str, Any] = {"labels": ["finetune"], "distilled": ["distill_logits"]}
RATES = {"published": (0.05, 0.01, 0.005), "fine-tuned": (0.005, 0.002, 0.001)}
"""Learning rates that `choice` tries beside the default (0.02), by the weights to start from."""
TRIED: dict[str, dict[str, list[Any]]] = {
    start: {
        "labels": [WAYS["labels"], *([{"finetune": {"lr": lr}}] for lr in rates)],
        "distilled": [WAYS["distilled"], *([{"distill_logits": {"lr": lr}}] for lr in rates)],
    }
    for start, rates in RATES.items()
}
TRIED["fine-tuned"]["distilled"].append([{"distill_logits": {"lr": 0.005, "hard": 0.0}}])
"""What `choice` tries; of equally good ones the first is taken."""
CHOICE_SEED = 10
HALF: list[Any] = [{"student": {"width": 0.5}}, "distill_logits"]
SENTIMENT: list[Any] = [{"student": {"depth": 0.5}}, "distill_logits"]
BATCHES = (1, 8)
TIMED = 24
"""Steps of each precision that are timed, in turns."""
SHORT = 0.25
"""Of an epoch, where precisions are compared."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", default="0,1,2", help="of the parts teacher and precision")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for a batch size")
    parser.add_argument("--out", type=Path, default=RESULTS / "distillation.json")
    parser.add_argument("--child", type=Path, help="of the part resume: where the checkpoint is")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.child is not None:
        print(short_training(asked.child))
        return 0
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    for part in asked.parts.split(","):
        for key, measure in PARTS[part](seeds, asked.seconds, stored(asked.out)):
            key = {"part": part, **key}
            if any(key.items() <= row.items() for row in stored(asked.out)):
                continue
            began = time.perf_counter()
            row = {**key, **measure(), "seconds": time.perf_counter() - began}
            print(json.dumps({k: v for k, v in row.items() if k != "hits"}), file=sys.stderr)
            store(asked.out, row)
    return 0


Job = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def store(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a report, with what can be said of all of them together."""
    rows = [*stored(file), row]
    order = list(PARTS)
    rows.sort(key=lambda r: (order.index(r["part"]), str(r.get("start")), r["seed"], r["way"]))
    result = {
        "command": "python benchmarks/distillation.py",
        "environment": environment(),
        "settings": {start: used(rows, start) or WAYS for start in TRIED},
        "distilled_minus_labels": {start: pooled(rows, start) for start in TRIED},
        "results": rows,
    }
    write(file, result)


def chosen(rows: list[dict[str, Any]], start: str) -> dict[str, Any] | None:
    """Return for each way the settings that were best on the half that decides; None: not known."""
    made = {}
    for way, tries in TRIED[start].items():
        scores = {
            str(r["settings"]): r["deciding_half"]
            for r in rows
            if r["part"] == "choice" and r["start"] == start and r["way"] == way
        }
        if any(str(settings) not in scores for settings in tries):
            return None
        made[way] = max(tries, key=lambda settings: scores[str(settings)])
    return made


def used(rows: list[dict[str, Any]], start: str) -> dict[str, Any] | None:
    """Return the settings that were chosen, once both ways have run with them."""
    wanted = chosen(rows, start)
    ran = [
        [r["way"], r["settings"]] for r in rows if r["part"] == "teacher" and r["start"] == start
    ]
    ready = wanted is not None and all([way, given] in ran for way, given in wanted.items())
    return wanted if ready else None


def pooled(rows: list[dict[str, Any]], start: str) -> dict[str, Any] | None:
    """Return distilled - labels in points: mean over seeds, interval over images."""
    made = used(rows, start)
    settings = made or WAYS
    found = {
        (r["way"], r["seed"]): r
        for r in rows
        if r["part"] == "teacher" and r["start"] == start and r["settings"] == settings[r["way"]]
    }
    seeds = sorted({s for _, s in found if all((way, s) in found for way in WAYS)})
    if not seeds:
        return None
    each = np.array([unpacked(found["distilled", s]) - unpacked(found["labels", s]) for s in seeds])
    whole = {**difference(each), "images": "all test images"}
    if made is None:
        return {**whole, "seeds": seeds}
    others = each[:, deciding(each.shape[1])[1]]
    images = "the half of the test images that decided nothing"
    return {**difference(others), "images": images, "seeds": seeds, "whole": whole}


def difference(each: np.ndarray) -> dict[str, Any]:
    """Return the mean of differences (seeds, images) in points, and its interval over images."""
    low, high = mean_interval(each.mean(0))
    return {
        "points": 100 * float(each.mean()),
        "low": 100 * low,
        "high": 100 * high,
        "by_seed": [100 * float(x) for x in each.mean(1)],
    }


def deciding(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a split that decide, as compress chooses them, and the others."""
    order = np.random.default_rng(0).permutation(count)
    return order[: count // 2], order[count // 2 :]


def unpacked(row: Mapping[str, Any]) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["hits"]), dtype=np.uint8))
    return bits[: row["samples"]].astype(np.float64)


# --- what is applied, and what it comes to --------------------------------------------------------


def taught(
    net: Any, steps: list[Any], data: Mapping[str, Any], seed: int, teacher: Any
) -> tuple[Any, dict[str, Any]]:
    """Apply the steps of a stage to a copy; return it, and what they told of themselves."""
    (configs,) = Recipe.parse({"steps": [steps], "target": "onnxruntime:cpu"}).stages
    net, facts = copy.deepcopy(net), {}
    for config in configs:
        step = technique_of(config)
        with tempfile.TemporaryDirectory() as folder:
            given = context(
                ways(next(iter(data["calibration"]))),
                Path(folder),
                calibration=data["calibration"],
                train=data["train"],
                reference=teacher,
            )
            given = dataclasses.replace(given, seed=seed)
            torch.manual_seed(seed)
            net = step.apply(net, config, given)
        facts[step.name] = given.facts
    return net, facts


def hits(net: Any, batches: Any) -> np.ndarray:
    """Return for each sample of a split whether the answer is right."""
    from tersor.ops.losses import call

    net.eval()
    with torch.no_grad():
        parts = [call(net, batch).argmax(1) == batch["labels"] for batch in batches]
    return torch.cat(parts).numpy()


def figures(right: np.ndarray) -> dict[str, Any]:
    """Return accuracy in percent, and whether each answer was right."""
    return {
        "accuracy": 100 * float(right.mean()),
        "samples": len(right),
        "hits": np.packbits(right).tobytes().hex(),
    }


def accuracy(net: Any, batches: Any) -> float:
    return 100 * float(hits(net, batches).mean())


# --- parts --------------------------------------------------------------------------------------


def choice_part(seeds: list[int], seconds: float, rows: list[dict[str, Any]]) -> list[Job]:
    del seeds, seconds, rows
    return [
        (
            {"start": start, "way": way, "seed": CHOICE_SEED, "settings": settings},
            functools.partial(tried, start, settings),
        )
        for start, ways_ in TRIED.items()
        for way, each in ways_.items()
        for settings in each
    ]


def student(start: str) -> Any:
    """Return resnet20 with the weights to start from."""
    module = workload("cifar")
    net = module.resnet20()
    if start == "published":
        net.load_state_dict(load_file(module.DATA / "models" / "cifar10_resnet20.safetensors"))
    return net


def tried(start: str, settings: list[Any]) -> dict[str, Any]:
    """Return accuracy in percent on the half that decides; nothing is told of the other."""
    module = workload("cifar")
    data, net = module.data(), student(start)
    made, _ = taught(net, settings, data, CHOICE_SEED, module.resnet56())
    right, before = hits(made, data["test"]), hits(net, data["test"])
    rows, _ = deciding(len(right))
    return {
        "deciding_half": 100 * float(right[rows].mean()),
        "original": 100 * float(before[rows].mean()),
    }


def teacher_part(seeds: list[int], seconds: float, rows: list[dict[str, Any]]) -> list[Job]:
    del seconds
    return [
        (
            {"start": start, "way": way, "seed": seed, "settings": settings[way]},
            functools.partial(cifar_row, start, settings[way], seed),
        )
        for start in TRIED
        for settings in [chosen(rows, start) or WAYS]
        for seed in seeds
        for way in WAYS
    ]


def cifar_row(start: str, settings: list[Any], seed: int) -> dict[str, Any]:
    module = workload("cifar")
    data, net, teacher = module.data(), student(start), module.resnet56()
    made, _ = taught(net, settings, data, seed, teacher)
    return {
        **figures(hits(made, data["test"])),
        "original": accuracy(net, data["test"]),
        "teacher": accuracy(teacher, data["test"]),
    }


def half_part(seeds: list[int], seconds: float, rows: list[dict[str, Any]]) -> list[Job]:
    del seeds, seconds, rows
    return [({"way": "half the channels", "seed": 0}, half_row)]


def half_row() -> dict[str, Any]:
    module = workload("cifar")
    data, net = module.data(), module.resnet56()
    made, facts = taught(net, HALF, data, 0, net)
    counts = [sum(p.numel() for p in each.parameters()) for each in (net, made)]
    told = facts["student"]
    return {
        "settings": HALF,
        "times_fewer_macs": told["macs_before"] / told["macs_after"],
        "times_fewer_parameters": counts[0] / counts[1],
        **figures(hits(made, data["test"])),
        "teacher": accuracy(net, data["test"]),
    }


def sentiment_part(seeds: list[int], seconds: float, rows: list[dict[str, Any]]) -> list[Job]:
    del seeds, rows
    return [({"way": "half the blocks", "seed": 0}, lambda: sentiment_row(seconds))]


def sentiment_row(seconds: float) -> dict[str, Any]:
    from tersor import benchmark
    from tersor.core.runtime import Target
    from tersor.ops.lower import lower
    from tersor.runtimes.onnxruntime import load

    module = workload("sentiment")
    data, net = module.data(), module.transformer()
    made, facts = taught(net, SENTIMENT, data, 0, net)
    inputs = ways(next(iter(data["calibration"])))
    batches = [{name: b[name].numpy() for name in inputs.example} for b in data["calibration"]]
    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        runners = []
        for name, each in (("teacher", net), ("student", made)):
            file = Path(folder) / f"{name}.onnx"
            file.write_bytes(lower(each, "onnx", inputs).SerializeToString(deterministic=True))
            runners.append(load(file, Target(runtime="onnxruntime", options={"threads": 1})))
        for batch in BATCHES:
            feeds = benchmark.timing_inputs(batches, batch)
            calls = [[runner.bind(feed) for feed in feeds] for runner in runners]
            slow, fast = benchmark.interleave(calls, budget_s=seconds, seed=0)
            found = judge(slow, fast)
            keys = ("speedup", "low", "high", "verdict", "blocks", "a_ms", "b_ms")
            speeds[f"batch {batch}"] = {key: getattr(found, key) for key in keys}
    right, wanted = hits(made, data["test"]), hits(net, data["test"])
    return {
        "settings": SENTIMENT,
        "left_out": facts["student"]["left_out"],
        **figures(right),
        "teacher": 100 * float(wanted.mean()),
        "share_of_teacher": float(right.mean() / wanted.mean()),
        "times_faster": speeds,
    }


def precision_part(seeds: list[int], seconds: float, rows: list[dict[str, Any]]) -> list[Job]:
    del seeds, seconds, rows
    return [({"way": "bf16 beside fp32", "seed": 0}, precision_row)]


def precision_row() -> dict[str, Any]:
    """Time steps in turns, then train apart; the same batches in both precisions."""
    module = workload("cifar")
    data = module.data()
    batches = [batch for batch, _ in zip(data["train"], range(2), strict=False)]
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for turn in range(TIMED + 1):
        for precision in sorted(times, reverse=bool(turn % 2)):
            net = module.resnet8()
            began = time.perf_counter()
            trained(net, batches, precision, 1.0)
            if turn:  # the first one warms up
                times[precision].append(time.perf_counter() - began)
    found = judge(np.array(times["fp32"]), np.array(times["bf16"]))
    right = {}
    for precision in times:
        net = module.resnet8()
        trained(net, data["train"], precision, SHORT)
        right[precision] = hits(net, data["test"]).astype(np.float64)
    low, high = mean_interval(right["bf16"] - right["fp32"])
    return {
        "epochs": SHORT,
        "times_faster": {k: getattr(found, k) for k in ("speedup", "low", "high", "blocks")},
        "seconds_by_turn": times,
        "accuracy": {name: 100 * float(each.mean()) for name, each in right.items()},
        "bf16_minus_fp32": {
            "points": 100 * float((right["bf16"] - right["fp32"]).mean()),
            "low": 100 * low,
            "high": 100 * high,
        },
    }


def trained(net: Any, batches: Any, precision: Any, epochs: float) -> None:
    trainer.fit(
        net, labelled_loss, batches=batches, epochs=epochs, precision=precision, threads=1, seed=0
    )


def resume_part(seeds: list[int], seconds: float, rows: list[dict[str, Any]]) -> list[Job]:
    del seeds, seconds, rows
    return [({"way": "killed and resumed", "seed": 0}, resume_row)]


def short_training(checkpoint: Path | None) -> str:
    """Train resnet8 on 24 batches with everything that has a state; return its weights' sha256."""
    module = workload("cifar")
    net, train = module.resnet8(), module.data()["train"]
    net = trainer.fit(
        net,
        labelled_loss,
        batches=train,
        epochs=24 / len(train),
        ema=0.99,
        accumulate=2,
        threads=1,
        checkpoint=None if checkpoint is None else checkpoint / "fit.safetensors",
        checkpoint_every_s=0,
        on_step=lambda step, _: print(f"step {step}", file=sys.stderr, flush=True),
    )
    digest = hashlib.sha256()
    for _, tensor in sorted(net.state_dict().items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def resume_row() -> dict[str, Any]:
    """Kill a training after five of twelve steps, and let a new process go on."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", folder]
        child = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert child.stderr is not None
        for line in child.stderr:
            if line.strip() == "step 5":
                child.send_signal(signal.SIGKILL)
                break
        child.communicate()
        again = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = [line for line in again.stderr.splitlines() if line.startswith("step ")]
    whole, resumed = short_training(None), again.stdout.strip()
    return {
        "killed_after": 5,
        "steps_when_resumed": len(steps),
        "sha256": {"never stopped": whole, "resumed": resumed},
        "identical": whole == resumed,
    }


PARTS: dict[str, Callable[[list[int], float, list[dict[str, Any]]], list[Job]]] = {
    "choice": choice_part,
    "teacher": teacher_part,
    "half": half_part,
    "sentiment": sentiment_part,
    "precision": precision_part,
    "resume": resume_part,
}


if __name__ == "__main__":
    sys.exit(main())
