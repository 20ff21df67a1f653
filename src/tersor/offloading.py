"""offload(): where a network should run: on the device, on a server, or one part on each.

Local needs no link. Cloud and edge send the inputs and get the outputs back. Hybrid runs the first
operators on the device, sends the tensors that cross the cut, and gets the outputs back; of all
cuts the fastest is taken.

Source:
    Kang et al., "Neurosurgeon: Collaborative Intelligence Between the Cloud and Mobile Edge",
    ASPLOS 2017: device time, upload and server time at every cut. Ours differ: times are ranges
    predicted from described machines, the graph may branch (all tensors that are used behind a cut
    cross it), the way back and the round trip count, and tensors may be sent in 8 bits.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tersor.core.errors import RecipeError, suggest
from tersor.core.machine import Machine
from tersor.core.runtime import Arrays
from tersor.described import Estimate, Graph, Operator, count, estimate, on, unknown_starts

Where = Literal["local", "edge", "cloud", "hybrid"]
Meets = Literal["yes", "perhaps", "no", ""]
_RATES = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between device and server; the same rate both ways."""

    mbit_s: float
    rtt_ms: float
    """Round trip of an empty message."""

    def __post_init__(self) -> None:
        if self.mbit_s <= 0:
            raise ValueError(f"the rate of a link must be more than 0, got {self.mbit_s:g}")
        if self.rtt_ms < 0:
            raise ValueError(f"the round trip must not be negative, got {self.rtt_ms:g}")

    @staticmethod
    def parse(text: str) -> "Link":
        """Read "50Mbit,30ms".

        Raises:
            RecipeError: it has another form.
        """
        rate, comma, trip = text.partition(",")
        if not comma:
            raise RecipeError(f"--link {text!r}: give rate and round trip, such as 50Mbit,30ms")
        mbit_s = _number(rate, _RATES, f"--link {text!r}")
        try:
            return Link(mbit_s=mbit_s, rtt_ms=_number(trip, _TIMES, f"--link {text!r}"))
        except ValueError as error:
            raise RecipeError(f"--link {text!r}: {error}") from error

    def ms(self, size_bytes: int) -> float:
        """Tell how long so many bytes are under way, the round trip left out."""
        return size_bytes * 8 / (self.mbit_s * 1e3)


def read_deadline(text: str) -> float:
    """Read "20ms" as milliseconds.

    Raises:
        RecipeError: it has another form, or is not more than 0.
    """
    found = _number(text, _TIMES, f"--deadline {text!r}")
    if found <= 0:
        raise RecipeError(f"--deadline {text!r} must be more than 0")
    return found


def _number(text: str, units: dict[str, float], where: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+?)(?:/s)?\s*", text)
    if found is None:
        some = next(iter(units)) if "ms" not in units else "ms"
        raise RecipeError(f"{where}: {text!r} is no number with a unit, such as 50{some}")
    unit = found[2].lower()
    if unit not in units:
        near = suggest(unit, units)
        raise RecipeError(f"{where}: unknown unit {found[2]!r}.{near} One of {', '.join(units)}")
    return float(found[1]) * units[unit]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run the network."""

    where: Where
    device: str = ""
    """Machine that computes at hand; empty: none."""
    server: str = ""
    """Machine that computes away; empty: none."""
    format: str = ""
    """Number formats of the arithmetic, the device's first."""
    low_ms: float
    high_ms: float
    device_ms: tuple[float, float] = (0.0, 0.0)
    server_ms: tuple[float, float] = (0.0, 0.0)
    link_ms: float = 0.0
    """Both ways, with the round trip."""
    sent: tuple[str, ...] = ()
    """Tensors that leave the device."""
    sent_bytes: int = 0
    returned_bytes: int = 0
    bits: int = 32
    """Of a number that is sent."""
    after: str = ""
    """The last operator on the device."""
    meets: Meets = ""
    """Whether the deadline holds: at both ends of the range, at the lower one, at none."""

    @property
    def middle_ms(self) -> float:
        """The geometric middle, to order by."""
        return math.sqrt(self.low_ms * self.high_ms)


