"""LiteRT: what the converter is given, what it makes of integer networks, and what it refuses."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import environments, plugins
from tersor.core.errors import ModelError, TargetError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.lower import lower
from tersor.ops.modules import GroupedLinear, QuantConv2d, Quantize, quantized
from tersor.ops.quantize import channel_scales
from tersor.quantization.dynamic import Dynamic, dynamic
from tersor.quantization.half import Half, half
from tersor.quantization.static import Static, static
from tersor.quantization.weight_only import WeightOnly, weight_only
from tersor.runtimes._litert_program import prepared
from tersor.runtimes.litert import _fitting
from tersor.subjects import place
from tests import networks

LITERT = Target(runtime="litert", options={"threads": 1})
OPERATORS = """
import json, sys
from ai_edge_litert.interpreter import Interpreter, OpResolverType
plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
found = Interpreter(model_path=sys.argv[1], experimental_op_resolver_type=plain)
kinds = {t["index"]: t["dtype"].__name__ for t in found.get_tensor_details()}
print(json.dumps([
    [o["op_name"], [kinds.get(int(i), "") for i in o["inputs"]]] for o in found._get_ops_details()
]))
"""


@pytest.fixture(scope="module")
def litert() -> Any:
    """The runtime, wherever its packages are."""
    found = plugins.runtime("litert")
    missing = [p for p in (*found.to_export, *found.to_run) if not plugins.installed(p)]
    if missing:
        pytest.skip(f"needs {missing[0]} or the environment 'litert'")
    return found


def fixed(net: nn.Module, samples: int = 4) -> Inputs:
    return Inputs(example={"x": networks.split(0, 64)[0]["x"][:samples]})


def exported(litert: Any, net: nn.Module, inputs: Inputs, folder: Path) -> Path:
    file: Path = litert.export(lower(net, "exported", inputs), folder, inputs)[0]
    return file


def operators(file: Path) -> list[tuple[str, list[str]]]:
    python = environments.python("litert") or sys.executable
    done = subprocess.run(
        [str(python), "-c", OPERATORS, str(file)], capture_output=True, text=True, check=True
    )
    return [(name, kinds) for name, kinds in json.loads(done.stdout)]


def outputs(litert: Any, file: Path, x: Tensor) -> np.ndarray:
    runner = litert.open(file, LITERT)
    try:
        made: np.ndarray = runner.bind({"x": x.numpy()})()["output"]
        return made
    finally:
        runner.close()


def error(found: np.ndarray, wanted: Tensor) -> float:
    want = wanted.detach().numpy()
    return float(np.sqrt(np.mean((found - want) ** 2) / np.mean(want**2)))


class OneConv(nn.Module):
    """Rounded, convolved, rounded: all in codes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 4, 3, padding=1)
        self.entry = Quantize(1 / 128, 16)
        self.conv = quantized(conv, channel_scales(conv.weight.detach().flatten(1)))
        self.exit = Quantize(1 / 64, 120)

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.conv(self.entry(x)))


def test_codes_become_signed_and_are_taken_back_for_each_reader() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.round = Quantize(0.5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.round(x)
            return y * y.sin()

    inputs = Inputs(example={"x": torch.randn(2, 3)})
    net = Twice()
    module, kept = prepared(lower(net, "exported", inputs))
    calls = [n for n in module.graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert [n.args[2:] for n in calls] == [(-125, -128, 127, torch.int8)] * 3
    assert [str(n.target).count("dequantize") for n in calls] == [0, 1, 1]
    assert kept == []
    torch.testing.assert_close(module(**inputs.example), net(**inputs.example), rtol=0, atol=0)


def test_weights_become_roundings_of_their_values() -> None:
    net = OneConv().eval()
    inputs = Inputs(example={"x": torch.rand(2, 2, 8, 8)})
    module, kept = prepared(lower(net, "exported", inputs))
    assert any("quantize_per_channel.default" in str(n.target) for n in module.graph.nodes)
    assert isinstance(net.conv, QuantConv2d)
    np.testing.assert_array_equal(kept[0].codes, net.conv.weight.numpy())
    assert kept[0].scale is not None
    np.testing.assert_array_equal(
        kept[0].values, kept[0].codes * kept[0].scale[:, None, None, None]
    )
    assert not kept[0].in_integers  # a convolution's output codes are known; nothing is left to do
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs.example), net(**inputs.example))


def test_weights_in_groups_are_refused() -> None:
    net = nn.Sequential(GroupedLinear(32, 4)).eval()
    inputs = Inputs(example={"input": torch.randn(2, 32)})
    with pytest.raises(TargetError, match=r"has no form of the operator 'quantized_decomposed.deq"):
        prepared(lower(net, "exported", inputs))


def test_inputs_of_64_bits_become_32() -> None:
    tokens = np.array([[1, 2]])
    assert _fitting("ids", tokens, np.dtype(np.int32)).dtype == np.int32
    with pytest.raises(TargetError, match="'ids' has numbers that do not fit into 32 bits"):
        _fitting("ids", tokens + 2**40, np.dtype(np.int32))
    with pytest.raises(TargetError, match="'ids' is float32, but the file takes int32"):
        _fitting("ids", tokens.astype(np.float32), np.dtype(np.int32))


