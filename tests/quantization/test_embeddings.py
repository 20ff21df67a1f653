"""Embeddings with int8 rows, in every step that rounds weights."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.context import Context, Data
from tersor.core.errors import ModelError, RecipeError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops import edits
from tersor.ops.lower import lower
from tersor.ops.modules import QuantEmbedding, quantized_embedding
from tests import networks

TOKENS = torch.arange(24).view(4, 6) % 40
BATCH = {"tokens": TOKENS}
INPUTS = Inputs(example={"tokens": TOKENS[:2]}, dynamic={"tokens": {0: "batch"}})
STEPS = ("static", "dynamic", "weight_only", "mixed_precision")


class Reader(nn.Module):
    """Two tables, one of them for positions, and a linear layer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(40, 16, padding_idx=0), nn.Embedding(6, 16)
        self.fc, self.tied = nn.Linear(16, 3), tied

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.table(tokens) + self.place(torch.arange(6)))
        return F.linear(x.mean(1), self.table.weight) if self.tied else self.fc(x.mean(1))


def applied(net: nn.Module, step: str, folder: Path, **settings: Any) -> tuple[nn.Module, Context]:
    context = networks.context(
        net,
        folder,
        inputs=INPUTS,
        data=Data(calibration=[BATCH], train=[{**BATCH, "labels": torch.arange(4) % 3}]),
    )
    technique = plugins.technique(step)
    made = technique.apply(copy.deepcopy(net), technique.config(**settings), context)
    return made.eval(), context


def test_rows_are_rounded_each_by_its_own_scale() -> None:
    table = nn.Embedding(7, 5)
    with torch.no_grad():
        table.weight[2], table.weight[3] = 0, table.weight[3] * 1e-4
    made = quantized_embedding(table)
    for row, found in zip(table.weight.detach().double().numpy(), made.values(), strict=True):
        step = np.abs(row).max() / 127 or 1.0
        np.testing.assert_allclose(found.numpy(), np.rint(row / step) * step, rtol=1e-5, atol=1e-12)
    x = torch.tensor([[0, 3], [6, 2]])
    assert torch.equal(made(x), made.values()[x])
    grid = made.grid()
    assert torch.equal((made.weight - grid.zero) * grid.scale, made.values())


@pytest.mark.parametrize("step", STEPS)
def test_every_step_that_rounds_weights_rounds_embeddings(step: str, tmp_path: Path) -> None:
    net = Reader().eval()
    made, context = applied(net, step, tmp_path)
    assert isinstance(made.get_submodule("table"), QuantEmbedding)
    assert isinstance(made.get_submodule("place"), QuantEmbedding)
    assert context.facts["embeddings"] == 2
    with torch.no_grad():
        assert (made(TOKENS) - net(TOKENS)).abs().max() < 0.1
    edits.store(made, net, tmp_path)
    with torch.no_grad():
        assert torch.equal(edits.replay(tmp_path, net)(TOKENS), made(TOKENS))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch_export", "torch_eager"])
def test_files_hold_bytes_and_answer_alike(name: str, tmp_path: Path) -> None:
    if name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    net = Reader().eval()
    made, _ = applied(net, "weight_only", tmp_path)
    runtime, target = plugins.runtime(name), Target(runtime=name, options={"threads": 1})
    folder = tmp_path / name
    folder.mkdir()
    files = runtime.write(lower(made, runtime.takes, INPUTS), folder, INPUTS, target)
    runner = runtime.open(files[0], target)
    with torch.no_grad():
        wanted = made(TOKENS).numpy()
    (found,) = runner.bind({"tokens": TOKENS.numpy()})().values()
    np.testing.assert_allclose(found, wanted, atol=0.02)  # integers may be multiplied by bytes
    runner.close()


def test_a_file_for_onnxruntime_holds_no_float_table(tmp_path: Path) -> None:
    import onnx

    made, _ = applied(Reader().eval(), "static", tmp_path)
    model = lower(made, "onnx", INPUTS)
    assert isinstance(model, onnx.ModelProto)
    floats = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    # positions never change, so the exporter looks them up
    assert max(int(np.prod(i.dims)) for i in floats) == TOKENS.shape[1] * 16


def test_scales_are_powers_of_two_where_all_are_to_be(tmp_path: Path) -> None:
    made, _ = applied(Reader().eval(), "static", tmp_path, power_of_two=True, symmetric=True)
    scale = made.get_submodule("table").scale
    assert isinstance(scale, Tensor)
    assert torch.equal(scale.log2(), scale.log2().round())


def test_patterns_leave_them_and_must_fit(tmp_path: Path) -> None:
    net = Reader().eval()
    made, context = applied(net, "static", tmp_path, layers=Layers(patterns=("!table",)))
    assert isinstance(made.get_submodule("table"), nn.Embedding)
    assert isinstance(made.get_submodule("place"), QuantEmbedding)
    assert context.facts["left_in_float"] == {"table": "excluded by layers"}
    with pytest.raises(RecipeError, match=r"'!tabel' matches no layer. Did you mean 'table'"):
        applied(net, "weight_only", tmp_path, layers=Layers(patterns=("!tabel",)))


def test_a_table_that_is_read_elsewhere_stays(tmp_path: Path) -> None:
    net = Reader(tied=True).eval()
    made, context = applied(net, "weight_only", tmp_path)
    assert isinstance(made.get_submodule("table"), nn.Embedding)
    reasons = context.facts["left_in_float"]
    assert reasons == {"table": "an embedding whose table is read elsewhere, too"}


def test_tables_that_cannot_be_rounded(tmp_path: Path) -> None:
    net = Reader().eval()
    net.place.max_norm = 1.0
    with torch.no_grad():
        net.table.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="layer 'table' cannot be quantized"):
        applied(net, "weight_only", tmp_path)
    net.table = nn.Embedding(40, 16)
    _, context = applied(net, "weight_only", tmp_path)
    assert context.facts["left_in_float"] == {"place": "an embedding with max_norm"}


def test_training_leaves_them(tmp_path: Path) -> None:
    _, context = applied(Reader().eval(), "qat", tmp_path, epochs=0)
    reason = "an embedding; training leaves it as it is"
    assert context.facts["left_in_float"] == {"table": reason, "place": reason}