@dataclass(frozen=True, kw_only=True)
class Offloading:
    """All ways to run the network, the best one first."""

    options: tuple[Option, ...]
    deadline_ms: float | None
    advice: str
    refused: tuple[str, ...] = ()
    """Ways that are closed, and why."""
    unknown: str = ""
    """What is not in the figures, so that they are lower bounds; empty: nothing."""


def offload(
    net: Any,
    inputs: Arrays,
    *,
    device: Machine,
    server: Machine,
    link: Link,
    edge: Machine | None = None,
    edge_link: Link | None = None,
    deadline_ms: float | None = None,
    transfers: Sequence[int] = (32, 8),
) -> Offloading:
    """Rank local, edge, cloud and hybrid.

    Networks run as they are, in the widest number format that each machine has and that fits;
    local also in the fastest one.

    Args:
        net: onnx.ModelProto, in floats. Not modified.
        inputs: By the names of the graph's inputs; their bytes are what is sent.
        device: The machine at hand.
        server: The machine in the cloud.
        link: Between both.
        edge: A second server, near.
        edge_link: To it; `link` where it is left out.
        deadline_ms: For one run.
        transfers: Bits of a float that is sent: 32, 16 or 8. Other tensors are sent as they are.

    Raises:
        ModelError: a shape cannot be told, or the network is quantized already.
    """
    graph = count(net, inputs)
    options: list[Option] = []
    refused: list[str] = []
    alone = on(graph, device)
    if alone.plain is None or alone.best is None:
        refused.append(f"local: {device.name} cannot run it: {alone.reason}")
    else:
        options += [_local(device, made) for made in {alone.plain: 0, alone.best: 0}]
    places: list[tuple[Where, Machine, Link]] = [("cloud", server, link)]
    if edge is not None:
        places.append(("edge", edge, edge_link or link))
    for where, machine, way in places:
        away = on(graph, machine)
        if away.plain is None:
            refused.append(f"{where}: {machine.name} cannot run it: {away.reason}")
        for bits in transfers:
            if away.plain is not None:
                options.append(_away(graph, where, machine, away.plain, way, bits))
            split = _best_split(graph, device, machine, way, bits)
            if split is not None:
                options.append(split)
    options = [_judged(each, deadline_ms) for each in options]
    ranked = sorted(
        options, key=lambda o: (("yes", "", "perhaps", "no").index(o.meets), o.middle_ms)
    )
    return Offloading(
        options=tuple(ranked),
        deadline_ms=deadline_ms,
        advice=_advice(ranked, deadline_ms, refused),
        refused=tuple(refused),
        unknown=unknown_starts([device, *(machine for _, machine, _ in places)]),
    )


def crossing(graph: Graph, cut: int) -> tuple[str, ...]:
    """Name the tensors that must be sent where the first `cut` operators run on the device."""
    here = {*graph.inputs, *(n for each in graph.operators[:cut] for n in each.made)}
    used = {name for each in graph.operators[cut:] for name in each.taken}
    return tuple(sorted(here & used))


def size_of(graph: Graph, names: Sequence[str], bits: int) -> int:
    """Tell the bytes of tensors whose floats are sent in so many bits."""
    scale = bits / (8 * graph.width)
    return sum(
        math.ceil(scale * graph.sizes[name]) if name in graph.floats else graph.sizes[name]
        for name in names
    )


def _local(device: Machine, made: Estimate) -> Option:
    times = (made.low_ms, made.high_ms)
    return Option(
        where="local",
        device=device.name,
        format=made.format,
        low_ms=made.low_ms,
        high_ms=made.high_ms,
        device_ms=times,
    )


def _away(
    graph: Graph, where: Where, server: Machine, made: Estimate, link: Link, bits: int
) -> Option:
    sent = crossing(graph, 0)
    up, down = size_of(graph, sent, bits), size_of(graph, graph.outputs, bits)
    link_ms = link.rtt_ms + link.ms(up + down)
    return Option(
        where=where,
        server=server.name,
        format=made.format,
        low_ms=link_ms + made.low_ms,
        high_ms=link_ms + made.high_ms,
        server_ms=(made.low_ms, made.high_ms),
        link_ms=link_ms,
        sent=sent,
        sent_bytes=up,
        returned_bytes=down,
        bits=bits,
    )


