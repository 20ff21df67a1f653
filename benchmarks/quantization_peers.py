"""`static` beside ONNX Runtime's `quantize_static` and NNCF's `quantize`: accuracy and latency.

    python benchmarks/quantization_peers.py [--networks resnet20,vit] [--seconds 4] [--threads 1]

All three quantize the same fp32 network with the same 1,024 calibration images; the peers do so in
an environment of their own (`.environments/quantization`, made on demand), from the fp32 ONNX file,
with per-channel weights and min-max ranges (ONNX Runtime: U8S8 QDQ; NNCF: its defaults, over all
images). Every file is then loaded, timed (interleaved) and scored here, on the half of the test
split that tersor makes no decisions on. Needs the shared workloads. Writes
benchmarks/results/quantization_peers.json.
"""

import argparse
import copy
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).with_name("results") / "quantization_peers.json"
ENVIRONMENT = ROOT / ".environments" / "quantization"
PINS = Path(__file__).with_name("environments") / "quantization.txt"
SHARED = Path(os.environ.get("TERSOR_SHARED", ROOT.parent / "shared")).resolve()
NETWORKS = {"resnet20": "cifar", "resnet56": "cifar", "mobilenet_v2": "fashion", "vit": "fashion"}
CONTESTANTS = ("fp32", "onnxruntime quantize_static", "nncf quantize", "tersor static")
BATCHES = (1, 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, for each table cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quantization_peers")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        make_peer_files(arguments.peer)
        return 0
    make_environment()
    from tersor.core.hardware import environment

    rows = []
    for name in arguments.networks.split(","):
        rows += network_rows(name, arguments)
        result = {
            "command": "python benchmarks/quantization_peers.py",
            "arguments": {"seconds": arguments.seconds, "threads": arguments.threads},
            "environment": environment(),
            "peers": PINS.read_text(encoding="utf-8").split(),
            "results": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    worse = [r for r in rows if r["contestant"] == "tersor static" and below(r)]
    return 1 if worse else 0


def below(row: dict[str, Any]) -> bool:
    """Tell whether a row misses the aim: 1 point of fp32, 0.3 point of each peer."""
    aims = {"fp32": -1.0, CONTESTANTS[1]: -0.3, CONTESTANTS[2]: -0.3}
    return any(row["accuracy_minus"][name]["points"] < aim for name, aim in aims.items())


def make_environment() -> None:
    """Install the peers apart from tersor's own packages."""
    if not (ENVIRONMENT / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(PINS)]
        subprocess.run(pip, check=True)


def network_rows(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the four files of a network, and measure them on both runtimes."""
    import torch

    from tersor.core.context import Context, Data
    from tersor.core.model import Inputs
    from tersor.core.runtime import Target
    from tersor.ops.capture import capture
    from tersor.ops.lower import lower
    from tersor.quantization.static import Static, static

    torch.set_num_threads(arguments.threads)
    sys.path.insert(0, str(SHARED / "workloads"))
    workload = importlib.import_module(NETWORKS[name])
    data, net = workload.data(), getattr(workload, name)()
    calibration = list(data["calibration"])
    inputs = Inputs(example={"x": calibration[0]["x"][:2]}, dynamic={"x": {0: "batch"}})
    folder = arguments.work / name
    folder.mkdir(parents=True, exist_ok=True)
    lowered = lower(capture(copy.deepcopy(net), inputs), "onnx", inputs)
    (folder / "fp32.onnx").write_bytes(lowered.SerializeToString())
    # Opset 20, the exporter's own default: ONNX Runtime 1.32 refuses NNCF's file of opset 21 for
    # `vit`
    # ("output_dtype INT8 does not match y_zero_point type UINT8", from its own optimizer).
    del lowered.opset_import[:]
    lowered.opset_import.add(domain="", version=20)
    (folder / "opset20.onnx").write_bytes(lowered.SerializeToString())
    np.savez(folder / "calibration.npz", x=np.concatenate([b["x"].numpy() for b in calibration]))
    python = str(ENVIRONMENT / "bin" / "python")
    subprocess.run([python, __file__, "--peer", str(folder)], check=True)
    seconds = json.loads((folder / "peers.json").read_text(encoding="utf-8"))

    def unused(*given: Any, **named: Any) -> Any:
        raise AssertionError("static neither trains nor times")

    context = Context(
        inputs=inputs,
        data=Data(calibration=calibration),
        target=Target(runtime="onnxruntime"),
        loss=unused,
        fit=unused,
        latency=unused,
        work_dir=folder,
    )
    began = time.perf_counter()
    made = lower(static(copy.deepcopy(net), Static(), context), "onnx", inputs)
    seconds["tersor static"] = time.perf_counter() - began
    (folder / "tersor static.onnx").write_bytes(made.SerializeToString(deterministic=True))
    half = other_half(data["test"])
    return [
        row
        for runtime in ("onnxruntime", "openvino")
        for row in runtime_rows(name, runtime, folder, inputs, half, seconds, arguments)
    ]


def other_half(batches: Any) -> list[dict[str, np.ndarray]]:
    """Return the half of the test split that is not set aside for decisions."""
    x = np.concatenate([b["x"].numpy() for b in batches])
    labels = np.concatenate([b["labels"].numpy() for b in batches])
    chosen = np.sort(np.random.default_rng(0).permutation(len(x))[len(x) // 2 :])
    return [
        {"x": x[chosen[i : i + 128]], "labels": labels[chosen[i : i + 128]]}
        for i in range(0, len(chosen), 128)
    ]


def runtime_rows(
    name: str,
    runtime: str,
    folder: Path,
    inputs: Any,
    half: list[dict[str, np.ndarray]],
    seconds: dict[str, float],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Load the four files on one runtime, score and time them."""
    import onnx

    from tersor import benchmark
    from tersor.core import plugins
    from tersor.core.runtime import Target
    from tersor.core.scoring import hits
    from tersor.core.statistics import judge, paired_difference, wilson

    target = Target(runtime=runtime, options={"threads": arguments.threads})
    runners, sizes, right = [], [], {}
    for contestant in CONTESTANTS:
        place = folder / f"{runtime} {contestant}"
        place.mkdir(exist_ok=True)
        model = onnx.load(folder / f"{contestant}.onnx")
        files = plugins.runtime(runtime).export(model, place, inputs)
        sizes.append(sum(f.stat().st_size for f in files))
        runners.append(plugins.runtime(runtime).load(files[0], target))
        outputs, labels = benchmark.evaluate(runners[-1], half)
        assert labels is not None
        right[contestant] = hits(outputs, labels)
    times = {}
    for batch in BATCHES:
        feeds = benchmark.timing_inputs(half, batch)
        calls = [[runner.bind(feed) for feed in feeds] for runner in runners]
        times[batch] = benchmark.interleave(calls, budget_s=arguments.seconds, seed=0)
    rows = []
    for i, contestant in enumerate(CONTESTANTS):
        count = right[contestant].size
        row: dict[str, Any] = {
            "network": name,
            "runtime": runtime,
            "contestant": contestant,
            "accuracy": 100 * float(right[contestant].mean()),
            "accuracy_spread": [100 * x for x in wilson(float(right[contestant].sum()), count)],
            "samples": count,
            "size_bytes": sizes[i],
            "quantize_seconds": seconds.get(contestant),
            "accuracy_minus": {},
            "latency": {},
        }
        for other in CONTESTANTS[:3]:
            points, ends = paired_difference(right[other], right[contestant])
            row["accuracy_minus"][other] = {
                "points": 100 * points,
                "low": 100 * ends[0],
                "high": 100 * ends[1],
            }
        for batch in BATCHES:
            row["latency"][f"batch {batch}"] = {
                "ms": float(np.median(times[batch][i])),
                "times_faster_than": {
                    other: {
                        key: getattr(judge(times[batch][j], times[batch][i]), key)
                        for key in ("speedup", "low", "high", "verdict", "blocks")
                    }
                    for j, other in enumerate(CONTESTANTS[:3])
                },
                "samples_ms": [round(float(x), 5) for x in times[batch][i]],
            }
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Write a row for people."""
    cells = [
        f"{row['network']:13}{row['runtime']:12}{row['contestant']:28}{row['accuracy']:6.2f} %"
    ]
    for batch, entry in row["latency"].items():
        fp32 = entry["times_faster_than"]["fp32"]["speedup"]
        cells.append(f"{batch}: {entry['ms']:.3f} ms x{fp32:.2f}")
    return "  ".join([*cells, f"{row['size_bytes'] / 1e3:.0f} kB"])


def make_peer_files(folder: Path) -> None:
    """Quantize with the peers; runs in their environment, without torch and tersor."""
    import nncf
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with np.load(folder / "calibration.npz") as pack:
        x = pack["x"]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": x[i : i + 128]} for i in range(0, len(x), 128)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    seconds = {}
    began = time.perf_counter()
    quant_pre_process(str(folder / "opset20.onnx"), str(folder / "prepared.onnx"))
    quantize_static(
        str(folder / "prepared.onnx"),
        str(folder / f"{CONTESTANTS[1]}.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    seconds[CONTESTANTS[1]] = time.perf_counter() - began
    began = time.perf_counter()
    images = nncf.Dataset([{"x": x[i : i + 1]} for i in range(len(x))])
    quantized = nncf.quantize(onnx.load(folder / "opset20.onnx"), images, subset_size=len(x))
    onnx.save(quantized, folder / f"{CONTESTANTS[2]}.onnx")
    seconds[CONTESTANTS[2]] = time.perf_counter() - began
    (folder / "peers.json").write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
