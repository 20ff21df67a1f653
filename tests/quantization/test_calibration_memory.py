"""Calibration reads a stream: ten times the samples take no more memory."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from tersor.quantization.static import Static, static
from tests import networks

class Stream:
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(int(sys.argv[1])):
            yield {"x": torch.randn(256, 1, 8, 8, generator=generator)}

torch.set_num_threads(1)
net = networks.tiny_cnn(trained=False)
context = networks.context(net, Path(sys.argv[2]))
context = replace(context, data=replace(context.data, calibration=Stream()))
static(net, Static(calibrator="entropy"), context)
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_ten_times_the_samples_take_the_same_memory(tmp_path: Path) -> None:
    def peak(batches: int) -> int:
        command = [sys.executable, "-c", CHILD, str(batches), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak(100) <= 1.1 * peak(10)
