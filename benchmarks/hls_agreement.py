"""Does an FPGA project compute what ONNX Runtime computes, bit for bit?

    python benchmarks/hls_agreement.py

Trains a perceptron (64-32-10) and a small convolutional network on scikit-learn's digits, quantizes
both with `static` (symmetric, scales that are powers of two), and compares, on the test images as
they are and on the same images disturbed by noise, so that values fall between codes and beyond the
calibrated range: every output of hls4ml's emulation with every output of ONNX Runtime. Also: the
accuracy in float, with ordinary scales and with powers of two. Needs g++ and the environment of
`hls` (`tersor doctor --create hls`). Writes benchmarks/results/hls_agreement.json.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _networks import RESULTS, context


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "hls_agreement.json")
    asked = parser.parse_args()
    import torch

    from tersor.core import environments
    from tersor.core.hardware import environment

    torch.set_num_threads(1)
    rows = [compared(name) for name in ("perceptron", "convolutional")]
    result = {
        "command": "python benchmarks/hls_agreement.py",
        "environment": {**environment(), "hls": list(environments.pins("hls"))},
        "results": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def network(name: str) -> Any:
    """Make one of the two networks, untrained."""
    import torch
    from torch import Tensor, nn

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x.flatten(1))))

    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(72, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn1(self.conv1(x)))
            x = torch.relu(self.bn2(self.conv2(x)))
            return self.fc(self.pool(x).flatten(1))

    torch.manual_seed(0)
    return Perceptron() if name == "perceptron" else Convolutional()


def compared(name: str) -> dict[str, Any]:
    """Train, quantize twice, export, and run everything on the test images."""
    import torch
    from torch import nn

    from tersor.core.model import Inputs
    from tersor.ops.fake_quantize import settle
    from tersor.quantization.static import Static, static

    x, labels = digits()
    net = network(name)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(40):
        for chosen in torch.randperm(1200, generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[chosen]), labels[chosen]).backward()
            optimizer.step()
    net.eval()
    inputs = Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}})
    tested, wanted = x[1200:], labels[1200:].numpy()
    noise = torch.randn(tested.shape, generator=torch.Generator().manual_seed(1))
    disturbed = tested + 0.3 * noise
    row: dict[str, Any] = {"network": name, "images": len(tested)}
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        given = context(inputs, Path(work), calibration=[{"x": x[:256]}], runtime="hls")
        row["accuracy_float"] = percent(net(tested).numpy(), wanted)
        plain = settle(static(copy.deepcopy(net), Static(symmetric=True), given)).eval()
        found = outputs("onnxruntime", plain, inputs, tested)
        row["accuracy_int8"] = percent(found, wanted)
        config = Static(symmetric=True, power_of_two=True)
        made = settle(static(copy.deepcopy(net), config, given)).eval()
        runtime = outputs("onnxruntime", made, inputs, torch.cat([tested, disturbed]))
        began = time.perf_counter()
        emulated = outputs("hls", made, inputs, torch.cat([tested, disturbed]))
        row["emulation_seconds"] = time.perf_counter() - began
    row["accuracy_int8_power_of_two"] = percent(runtime[: len(tested)], wanted)
    row["accuracy_emulated"] = percent(emulated[: len(tested)], wanted)
    row["outputs"] = int(runtime.size)
    row["outputs_equal"] = int((emulated == runtime).sum())
    row["largest_difference"] = float(np.abs(emulated - runtime).max())
    print(json.dumps(row), flush=True)
    return row


def digits() -> tuple[Any, Any]:
    """Return the images in [0, 1] and their labels, in an order drawn with seed 0."""
    import torch
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    images = (raw.images[order] / 16).astype(np.float32)[:, None]
    return torch.from_numpy(images), torch.from_numpy(raw.target[order])


def outputs(name: str, net: Any, inputs: Any, x: Any) -> np.ndarray:
    """Export to a runtime and run all images there."""
    from tersor.core import plugins
    from tersor.core.runtime import Target
    from tersor.ops.lower import lower

    runtime = plugins.runtime(name)
    plugins.require("runtimes", name, (*runtime.to_export, *runtime.to_run))
    with tempfile.TemporaryDirectory() as folder:
        files = runtime.export(lower(net, runtime.takes, inputs), Path(folder), inputs)
        runner = runtime.open(files[0], Target(runtime=name, options={"threads": 1}))
        (made,) = runner.bind({"x": x.numpy()})().values()
        runner.close()
    return np.asarray(made)


def percent(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy."""
    return 100 * float((scores.argmax(1) == labels).mean())


if __name__ == "__main__":
    sys.exit(main())