def _best_split(
    graph: Graph, device: Machine, server: Machine, link: Link, bits: int
) -> Option | None:
    """Find the fastest cut with operators on both sides that both machines have room for."""
    found: Option | None = None
    for cut in range(1, len(graph.operators)):
        first, last = graph.operators[:cut], graph.operators[cut:]
        if not _starts(first) or not _starts(last) or first[-1].view:
            continue
        one, other = _part(graph, device, first), _part(graph, server, last)
        if one is None or other is None:
            continue
        sent = crossing(graph, cut)
        if not set(sent) <= set(graph.sizes):
            continue  # what crosses it has no size that can be told
        made = {name for each in last for name in each.made}
        up = size_of(graph, sent, bits)
        down = size_of(graph, [name for name in graph.outputs if name in made], bits)
        link_ms = link.rtt_ms + link.ms(up + down)
        option = Option(
            where="hybrid",
            device=device.name,
            server=server.name,
            format=f"{one.format}, {other.format}",
            low_ms=link_ms + one.low_ms + other.low_ms,
            high_ms=link_ms + one.high_ms + other.high_ms,
            device_ms=(one.low_ms, one.high_ms),
            server_ms=(other.low_ms, other.high_ms),
            link_ms=link_ms,
            sent=sent,
            sent_bytes=up,
            returned_bytes=down,
            bits=bits,
            after=first[-1].name,
        )
        if found is None or option.middle_ms < found.middle_ms:
            found = option
    return found


def _starts(operators: Sequence[Operator]) -> bool:
    return any(not each.view for each in operators)


def _part(graph: Graph, machine: Machine, operators: Sequence[Operator]) -> Estimate | None:
    """Estimate some operators in the widest format that fits; None where none does."""
    made = (estimate(graph, machine, name, operators) for name in machine.formats)
    return next((each for each in made if each.fits), None)


def _judged(option: Option, deadline_ms: float | None) -> Option:
    meets: Meets = ""
    if deadline_ms is not None:
        meets = "no" if option.low_ms > deadline_ms else "perhaps"
        meets = "yes" if option.high_ms <= deadline_ms else meets
    return Option(**{**vars(option), "meets": meets})


def _advice(ranked: Sequence[Option], deadline_ms: float | None, refused: Sequence[str]) -> str:
    """Say which way to take, and why."""
    if not ranked:
        return "nothing can run this network: " + "; ".join(refused)
    local = next((each for each in ranked if each.where == "local"), None)
    first = ranked[0]
    if local is not None and local.meets == "yes":
        first = local  # enough is enough: it needs no link
    private = "needs no link, so it works offline and nothing leaves the device"
    if first.where == "local":
        reason = "meets the deadline and" if first.meets == "yes" else "is the fastest, and"
        reason = "may meet the deadline, and" if first.meets == "perhaps" else reason
        text = f"run it on the device ({first.format}): it {reason} {private}"
    else:
        text = f"{_called(first)}; it needs the link at every run"
        if local is not None:
            text += f", where local would take {_range(local)} and none"
    if deadline_ms is None or first.meets == "yes":
        return text
    if first.meets == "perhaps":
        return f"{text}; whether it meets {deadline_ms:g} ms only a measurement can tell"
    nearest = min(ranked, key=lambda each: each.low_ms)
    return (
        f"nothing meets {deadline_ms:g} ms; the nearest is {_called(nearest)}, at best "
        f"{nearest.low_ms:.3g} ms, of which the link takes {nearest.link_ms:.3g} ms: make the "
        "network smaller, or take a faster machine or link"
    )


def _called(option: Option) -> str:
    if option.where == "local":
        return f"local on {option.device} ({option.format})"
    if option.where == "hybrid":
        return f"split it after {option.after}: {option.device} first, then {option.server}"
    return f"send the inputs to the {option.where} ({option.server})"


def _range(option: Option) -> str:
    return f"{option.low_ms:.3g} to {option.high_ms:.3g} ms"
