"""Fuse batch norm: fold each batch norm into the convolution or linear layer before it."""

from dataclasses import dataclass

from torch import nn

from tersor.core.context import Context
from tersor.core.errors import StepError, suggest
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.capture import capture
from tersor.ops.fold import find_batch_norms, fold_batch_norm


@dataclass(frozen=True, kw_only=True)
class FuseBatchNorm:
    """Settings of batch norm folding."""

    layers: Layers = Layers()
    """Convolutions and linear layers that a batch norm may be folded into."""


@technique(paper="arXiv:1712.05877")
def fuse_batch_norm(net: nn.Module, config: FuseBatchNorm, context: Context) -> nn.Module:
    """Fold what can be folded; each folded batch norm becomes an `nn.Identity` under its name.

    The outputs stay the same up to rounding. Batch norms that stay, and how many, are in the facts;
    a network without any is returned as it came.

    Source:
        Jacob et al., arXiv:1712.05877, section 3.2.
    """
    net.eval()
    found = find_batch_norms(capture(net, context.inputs))
    names = [layer for layer, _ in found]
    unused = config.layers.unused(names) if names else ()
    if unused:
        raise StepError(
            f"layers: {unused[0]!r} matches no layer with a batch norm behind it."
            f"{suggest(unused[0].lstrip('!'), names)}"
        )
    pairs = [p for p in found if config.layers.holds(p[0])]
    for layer, bn in context.track(pairs, "folding batch norms", len(pairs)):
        fold_batch_norm(net.get_submodule(layer), net.get_submodule(bn))
        net.set_submodule(bn, nn.Identity())
    left = [n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    context.record(folded=len(pairs), left=left)
    if not found:
        context.record(note="no batch norm directly follows a layer it could be folded into")
    return net
