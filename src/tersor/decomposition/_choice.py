"""Choose a rank for each layer, on the target's word, and put the chains in."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.errors import UnfitError
from tersor.decomposition._layers import Site, Sites, moments, sites
from tersor.decomposition._race import Races
from tersor.decomposition._settings import DEFAULT_MACS, Settings
from tersor.ops.capture import capture
from tersor.ops.parts import Part, build, parameters_of, replace
from tersor.ops.ranks import allocate

_NOTHING_LOST = 1e-9
_SEARCHES = 6
"""Budgets of multiply-accumulates that are tried to reach a latency."""
_STEP = 0.6
"""After a chain that is not faster, the next one that is timed has this share of its products."""
_TOLD = 4
"""Reasons in an error, and layers of each."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to replace a layer."""

    rank: tuple[int, ...]
    loss: float
    """Share of the energy that is lost: of weights, or of outputs where inputs are known."""
    parts: tuple[Part, ...]
    weights: Callable[[], Sequence[Tensor]]
    """Computes the parts' weights; only called for what is chosen."""


Propose = Callable[[Site, "Tensor | None"], "Sequence[Candidate] | str"]
"""(layer, second moment of its inputs or None) -> ways to replace it, or why there are none."""
Chosen = dict[str, Candidate]


@dataclass(kw_only=True)
class _Search:
    config: Settings
    found: Sites
    options: Mapping[str, Sequence[Candidate]]
    races: Races
    dropped: dict[str, str] = field(default_factory=dict)

    def by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.found.open}


def decompose(
    net: nn.Module,
    config: Settings,
    context: Context,
    propose: Propose,
    *,
    kinds: tuple[type[nn.Module], ...],
    fixed: bool = False,
    samples: int = 0,
) -> nn.Module:
    """Replace layers by chains of cheaper ones.

    Args:
        net: In eval mode; changed.
        config: Settings.
        context: Of the step.
        propose: The technique.
        kinds: Classes of layers that it knows.
        fixed: `propose` offers one candidate for each layer, the user's rank: it is taken.
        samples: Calibration samples that second moments are made from; 0: none are.

    Raises:
        UnfitError: no layer can be decomposed, or none gets cheaper; a budget cannot be reached.
    """
    net.eval()
    captured = capture(net, context.inputs)
    found = sites(captured, config.layers, kinds)
    seen = moments(found, found.open, context, samples) if samples else {}
    options: dict[str, Sequence[Candidate]] = {}
    for site in context.track(found.open, "factoring layers", len(found.open)):
        offered = propose(site, seen.get(site.name))
        if isinstance(offered, str):
            found.closed[site.name] = offered
        elif offered:
            options[site.name] = offered
        else:
            found.closed[site.name] = "no rank of it has fewer weights"
    search = _Search(config=config, found=found, options=options, races=Races(net, context))
    search.dropped = dict(found.closed)
    if not options:
        raise UnfitError(f"no layer can be decomposed ({_grouped(search.dropped)})")
    if fixed or config.energy is not None:
        chosen = _raced(search, _kept(search, fixed))
    elif config.latency is not None:
        chosen = _fast(net, search, context, config.latency)
    else:
        chosen = _budgeted(search, *_budget(search))
    if not chosen:  # and higher ranks, which weaker settings ask for, cost more
        raise UnfitError(f"no layer gets cheaper on the target ({_grouped(search.dropped)})")
    return _built(net, search, chosen, context)


def _kept(search: _Search, fixed: bool) -> Chosen:
    """Choose the cheapest candidate of each layer that keeps the energy."""
    chosen: Chosen = {}
    for name, site in search.by_name().items():
        if name not in search.options:
            continue
        own = search.options[name]
        if not fixed:
            assert search.config.energy is not None
            lost = 1 - search.config.energy + _NOTHING_LOST
            own = [c for c in own if c.loss <= lost and _cheaper(site, c)]
        if not own:
            search.dropped[name] = (
                f"no rank that keeps {search.config.energy:g} of its energy has fewer "
                "multiplications"
            )
            continue
        chosen[name] = min(own, key=lambda c: (site.macs(c.parts), c.loss))
    return chosen


def _cheaper(site: Site, candidate: Candidate) -> bool:
    return site.macs(candidate.parts) < site.macs([site.part])


def _raced(search: _Search, chosen: Chosen) -> Chosen:
    """Leave out what was not measured to be faster."""
    if search.config.convert == "all":
        return chosen
    places = search.by_name()
    search.races.run([(places[name], c.parts) for name, c in chosen.items()])
    won: Chosen = {}
    for name, candidate in chosen.items():
        if search.races.faster(places[name], candidate.parts):
            won[name] = candidate
        else:
            search.dropped[name] = _lost(search, places[name], candidate)
    return won


def _lost(search: _Search, site: Site, candidate: Candidate) -> str:
    before, after = search.races.times(site, candidate.parts)
    return f"rank {_text(candidate.rank)} is not faster: {after:.4f} ms, the layer {before:.4f}"


def _text(rank: Sequence[int]) -> str:
    return "x".join(map(str, rank))


