"""Outputs of a network before and after a step that must not change them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import StepError
from tersor.core.model import Inputs

_SAME = 1e-4
"""Largest relative root-mean-square difference that sums in another order explain."""


def outputs_of(net: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run the example; return every tensor of the outputs, copied."""
    with torch.no_grad():
        return [t.clone() for t in _tensors(net(**inputs.example))]


def _tensors(made: Any) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made]
    if isinstance(made, Mapping):
        return [t for item in made.values() for t in _tensors(item)]
    return [t for item in made for t in _tensors(item)] if isinstance(made, (tuple, list)) else []


def check_same(wanted: list[Tensor], net: nn.Module, inputs: Inputs) -> None:
    """Refuse a network whose outputs are no longer those.

    Raises:
        StepError: says which output, and by how much.
    """
    found = outputs_of(net, inputs)
    if len(found) != len(wanted):
        raise StepError(f"the step changed {len(wanted)} outputs to {len(found)}; nothing is fused")
    for i, (old, new) in enumerate(zip(wanted, found, strict=True)):
        scale = float(old.double().square().mean().sqrt()) or 1.0
        moved = float((new.double() - old.double()).square().mean().sqrt()) / scale
        if new.shape != old.shape or not (moved <= _SAME or not old.isfinite().all()):
            raise StepError(
                f"the step changed output {i} by {moved:.2g} of its size, more than rounding "
                f"explains ({_SAME:g}); nothing is fused"
            )
