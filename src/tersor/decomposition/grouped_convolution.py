"""Grouped convolution: kernels that mix few channels, or none, in place of those that mix all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.core.layers import Layers
from tersor.core.technique import technique
from tersor.decomposition._choice import Candidate, decompose
from tersor.decomposition._layers import Site
from tersor.decomposition._settings import check, weaker
from tersor.ops.hessian import damped
from tersor.ops.low_rank import svd_factors
from tersor.ops.matrices import matrices
from tersor.ops.parts import Part, pointwise
from tersor.ops.recalibrate import recalibrate

# O outputs, I inputs, K places of the kernel; B inputs of a group; M channels between the two parts
# columns of matrices and moments are (K, I), as in ops/matrices.py

_DAMP = 1e-4


@dataclass(frozen=True, kw_only=True)
class GroupedConvolution:
    """Settings: a share, `multiplier` or `groups`; `macs: 0.7` if none is given."""

    energy: float | None = None
    """Keep at least this share of each layer's squared outputs, or weights, in (0, 1]."""
    macs: float | None = None
    """Leave this share of the network's multiply-accumulates, in (0, 1), where it costs least."""
    parameters: float | None = None
    """Leave this share of the network's parameters, in (0, 1), where it costs least."""
    latency: float | None = None
    """Leave this share of the latency, measured on the target, in (0, 1)."""
    form: Literal["separable", "grouped"] = "separable"
    """separable: one kernel a channel, then 1x1; grouped: one convolution in groups."""
    multiplier: int | None = None
    """separable: kernels of each input channel, the same for every layer."""
    groups: int | None = None
    """grouped: number of groups, the same for every layer."""
    samples: int = 256
    """Calibration samples that outputs are fitted on; without calibration data weights are."""
    convert: Literal["faster", "all"] = "faster"
    """faster: layers that get faster, timed on the target; all: every one, for another machine."""
    layers: Layers = Layers()
    """Which convolutions."""

    @property
    def multiple(self) -> int:
        """Ranks are numbers of kernels: every one is looked at."""
        return 1

    def __post_init__(self) -> None:
        check(self, multiplier=self.multiplier, groups=self.groups)
        if self.multiplier is not None and (self.multiplier < 1 or self.form != "separable"):
            raise ValueError(
                f"multiplier must be at least 1, with form separable; got {self.multiplier} with "
                f"{self.form}"
            )
        if self.groups is not None and (self.groups < 2 or self.form != "grouped"):
            raise ValueError(
                f"groups must be at least 2, with form grouped; got {self.groups} with {self.form}"
            )
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def weaker(self) -> "GroupedConvolution | None":
        """Return settings that change less; None where hardly anything would."""
        if self.multiplier is not None or self.groups is not None:
            return None
        changes = weaker(self)
        return None if changes is None else replace(self, **changes)


