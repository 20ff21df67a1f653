"""Fuse norm and linear: the scale and shift of a norm go into the linear layers that read it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.calls import attribute, foldable, kind_of, readers, reads_shape
from tersor.ops.capture import annotate, capture, drop_dead
from tersor.ops.modules import check_patterns
from tersor.ops.outputs import check_same, outputs_of

# I inputs of a linear layer, O outputs

_TOLD = 3
"""Reasons in an error."""


@dataclass(frozen=True, kw_only=True)
class FuseNormLinear:
    """Settings of folding norms."""

    layers: Layers = Layers()
    """Norms that may be folded, by layer; a scale that is written out, by its parameter."""


@dataclass(frozen=True, kw_only=True)
class _Affine:
    """scale * x + shift over the last dimension, and who reads it."""

    name: str
    node: fx.Node
    scale: Tensor | None
    shift: Tensor | None
    layer: nn.Module | None
    """The norm; None where a parameter is multiplied or added in forward."""
    inner: fx.Node | None
    """What is multiplied or added to, where it is."""


@technique(paper="arXiv:2404.00456")
def fuse_norm_linear(net: nn.Module, config: FuseNormLinear, context: Context) -> nn.Module:
    """Multiply the columns of each linear layer by the norm's scale; its shift goes into the bias.

    LayerNorm and RMSNorm, also with a scale that is written out in forward, whose outputs are read
    by linear layers alone. What is left of the norm only normalizes. Outputs stay the same. The
    network keeps its class where only its layers change; else the captured graph is returned.

    Raises:
        UnfitError: no norm is read by linear layers alone; says who reads them.

    Source:
        Ashkboos et al., QuaRot, arXiv:2404.00456, section 3 (after SliceGPT): the norm's diagonal
        is absorbed into the matrices that follow. We absorb the shift, too.
    """
    captured = capture(net.eval(), context.inputs)
    wanted = outputs_of(captured, context.inputs)
    split = split_attention(captured, context.inputs)
    rewritten = bool(split)
    folded: list[str] = []
    gone: list[str] = []
    reasons: dict[str, str] = {}
    modules, counted = dict(captured.named_modules()), readers(captured)
    found = _affines(captured, modules)
    check_patterns(config.layers, [each.name for each in found])
    for each in reversed(found):
        why = _why_not(each, modules, counted)
        if why is None and not config.layers.holds(each.name):
            why = "excluded by layers"
        if why is not None:
            reasons[each.name] = why
            continue
        _fold(each, [_linear(modules, user) for user in _content_users(each.node)])
        folded.append(each.name)
        if each.inner is not None:
            each.node.replace_all_uses_with(each.inner)
            captured.graph.erase_node(each.node)
            rewritten = True
            gone.append(each.name)
    if not folded:
        told = [f"{name}: {why}" for name, why in reversed(reasons.items())]
        why = "; ".join(told[:_TOLD]) or "the network has no layer norm or RMS norm with a scale"
        raise UnfitError(f"fuse_norm_linear: no norm can be folded ({why})")
    drop_dead(captured)
    for name in gone:
        owner, _, leaf = name.rpartition(".")
        delattr(captured.get_submodule(owner), leaf)
    captured.recompile()
    annotate(captured, context.inputs)
    made = captured if rewritten else net
    check_same(wanted, made, context.inputs)
    context.record(folded=folded[::-1], left=reasons, attention_split=split)
    return made


def _affines(captured: fx.GraphModule, modules: Mapping[str, nn.Module]) -> list[_Affine]:
    """List scales and shifts over the last dimension, in the order of the graph."""
    found = []
    for node in captured.graph.nodes:
        kind = kind_of(node, modules)
        if kind in ("layer_norm", "rms_norm") and node.op == "call_module":
            layer = modules[str(node.target)]
            if getattr(layer, "weight", None) is None and getattr(layer, "bias", None) is None:
                continue
            scale, shift = layer.weight, getattr(layer, "bias", None)
            assert isinstance(scale, Tensor)
            name = str(node.target)
            found.append(
                _Affine(name=name, node=node, scale=scale, shift=shift, layer=layer, inner=None)
            )
        elif kind in ("mul", "add") and len(node.args) == 2 and not node.kwargs:
            vectors = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
            others = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
            if len(vectors) != 1 or len(others) != 1:
                continue
            name = str(vectors[0].target)
            tensor, shape = attribute(captured, name), node.meta.get("shape")
            if not isinstance(tensor, nn.Parameter) or not shape or tensor.shape != shape[-1:]:
                continue
            pair = (tensor, None) if kind == "mul" else (None, tensor)
            found.append(
                _Affine(
                    name=name,
                    node=node,
                    scale=pair[0],
                    shift=pair[1],
                    layer=None,
                    inner=others[0],
                )
            )
    return found


def _why_not(each: _Affine, modules: Mapping[str, nn.Module], counted: Counter[int]) -> str | None:
    """Say why a scale stays where it is, or None."""
    own = [t for t in (each.scale, each.shift) if t is not None]
    if any(counted[id(t)] != 1 for t in own):
        return "its weights are used more than once"
    if own[0].dim() != 1:
        return "it normalizes more than the last dimension"
    users = _content_users(each.node)
    if not users:
        return "nothing reads it"
    for user in users:
        if not foldable(user, modules, counted):
            read = user.target if user.op == "call_module" else user.name
            return f"read by {read}, which is no linear layer of its own"
        if not user.args or user.args[0] is not each.node:
            return f"read by {user.name} in another place than the input"
    return None


def _content_users(node: fx.Node) -> list[fx.Node]:
    """List the calls that read a tensor's numbers, and not only its shape."""
    return [user for user in node.users if not reads_shape(user)]


def _linear(modules: Mapping[str, nn.Module], call: fx.Node) -> nn.Linear:
    layer = modules[str(call.target)]
    assert isinstance(layer, nn.Linear)
    return layer


def _fold(each: _Affine, readers: Sequence[nn.Linear]) -> None:
    """Move scale and shift into the layers; arithmetic in float64, rounded once."""
    with torch.no_grad():
        for layer in readers:
            weight_OI = layer.weight.double()
            if each.shift is not None:
                bias_O = weight_OI @ each.shift.double()
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias.double() + bias_O)
                elif bool(bias_O.any()):
                    layer.bias = nn.Parameter(
                        bias_O.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad
                    )
            if each.scale is not None:
                layer.weight.copy_(weight_OI * each.scale.double())
    norm = each.layer
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        norm.register_parameter("weight", None)
        if isinstance(norm, nn.LayerNorm):
            norm.register_parameter("bias", None)
        norm.elementwise_affine = False
