"""The manifest of an artifact: what is in it, and what its files must look like."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tersor
from tersor.core.errors import ArtifactError
from tersor.core.files import why
from tersor.core.runtime import Target
from tersor.core.schema import to_plain

SCHEMA = 1
MANIFEST = "manifest.json"
REPORT = "report.json"
_LARGEST = 64 << 20


def make(manifest: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """Return a manifest as plain data; `files` is filled in while they are written."""
    if not files:
        raise ArtifactError("an artifact needs at least one model file")
    target = manifest["target"]
    assert isinstance(target, Target)
    rest = {
        key: to_plain(value) for key, value in manifest.items() if key not in ("target", "recipe")
    }
    return {
        "schema": SCHEMA,
        "tool": {"name": "tersor", "version": tersor.__version__},
        "target": to_plain(target),
        "recipe": to_plain(manifest["recipe"]),
        **rest,
        "model": [file.name for file in files],
        "files": {},
    }


def check_names(files: Sequence[str], texts: Sequence[str]) -> None:
    """Refuse names that leave the directory, and names that occur twice (on any system)."""
    seen: set[str] = set()
    for name in [*files, *texts]:
        if not _stays_inside(name):
            raise ArtifactError(f"{name!r} cannot be a file name in an artifact")
        if name.casefold() in seen | {MANIFEST}:
            raise ArtifactError(f"two files of the artifact are called {name!r}")
        seen.add(name.casefold())


def _stays_inside(name: Any) -> bool:
    """Tell whether a name is a file, or a file in a folder, of the artifact."""
    parts = name.split("/") if isinstance(name, str) else [name]
    return len(parts) <= 2 and all(_is_plain(part) for part in parts)


def _is_plain(name: Any) -> bool:
    """Tell whether a name stays inside its folder on every system."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name)
    )


def read(folder: Path) -> dict[str, Any]:
    """Read and check a manifest's structure.

    Raises:
        ArtifactError: there is none, or it does not make sense.
    """
    if not folder.is_dir():
        if not folder.exists():
            raise ArtifactError(f"artifact {str(folder)!r} does not exist")
        raise ArtifactError(
            f"{str(folder)!r} is a file, not a directory: an artifact is the folder that compress "
            "makes of a network, as in: tersor compress FILE.py:FACTORY --data DATA --recipe auto "
            "--out FOLDER"
        )
    file = folder / MANIFEST
    try:
        if file.stat().st_size > _LARGEST:
            raise ArtifactError(
                f"artifact {str(folder)!r}: {MANIFEST} is larger than {_LARGEST >> 20} MiB"
            )
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{str(folder)!r} is not an artifact or is incomplete: it has no {MANIFEST}"
            + (f"; is it huggingface:{folder}?" if (folder / "config.json").is_file() else "")
        ) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"artifact {str(folder)!r}: {MANIFEST} is damaged: {error}") from error
    except OSError as error:
        raise ArtifactError(
            f"artifact {str(folder)!r}: cannot read {MANIFEST}: {why(error)}"
        ) from error
    problem = _problem(raw)
    if problem:
        raise ArtifactError(f"artifact {str(folder)!r}: {MANIFEST} {problem}")
    assert isinstance(raw, dict)
    return raw


def _problem(raw: Any) -> str:
    """Say what is wrong with a manifest, or nothing."""
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("tool"), dict)
        or raw["tool"].get("name") != "tersor"
    ):
        return "was not written by tersor"
    if (
        not isinstance(raw.get("schema"), int)
        or isinstance(raw["schema"], bool)
        or raw["schema"] < 1
    ):
        return f"has schema {raw.get('schema')!r}, which is not a version"
    if raw["schema"] > SCHEMA:
        return (
            f"has schema {raw['schema']}, written by tersor {raw['tool'].get('version')}; "
            f"this tersor {tersor.__version__} reads up to {SCHEMA}: install a newer one"
        )
    entries, model = raw.get("files"), raw.get("model")
    if not isinstance(entries, dict) or not all(
        _stays_inside(n) and _is_entry(e) for n, e in entries.items()
    ):
        return "has a list of files that makes no sense"
    if not isinstance(model, list) or not model or not all(name in entries for name in model):
        return "does not name its model files"
    if not isinstance(raw.get("recipe"), dict) or not isinstance(raw.get("target"), dict):
        return "has no recipe or no target"
    return ""


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and len(entry["sha256"]) == 64
    )


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse missing files, links, and files of another size than the manifest says."""
    for name, entry in manifest["files"].items():
        file = folder / name
        if file.is_symlink():
            raise ArtifactError(f"artifact {str(folder)!r}: {name!r} is a link, not a file")
        if not file.is_file():
            raise ArtifactError(f"artifact {str(folder)!r} is incomplete: {name!r} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(
                f"artifact {str(folder)!r}: {name!r} has {size} bytes, the manifest says "
                f"{entry['bytes']}; it was altered or cut off"
            )
