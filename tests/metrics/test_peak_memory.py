import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tersor.core.errors import TargetError
from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics import peak_memory as module
from tersor.metrics.peak_memory import peak_memory
from tests.runners import linear_onnx

pytest.importorskip("onnxruntime")
TARGET = Target(runtime="onnxruntime", options={"threads": 1})


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROCESSES", 1)


def test_peak_memory_sees_the_weights(tmp_path: Path) -> None:
    width, classes = 1024, 8192  # 32 MiB of weights
    file = linear_onnx(tmp_path / "large.onnx", width=width, classes=classes)
    found = peak_memory(
        Subject(target=TARGET, files=[file], inputs=[{"x": np.zeros((1, width), np.float32)}])
    )
    weights = 4 * width * classes
    assert found.unit == "B"
    assert weights < found.value < 5 * weights
    assert found.value == found.conditions["peak_bytes"] - found.conditions["baseline_bytes"]  # type: ignore[operator]
    # a bare interpreter with numpy and the runtime, not this process with torch in it
    assert 10e6 < float(found.conditions["baseline_bytes"]) < 150e6
    assert float(found.conditions["load_ms"]) > 0
    assert found.how.startswith(
        "median of 1 fresh processes: peak resident set less that of the runtime alone"
    )


def test_the_child_does_not_import_torch(tmp_path: Path) -> None:
    file = linear_onnx(tmp_path / "m.onnx")
    (tmp_path / "order.json").write_text(
        json.dumps(
            {
                "target": {"runtime": "onnxruntime", "device": "cpu", "options": {}},
                "file": str(file),
            }
        )
    )
    np.savez(tmp_path / "inputs.npz", x=np.zeros((1, 6), np.float32))
    code = (
        "import sys; from pathlib import Path; from tersor.metrics import _child; "
        "_child.main(Path(sys.argv[1])); assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["peak"] > answer["baseline"] > 0
    assert answer["load_ms"] > 0
    assert answer["first_run_ms"] > 0


def test_a_network_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"not a model")
    with pytest.raises(
        TargetError,
        match=r"the process that measures memory failed on onnxruntime:cpu: .*broken.onnx",
    ):
        peak_memory(
            Subject(target=TARGET, files=[file], inputs=[{"x": np.zeros((1, 6), np.float32)}])
        )
