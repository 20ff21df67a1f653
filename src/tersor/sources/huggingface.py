"""A local folder of Hugging Face: config.json and safetensors: "huggingface:FOLDER".

The network is built by the transformers library from its own classes: encoders, text and image
classifiers, masked and causal language models. Nothing is downloaded, code in the folder
(`auto_map`) is not run, and weights that are pickles are not read.

`forward` takes `input_ids`, `attention_mask` and, where the network distinguishes two texts,
`token_type_ids`; networks of images take `pixel_values`. It returns one tensor: logits, or the last
hidden state of a network without a head. A folder of sentence-transformers (with modules.json)
returns what that says, one vector for each text; `huggingface:FOLDER?pooling=none` (or mean,
mean_sqrt_len_tokens, cls, max) asks for something else.

Batch and sequence are free. The files of the tokenizer or image processor go into the artifact's
folder `processor/`.
"""

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.core import plugins
from tersor.core.errors import ModelError, named_lines
from tersor.core.model import Inputs, Model, Source
from tersor.sources._continued import from_artifact
from tersor.sources._misfit import Comparison, compare, findings, shorten
from tersor.sources._pooling import Pooling, read_pooling
from tersor.sources._shards import find_shards, read_json, shapes_of
from tersor.sources._transformer import ImageNet, PairNet, TextNet
from tersor.sources._weights import check_finite, left_out, misfit

_KINDS = (
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
)
"""Of the library's tables of classes with a head whose first output are logits."""
_PROCESSOR = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)
_LARGEST_CONFIG = 16 << 20
_LARGEST_SIZE = 1 << 24
"""Of a number in a config: vocabularies have less than a million entries."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_OFFLINE = "HF_HUB_OFFLINE"
_EXAMPLE_LENGTH = 16


def load(place: str, *, weights: Path | None = None, partial: bool = False) -> Model:
    """Build the network that a folder's config.json describes, and load its safetensors.

    Args:
        place: The folder; "?pooling=HOW" may follow.
        weights: None, or an artifact made from this network, to go on from.
        partial: Load the weights that fit, and say in `Model.notes` what did not.

    Raises:
        ModelError: no such folder, a network that is not known, damaged or missing weights, or
            weights that do not fit.
        DependencyError: the transformers library is not installed.
    """
    folder, pooling = _read_place(place)
    config = _read_config(folder)
    shards = find_shards(folder)
    how, normalize = read_pooling(folder, pooling)
    if weights is not None and not Path(weights).is_dir():
        raise ModelError(f"folder {str(folder)!r} holds its own weights; leave --weights out")
    plugins.require("sources", "huggingface", ("transformers",))
    with _offline():
        kind = _choose(config, folder, how)
        described = _describe(kind, config, folder, shards)
        model, notes = _build(kind, described, shards, folder, partial)
    net, inputs = _wrapped(model, how, normalize, folder)
    if weights is not None:
        net = from_artifact(net, Path(weights))
    net.eval()
    check_finite(net.state_dict().items(), f"folder {str(folder)!r}")
    if "auto_map" in config:
        notes = (
            f"config.json names code of its own (auto_map), which is not run; "
            f"{kind.__name__} of the transformers library is used",
            *notes,
        )
    return Model(
        net=net,
        form="module",
        origin=f"huggingface:{place}",
        inputs=inputs,
        notes=notes,
        processor=tuple(folder / name for name in _PROCESSOR if (folder / name).is_file()),
    )


def _read_place(place: str) -> tuple[Path, str]:
    """Split the folder from what follows it."""
    before, mark, after = place.rpartition("?pooling=")
    folder, pooling = (Path(before), after) if mark else (Path(place), "")
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        remote = not folder.is_absolute() and place.count("/") == 1 and not folder.exists()
        raise ModelError(
            f"folder {str(folder)!r} {what}"
            + ("; models are not downloaded: give the folder of one that was" if remote else "")
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"folder {str(folder)!r} has no config.json; it is not a model of Hugging Face"
        )
    return folder, pooling


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, and refuse what it may not ask for."""
    config = read_json(folder / "config.json", _LARGEST_CONFIG)
    where = f"folder {str(folder)!r}: config.json"
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{where} has no model_type; it is not that of a network")
    if config.get("quantization_config"):
        about = config["quantization_config"]
        how = about.get("quant_method", "unknown") if isinstance(about, dict) else "unknown"
        raise ModelError(
            f"{where} says that the weights are quantized already ({how}); give the folder of "
            "the float network"
        )
    large = _first_large(config)
    if large:
        raise ModelError(f"{where} has an impossible size: {large}")
    return config


