"""Compiled kernels: kept, rebuilt when damaged, and not needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tersor.ops import native

SCRIPT = """
import torch
from tersor.ops import native
from tersor.ops.sparse import sparse
layer = torch.nn.Linear(40, 30).eval()
layer.weight.data[torch.rand(30, 40) < 0.9] = 0
x = torch.randn(5, 40)
assert torch.allclose(sparse(layer)(x), layer(x), atol=1e-5)
print(native.build().note)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; without a compiler the test is skipped."""
    if native._compiler() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.build.cache_clear()
    monkeypatch.setattr(native, "build", native.build.__wrapped__)
    return tmp_path / "tersor"


def test_compiled_once(folder: Path) -> None:
    first = native.build()
    assert first.library is not None
    assert first.note.startswith("compiled by ")
    assert folder.stat().st_mode & 0o077 == 0
    (file,) = folder.iterdir()
    assert native.build().note == "compiled before for this processor"
    assert list(folder.iterdir()) == [file]


def test_a_damaged_build_is_made_anew(folder: Path) -> None:
    native.build()
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.unlink()
    file.write_bytes(good[: len(good) // 2])
    file.chmod(0o600)
    made = native.build()
    assert made.note.startswith("compiled by ")
    assert made.library is not None
    assert file.read_bytes() == good


def test_a_build_that_others_may_write_is_not_loaded(folder: Path) -> None:
    native.build()
    folder.chmod(0o777)
    made = native.build()
    assert made.library is not None
    assert f"each time anew (others may write to {folder})" in made.note


def test_a_compiler_that_fails_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    made = native.build()
    assert made.library is None
    assert "cannot compile it: exit code 1" in made.note


def test_old_builds_are_removed(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"sparse-{i}.so").write_bytes(b"")
        os.utime(tmp_path / f"sparse-{i}.so", (i, i))
    native.trim(tmp_path, "sparse-*.so")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(
        f"sparse-{i}.so" for i in range(5, 12)
    )


def test_without_a_compiler_layers_compute_all_the_same(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    env.pop("CC", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no C compiler here: install gcc or clang\n"
