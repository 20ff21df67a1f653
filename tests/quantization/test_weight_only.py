"""Weight-only quantization: what changes, how it runs, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core import plugins
from tersor.core.context import Data
from tersor.core.errors import ModelError, RecipeError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.ops.modules import GroupedLinear, QuantConv2d, QuantLinear
from tersor.ops.recurrent import RoundedRecurrent
from tersor.quantization.static import Static, static
from tersor.quantization.weight_only import WeightOnly, weight_only
from tests import networks


def test_eight_bits_are_a_row_each_by_default(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = weight_only(net, WeightOnly(), context)
    assert isinstance(made.get_submodule("fc"), QuantLinear)
    assert isinstance(made.get_submodule("conv1"), QuantConv2d)
    assert context.facts == {
        "layers": 9,
        "embeddings": 0,
        "left_in_float": {},
        "bits": 8,
        "group_sizes": {},
        "batch_norms_folded": 7,
    }


def test_four_bits_leave_convolutions(tiny_context: Any) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net)
    made = weight_only(net, WeightOnly(bits=4, group_size=8), context)
    assert isinstance(made.get_submodule("fc"), GroupedLinear)
    assert isinstance(made.get_submodule("conv1"), nn.Conv2d)
    assert context.facts["left_in_float"]["conv1"].startswith("a convolution")


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (WeightOnly(), 0.02),
        (WeightOnly(group_size=8), 0.02),
        (WeightOnly(symmetric=False), 0.02),
        (WeightOnly(bits=4), 0.3),
        (WeightOnly(bits=4, group_size=-1), 0.4),
        (WeightOnly(bits=4, symmetric=False, group_size=8), 0.25),
    ],
)
def test_outputs_move_by_the_rounding_only(
    config: WeightOnly, bound: float, tiny_context: Any
) -> None:
    net = networks.tiny_transformer()
    x = networks.digits()[0][:64]
    with torch.no_grad():
        before = net(x)
        after = weight_only(copy.deepcopy(net), config, tiny_context(net))(x)
    moved = float((after - before).square().mean().sqrt() / before.square().mean().sqrt())
    assert 0 < moved < bound


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "config",
    [
        WeightOnly(),
        WeightOnly(bits=4),
        WeightOnly(bits=4, symmetric=False),
        WeightOnly(bits=3),
        WeightOnly(bits=2, symmetric=False, group_size=8),
    ],
)
def test_runtimes_agree_with_memory(
    config: WeightOnly, runtime: str, tiny_context: Any, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    net = networks.tiny_transformer()
    made = weight_only(net, config, tiny_context(net))
    found = plugins.runtime(runtime)
    files = found.export(lower(made, "onnx", networks.inputs()), tmp_path, networks.inputs())
    runner = found.load(files[0], Target(runtime=runtime, options={"threads": 1}))
    x = networks.digits()[0][:32]
    with torch.no_grad():
        wanted = made(x).numpy()
    # ONNX Runtime rounds activations to 8 bits beside weights of 8 bits
    allowed = 1e-2 * np.abs(wanted).max() if (config.bits, runtime) == (8, "onnxruntime") else 1e-3
    assert np.abs(next(iter(runner.bind({"x": x.numpy()})().values())) - wanted).max() < allowed


def test_group_size_must_divide(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    with pytest.raises(
        RecipeError,
        match=r"layer 'embed' has 8 columns, not a multiple of group_size 32; use group_size 4 or -1",
    ):
        weight_only(net, WeightOnly(bits=4, group_size=32), tiny_context(net))
    assert isinstance(net.qkv, nn.Linear)


def test_unset_group_size_falls_back_to_the_row(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net)
    weight_only(net, WeightOnly(bits=4), context)
    assert context.facts["group_sizes"]["embed"] == 8
    assert context.facts["group_sizes"]["qkv"] == 32


def test_group_size_is_checked() -> None:
    with pytest.raises(ValueError, match="group_size must be -1 or at least 2, got 0"):
        WeightOnly(group_size=0)


def test_misspelt_layer(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    with pytest.raises(RecipeError, match=r"pattern 'qvk' matches no layer. Did you mean 'qkv'\?"):
        weight_only(net, WeightOnly(layers=Layers(patterns=("qvk",))), tiny_context(net))


def test_nan_weights(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    with torch.no_grad():
        net.qkv.weight[0, 0] = torch.inf
    with pytest.raises(
        ModelError, match="layer 'qkv' cannot be quantized: its weights hold NaN or infinity"
    ):
        weight_only(net, WeightOnly(), tiny_context(net))


def test_follows_static_without_touching_its_layers(tiny_context: Any) -> None:
    net = networks.tiny_transformer()
    context = tiny_context(net)
    made = weight_only(static(net, Static(), context), WeightOnly(), context)
    assert context.facts["layers"] == 0
    assert set(context.facts["left_in_float"].values()) == {"quantized before"}
    assert bool(torch.isfinite(made(networks.digits()[0][:4])).all())


class _Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.rnn = nn.RNN(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(self.rnn(self.gru(self.embed(x))[0])[0].mean(1))
        return made


def _listening(tiny_context: Any, runtime: str = "onnxruntime") -> tuple[nn.Module, Any]:
    example = {"x": torch.arange(12).view(3, 4) % 9}
    inputs = Inputs(example=example, dynamic={"x": {0: "batch"}})
    net = _Listener().eval()
    return net, tiny_context(net, inputs=inputs, data=Data(), target=Target(runtime=runtime))


def test_recurrent_layers_are_rounded_and_what_stays_is_told(tiny_context: Any) -> None:
    net, context = _listening(tiny_context)
    made = weight_only(net, WeightOnly(weight_range="mse"), context)
    assert isinstance(made.get_submodule("gru"), RoundedRecurrent)
    assert context.facts["layers"] == 2
    assert context.facts["left_in_float"] == {
        "rnn": "RNN has no form with integer weights here",
    }
    again = weight_only(made, WeightOnly(), context)
    assert context.facts["left_in_float"]["gru"] == "quantized before"
    x = context.inputs.example["x"]
    with torch.no_grad():
        assert torch.equal(again(x), made(x))


def test_recurrent_layers_stay_in_float_where_they_must(tiny_context: Any) -> None:
    net, context = _listening(tiny_context)
    weight_only(net, WeightOnly(bits=4), context)
    assert context.facts["left_in_float"]["gru"] == (
        "GRU, which no runtime here computes from 4-bit weights"
    )
    net, context = _listening(tiny_context, "tensorrt")
    weight_only(net, WeightOnly(), context)
    assert context.facts["left_in_float"]["gru"] == (
        "GRU, whose integer weights were not tried on tensorrt"
    )
