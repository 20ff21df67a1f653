"""When mixed precision pays on this processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from tersor.ops.fake_quantize import late


@cache
def computes_bf16() -> bool:
    """Tell whether this processor multiplies bfloat16; emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def gains_from_bf16(net: nn.Module) -> bool:
    """Tell whether a network runs faster in bfloat16: dense convolutions hold most of it.

    Not while rounding is trained: bfloat16 has too few bits for the codes.
    """
    if late(net) is not None:
        return False
    kernels = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    dense = sum(m.weight.numel() for m in kernels)
    total = sum(p.numel() for p in net.parameters())
    return computes_bf16() and 2 * dense > total and all(m.groups == 1 for m in kernels)


@contextmanager
def channels_last(net: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Keep kernels channels-last inside, which convolutions in bfloat16 are fastest with."""
    if wanted:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    try:
        yield
    finally:
        if wanted:
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as above
