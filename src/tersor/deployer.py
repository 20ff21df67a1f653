"""deploy(): write what a server, a cluster or a program needs to run an artifact."""

import errno
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tersor
from tersor.core import files as disk
from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.deployment import Deployment
from tersor.core.errors import ArtifactError, RecipeError, TargetError
from tersor.core.files import why
from tersor.core.manifest import MANIFEST
from tersor.core.schema import Mistakes, from_plain, to_plain

RECORD = "deployment.json"
"""Says what is in the folder, and that we wrote it."""
SCHEMA = 1
_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A folder that `deploy` wrote."""

    path: Path
    files: tuple[str, ...]
    """Names of all files but the record, relative to the folder."""
    check: str
    """What shows that it works."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        return shown(str(self.path), ("file",), [(name,) for name in self.files], [self.check])


def deploy(
    artifact: str | Path | Artifact,
    *,
    to: str,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
) -> Deployed:
    """Write a folder that serves an artifact: whole, or not at all.

    Args:
        artifact: A folder that `compress` made. All its files are compared with their hashes.
        to: The name of a deployment, as `tersor list deployments` shows it.
        out: The folder to make; one that an earlier call wrote is replaced as a whole.
        options: Settings of the deployment, as `tersor show NAME` describes them.

    Returns:
        What was written.

    Raises:
        ArtifactError: the artifact was altered, or `out` is something else or cannot be written.
        RecipeError: no such deployment or setting.
        TargetError: this deployment does not take artifacts of that runtime or device.
        DependencyError: a package or an environment is missing.
    """
    found = plugins.deployment(to)
    settings = _settings(to, found, options or {})
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    opened.verify()
    if opened.target.runtime not in found.runtimes:
        raise TargetError(
            f"{to} takes artifacts of {', '.join(found.runtimes)}, and {str(opened.path)!r} is one "
            f"of {opened.target.runtime}; compress with --target {found.runtimes[0]}"
        )
    if opened.target.device not in found.devices:
        raise TargetError(
            f"{to} computes on {', '.join(found.devices)}, and {str(opened.path)!r} was made for "
            f"{opened.target}; compress with --target {opened.target.runtime}:{found.devices[0]}"
        )
    place = Path(out).resolve()
    about: dict[str, Any] = {
        "deployment": to,
        "options": to_plain(settings),
        "artifact": {
            "sha256": disk.sha256(opened.path / MANIFEST),
            "target": to_plain(opened.target),
            "model": {name: opened.files[name] for name in opened.manifest["model"]},
        },
    }
    try:
        with disk.lock(place, wait_s=_WAIT_S):
            disk.clear_left(place, RECORD)
            _check_out(place)
            names = _write(place, lambda folder: found.write(opened, folder, settings), about)
    except OSError as error:
        made = ArtifactError(
            f"cannot write {str(out)!r}: {why(error)}; what was there before is untouched"
        )
        made.exit_code = 2 if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else 4
        raise made from error
    check = found.check.format(**about["options"])
    return Deployed(path=Path(out), files=names, check=check)


def _settings(to: str, found: Deployment, options: Mapping[str, Any]) -> Any:
    mistakes = Mistakes()
    made = from_plain(found.options, options, (), mistakes)
    if made is None:
        raise RecipeError(*(f"{to}: {mistake.text}" for mistake in mistakes.found))
    return made


def _check_out(place: Path) -> None:
    """Refuse a folder that is there and was not written by us, or holds what is not ours."""
    if not place.exists():
        return
    if not place.is_dir():
        raise ArtifactError(f"output {str(place)!r} is a file; choose another name")
    # what Python keeps beside a program that a server has run is nobody's
    present = {name for name in _files(place) if "__pycache__/" not in name} - {RECORD}
    if not present and not (place / RECORD).exists():
        return
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        ours = set(record["files"]) if record["tool"]["name"] == "tersor" else None
    except (OSError, ValueError, KeyError, TypeError):
        ours = None
    if ours is None:
        raise ArtifactError(
            f"output {str(place)!r} exists and was not written by tersor deploy (it holds "
            f"{min(present, default=RECORD)!r}); choose another name or remove it"
        )
    if present - ours:
        raise ArtifactError(
            f"output {str(place)!r} holds {min(present - ours)!r}, which tersor deploy did not "
            "write and which would be lost; move it away or choose another name"
        )


def _write(place: Path, fill: Callable[[Path], None], about: Mapping[str, Any]) -> tuple[str, ...]:
    """Write everything to OUT.tmp-..., then let the two change names."""
    with disk.written_beside(place) as beside:
        fill(beside)
        names = _files(beside)
        for name in names:
            _sync(beside / name)
        record = {
            "schema": SCHEMA,
            "tool": {"name": "tersor", "version": tersor.__version__},
            **about,
            "files": {
                name: {
                    "sha256": disk.sha256(beside / name),
                    "bytes": (beside / name).stat().st_size,
                }
                for name in names
            },
        }
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        disk.write_file(beside / RECORD, text.encode("utf-8"))
        for folder in (p for p in beside.rglob("*") if p.is_dir()):
            disk.sync_dir(folder)
    return names


def _files(folder: Path) -> tuple[str, ...]:
    return tuple(
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    )


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        disk.sync(stream.fileno())
