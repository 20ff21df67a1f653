"""Put weights into a network; where they do not fit, say what does not and what may be meant."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.core.packing import is_packed
from tersor.sources import _safetensors

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_SHOWN = 4
_CONVERT = (
    "convert it once, where you trust it: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
)


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How the entries of a file and of a network compare."""

    missing: list[str]
    """In the network only."""
    unexpected: list[str]
    """In the file only."""
    wrong: list[str]
    """In both, with different shapes."""
    good: list[str]
    """In both, with the same shape."""


def load_weights(net: nn.Module, file: Path, *, partial: bool) -> tuple[str, ...]:
    """Load a safetensors file into a network.

    Args:
        net: Changed in place.
        file: A .safetensors file.
        partial: Load what fits (after removing or adding a common prefix, where that is clear).

    Returns:
        What there is to say: renamed, converted or left out entries.

    Raises:
        ModelError: the file is a pickle, damaged, or does not fit; lists what, and likely renames.
    """
    if file.suffix.lower() in _PICKLED:
        raise ModelError(
            f"weights {str(file)!r}: {file.suffix} files are pickles, which can run code when "
            f"loaded, and are not read; {_CONVERT}"
        )
    if is_packed(file):
        raise ModelError(
            f"weights {str(file)!r} are a packed file; give the artifact that it is in"
        )
    _safetensors.check(file)
    from safetensors.torch import load_file

    given = load_file(file)
    wanted = net.state_dict(keep_vars=True)
    notes: list[str] = []
    fit = _compare(given, wanted)
    if partial and (fit.missing or fit.unexpected):
        rename = _prefix(given, wanted, fit)
        if rename is not None:
            given = {_renamed(name, *rename): tensor for name, tensor in given.items()}
            notes.append(f"weights {file.name!r}: {_say_prefix(*rename)}")
            fit = _compare(given, wanted)
    if fit.missing or fit.unexpected or fit.wrong:
        if not partial:
            raise ModelError(_misfit(net, file, given, wanted, fit))
        if not fit.good:
            raise ModelError(
                _misfit(net, file, given, wanted, fit) + " (nothing fits, even partially)"
            )
        notes += _left_out(file, given, wanted, fit)
    notes += _converted(file, given, wanted, fit.good)
    net.load_state_dict({name: given[name] for name in fit.good}, strict=False)
    return tuple(notes)