def _first_large(raw: Any, name: str = "") -> str:
    entries: Any = raw.items() if isinstance(raw, dict) else ()
    for key, value in entries:
        if isinstance(value, dict):
            found = _first_large(value, f"{name}{key}.")
            if found:
                return found
        number = isinstance(value, int | float) and not isinstance(value, bool)
        sized = any(word in key for word in ("size", "num_", "dim", "layers", "n_", "heads"))
        if number and sized and abs(value) > _LARGEST_SIZE:
            return f"{name}{key} {value}"
    return ""


def _choose(config: dict[str, Any], folder: Path, how: Pooling) -> type[Any]:
    """Find the library's class for a config."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    kind = config["model_type"]
    where = f"folder {str(folder)!r}: config.json"
    if kind not in configuration_auto.CONFIG_MAPPING_NAMES:
        if "auto_map" in config:
            raise ModelError(
                f"{where} names code of its own (auto_map) for the network {kind!r}, which is not "
                "run; write a factory that builds the network, FILE.py:FACTORY"
            )
        raise ModelError(
            f"{where}: transformers {transformers.__version__} knows no network {kind!r}; "
            "a newer version may"
        )
    architectures = config.get("architectures") or []
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    bare = modeling_auto.MODEL_MAPPING_NAMES.get(kind)
    bases = [bare] if isinstance(bare, str) else list(bare or ())
    headed = [
        table[kind]
        for table in (getattr(modeling_auto, f"MODEL_FOR_{k}_MAPPING_NAMES") for k in _KINDS)
        if isinstance(table.get(kind), str)
    ]
    if not name and bases:
        name = bases[0]
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{where}: {name or kind!r} has an encoder and a decoder; networks with one "
            "of them are read: encoders, classifiers and causal language models"
        )
    if name not in (*bases, *headed):
        raise ModelError(
            f"{where}: {name or kind!r} is not a network that is read; of {kind!r} these are: "
            f"{', '.join(dict.fromkeys([*bases, *headed])) or 'none'}"
        )
    if how != "none" and name not in bases:
        raise ModelError(f"{where}: {name} has a head; pooling is for networks without one")
    found = getattr(transformers, name)
    assert isinstance(found, type)
    return found


def _describe(kind: type[Any], config: dict[str, Any], folder: Path, shards: Any) -> Any:
    """Make the library's config, and compare its size with that of the files."""
    where = f"folder {str(folder)!r}: config.json"
    plain = {
        key: value
        for key, value in config.items()
        if key not in ("auto_map", "transformers_weights", "attn_implementation", "dtype")
        and not key.startswith("_")
    }
    shapes = shapes_of(shards)
    depth = max((v for k, v in plain.items() if k in _DEPTHS and isinstance(v, int)), default=0)
    if depth > len(shapes):
        raise ModelError(f"{where} describes {depth} layers, the files hold {len(shapes)} tensors")
    try:
        made = kind.config_class.from_dict(plain)
        with torch.device("meta"):
            wanted = sum(p.numel() for p in kind(made).parameters())
    except Exception as error:  # whatever the library raises for a value it cannot use
        raise ModelError(f"{where} cannot be used: {named_lines(error, 2)}") from error
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    if wanted > 4 * held + (1 << 24):
        raise ModelError(
            f"{where} describes a network of {wanted:,} numbers, the files hold {held:,}; are they "
            "of another model?"
        )
    return made


