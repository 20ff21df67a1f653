"""The precision that a step chose for the runtime, as a note on the network.

Copies of a captured graph drop plain attributes, so the note is also kept where they look for such.
"""

from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY


def note_precision(net: nn.Module, precision: str) -> None:
    """Note "bf16" or "fp16" on a network, as its attribute `tersor_precision`."""
    note: Any = precision  # neither a tensor nor a module
    net.tersor_precision = note
    if isinstance(net, fx.GraphModule):
        net.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {})["tersor_precision"] = precision


def carry_precision(net: nn.Module, other: nn.Module) -> None:
    """Copy the note from one network to another, where there is one."""
    precision = getattr(net, "tersor_precision", None)
    if precision:
        note_precision(other, str(precision))
