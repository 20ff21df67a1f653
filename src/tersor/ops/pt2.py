"""Check a .pt2 archive before torch reads it, because torch's own reader runs what it finds.

`torch.export.load` unpickles entries that say so, falls back to an unsafe unpickler where the safe
one refuses, loads compiled code, evaluates the file's symbolic sizes and guards as Python, and
pastes its names into generated source. Whatever could reach one of these is refused here.
"""

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import torch

import tersor.ops.dynamic
import tersor.ops.sparse  # noqa: F401  # both register operators of torch.ops.tersor
from tersor.core.errors import ModelError
from tersor.core.sniffing import foreign, zip_problem
from tersor.ops.expressions import unsafe_guard, unsafe_size

_MODEL = "models/model.json"
_WEIGHTS = ("data/weights/", "data/weights/model_weights_config.json", "weight_")
_CONSTANTS = ("data/constants/", "data/constants/model_constants_config.json", "tensor_")
_SAMPLES = "data/sample_inputs/model.pt"
_SAVE_AGAIN = "save it again with torch.export.save"
_NAME = re.compile(r"[A-Za-z_]\w*")
_DOTTED = re.compile(r"[A-Za-z_0-9]\w*(\.\w+)*(@\d+)?")
_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z]\w*)\.(\w+)(?:\.(\w+))?")
_NAMESPACES = ("aten", "prims", "higher_order", "quantized_decomposed", "torchvision", "tersor")
_HIGHER_ORDER = ("cond", "map_impl", "scan", "wrap_with_set_grad_enabled", "wrap_with_autocast")
_SYMBOLIC = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt|log2)|torch\.(sym_(int|float|max|min|not|ite|sum)|_sym_sqrt)"
)
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def read(file: Path) -> torch.export.ExportedProgram:
    """Read an exported program after checking that reading it runs no code.

    Raises:
        ModelError: damaged, unsafe, or of a version that this torch does not read.
    """
    log = logging.getLogger("torch.export")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with file.open("rb") as stream:
                check(file, stream)
                stream.seek(0)
                return torch.export.load(stream)
    except ModelError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"exported program {str(file)!r} cannot be read by torch {torch.__version__}: "
            f"{type(error).__name__}: {lines[-1].strip()[:200] if lines else ''}"
        ) from error
    finally:
        log.setLevel(level)


def check(file: Path, stream: IO[bytes]) -> None:
    """Refuse an archive that is not a plain exported program.

    Args:
        file: The archive, for messages and for its directory.
        stream: The same file, opened; what torch will read.

    Raises:
        ModelError: naming the entry.
    """
    reason = foreign(file, "a zip archive")
    if not reason:
        problem = zip_problem(file)
        reason = problem or _unsafe_archive(file, stream)
    if reason:
        raise ModelError(f"exported program {str(file)!r} {reason}")


def _unsafe_archive(file: Path, stream: IO[bytes]) -> str:
    with ZipFile(file) as archive:
        names = {entry.filename for entry in archive.infolist() if not entry.is_dir()}
    try:
        reader = torch._C.PyTorchFileReader(stream)
        records = set(reader.get_all_records())
    except RuntimeError as error:
        if any("serialized_exported_program" in name for name in names):
            return f"was written by torch 2.7 or older; {_SAVE_AGAIN}"
        return f"is not an archive of torch: {_first(error)}"
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or names != {f"{next(iter(roots))}/{record}" for record in records}:
        return "lists other entries to torch than to zip tools"
    if "archive_format" not in records or reader.get_record("archive_format") != b"pt2":
        if any(record.endswith((".pkl", "code")) for record in records):
            return "is a TorchScript archive or a pickled checkpoint, which can run code; refused"
        return f"is a zip archive, but no exported program; {_SAVE_AGAIN}"
    return _unsafe_records(reader, records)


def _unsafe_records(reader: Any, records: set[str]) -> str:
    programs = sorted(record for record in records if record.startswith("models/"))
    if programs != [_MODEL]:
        found = ", ".join(programs) or "none"
        return f"holds the programs {found}, not one called 'model'; {_SAVE_AGAIN}"
    for record in sorted(records):
        if record.startswith("data/aotinductor/"):
            return f"holds compiled code ({record!r}), which is not read; give the program itself"
        if record in ("data/weights/model.pt", "data/constants/model.pt"):
            return f"holds pickled weights ({record!r}) of an old format; {_SAVE_AGAIN}"
    budget = 2 * sum(reader.get_record_size(r) for r in records) + (256 << 20)
    for folder, config, prefix in (_WEIGHTS, _CONSTANTS):
        if config not in records:
            return f"lacks {config!r}"
        entries, reason = _json(reader, config)
        reason = reason or _unsafe_payloads(reader, records, entries, folder, prefix, budget)
        if reason:
            return reason
    return _unsafe_samples(reader, records) or _unsafe_program(reader)


