import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core import plugins
from tersor.core.errors import ModelError
from tersor.core.model import Inputs
from tersor.core.runtime import Target
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


def run(model, name: str, array: np.ndarray, folder) -> np.ndarray:
    runtime = plugins.runtime("onnxruntime")
    files = runtime.export(model, folder, Inputs(example={}))
    runner = runtime.load(files[0], Target(runtime="onnxruntime", options={"threads": 1}))
    return next(iter(runner.bind({name: array})().values()))


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
