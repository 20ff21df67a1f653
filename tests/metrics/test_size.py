from pathlib import Path

import pytest

from tersor.core.errors import ArtifactError
from tersor.core.metric import Subject
from tersor.core.runtime import Target
from tersor.metrics.size import size


def test_size_adds_up_each_file_once(tmp_path: Path) -> None:
    xml, weights = tmp_path / "m.xml", tmp_path / "m.bin"
    xml.write_bytes(b"x" * 100)
    weights.write_bytes(b"y" * 1000)
    found = size(
        Subject(target=Target(runtime="openvino"), files=[xml, weights, tmp_path / "." / "m.xml"])
    )
    assert found.value == 1100
    assert found.unit == "B"
    assert found.how == "bytes on disk of m.bin, m.xml"


def test_size_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone.onnx is missing from .*; export it again"):
        size(Subject(target=Target(runtime="onnxruntime"), files=[tmp_path / "gone.onnx"]))
