"""Sparse layers: our kernel and torch's against float64, the same gradients, bad files refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.core.model import Inputs
from tersor.ops import edits, native, pt2
from tersor.ops.lower import lower
from tersor.ops.sparse import SparseConv2d, SparseLinear, sparse, why_dense


@pytest.fixture(params=["our kernel", "torch"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test with and without a compiled kernel; both are what users run."""
    if request.param == "torch":
        nothing = native.Build(library=None, note="none in this test")
        monkeypatch.setattr(native, "build", lambda: nothing)
    elif native.build().library is None:
        pytest.skip(native.build().note)
    return str(request.param)


def pruned(layer: Any, zeros: float) -> Any:
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < zeros] = 0
    return layer.eval()


def close(made: Tensor, wanted: Tensor, terms: int) -> None:
    """Within what sums of so many float32 terms in another order may differ."""
    assert made.dtype is torch.float32
    made, wanted = made.detach(), wanted.detach()
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    assert made.shape == wanted.shape
    assert float((made.double() - wanted).abs().max() if made.numel() else 0) <= (
        2**-23 * 4 * max(terms, 4) * max(scale, 1e-3)
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 65])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 5), (16, 7), (37, 64), (130, 33)])
def test_linear_is_the_product(executor: str, rows: int, inputs: int, outputs: int) -> None:
    layer = pruned(nn.Linear(inputs, outputs, bias=rows % 2 == 0), 0.7)
    x = torch.randn(rows, inputs)
    made = sparse(layer)(x)
    bias = None if layer.bias is None else layer.bias.double()
    close(made, F.linear(x.double(), layer.weight.double(), bias), inputs)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "size"),
    [
        (1, 1, 0, 1, (6, 6)),
        (1, 1, 0, 1, (1, 1)),
        (1, 2, 0, 1, (9, 7)),
        (1, 1, 1, 1, (4, 5)),
        (3, 1, 1, 1, (7, 9)),
        (3, 1, 0, 1, (3, 3)),
        (3, 2, 1, 1, (8, 8)),
        (3, (2, 1), (0, 1), 1, (9, 6)),
        (3, 2, 2, 2, (11, 13)),
        ((5, 2), 3, (2, 0), 1, (10, 17)),
        (3, 1, "same", 2, (6, 7)),
        (2, 1, "valid", 1, (5, 40)),
    ],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_convolution_is_that_of_torch(
    executor: str, kernel: Any, stride: Any, padding: Any, dilation: int, size: Any, samples: int
) -> None:
    layer = pruned(
        nn.Conv2d(3, 5, kernel, stride, padding, dilation=dilation, bias=samples == 1), 0.6
    )
    x = torch.randn(samples, 3, *size)
    double = copy.deepcopy(layer).double()
    close(sparse(layer)(x), double(x.double()), layer.weight[0].numel())


def test_empty_rows_all_zeros_and_no_zeros(executor: str) -> None:
    x = torch.randn(6, 12)
    layer = pruned(nn.Linear(12, 9), 0)
    close(sparse(layer)(x), layer.double()(x.double()), 12)
    layer = pruned(nn.Linear(12, 9), 0)
    layer.weight.data[[0, 4, 8]] = 0
    close(sparse(layer)(x), layer.double()(x.double()), 12)
    layer = pruned(nn.Linear(12, 9), 1.1)
    made = sparse(layer)
    assert made.count == 0
    assert torch.equal(made(x), layer.bias.expand(6, 9))


def test_any_layout_any_leading_dimensions_no_samples(executor: str) -> None:
    layer = pruned(nn.Linear(20, 8), 0.5)
    made = sparse(layer)
    x = torch.randn(20, 6, 4).permute(2, 1, 0)
    assert not x.is_contiguous()
    close(made(x), layer.double()(x.double()), 20)
    assert made(torch.randn(20)).shape == (8,)
    assert made(torch.randn(0, 20)).shape == (0, 8)
    image = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    conv = pruned(nn.Conv2d(3, 4, 3, 1, 1), 0.5)
    close(sparse(conv)(image), copy.deepcopy(conv).double()(image.double()), 27)
    assert sparse(conv)(torch.randn(0, 3, 6, 6)).shape == (0, 4, 6, 6)
    assert made(torch.randn(2, 20).bfloat16()).dtype is torch.bfloat16


