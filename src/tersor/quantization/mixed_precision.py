"""Mixed precision: bits of weights layer by layer, fewest where they harm least, under a size."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import fx, nn

from tersor.core.context import Context
from tersor.core.errors import DependencyError, RecipeError, UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.ops.attention import split_attention
from tersor.ops.capture import capture
from tersor.ops.fold import fold_batch_norms
from tersor.ops.losses import class_dimension, divergence, first_output
from tersor.ops.modules import check_patterns, quantized
from tersor.ops.twin import gather
from tersor.quantization._integer import (
    Calibrator,
    choose,
    make_integer,
    measure_ranges,
    weight_scales,
)

_FLOAT = 32


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Settings of mixed precision."""

    size: float = 0.2
    """Most that the weights of the layers may take, packed, as a share of float32: 0.25 is 8 bits
    each, 0.125 is 4."""
    weight_bits: tuple[int, ...] = (8, 6, 5, 4)
    """Bits to choose from, each 2 to 8; 32 leaves a layer in float."""
    assign: tuple[str, ...] = ()
    """Bits by pattern, as `"layer1.*=4"`, the first that fits; what a run found is in its report in
    this form. Every layer must fit one; nothing is searched then, and `size` is not looked at."""
    samples: int = 128
    """Calibration samples that sensitivities are measured on."""
    calibrator: Calibrator = "min_max"
    """How ranges follow from histograms of activations."""
    symmetric: bool = False
    """Activations as int8 around 0, as TensorRT asks for; else uint8 with any zero."""
    layers: Layers = Layers()
    """Which layers get integer weights."""

    def __post_init__(self) -> None:
        if not 0 < self.size <= 1:
            raise ValueError(f"size must be in (0, 1], got {self.size}")
        wrong = [b for b in self.weight_bits if not (2 <= b <= 8 or b == _FLOAT)]
        if wrong or not self.weight_bits:
            raise ValueError(f"weight_bits must each be 2 to 8, or 32, got {self.weight_bits}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        for entry in self.assign:
            _parse(entry)

    def weaker(self) -> Self | None:
        """Take half of the way to 8 bits."""
        if self.assign or self.size >= 0.25:
            return None
        size = (self.size + 0.25) / 2
        return replace(self, size=0.25 if size > 0.24 else size)


@technique(needs=("calibration",), paper="arXiv:2001.00281")
def mixed_precision(net: nn.Module, config: MixedPrecision, context: Context) -> nn.Module:
    """Measure what each layer loses with each number of bits, and choose the least loss in all.

    The sensitivity of a layer is the divergence between the float network's outputs and those with
    this layer alone rounded (mean squared error where outputs are numbers). The choice is an exact
    integer program: losses add up, sizes stay under the budget. Runtimes compute with bytes, so
    fewer bits save room, not time; ONNX Runtime's files are packed. Activations get 8 bits, as in
    `static`. Sensitivities and the choice, as a setting that can be pasted into a recipe, are in
    the facts.

    Raises:
        DataError: no calibration data, or a batch that does not fit.
        DependencyError: scipy is not installed.
        RecipeError: `assign` leaves a layer out.
        UnfitError: no choice of bits is within the budget, or no layer can be quantized.

    Source:
        Yao et al., HAWQ-V3, arXiv:2011.10680, section 3.4, for the integer program; sensitivities
        are measured as in ZeroQ, Cai et al., arXiv:2001.00281, section 3.2.
    """
    captured = capture(net.eval(), context.inputs)
    split_attention(captured, context.inputs)
    fold_batch_norms(captured, context.inputs)
    chosen, left = choose(captured, config.layers)
    if not chosen:
        raise UnfitError("no layer of this network can get integer weights")
    counts = {name: _weights(captured, name) for name in chosen}
    if config.assign:
        bits, losses = _assigned(chosen, config.assign), {}
    else:
        losses = _sensitivities(captured, chosen, config, context)
        bits = solve(losses, counts, config.size)
    integers = [name for name in chosen if bits[name] != _FLOAT]
    left.update({name: "float has the least loss here" for name in chosen if bits[name] == _FLOAT})
    context.record(
        layers=len(integers),
        left_in_float=left,
        sensitivities={n: {str(b): loss for b, loss in own.items()} for n, own in losses.items()},
        recipe={"mixed_precision": {"assign": [f"{name}={bits[name]}" for name in chosen]}},
        size=sum(counts[n] * bits[n] for n in chosen) / (_FLOAT * sum(counts.values())),
    )
    if not integers:
        return captured
    rounded, samples = measure_ranges(
        captured, integers, context, calibrator=config.calibrator, symmetric=config.symmetric
    )
    context.record(samples=samples)
    scales = {n: weight_scales(captured, n, rounded, bits=bits[n], clip=True) for n in integers}
    make_integer(captured, scales, bits, rounded, context)
    return captured


def _weights(captured: fx.GraphModule, name: str) -> int:
    weight = captured.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel()


def _sensitivities(
    captured: fx.GraphModule, chosen: Sequence[str], config: MixedPrecision, context: Context
) -> dict[str, dict[int, float]]:
    """Return the loss of each layer with each number of bits, all other layers in float.

    The network runs once, node by node; what follows a layer runs again for each rounding of it.
    """
    batch = gather(captured, context.data.calibration, context.inputs, config.samples)
    found: dict[str, dict[int, float]] = {}
    nodes = list(captured.graph.nodes)
    last = {used: node for node in nodes for used in node.all_input_nodes}
    done: dict[fx.Node, Any] = {}
    with torch.no_grad():
        wanted = first_output(captured(**batch))
        dimension = class_dimension(wanted, None)
        walk = fx.Interpreter(captured)
        walk.args_iter = iter([batch.get(str(n.target)) for n in nodes if n.op == "placeholder"])
        walk.env = done
        for node in context.track(nodes, "measuring sensitivities"):
            name = str(node.target)
            if node.op == "call_module" and name in chosen and name not in found:
                found[name] = {
                    bits: _loss(captured, name, bits, done, wanted, dimension)
                    for bits in config.weight_bits
                }
            done[node] = walk.run_node(node)
            for used in node.all_input_nodes:
                if last[used] is node:
                    done[used] = None  # needed no more, and not to be computed again
    return found


def _loss(
    captured: fx.GraphModule,
    name: str,
    bits: int,
    done: Mapping[fx.Node, Any],
    wanted: torch.Tensor,
    dimension: int | None,
) -> float:
    """Go on from the nodes that are done, with layer `name` rounded."""
    if bits == _FLOAT:
        return 0.0
    layer = captured.get_submodule(name)
    scale_O = weight_scales(captured, name, (), bits=bits, clip=True)
    captured.set_submodule(name, quantized(layer, scale_O, bits))
    rest = fx.Interpreter(captured).run(initial_env=dict(done), enable_io_processing=False)
    captured.set_submodule(name, layer)
    return max(float(divergence(first_output(rest), wanted, dimension)), 0.0)


def solve(
    losses: Mapping[str, Mapping[int, float]], counts: Mapping[str, int], size: float
) -> dict[str, int]:
    """Choose one number of bits for each layer: least sum of losses with sizes in the budget."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise DependencyError(
            "mixed_precision needs scipy for its integer program: pip install 'tersor[solver]'"
        ) from error
    names = list(losses)
    pairs = [(name, bits) for name in names for bits in losses[name]]
    total = sum(counts.values())
    cost = np.array([losses[name][bits] for name, bits in pairs])
    sizes = np.array([counts[name] * bits / (_FLOAT * total) for name, bits in pairs])
    one_each = np.array([[float(name == own) for own, _ in pairs] for name in names])
    smallest = sum(counts[n] * min(losses[n]) for n in names) / (_FLOAT * total)
    if smallest > size:
        raise UnfitError(
            f"size {size:g} cannot be reached: the fewest bits allowed take {smallest:.4g} of "
            "float32",
            too_strong=True,
        )
    # the solver stops at relative differences; sensitivities may be of any size
    made: Any = milp(
        cost / max(cost.max(), 1e-30),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes, 0, size * (1 + 1e-9)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert made.success, made.message
    return {name: bits for (name, bits), taken in zip(pairs, made.x, strict=True) if taken > 0.5}


def _assigned(chosen: Sequence[str], entries: Sequence[str]) -> dict[str, int]:
    rules = [_parse(entry) for entry in entries]
    check_patterns(Layers(patterns=tuple(pattern for pattern, _ in rules)), list(chosen))
    made = {}
    for name in chosen:
        fits = [bits for pattern, bits in rules if fnmatch.fnmatchcase(name, pattern)]
        if not fits:
            raise RecipeError(f'mixed_precision: assign says nothing for layer {name!r}; add "*=8"')
        made[name] = fits[0]
    return made


def _parse(entry: str) -> tuple[str, int]:
    pattern, _, bits = entry.rpartition("=")
    if not pattern or not bits.isdigit() or not (2 <= int(bits) <= 8 or int(bits) == _FLOAT):
        raise ValueError(
            f'assign takes entries as "layer1.*=4", with 2 to 8 bits or 32, got {entry!r}'
        )
    return pattern, int(bits)
