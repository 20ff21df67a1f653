"""On an NVIDIA GPU: every runtime that computes there agrees with the CPU, and says what it did.

Each test is skipped where PyTorch finds no CUDA device, and where its own package is not there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.errors import TargetError
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.pipeline import compress
from tersor.trainer import fit
from tests import networks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TF32 = 1e-2
HALF = 3e-2
GRAPHS = {"cuda_graphs": True}


def opened(name: str, options: dict[str, Any], folder: Path, net: nn.Module) -> Any:
    runtime = plugins.runtime(name)
    for package in (*runtime.to_export, *runtime.to_run):
        pytest.importorskip(package)
    if name == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has no CUDA")
    target = Target(runtime=name, device="cuda", options=options)
    lowered = lower(net, runtime.takes, networks.inputs())
    file = runtime.write(lowered, folder, networks.inputs(), target)[0]
    return runtime.open(file, target), file, target


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        *[
            (name, options, tolerance)
            for name in ("torch_eager", "torch_export", "torchscript")
            for options, tolerance in (
                ({}, TF32),
                (GRAPHS, TF32),
                ({"precision": "fp16"}, HALF),
                ({"precision": "bf16", **GRAPHS}, HALF),
            )
        ],
        ("torch_compile", {}, TF32),
        ("onnxruntime", {}, TF32),
        ("onnxruntime", GRAPHS, TF32),
        ("onnxruntime", {"precision": "fp16"}, HALF),
        ("onnxruntime", {"precision": "fp16", **GRAPHS}, HALF),
        ("onnxruntime", {"precision": "bf16"}, HALF),
    ],
)
@pytest.mark.parametrize("network", ["cnn", "transformer"])
def test_outputs_are_the_cpus(
    name: str, options: dict[str, Any], tolerance: float, network: str, tmp_path: Path
) -> None:
    net = networks.tiny_cnn() if network == "cnn" else networks.tiny_transformer()
    x = networks.digits()[0]
    runner, _, _ = opened(name, options, tmp_path, net.eval())
    calls = [(x[i : i + n], runner.bind({"x": x[i : i + n].numpy()})) for i, n in ((0, 2), (9, 5))]
    for _ in range(2):
        for part, call in calls:
            (made,) = call().values()
            with torch.no_grad():
                wanted = net(part).numpy()
            error = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
            assert error < tolerance
            assert made.dtype == np.float32
    runner.close()


def test_half_makes_the_file_half(tmp_path: Path) -> None:
    sizes = []
    for i, options in enumerate(({}, {"precision": "fp16"})):
        folder = tmp_path / str(i)
        folder.mkdir()
        runner, file, _ = opened("onnxruntime", options, folder, networks.deep_perceptron())
        runner.close()
        sizes.append(file.stat().st_size)
    assert sizes[1] < 0.75 * sizes[0]


def test_a_compiled_network_knows_its_gpu(tmp_path: Path) -> None:
    _, file, target = opened("torch_compile", {}, tmp_path, networks.tiny_cnn())
    with pytest.raises(TargetError, match=r"was compiled for sm_\d+, this target is .*:cpu"):
        plugins.runtime("torch_compile").open(file, replace(target, device="cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training(precision: Any, tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(batch["x"]), batch["labels"])

    batches = networks.split(0, 1024)
    settings: dict[str, Any] = {
        "batches": batches,
        "epochs": 3,
        "lr": 0.05,
        "device": "cuda",
        "precision": precision,
    }
    net = networks.tiny_cnn(trained=False)
    with torch.no_grad():
        before = loss(net, batches[0]).item()
    fit(net, loss, **settings)
    with torch.no_grad():
        assert loss(net.eval(), batches[0]).item() < 0.7 * before
    assert {p.device.type for p in net.parameters()} == {"cpu"}


def test_energy_and_a_verdict(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    target = {"runtime": "torch_eager", "device": "cuda"}
    made = compress(
        networks.tiny_cnn(),
        Recipe.parse(
            {
                "steps": [{"half": {"format": "fp16"}}],
                "target": {"runtime": "torch_eager", "device": "cuda"},
            }
        ),
        data=networks.data(),
        out=tmp_path / "out",
        metrics=("fidelity", "latency", "energy"),
    )
    (stage,) = made.report.stages
    assert stage.verdict == "applied"
    found = {m.metric: m for m in made.report.before}
    assert found["energy"].value is not None
    assert found["energy"].value > 0
    assert "GPU" in found["energy"].how
    again = Artifact.open(tmp_path / "out")
    assert again.target.device == target["device"]
    assert again.load().bind({"x": networks.digits()[0][:2].numpy()})()["output"].shape == (2, 10)


def test_memory_of_the_gpu() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    from tersor.ops import cuda_memory

    cuda_memory.check_gpu()
    stream = cuda_memory.Stream()
    buffer = cuda_memory.Buffer((3, 5), np.float32)
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    buffer.write(array, stream)
    made = buffer.read(stream)
    stream.wait()
    np.testing.assert_array_equal(made, array)
    stream.close()