def test_nan_and_infinity_pass_through_weights_that_are_left(executor: str) -> None:
    """Where the weight is zero, they stop: dense, 0 * NaN is NaN."""
    layer = nn.Linear(4, 3, bias=False).eval()
    layer.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
    x = torch.tensor([[float("nan"), float("inf"), 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    made = sparse(layer)(x)
    assert made[0].isnan().tolist() == [True, False, False]
    assert made[0, 1] == float("inf")
    assert made[1].tolist() == [1, 2, 0]


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 7), lambda: nn.Conv2d(3, 4, 3, 2, 1)])
def test_gradients_are_those_of_the_dense_layer(executor: str, make: Any) -> None:
    layer = pruned(make(), 0.5)
    made = sparse(layer)
    x = torch.randn(5, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 7, 7)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).square().sum().backward()
    made(b).square().sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(b.grad, a.grad)
    left = layer.weight.detach().flatten(1) != 0
    torch.testing.assert_close(made.values.grad, layer.weight.grad.flatten(1)[left])
    torch.testing.assert_close(made.bias.grad, layer.bias.grad)


def network() -> tuple[nn.Module, nn.Module, Tensor]:
    dense = nn.Sequential(
        pruned(nn.Conv2d(1, 6, 3, 2, 1), 0.8),
        nn.ReLU(),
        nn.Flatten(),
        pruned(nn.Linear(96, 10), 0.8),
    ).eval()
    made = nn.Sequential(sparse(dense[0]), dense[1], dense[2], sparse(dense[3])).eval()
    return dense, made, torch.randn(4, 1, 8, 8)


def test_stored_and_replayed_without_pickle(tmp_path: Path) -> None:
    dense, made, x = network()
    edits.store(made, dense, tmp_path)
    again = edits.replay(tmp_path, copy.deepcopy(dense))
    assert isinstance(again[0], SparseConv2d)
    assert isinstance(again[3], SparseLinear)
    assert torch.equal(again(x), made(x))
    assert str(again) == str(made)


def test_exported_and_read_again_with_a_free_batch(tmp_path: Path) -> None:
    _, made, x = network()
    program = lower(made, "exported", Inputs(example={"input": x}, dynamic={"input": {0: "batch"}}))
    torch.export.save(program, tmp_path / "net.pt2")
    again = pt2.read(tmp_path / "net.pt2").module()
    for rows in (1, 3, 4):
        assert torch.equal(again(input=x[:rows]), made(x[:rows]))


def test_onnx_is_refused_with_what_to_do() -> None:
    _, made, x = network()
    with pytest.raises(ModelError, match=r"cannot be written as ONNX, .* such as torch_export"):
        lower(made, "onnx", Inputs(example={"input": x}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda net: net.columns.fill_(99),
        lambda net: net.ends.__setitem__(-1, 10_000),
        lambda net: net.ends.__setitem__(2, -5),
        lambda net: setattr(net, "ends", net.ends.flip(0)),
        lambda net: setattr(net, "columns", net.columns[:-3]),
        lambda net: setattr(net, "columns", net.columns.int()),
        lambda net: setattr(net, "bias", nn.Parameter(torch.zeros(2))),
    ],
)
def test_positions_out_of_range_never_reach_the_kernel(executor: str, damage: Any) -> None:
    made = sparse(pruned(nn.Linear(12, 9), 0.5))
    damage(made)
    with pytest.raises(ModelError, match="do not fit 12 inputs or each other; the file is damaged"):
        made(torch.randn(4, 12))


def test_an_input_of_another_width_is_refused(executor: str) -> None:
    layer = pruned(nn.Linear(12, 9), 0)
    with pytest.raises(ModelError, match="do not fit 5 inputs"):
        sparse(layer)(torch.randn(4, 5))
    with pytest.raises(ModelError, match=r"a kernel of \(5, 5\) does not fit images of \(3, 3\)"):
        sparse(pruned(nn.Conv2d(1, 1, 5), 0))(torch.randn(1, 1, 3, 3))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "a convolution with 2 groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "padding 'same' of an even kernel"),
        (nn.Linear(4, 4).double(), "its weights are float64"),
        (nn.Conv1d(4, 4, 3), "Conv1d has no sparse form here"),
        (nn.Linear(70_000, 1), "70000 inputs, more than 65536"),
    ],
)
def test_what_stays_dense_and_why(layer: nn.Module, reason: str) -> None:
    assert reason in str(why_dense(layer))


def test_products_that_are_left_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    _, made, x = network()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made(x)
    assert counter.get_total_flops() == 2 * 4 * (16 * made[0].count + made[3].count)