@technique(renames=True, paper="arXiv:1808.05517")
def grouped_convolution(net: nn.Module, config: GroupedConvolution, context: Context) -> nn.Module:
    """Replace convolutions by depthwise-separable or grouped ones, fitted by least squares.

    separable: the kernels of each input channel are those of the best low rank of its part of the
    weight; the 1x1 convolution is then the least squares solution for the outputs. More kernels a
    channel lose less. grouped: each group of outputs sees its own inputs, with weights that make up
    for the others as far as the inputs are correlated. Both are a start for `distill_logits` or
    `finetune` in the same stage. Where calibration data are given, outputs on them are fitted, and
    batch norms estimated anew; else weights are.

    Raises:
        DataError: a batch does not fit.
        UnfitError: no convolution gets cheaper on the target; a share cannot be reached; groups
            or a multiplier do not fit: names the nearest that do.

    Source:
        Guo et al., Network Decoupling, arXiv:1808.05517, section 3 (depthwise before pointwise);
        the refit to outputs and the grouped form are ours.
    """

    def propose(site: Site, moment: Tensor | None) -> Sequence[Candidate] | str:
        if site.part.groups != 1:
            return "it is grouped already"
        if set(site.part.kernel) == {1}:
            return "a 1x1 kernel only mixes channels"
        if config.form == "grouped":
            return _grouped(site, moment, config)
        return _separable(site, moment, config)

    seen = context.data.calibration is not None
    made = decompose(
        net,
        config,
        context,
        propose,
        kinds=(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        fixed=config.multiplier is not None or config.groups is not None,
        samples=config.samples if seen else 0,
    )
    if context.data.calibration is not None:
        context.record(recalibrated=recalibrate(made, context.data.calibration))
    return made


def _separable(
    site: Site, moment_GCC: Tensor | None, config: GroupedConvolution
) -> Sequence[Candidate] | str:
    part, weight_OKI, moment = _problem(site, moment_GCC)
    places = weight_OKI.shape[1]
    most = min(places, part.outputs)
    if part.inputs == 1:
        return "it has one input channel"
    if config.multiplier is not None and config.multiplier > most:
        raise UnfitError(
            f"multiplier {config.multiplier} does not fit layer {site.name!r}, whose kernels have "
            f"{most} independent ones; use at most {most}, or leave the layer out"
        )
    tried = range(1, most + 1) if config.multiplier is None else (config.multiplier,)
    blocks = _channel_factors(weight_OKI, moment)
    made = []
    for m in tried:
        depthwise = replace(part, outputs=part.inputs * m, groups=part.inputs)
        parts = (depthwise, pointwise(part.inputs * m, part.outputs, len(part.kernel)))
        if config.multiplier is None and site.macs(parts) >= site.macs([part]):
            break
        kernels_IMK = blocks[:, :m]
        mixing_OM, loss = _fit(weight_OKI, kernels_IMK, moment)

        def weights(kernels: Tensor = kernels_IMK, mixing: Tensor = mixing_OM) -> Sequence[Tensor]:
            own = kernels.flatten(0, 1).view(-1, 1, *part.kernel)
            return own, mixing.view(*mixing.shape, *[1] * len(part.kernel))

        made.append(Candidate(rank=(m,), loss=loss, parts=parts, weights=weights))
    return made


def _problem(site: Site, moment_GCC: Tensor | None) -> tuple[Part, Tensor, Tensor]:
    """Return the layer, its weight (O, K, I), and the moment of its inputs, (C, C)."""
    weight_OC = matrices(site.layer).double()[0]
    inputs = site.part.inputs
    moment = torch.eye(weight_OC.shape[1], dtype=torch.float64)
    if moment_GCC is not None:
        moment = damped(moment_GCC, _DAMP)[0]
    return site.part, weight_OC.view(len(weight_OC), -1, inputs), moment


def _channel_factors(weight_OKI: Tensor, moment: Tensor) -> Tensor:
    """Return the best kernels of each input channel, strongest first, (I, M, K)."""
    places, inputs = weight_OKI.shape[1:]
    square = moment.view(places, inputs, places, inputs)
    made = []
    for i in range(inputs):
        root = torch.linalg.cholesky(square[:, i, :, i])
        _, right = svd_factors(weight_OKI[:, :, i], min(weight_OKI.shape[:2]), root)
        made.append(right)
    return torch.stack(made)


def _fit(weight_OKI: Tensor, kernels_IMK: Tensor, moment: Tensor) -> tuple[Tensor, float]:
    """Return the 1x1 weights (O, I * M) of least squared error in outputs, and its share."""
    inputs, m, places = kernels_IMK.shape
    # row (i, m) of the depthwise part as a row of a matrix over columns (K, I)
    depthwise = torch.zeros(inputs, m, places, inputs, dtype=torch.float64)
    index = torch.arange(inputs)
    depthwise[index, :, :, index] = kernels_IMK
    rows = depthwise.view(inputs * m, places * inputs)
    weight = weight_OKI.flatten(1)
    seen = rows @ moment
    gram = seen @ rows.mT
    gram.diagonal().add_(1e-9 * gram.diagonal().mean() + 1e-300)
    mixing = torch.linalg.solve(gram, seen @ weight.mT).mT
    return mixing, _share(weight - mixing @ rows, weight, moment)


def _share(difference: Tensor, weight: Tensor, moment: Tensor) -> float:
    whole = float(((weight @ moment) * weight).sum())
    return float(((difference @ moment) * difference).sum()) / max(whole, 1e-300)


def _grouped(
    site: Site, moment_GCC: Tensor | None, config: GroupedConvolution
) -> Sequence[Candidate] | str:
    part, weight_OKI, moment = _problem(site, moment_GCC)
    common = math.gcd(part.inputs, part.outputs)
    able = [g for g in range(2, common + 1) if common % g == 0]
    if not able:
        return f"no number of groups divides {part.inputs} inputs and {part.outputs} outputs"
    if config.groups is not None and config.groups not in able:
        near = min(able, key=lambda g: abs(g - (config.groups or 0)))
        raise UnfitError(
            f"{config.groups} groups do not divide the {part.inputs} inputs and {part.outputs} "
            f"outputs of layer {site.name!r}; the nearest number that does is {near}, or leave the "
            "layer out"
        )
    made = []
    for g in able if config.groups is None else (config.groups,):
        own = replace(part, groups=g)
        weight_OKB, loss = _block_fit(weight_OKI, g, moment)

        def weights(weight_OKB: Tensor = weight_OKB) -> Sequence[Tensor]:
            by_place = weight_OKB.movedim(-1, 1)
            return (by_place.reshape(*by_place.shape[:2], *part.kernel),)

        made.append(Candidate(rank=(g,), loss=loss, parts=(own,), weights=weights))
    return made


def _block_fit(weight_OKI: Tensor, groups: int, moment: Tensor) -> tuple[Tensor, float]:
    """Return the weights (O, K, B) of least squared error in outputs, and that error's share."""
    outputs, places, inputs = weight_OKI.shape
    size, rows = inputs // groups, outputs // groups
    columns = torch.arange(places * inputs).view(places, inputs)
    weight = weight_OKI.flatten(1)
    made, difference = [], weight.clone()
    for g in range(groups):
        own = columns[:, g * size : (g + 1) * size].flatten()
        out = slice(g * rows, (g + 1) * rows)
        target = weight[out] @ moment[:, own]
        solved = torch.linalg.solve(moment[own][:, own], target.mT).mT
        difference[out, own] -= solved
        made.append(solved.view(rows, places, size))
    return torch.cat(made), _share(difference, weight, moment)
