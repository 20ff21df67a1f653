"""Put weights into a network; where they do not fit, say what does not and what may be meant."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.core.packing import is_packed
from tersor.core.sniffing import PICKLED
from tersor.sources import _safetensors
from tersor.sources._misfit import Comparison, compare, explain, findings, lists, shorten
from tersor.sources._renames import find_prefix

_CONVERT = (
    "convert it once, where you trust it: "
    "safetensors.torch.save_file({tensors}, 'weights.safetensors')"
)
_OTHER_TOOLS = {".joblib": "joblib", ".dill": "dill"}


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
    if file.suffix.lower() in PICKLED:
        tool = _OTHER_TOOLS.get(file.suffix.lower(), "torch")
        load = "load(FILE, weights_only=True)" if tool == "torch" else "load(FILE)"
        convert = _CONVERT.format(tensors=f"{tool}.{load}")
        raise ModelError(
            f"weights {str(file)!r}: {file.suffix} files are pickles, which can run code when "
            f"loaded, and are not read; {convert}"
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
    found = compare(_shapes(given), _shapes(wanted), _optional(given, wanted))
    if partial and (found.missing or found.unexpected):
        prefix = find_prefix(found.given, found.wanted, found.unexpected, found.missing)
        if prefix is not None:
            strange = set(found.unexpected)
            given = {prefix.apply(name, strange): tensor for name, tensor in given.items()}
            notes.append(f"weights {file.name!r}: {prefix}")
            found = compare(_shapes(given), found.wanted, _optional(given, wanted))
    if not found.fits:
        if not partial:
            raise ModelError(misfit(f"weights {str(file)!r}", type(net).__name__, found))
        notes.append(left_out(f"weights {str(file)!r}", type(net).__name__, found))
    notes += _converted(file, given, wanted, found.good)
    net.load_state_dict({name: given[name] for name in found.good}, strict=False)
    return tuple(notes)


def misfit(what: str, network: str, found: Comparison) -> str:
    """Say what does not fit, why that is likely, and what to do.

    Args:
        what: The file, as a message begins with it.
        network: The network's class.
        found: How they compare.
    """
    said = f"{what} do not fit {network}: {lists(found)}"
    return "\n".join(line for line in (said, explain(found)) if line)


def left_out(what: str, network: str, found: Comparison) -> str:
    """Say what a partial load leaves out.

    Raises:
        ModelError: nothing fits.
    """
    if not found.good:
        raise ModelError(misfit(what, network, found) + "\nnothing fits, even partially")
    kept = len(found.missing) + len(found.wrong)
    why = "; ".join(findings(found))
    return (
        f"{what} loaded partially, {len(found.good)} entries; {kept} keep the values of the "
        f"network's code. {lists(found)}" + (f". Likely {why}" if why else "")
    )


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


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _optional(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> set[str]:
    """List what a file need not have: batch counters, and all names but one of a tied tensor."""
    present = {_place(wanted[name]) for name in wanted if name in given}
    return {
        name
        for name, tensor in wanted.items()
        if name.endswith("num_batches_tracked") or _place(tensor) in present
    }


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Identify a tensor's memory: two names of one tensor have the same."""
    pointer = tensor.data_ptr()
    return (pointer or id(tensor), tensor.shape)


def _converted(
    file: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: Sequence[str]
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
