"""Artifact: a directory with a network that runs without us, and the proof of what it is.

    out/
      manifest.json     schema version, recipe, origin, input signature, files with sha256, versions
      model.onnx        what the runtime wrote
      report.json       measurements before and after, and the verdict of every stage
      report.md         the same, for people

It is whole or absent: everything is written to OUT.tmp-... beside it, the manifest last, and then
the two directories change names. A directory without a manifest that verifies is not an artifact.
"""

import contextlib
import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tersor.core import files as disk
from tersor.core import plugins, trust
from tersor.core.errors import ArtifactError
from tersor.core.files import lock as lock
from tersor.core.files import why
from tersor.core.manifest import MANIFEST, REPORT, check_names, check_sizes, make, read
from tersor.core.report import Report
from tersor.core.runtime import Runner, Target
from tersor.core.schema import Mistakes, from_plain, to_plain

_WAIT_S = 30.0
_RETRIES = 20


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A compressed network in a directory, opened and checked."""

    path: Path
    """The directory."""
    recipe: Mapping[str, Any]
    """What was done, as plain data: opening needs no technique and no torch."""
    target: Target
    """Where it runs."""
    files: Mapping[str, str]
    """Names of all files but the manifest, with their sha256."""
    report: Report
    """What was measured."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The whole manifest."""

    @staticmethod
    def open(path: str | Path, *, check: Literal["sizes", "hashes"] = "sizes") -> "Artifact":
        """Open a directory that `write_artifact` made.

        Args:
            path: The directory.
            check: "sizes" compares the sizes of all files, "hashes" their content too.

        Raises:
            ArtifactError: not an artifact, incomplete, altered, or written by a newer tersor.
        """
        folder = Path(path)
        if not folder.exists():
            _recover(folder)
        for _ in range(_RETRIES):
            before = _identity(folder)
            try:
                return Artifact._open(folder, check)
            except ArtifactError:
                if _identity(folder) == before:  # else a writer replaced it while we were reading
                    raise
        return Artifact._open(folder, check)

    @staticmethod
    def _open(folder: Path, check: Literal["sizes", "hashes"]) -> "Artifact":
        manifest = read(folder)
        check_sizes(folder, manifest)
        report = _read_report(folder) if REPORT in manifest["files"] else Report()
        opened = Artifact(
            path=folder,
            recipe=manifest["recipe"],
            target=_read_target(folder, manifest),
            files={name: entry["sha256"] for name, entry in manifest["files"].items()},
            report=report,
            manifest=manifest,
        )
        if check == "hashes":
            opened.verify()
        return opened

    @property
    def model_files(self) -> tuple[Path, ...]:
        """Files that the runtime needs; the first one is the one it loads."""
        return tuple(self.path / name for name in self.manifest["model"])

    def verify(self, names: Sequence[str] | None = None) -> None:
        """Compare the content of all files (or of `names`) with the manifest.

        Raises:
            ArtifactError: a file was altered or is gone.
        """
        for name in self.files if names is None else names:
            try:
                same = disk.sha256(self.path / name) == self.files[name]
            except OSError as error:
                raise ArtifactError(
                    f"artifact {str(self.path)!r}: cannot read {name!r}: {why(error)}"
                ) from error
            if not same:
                raise ArtifactError(
                    f"artifact {str(self.path)!r}: {name!r} was altered (its sha256 is not the "
                    "manifest's); run the compression again or restore the file"
                )

    def load(
        self,
        device: str | None = None,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Runner:
        """Load the network; its files are hashed first.

        Args:
            device: Another device of the runtime.
            threads: Another number of threads; 0 means all usable cores.
            options: Of the runtime, instead of those it was made for.

        Raises:
            ArtifactError: a file was altered, or is compiled code that the user does not trust.
            DependencyError: the runtime is not installed.
            TargetError: the runtime cannot load it, or has no such device.
        """
        self.verify(self.manifest["model"])
        if plugins.own_runtime(self.target.runtime).runs_code and not trust.trusted(self._models):
            raise ArtifactError(
                f"artifact {str(self.path)!r} holds compiled code ({self.target.runtime}) that was "
                "not made by you: loading it runs whatever it says. If you trust who made it: "
                f"tersor inspect {self.path} --trust"
            )
        own = self.target
        told = {**own.options, **(options or {})}
        if threads is not None:
            told["threads"] = threads
        target = replace(own, device=device or own.device, options=told)
        runtime = plugins.runtime(target.runtime)
        plugins.check_device(target)
        plugins.require("runtimes", target.runtime, runtime.to_run)
        return runtime.open(self.model_files[0], target)

    def trust(self) -> None:
        """Say that compiled code in it may be run from now on, whoever made it.

        Raises:
            ArtifactError: a file was altered.
        """
        self.verify(self.manifest["model"])
        trust.remember(self._models)

    @property
    def _models(self) -> list[str]:
        """Hashes of the files that the runtime loads."""
        return [self.files[name] for name in self.manifest["model"]]

    def describe(self) -> dict[str, Any]:
        """Return as plain data what `tersor inspect` shows."""
        known = ("tool", "origin", "inputs", "outputs", "seed", "environment")
        sizes = {name: entry["bytes"] for name, entry in self.manifest["files"].items()}
        return {
            "path": str(self.path),
            "schema": self.manifest["schema"],
            "target": {
                "runtime": self.target.runtime,
                "device": self.target.device,
                "options": dict(self.target.options),
            },
            "recipe": dict(self.recipe),
            **{key: self.manifest[key] for key in known if key in self.manifest},
            "model": list(self.manifest["model"]),
            "model_bytes": sum(sizes[name] for name in self.manifest["model"]),
            "files": [
                {"name": name, "bytes": sizes[name], "sha256": digest}
                for name, digest in self.files.items()
            ],
            "before": to_plain(self.report.before),
            "after": to_plain(self.report.after),
            "stages": [
                {"name": s.name, "verdict": s.verdict, "reason": s.reason, "seconds": s.seconds}
                for s in self.report.stages
            ],
            "reached": self.report.reached,
            "warnings": list(self.report.warnings),
        }

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def write_artifact(
    out: Path,
    *,
    files: Sequence[Path],
    manifest: Mapping[str, Any],
    report: Report,
    texts: Mapping[str, str] | None = None,
    folders: Mapping[str, Sequence[Path]] | None = None,
) -> Artifact:
    """Write an artifact: whole, or not at all.

    An artifact that is there already is replaced as a whole. One of a process that died while
    writing is cleared away.

    Args:
        out: The directory to make. Missing parents are made.
        files: What the runtime needs, the first one to be loaded. Copied.
        manifest: "recipe" and "target" (a Target), and whatever else is to be kept: "origin",
            "inputs", "outputs", "seed", "environment".
        report: Becomes report.json.
        texts: Further reports, by file name.
        folders: Further files, by the name of the folder inside `out` that they go into.

    Raises:
        ArtifactError: `out` is something else, another process writes it, or the disk refuses; what
            was there before is untouched.
    """
    out = _resolve(out)
    plain = make(manifest, files)
    written = {**(texts or {}), REPORT: _json(to_plain(report))}
    inner = {f"{name}/{f.name}": f for name, group in (folders or {}).items() for f in group}
    check_names([*(f.name for f in files), *inner], list(written))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock(out, wait_s=_WAIT_S):
            check_out(out)
            clear_left(out)
            copied = {**{f.name: f for f in files}, **inner}
            _write_beside(out, copied, written, plain)
    except OSError as error:
        raise _disk_error(out, error) from error
    made = Artifact.open(out)
    name = made.target.runtime
    if name in plugins.names("runtimes") and plugins.own_runtime(name).runs_code:
        trust.remember(made.files[name] for name in [*made.manifest["model"], *inner])
    return made


def check_out(out: Path) -> None:
    """Refuse an output that is there and is not an artifact, or cannot be written.

    Raises:
        ArtifactError: saying what is there.
    """
    out = _resolve(out)
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"output {str(out)!r} is a file; choose another name")
    if not out.exists():
        above = next(parent for parent in out.parents if parent.exists())
        if not above.is_dir():
            raise ArtifactError(f"output {str(out)!r} cannot be made: {str(above)!r} is a file")
        return
    present = {entry.name for entry in out.iterdir()}
    if not present:
        return
    try:
        known = {*(name.partition("/")[0] for name in read(out)["files"]), MANIFEST}
    except ArtifactError as error:
        raise ArtifactError(
            f"output {str(out)!r} exists and is not an artifact ({len(present)} entries, "
            f"such as {min(present)!r}); choose another name or remove it"
        ) from error
    if present - known:
        raise ArtifactError(
            f"output {str(out)!r} is an artifact, but {min(present - known)!r} in it is not part "
            "of it and would be lost; move it away or choose another name"
        )


