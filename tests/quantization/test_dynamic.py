"""Dynamic quantization: the arithmetic, LSTMs on ONNX Runtime, what stays in float."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.context import Context, Data
from tersor.core.errors import ModelError, RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.metrics import macs, parameters
from tersor.ops.dynamic import QuantDynamicLinear
from tersor.ops.edits import replay, store
from tersor.ops.lower import lower
from tersor.quantization.dynamic import Dynamic, dynamic
from tests import networks


class Recurrent(nn.Module):
    """A recurrent layer, the mean over time, and a head."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 5, **settings)
        width = self.rnn.proj_size or self.rnn.hidden_size
        self.head = nn.Linear(width * (1 + self.rnn.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y.mean(1 if self.rnn.batch_first else 0))


X = torch.linspace(-2, 3, 4 * 7 * 6).sin().view(4, 7, 6)
INPUTS = Inputs(example={"x": X}, dynamic={"x": {0: "batch"}})


def quantized(
    net: nn.Module, tmp_path: Path, runtime: str = "onnxruntime", config: Any = None
) -> tuple[nn.Module, Context]:
    context = networks.context(
        net, tmp_path, inputs=INPUTS, data=Data(), target=Target(runtime=runtime)
    )
    return dynamic(copy.deepcopy(net).eval(), config or Dynamic(), context), context


def bytes_of(x: np.ndarray) -> tuple[np.ndarray, float]:
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return np.clip(np.rint(x / scale) + zero, 0, 255) - zero, scale


def test_a_linear_layer_computes_what_it_says() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(7, 6)
    scale = layer.weight.detach().abs().amax(1) / 127
    made = QuantDynamicLinear.of(layer, scale)(x).detach()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    codes, step = bytes_of(x.double().numpy())
    for t in range(7):
        for o in range(5):
            total = sum(codes[t, i] * round(float(weight[o, i] / scale[o])) for i in range(6))
            wanted = total * step * float(scale[o]) + float(bias[o])
            assert float(made[t, o]) == pytest.approx(wanted, abs=1e-5)  # float32 sums


def test_an_lstm_computes_what_it_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Recurrent(batch_first=True)
    made, _ = quantized(net, tmp_path)
    rnn: Any = net.rnn

    def rounded(weight: Tensor) -> np.ndarray:
        plain = weight.detach().double().numpy()
        scale = np.abs(plain).max(1, keepdims=True) / 127
        return np.rint(plain / scale) * scale

    inner, outer = rounded(rnn.weight_hh_l0), rounded(rnn.weight_ih_l0)
    bias = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach().double().numpy()
    codes, step = bytes_of(X.transpose(0, 1).double().numpy())
    h = c = np.zeros((4, 5))
    outputs = []
    for t in range(7):
        own, scale = bytes_of(h) if h.any() else (h, 1.0)
        gates = codes[t] * step @ outer.T + own * scale @ inner.T + bias
        i, f, g, o = np.split(gates, 4, 1)
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
        outputs.append(h)
    with torch.no_grad():
        found, _ = made.get_submodule("rnn")(X)
    # a value between two codes may fall the other way in float32: one of 255 codes of one input
    assert np.abs(found.transpose(0, 1).numpy() - np.stack(outputs)).max() < 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_first": True},
        {"batch_first": True, "num_layers": 2, "bidirectional": True},
        {"batch_first": True, "bias": False},
    ],
)
def test_lstms_run_in_integers_on_onnxruntime(settings: dict[str, Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx

    torch.manual_seed(0)
    net = Recurrent(**settings).eval()
    made, context = quantized(net, tmp_path)
    assert context.facts == {"layers": 2, "embeddings": 0, "left_in_float": {}}
    model = lower(made, "onnx", INPUTS)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["DynamicQuantizeLSTM"] == settings.get("num_layers", 1)
    assert kinds["DynamicQuantizeMatMul"] == 1
    assert not kinds["MatMul"] + kinds["Gemm"] + kinds["LSTM"]
    for batch in (1, 4):
        with torch.no_grad():
            wanted, exact = made(X[:batch]), net(X[:batch])
        found = session.run(None, {"x": X[:batch].numpy()})[0]
        # codes that fall the other way, over seven steps
        assert np.abs(found - wanted.numpy()).max() < 0.02
        assert (wanted - exact).abs().max() < 0.05
        assert not torch.equal(wanted, exact)


def test_time_first_and_a_given_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Recurrent(num_layers=2, bidirectional=True).eval()
    made, _ = quantized(net, tmp_path)
    with torch.no_grad():
        state = tuple(torch.randn(2, 4, 4, 5))
        y, (h, c) = net.rnn(X.transpose(0, 1), state)
        found, (found_h, found_c) = made.get_submodule("rnn")(X.transpose(0, 1), state)
    for a, b in ((y, found), (h, found_h), (c, found_c)):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # oneDNN has none
def test_what_stays_in_float_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, context = quantized(Recurrent(batch_first=True), tmp_path, "openvino")
    assert isinstance(made.get_submodule("rnn"), nn.LSTM)
    reason = "an LSTM, for which openvino:cpu has no integer operator"
    assert context.facts["left_in_float"]["rnn"] == reason
    _, context = quantized(Recurrent(batch_first=True), tmp_path, "torch_export")
    assert context.facts["left_in_float"]["rnn"].startswith("an LSTM, for which torch_export:cpu")
    made, context = quantized(Recurrent(nn.GRU, batch_first=True), tmp_path)
    assert context.facts["left_in_float"]["rnn"].startswith("a GRU, which no runtime")
    made, context = quantized(Recurrent(batch_first=True, proj_size=2), tmp_path)
    assert context.facts["left_in_float"]["rnn"] == "an LSTM with a projection"
    config = Dynamic(layers=Layers(patterns=("!rnn",)))
    made, context = quantized(Recurrent(batch_first=True), tmp_path, config=config)
    assert context.facts["left_in_float"] == {"rnn": "excluded by layers"}


def test_openvino_reads_the_linear_layers(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    net = networks.tiny_transformer()
    context = networks.context(net, tmp_path, target=Target(runtime="openvino"))
    made = dynamic(copy.deepcopy(net), Dynamic(), context)
    found = plugins.runtime("openvino")
    files = found.export(lower(made, "onnx", networks.inputs()), tmp_path, networks.inputs())
    runner = found.load(files[0], Target(runtime="openvino", options={"threads": 1}))
    x = networks.digits()[0][:4]
    outputs = next(iter(runner.bind({"x": x.numpy()})().values()))
    with torch.no_grad():
        assert np.abs(outputs - made(x).numpy()).max() < 0.05
    runner.close()


def test_is_stored_and_replayed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Recurrent(num_layers=2, bidirectional=True, batch_first=True).eval()
    made, _ = quantized(net, tmp_path)
    store(made, net, tmp_path)
    again = replay(tmp_path, copy.deepcopy(net))
    with torch.no_grad():
        assert torch.equal(again(X), made(X))


def test_bad_networks_and_patterns_are_refused(tmp_path: Path) -> None:
    broken = Recurrent(batch_first=True)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="layer 'head' cannot be quantized: its weights hold NaN"):
        quantized(broken, tmp_path)
    with pytest.raises(RecipeError, match="pattern 'hed' matches no layer"):
        quantized(
            Recurrent(batch_first=True), tmp_path, config=Dynamic(layers=Layers(patterns=("hed",)))
        )
    config = Dynamic(layers=Layers(patterns=("!*",)))
    with pytest.raises(UnfitError, match="no layer can be quantized dynamically"):
        quantized(Recurrent(batch_first=True), tmp_path, config=config)


def test_multiplications_and_numbers_are_counted_as_before(tmp_path: Path) -> None:
    net = Recurrent(num_layers=2, bidirectional=True, batch_first=True).eval()
    made, _ = quantized(net, tmp_path)
    wanted = macs.count(net, {"x": X.numpy()})
    assert wanted > 0
    assert macs.count(made, {"x": X.numpy()}) == wanted
    assert parameters.count(made) == parameters.count(net)
    model = lower(made, "onnx", INPUTS)
    assert macs.count(model, {"x": X.numpy()}) == wanted
    # the scale of each output of the head is a constant like any other there
    assert parameters.count(model) == parameters.count(net) + 3


def test_an_exported_program_loads_in_a_fresh_process(tmp_path: Path) -> None:
    made, _ = quantized(Recurrent(batch_first=True), tmp_path)
    runtime = plugins.runtime("torch_export")
    file = runtime.export(lower(made, "exported", INPUTS), tmp_path, INPUTS)[0]
    code = (
        "import sys; from pathlib import Path; from tersor.ops import pt2; "
        "pt2.read(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Named(nn.Module):
    """One sequence without a batch, layers called by the name of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.rnn(input=x)
        return self.head(input=y.mean(0)) + h.sum()


def test_one_sequence_and_inputs_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Named().eval()
    inputs = Inputs(example={"x": X[0]}, dynamic={})
    context = networks.context(net, tmp_path, inputs=inputs, data=Data())
    made = dynamic(copy.deepcopy(net), Dynamic(), context)
    with torch.no_grad():
        assert (made(X[0]) - net(X[0])).abs().max() < 0.05


def test_a_second_time_finds_nothing(tmp_path: Path) -> None:
    made, context = quantized(Recurrent(batch_first=True), tmp_path)
    with pytest.raises(UnfitError, match=r"rnn: quantized before; head: quantized before"):
        dynamic(made, Dynamic(), context)


def test_a_layer_called_twice_is_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, shared, nn.Linear(6, 2)).eval()
    context = networks.context(
        net, tmp_path, inputs=Inputs(example={"input": X}, dynamic={}), data=Data()
    )
    made = dynamic(copy.deepcopy(net), Dynamic(), context)
    assert context.facts["layers"] == 2
    with torch.no_grad():
        assert (made(X) - net(X)).abs().max() < 0.05
