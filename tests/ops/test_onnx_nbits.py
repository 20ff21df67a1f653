"""Products by integer weights, as ONNX Runtime computes them fast."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor._cli_tensors import of_file
from tersor.core import plugins
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.ops.modules import GroupedLinear, quantized, rows
from tersor.ops.onnx_count import count_macs, count_parameters
from tersor.ops.onnx_nbits import multiply_codes
from tersor.ops.onnx_packing import pack_weights
from tersor.ops.quantize import channel_scales, group_codes
from tersor.quantization.static import Static, static
from tests import networks

pytest.importorskip("onnxruntime")
TARGET = Target(runtime="onnxruntime", options={"threads": 1})


def grouped(layer: nn.Linear, bits: int, size: int, symmetric: bool) -> GroupedLinear:
    made = GroupedLinear(
        layer.in_features, layer.out_features, bits=bits, group_size=size, symmetric=symmetric
    ).eval()
    made.weight, made.scale, made.zero = group_codes(
        layer.weight.detach(), bits=bits, group_size=size, symmetric=symmetric
    )
    made.bias = layer.bias
    return made


def lowered(net: nn.Module, x: torch.Tensor) -> Any:
    ways = Inputs(example={"x": x[:2]}, dynamic={"x": {0: "batch"}})
    return lower(net.eval(), "onnx", ways)


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: Any, x: torch.Tensor, folder: Path) -> np.ndarray:
    runtime = plugins.runtime("onnxruntime")
    (file,) = runtime.export(model, folder, Inputs(example={"x": x}))
    (found,) = runtime.load(file, TARGET).bind({"x": x.numpy()})().values()
    return found


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """Round each block of a row to 255 codes around zero."""
    made = np.zeros(x.shape)
    for i, row in enumerate(x.astype(np.float64)):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = np.abs(part).max() / 127
            made[i, start : start + block] = np.rint(part / scale) * scale
    return made


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "block"), [(32, 32), (48, 16), (96, 64)])
def test_eight_bits_multiply_activations_rounded_in_blocks(
    size: int, block: int, symmetric: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = grouped(nn.Linear(96, 40), 8, size, symmetric), torch.randn(5, 96)
    model = multiply_codes(lowered(net, x))
    assert kinds(model) == ["MatMulNBits", "Add"]
    with torch.no_grad():
        weight, bias = net.values().double().numpy(), net.bias.double().numpy()  # type: ignore[union-attr]
    wanted = rounded(x.numpy(), block) @ weight.T + bias
    # a value at the middle between two codes may go either way: half a code, times a weight
    assert np.abs(run(model, x, tmp_path) - wanted).max() < 2e-3
    assert np.abs(wanted - x.numpy() @ weight.T - bias).max() > 2e-3


def test_inspecting_a_file_finds_the_zeros_of_its_codes(tmp_path: Path) -> None:
    layer = nn.Linear(96, 40)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    net = grouped(layer, 8, 32, True)
    zeros = int((net.values() == 0).sum())
    model = multiply_codes(lowered(net, torch.randn(5, 96)))
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    (found,) = (c for c in of_file(file) if c.kind == "MatMulNBits" and c.dtype == "uint8")
    assert found.count == 96 * 40
    assert found.zeros == zeros >= 48 * 40


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 2])
def test_few_bits_take_half_a_byte_and_compute_in_fp32(
    bits: int, symmetric: bool, tmp_path: Path
) -> None:
    net, x = grouped(nn.Linear(96, 160), bits, 32, symmetric), torch.randn(5, 96)
    model = multiply_codes(lowered(net, x))
    node = model.graph.node[0]
    assert node.op_type == "MatMulNBits"
    assert {a.name: a.i for a in node.attribute} == {
        "K": 96,
        "N": 160,
        "bits": 4,
        "block_size": 32,
        "accuracy_level": 1,
    }
    packed = pack_weights(model)
    saved = model.ByteSize() - packed.ByteSize()
    assert saved > 96 * 160 * (4 - bits) / 8 - 1300
    assert kinds(packed)[-2:] == ["MatMulNBits", "Add"]
    assert "BitShift" in kinds(packed)
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.abs(run(model, x, tmp_path) - wanted).max() < 1e-5


@pytest.mark.parametrize("shape", [(4, 100), (4, 3, 100)])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_one_scale(shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    layer = nn.Linear(100, 24, bias=bias)
    net, x = quantized(layer, channel_scales(rows(layer))), torch.randn(shape)
    model = multiply_codes(lowered(net, x))
    assert "MatMulNBits" in kinds(model)
    assert "DequantizeLinear" not in kinds(model)
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.abs(run(model, x, tmp_path) - wanted).max() < 2e-2


def test_a_model_is_not_modified_and_its_weights_are_counted_the_same() -> None:
    layer = nn.Linear(100, 24)
    layer.weight.data[:, ::2] = 0
    net, x = quantized(layer, channel_scales(rows(layer))), torch.randn(2, 100)
    model = lowered(net, x)
    before = model.SerializeToString(deterministic=True)
    made = multiply_codes(model)
    assert model.SerializeToString(deterministic=True) == before
    assert count_parameters(made) - count_parameters(model) == 0
    assert count_parameters(made, zeros=False) == count_parameters(model, zeros=False) < 24 * 60
    assert count_macs(made, {"x": x.numpy()}) == 2 * 2400


def test_products_of_integers_stay_for_the_runtime_to_fuse(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    model = lower(static(net, Static(), tiny_context(net)), "onnx", networks.inputs())
    assert multiply_codes(model) is model


@pytest.mark.parametrize(("columns", "size", "bits"), [(96, 12, 8), (8, 8, 8), (64, 32, 4)])
def test_what_the_operator_cannot_hold_or_the_runtime_fuses_stays(
    columns: int, size: int, bits: int
) -> None:
    net = grouped(nn.Linear(columns, 24), bits, size, True)
    model = lowered(net, torch.randn(2, columns))
    assert multiply_codes(model) is model
