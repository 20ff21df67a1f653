"""Which networks structured pruning can halve: tersor's `channels` beside Torch-Pruning.

    python benchmarks/pruning_coverage.py [--quick] [--only NAME,...] [--again tersor] [--seconds 3]

Every image classification family of torchvision and families of timm (random weights), the
workloads, MiniLM through transformers, and a Llama-style block with grouped queries (`_zoo.py`).
tersor removes half of the channels of each group (`channels: {ratio: 0.5, multiple: 1}`);
Torch-Pruning does as its examples do (`BasePruner`, group magnitude, `pruning_ratio=0.5`, the
classifier ignored, heads of attention told to it and set afterwards). Each network runs in a
process of its own, limited in time and memory, so that a crash or a hang is a row, too; what is
stored already is not run again, but for the contestants of `--again`. `--quick` times nothing.

A row of a contestant tells:

- `parameters_left`, `macs_left`, `channels_left`: shares of the original's; channels are the output
  channels of all layers but the classifier.
- `halved`: the pruned network runs, and at least 45 % of the channels went.
- `exact`: it computes what the original computes without what was removed (`_pruners.py` checks
  that from the weights alone, the same way for both).
- `runs`: at batch 3 and at batch 1, though it was pruned with another.
- `exports`: ONNX Runtime computes the same outputs (within 1 %) at another batch size than the
  export's.
- `faster`: than the original, batch 1, one thread, timed in turns.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _networks import RESULTS, ROOT, SHARED
from quantization_peers import make_environment

HERE = Path(__file__).parent
RESULT = RESULTS / "pruning_coverage.json"
CONTESTANTS = ("original", "tersor", "torch-pruning")
TIMEOUT_S = 300
"""Of processor time; of the clock, six times as long."""
MEMORY_BYTES = 12 * 2**30
"""Of address space, which no network of the list needs two thirds of."""
HALVED = 0.55


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="time nothing")
    parser.add_argument("--only", default="", help="names, or beginnings of them")
    parser.add_argument("--again", default="", help="contestants to run again, or all")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each network")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pruning_coverage")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    make_environment("pruning")
    asked = tuple(arguments.only.split(","))
    names = [name for name in names_of_zoo() if name.startswith(asked)]
    rows = stored(arguments.out)
    again = set(CONTESTANTS if arguments.again == "all" else arguments.again.split(",")) - {""}
    for name in names:
        done = rows.get(name, {})
        timing = not arguments.quick and not (done.get("latency") or {}).get("ms")
        if done and not again and not timing:
            continue
        folder = arguments.work / name.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for contestant in CONTESTANTS:
            if contestant in again or (timing and not (folder / "original.onnx").exists()):
                for file in folder.glob(f"{contestant}.*"):
                    file.unlink()
        done = {c: run(name, folder, c) for c in CONTESTANTS}
        latency = None if arguments.quick else timed(name, folder, arguments.seconds)
        rows[name] = {**figures(done), "latency": latency}
        print(line(name, rows[name]), flush=True)
        write(arguments.out, rows)
    print(json.dumps(summary(rows), indent=1))
    return 0


def python() -> str:
    return str(ROOT / ".environments" / "pruning" / "bin" / "python")


def environment_of(threads: int = 1) -> dict[str, str]:
    setting = {
        "PYTHONPATH": str(ROOT / "src"),
        "TERSOR_SHARED": str(SHARED),
        "HF_HUB_OFFLINE": "1",
        "TIMM_FUSED_ATTN": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    return {**os.environ, **setting}


def names_of_zoo() -> list[str]:
    told = "import _zoo; print('\\n'.join(_zoo.entries()))"
    found = subprocess.run(
        [python(), "-c", told],
        cwd=HERE,
        env=environment_of(),
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split()


def stored(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text("utf-8"))["networks"]) if file.is_file() else {}


def child(arguments: list[str]) -> str:
    """Run a part of _pruners.py; return why it failed, or ""."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT_S, TIMEOUT_S))

    try:
        done = subprocess.run(
            [python(), str(HERE / "_pruners.py"), *arguments],
            env=environment_of(),
            capture_output=True,
            text=True,
            timeout=6 * TIMEOUT_S,
            preexec_fn=limit,  # no threads here
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {6 * TIMEOUT_S} s"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return "" if done.returncode == 0 else f"exit code {done.returncode}: {last[:300]}"


def run(name: str, folder: Path, contestant: str) -> dict[str, Any]:
    """Return what a contestant makes of a network; the first that is asked for runs all."""
    file = folder / f"{contestant}.json"
    if not file.exists():
        left = [c for c in CONTESTANTS if not (folder / f"{c}.json").exists()]
        reason = child([name, str(folder), *left])
        if not file.exists():
            file.write_text(json.dumps({"fails": "process", "message": reason}), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def timed(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    os.environ["SECONDS_OF_TIMING"] = str(seconds)
    file = folder / "time.json"
    file.unlink(missing_ok=True)
    reason = child([name, str(folder), "time"])
    found = {"fails": reason} if reason else json.loads(file.read_text("utf-8"))
    for written in folder.glob("*.onnx"):  # gigabytes, together
        written.unlink()
    return found


def figures(done: Mapping[str, Any]) -> dict[str, Any]:
    """Add shares of the original, and the first verdict."""
    made = {}
    for contestant, row in done.items():
        row = dict(row)
        base = done["original"]
        for what in ("parameters", "macs", "channels"):
            if what in row and base.get(what) and contestant != "original":
                row[f"{what}_left"] = round(row[what] / base[what], 4)
        if contestant != "original":
            row["halved"] = bool(row.get("runs")) and row.get("channels_left", 1) <= HALVED
        made[contestant] = row
    return made


def write(file: Path, rows: Mapping[str, Any]) -> None:
    about = {
        "command": "python benchmarks/pruning_coverage.py",
        "peers": (HERE / "environments" / "pruning.txt").read_text("utf-8").split(),
        "summary": summary(rows),
        "networks": rows,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def summary(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Count networks by what holds of them, for each contestant."""
    counts: dict[str, Any] = {"networks": len(rows)}
    for contestant in CONTESTANTS[1:]:
        mine = [row[contestant] for row in rows.values()]
        faster = [
            (row["latency"] or {}).get(f"{contestant} to original", {}).get("verdict") == "faster"
            for row in rows.values()
        ]
        whole = [bool(m.get("halved") and m.get("exact") and m.get("exports")) for m in mine]
        counts[contestant] = {
            "something went": sum(bool(m.get("runs")) for m in mine),
            "a quarter of the channels went": sum(m.get("channels_left", 1) <= 0.75 for m in mine),
            "halved": sum(bool(m.get("halved")) for m in mine),
            "exact": sum(bool(m.get("exact")) for m in mine),
            "exports": sum(bool(m.get("exports")) for m in mine),
            "halved, exact and exports": sum(whole),
            "faster": sum(faster),
            "all": sum(a and b for a, b in zip(whole, faster, strict=True)),
        }
    return counts


def line(name: str, row: Mapping[str, Any]) -> str:
    cells = [f"{name:34}"]
    for contestant in CONTESTANTS[1:]:
        mine = row[contestant]
        if "fails" in mine:
            cells.append(f"{contestant}: {mine['fails']} {mine['message'][:150]}")
            continue
        cells.append(
            f"{contestant}: channels {mine['channels_left']:.2f} parameters "
            f"{mine['parameters_left']:.2f} macs {mine['macs_left']:.2f} "
            f"{'exact' if mine.get('exact') else 'NOT exact'} "
            f"{'exports' if mine.get('exports') else 'NO export'}"
        )
    return "  ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
