"""Projections of one input become one layer; outputs stay to the bit or to rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.candidate import arrays_of, export
from tersor.core.errors import RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.fusion.fuse_qkv import FuseQkv, fuse_qkv
from tersor.ops import edits
from tersor.ops.fake_quantize import settle
from tersor.quantization.static import Static, static
from tests import networks


class Grouped(nn.Module):
    """Four heads of queries, two of keys and values, which come from `y` where it is given."""

    def __init__(self, share: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 16)
        self.k_proj = nn.Linear(8, 8, bias=False)
        self.v_proj = self.k_proj if share else nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q = self.q_proj(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k = self.k_proj(y).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, dim=1)
        v = self.v_proj(y).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def given(*names: str) -> Inputs:
    example = {name: torch.randn(2, 5, 8) for name in names}
    return Inputs(example=example, dynamic={name: {0: "batch"} for name in names})


def test_rows_are_put_on_top_of_one_another(tiny_context: Callable[..., Any]) -> None:
    net, inputs = Grouped().eval(), given("x")
    wanted = net(**inputs.example)
    weights = [net.q_proj.weight, net.k_proj.weight, net.v_proj.weight]
    biases = [net.q_proj.bias, torch.zeros(8), net.v_proj.bias]
    context = tiny_context(net, inputs=inputs)
    made = fuse_qkv(net, FuseQkv(), context)
    assert torch.equal(made.qkv.weight, torch.cat(weights))
    assert torch.equal(made.qkv.bias, torch.cat(biases))
    assert context.facts["merged"] == {"qkv": ["q_proj", "k_proj", "v_proj"]}
    assert [n for n, m in made.named_modules() if isinstance(m, nn.Linear)] == ["qkv"]
    # another kernel may sum the products in another order
    torch.testing.assert_close(made(**inputs.example), wanted, rtol=1e-5, atol=1e-6)


def test_cross_attention_merges_keys_and_values(tiny_context: Callable[..., Any]) -> None:
    net, inputs = Grouped().eval(), given("x", "y")
    context = tiny_context(net, inputs=inputs)
    fuse_qkv(net, FuseQkv(), context)
    assert context.facts["merged"] == {"kv": ["k_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("net", "inputs", "layers", "message"),
    [
        (networks.TinyCnn(), networks.inputs(), Layers(), "no attention with linear projections"),
        (networks.TinyTransformer(), networks.inputs(), Layers(), "qkv is one layer already"),
        (Grouped(share=True), given("x", "y"), Layers(), "k_proj, .* called twice"),
        (Grouped(), given("x"), Layers(patterns=("q_proj",)), "k_proj, v_proj excluded"),
    ],
)
def test_nothing_to_merge_is_said(
    net: nn.Module,
    inputs: Inputs,
    layers: Layers,
    message: str,
    tiny_context: Callable[..., Any],
) -> None:
    net.eval()
    with pytest.raises(UnfitError, match=rf"fuse_qkv: no projections to merge \(.*{message}"):
        fuse_qkv(net, FuseQkv(layers=layers), tiny_context(net, inputs=inputs))


def test_misspelt_layer(tiny_context: Callable[..., Any]) -> None:
    net = Grouped().eval()
    config = FuseQkv(layers=Layers(patterns=("q_pro",)))
    with pytest.raises(RecipeError, match=r"'q_pro' matches no layer. Did you mean 'q_proj'"):
        fuse_qkv(net, config, tiny_context(net, inputs=given("x")))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_integers_after_merging(
    runtime: str, tiny_context: Callable[..., Any], tmp_path: Path
) -> None:
    """A stage [fuse_qkv, static]: one integer product, the runtime agrees, the result replays."""
    target = Target(runtime=runtime, options={"threads": 1})
    net, x = networks.written_transformer(), networks.digits()[0][:64]
    with torch.no_grad():
        classes = net(x).argmax(1)
    context = tiny_context(net, target=target)
    made = settle(static(fuse_qkv(net, FuseQkv(), context), Static(), context)).eval()
    assert type(made.qkv).__name__ == "QuantLinear"
    with torch.no_grad():
        assert float((made(x).argmax(1) == classes).float().mean()) > 0.9
    sample = arrays_of({"x": x}, ["x"])
    export(made, tmp_path / "target", networks.inputs(), target, sample).close()
    (tmp_path / "stored").mkdir()
    edits.store(made, networks.written_transformer(), tmp_path / "stored")
    again = edits.replay(tmp_path / "stored", networks.written_transformer())
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
