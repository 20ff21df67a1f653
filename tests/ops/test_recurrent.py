"""Recurrent layers with integer weights: against float64, stored, written as ONNX."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.metrics import macs, parameters
from tersor.ops import edits
from tersor.ops.capture import capture
from tersor.ops.lower import lower
from tersor.ops.recurrent import RoundedRecurrent, rounded, why_not

SETTINGS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
    {"bias": False},
]
X = torch.linspace(-2, 3, 4 * 7 * 6).sin().view(4, 7, 6)
INPUTS = Inputs(example={"x": X}, dynamic={"x": {0: "batch"}})


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], hidden: int = 5, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(6, hidden, **settings)
        self.head = nn.Linear(hidden * (1 + self.rnn.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.rnn(x)[0].mean(1))
        return made


def on_grid(layer: nn.RNNBase) -> nn.RNNBase:
    """Round each row of each weight to 127 steps of its largest, in float64."""
    made = copy.deepcopy(layer).double()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            for row in parameter.data:
                step = row.abs().max() / 127
                row.copy_((row / step).round() * step)
    return made


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_computes_with_weights_on_the_grid(kind: Any, settings: dict[str, Any]) -> None:
    layer = kind(6, 5, **settings).eval()
    made, wanted = rounded(layer), on_grid(layer)
    assert made.weight_ih_l0.dtype is torch.int8
    with torch.no_grad():
        y, last = made(X)
        y_wanted, last_wanted = wanted(X.double())
        pairs = zip((y, *last), (y_wanted, *last_wanted), strict=True)
        for found, right in pairs:
            torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-6)
        alone, _ = made(X[0])
        torch.testing.assert_close(alone.double(), wanted(X[0].double())[0], rtol=0, atol=1e-6)
        again, _ = made(X, last)
        state = tuple(h.double() for h in last) if kind is nn.LSTM else last.double()
        torch.testing.assert_close(again.double(), wanted(X.double(), state)[0], rtol=0, atol=1e-6)


def test_what_cannot_be_rounded_is_told() -> None:
    assert why_not(nn.RNN(2, 2)) == "RNN has no form with integer weights here"
    assert why_not(nn.LSTM(4, 4, proj_size=2)) == "an LSTM with a projection"
    assert why_not(nn.GRU(2, 2).bfloat16()) == "its weights are bfloat16"
    assert why_not(rounded(nn.GRU(2, 2))) == "quantized before"
    layer = nn.GRU(2, 2)
    layer.weight_hh_l0.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        rounded(layer)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_it_is_stored_and_replayed(kind: Any, tmp_path: Path) -> None:
    net = Recurrent(kind, batch_first=True, bidirectional=True).eval()
    made = copy.deepcopy(net)
    made.rnn = rounded(made.rnn)
    captured = capture(made, INPUTS)
    edits.store(captured, net, tmp_path)
    with torch.no_grad():
        assert torch.equal(edits.replay(tmp_path, copy.deepcopy(net))(X), made(X))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch_eager", "torch_export"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_files_are_smaller_and_agree_with_memory(
    kind: Any, settings: dict[str, Any], runtime: str, tmp_path: Path
) -> None:
    found = plugins.runtime(runtime)
    for package in found.to_run:
        pytest.importorskip(package)
    net = Recurrent(kind, 64, **settings).eval()
    made = copy.deepcopy(net)
    made.rnn = rounded(made.rnn)
    sizes = []
    for i, one in enumerate((net, made)):
        folder = tmp_path / str(i)
        folder.mkdir()
        files = found.export(lower(capture(one, INPUTS), found.takes, INPUTS), folder, INPUTS)
        sizes.append(sum(file.stat().st_size for file in files))
    assert sizes[0] - sizes[1] > 0.6 * 4 * sum(p.numel() for p in net.rnn.parameters())
    runner = found.load(files[0], Target(runtime=runtime, options={"threads": 1}))
    for batch in (X, X[:1]):
        got = next(iter(runner.bind({"x": batch.numpy()})().values()))
        with torch.no_grad():
            assert np.abs(got - made(batch).numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_codes_are_in_the_file_and_nothing_else_is(kind: Any) -> None:
    net = Recurrent(kind, batch_first=True, num_layers=2, bidirectional=True).eval()
    made = copy.deepcopy(net)
    made.rnn = rounded(made.rnn)
    model = lower(made, "onnx", INPUTS)
    written = {each.name: each for each in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes = [node for node in model.graph.node if node.op_type in ("LSTM", "GRU")]
    assert len(nodes) == 2
    for node in nodes:
        for name in node.input[1:3]:
            product = producers[name]
            cast = producers[product.input[0]]
            assert (product.op_type, cast.op_type) == ("Mul", "Cast")
            assert written[cast.input[0]].data_type == 3  # INT8
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}
    plain = lower(net, "onnx", INPUTS)
    assert parameters.count(model) == parameters.count(plain)
    assert macs.count(model, {"x": X.numpy()}) == macs.count(plain, {"x": X.numpy()})
    assert parameters.count(made) == parameters.count(net)


def test_arguments_make_it_again() -> None:
    made = rounded(nn.GRU(6, 5, num_layers=2, bidirectional=True))
    again = RoundedRecurrent(**made.arguments())
    assert again.state_dict().keys() == made.state_dict().keys()
