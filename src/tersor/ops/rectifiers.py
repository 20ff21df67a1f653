"""ReLU and ReLU6 in a captured graph, however they are written."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

Rectifier = Literal["relu", "relu6"]
_RELU: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


def rectifier(node: fx.Node, modules: Mapping[str, nn.Module]) -> Rectifier | None:
    """Tell which of the two a node is, or None.

    Args:
        node: Of a captured graph.
        modules: Its modules by name.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.ReLU6):
            return "relu6"
        return "relu" if isinstance(module, nn.ReLU) else None
    if node.target is F.relu6:
        return "relu6"
    return "relu" if node.target in _RELU else None
