"""Half: compute in a 16-bit floating-point format, bf16 or fp16."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from tersor.core import plugins
from tersor.core.context import Context
from tersor.core.errors import TargetError
from tersor.core.technique import technique
from tersor.ops.precision_note import note_precision


@dataclass(frozen=True, kw_only=True)
class Half:
    """Settings of half precision."""

    format: Literal["bf16", "fp16"] = "bf16"
    """bf16: the range of fp32, 8 bits of mantissa. fp16: up to 65504, 11 bits of mantissa."""


@technique()
def half(net: nn.Module, config: Half, context: Context) -> nn.Module:
    """Note on the network that the runtime is to compute in 16 bits; its weights are not changed.

    The runtime casts the operators that gain by it and keeps the others in fp32: OpenVINO by its
    precision hint, PyTorch by autocast. Layers of integer weights stay integer.

    Raises:
        TargetError: the runtime has no such precision; those that have are named.
    """
    runtime = plugins.runtime(context.target.runtime)
    if "precision" not in runtime.options:
        able = [
            name
            for name in plugins.names("runtimes")
            if "precision" in plugins.runtime(name).options
        ]
        raise TargetError(
            f"{context.target} has no kernels that compute in {config.format}; "
            f"use one of the runtimes {', '.join(able)}, or the step static (int8)"
        )
    note_precision(net, config.format)
    context.record(format=config.format)
    return net
