"""Half: a floating-point format of fewer bits: compute in bf16 or fp16, keep weights in fp8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from tersor.core import plugins
from tersor.core.context import Context
from tersor.core.errors import ModelError, StepError, TargetError, UnfitError
from tersor.core.layers import Layers
from tersor.core.runtime import Runtime, Target
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.float8 import FLOAT8, float8, why_not_float8
from tersor.ops.float32 import InFloat32
from tersor.ops.fold import fold_batch_norms
from tersor.ops.modules import check_patterns
from tersor.ops.notes import note

_EXCLUDED = "excluded by layers"


@dataclass(frozen=True, kw_only=True)
class Half:
    """Settings of half precision."""

    format: Literal["bf16", "fp16", "fp8_e4m3", "fp8_e5m2"] = "bf16"
    """bf16: the range of fp32, 8 bits of mantissa. fp16: up to 65504, 11 bits of mantissa. fp8: of
    weights alone, a scale for each output channel, 4 (e4m3) or 3 bits of mantissa; fp32 computes.
    """
    layers: Layers = Layers()
    """Which layers get fewer bits; the others stay in fp32. To compute in 16 bits, on PyTorch only:
    other runtimes turn the whole network."""

    def check_target(self, target: Target) -> None:
        """Refuse a target that has no such format.

        Raises:
            TargetError: those that have it are named.
        """
        runtimes = {name: plugins.runtime(name) for name in plugins.names("runtimes")}
        if self.of_weights(target):
            check_weights(self.format, target, runtimes)
        elif not runtimes[target.runtime].halves(target.device):
            able = [
                f"{name}:{device}"
                for name, runtime in runtimes.items()
                for device in runtime.devices
                if runtime.halves(device)
            ]
            raise TargetError(
                f"{target} has no kernels that compute in {self.format}; use one of the targets "
                f"{', '.join(able)}, or the step static (int8)"
            )
        elif self.layers != Layers() and not runtimes[target.runtime].autocasts:
            able = [name for name, runtime in runtimes.items() if runtime.autocasts]
            raise TargetError(
                f"{target} turns a network to {self.format} as a whole, so `layers` has no meaning "
                f"there. Leave `layers` out, or take one of the runtimes {', '.join(able)}, or the "
                "step mixed_precision (int8)"
            )

    def of_weights(self, target: Target) -> bool:
        """Tell whether weights alone have the format there."""
        return self.format in FLOAT8 or self.format in plugins.runtime(target.runtime).weights


@technique()
def half(net: nn.Module, config: Half, context: Context) -> nn.Module:
    """Note on the network that the runtime is to compute in 16 bits; or keep weights in 8 bits.

    For 16 bits, weights are not changed: the runtime casts the operators that gain by it and keeps
    the others in fp32: OpenVINO by its precision hint, PyTorch by autocast. Layers of integer
    weights stay integer. For 8 bits, linear layers and convolutions keep their weights as fp8, a
    quarter of the room, and the runtime computes with them in fp32, as fast as before. Batch norms
    are folded first. LiteRT, which computes in fp32, keeps fp16 weights in the same way, half the
    room. Sensitive layers are kept in fp32 by `layers`; what has no weights follows its inputs.

    Raises:
        TargetError: the runtime has no such format, or cannot leave layers in fp32; those that can
            are named.
        RecipeError: a pattern matches no layer.
        StepError: all layers are excluded.
        UnfitError: no layer can keep its weights in so few bits.
        ModelError: weights are NaN or infinite.
    """
    config.check_target(context.target)
    if config.of_weights(context.target):
        return _smaller(net, config, context)
    if config.layers != Layers():
        net = _keep(net, config, context)
    note(net, precision=config.format)
    context.record(format=config.format)
    return net


def _keep(net: nn.Module, config: Half, context: Context) -> nn.Module:
    """Take layers out of the 16 bits that the rest is computed in."""
    captured = capture(net.eval(), context.inputs)
    names = _called(captured, 1)
    chosen = _chosen(names, config)
    kept = [name for name in names if name not in chosen]
    kind = context.target.device.partition(":")[0]
    for name in kept:
        captured.set_submodule(name, InFloat32(kind, captured.get_submodule(name)).eval())
    context.record(layers=len(chosen), left_in_float=dict.fromkeys(kept, _EXCLUDED))
    return captured


def _called(captured: fx.GraphModule, dimensions: int) -> list[str]:
    """Name the layers that have weights of so many dimensions, in the order they run."""
    calls = [str(n.target) for n in captured.graph.nodes if n.op == "call_module"]
    modules = dict(captured.named_modules())
    return [
        name
        for name in dict.fromkeys(calls)
        if any(
            tensor.dim() >= dimensions
            for tensor in (*modules[name].parameters(), *modules[name].buffers())
        )
    ]


def _chosen(names: list[str], config: Half) -> list[str]:
    check_patterns(config.layers, names)
    chosen = [name for name in names if config.layers.holds(name)]
    if names and not chosen:
        raise StepError(f"layers excludes everything that has weights: {', '.join(names)}")
    return chosen


def _smaller(net: nn.Module, config: Half, context: Context) -> nn.Module:
    """Keep weights in fewer bits."""
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    folded = fold_batch_norms(captured, context.inputs)
    modules = dict(captured.named_modules())
    names = _called(captured, 2)
    wanted = _chosen(names, config)
    left = {name: _EXCLUDED for name in names if name not in wanted}
    left |= {name: why for name in wanted if (why := why_not_float8(modules[name])) is not None}
    chosen = [name for name in wanted if name not in left]
    if not chosen:
        raise UnfitError(
            f"no layer of this network can keep its weights in {_short(config.format)}"
        )
    for name in chosen:
        try:
            captured.set_submodule(name, float8(modules[name], config.format))
        except ValueError as error:
            raise ModelError(
                f"layer {name!r} cannot be kept in {_short(config.format)}: {error}"
            ) from error
    context.record(
        format=config.format, layers=len(chosen), left_in_float=left, batch_norms_folded=folded
    )
    return captured


def _short(format: str) -> str:
    return format.partition("_")[0]


def check_weights(format: str, target: Target, runtimes: Mapping[str, Runtime]) -> None:
    """Refuse a target whose runtime does not read weights of this format.

    Raises:
        TargetError: names those that do.
    """
    able = [name for name, runtime in runtimes.items() if format in runtime.weights]
    if target.runtime not in able:
        raise TargetError(
            f"{target} does not read weights in {format}; use one of the runtimes "
            f"{', '.join(able)}, or the step weight_only (int8)"
        )
