"""What tests share: a small residual network, its data, a context, and the place of the real data."""

import importlib.util
import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: runs repeat to the bit, in children too

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# what tests compile is remembered as trusted elsewhere than in the user's own folder
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="tersor-tests-")
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TERSOR_SHARED", ROOT.parent / "shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and networks; tests that need it are skipped where it is absent."""
    if not (SHARED / "workloads").is_dir():
        pytest.skip("needs the shared data (set TERSOR_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def workload(shared: Path) -> Callable[[str], ModuleType]:
    """Import one of the shared workload scripts by name."""

    def load(name: str) -> ModuleType:
        key = f"workload_{name}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, shared / "workloads" / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            made = importlib.util.module_from_spec(spec)
            sys.modules[key] = made
            spec.loader.exec_module(made)
        return sys.modules[key]

    return load


@pytest.fixture
def tiny_cnn() -> Iterator[Any]:
    """Return a factory of a trained-looking residual CNN: 1x8x8 -> 10 classes, 3 blocks."""
    from tests import networks

    return networks.tiny_cnn  # type: ignore[return-value]


@pytest.fixture
def tiny_context(tmp_path: Path) -> Callable[..., Any]:
    """Return `make(net, **changes) -> Context` over the digits data."""
    from tests import networks

    return lambda net, **changes: networks.context(net, tmp_path / "work", **changes)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say how a process of pytest-xdist ended that nobody asked to end."""
    if error:
        code = node.gateway._io.popen.wait(timeout=10)
        print(f"\n{node.gateway.id} ended with {code}", flush=True)
