"""Notes on a network: what a step asks of its export, or of the runtime, rather than of a layer.

`precision` ("bf16", "fp16") is what the runtime is to compute in; `packed` has the files packed;
`shared` has training keep the values that weights share.
Copies of a captured graph drop plain attributes, so notes are also kept where they look for such.
"""

from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

_PLACE = "tersor_notes"


def note(net: nn.Module, **notes: str | bool) -> None:
    """Add notes to a network."""
    made: Any = {**notes_of(net), **notes}  # neither a tensor nor a module
    setattr(net, _PLACE, made)
    if isinstance(net, fx.GraphModule):
        net.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {})[_PLACE] = made


def notes_of(net: Any) -> Mapping[str, Any]:
    """Return the notes on a network of any form."""
    found: Mapping[str, Any] = getattr(net, _PLACE, {})
    return found


def carry_notes(net: nn.Module, other: nn.Module) -> None:
    """Copy the notes on one network to another, where there are any."""
    if notes_of(net):
        note(other, **notes_of(net))