def check_finite(entries: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse NaN and infinite weights. A mask of zeros and infinities is not a weight.

    Raises:
        ModelError: naming the tensors.
    """
    bad = [name for name, tensor in entries if not _finite(tensor)]
    if bad:
        raise ModelError(
            f"{where} has NaN or infinite values in {len(bad)} tensor{'s' * (len(bad) > 1)}: "
            f"{shorten(bad)}; train or repair it first, compressing it would hide the damage"
        )


def shorten(names: list[str]) -> str:
    """List a few names and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return True
    values = tensor.detach()
    if values.element_size() == 1:  # 8-bit floats have few operators of their own
        values = values.float()
    if bool(torch.isfinite(values).all()):
        return True
    if bool(torch.isnan(values).any()):
        return False
    finite = values[torch.isfinite(values)]
    return values.numel() == 1 or (finite.numel() > 0 and not bool(finite.any()))


def _compare(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> _Fit:
    """Compare names and shapes; batch counters may be missing, and one name of a tied tensor."""
    both = [name for name in wanted if name in given]
    present = {_place(wanted[name]) for name in both}
    missing = [
        name
        for name in wanted
        if name not in given
        and not name.endswith("num_batches_tracked")
        and _place(wanted[name]) not in present
    ]
    wrong = [name for name in both if given[name].shape != wanted[name].shape]
    return _Fit(
        missing=missing,
        unexpected=[name for name in given if name not in wanted],
        wrong=wrong,
        good=[name for name in both if name not in set(wrong)],
    )


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Identify a tensor's memory: two names of one tensor have the same."""
    pointer = tensor.data_ptr()
    return (pointer or id(tensor), tensor.shape)


def _prefix(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], fit: _Fit
) -> tuple[str, str] | None:
    """Find the prefix to (remove from, add to) the file's names, where exactly one fits best."""
    unexpected, missing = set(fit.unexpected), set(fit.missing)
    votes: Counter[tuple[str, str]] = Counter()
    for name in unexpected:
        parts = name.split(".")
        for i in range(1, len(parts)):
            rest = ".".join(parts[i:])
            if rest in missing and given[name].shape == wanted[rest].shape:
                votes[".".join(parts[:i]) + ".", ""] += 1
    for name in missing:
        parts = name.split(".")
        for i in range(1, len(parts)):
            rest = ".".join(parts[i:])
            if rest in unexpected and given[rest].shape == wanted[name].shape:
                votes["", ".".join(parts[:i]) + "."] += 1
    ranked = votes.most_common(2)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    best, count = ranked[0]
    return best if 2 * count > min(len(unexpected), len(missing)) else None


def _renamed(name: str, remove: str, add: str) -> str:
    return name.removeprefix(remove) if remove else add + name


def _say_prefix(remove: str, add: str) -> str:
    return (
        f"prefix {remove!r} removed from its names"
        if remove
        else f"prefix {add!r} added to its names"
    )


def _moves(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], fit: _Fit
) -> list[tuple[str, str]]:
    """Pair unexpected with missing layers of the same suffix and shape."""
    moves: Counter[tuple[str, str]] = Counter()
    for name in fit.unexpected:
        same = [m for m in fit.missing if wanted[m].shape == given[name].shape]
        scored = sorted(((_shared(name, m), m) for m in same), reverse=True)
        if not scored or scored[0][0] == 0:
            continue
        if len(scored) > 1 and scored[0][0] == scored[1][0]:
            continue
        count, best = scored[0]
        moves[
            ".".join(name.split(".")[:-count]) or name, ".".join(best.split(".")[:-count]) or best
        ] += 1
    return [move for move, _ in moves.most_common(_SHOWN)]


def _shared(one: str, other: str) -> int:
    """Count the last parts that two dotted names share."""
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _misfit(
    net: nn.Module,
    file: Path,
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    fit: _Fit,
) -> str:
    lists = _lists(given, wanted, fit)
    text = f"weights {str(file)!r} do not fit {type(net).__name__}: {'; '.join(lists)}"
    prefix = _prefix(given, wanted, fit)
    if prefix is not None:
        text += f"\nlikely with {_say_prefix(*prefix)}; --partial does that"
    else:
        moves = _moves(given, wanted, fit)
        if moves:
            text += "\nlikely renamed: " + ", ".join(f"{a} -> {b}" for a, b in moves)
        if fit.good:
            text += f"\n--partial loads the {len(fit.good)} entries that fit"
    return text


def _lists(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], fit: _Fit) -> list[str]:
    wrong = [
        f"{name} ({_dims(given[name])} in the file, {_dims(wanted[name])} in the network)"
        for name in fit.wrong
    ]
    kinds = [("missing", fit.missing), ("unexpected", fit.unexpected), ("of another shape", wrong)]
    return [f"{len(names)} {kind}: {shorten(names)}" for kind, names in kinds if names]


def _left_out(
    file: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], fit: _Fit
) -> list[str]:
    kept = len(fit.missing) + len(fit.wrong)
    return [
        f"weights {file.name!r} loaded partially, {len(fit.good)} entries; {kept} keep the values "
        f"of the network's code. {'; '.join(_lists(given, wanted, fit))}"
    ]


def _converted(
    file: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: list[str]
) -> list[str]:
    kinds = Counter(
        f"{str(given[n].dtype)[6:]} to {str(wanted[n].dtype)[6:]}"
        for n in names
        if given[n].dtype != wanted[n].dtype
    )
    return [
        f"weights {file.name!r}: {count} entries converted from {kind}"
        for kind, count in kinds.items()
    ]


def _dims(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
