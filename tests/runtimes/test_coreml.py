"""CoreML: the package is read back and compared; running it is refused off macOS."""

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.core.errors import TargetError
from tersor.core.recipe import Recipe
from tersor.core.runtime import Target
from tersor.ops.modules import QuantConv2d
from tersor.pipeline import compress
from tersor.quantization.static import Static, static
from tersor.runtimes.coreml import load
from tests import networks
from tests.runtimes.compilers import exported, needs

WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
SPEC = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"


def content(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


@pytest.mark.slow
def test_the_package_holds_names_and_weights(tmp_path: Path, tiny_context: Any) -> None:
    runtime = needs("coreml", to_run=False)
    net, x = networks.tiny_cnn(), torch.rand(2, 1, 8, 8)
    found = content(exported(runtime, net, x, tmp_path)[0])
    assert {WEIGHTS, SPEC, "model.mlpackage/Manifest.json"} == set(found)
    kernels = sum(m.weight.nbytes for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    assert kernels <= len(found[WEIGHTS]) <= 1.5 * kernels
    assert b"output" in found[SPEC]
    assert b"conv" in found[SPEC]
    again = tmp_path / "again"
    again.mkdir()
    assert content(exported(runtime, net, x, again)[0]) == found

    quantized = static(net, Static(), tiny_context(net))
    small = content(exported(runtime, quantized, x, again)[0])
    assert b"constexpr_affine_dequantize" in small[SPEC]
    assert len(small[WEIGHTS]) < 0.6 * len(found[WEIGHTS])
    codes = next(
        m.weight
        for m in quantized.modules()
        if isinstance(m, QuantConv2d) and m.weight.numel() > 500
    )
    assert codes.numpy().tobytes() in small[WEIGHTS]


@pytest.mark.skipif(sys.platform == "darwin", reason="CoreML runs here")
def test_running_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match=r"CoreML models run on macOS only.*same command on a Mac"
    ):
        load(tmp_path / "model.mlpackage.zip", Target(runtime="coreml"))


@pytest.mark.skipif(sys.platform == "darwin", reason="CoreML runs here")
def test_compressing_for_it_elsewhere_is_refused_before_work(tmp_path: Path) -> None:
    recipe = Recipe.parse({"steps": ["fuse_batch_norm"], "target": "coreml"})
    said = (
        r"coreml runs on macOS only, and compress keeps no step .*: give the same command on a Mac"
        r".*: tersor measure MODEL --weights OUT --data DATA --runtime coreml"
    )
    with pytest.raises(TargetError, match=said):
        compress(networks.tiny_cnn(), recipe, data=networks.data(), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
