"""Fuse attention: softmax(Q K^T) V, however it is written, becomes one operator of the target's."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import fx, nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.attention_patterns import find_written, write_as_heads, write_as_sdpa
from tersor.ops.calls import free_name
from tersor.ops.capture import annotate, capture, drop_dead
from tersor.ops.multi_head import MultiHead, ProjectedHeads
from tersor.ops.outputs import check_same, outputs_of

_GAIN = 0.99
"""Share of the time that a kernel may take to be called faster."""
_TOLD = 3
"""Reasons in an error."""


@dataclass(frozen=True, kw_only=True)
class FuseAttention:
    """Settings of attention fusion."""

    convert: Literal["faster", "all"] = "faster"
    """ONNX Runtime's own kernels. faster: the one that wins against plain operators, timed on the
    target; all: the one that holds the projections, too, without a race."""


@technique(renames=True)
def fuse_attention(net: nn.Module, config: FuseAttention, context: Context) -> nn.Module:
    """Write attention as one call, then as the kernel of the target.

    Attention that is written out as products and a softmax becomes torch's scaled dot product
    attention, which PyTorch and OpenVINO run as one kernel. ONNX has no such operator that ONNX
    Runtime would fuse: for it the call becomes one of its own, Attention (with the projections of
    queries, keys and values) or MultiHeadAttention (without them), if that is faster. Files with
    these run on ONNX Runtime alone. Where a value inside is read elsewhere, nothing is done.

    Linear layers that go into the kernel are no longer linear layers: quantize before.

    Raises:
        UnfitError: there is no attention, none that can be fused, or the kernels are not faster.
    """
    captured = capture(net.eval(), context.inputs)
    wanted = outputs_of(captured, context.inputs)
    split_attention(captured, context.inputs)
    written, reasons = find_written(captured)
    for each in written:
        write_as_sdpa(captured, each)
    _clean(captured, context)
    calls = [n for n in captured.graph.nodes if n.target is F.scaled_dot_product_attention]
    if not calls:
        why = f" ({'; '.join(reasons[:_TOLD])})" if reasons else ""
        raise UnfitError(f"fuse_attention: the network has no attention that can be fused{why}")
    context.record(attentions=len(calls), written_out=len(written), left=reasons)
    if (context.target.runtime, context.target.device) != ("onnxruntime", "cpu"):
        if not written:
            raise UnfitError(
                "fuse_attention: attention is one call already, scaled_dot_product_attention, and "
                f"{context.target} has no better kernel to choose"
            )
        check_same(wanted, captured, context.inputs)
        return captured
    made = _for_onnxruntime(captured, config, context)
    check_same(wanted, made, context.inputs)
    return made


def _for_onnxruntime(
    captured: fx.GraphModule, config: FuseAttention, context: Context
) -> fx.GraphModule:
    ways: dict[str, fx.GraphModule] = {}
    stays: Sequence[str] = ()
    for project in (True, False):
        made, stays = _with_kernels(captured, context, project)
        kernels = _kernels(made)
        if kernels and config.convert == "all":
            context.record(kernels=kernels)
            return made
        if kernels:
            ways.setdefault(" and ".join(kernels), made)
    if not ways:
        raise UnfitError(
            "fuse_attention: ONNX Runtime's kernels do not fit its attention "
            f"({'; '.join(stays[:_TOLD])})"
        )
    times = dict(zip(("plain", *ways), context.latency([captured, *ways.values()]), strict=True))
    context.record(milliseconds=times)
    best = min(ways, key=lambda name: times[name])
    if times[best] > _GAIN * times["plain"]:
        raise UnfitError(
            f"fuse_attention: ONNX Runtime's kernels are not faster here ({_told(times)}, batch "
            f"{context.batch}); convert: all takes them all the same"
        )
    context.record(kernels=_kernels(ways[best]))
    return ways[best]


def _kernels(net: nn.Module) -> dict[str, int]:
    """Count ONNX Runtime's kernels in a network."""
    names = {ProjectedHeads: "Attention", MultiHead: "MultiHeadAttention"}
    return dict(Counter(names[type(m)] for m in net.modules() if type(m) in names))


def _with_kernels(
    captured: fx.GraphModule, context: Context, project: bool
) -> tuple[fx.GraphModule, list[str]]:
    """Return a copy with the kernels in, and why some attention stays as it is."""
    made = copy.deepcopy(captured)
    annotate(made, context.inputs)
    stays = []
    for node in [n for n in made.graph.nodes if n.target is F.scaled_dot_product_attention]:
        why = write_as_heads(made, node, free_name(made, "attention"), project=project)
        if why is not None:
            stays.append(f"{node.name}: {why}")
    _clean(made, context)
    return made, stays


def _clean(captured: fx.GraphModule, context: Context) -> None:
    drop_dead(captured)
    captured.recompile()
    captured.delete_all_unused_submodules()
    annotate(captured, context.inputs)


def _told(times: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
