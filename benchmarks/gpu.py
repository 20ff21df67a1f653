"""One network on an NVIDIA GPU: every way we have to run it there, timed in turns.

    python benchmarks/gpu.py [--networks resnet56,vit] [--batches 1,64] [--budget 4]

resnet56 (CIFAR-10, trained; needs the shared workloads) and a network of ViT-B/16's shapes with
random weights. Each way is exported by tersor, loaded and timed with the others in turns, copying
outputs to the host included; its outputs are compared with PyTorch's on the CPU in fp32. A way
that fails has a row with the reason. Writes benchmarks/results/gpu.json.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _networks import RESULTS, test_images, workload, write
from torch import Tensor, nn

FP16: dict[str, Any] = {"precision": "fp16"}
GRAPHS: dict[str, Any] = {"cuda_graphs": True}
FAST: dict[str, Any] = {"channels_last": True, "cudnn_autotune": True}
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("torch_eager", {}),
    ("torch_eager", GRAPHS),
    ("torch_eager", FP16),
    ("torch_eager", {**FP16, **GRAPHS}),
    ("torch_eager", {**FP16, **FAST}),
    ("torch_eager", {**FP16, **FAST, **GRAPHS}),
    ("torch_eager", {"stream": True}),
    ("torch_export", {**FP16, **GRAPHS}),
    ("torchscript", {**FP16, **GRAPHS}),
    ("onnxruntime", {}),
    ("onnxruntime", GRAPHS),
    ("onnxruntime", FP16),
    ("onnxruntime", {**FP16, **GRAPHS}),
    ("onnxruntime", {"precision": "bf16"}),
    ("tensorrt", FP16),
)
CHECKED = 256
"""Samples that outputs are compared on."""


class Block(nn.Module):
    """A layer of a vision transformer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """ViT-B/16's shapes: 224x224 in patches of 16, 12 layers of width 768 and 12 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.position = nn.Parameter(0.02 * torch.randn(1, 196, 768))
        self.blocks = nn.Sequential(*(Block(768, 12) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default="resnet56,vit")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing a batch size")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    asked = parser.parse_args()
    from tersor.core.hardware import environment

    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu.py",
        "arguments": {"batches": asked.batches, "budget": asked.budget},
        "environment": {**environment(), "gpu": gpu()},
        "results": rows,
    }
    for name in asked.networks.split(","):
        net, images, labels = subject(name)
        for batch in map(int, asked.batches.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                for row in timed(net, images, labels, batch, asked, Path(folder)):
                    rows.append({"network": name, "batch": batch, **row})
                    print(rows[-1], flush=True)
            write(asked.out, result)
    return 0


def gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "memory": about.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def subject(name: str) -> tuple[nn.Module, Tensor, np.ndarray | None]:
    """Return a network, images, and their labels where it was trained."""
    torch.manual_seed(0)
    if name == "vit":
        return ViT().eval(), torch.randn(64, 3, 224, 224), None
    images, labels = test_images(CHECKED)
    net: nn.Module = getattr(workload("cifar"), name)().eval()
    return net, images, labels.numpy()


def timed(
    net: nn.Module,
    images: Tensor,
    labels: np.ndarray | None,
    batch: int,
    asked: Any,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Run every way; time those that run in turns."""
    from tersor.core.statistics import log_ratio_interval
    from tersor.core.timing import interleave

    with torch.no_grad():
        expected = torch.cat([net(part) for part in images.split(64)]).numpy()
    feeds = [{"x": part.numpy()} for part in images.split(batch) if len(part) == batch][:16]
    running: list[tuple[dict[str, Any], Any, Any]] = []
    for number, (runtime, options) in enumerate(WAYS):
        row: dict[str, Any] = {"runtime": runtime, "options": options, "reason": ""}
        try:
            place = folder / str(number)
            place.mkdir()
            runner, about = opened(net, images[:batch], runtime, options, asked.device, place)
            made = np.concatenate(
                [
                    next(iter(runner.bind({"x": part.numpy()})().values()))
                    for part in images.split(batch)[: max(1, 64 // batch)]
                ]
            ).astype(np.float64)
            wanted = expected[: len(made)]
            row |= about
            row["error"] = float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))
            row["equal_answers"] = float((made.argmax(1) == wanted.argmax(1)).mean())
            if labels is not None:
                row["accuracy"] = float((made.argmax(1) == labels[: len(made)]).mean())
            calls = [runner.bind(feed) for feed in feeds]
            for call in calls:
                call()
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {error}"[:500]
            yield row
            continue
        running.append((row, calls, runner))
    if not running:
        return
    blocks = interleave([c for _, c, _ in running], budget_s=asked.budget, warm_up_s=0.1)
    for (row, _, _), times_ms in zip(running, blocks, strict=True):
        logs = np.log(blocks[0]) - np.log(times_ms)
        speedup, low, high = (float(x) for x in np.exp(log_ratio_interval(logs)))
        row |= {"ms": float(np.median(times_ms)), "speedup": speedup, "low": low, "high": high}
        yield row
    for _, _, runner in running:
        runner.close()


def opened(
    net: nn.Module, x: Tensor, runtime: str, options: Any, device: str, place: Path
) -> tuple[Any, dict[str, Any]]:
    """Export the network and load it."""
    from tersor.core import plugins
    from tersor.core.model import Inputs
    from tersor.core.runtime import Target
    from tersor.ops.lower import lower

    found = plugins.runtime(runtime)
    inputs = Inputs(example={"x": x}, dynamic={} if found.fixed_batch else {"x": {0: "batch"}})
    if not found.fixed_batch and len(x) == 1:
        inputs = Inputs(example={"x": torch.cat([x, x])}, dynamic=inputs.dynamic)
    for package in (*found.to_export, *found.to_run):
        __import__(package)
    target = Target(runtime=runtime, device=device, options=options)
    began = time.monotonic()
    files = found.write(lower(net, found.takes, inputs), place, inputs, target)
    exported = time.monotonic()
    runner = found.open(files[0], target)
    return runner, {
        "export_s": exported - began,
        "load_s": time.monotonic() - exported,
        "bytes": sum(file.stat().st_size for file in files),
    }


if __name__ == "__main__":
    sys.exit(main())
