"""Write files so that a crash leaves either the old state or the new one.

Every change of the file system goes through the first group of functions, one operating system call
each: the seam at which tests make the n-th call fail.
"""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tersor.core.errors import ArtifactError

_log = logging.getLogger("tersor")

if sys.platform != "win32":
    import fcntl

_CHUNK = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_HELD: ContextVar[frozenset[str]] = ContextVar("held locks", default=frozenset())


def open_new(path: Path) -> int:
    """Create a file that does not exist and return its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def write(descriptor: int, data: memoryview) -> int:
    """Write some of `data`; return how many bytes."""
    return os.write(descriptor, data)


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on the disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # file systems without fsync of folders
            raise


def make_dir(path: Path) -> None:
    """Create one folder."""
    path.mkdir()


def rename(source: Path, place: Path) -> None:
    """Move within a file system, atomically; replaces a file or an empty folder."""
    source.replace(place)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one))


def unlink(path: Path) -> None:
    """Remove one file or link."""
    path.unlink()


def remove_dir(path: Path) -> None:
    """Remove one empty folder."""
    path.rmdir()


def write_file(path: Path, data: bytes) -> str:
    """Write a new file through to the disk; return the sha256 of its content."""
    descriptor = open_new(path)
    try:
        _write_all(descriptor, data)
        sync(descriptor)
    finally:
        os.close(descriptor)
    return hashlib.sha256(data).hexdigest()


def copy_file(source: Path, path: Path) -> tuple[str, int]:
    """Copy a file through to the disk; return sha256 and size of what was written."""
    digest, size = hashlib.sha256(), 0
    descriptor = open_new(path)
    try:
        with source.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                _write_all(descriptor, chunk)
                digest.update(chunk)
                size += len(chunk)
        sync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest(), size


def sync_dir(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Give a file a new content: whole, or the old one stays."""
    beside = beside_name(path, "tmp")
    try:
        write_file(beside, data)
        rename(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unlink(beside)
        raise
    sync_dir(path.parent)


@contextlib.contextmanager
def written_beside(place: Path) -> Iterator[Path]:
    """Give a folder beside `place` to be filled, and let it take that place at the end.

    What is filled in is on the disk by then where the caller has synced its files and folders. If
    anything fails, `place` is as it was.
    """
    beside = beside_name(place, "tmp")
    try:
        make_dir(beside)
        yield beside
        sync_dir(beside)
        beside = _put_in_place(beside, place)
    except BaseException:
        _discard(beside)
        raise
    try:
        sync_dir(place.parent)
    except OSError as error:
        _log.warning("%s is written, but may not survive a power cut: %s", place, why(error))
    _discard(beside)


def clear_left(place: Path, record: str) -> None:
    """Under the lock: put back what was moved aside, and remove what writers that died have left.

    Args:
        place: The folder.
        record: The file in it that is written last.
    """
    for old in left_beside(place, "old"):
        if not place.exists() and (old / record).exists():
            rename(old, place)
            sync_dir(place.parent)
    for stale in (*left_beside(place, "tmp"), *left_beside(place, "old")):
        _discard(stale)


def _put_in_place(beside: Path, place: Path) -> Path:
    """Give a finished folder its name; return the folder that is to be removed, if it is there.

    Where a folder has that name already, the two change names. Where the system cannot do that at
    once, the old one is called NAME.old-... for a moment, and comes back if the second step fails.
    """
    if not place.exists():
        rename(beside, place)
    elif not exchange(beside, place):
        old = beside_name(place, "old")
        rename(place, old)
        try:
            rename(beside, place)
        except BaseException:
            rename(old, place)
            raise
        return old
    return beside


def _discard(path: Path) -> None:
    """Remove a folder of ours; what cannot be removed now is cleared by the next writer."""
    if path.exists():
        try:
            remove_tree(path)
        except OSError as error:
            _log.warning("%s could not be removed: %s", path, error)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; links are removed, not followed."""
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            remove_tree(Path(entry.path))
        else:
            unlink(Path(entry.path))
    remove_dir(path)


def beside_name(path: Path, word: str) -> Path:
    """Return an unused name on the same file system: NAME.tmp-0123456789abcdef."""
    return path.with_name(f"{_short(path.name)}.{word}-{secrets.token_hex(8)}")


def left_beside(path: Path, word: str) -> list[Path]:
    """List what `beside_name` made for `path` before and a dead process left."""
    stem = f"{_short(path.name)}.{word}-"
    digits = set("0123456789abcdef")
    return sorted(
        entry
        for entry in path.parent.iterdir()
        if entry.name.startswith(stem)
        and len(entry.name) == len(stem) + 16
        and set(entry.name[len(stem) :]) <= digits
    )


def _short(name: str) -> str:
    """Leave room for an ending: file names have at most 255 bytes."""
    raw = os.fsencode(name)
    if len(raw) <= 220:
        return name
    kept = raw[:200].decode("utf-8", errors="ignore")
    return f"{kept}~{hashlib.sha256(raw).hexdigest()[:8]}"


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def lock(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Keep other writers of `path` out, in this process and in others, while the block runs.

    The lock is a file beside it, NAME.lock, which the system frees when its process dies. The same
    thread of control may lock again what it has locked.

    Args:
        path: What will be written; need not exist.
        wait_s: How long to wait for another writer.

    Raises:
        ArtifactError: another process writes it, or the folder cannot be written.
    """
    path = path.resolve()
    held = _HELD.get()
    if str(path) in held:
        yield
        return
    place = path.with_name(f"{_short(path.name)}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = _acquire(place, path, time.monotonic() + wait_s)
    except OSError as error:
        raise ArtifactError(f"cannot write beside {str(path)!r}: {why(error)}") from error
    token = _HELD.set(held | {str(path)})
    try:
        yield
    finally:
        _HELD.reset(token)
        with contextlib.suppress(OSError):
            place.unlink()  # while it is still ours: who waits for it sees that it is gone
        stream.close()


def why(error: OSError) -> str:
    """Say what the system said, without number and path."""
    return (error.strerror or str(error)).lower()


def _acquire(place: Path, path: Path, until: float) -> Any:
    while True:
        stream = place.open("a+")
        try:
            if sys.platform != "win32":
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), place.stat()):
                    stream.truncate(0)
                    stream.write(str(os.getpid()))
                    stream.flush()
                    return stream
        except BlockingIOError:
            if time.monotonic() >= until:
                stream.seek(0)
                owner = stream.read(20).strip() or "unknown"
                stream.close()
                raise ArtifactError(
                    f"another process (pid {owner}) is writing {str(path)!r}; "
                    "wait for it or choose another output"
                ) from None
            time.sleep(0.05)
        except BaseException:
            stream.close()
            raise
        stream.close()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = write(descriptor, view)
        if count <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[count:]
