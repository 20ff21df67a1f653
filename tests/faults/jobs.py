"""A short compress job for the tests that kill it; forked from a process that has torch loaded."""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.core.artifact import Artifact
from tersor.core.context import Data
from tersor.core.recipe import Recipe

RECIPE = {
    "steps": ["fuse_batch_norm", {"finetune": {"epochs": 2.0, "lr": 0.01}}],
    "target": {"runtime": "torch_eager", "options": {"threads": 1}},
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small().eval()


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "x": torch.randn(16, 1, 6, 6, generator=generator),
            "labels": torch.randint(0, 3, (16,), generator=generator),
        }
        for _ in range(6)
    ]
    return Data(
        calibration=batches[:1], train=batches[:4], validation=batches[4:5], test=batches[5:]
    )


def run(out: Path, *, resume: bool, seed: int = 0, target: str = "torch_eager") -> Artifact:
    from tersor.pipeline import compress

    torch.set_num_threads(1)
    recipe = Recipe.parse({**RECIPE, "target": {"runtime": target, "options": {"threads": 1}}})
    return compress(
        net(seed), recipe, data=data(), out=out, metrics=("size", "fidelity"), resume=resume
    )


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        faulthandler.enable()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(pid: int, seconds: float = 120.0) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGABRT)  # faulthandler prints where it was
    os.waitpid(pid, 0)
    raise TimeoutError(f"the child did not end in {seconds} s")
