"""Names of what an exported program returns."""

import pytest
import torch
from torch import Tensor, nn

from tersor.core.model import Inputs
from tersor.ops.exported_names import output_names
from tersor.ops.lower import lower


class Pair(nn.Module):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return input, input + 1


class Named(nn.Module):
    def forward(self, input: Tensor) -> dict[str, Tensor]:
        return {"twice": 2 * input, "once": input}


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (nn.Identity(), ["output"]),
        (Pair(), ["output", "output_1"]),
        (Named(), ["twice", "once"]),
    ],
)
def test_outputs_are_named_as_elsewhere(net: nn.Module, names: list[str]) -> None:
    program = lower(net, "exported", Inputs(example={"input": torch.ones(1, 2)}))
    assert output_names(program) == names
