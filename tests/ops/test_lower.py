import contextlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.errors import ModelError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
from tersor.ops.direct import make_direct
from tersor.ops.lower import form_of, lower
from tests import networks


class ByLength(nn.Module):
    """A class token expanded by `len(x)`, as many vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)).mean(1)


class Unchanged(nn.Module):
    """Returns its second input as it came, twice, beside what a branch made of both."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return y, torch.cond(x.sum() > 0, lambda: x + y, lambda: x - y), y


def run(model, name: str, array: np.ndarray, folder) -> np.ndarray:
    runtime = plugins.runtime("onnxruntime")
    files = runtime.export(model, folder, Inputs(example={}))
    runner = runtime.load(files[0], Target(runtime="onnxruntime", options={"threads": 1}))
    return next(iter(runner.bind({name: array})().values()))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_input_that_is_returned_unchanged_keeps_its_name(runtime, sign, tmp_path):
    pytest.importorskip(runtime)
    x, y = sign * torch.rand(2, 3), torch.rand(2, 3)
    net = lower(Unchanged().eval(), "onnx", Inputs(example={"x": x, "y": y}))
    assert [port.name for port in net.graph.input] == ["x", "y"]
    files = plugins.runtime(runtime).export(net, tmp_path, Inputs(example={}))
    target = Target(runtime=runtime, options={"threads": 1})
    with contextlib.closing(plugins.runtime(runtime).load(files[0], target)) as runner:
        made = runner.bind({"x": x.numpy(), "y": y.numpy()})()
    assert [port.name for port in net.graph.output] == list(made)
    for found, wanted in zip(made.values(), (y, x + sign * y, y), strict=True):
        np.testing.assert_array_equal(found, wanted.numpy())


class Decides(nn.Module):
    """Turns its input round where the sum is negative."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        if self.read:
            return x * int(x.sum().item())
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("read", "line"), [(True, "int(x.sum().item())"), (False, "> 0")])
def test_decisions_by_content_are_refused_with_their_line(read, line, capfd):
    with pytest.raises(ModelError) as caught:
        lower(Decides(read).eval(), "onnx", Inputs(example={"x": torch.randn(2, 4)}))
    message = str(caught.value)
    assert message.startswith("forward of Decides decides by the content of a tensor at ")
    assert "test_lower.py:" in message
    assert line in message
    assert "torch.where" in message
    assert "torch.cond" in message
    assert "torch_eager" in message
    assert capfd.readouterr().err == ""
    assert "print" not in vars(torch.export._trace)


def test_len_of_a_batch_does_not_freeze_it(tmp_path):
    net = ByLength().eval()
    ways = Inputs(example={"x": torch.randn(2, 5, 4)}, dynamic={"x": {0: "batch"}})
    x = torch.randn(7, 5, 4)
    found = run(lower(net, "onnx", ways), "x", x.numpy(), tmp_path)
    # the same sums in another order
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)


def test_nothing_tells_where_it_was_made_and_the_bytes_repeat():
    net = networks.tiny_cnn()
    one, two = (lower(net, "onnx", networks.inputs()).SerializeToString() for _ in range(2))
    assert one == two
    assert not re.search(rb"/(home|root|work|tmp|usr)/", one)
    assert b"networks.py" not in one


class Mixed(nn.Module):
    """Operators that the exporter translates without decomposing them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, groups=2)
        self.same = nn.ConvTranspose2d(2, 3, 3, padding=1, dilation=1, bias=False)
        self.norm, self.fc = nn.LayerNorm(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardtanh(self.down(x), 0.0, 6.0)
        y = torch.cat([self.up(y), self.same(self.up(y))], 1)[:, 1:4] + x
        y = F.gelu(self.norm(y.flatten(2).transpose(1, 2)))
        return self.fc(y).mean(1)


def test_decomposing_nothing_writes_the_same_network(tmp_path):
    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(3, 1, 8, 8)
    ways = Inputs(example={"x": torch.randn(2, 1, 8, 8)}, dynamic={"x": {0: "batch"}})
    straight = lower(net, "onnx", ways)
    # of a program that somebody else holds, the exporter works on a copy
    program = lower(net, "exported", ways)
    whole = lower(program, "onnx", ways)
    assert [n.op_type for n in straight.graph.node] == [n.op_type for n in whole.graph.node]
    found, wanted = (run(model, "x", x.numpy(), tmp_path) for model in (straight, whole))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)
    torch.testing.assert_close(program.module()(x=x), net(x))


def test_upwards_is_refused():
    program = lower(networks.tiny_cnn(), "exported", networks.inputs())
    assert form_of(program) == "exported"
    with pytest.raises(ModelError, match="form 'exported' cannot become 'module' again"):
        lower(program, "module", networks.inputs())


