"""What benchmarks share that apply techniques one by one: workloads, and a step's context."""

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
SHARED = Path(os.environ.get("TERSOR_SHARED", ROOT.parent / "shared")).resolve()


def workload(file: str) -> Any:
    """Import a user's script of the shared workloads."""
    folder = str(SHARED / "workloads")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(file)


def stored(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a report."""
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return rows


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a report; it is whole, or the one before."""
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


def test_images(count: int) -> tuple[Any, Any]:
    """Return the first test images of CIFAR-10, and their labels."""
    import torch

    images, labels, held = [], [], 0
    for batch in workload("cifar").data()["test"]:
        images.append(batch["x"])
        labels.append(batch["labels"])
        held += len(batch["x"])
        if held >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def ways(batch: dict[str, Any]) -> Any:
    """Return how to call a network: the first samples of a batch, any number of them."""
    from tersor.core.model import Inputs

    example = {name: tensor[:2] for name, tensor in batch.items() if name != "labels"}
    return Inputs(example=example, dynamic={name: {0: "batch"} for name in example})


def context(
    inputs: Any,
    folder: Path,
    *,
    calibration: Any,
    train: Any = None,
    runtime: str = "onnxruntime",
    threads: int = 1,
    reference: Any = None,
) -> Any:
    """Return what a step of the pipeline is given, with tersor's own trainer; nothing is timed."""
    from tersor import trainer
    from tersor.core.context import Context, Data
    from tersor.core.runtime import Target
    from tersor.ops.losses import labelled_loss
    from tersor.ops.sharing import keeping

    def latency(nets: Any) -> Any:
        raise AssertionError("these steps time nothing")

    return Context(
        inputs=inputs,
        data=Data(calibration=calibration, train=train),
        target=Target(runtime=runtime, options={"threads": threads}),
        loss=labelled_loss,
        fit=keeping(functools.partial(trainer.fit, threads=threads)),
        latency=latency,
        work_dir=folder,
        reference=reference,
    )
