"""What the contestants of quantization_peers.py do, each in a process of its own.

    python benchmarks/_peers.py learn CONTESTANT FOLDER
    python benchmarks/_peers.py quantize CONTESTANT FOLDER
    python benchmarks/_peers.py run_torch CONTESTANT FOLDER

FOLDER holds order.json (workload, factory, input names, threads, seconds), calibration.npz and
test.npz. `quantize` writes CONTESTANT.onnx (or .pt2, .pt) and CONTESTANT.json: seconds and memory
of making it. `run_torch` loads a file that only torch can run, writes its outputs on the test
samples, and times it in turns with the ONNX files of FOLDER on ONNX Runtime, in one process.

A job has two parts. Its preparation, untimed, imports the packages that a user's script would
import and puts the float network and the batches into memory. The function that it returns is
timed: from there to the saved file. What it imports by itself is not within it: a first process
does the same to learn which modules those are (`learn`), and the timed one has imported them.
"""

import contextlib
import copy
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _networks import context, ways

from tersor.metrics import _child

Job = Callable[[Path], None]
Order = Mapping[str, Any]
CALIBRATION_BATCH, BATCHES = 128, (1, 8)


def main() -> None:
    verb, contestant, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: order["threads"]])
    if verb == "run_torch":
        run_torch(contestant, folder, order)
        return
    prepare, suffix = JOBS[contestant]
    run = prepare(folder, order)
    known, learned = set(sys.modules), folder / f"{contestant}.imports.json"
    if verb == "learn":
        run(folder / f"{contestant}{suffix}")
        learned.write_text(json.dumps([name for name in sys.modules if name not in known]))
        return
    for module in json.loads(learned.read_text(encoding="utf-8")):
        with contextlib.suppress(Exception):  # some are made at run time, not imported
            importlib.import_module(module)
    gc.collect()
    before = _child._start()
    began, used = time.perf_counter(), time.process_time()
    run(folder / f"{contestant}{suffix}")
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    answer = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    answer |= {"before_bytes": before, "peak_bytes": _child._peak()}
    (folder / f"{contestant}.json").write_text(json.dumps(answer), encoding="utf-8")


def arrays(folder: Path, split: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{split}.npz") as pack:
        return {name: pack[name] for name in pack.files}


def batches(whole: Mapping[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """Cut the samples of a split into batches."""
    count = len(next(iter(whole.values())))
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, count, size)]


def inputs_of(folder: Path, order: Order, size: int) -> list[dict[str, np.ndarray]]:
    """Return the calibration batches, without labels."""
    whole = arrays(folder, "calibration")
    return batches({name: whole[name] for name in order["inputs"]}, size)


def network(order: Order) -> Any:
    import torch

    torch.set_num_threads(order["threads"])
    sys.path.insert(0, order["workloads"])
    return getattr(importlib.import_module(order["workload"]), order["factory"])()


def exportable_network(order: Order, example: Mapping[str, Any]) -> Any:
    """Return the network, or where torch.export would freeze its batch size a traced graph."""
    net = network(order)
    if not order["captured"]:
        return net
    from tersor.ops.capture import capture

    return capture(net, ways(dict(example)))


def tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in batch.items()}


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Turn off the fused path of nn.TransformerEncoder, which no exporter translates."""
    import torch

    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield


def export(folder: Path, order: Order) -> Job:
    """Write the fp32 ONNX file that the peers start from, as torch's own exporter does."""
    import torch

    example = tensors(inputs_of(folder, order, 2)[0])
    net = exportable_network(order, example)

    def run(file: Path) -> None:
        shapes = {name: {0: torch.export.Dim("batch", max=65536)} for name in example}
        with exportable():
            torch.onnx.export(
                net,
                (),
                str(file),
                kwargs=example,
                dynamo=True,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )

    return run


def tersor(*techniques: str) -> Callable[[Path, Order], Job]:
    """Apply a stage of tersor, each technique with its defaults, and lower to ONNX."""

    def prepare(folder: Path, order: Order) -> Job:
        from tersor.core import plugins
        from tersor.ops.lower import lower

        steps = [plugins.technique(name) for name in techniques]
        net = network(order)
        calibration = [
            tensors(b) for b in batches(arrays(folder, "calibration"), CALIBRATION_BATCH)
        ]
        inputs = ways(calibration[0])
        given = context(
            inputs,
            folder,
            calibration=calibration,
            threads=order["threads"],
            # the pipeline keeps the original, too; not within the timed span, as for the peers
            reference=copy.deepcopy(net),
        )

        def run(file: Path) -> None:
            made = net
            for step in steps:
                made = step.apply(made, step.config(), given)
            proto = lower(made, "onnx", inputs)
            file.write_bytes(proto.SerializeToString(deterministic=True))

        return run

    return prepare


def quantize_static(folder: Path, order: Order) -> Job:
    """ONNX Runtime, from the fp32 file: U8S8 QDQ, per channel, ranges by min-max."""
    import onnxruntime.quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = inputs_of(folder, order, CALIBRATION_BATCH)

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    def run(file: Path) -> None:
        quant_pre_process(str(folder / "fp32.onnx"), str(folder / "prepared.onnx"))
        ort.quantize_static(
            str(folder / "prepared.onnx"),
            str(file),
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod.MinMax,
        )

    return run


