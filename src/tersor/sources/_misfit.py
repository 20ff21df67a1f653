"""Compare the entries of a weights file with those of a network, and say what went wrong.

Names and shapes are all that is needed: what a wrapper added, another width or depth, another head,
queries, keys and values in one matrix, other names for the same layers. Each finding accounts for
some entries; the next one looks at the rest.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tersor.sources._renames import Prefix, find_prefix, find_renames, layer_of, pattern_of

Shapes = Mapping[str, tuple[int, ...]]

_SHOWN = 4
_COUNTER = "num_batches_tracked"
"""Of a batch norm; nobody misses it."""
_WORTH = 0.1
"""Share of a network's entries that must fit for a partial load to be proposed."""
_STRANGE = 0.8
"""Share of entries without an explanation from which on the file belongs to another network."""
_FEW = 10
"""Entries of a network, up to which shares say nothing."""
_WRAPPERS = {
    "module.": "saved from DataParallel",
    "_orig_mod.": "saved from torch.compile",
    "module._orig_mod.": "saved from DataParallel around torch.compile",
}
_OTHER_FILES = (
    (r"\.lora_[AB]\.", "it holds LoRA adapters, not a network: merge them into theirs first"),
    (r"\.(qweight|qzeros|SCB|absmax)$", "its weights are quantized already: give the float ones"),
    (r"^(optimizer|optimizer_states|state)\.", "it holds an optimizer's state: save the network"),
    (
        r"\.(weight_g|parametrizations\.weight\.original0)$",
        "its weights are in two parts (weight norm): remove the parametrization before saving",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the entries of a file and of a network compare."""

    given: Shapes
    """Those of the file."""
    wanted: Shapes
    """Those of the network, in its order."""
    missing: tuple[str, ...]
    """In the network only."""
    unexpected: tuple[str, ...]
    """In the file only."""
    wrong: tuple[str, ...]
    """In both, with different shapes."""

    @property
    def good(self) -> tuple[str, ...]:
        """Return those in both, with the same shape."""
        return tuple(n for n in self.wanted if self.given.get(n) == self.wanted[n])

    @property
    def fits(self) -> bool:
        """Tell whether there is nothing to say."""
        return not (self.missing or self.unexpected or self.wrong)

    def renamed(self, prefix: Prefix) -> "Comparison":
        """Compare again, with a prefix removed from the file's names or added to them."""
        strange = set(self.unexpected)
        given = {prefix.apply(name, strange): shape for name, shape in self.given.items()}
        spare = set(self.wanted) - set(self.given) - set(self.missing)
        return compare(given, self.wanted, spare)

    def without(self, names: Iterable[str]) -> "Comparison":
        """Leave out what is accounted for."""
        gone = set(names)
        return replace(
            self,
            missing=tuple(n for n in self.missing if n not in gone),
            unexpected=tuple(n for n in self.unexpected if n not in gone),
            wrong=tuple(n for n in self.wrong if n not in gone),
        )


def compare(given: Shapes, wanted: Shapes, optional: Iterable[str] = ()) -> Comparison:
    """Compare names and shapes.

    Args:
        given: Of the file.
        wanted: Of the network, in its order.
        optional: Entries of the network that the file need not have.
    """
    spare = set(optional)
    return Comparison(
        given=given,
        wanted=wanted,
        missing=tuple(n for n in wanted if n not in given and n not in spare),
        unexpected=tuple(
            sorted((n for n in given if n not in wanted), key=lambda n: n.endswith(_COUNTER))
        ),
        wrong=tuple(n for n in wanted if n in given and given[n] != wanted[n]),
    )


def lists(found: Comparison) -> str:
    """List what is missing, unexpected, and of another shape."""
    wrong = [
        f"{name} ({dims(found.given[name])} in the file, {dims(found.wanted[name])} in the network)"
        for name in found.wrong
    ]
    kinds = [
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("of another shape", wrong),
    ]
    return "; ".join(f"{len(names)} {kind}: {shorten(names)}" for kind, names in kinds if names)


def explain(found: Comparison) -> str:
    """Say what is likely the matter and what to do, in at most two lines; or nothing."""
    prefix = find_prefix(found.given, found.wanted, found.unexpected, found.missing)
    said = []
    rest = found
    if prefix is not None:
        rest = found.renamed(prefix)
        how = f"{_WRAPPERS[prefix.old]}: " if prefix.old in _WRAPPERS else ""
        total = len(rest.good) + len(rest.missing) + len(rest.wrong)
        whole = "all" if rest.fits else f"{len(rest.good)} of {total}"
        said.append(f"{how}with {prefix} {whole} entries fit")
    said += findings(rest)
    lines = [f"likely {'; '.join(said)}"] if said else []
    if prefix is not None and rest.fits:
        lines[0] += "; --partial does that"
    elif not found.fits and _worth(rest):
        count = _count(len(rest.good), "entry that fits", "entries that fit")
        lines.append(f"--partial loads the {count}" + (" then" if prefix is not None else ""))
    return "\n".join(lines)


def _worth(found: Comparison) -> bool:
    """Tell whether enough fits for a partial load; batch counters always do."""
    counts = [
        sum(not name.endswith(_COUNTER) for name in names) for names in (found.good, found.wanted)
    ]
    return counts[0] >= _WORTH * counts[1]


def findings(found: Comparison) -> list[str]:
    """Say what is likely the matter, where the names are those of the network."""
    other = [said for mark, said in _OTHER_FILES if any(re.search(mark, n) for n in found.given)]
    if other:
        return other[:1]
    said = []
    rest = found
    for look in (_projections, _folded, _renamed, _depth, _head, _turned, _width):
        text, explained = look(rest)
        if text:
            said.append(text)
            rest = rest.without(explained)
    left = len(rest.missing) + len(rest.unexpected) + len(rest.wrong)
    total = left + len(found.good)
    if total > _FEW and left > _STRANGE * total:
        agreeing = _count(len(found.good), "entry agrees", "entries agree")
        return [f"the file of another network: {agreeing} of {len(found.given)}"]
    return said


def _projections(found: Comparison) -> tuple[str, set[str]]:
    """Queries, keys and values in one matrix on one side, apart on the other."""
    for one, three, where in (
        (found.missing, found.unexpected, "apart in the file, in one in the network"),
        (found.unexpected, found.missing, "in one in the file, apart in the network"),
    ):
        shapes = {**found.given, **found.wanted}
        explained: set[str] = set()
        examples: list[str] = []
        for name in sorted(one, key=_ending, reverse=True):
            near = sorted(
                n
                for n in three
                if _root(n) == _root(name)
                and len(shapes[n]) == len(shapes[name])
                and 3 * shapes[n][0] == shapes[name][0]
                and shapes[n][1:] == shapes[name][1:]
                and _ending(n) == _ending(name)
                and re.search(r"(^|[._])(q|k|v|query|key|value)(_|\.|$)", n[len(_root(n)) :])
            )
            if len(near) == 3:
                apart = ", ".join(layer_of(n) for n in sorted(near, key=_position))
                examples.append(f"{apart} and {layer_of(name)}")
                explained |= {name, *near}
        if explained:
            return f"query, key and value are {where} ({examples[0]})", explained
    return "", set()


def _renamed(found: Comparison) -> tuple[str, set[str]]:
    """Layers of the same shapes under other names."""
    pairs = find_renames(found.given, found.wanted, found.unexpected, found.missing)
    if not pairs:
        return "", set()
    examples: dict[tuple[str, str], str] = {}
    for a, b in pairs:
        layers = layer_of(a), layer_of(b)
        shown = (a, b) if layers[0] == layers[1] else layers
        examples.setdefault((pattern_of(shown[0]), pattern_of(shown[1])), " -> ".join(shown))
    more = f" and {len(examples) - _SHOWN} more" if len(examples) > _SHOWN else ""
    text = (
        f"renamed, {_count(len(pairs), 'entry', 'entries')} of the same shapes: "
        f"{', '.join(list(examples.values())[:_SHOWN])}{more}"
    )
    return text, {name for pair in pairs for name in pair}


def _folded(found: Comparison) -> tuple[str, set[str]]:
    """Batch norms that the file has in its convolutions' weights and biases."""
    norms = {layer_of(n) for n in found.missing if n.endswith(".running_mean")}
    of_norms = [n for n in found.missing if layer_of(n) in norms]
    weights = (f"{layer_of(n)}.weight" for n in found.unexpected)
    biases = [
        n
        for n, weight in zip(found.unexpected, weights, strict=True)
        if n.endswith(".bias") and weight in found.given and weight in found.wanted
    ]
    if not norms or len(biases) < len(norms):
        return "", set()
    text = f"the file's {len(norms)} batch norms are folded into the layers before them: build "
    return text + "the network without them", {*of_norms, *biases}


def _depth(found: Comparison) -> tuple[str, set[str]]:
    """More or fewer numbered blocks."""
    blocks = {True: _blocks(found.given), False: _blocks(found.wanted)}
    counts: dict[tuple[int, int], list[str]] = {}
    explained: set[str] = set()
    for place in blocks[False].keys() & blocks[True].keys():
        theirs, ours = blocks[True][place], blocks[False][place]
        extra = theirs ^ ours
        if not extra or not (theirs < ours or ours < theirs) or place in explained:
            continue
        own = {
            n
            for n in (*found.missing, *found.unexpected)
            if any(n.startswith(f"{place}{number}.") for number in extra)
        }
        if own - explained:
            explained |= own
            counts.setdefault((len(theirs), len(ours)), []).append(place.rstrip("."))
    if not counts:
        return "", set()
    parts = [
        f"{_some(sorted(places))} {'has' if len(places) == 1 else 'have'} {theirs} blocks "
        f"{'' if len(places) == 1 else 'each '}in the file, {ours} in the network"
        for (theirs, ours), places in sorted(counts.items())
    ]
    return f"another depth: {', '.join(parts)}; build it with the file's", explained


def _head(found: Comparison) -> tuple[str, set[str]]:
    """Another number of classes, or a head that only one of the two has."""
    heads = [layer_of(n) for n in found.wanted if n.endswith(".weight") or "." not in n]
    if not heads:
        return "", set()
    head = heads[-1]
    own = [n for n in found.wanted if layer_of(n) == head]
    wrong = [n for n in own if n in found.wrong]
    missing = [n for n in own if n in found.missing]
    only = "only " if {*wrong, *missing} >= {*found.wrong, *found.missing} else ""
    if wrong and all(found.given[n][1:] == found.wanted[n][1:] for n in wrong):
        theirs, ours = found.given[wrong[0]][0], found.wanted[wrong[0]][0]
        said = f"{only}the head {head!r} differs: {theirs} outputs in the file, {ours} in the "
        return said + "network", set(wrong)
    if missing and len(missing) == len(own) and found.good:
        other = [
            n
            for n in found.unexpected
            if _ending(n) == _ending(own[0])
            and len(found.given[n]) == len(found.wanted[own[0]]) > 1
            and found.given[n][1:] == found.wanted[own[0]][1:]
        ]
        if other:
            name = layer_of(other[-1])
            gone = {n for n in found.unexpected if layer_of(n) == name}
            said = f"another head: {name!r} with {found.given[other[-1]][0]} outputs in the file, "
            said += f"{head!r} with {found.wanted[own[0]][0]} in the network"
            return said, {*missing, *gone}
        return f"{only}the head {head!r} is missing in the file", set(missing)
    if not found.missing and not found.wrong and found.unexpected:
        layers = dict.fromkeys(map(layer_of, found.unexpected))
        if len(layers) <= 2:
            has = "has" if len(layers) == 1 else "have"
            said = f"only {_some(list(layers))} of the file {has} no place in the network"
            return said, set(found.unexpected)
    return "", set()


def _turned(found: Comparison) -> tuple[str, set[str]]:
    """Weights stored with their axes in another order."""
    turned = [
        n
        for n in found.wrong
        if sorted(found.given[n]) == sorted(found.wanted[n])
        and (found.given[n][::-1] == found.wanted[n] or len(found.wanted[n]) == 4)
    ]
    if not turned:
        return "", set()
    return (
        f"{_count(len(turned), 'weight is', 'weights are')} transposed ({turned[0]}), as "
        "TensorFlow and GPT-2 store them: turn the axes in the file",
        set(turned),
    )


def _width(found: Comparison) -> tuple[str, set[str]]:
    """Most layers with more or fewer channels."""
    layers = {layer_of(n) for n in found.wrong}
    sizes: Counter[tuple[int, int]] = Counter()
    for name in found.wrong:
        theirs, ours = found.given[name], found.wanted[name]
        if len(theirs) == len(ours):
            sizes.update((a, b) for a, b in zip(theirs, ours, strict=True) if a != b)
    if not sizes:
        return "", set()
    shown = sorted(pair for pair, _ in sizes.most_common(_SHOWN))
    file, net = (", ".join(str(pair[side]) for pair in shown) for side in (0, 1))
    if len(layers) > 2:
        text = f"another width: {file} channels in the file where the network has {net} "
        return text + f"({len(layers)} layers); build it with the file's", set(found.wrong)
    text = f"{_some(sorted(layers))} differ{'s' * (len(layers) == 1)}: {file} in the file where "
    return text + f"the network has {net}", set(found.wrong)


def _blocks(names: Iterable[str]) -> dict[str, set[int]]:
    """Map each place before a number ("layers.") to the numbers that follow it."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if part.isdigit():
                found.setdefault(".".join([*parts[:i], ""]), set()).add(int(part))
    return found


def _root(name: str) -> str:
    """Return the block that an attention's projection is in."""
    parts = layer_of(name).split(".")
    while parts and re.search(
        r"^(c_)?(q|k|v|qkv|query|key|value|in|self|to)(_|$)|attn$", parts[-1]
    ):
        parts.pop()
    return ".".join(parts)


def _position(name: str) -> int:
    """Order queries, keys, values."""
    found = re.search(r"(^|[._])(q|k|v)[a-z]*(_|\.|$)", name)
    return "qkv".index(found[2]) if found else 0


def _ending(name: str) -> str:
    return "bias" if name.endswith("bias") else "weight"


def _some(names: Sequence[str]) -> str:
    shown = [f"{name!r}" for name in names[:_SHOWN]]
    more = len(names) - _SHOWN
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def shorten(names: Sequence[str]) -> str:
    """List a few names and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def dims(shape: tuple[int, ...]) -> str:
    """Write a shape."""
    return "x".join(map(str, shape)) or "scalar"
