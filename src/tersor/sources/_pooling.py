"""From a vector for each token to one for the text, as sentence-transformers' files say it."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.core.errors import ModelError, suggest
from tersor.sources._shards import read_json

Pooling = Literal["none", "mean", "mean_sqrt_len_tokens", "cls", "max"]
_LARGEST = 1 << 20


def pool(vectors_BTD: Tensor, mask_BT: Tensor | None, how: Pooling, normalize: bool) -> Tensor:
    """Pool the vectors of the tokens that are not padding.

    Args:
        vectors_BTD: One for each token of each text.
        mask_BT: 1 for tokens, 0 for padding; None: there is no padding.
        how: Of all tokens the mean, the sum over the root of their number, the largest, or the
            first token's vector (cls).
        normalize: To length 1.

    Source:
        Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084, section 3: mean, max and CLS.
    """
    if how == "none":
        return vectors_BTD
    if mask_BT is None:
        mask_BT = torch.ones_like(vectors_BTD[..., 0])
    mask_BT1 = mask_BT.unsqueeze(-1).to(vectors_BTD.dtype)
    if how == "cls":
        pooled_BD = vectors_BTD[:, 0]
    elif how == "max":
        pooled_BD = (vectors_BTD - (1 - mask_BT1) * 1e9).amax(1)
    else:
        count_B1 = mask_BT1.sum(1).clamp(min=1e-9)
        total_BD = (vectors_BTD * mask_BT1).sum(1)
        pooled_BD = total_BD / (count_B1 if how == "mean" else count_B1.sqrt())
    return F.normalize(pooled_BD) if normalize else pooled_BD


def read_pooling(folder: Path, asked: str) -> tuple[Pooling, bool]:
    """Return how to pool and whether to normalize: as asked, else as modules.json says.

    Raises:
        ModelError: an unknown way, or modules.json names a step that is not known here.
    """
    known = get_args(Pooling)
    if asked:
        if asked not in known:
            raise ModelError(
                f"unknown pooling {asked!r}.{suggest(asked, known)} It may be {', '.join(known)}"
            )
        how: Pooling = asked  # type: ignore[assignment]  # one of them
        return how, False
    if not (folder / "modules.json").is_file():
        return "none", False
    return _of_modules(folder, _modules(folder / "modules.json"))


def _modules(file: Path) -> list[tuple[str, str]]:
    """Read the kind and the folder of each step."""
    import json

    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return [(str(step["type"]).rpartition(".")[2], str(step["path"])) for step in raw]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ModelError(f"{str(file)!r} is not a list of steps: {error!r}") from error


def _of_modules(folder: Path, steps: list[tuple[str, str]]) -> tuple[Pooling, bool]:
    how: Pooling = "none"
    normalize = False
    for kind, place in steps[1:]:
        if kind == "Pooling":
            how = _mode(folder, place)
        elif kind == "Normalize":
            normalize = True
        else:
            raise ModelError(
                f"folder {str(folder)!r}: modules.json has a step {kind!r}, which is not read; ask "
                "for ?pooling=none or another way, or write a factory that builds the network"
            )
    return how, normalize


def _mode(folder: Path, place: str) -> Pooling:
    if "/" in place or "\\" in place or not place.strip("."):
        raise ModelError(f"folder {str(folder)!r}: modules.json leads outside: {place[:80]!r}")
    raw = read_json(folder / place / "config.json", _LARGEST)
    old = [
        name.removeprefix("pooling_mode_")
        for name, on in raw.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    mode: Any = raw.get("pooling_mode") or "+".join(old)
    mode = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}.get(mode, mode)
    if mode not in get_args(Pooling) or mode == "none":
        raise ModelError(
            f"folder {str(folder)!r}: pooling {mode!r} of {place}/config.json is not known here; "
            f"ask for another: ?pooling=mean, for instance"
        )
    return mode  # type: ignore[no-any-return]  # one of those of Pooling