def _build(
    kind: type[Any], described: Any, shards: tuple[Path, ...], folder: Path, partial: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """Let the library put the tensors in their places; what it leaves out is an error or a note."""
    from safetensors.torch import load_file

    state = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    types = {str(t.dtype)[6:] for t in state.values() if t.is_floating_point()} - {"float32"}
    torch.manual_seed(0)  # of what a partial load leaves
    try:
        model, info = kind.from_pretrained(
            None,
            config=described,
            state_dict=dict(state),
            attn_implementation=_attention(kind),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:
        raise ModelError(
            f"folder {str(folder)!r}: {kind.__name__} cannot be built: {named_lines(error, 2)}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = _compared(model, info, shapes)
    notes = [f"weights converted from {name} to float32" for name in sorted(types)]
    if found.missing or found.wrong:
        what = f"weights of {str(folder)!r}"
        if not partial:
            raise ModelError(misfit(what, kind.__name__, found))
        notes.append(left_out(what, kind.__name__, found))
    elif found.unexpected:
        count, why = len(found.unexpected), findings(found)
        notes.append(
            f"{count} {'entry of the weights has' if count == 1 else 'entries of the weights have'}"
            f" no place in {kind.__name__} and {'is' if count == 1 else 'are'} left out: "
            f"{shorten(found.unexpected)}" + (f". Likely {'; '.join(why)}" if why else "")
        )
    assert isinstance(model, nn.Module)
    return model, tuple(notes)


def _attention(kind: type[Any]) -> str:
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def _compared(model: Any, info: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Comparison:
    """Say by the network's names what the library could not place."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    # the layer over the first token, which no output here goes through
    missing = {n for n in info["missing_keys"] if not n.startswith("pooler.")}
    wrong = {name: tuple(theirs) for name, theirs, _ in info["mismatched_keys"]}
    given = {n: s for n, s in wanted.items() if n not in missing and n not in wrong}
    given |= wrong
    given |= {n: shapes.get(n, ()) for n in sorted(info["unexpected_keys"])}
    return compare(given, wanted, set(wanted) - missing)


def _wrapped(model: Any, how: Pooling, normalize: bool, folder: Path) -> tuple[nn.Module, Inputs]:
    """Give forward its own parameters, and make an example for them."""
    main = getattr(model, "main_input_name", "")
    config = model.config
    if main == "pixel_values":
        size = config.image_size if hasattr(config, "image_size") else 224
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        image = torch.rand(2, channels, *sides, generator=torch.Generator().manual_seed(0))
        return ImageNet(model), Inputs(
            example={"pixel_values": image}, dynamic={"pixel_values": {0: "batch"}}
        )
    if main != "input_ids":
        raise ModelError(
            f"folder {str(folder)!r}: {type(model).__name__} takes {main!r}; networks of texts "
            "(input_ids) and images (pixel_values) are read"
        )
    taken = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in taken or hasattr(config, "use_cache") else {}
    if "use_cache" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        fixed = {}
    pair = "token_type_ids" in taken and getattr(config, "type_vocab_size", 0) > 1
    net = (PairNet if pair else TextNet)(model, fixed=fixed, pooling=how, normalize=normalize)
    shape = (2, _EXAMPLE_LENGTH)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}
    if pair:
        example["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    return net, Inputs(
        example=example, dynamic={name: {0: "batch", 1: "sequence"} for name in example}
    )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the library from the network and from printing."""
    before = os.environ.get(_OFFLINE)
    os.environ[_OFFLINE] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
            if before is None:
                del os.environ[_OFFLINE]
            else:
                os.environ[_OFFLINE] = before


SOURCE = Source(load=load)