def _budget(search: _Search) -> tuple[str, float]:
    config = search.config
    if config.parameters is not None:
        return "parameters", config.parameters
    return "macs", DEFAULT_MACS if config.macs is None else config.macs


def _budgeted(search: _Search, what: str, share: float) -> Chosen:
    """Allocate ranks over all layers; what is measured not to be faster is out, and it goes on."""
    places = search.by_name()
    whole = search.found.macs if what == "macs" else search.found.parameters

    def cost(name: str, parts: Sequence[Part]) -> int:
        return places[name].macs(parts) if what == "macs" else parameters_of(parts)

    left = {
        name: [c for c in own if cost(name, c.parts) < cost(name, [places[name].part])]
        for name, own in search.options.items()
    }
    fixed = whole - sum(cost(name, [places[name].part]) for name in left)
    while True:
        names = list(left)
        losses = [[0.0, *(c.loss for c in left[n])] for n in names]
        costs = [[cost(n, [places[n].part]), *(cost(n, c.parts) for c in left[n])] for n in names]
        picked = allocate(losses, costs, share * whole - fixed)
        if picked is None:
            least = (fixed + sum(min(own) for own in costs)) / whole
            told = _grouped(search.dropped)
            raise UnfitError(
                f"{what} {share:g} of the original's cannot be reached: with every layer that can "
                f"be decomposed at its lowest rank they are {least:.3f}"
                + (f" ({told})" if told else ""),
                too_strong=True,
            )
        chosen = {n: left[n][i - 1] for n, i in zip(names, picked, strict=True) if i}
        won = _raced(search, chosen)
        slow = {n: c for n, c in chosen.items() if n not in won}
        if not slow:
            for name in names:
                if name not in chosen and left[name]:
                    search.dropped[name] = "the budget is reached without it"
            return chosen
        for name, candidate in slow.items():
            shape, macs = (places[name].part, places[name].size), places[name].macs(candidate.parts)
            for other in names:
                if (places[other].part, places[other].size) == shape:
                    # nor is what multiplies more, or only a little less
                    most = _STEP * macs
                    left[other] = [c for c in left[other] if places[other].macs(c.parts) <= most]
                    if not left[other]:
                        search.dropped[other] = _lost(search, places[name], candidate)


def _fast(net: nn.Module, search: _Search, context: Context, share: float) -> Chosen:
    """Search the largest budget of multiply-accumulates that reaches the measured latency."""
    reached: Chosen | None = None
    tried: dict[str, float] = {}
    low, high, budget, best = 0.0, 1.0, share, 1.0
    for _ in range(_SEARCHES):
        if high - low < 0.02:
            break
        try:
            chosen = _budgeted(search, "macs", budget)
        except UnfitError:
            low = budget
            budget = (low + high) / 2
            continue
        shared: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}
        smaller = copy.deepcopy(net, shared)
        before, after = context.latency([net, _put(smaller, search, chosen, context)])
        tried[f"{budget:.3f}"] = after / before
        best = min(best, after / before)
        if after <= share * before:
            reached, low = chosen, budget
        else:
            high = budget
        budget = (low + high) / 2
    context.record(latency_shares=tried)
    if reached is None:
        raise UnfitError(
            f"latency {share:g} of the original's cannot be reached: the lowest measured was "
            f"{best:.2f}",
            too_strong=True,
        )
    return reached


def _put(net: nn.Module, search: _Search, chosen: Chosen, context: Context) -> nn.Module:
    places = search.by_name()
    chains = {
        name: build(c.parts, c.weights(), places[name].layer.bias) for name, c in chosen.items()
    }
    return replace(net, capture(net, context.inputs), chains)


def _built(net: nn.Module, search: _Search, chosen: Chosen, context: Context) -> nn.Module:
    places, races = search.by_name(), search.races
    facts: dict[str, Any] = {}
    macs, parameters = search.found.macs, search.found.parameters
    saved_macs = saved_parameters = 0
    for name, candidate in chosen.items():
        site = places[name]
        costs = {
            "macs": [site.macs([site.part]), site.macs(candidate.parts)],
            "parameters": [parameters_of([site.part]), parameters_of(candidate.parts)],
        }
        saved_macs += costs["macs"][0] - costs["macs"][1]
        saved_parameters += costs["parameters"][0] - costs["parameters"][1]
        facts[name] = {"rank": list(candidate.rank), "loss": candidate.loss, **costs}
        if search.config.convert == "faster":
            facts[name]["ms"] = list(races.times(site, candidate.parts))
    context.record(
        layers=facts,
        dropped={n: why for n, why in search.dropped.items() if n not in chosen},
        macs=1 - saved_macs / macs,
        parameters=1 - saved_parameters / parameters,
    )
    return _put(net, search, chosen, context)


def _grouped(reasons: Mapping[str, str]) -> str:
    """Tell each reason once, with the layers that it is for."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    told = [
        f"{', '.join(names[:_TOLD])}{' ...' if len(names) > _TOLD else ''}: {reason}"
        for reason, names in layers.items()
    ]
    return "; ".join(told[:_TOLD]) + (f"; {len(told) - _TOLD} more" if len(told) > _TOLD else "")