def _unsafe_payloads(
    reader: Any, records: set[str], config: Any, folder: str, prefix: str, budget: int
) -> str:
    """Check that every payload is raw numbers of the size it should have."""
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        return f"has a damaged list of payloads for {folder!r}"
    total = 0
    for name, entry in entries.items():
        path = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(path, str) or entry.get("use_pickle") is not False:
            return f"marks the payload of {name!r} as a pickle, which can run code; refused"
        if not path.startswith(prefix) or not path[len(prefix) :].isdigit():
            return f"stores {name!r} as {path!r}, which is not plain numbers, and is not read"
        if folder + path not in records:
            return f"lacks the payload {path!r} of {name!r}"
        if not _DOTTED.fullmatch(name):
            return f"has a payload with the unusual name {name[:80]!r}"
        try:
            sizes = [size["as_int"] for size in entry["tensor_meta"]["sizes"]]
            count = math.prod(sizes)
        except (KeyError, TypeError):
            return f"has a payload without a size: {name!r}"
        total += count
        if any(not isinstance(n, int) or n < 0 for n in sizes) or total > budget:
            return f"has a payload with an impossible size: {name!r} {sizes[:8]}"
        if count and not reader.get_record_size(folder + path):
            return f"has an empty payload for {name!r} of size {sizes[:8]}"
    return ""


def _unsafe_samples(reader: Any, records: set[str]) -> str:
    """Check that the example inputs load as tensors alone: then no other way is tried."""
    if _SAMPLES not in records:
        return f"lacks {_SAMPLES!r}"
    raw = reader.get_record(_SAMPLES)
    if not raw:
        return ""
    problem = zip_problem(io.BytesIO(raw))
    if problem:
        return f"has example inputs whose archive {problem}"
    try:
        found = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    except Exception:
        return "has example inputs that are more than tensors, a pickle that can run code; refused"
    return "" if isinstance(found, (tuple, dict)) else "has example inputs of an unknown structure"


def _unsafe_program(reader: Any) -> str:
    program, reason = _json(reader, _MODEL)
    if reason:
        return reason
    try:
        for key, value in _walk(program):
            reason = _unsafe_value(key, value)
            if reason:
                return reason
    except RecursionError:
        return "has a program that is nested too deep"
    return ""


def _unsafe_value(key: str, value: Any) -> str:
    """Check one value of the program by the role that its key gives it."""
    if key in ("custom_obj_values", "as_custom_obj", "custom_obj") and value:
        return "holds an object that is neither tensor nor number, and is not read"
    if key.endswith("_values") and isinstance(value, dict):
        bad = [name for name in value if not _NAME.fullmatch(name)]
        return f"has a value with the unusual name {bad[0][:80]!r}" if bad else ""
    if not isinstance(value, str):
        return ""
    if key in ("target", "as_operator"):
        return _unsafe_operator(value)
    if key == "expr_str":
        return unsafe_size(value)
    if key == "guards_code":
        return unsafe_guard(value)
    if key in ("in_spec", "out_spec"):
        return _unsafe_tree(value)
    if key in ("name", "as_name", "forward_arg_names") and value and not _NAME.fullmatch(value):
        return f"has a value with the unusual name {value[:80]!r}"
    dotted = ("fqn", "parameter_name", "buffer_name", "tensor_constant_name")
    if key in dotted and value and not _DOTTED.fullmatch(value):
        return f"has a layer with the unusual name {value[:80]!r}"
    return ""


def _unsafe_operator(target: str) -> str:
    if _SYMBOLIC.fullmatch(target):
        return ""
    found = _OPERATOR.fullmatch(target)
    refused = f"calls {target[:80]!r}, which is not an operator on tensors; refused"
    if not found or found[1] not in _NAMESPACES:
        return refused
    space, name, overload = found.groups()
    if space == "higher_order":
        return "" if name in _HIGHER_ORDER and not overload else refused
    try:
        operator = getattr(getattr(getattr(torch.ops, space), name), overload or "default")
        arguments = operator._schema.arguments
    except (AttributeError, RuntimeError):
        return f"calls the operator {target[:80]!r}, which is not installed here"
    if any("file" in a.name or "path" in a.name for a in arguments):
        return f"calls {target[:80]!r}, which opens files; refused"
    return ""


def _unsafe_tree(spec: str) -> str:
    try:
        _, tree = json.loads(spec)
        for key, value in _walk(tree):
            if key == "type" and value not in _TREES:
                return f"takes or returns {str(value)[:80]!r}; use tensors, tuples and dicts"
            if key == "context" and isinstance(value, str) and "__enum__" in value:
                return "takes or returns dicts with keys that are not text"
            if key == "context" and isinstance(value, str) and value.startswith("["):
                names = json.loads(value)
                bad = [n for n in names if not isinstance(n, str) or not _NAME.fullmatch(n)]
                if bad:
                    return f"has an input or output with the unusual name {str(bad[0])[:80]!r}"
    except (ValueError, TypeError):
        return "describes its inputs or outputs in an unknown way"
    return ""


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value below `value` with the nearest key above it."""
    yield key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, key)


def _json(reader: Any, record: str) -> tuple[Any, str]:
    try:
        return json.loads(reader.get_record(record)), ""
    except (ValueError, RecursionError, RuntimeError) as error:
        return None, f"has a damaged entry {record!r}: {_first(error)}"


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]
