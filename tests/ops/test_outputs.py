"""A step that changes outputs is refused."""

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import StepError
from tersor.core.model import Inputs
from tersor.ops.outputs import check_same, outputs_of


class Two(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"twice": self.factor * x}


def test_outputs_are_compared_one_by_one() -> None:
    inputs = Inputs(example={"x": torch.randn(4, 3)})
    wanted = outputs_of(Two(2.0), inputs)
    assert len(wanted) == 2
    check_same(wanted, Two(2.0 + 1e-6), inputs)
    with pytest.raises(StepError, match=r"changed output 1 by 0\.001 of its size"):
        check_same(wanted, Two(2.002), inputs)
    with pytest.raises(StepError, match="changed 1 outputs to 2"):
        check_same(wanted[:1], Two(2.0), inputs)
    with pytest.raises(StepError, match="changed output 1 by nan"):
        check_same(wanted, Two(float("nan")), inputs)
