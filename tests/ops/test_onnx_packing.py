"""Packed weights: smaller files that compute the same."""

from typing import Any

import numpy as np
import pytest

from tersor.ops.lower import lower
from tersor.ops.onnx_packing import pack_weights, packed
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


def test_bytes_stay_as_they_are(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    model = lower(static(net, Static(), tiny_context(net)), "onnx", networks.inputs())
    assert pack_weights(model) is model