def quantize_dynamic(folder: Path, order: Order) -> Job:
    """ONNX Runtime, from the fp32 file: int8 weights per channel; activations on the fly."""
    del order
    import onnxruntime.quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def run(file: Path) -> None:
        quant_pre_process(str(folder / "fp32.onnx"), str(folder / "prepared.onnx"))
        ort.quantize_dynamic(str(folder / "prepared.onnx"), str(file), per_channel=True)

    return run


def nncf_quantize(folder: Path, order: Order) -> Job:
    """NNCF, from the fp32 file: its defaults, over all calibration samples one by one."""
    import nncf
    import onnx

    feeds = inputs_of(folder, order, 1)

    def run(file: Path) -> None:
        net = onnx.load(folder / "fp32.onnx")
        onnx.save(nncf.quantize(net, nncf.Dataset(feeds), subset_size=len(feeds)), file)

    return run


def torchao_pt2e(folder: Path, order: Order) -> Job:
    """Quantize with torchao's PT2E, X86InductorQuantizer with its default configuration."""
    import torch
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    calibration = [tensors(b) for b in inputs_of(folder, order, CALIBRATION_BATCH)]
    example = {name: tensor[:2] for name, tensor in calibration[0].items()}
    net = exportable_network(order, example)
    shapes = {name: {0: torch.export.Dim("batch", max=65536)} for name in example}

    def run(file: Path) -> None:
        with exportable():
            captured = torch.export.export(net, (), kwargs=example, dynamic_shapes=shapes)
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
            prepared = prepare_pt2e(captured.module(), quantizer)
            for batch in calibration:
                prepared(**batch)
            converted = convert_pt2e(prepared)
            program = torch.export.export(converted, (), kwargs=example, dynamic_shapes=shapes)
            torch.export.save(program, file)

    return run


def torch_dynamic(folder: Path, order: Order) -> Job:
    """Torch's eager dynamic quantization of recurrent and linear layers."""
    del folder
    import torch
    from torch.ao.quantization import quantize_dynamic

    net = network(order)

    def run(file: Path) -> None:
        layers = {torch.nn.LSTM, torch.nn.Linear}
        torch.save(quantize_dynamic(net, layers, dtype=torch.qint8), file)

    return run


def run_torch(contestant: str, folder: Path, order: Order) -> None:
    """Load a file of torch; write its outputs, and times beside ONNX files on ONNX Runtime.

    A graph of torch.export is compiled by Inductor with constants folded ("freezing"), for each
    batch size apart, which is its fastest way; Inductor's C++ wrapper was tried and was slower.
    Samples are scored in batches of 8, the last one filled up.
    """
    import torch

    from tersor.core.runtime import Target
    from tersor.core.timing import interleave
    from tersor.feeds import timing_inputs
    from tersor.runtimes.onnxruntime import load

    torch.set_num_threads(order["threads"])
    sys.path.insert(0, order["workloads"])
    file = folder / f"{contestant}{JOBS[contestant][1]}"
    if file.suffix == ".pt2":
        import torch._inductor.config
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  # fusions

        torch._inductor.config.freezing = True
        run = torch.compile(torch.export.load(file).module(), dynamic=False)
    else:
        run = torch.load(file, weights_only=False)
    test = {name: arrays(folder, "test")[name] for name in order["inputs"]}
    target = Target(runtime="onnxruntime", options={"threads": order["threads"]})
    others = [name for name in order["beside"] if (folder / f"{name}.onnx").exists()]
    runners = [load(folder / f"{name}.onnx", target) for name in others]
    outputs = []
    found: dict[str, Any] = {"times_ms": {}}
    began = time.perf_counter()
    with torch.no_grad():
        for batch in batches(test, max(BATCHES)):
            rows = len(next(iter(batch.values())))
            full = {k: np.resize(v, (max(BATCHES), *v.shape[1:])) for k, v in batch.items()}
            outputs.append(run(**tensors(full)).numpy()[:rows])
            if len(outputs) == 1:
                found["compile_seconds"] = time.perf_counter() - began
        np.save(folder / f"{contestant}.npy", np.concatenate(outputs))
        for size in BATCHES:
            feeds = timing_inputs([test], size)
            calls = [[runner.bind(feed) for feed in feeds] for runner in runners]
            calls.append([bound(run, tensors(feed)) for feed in feeds])
            calls[-1][0]()  # compiles
            made = interleave(calls, budget_s=order["seconds"], seed=0)
            found["times_ms"][size] = {
                name: times.tolist()
                for name, times in zip([*others, contestant], made, strict=True)
            }
    (folder / f"{contestant}.run.json").write_text(json.dumps(found), encoding="utf-8")


def bound(run: Callable[..., Any], feed: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: run(**feed)


JOBS: dict[str, tuple[Callable[[Path, Order], Job], str]] = {
    "fp32": (export, ".onnx"),
    "onnxruntime quantize_static": (quantize_static, ".onnx"),
    "onnxruntime quantize_dynamic": (quantize_dynamic, ".onnx"),
    "nncf quantize": (nncf_quantize, ".onnx"),
    "torchao pt2e": (torchao_pt2e, ".pt2"),
    "torch quantize_dynamic": (torch_dynamic, ".pt"),
    "tersor static": (tersor("static"), ".onnx"),
    "tersor dynamic": (tersor("dynamic"), ".onnx"),
    "tersor mixed": (tersor("mixed_precision", "bias_correction"), ".onnx"),
}
"""How to make each, and the ending of its file."""


if __name__ == "__main__":
    main()
