"""Rewriting for readers of PT2E: every rewrite is exact."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tersor.core.model import Inputs
from tersor.ops.lower import lower
from tersor.ops.signed_codes import fold_single_channels, rewritten
from tersor.quantization.static import Static, static
from tersor.quantization.weight_only import WeightOnly, weight_only
from tests import networks

OPS, ATEN = torch.ops.quantized_decomposed, torch.ops.aten
X = networks.split(0, 64)[0]["x"][:3]
FIXED = Inputs(example={"x": X})


def targets(program: ExportedProgram) -> list[object]:
    return [node.target for node in program.graph.nodes]


def int8(folder: Path, *, symmetric: bool = False) -> ExportedProgram:
    net = networks.tiny_cnn()
    made = static(net, Static(symmetric=symmetric), networks.context(net, folder))
    found = lower(made.eval(), "exported", FIXED)
    assert isinstance(found, ExportedProgram)
    return found


@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_are_the_same_to_the_last_bits(symmetric: bool, tmp_path: Path) -> None:
    program = int8(tmp_path, symmetric=symmetric)
    before = [str(node) for node in program.graph.nodes]
    made, _ = rewritten(program, FIXED)
    torch.testing.assert_close(made.module()(x=X), program.module()(x=X), rtol=1e-6, atol=1e-6)
    assert [str(node) for node in program.graph.nodes] == before


def test_codes_are_signed_and_keep_their_distance_from_zero(tmp_path: Path) -> None:
    program = int8(tmp_path)
    made, _ = rewritten(program, FIXED)
    old, new = (
        [n.args[1:6] for n in p.graph.nodes if n.target is OPS.quantize_per_tensor.default]
        for p in (program, made)
    )
    assert len(old) == len(new) > 5
    for (scale, zero, low, high, dtype), after in zip(old, new, strict=True):
        assert dtype is torch.uint8
        assert after == (scale, zero - 128, low - 128, high - 128, torch.int8)


def test_each_reader_has_its_own_dequantization(tmp_path: Path) -> None:
    made, _ = rewritten(int8(tmp_path), FIXED)
    readers = [
        len(n.users) for n in made.graph.nodes if n.target is OPS.dequantize_per_tensor.default
    ]
    assert set(readers) == {1}


def test_only_layers_that_write_floats_get_float_weights(tmp_path: Path) -> None:
    program = int8(tmp_path)
    made, floats = rewritten(program, FIXED)
    assert floats == ("fc",)  # nothing rounds the network's outputs
    integer = targets(program).count(OPS.dequantize_per_channel.default)
    assert targets(made).count(OPS.dequantize_per_channel.default) == integer - 1


def test_weights_alone_become_floats(tmp_path: Path) -> None:
    net = networks.tiny_transformer()
    made = weight_only(net, WeightOnly(group_size=8), networks.context(net, tmp_path)).eval()
    program = lower(made, "exported", FIXED)
    after, floats = rewritten(program, FIXED)
    assert "embed" in floats
    assert not [t for t in targets(after) if "dequantize" in str(t)]
    torch.testing.assert_close(after.module()(x=X), program.module()(x=X), rtol=1e-5, atol=1e-5)


def test_convolutions_of_one_channel_get_float_weights(tmp_path: Path) -> None:
    program = int8(tmp_path)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    fold_single_channels(module)
    kinds = [node.target for node in module.graph.nodes]
    weights = OPS.dequantize_per_channel.default
    assert kinds.count(weights) == targets(program).count(weights) - 1
    convolution = next(n for n in module.graph.nodes if n.target is ATEN.conv2d.default)
    assert convolution.args[1].op == "get_attr"
    torch.testing.assert_close(module(x=X), program.module()(x=X), rtol=1e-6, atol=1e-6)


class Means(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.mean((2, 3)), x.mean((-1, -2)), x.mean(1), x.mean((2, 3), keepdim=True)


def test_means_over_pictures_keep_their_dimensions() -> None:
    x = torch.rand(2, 3, 4, 5)
    inputs = Inputs(example={"x": x})
    made, _ = rewritten(lower(Means(), "exported", inputs), inputs)
    means = [n.args[1:] for n in made.graph.nodes if n.target is ATEN.mean.dim]
    assert means == [([2, 3], True), ([2, 3], True), ([1],), ([2, 3], True)]
    for found, wanted in zip(made.module()(x=x), Means()(x), strict=True):
        torch.testing.assert_close(found, wanted)
