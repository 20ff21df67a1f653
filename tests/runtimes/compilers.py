"""What the tests of runtimes with a fixed batch share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.core import plugins
from tersor.core.model import Inputs
from tersor.core.runtime import Arrays, Runtime, Target
from tersor.ops.lower import lower


def needs(name: str, *, to_run: bool = True) -> Runtime:
    """Return the runtime, here or in its environment; skip where neither has its packages."""
    found = plugins.runtime(name)
    wanted = (*found.to_export, *(found.to_run if to_run else ()))
    missing = [package for package in wanted if not plugins.installed(package)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (tersor doctor --create {name})")
    return found


def exported(runtime: Runtime, net: Any, x: torch.Tensor, folder: Path) -> list[Path]:
    inputs = Inputs(example={"x": x})
    return list(runtime.export(lower(net, runtime.takes, inputs), folder, inputs))


def run(runtime: Runtime, name: str, file: Path, inputs: Arrays, threads: int = 1) -> np.ndarray:
    runner = runtime.load(file, Target(runtime=name, options={"threads": threads}))
    try:
        return np.asarray(next(iter(runner.bind(inputs)().values())))
    finally:
        runner.close()


def largest_difference(net: Any, x: torch.Tensor, made: np.ndarray) -> float:
    with torch.no_grad():
        expected = net(x).numpy()
    assert made.shape == expected.shape
    return float(np.abs(made - expected).max() / np.abs(expected).max())
