"""What a technique can buy on a described machine, and which buy nothing there.

The upper end of a gain is the ratio of two predictions, with and without the change. The lower end
keeps half of what was won: conversions, layers that stay as they were, and kernels that are less
used take their part. So the upper end is never more than twice the lower.
"""

from typing import TYPE_CHECKING

from tersor.core.machine import WIDTHS

if TYPE_CHECKING:
    from tersor.described import Estimate, Gain, Graph, Prediction

    Told = Gain | tuple[str, str]  # what it buys, or the technique and why it buys nothing

LEAST = 1.05
"""Times as fast, below which a gain is none."""
CUT = 0.25
"""Share of channels, or of layers, whose removal is spoken of."""


def gains(graph: "Graph", found: "Prediction") -> tuple[tuple["Gain", ...], dict[str, str]]:
    """Tell what each technique buys over the network as it is, and what buys nothing, and why."""
    plain = found.plain
    assert plain is not None
    made: list[Gain] = []
    useless: dict[str, str] = {}
    for step in (_integers, _half, _channels, _weight_only, _fewer_layers, _two_of_four):
        gain = step(graph, found, plain)
        if gain is None:
            continue
        if isinstance(gain, tuple):
            useless[gain[0]] = gain[1]
        else:
            made.append(gain)
    return tuple(sorted(made, key=lambda gain: -gain.high)), useless


def _gain(technique: str, before: float, after: float, why: str) -> "Told":
    from tersor.described import Gain

    high = before / max(after, 1e-12)
    if high < LEAST:
        return technique, f"at most {high:.2f}x: something else bounds the network here"
    return Gain(technique=technique, low=1 + (high - 1) / 2, high=high, why=why)


def _middle(
    graph: "Graph",
    found: "Prediction",
    plain: "Estimate",
    on_chip: bool | None = None,
    **more: float,
) -> float:
    from tersor.described import MIDDLE, seconds

    kept = plain.on_chip if on_chip is None else on_chip
    spent = seconds(graph, found.machine, plain.format, graph.operators, on_chip=kept, **more)
    return spent.total_ms(MIDDLE)


def _of(found: "Prediction", name: str) -> "Estimate | None":
    return next((each for each in found.able if each.format == name), None)


def _integers(graph: "Graph", found: "Prediction", plain: "Estimate") -> "Told | None":
    machine, made = found.machine, _of(found, "int8")
    if made is None:
        return "static", "it has no arithmetic for 8-bit integers"
    if plain.format == "int8":
        return None  # no choice: it is needed to run at all
    ratio = machine.gops["int8"] / machine.gops[plain.format]
    why = f"int8 arithmetic is {ratio:.1f}x as fast as {plain.format}, and bytes are fewer"
    if made.on_chip and not plain.on_chip:
        why += "; in int8 all of it stays on the chip"
    return _gain(
        "static",
        _middle(graph, found, plain),
        _middle(graph, found, made),
        why,
    )


def _half(graph: "Graph", found: "Prediction", plain: "Estimate") -> "Told":
    made = _of(found, "fp16") or _of(found, "bf16")
    if made is None:
        return "half", "it has no arithmetic in 16 bits"
    if WIDTHS[plain.format] < 4:
        return "half", f"the figures are those of {plain.format} already"
    ratio = found.machine.gops[made.format] / found.machine.gops[plain.format]
    why = f"{made.format} arithmetic is {ratio:.1f}x as fast as {plain.format}, with half the bytes"
    return _gain("half", _middle(graph, found, plain), _middle(graph, found, made), why)


def _channels(graph: "Graph", found: "Prediction", plain: "Estimate") -> "Told":
    share = _weights_share(graph)
    why = "arithmetic bounds the network"
    if plain.bound == "memory":
        if plain.on_chip or share < 0.5:
            why = f"memory bounds the network here, and weights are {share:.0%} of the bytes"
            return "channels", why
        why = f"weights are {share:.0%} of the bytes that bound the network"
    elif plain.bound == "starts":
        return "channels", "starting operators bounds the network here, not their size"
    return _gain(
        "channels",
        _middle(graph, found, plain),
        _middle(graph, found, plain, cut=CUT),
        f"{why}; for {CUT:.0%} of the channels",
    )


def _weight_only(graph: "Graph", found: "Prediction", plain: "Estimate") -> "Told":
    width = WIDTHS[plain.format]
    share = _weights_share(graph)
    name = "weight_only"
    if width == 1:
        return name, "weights are of 8 bits already"
    if plain.on_chip:
        return name, "all weights stay on the chip as they are"
    if plain.bound != "memory" or share < 0.5:
        return name, f"weights are {share:.0%} of the bytes, and {_word(plain)} bounds the network"
    return _gain(
        name,
        _middle(graph, found, plain),
        _middle(graph, found, plain, weights=1 / width),
        f"weights are {share:.0%} of the bytes that bound the network; for 8 bits",
    )


def _fewer_layers(graph: "Graph", found: "Prediction", plain: "Estimate") -> "Told":
    if not found.machine.start_us:
        return "drop_layers", "what starting an operator costs there is not known"
    if plain.bound != "starts":
        return "drop_layers", f"{_word(plain)} bounds the network, not starting operators"
    return _gain(
        "drop_layers",
        _middle(graph, found, plain),
        _middle(graph, found, plain, dropped=CUT),
        f"starting {found.operators} operators bounds the network; for {CUT:.0%} of its layers",
    )


def _two_of_four(graph: "Graph", found: "Prediction", plain: "Estimate") -> "Told":
    name = "semi_structured"
    if not found.machine.sparse_2_4:
        return (
            name,
            "it has no arithmetic that leaves out zeros: they take as long as other weights",
        )
    base = _of(found, "fp16") or _of(found, "bf16") or _of(found, "int8")
    if base is None:
        return name, "2:4 arithmetic works in 16 or 8 bits, which do not fit"
    if base.bound != "compute":
        return name, f"{_word(base)} bounds the network in {base.format}, not arithmetic"
    return _gain(
        name,
        _middle(graph, found, base),
        _middle(graph, found, base, faster=2.0),
        f"zeros in 2 of 4 neighbors are left out; on top of {base.format}",
    )


def _weights_share(graph: "Graph") -> float:
    """Tell the share of weights in the bytes that operators move."""
    moved = sum(each.work.weight_bytes + each.work.moved_bytes for each in graph.operators)
    return graph.weight_bytes / max(1, moved)


def _word(estimate: "Estimate") -> str:
    words = {"compute": "arithmetic", "memory": "memory", "starts": "starting operators"}
    return words[estimate.bound]
