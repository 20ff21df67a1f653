"""Pack: store the network's files in the room that pruned, shared and quantized weights need."""

from dataclasses import dataclass

from torch import nn

from tersor.core.context import Context
from tersor.core.technique import technique
from tersor.ops.notes import note


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Packing has no settings: it is lossless."""


@technique(paper="arXiv:1510.00149")
def pack(net: nn.Module, config: Pack, context: Context) -> nn.Module:
    """Note on the network that its files are to be packed, from here on, after every later step.

    A packed file is smaller by what its weights repeat: zeros, few values, few bits. Outputs and
    speed are the same; opening takes longer, since the files are unpacked first. Write it as the
    first step of a recipe, so that each later one is judged by the size that it has packed.

    Source:
        Han et al., arXiv:1510.00149, section 4, with LZMA in place of Huffman codes.
    """
    del config, context
    note(net, packed=True)
    return net
