"""Sparse execution beside the best dense path: a network of linear layers, gpt, and where it pays.

    python benchmarks/sparse.py [--parts mlp,gpt,break_even,candidates]

mlp: four linear layers of 1024, batch 8, magnitudes below a percentile set to zero, run through
`compress` with the step sparse_execution, against ONNX Runtime's fp32 of the same network,
interleaved. gpt: the same with 90 % zeros in the feed-forward layers, 60 % in the attention's;
needs the shared workloads. break_even: what `tersor profile --sparsity` measures, at batch 1, 8
and 32. candidates: other ways to execute one layer. Writes benchmarks/results/sparse.json.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import RESULTS, ways, workload
from torch import nn

from tersor import benchmark, profiler
from tersor.candidate import arrays_of
from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.context import Data
from tersor.core.goal import Goal
from tersor.core.hardware import environment, preflight, probe
from tersor.core.model import Model
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.core.schema import to_plain
from tersor.core.statistics import judge
from tersor.ops.lower import lower
from tersor.ops.sparse import sparse
from tersor.pipeline import compress
from tersor.pruning.sparse_execution import SparseExecution

RUNTIMES = ("torch_eager", "torch_export")
WIDTH, BATCH = 1024, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    result = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    for part in asked.parts.split(","):
        warnings = preflight(probe())
        made = PARTS[part](asked.threads)
        result = {
            "schema": 1,
            "command": "python benchmarks/sparse.py",
            **{key: value for key, value in result.items() if key in PARTS},
            part: {"rows": to_plain(made), "warnings": list(warnings)},
            "environment": environment(),
        }
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def mlp(threads: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1]).eval()
    batches = [{"input": torch.randn(BATCH, WIDTH)} for _ in range(32)]
    rows = []
    for zeros in (50, 90, 95):
        pruned = prune(net, lambda name, zeros=zeros: zeros)
        for runtime in RUNTIMES:
            row = raced(pruned, batches, runtime, threads)
            rows.append({"zeros": f"{zeros} %", **row})
            tell("mlp", rows[-1])
    return rows


def gpt(threads: int) -> list[dict[str, Any]]:
    module = workload("language")
    data = module.data()
    wanted = {"feed_forward": 90, "attention": 60}
    pruned = prune(
        module.gpt(), lambda name: next((z for word, z in wanted.items() if word in name), 0)
    )
    batches = [{"tokens": b["tokens"]} for b in list(data["calibration"])[:16]]
    rows = []
    for runtime in RUNTIMES:
        row = raced(pruned, batches, runtime, threads)
        rows.append({"zeros": "feed-forward 90 %, attention 60 %", **row})
        tell("gpt", rows[-1])
    return rows


def break_even(threads: int) -> list[profiler.Sparsity]:
    found = (profiler.sparsity(batch=batch, threads=threads) for batch in (1, BATCH, 32))
    return [replace(each, environment={}) for each in found]  # it is in the report once


def prune(net: nn.Module, percent: Callable[[str], int]) -> nn.Module:
    """Set the smallest weights of each linear layer to zero; nothing is trained afterwards."""
    made = copy.deepcopy(net)
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.data
            count = round(percent(name) / 100 * weight.numel())
            weight.view(-1)[weight.abs().flatten().argsort()[:count]] = 0
    return made


def raced(
    net: nn.Module, batches: list[dict[str, Any]], runtime: str, threads: int
) -> dict[str, Any]:
    """Compress for latency on a runtime; race what came out against ONNX Runtime's dense fp32."""
    options = {"threads": threads}
    recipe = Recipe(
        stages=((SparseExecution(),),),
        target=Target(runtime=runtime, options=options),
        goal=Goal(best="latency"),
    )
    inputs, batch = ways(batches[0]), len(next(iter(batches[0].values())))
    data = Data(calibration=batches, validation=batches, test=batches)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        model = Model(net=net, form="module", origin="benchmark", inputs=inputs)
        artifact = compress(model, recipe, data=data, out=out, metrics=("latency",), batch=batch)
        dense = plugins.runtime("onnxruntime")
        (Path(folder) / "dense").mkdir()
        files = dense.export(lower(net, "onnx", inputs), Path(folder) / "dense", inputs)
        rival = dense.load(files[0], Target(runtime="onnxruntime", options=options))
        ours = Artifact.open(out).load()
        timed = benchmark.timing_inputs(batches, batch)
        found = benchmark.contest(rival, ours, timed, budget_s=12.0)
        sample = arrays_of(batches[0], list(inputs.example))
        wanted, made = (next(iter(r.bind(sample)().values())) for r in (rival, ours))
        rival.close()
        ours.close()
    stage = artifact.report.stages[0]
    facts: Mapping[str, Any] = stage.facts.get("sparse_execution", {})
    return {
        "runtime": runtime,
        "batch": batch,
        "threads": threads,
        "verdict": stage.verdict,
        "reason": stage.reason,
        "layers": facts.get("layers", {}),
        "dense": facts.get("dense", {}),
        "difference": float(np.abs(wanted - made).max() / np.abs(wanted).max()),
        "comparison": {**to_plain(found), "samples": {}},
    }