def _write_beside(
    out: Path, files: Mapping[str, Path], texts: Mapping[str, str], manifest: dict[str, Any]
) -> None:
    """Write everything to OUT.tmp-..., then let the two change names."""
    with disk.written_beside(out) as beside:
        folders = {name.partition("/")[0] for name in files if "/" in name}
        for name in sorted(folders):
            disk.make_dir(beside / name)
        for name, file in files.items():
            digest, size = disk.copy_file(file, beside / name)
            manifest["files"][name] = {"sha256": digest, "bytes": size}
        for name, text in texts.items():
            data = text.encode("utf-8")
            manifest["files"][name] = {
                "sha256": disk.write_file(beside / name, data),
                "bytes": len(data),
            }
        disk.write_file(beside / MANIFEST, _json(manifest).encode("utf-8"))
        for name in sorted(folders):
            disk.sync_dir(beside / name)


def clear_left(out: Path) -> None:
    """Under the lock: put back an artifact that was moved aside, remove what dead writers left."""
    disk.clear_left(out, MANIFEST)


def _identity(folder: Path) -> int | None:
    """Return what changes when a directory is replaced by another one."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _recover(folder: Path) -> None:
    """Bring back an artifact whose writer died between two renames."""
    with contextlib.suppress(OSError):
        folder = folder.resolve()
        if disk.left_beside(folder, "old"):
            with lock(folder, wait_s=_WAIT_S):
                clear_left(folder)


def _read_report(folder: Path) -> Report:
    mistakes = Mistakes()
    try:
        raw = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"artifact {str(folder)!r}: {REPORT} is damaged: {error}") from error
    report = from_plain(Report, raw, (), mistakes)
    if report is None:
        path, text, _ = mistakes.found[0]
        raise ArtifactError(
            f"artifact {str(folder)!r}: {REPORT}: {'.'.join(map(str, path))}: {text}"
        )
    return report


def _read_target(folder: Path, manifest: Mapping[str, Any]) -> Target:
    mistakes = Mistakes()
    target = from_plain(Target, manifest["target"], ("target",), mistakes)
    if target is None:
        path, text, _ = mistakes.found[0]
        raise ArtifactError(
            f"artifact {str(folder)!r}: {MANIFEST}: {'.'.join(map(str, path))}: {text}"
        )
    return target


def _resolve(out: Path) -> Path:
    """Follow a link to the directory itself, so that the link stays."""
    resolved = Path(out).resolve()
    if not resolved.name:
        raise ArtifactError(f"{str(out)!r} cannot be an output directory")
    return resolved


def _disk_error(out: Path, error: OSError) -> ArtifactError:
    made = ArtifactError(
        f"cannot write {str(out)!r}: {why(error)}; what was there before is untouched"
        + (". Free some space or choose another output" if error.errno == errno.ENOSPC else "")
    )
    made.exit_code = 2 if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else 4
    return made


def _json(raw: Any) -> str:
    return json.dumps(raw, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
