"""profile(): times by operator, joined with their work, and what is said of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from tersor.core.errors import ModelError, TargetError
from tersor.core.runtime import Target
from tersor.ops.ceilings import Ceilings
from tersor.roofline import Layer, Profile, _agreement, _bottlenecks, _shapes, amdahl, profile
from tests.command import failing, talk
from tests.runners import linear_onnx

ROOFS = Ceilings(
    threads=1,
    gflops={"fp32": 100.0, "int8": 300.0},
    by={"fp32": "onnxruntime", "int8": "onnxruntime"},
    memory_gb_s=10.0,
    cache_gb_s=50.0,
)


@pytest.fixture
def roofs(monkeypatch):
    """Measured roofs cost seconds; these are of a machine that was described."""
    monkeypatch.setattr("tersor.roofline.ceilings", lambda threads, fresh=False: ROOFS)


def layer(what: str, share: float, **more) -> Layer:
    about = {"name": what, "kind": "Conv", "covers": (), "ms": 10 * share, "share": share}
    return Layer(**{**about, "what": what, "format": "fp32", "macs": 1, **more})


def of(*layers: Layer, **more) -> Profile:
    about = {"subject": "x", "target": "onnxruntime:cpu", "batch": 1, "threads": 1, "cached": False}
    return Profile(
        **{**about, "latency_ms": 10.0, "operators_ms": 10.0, **more},
        layers=layers,
        ceilings=ROOFS,
        words=(),
        warnings=(),
        environment={},
    )


def test_amdahl():
    assert amdahl(0.5, 2.0) == pytest.approx(4 / 3)
    assert amdahl(1.0, 3.0) == pytest.approx(3.0)
    assert amdahl(0.0, 9.0) == 1.0


def test_compute_bound_words():
    (said, *_) = _bottlenecks(
        of(
            layer("3x3 convolutions, 64 -> 64 channels", 0.72, bound="compute", of_roof=0.81),
            layer("rest", 0.28),
        )
    )
    assert said == (
        "72% of the operators' time is in 3x3 convolutions, 64 -> 64 channels, compute-bound at "
        "81% of the fp32 peak: pruning 25% of its channels can buy at most 1.22x; 8-bit integers, "
        "3.00x as fast here, at most 1.92x"
    )


def test_words_for_memory_and_for_neither():
    half = {"weight_bytes": 500, "moved_bytes": 500, "bound": "memory"}
    (said,) = _bottlenecks(of(layer("matrix products, 8 -> 8", 1.0, of_roof=0.9, **half)))
    assert "memory-bound at 90% of the memory's bandwidth; weights are 50% of the bytes" in said
    assert "weights of 8 bits can buy at most 1.60x" in said  # 3/4 of half the bytes go away
    (said,) = _bottlenecks(of(layer("Add operators", 1.0, of_roof=0.9, bound="memory",
                                    moved_bytes=1, format="")))  # fmt: skip
    assert "fusion, or smaller activations, can move it; fewer bits of weights cannot" in said
    (said,) = _bottlenecks(of(layer("tiny", 1.0, bound="compute", of_roof=0.02)))
    assert "at 2% of the fp32 peak: neither arithmetic nor bandwidth holds them back" in said
    (said,) = _bottlenecks(of(layer("Reorder operators", 1.0)))
    assert "nothing is counted there" in said


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_network_is_profiled(runtime: str, roofs, tmp_path: Path):
    pytest.importorskip(runtime)
    file = linear_onnx(tmp_path / "linear.onnx", width=512, classes=256)
    x = np.random.default_rng(0).standard_normal((4, 64, 512)).astype(np.float32)
    found = profile(
        file, Target(runtime=runtime, options={"threads": 1}), [{"x": a} for a in x], batch=64
    )
    (gemm,) = [each for each in found.layers if each.macs]
    assert gemm.macs == 64 * 512 * 256
    assert gemm.weight_bytes == 4 * (512 * 256 + 256)
    assert gemm.moved_bytes == 4 * 64 * (512 + 256)
    assert gemm.what == "matrix products, 512 -> 256"
    assert gemm.gflops == pytest.approx(2 * gemm.macs / gemm.ms / 1e6)
    assert sum(each.share for each in found.layers) == pytest.approx(1.0)
    assert found.operators_ms == pytest.approx(sum(each.ms for each in found.layers))
    assert found.latency_ms > 0
    assert "the operators' times add up to" in found.words[-1]


def test_what_free_shapes_cost_is_measured_and_told(roofs, tmp_path: Path):
    pytest.importorskip("openvino")
    file = linear_onnx(tmp_path / "linear.onnx")
    feeds = [{"x": np.zeros((1, 6), np.float32)}]

    def on(**options) -> Profile:
        return profile(file, Target(runtime="openvino", options={"threads": 1, **options}), feeds)

    found = on()
    assert 0 <= found.between_ms <= found.free_shapes_ms < found.latency_ms
    assert on(shapes="fixed").free_shapes_ms == 0
    assert on(streams=2, hint="throughput").free_shapes_ms == 0
    free = of(layer("3x3 convolutions", 1.0), operators_ms=8.0, free_shapes_ms=2.0, between_ms=2.0)
    assert free.agrees
    assert _shapes(free) == [
        "20% of the latency is spent because shapes may change from run to run; where they do "
        "not, `shapes: fixed` among the target's options can buy 1.25x"
    ]
    assert _agreement(free) == (
        "the operators' times add up to 100% of the latency, with what free shapes cost between them"
    )
    assert not replace(free, between_ms=0.0).agrees
    assert _shapes(replace(free, free_shapes_ms=0.1)) == []


def test_weights_may_lie_beside_the_file(roofs, tmp_path: Path):
    import onnx

    file = linear_onnx(tmp_path / "linear.onnx", width=512, classes=256)
    onnx.save_model(onnx.load(file), file, save_as_external_data=True, location="linear.onnx.data")
    x = np.zeros((4, 512), np.float32)
    found = profile(file, Target(runtime="onnxruntime", options={"threads": 1}), [{"x": x}])
    assert sum(each.macs for each in found.layers) == 4 * 512 * 256


def test_what_cannot_be_profiled(roofs, tmp_path: Path):
    file = linear_onnx(tmp_path / "linear.onnx")
    with pytest.raises(TargetError, match=r"torch_export does not tell where its time goes; prof"):
        profile(file, Target(runtime="torch_export"), [{"x": np.zeros((1, 6), np.float32)}])
    other = tmp_path / "model.xml"
    other.write_text("")
    with pytest.raises(ModelError, match=r"the work in 'model.xml' cannot be counted; give"):
        profile(other, Target(runtime="onnxruntime"), [{"x": np.zeros((1, 6), np.float32)}])


def test_the_command_line(roofs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = linear_onnx(tmp_path / "linear.onnx")
    code, out, _ = talk(capsys, "profile", str(file), "--batch", "4", "--threads", "1")
    assert code == 0
    assert "matrix products, 6 -> 4" in out
    assert "fp32 100 GFLOP/s (onnxruntime)" in out
    code, out, _ = talk(capsys, "profile", str(file), "--threads", "1", "--json")
    made = json.loads(out)["profile"]
    assert made["layers"][0]["macs"] == 24
    assert made["agrees"] in (True, False)
    page = tmp_path / "roofline.html"
    code, _, err = talk(capsys, "profile", str(file), "--threads", "1", "--out", str(page))
    assert f"the picture is in {page}" in err
    drawn = page.read_text(encoding="utf-8")
    assert "fp32 peak 100 GFLOP/s" in drawn
    assert drawn.count('class="spot') == 1
    code, err = failing(capsys, "profile", str(file), "--out", str(tmp_path / "x.svg"))
    assert (code, "must end in .html" in err) == (2, True)
    code, err = failing(capsys, "profile", str(file), "--sparsity")
    assert code == 2
    assert "a network and --sparsity are two profiles; give one of them" in err
    code, err = failing(capsys, "profile", str(file), "--shapes", "8x8")
    assert "--shapes is for --sparsity" in err
