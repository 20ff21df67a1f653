"""fusions(): counts against graphs made by hand, what steps change, the words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.context import Data
from tersor.core.errors import DataError, TargetError
from tersor.core.model import Inputs, Model
from tersor.core.runtime import Target
from tersor.fusions import Fused, fusions
from tersor.ops.fusion_patterns import find_patterns
from tersor.ops.lower import lower
from tests import networks
from tests.command import failing, talk

RUNTIMES = ("onnxruntime", "openvino")


def target(runtime: str) -> Target:
    pytest.importorskip(runtime)
    return Target(runtime=runtime, options={"threads": 1})


def module(net: nn.Module) -> Model:
    return Model(net=net, form="module", origin="test")


def data() -> Data:
    return Data(calibration=networks.split(0, 64))


def rows(net: nn.Module, runtime: str, batches: Data | None = None) -> dict[str, Fused]:
    found = fusions(module(net), batches or data(), target=target(runtime), steps=False)
    for row in found.rows:
        assert row.found == row.by_export + row.by_runtime + row.partly + row.left, row
    return {row.kind: row for row in found.rows}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_residual_network(runtime: str) -> None:
    """Seven batch norms; four activations behind a convolution, three behind a sum."""
    found = rows(networks.tiny_cnn(trained=False), runtime)
    assert found["layer + batch norm"] == Fused(kind="layer + batch norm", found=7, by_export=7)
    assert found["conv + relu"].found == found["conv + relu"].by_runtime == 4
    # each sum goes into one convolution, also where both branches end in one
    assert found["conv + add + relu"].found == 3
    assert set(found) == {
        "layer + batch norm",
        "conv + relu",
        "conv + add + relu",
        "linear + bias",
    }


def test_a_transformer_on_both_runtimes() -> None:
    one, other = (rows(networks.tiny_transformer(), r) for r in RUNTIMES)
    for found in (one, other):
        assert (found["attention"].found, found["layer norm"].found) == (1, 2)
        assert found["linear + bias"].found == 6
    # ONNX Runtime runs the products and the softmax one by one; OpenVINO in one operator
    assert (one["attention"].by_runtime, other["attention"].by_runtime) == (0, 1)
    # ONNX Runtime: bias and GELU in one, beside the product; OpenVINO: all three
    assert (one["linear + gelu"].partly, other["linear + gelu"].by_runtime) == (1, 1)
    # OpenVINO: scale and shift are a pass of their own
    assert (one["layer norm"].by_runtime, other["layer norm"].partly) == (2, 2)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_lstm_is_one_operator(runtime: str) -> None:
    found = rows(Reader().eval(), runtime, Data(calibration=[{"x": torch.rand(16, 5, 8)}]))
    assert (found["lstm"].found, found["lstm"].by_runtime) == (1, 1)


def test_steps_tell_what_they_add() -> None:
    found = fusions(
        module(networks.written_transformer()), data(), target=target("onnxruntime"), budget_s=0.3
    )
    steps = {step.technique: step for step in found.steps}
    assert {"fuse_batch_norm", "fuse_qkv", "fuse_norm_linear", "fuse_activations"} <= set(steps)
    named = steps["fuse_activations"]
    assert named.comparison is not None
    assert named.operators[1] < named.operators[0]
    assert named.facts["named"] == {"gelu": 1}
    merged = steps["fuse_qkv"]
    assert merged.facts["merged"] == {"qkv": ["q", "k", "v"]}
    bare = fusions(
        module(networks.tiny_cnn(trained=False)), data(), target=target("onnxruntime"), budget_s=0.1
    )
    reasons = {step.technique: step.reason for step in bare.steps}
    assert "no attention that can be fused" in reasons["fuse_attention"]
    assert "no norm can be folded" in reasons["fuse_norm_linear"]


def test_a_file_of_onnx_is_looked_at_as_it_is(tmp_path: Path) -> None:
    model = lower(networks.tiny_cnn(trained=False), "onnx", networks.inputs())
    given = Model(net=model, form="onnx", origin="test", inputs=networks.inputs())
    found = fusions(given, data(), target=target("onnxruntime"), budget_s=0.1)
    assert "layer + batch norm" not in {row.kind for row in found.rows}
    assert {step.technique for step in found.steps} <= {"simplify_graph"}


def test_what_cannot_be_told_is_refused() -> None:
    net = module(networks.tiny_cnn(trained=False))
    with pytest.raises(TargetError, match=r"torch_eager does not tell .* onnxruntime or openvino"):
        fusions(net, data(), target=Target(runtime="torch_eager"))
    with pytest.raises(DataError, match="the data have no batches"):
        fusions(net, Data(), target=target("onnxruntime"))


def test_the_network_is_not_changed() -> None:
    net = networks.written_transformer()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fusions(module(net), data(), target=target("onnxruntime"), budget_s=0.1)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


class Chains(nn.Module):
    """One of each chain that convolutions and products may begin."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.up, self.fc = nn.ConvTranspose2d(4, 4, 2, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        x = F.relu6(self.b(x)) + x
        y = self.c(x)
        x = y + y.mean()  # read twice: nothing may be fused into it
        x = F.relu(self.up(F.hardswish(self.d(x))))
        return torch.tanh(self.fc(x.mean(dim=(2, 3))))


def test_chains_by_hand() -> None:
    inputs = Inputs(example={"x": torch.rand(2, 4, 8, 8)}, dynamic={"x": {0: "batch"}})
    model = lower(Chains().eval(), "onnx", inputs)
    kinds = [pattern.kind for pattern in find_patterns(model)]
    assert kinds == [
        "conv + silu",
        "conv + relu6",
        "conv + hard swish",
        "transposed conv + relu",
        "linear + bias",
        "linear + tanh",
    ]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_operator_is_executed_somewhere(runtime: str, tmp_path: Path) -> None:
    """What a runtime says that it executes covers all convolutions and products of the file."""
    from tersor.ops.onnx_cover import name_of

    net, inputs = networks.tiny_cnn(trained=False), networks.inputs()
    made, model = plugins.runtime(runtime), lower(net, "onnx", inputs)
    files = made.export(model, tmp_path, inputs)
    assert made.fused is not None
    ran = made.fused(files[0], target(runtime))
    names = {name for operator in ran for name in operator.covers}
    wanted = {name_of(n) for n in model.graph.node if n.op_type in ("Conv", "Relu", "Add")}
    assert wanted <= names


def test_the_verb_tells_and_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "tersor.demo.network:trained", "--data", "digits", "--threads", "1"]
    code, out, _ = talk(capsys, *words, "--fusion", "--budget", "0.2")
    assert code == 0
    assert "onnxruntime:cpu, batch 1, threads 1: the runtime executes" in out
    assert "conv + add + relu" in out
    assert "- fuse_batch_norm:" in out
    assert "- fuse_attention: fuse_attention: the network has no attention" not in out
    code, out, _ = talk(capsys, *words, "--fusion", "--budget", "0.2", "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)["fusions"]
    assert {row["kind"] for row in found["rows"]} >= {"layer + batch norm", "conv + relu"}
    assert all(step["technique"] for step in found["steps"])
    code, err = failing(capsys, *words, "--fusion", "--technique", "static")
    assert code == 2
    assert "--fusion tries every fusion technique; leave --technique out" in err
