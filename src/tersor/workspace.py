"""The work folder of a run: what it was started with, and every finished stage.

OUT.work/
|-- fingerprint.json   model, data, recipe, seed, threads, target, versions: hashed one by one
|-- original/          the untouched network, exported
|-- 00/                a finished stage: state.json (written last), network.json,
|                      weights.safetensors and target/, what the runtime wrote
`-- 01.partial/        a stage under way: checkpoints of its trainings
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tersor
from tersor.core import files
from tersor.core.artifact import Artifact
from tersor.core.context import Batch, Data
from tersor.core.errors import ArtifactError
from tersor.core.manifest import read
from tersor.core.recipe import Recipe
from tersor.core.schema import to_plain

CHECKPOINTS = "checkpoints"
"""Folder of a stage under way that outlives an interruption."""
MARK = "fingerprint.json"
_PACKAGES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")


def fingerprint(
    net: Any, data: Data, recipe: Recipe, seed: int, batch: int, training: int
) -> dict[str, str]:
    """Hash everything that decides a run's result, field by field.

    Of `train` only the first four batches are read; all other splits whole. `training` is the
    number of threads that the trainer uses.
    """
    made = {
        "model": hash_of(net),
        "recipe": _hash(json.dumps(to_plain(recipe.plain()), sort_keys=True).encode()),
        "target": str(recipe.target),
        "seed": str(seed),
        "batch": str(batch),
        "training threads": str(training),
        "version": tersor.__version__,
    }
    for name in ("calibration", "train", "validation", "test"):
        batches = getattr(data, name)
        if batches is not None:
            few = itertools.islice(batches, 4) if name == "train" else batches
            made[name] = _of_batches(few)
    for package in _PACKAGES:
        try:
            made[package] = version(package)
        except PackageNotFoundError:
            made[package] = "absent"
    return made


def training_threads(work: Path, out: Path) -> int | None:
    """Return the number of training threads of the run under way, or else of the finished one."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    try:
        if work.exists():
            found = json.loads((work / MARK).read_text(encoding="utf-8"))
        else:
            found = read(out)["fingerprint"]
        return int(asked) if asked.isdigit() else int(found["training threads"])
    except (ArtifactError, OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def opened(work: Path, wanted: Mapping[str, str], resume: bool) -> Iterator[None]:
    """Open the work folder of a run, and remove it at the end.

    Of a run that fails it stays where something is finished that can be gone on from; a note on the
    error says so. Of one that is interrupted it stays.

    Raises:
        ArtifactError: as `open_folder`.
    """
    open_folder(work, wanted, resume)
    try:
        yield
    except Exception as error:
        if any(work.glob("[0-9][0-9]/state.json")) or any(work.glob(f"*/{CHECKPOINTS}/*/*")):
            error.add_note(
                f"what is finished is kept in {work}: once the cause is mended, the same with "
                "--resume (resume=True) goes on from there"
            )
        else:
            with contextlib.suppress(OSError):
                remove(work)
        raise
    remove(work)


def open_folder(work: Path, wanted: Mapping[str, str], resume: bool) -> None:
    """Start the work folder anew, or check that it belongs to this run.

    Raises:
        ArtifactError: the folder was begun with something else; names the differing fields.
    """
    mark = work / MARK
    if resume and mark.exists():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{mark} is damaged; run again without --resume") from error
        differing = _differing(found, wanted)
        if differing:
            raise ArtifactError(
                f"cannot resume: {', '.join(differing)} differ from those the run in {work} was "
                "started with. Give the same again, or run without --resume to start anew"
            )
        return
    if work.exists():
        files.remove_tree(work)
    work.mkdir(parents=True)
    files.replace_file(mark, json.dumps(dict(wanted), indent=1).encode())


def finished(work: Path, index: int) -> dict[str, Any] | None:
    """Return the state of a finished stage, or None; its files are checked by their hashes.

    Raises:
        ArtifactError: a file was altered.
    """
    state = work / f"{index:02d}" / "state.json"
    if not state.exists():
        return None
    found: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    for name, digest in found["files"].items():
        file = state.parent / name
        if not file.exists() or files.sha256(file) != digest:
            raise ArtifactError(
                f"{file} was altered since it was written; run again without --resume to start anew"
            )
    return found


def finish(work: Path, index: int, state: Mapping[str, Any]) -> Path:
    """Mark the partial folder of a stage as finished: state last, then renamed whole."""
    partial, whole = partial_folder(work, index), work / f"{index:02d}"
    names = sorted(str(f.relative_to(partial)) for f in partial.rglob("*") if f.is_file())
    hashes = {name: files.sha256(partial / name) for name in names}
    for name in names:
        descriptor = os.open(partial / name, os.O_RDONLY)
        files.sync(descriptor)
        os.close(descriptor)
    content = json.dumps({**to_plain(state), "files": hashes}, indent=1)
    files.write_file(partial / "state.json", content.encode())
    files.sync_dir(partial)
    files.rename(partial, whole)
    files.sync_dir(work)
    return whole


def begin(work: Path, index: int) -> Path:
    """Return the folder of a stage that starts, empty but for the checkpoints of a try before."""
    folder = partial_folder(work, index)
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.name != CHECKPOINTS:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return folder


def partial_folder(work: Path, index: int) -> Path:
    """Return the name of the folder of a stage under way."""
    return work / f"{index:02d}.partial"


def clear(folder: Path, keep: Path | None = None, under: str = "") -> None:
    """Remove everything in a partial folder, but move the folder `keep` to `under`."""
    aside = folder.with_name(folder.name + ".keep")
    if aside.exists():
        files.remove_tree(aside)
    if keep is not None:
        files.rename(keep, aside)
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if keep is not None:
        files.rename(aside, folder / under)


def remove(work: Path) -> None:
    """Remove the work folder of a run that ended.

    The fingerprint goes first: what is left by a kill in the middle is never resumed from.
    """
    if (work / MARK).exists():
        files.unlink(work / MARK)
    files.remove_tree(work)


def _differing(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    return [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]


def written(out: Path, work: Path, wanted: Mapping[str, str]) -> Artifact | None:
    """Return the artifact at `out` if it is the whole result of this very run.

    Raises:
        ArtifactError: it is that of another run, and none is under way; names the differing fields.
    """
    try:
        found = Artifact.open(out, check="hashes")
    except ArtifactError:
        return None
    differing = _differing(found.manifest.get("fingerprint") or {}, wanted)
    if not differing:
        return found
    if work.exists():  # a run to replace it was begun without --resume
        return None
    raise ArtifactError(
        f"cannot resume: {str(out)!r} is finished, and {', '.join(differing)} differ from those it "
        "was made with. Choose another --out, or run without --resume to replace it"
    )


def hash_of(net: Any) -> str:
    """Hash the structure of a network and all that it holds."""
    digest = hashlib.sha256()
    if isinstance(net, nn.Module):
        digest.update(repr(net).encode())
        for name, tensor in sorted(
            {**dict(net.named_parameters()), **dict(net.named_buffers())}.items()
        ):
            digest.update(name.encode() + str(tensor.dtype).encode())
            digest.update(_bytes(tensor))
    elif hasattr(net, "SerializeToString"):
        digest.update(net.SerializeToString(deterministic=True))
    else:
        digest.update(str(net.graph).encode())
        for name, tensor in sorted(net.state_dict.items()):
            digest.update(name.encode() + _bytes(tensor))
    return digest.hexdigest()


def _of_batches(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Any) -> bytes:
    if isinstance(tensor, torch.Tensor):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return bytes(tensor.tobytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
