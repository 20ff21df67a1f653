"""`tersor run`: an artifact on arrays, where torch need not be installed."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_talk import show, show_json, table, tell

if TYPE_CHECKING:
    from tersor.core.runtime import Arrays


def run(
    place: str,
    *,
    inputs: Path,
    output: Path | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Feed arrays to an artifact and write what comes out."""
    from tersor.core.artifact import Artifact
    from tersor.core.errors import DataError

    artifact = Artifact.open(place)
    arrays = _fitting(read_arrays(inputs), artifact.manifest.get("inputs", {}))
    if output is not None and not output.absolute().parent.is_dir():
        raise DataError(f"the folder of --output {str(output)!r} does not exist")
    runner = artifact.load(device=device, threads=threads)
    try:
        made = runner.bind(arrays)()
    finally:
        runner.close()
    for name, array in made.items():
        if array.dtype.kind == "f" and not _finite(array):
            tell(f"warning: output {name!r} holds values that are not finite")
    if output is not None:
        write_arrays(output, made)
    rows = [(name, "x".join(map(str, a.shape)) or "1", str(a.dtype)) for name, a in made.items()]
    if as_json:
        outputs = [{"name": n, "shape": list(made[n].shape), "dtype": d} for n, _, d in rows]
        show_json({"outputs": outputs, "file": None if output is None else str(output)})
    else:
        show(table(("output", "shape", "type"), rows))
    return 0


def read_arrays(file: Path) -> dict[str, Any]:
    """Read a .npz file: no pickles, and nothing larger than it says.

    Raises:
        DataError: not such a file, or its content would not fit into memory.
    """
    import numpy as np

    from tersor.core.errors import DataError
    from tersor.core.hardware import probe
    from tersor.core.sniffing import DAMAGED_ZIP

    where = f"--input {str(file)!r}"
    try:
        with zipfile.ZipFile(file) as pack:
            size = sum(entry.file_size for entry in pack.infolist())
            room = probe().available_bytes
            if room is not None and size > room:
                raise DataError(
                    f"{where} unpacks to {size / 1e9:.1f} GB; {room / 1e9:.1f} GB are free"
                )
            for entry in pack.infolist():
                with pack.open(entry) as stream:
                    _check_header(stream, entry, where)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as error:
        raise DataError(f"{where} does not exist") from error
    except DAMAGED_ZIP as error:
        raise DataError(f"{where} is not a .npz file of plain arrays: {error}") from error


def _check_header(stream: Any, entry: zipfile.ZipInfo, where: str) -> None:
    """Refuse an array that claims more than its file holds, before memory is taken for it."""
    import numpy as np

    from tersor.core.errors import DataError

    version = np.lib.format.read_magic(stream)
    header = (
        np.lib.format.read_array_header_1_0(stream)
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0(stream)
    )
    shape, _, dtype = header
    if dtype.hasobject:
        raise DataError(f"{where}: {entry.filename} holds Python objects; save plain arrays")
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise DataError(f"{where}: {entry.filename} claims the shape {shape}, more than it holds")


def write_arrays(file: Path, arrays: "Arrays") -> None:
    """Write a .npz file, whole or not at all."""
    import numpy as np

    from tersor.core.errors import DataError

    beside = file.with_name(f".{file.name}.tmp")
    try:
        with beside.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # names of outputs are not options
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(f"--output {str(file)!r} cannot be written: {error.strerror}") from error


def _fitting(arrays: "Arrays", wanted: Mapping[str, Mapping[str, Any]]) -> "Arrays":
    """Check the arrays against the artifact's inputs; a number type that fits is converted."""
    import numpy as np

    from tersor.core.errors import DataError, suggest

    missing = [name for name in wanted if name not in arrays]
    strange = [name for name in arrays if name not in wanted]
    if wanted and (missing or strange):
        near = suggest(missing[0], strange) if missing else suggest(strange[0], wanted)
        raise DataError(
            f"the network takes {', '.join(wanted)}; "
            f"the file holds {', '.join(arrays) or 'nothing'}.{near}"
        )
    fitting = {}
    for name, array in arrays.items():
        entry = wanted.get(name)
        if entry is None:
            fitting[name] = array
            continue
        dynamic = entry.get("dynamic", {})
        sizes = [dynamic.get(str(axis), size) for axis, size in enumerate(entry["shape"])]
        fits = len(sizes) == array.ndim and all(
            isinstance(size, str) or size == given
            for size, given in zip(sizes, array.shape, strict=True)
        )
        if not fits:
            asked = ", ".join(str(size) for size in sizes)
            raise DataError(f"input {name!r} must have the shape ({asked}), got {array.shape}")
        kind = np.dtype(entry["dtype"])
        if array.dtype != kind and not np.can_cast(array.dtype, kind, casting="same_kind"):
            raise DataError(f"input {name!r} must be of type {kind}, got {array.dtype}")
        fitting[name] = np.ascontiguousarray(array, dtype=kind)
    return fitting


def _finite(array: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(array).all())
