"""Packed weights: smaller files that compute the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core import plugins
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.ops.modules import GroupedLinear
from tersor.ops.onnx_packing import pack_weights, packed
from tersor.ops.quantize import group_codes
from tersor.quantization.static import Static, static
from tests import networks


@pytest.mark.parametrize("bits", [2, 3, 5, 7])
def test_eight_codes_take_as_many_bytes_as_a_code_has_bits(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(0).integers(-most, most + 1, (3, 5)).astype(np.int8)
    made = packed(codes, bits)
    assert made.shape == (2, bits)
    for i, code in enumerate(codes.reshape(-1).tolist()):
        group, place = divmod(i, 8)
        word = sum(int(byte) << (8 * k) for k, byte in enumerate(made[group]))
        assert (word >> (place * bits)) % 2**bits - 2 ** (bits - 1) == code


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_packed_network_is_smaller_and_computes_the_same(bits: int, tiny_context: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net = networks.tiny_cnn(width=32)
    made = static(net, Static(weight_bits=bits), tiny_context(net))
    model = lower(made, "onnx", networks.inputs())
    small = pack_weights(model)
    weights = sum(m.weight.numel() for m in made.modules() if hasattr(m, "bits"))
    saved = model.ByteSize() - small.ByteSize()
    assert 0.8 * weights * (8 - bits) / 8 < saved + 9 * 900
    assert saved > 0.5 * weights * (8 - bits) / 8
    x = {"x": networks.digits()[0].numpy()}
    outputs = [
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, x
        )[0]
        for m in (model, small)
    ]
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_groups_of_few_bits_are_packed(bits: int, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    layer = nn.Linear(64, 256)
    made = GroupedLinear(64, 256, bits=bits, group_size=32, symmetric=symmetric).eval()
    made.weight, made.scale, made.zero = group_codes(
        layer.weight.detach(), bits=bits, group_size=32, symmetric=symmetric
    )
    made.bias, x = layer.bias, torch.randn(5, 64)
    ways = Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}})
    model = lower(made, "onnx", ways)
    small = pack_weights(model)
    assert small.ByteSize() < model.ByteSize() - 64 * 256 * (8 - bits) / 8 + 2500
    runtime = plugins.runtime("onnxruntime")
    (file,) = runtime.export(model, tmp_path, ways)
    assert abs(file.stat().st_size - small.ByteSize()) < 300  # held in halves of bytes there
    runner = runtime.load(file, Target(runtime="onnxruntime", options={"threads": 1}))
    with torch.no_grad():
        wanted = made(x).numpy()
    (found,) = runner.bind({"x": x.numpy()})().values()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_bytes_stay_as_they_are(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    model = lower(static(net, Static(), tiny_context(net)), "onnx", networks.inputs())
    assert pack_weights(model) is model
