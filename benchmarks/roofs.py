"""The roofs that `profile` measures beside other probes, and its operators beside the whole.

    python benchmarks/roofs.py [--rounds 5] [--networks resnet56,...]

Roofs, one thread: matrix products in fp32, bf16 and int8 beside OpenVINO's own benchmark
(`benchmark_app`, latency of the fastest run), and beside oneDNN through PyTorch where it has the
format; bandwidths beside the same addition in C with large pages, compiled for the processor's
narrowest vectors and for its widest, in memory and in the second cache. Probes take turns, and the
best of each counts: other programs only ever slow them. Operators: the sum of their times, and of
what shapes that may change cost between them, beside the latency, for six workloads on ONNX
Runtime and OpenVINO. Needs the shared workloads. Writes benchmarks/results/roofs.json.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _networks import RESULTS, SHARED, write
from handmade import WORKLOADS

SIZE = 512
ADD = r"""
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int count, char **words) {
  size_t bytes = atol(words[1]), n = bytes / 8, passes = (1 << 24) / bytes + 1;
  size_t room = (bytes + (1 << 21)) >> 21 << 21;
  double *array[3], best = 1e9;
  for (int i = 0; i < 3; i++) {
    array[i] = aligned_alloc(1 << 21, room);
    madvise(array[i], room, MADV_HUGEPAGE);
    for (size_t j = 0; j < n; j++) array[i][j] = i;
  }
  for (double until = now() + 0.7; now() < until;) {
    double began = now();
    for (size_t k = 0; k < passes; k++) {
      double *restrict a = array[0], *restrict b = array[1], *restrict c = array[2];
      for (size_t j = 0; j < n; j++) a[j] = b[j] + c[j];
      __asm__ volatile("" ::: "memory");
    }
    double taken = (now() - began) / passes;
    if (taken < best) best = taken;
  }
  printf("%f\n", 3 * 8.0 * n / best / 1e9);
  return array[0][n - 1] < 0;
}
"""
RUNTIMES = ("onnxruntime", "openvino")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", default=",".join(WORKLOADS))
    parser.add_argument("--out", type=Path, default=RESULTS / "roofs.json")
    asked = parser.parse_args()
    from tersor.core.hardware import environment, preflight, probe

    result = {
        "command": "python benchmarks/roofs.py",
        "arguments": {"rounds": asked.rounds, "threads": 1},
        "warnings": list(preflight(probe())),
        "environment": environment(),
        "roofs": roofs(asked.rounds),
        "sums": [],
    }
    write(asked.out, result)
    for name in asked.networks.split(",") if asked.networks else ():
        for runtime in RUNTIMES:
            result["sums"].append(summed(name, runtime))
            print(result["sums"][-1], flush=True)
            write(asked.out, result)
    return 0


def roofs(rounds: int) -> list[dict[str, Any]]:
    """Measure each roof in turns with its probes."""
    from tersor.ops import ceilings

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ceilings.FORMATS:
            file = Path(folder) / f"{kind}.onnx"
            made = ceilings.product("int8" if kind == "int8" else "fp32", SIZE)
            file.write_bytes(made.SerializeToString())
            probes: dict[str, Callable[[], float]] = {
                "tersor": lambda kind=kind: best_of_ours(kind),  # type: ignore[misc]
                "benchmark_app": lambda file=file, kind=kind: benchmark_app(file, kind),  # type: ignore[misc]
            }
            if kind != "int8":
                probes["oneDNN by torch"] = lambda kind=kind: by_torch(kind)  # type: ignore[misc]
            rows.append(turns(kind, "GFLOP/s", probes, rounds))
        (Path(folder) / "add.c").write_text(ADD)
        programs = {"C, SSE2": ["-O3"], "C, widest vectors": ["-O3", "-march=native"]}
        for name, flags in programs.items():
            subprocess.run(["cc", *flags, "add.c", "-o", name], check=True, cwd=folder)
        for place, size in (
            ("memory", ceilings._large_bytes()),
            ("second cache", ceilings._small_bytes()),
        ):
            probes = {
                "tersor": lambda size=size: ceilings.add(size, 1),  # type: ignore[misc]
            }
            for name in programs:
                program = Path(folder) / name
                probes[name] = lambda size=size, program=program: in_c(program, size)  # type: ignore[misc]
            rows.append(turns(place, "GB/s", probes, rounds))
    return rows


def turns(
    what: str, unit: str, probes: dict[str, Callable[[], float]], rounds: int
) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in probes}
    for _ in range(rounds):
        for name, measure in probes.items():
            found[name].append(measure())
    best = {name: max(values) for name, values in found.items()}
    print(what, {name: round(value, 1) for name, value in best.items()}, flush=True)
    return {"roof": what, "unit": unit, "best": best, "rounds": found}


def best_of_ours(kind: str) -> float:
    from tersor.core.errors import TersorError
    from tersor.ops import ceilings

    found = []
    for name in ceilings.RUNTIMES:
        try:
            found.append(ceilings._peak(kind, name, 1))
        except TersorError:
            continue
    return max(found)


def benchmark_app(file: Path, kind: str) -> float:
    """Return GFLOP/s of OpenVINO's own benchmark."""
    app = str(Path(sys.executable).with_name("benchmark_app"))
    words = [app, "-m", str(file), "-d", "CPU", "-hint", "none", "-nstreams", "1", "-nireq", "1"]
    words += ["-nthreads", "1", "-t", "1", "-api", "sync"]
    words += ["-infer_precision", "bf16" if kind == "bf16" else "f32"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    least = re.search(r"Min:\s+([\d.]+) (ms|us)", done.stdout)
    assert least is not None, done.stdout
    seconds = float(least[1]) / {"ms": 1e3, "us": 1e6}[least[2]]
    return float(2 * SIZE**3 / seconds / 1e9)


def by_torch(kind: str) -> float:
    import torch

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    net = torch.nn.Linear(SIZE, SIZE, bias=False).to(dtype)
    x = torch.randn(SIZE, SIZE).to(dtype)
    least = float("inf")
    with torch.inference_mode():
        until = time.perf_counter() + 0.7
        while time.perf_counter() < until:
            began = time.perf_counter()
            net(x)
            least = min(least, time.perf_counter() - began)
    return float(2 * SIZE**3 / least / 1e9)


def in_c(program: Path, size: int) -> float:
    done = subprocess.run([str(program), str(size)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def summed(name: str, runtime: str) -> dict[str, Any]:
    import json

    workload = WORKLOADS[name]
    script = SHARED / "workloads" / f"{workload.file}.py"
    words = [sys.executable, "-m", "tersor", "profile", f"{script}:{workload.factory}"]
    words += [
        "--data",
        f"{script}:{workload.data}",
        "--target",
        runtime,
        "--threads",
        "1",
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["profile"]
    return {
        "network": name,
        "runtime": runtime,
        "latency_ms": found["latency_ms"],
        "operators_ms": found["operators_ms"],
        "free_shapes_ms": found["free_shapes_ms"],
        "operators": len(found["layers"]),
        "between_ms": found["between_ms"],
        "ratio": found["accounted"],
        "agrees": found["agrees"],
        "warnings": found["warnings"],
    }


if __name__ == "__main__":
    sys.exit(main())
