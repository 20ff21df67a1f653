"""Fuse activations: those spelled out in several operators become one, which runtimes fuse."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import fx, nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.technique import technique
from tersor.ops.activations import NAMED, find_spelled
from tersor.ops.calls import kind_of
from tersor.ops.capture import annotate, capture, drop_dead
from tersor.ops.outputs import check_same, outputs_of


@dataclass(frozen=True, kw_only=True)
class FuseActivations:
    """Settings of naming activations."""

    approximate: Literal["none", "tanh"] = "none"
    """tanh: every GELU is computed by its formula with tanh, which moves outputs a little."""


@technique()
def fuse_activations(net: nn.Module, config: FuseActivations, context: Context) -> nn.Module:
    """Write GELU, SiLU, HardSwish, HardSigmoid and ReLU6 as one call where they are spelled out.

    `x * relu6(x + 3) / 6` is HardSwish, whatever the order of its operators: runtimes put it into
    the convolution or product before it only under its name. It is recognized by what it computes.
    A value that is read elsewhere, too, stays. With approximate: none the outputs stay the same.

    Raises:
        UnfitError: nothing is spelled out (or, with approximate: tanh, there is no GELU either).

    Source:
        Howard et al., arXiv:1905.02244, section 5.2 (HardSwish); Hendrycks and Gimpel,
        arXiv:1606.08415 (GELU and its approximation).
    """
    captured = capture(net.eval(), context.inputs)
    wanted = outputs_of(captured, context.inputs)
    spelled = find_spelled(captured)
    for each in spelled:
        last = each.nodes[0]
        function, settings = NAMED[each.name]
        with captured.graph.inserting_before(last):
            made = captured.graph.call_function(function, (each.source,), dict(settings))
        last.replace_all_uses_with(made)
    drop_dead(captured)
    annotate(captured, context.inputs)
    approximated = _approximate(captured) if config.approximate == "tanh" else 0
    if not spelled and not approximated:
        raise UnfitError(
            "fuse_activations: no activation is spelled out in several operators"
            + (
                ", and there is no exact GELU to approximate"
                if config.approximate == "tanh"
                else ""
            )
        )
    captured.recompile()
    captured.delete_all_unused_submodules()
    if not approximated:
        check_same(wanted, captured, context.inputs)
    context.record(named=dict(Counter(each.name for each in spelled)), approximated=approximated)
    return captured


def _approximate(captured: fx.GraphModule) -> int:
    """Give every exact GELU its formula with tanh; return how many."""
    modules, count = dict(captured.named_modules()), 0
    for node in list(captured.graph.nodes):
        if kind_of(node, modules) != "gelu":
            continue
        if node.op == "call_module":
            setting = getattr(modules[str(node.target)], "approximate", "none")
        else:
            setting = node.kwargs.get("approximate", "none")
        if setting != "none":
            continue
        with captured.graph.inserting_before(node):
            made = captured.graph.call_function(F.gelu, (node.args[0],), {"approximate": "tanh"})
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        captured.graph.erase_node(node)
        count += 1
    return count
