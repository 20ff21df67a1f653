"""explain(): the counts against arithmetic by hand, the times against the whole, the words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.context import Data
from tersor.core.errors import DataError, ModelError, TargetError
from tersor.core.model import Model
from tersor.core.runtime import Target
from tersor.core.timing import middle_mean
from tersor.explainer import explain
from tests import networks
from tests.command import failing, talk

RUNTIMES = ("onnxruntime", "openvino")


class Reader(nn.Module):
    """Rows of a digit, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, batch_first=True)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x[:, 0])[0][:, -1])


def target(runtime: str) -> Target:
    pytest.importorskip(runtime)
    return Target(runtime=runtime, options={"threads": 1})


def module(net: nn.Module) -> Model:
    return Model(net=net, form="module", origin="test")


def data() -> Data:
    return Data(calibration=networks.split(0, 64), test=networks.split(1200, 1400))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_convolutional_network_is_accounted_for(runtime: str) -> None:
    found = explain(
        module(networks.tiny_cnn()), data(), target=target(runtime), batch=4, budget_s=0.5
    )
    parts = {part.name: part for part in found.parts}
    conv = parts["convolutions"]
    # 1 -> 8; 8 -> 8 twice at 8x8; 8 -> 16, its shortcut, and 16 -> 16 three times at 4x4
    pixels, weights = (
        [64, 64, 64, 16, 16, 16, 16, 16],
        [9 * 8, 9 * 64, 9 * 64, 9 * 128, 9 * 256, 128, 9 * 256, 9 * 256],
    )
    assert conv.macs == 4 * int(np.dot(pixels, weights))
    assert conv.reuse == pytest.approx(conv.macs / sum(weights))
    assert conv.int8_ms > 0
    assert conv.why_float == ""
    assert found.technique == "static"
    assert sum(part.float_ms for part in found.parts) > 0
    assert any(reason.startswith("convolutions take") for reason in found.reasons)
    assert [p.float_ms for p in found.parts] == sorted(p.float_ms for p in found.parts)[::-1]


def test_recurrent_layers_are_told_apart_where_no_operator_takes_integers() -> None:
    x = {"x": torch.rand(8, 1, 8, 8)}
    batches = Data(calibration=[x], test=[x])
    one = explain(module(Reader().eval()), batches, target=target("onnxruntime"), budget_s=0.5)
    other = explain(module(Reader().eval()), batches, target=target("openvino"), budget_s=0.5)
    assert one.technique == other.technique == "dynamic"
    here, there = (
        next(p for p in found.parts if p.name == "recurrent layers") for found in (one, other)
    )
    # eight steps, each reads all weights for one row
    assert here.macs == there.macs == 8 * 4 * 64 * (8 + 64)
    assert here.reuse == there.reuse == 1.0
    assert here.why_float == ""
    assert "no integer operator" in there.why_float
    assert any("stay there: an LSTM" in reason for reason in other.reasons)
    assert any("every step waits for the one before" in reason for reason in one.reasons)


def test_what_cannot_be_explained_is_refused() -> None:
    net = module(networks.tiny_cnn())
    with pytest.raises(TargetError, match=r"torch_eager does not tell .* onnxruntime or openvino"):
        explain(net, data(), target=Target(runtime="torch_eager"))
    with pytest.raises(DataError, match="the data have no batches"):
        explain(net, Data(), target=target("onnxruntime"))
    with pytest.raises(ModelError, match="this one has form 'onnx'"):
        explain(Model(net=None, form="onnx", origin="x.onnx"), data(), target=target("onnxruntime"))


def test_the_network_is_not_changed() -> None:
    net = networks.tiny_cnn()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    explain(module(net), data(), target=target("onnxruntime"), budget_s=0.2)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_profile_tells_the_convolutions(runtime: str, tmp_path: Path) -> None:
    from tersor.ops.lower import lower

    made, inputs = plugins.runtime(runtime), networks.inputs()
    files = made.export(lower(networks.tiny_cnn(), made.takes, inputs), tmp_path, inputs)
    assert made.profile is not None
    batches = [{"x": np.random.rand(2, 1, 8, 8).astype("f")} for _ in range(5)]
    found = made.profile(files[0], target(runtime), batches)
    convolutions = [e for e in found if "Conv" in e.kind]
    assert len(convolutions) == 8
    assert all(each.ms >= 0 for each in found)
    assert sum(each.ms for each in convolutions) > 0


def test_middle_mean_leaves_the_ends_out() -> None:
    assert middle_mean([1.0, 2.0, 4.0, 1000.0]) == 3.0
    assert middle_mean([5.0]) == 5.0


def test_the_verb_tells_and_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "tersor.demo.network:trained", "--data", "digits", "--threads", "1"]
    code, out, _ = talk(capsys, *words, "--budget", "0.3")
    assert code == 0
    assert "int8 by static on onnxruntime:cpu, batch 1, threads 1" in out
    assert "- convolutions take" in out
    code, out, _ = talk(capsys, *words, "--budget", "0.3", "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)["explanation"]
    assert found["comparison"]["speedup"] > 0
    assert {part["name"] for part in found["parts"]} >= {"convolutions", "linear layers"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tersor.demo.network:trained"], "explain runs the network; give --data"),
        (["."], "'.' is not an artifact"),
        (
            ["tersor.demo.network:trained", "--fusion", "--of", "size"],
            "--of is for an artifact or a model file; 'tersor.demo.network:trained' is neither",
        ),
        (["x.onnx", "--of", "sise"], "got 'sise'. Did you mean 'size'?"),
        (["x.onnx", "--of", "size"], "'x.onnx' does not exist"),
        (
            ["a.onnx", "b.onnx", "--technique", "static"],
            "--technique goes with a network in Python",
        ),
        (
            ["tersor.demo.network:trained", "--data", "digits", "--technique", "statik"],
            "is neither static nor dynamic. Did you mean 'static'?",
        ),
        (
            ["tersor.demo.network:trained", "--data", "digits", "--target", "openvno"],
            "unknown runtime 'openvno'. Did you mean 'openvino'?",
        ),
    ],
)
def test_mistakes_end_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = failing(capsys, "explain", *words)
    assert code == 2
    assert message in err