def test_what_is_no_network_is_refused():
    with pytest.raises(ModelError, match=r"expected an nn\.Module, .* or an ONNX model, got int"):
        form_of(3)


def test_an_operator_without_translation_is_named():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    ways = Inputs(example={"x": torch.randn(2, 3, 3)})
    with pytest.raises(ModelError, match="cannot be written as ONNX"):
        lower(Odd().eval(), "onnx", ways)


DIRECTLY = {
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), (2, 3, 8, 8)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (2, 3, 8, 8)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (2, 3, 8, 8)),
    "cat": (lambda x: torch.cat([x, x], 1), (2, 3)),
    "embedding": (lambda x: F.embedding((x > 0).long(), torch.ones(2, 4)), (2, 3)),
    "expand": (lambda x: x[:, None].expand(-1, 5, -1), (2, 3)),
    "gelu": (F.gelu, (2, 3)),
    "hardtanh": (F.relu6, (2, 3)),
    "layer_norm": (lambda x: F.layer_norm(x, (3,)), (2, 3)),
    "mean": (lambda x: x.mean((2, 3)), (2, 3, 8, 8)),
    "new_zeros": (lambda x: torch.cat([x, x.new_zeros(x.shape)], 1), (2, 3)),
    "pad": (lambda x: F.pad(x, (1, 2)), (2, 3)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 3, 4, 8)),
    "select": (lambda x: x[:, 1] + x.unbind(1)[0], (2, 3)),
    "arange": (lambda x: x + F.embedding(torch.arange(3), torch.ones(3, 3)), (2, 3, 3)),
    "chunk": (lambda x: x.chunk(3, -1)[1] / 2, (2, 3, 6)),
    "masked_fill": (lambda x: torch.zeros_like(x).masked_fill_(~(x > 0), -1.0), (2, 3)),
    "to": (lambda x: (x > 0).to(torch.float32).sum(1), (2, 3)),
    "unflatten": (lambda x: x.unflatten(-1, (2, 3)).unsqueeze(1), (2, 5, 6)),
}


@pytest.mark.parametrize("name", DIRECTLY)
def test_what_is_written_without_decomposition(name: str) -> None:
    """Alone, so that no operator beside it asks for a decomposition of the whole."""
    pytest.importorskip("onnxruntime")
    call, shape = DIRECTLY[name]

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    x = torch.randn(shape)
    model = lower(Net().eval(), "onnx", Inputs(example={"x": x}, dynamic={"x": {0: "batch"}}))
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = torch.randn(5, *shape[1:])
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), call(x), rtol=1e-4, atol=1e-5)


def test_what_masks_and_means_are_made_of_is_only_spelled_otherwise() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            low = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -9.0)
            parts = [part.unflatten(-1, (2, 1)) for part in x.chunk(3, -1)]
            kept = mask.unsqueeze(-1).to(torch.float32)
            mean = (x * kept).sum(1) / kept.sum(1)
            return torch.cat([mean, low, parts[1][:, 0, :, 0]], 1)

    given = {"x": torch.randn(2, 4, 6), "mask": torch.randn(2, 4) > -1}
    program = torch.export.export(
        Net(), (), kwargs=given, dynamic_shapes={k: {0: torch.export.Dim("n")} for k in given}
    )
    assert make_direct(program, ())
    torch.testing.assert_close(program.module()(**given), Net()(**given))


def test_what_writes_into_shared_memory_is_left_to_a_decomposition() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            y[:, :1].masked_fill_(x[:, :1] > 0, 1.0)
            return y + x

    x = torch.randn(4, 3)
    program = torch.export.export(Net().eval(), (x,))
    assert not make_direct(program, ())
    torch.testing.assert_close(program.module()(x), Net()(x))


def test_free_sizes_become_those_of_the_example():
    """What takes batches of one size only is given them, in whatever form a network came."""
    net = networks.tiny_cnn().eval()
    free = networks.inputs()
    fixed = Inputs(example={name: tensor[:1] for name, tensor in free.example.items()})
    (name,) = free.example
    program = lower(net, "exported", free)
    made = lower(program, "exported", fixed)
    shapes = [tuple(n.meta["val"].shape) for n in made.graph.nodes if n.op == "placeholder"]
    assert (1, 1, 8, 8) in shapes
    with torch.no_grad():
        wanted = net(fixed.example[name])
        assert torch.allclose(made.module()(**fixed.example), wanted, atol=1e-6)
    model = lower(net, "onnx", free)
    sized = lower(model, "onnx", fixed)
    dims = sized.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [1, 1, 8, 8]
    assert [d.dim_value for d in sized.graph.output[0].type.tensor_type.shape.dim] == [1, 10]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # untouched
    assert lower(sized, "onnx", fixed) is sized
    assert lower(program, "exported", free) is program