@pytest.mark.parametrize("content", [b"", b"\x1c\0\0\0TFL3", b"\x1c\0\0\0TFL3" + bytes(range(256))])
def test_damaged_files_are_an_error(litert: Any, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.tflite"
    file.write_bytes(content)
    with pytest.raises(TargetError, match=r"empty file|not a TFLite file|cannot load"):
        litert.open(file, LITERT)
    with pytest.raises(ModelError, match=r"model\.tflite"):
        place(file)


def test_other_files_are_an_error(litert: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.tflite"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(
        TargetError, match=r"model.tflite is a damaged zip archive, not a TFLite file"
    ):
        litert.open(file, LITERT)
    with pytest.raises(ModelError, match=r"model.tflite is a damaged zip archive"):
        place(file)


@pytest.mark.slow
def test_a_convolution_is_computed_in_codes(litert: Any, tmp_path: Path) -> None:
    """Against sums of products of codes, in integers; TFLite rounds the last step its own way."""
    net = OneConv().eval()
    inputs = Inputs(example={"x": torch.rand(4, 2, 8, 8) * 2 - 0.125})
    file = exported(litert, net, inputs, tmp_path)
    assert [name for name, _ in operators(file) if "CONV" in name] == ["CONV_2D"]
    assert all("float32" not in kinds for name, kinds in operators(file) if name == "CONV_2D")
    codes = np.clip(np.round(inputs.example["x"].numpy() * 128) + 16, 0, 255).astype(np.int64) - 16
    assert isinstance(net.conv, QuantConv2d)
    assert net.conv.bias is not None
    weight, step = net.conv.weight.numpy().astype(np.int64), net.conv.scale.numpy() / 128
    padded = np.pad(codes, [(0, 0), (0, 0), (1, 1), (1, 1)])
    sums = np.zeros((4, 4, 8, 8), np.int64)
    for i in range(3):
        for j in range(3):
            seen = padded[:, :, i : i + 8, j : j + 8]
            sums += np.einsum("nchw,oc->nohw", seen, weight[:, :, i, j])
    sums += np.round(net.conv.bias.detach().numpy() / step).astype(np.int64)[:, None, None]
    wanted = np.clip(np.round(sums * step[:, None, None] * 64) + 120, 0, 255)
    found = outputs(litert, file, inputs.example["x"]) * 64 + 120
    assert np.abs(found - wanted).max() <= 1
    assert (found != wanted).mean() < 0.01


@pytest.mark.slow
def test_static_becomes_integer_operators(litert: Any, tiny_context: Any, tmp_path: Path) -> None:
    net = networks.tiny_cnn()
    context = tiny_context(net, target=LITERT)
    made = static(copy.deepcopy(net), Static(), context)
    file = exported(litert, made, fixed(made), tmp_path)
    found = operators(file)
    for name, kinds in found:
        if name in ("CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MEAN"):
            assert kinds[0] == "int8", (name, kinds)
    linear = [kinds for name, kinds in found if name == "FULLY_CONNECTED"]
    assert [kinds[:2] for kinds in linear] == [["float32", "int8"]]  # rounds its input itself
    test = networks.split(1200, 1797)
    scores = np.concatenate([outputs(litert, file, batch["x"]) for batch in test])
    with torch.no_grad():
        memory = torch.cat([made(batch["x"]) for batch in test])
    labels = torch.cat([batch["labels"] for batch in test]).numpy()
    there = 100 * float((scores.argmax(1) == labels).mean())
    here = 100 * float((memory.argmax(1).numpy() == labels).mean())
    assert abs(there - here) <= 0.3
    signature = litert.inputs(file)["x"]
    assert (signature.shape, signature.dtype) == ((4, 1, 8, 8), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["dynamic", "weight_only", "fp16"])
def test_weights_stay_small(litert: Any, step: str, tiny_context: Any, tmp_path: Path) -> None:
    """The large part of the file, weights, takes a quarter of float32, or half."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = wide

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layers(x)
            return made

    net = Wide().eval()
    context = tiny_context(net, target=LITERT)
    if step == "dynamic":
        made = dynamic(copy.deepcopy(net), Dynamic(), context)
    elif step == "weight_only":
        made = weight_only(copy.deepcopy(net), WeightOnly(bits=8), context)
    else:
        made = half(copy.deepcopy(net), Half(format="fp16"), context)
    inputs = fixed(made)
    file = exported(litert, made, inputs, tmp_path)
    floats = 4 * sum(p.numel() for p in net.parameters())
    assert file.stat().st_size < floats * {"fp16": 0.6}.get(step, 0.35)
    with torch.no_grad():
        wanted = made(inputs.example["x"])
    # of `dynamic`, LiteRT finds the range of each row, and we of the whole batch
    assert error(outputs(litert, file, inputs.example["x"]), wanted) < {"dynamic": 0.02}.get(
        step, 1e-5
    )


@pytest.mark.slow
def test_tokens_and_several_outputs(litert: Any, tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
            x = self.norm(self.embed(ids)) * mask.unsqueeze(2)
            return {"logits": self.head(x.mean(1)), "hidden": x}

    net = Tokens().eval()
    example = {"ids": torch.randint(0, 50, (2, 7)), "mask": torch.ones(2, 7)}
    inputs = Inputs(example=example)
    file = exported(litert, net, inputs, tmp_path)
    runner = litert.open(file, LITERT)
    more = {"ids": torch.randint(0, 50, (5, 7)), "mask": torch.rand(5, 7)}  # in pieces of two
    found = runner.bind({name: tensor.numpy() for name, tensor in more.items()})()
    runner.close()
    with torch.no_grad():
        wanted = net(**more)
    assert list(found) == ["logits", "hidden"]
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor.numpy(), atol=1e-5)


@pytest.mark.slow
def test_an_operator_that_is_missing_is_named(litert: Any, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x)[1]

    inputs = Inputs(example={"x": torch.randn(2, 4, 4)})
    with pytest.raises(TargetError, match=r"LiteRT cannot take the network: it has no oper.*svd"):
        exported(litert, Odd().eval(), inputs, tmp_path)