def tell(network: str, row: Mapping[str, Any]) -> None:
    c = row["comparison"]
    print(
        f"{network} {row['zeros']} {row['runtime']}: {c['speedup']:.2f}x "
        f"[{c['low']:.2f}, {c['high']:.2f}] of ONNX Runtime's {c['a_ms']:.3f} ms; "
        f"{row['verdict']}: {row['reason']}",
        file=sys.stderr,
    )


def candidates(threads: int) -> list[dict[str, Any]]:
    """Race every other way to execute a layer of 1024 by 1024 against ONNX Runtime's dense one."""
    rows = []
    for zeros in (90, 95):
        torch.manual_seed(0)
        layer = prune(nn.Linear(WIDTH, WIDTH, bias=False).eval(), lambda _, zeros=zeros: zeros)
        x = torch.randn(BATCH, WIDTH)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            calls = executed(layer, x, zeros, Path(folder), threads)
            times = benchmark.interleave([[call] for call in calls.values()], budget_s=12.0)
        for way, ms in zip(calls, times, strict=True):
            found = judge(times[0], ms)
            ratio = {"times": found.speedup, "low": found.low, "high": found.high}
            rows.append({"zeros": zeros, "way": way, "ms": found.b_ms, **ratio})
            print(rows[-1], file=sys.stderr)
    return rows


def executed(
    layer: Any, x: torch.Tensor, zeros: int, folder: Path, threads: int
) -> dict[str, Callable[[], Any]]:
    """Bind one input to each way; the first is what to beat."""
    import onnxruntime
    import openvino
    from onnx import helper

    inputs = ways({"input": x})
    onnx_file = plugins.runtime("onnxruntime").export(lower(layer, "onnx", inputs), folder, inputs)[
        0
    ]
    target = Target(runtime="onnxruntime", options={"threads": threads})
    dense = plugins.runtime("onnxruntime").load(onnx_file, target)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    requests = []
    for more in ({}, {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}):
        compiled = openvino.Core().compile_model(str(onnx_file), "CPU", {**settings, **more})
        request = compiled.create_infer_request()
        request.set_tensor(compiled.inputs[0], openvino.Tensor(x.numpy(), shared_memory=True))
        requests.append(request)

    weight, columns = layer.weight.detach(), x.T.contiguous()
    rows = weight.to_sparse_csr()
    blocks = (torch.rand(WIDTH // 4, WIDTH // 4) >= zeros / 100).float()
    blocks = (torch.randn(WIDTH, WIDTH) * torch.kron(blocks, torch.ones(4, 4))).to_sparse_bsr(
        (4, 4)
    )
    node = helper.make_node("SparseToDenseMatMul", ["a", "b"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "product",
        [
            helper.make_sparse_tensor_value_info("a", 1, [WIDTH, WIDTH]),
            helper.make_tensor_value_info("b", 1, [WIDTH, BATCH]),
        ],
        [helper.make_tensor_value_info("y", 1, [WIDTH, BATCH])],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    held = onnxruntime.SparseTensor.sparse_csr_from_numpy(
        np.array([WIDTH, WIDTH], np.int64),
        rows.values().numpy(),
        rows.col_indices().numpy(),
        rows.crow_indices().numpy(),
        onnxruntime.OrtDevice.make("cpu", 0),
    )
    feeds = {
        "a": onnxruntime.OrtValue.ort_value_from_sparse_tensor(held),
        "b": onnxruntime.OrtValue.ortvalue_from_numpy(columns.numpy(), "cpu"),
    }
    ours = sparse(layer)
    return {
        "ONNX Runtime, dense": dense.bind({"input": x.numpy()}),
        "our kernel": lambda: ours(x),
        "PyTorch, compressed rows": lambda: rows @ columns,
        "PyTorch, blocks of 4 by 4": lambda: blocks @ columns,
        "ONNX Runtime, SparseToDenseMatMul": lambda: session.run_with_ort_values(["y"], feeds),
        "OpenVINO, dense": requests[0].infer,
        "OpenVINO, sparse weight decompression": requests[1].infer,
    }


PARTS: dict[str, Callable[[int], Any]] = {
    "mlp": mlp,
    "gpt": gpt,
    "break_even": break_even,
    "candidates": candidates,
}

if __name__ == "__main__":
    sys.exit(main())
