"""xla: outputs agree with PyTorch, in any batch; refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.core.errors import TargetError
from tersor.core.runtime import Target
from tersor.quantization.static import Static, static
from tests import networks
from tests.runtimes.compilers import exported, largest_difference, needs, run

SIZE = 2


@pytest.mark.slow
def test_agrees_with_pytorch_in_any_batch(tmp_path: Path) -> None:
    runtime = needs("xla")
    net, x = networks.tiny_cnn(), torch.rand(5, 1, 8, 8)
    files = exported(runtime, net, x[:SIZE], tmp_path)
    for count in (SIZE, 5, 1):
        made = run(runtime, "xla", files[0], {"x": x[:count].numpy()})
        assert largest_difference(net, x[:count], made) < 1e-5


@pytest.mark.slow
def test_rounds_as_memory_does(tmp_path: Path, tiny_context: Any) -> None:
    runtime = needs("xla")
    net = networks.tiny_cnn()
    quantized = static(net, Static(), tiny_context(net))
    x = torch.rand(5, 1, 8, 8)
    files = exported(runtime, quantized, x[:SIZE], tmp_path)
    made = run(runtime, "xla", files[0], {"x": x.numpy()})
    assert largest_difference(quantized, x, made) < 0.03  # a rounding may fall the other way


@pytest.mark.slow
def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    runtime = needs("xla")
    files = exported(runtime, networks.tiny_cnn(), torch.rand(SIZE, 1, 8, 8), tmp_path)
    files[0].write_bytes(b"not a network")
    with pytest.raises(TargetError, match="cannot load model"):
        runtime.load(files[0], Target(runtime="xla"))
