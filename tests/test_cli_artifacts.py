"""The verbs run, inspect, measure and compare on a real artifact."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.command import ROOT, failing, talk
from tests.runners import linear_onnx

NETWORKS = str(ROOT / "tests" / "networks.py")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact: a tiny network exported to ONNX Runtime, with a report."""
    from tersor.core.artifact import write_artifact
    from tersor.core.runtime import Target
    from tersor.ops.lower import lower
    from tersor.runtimes.onnxruntime import RUNTIME
    from tests import networks
    from tests.core.report_sample import report

    folder = tmp_path_factory.mktemp("cli")
    net, inputs = networks.tiny_cnn(trained=False), networks.inputs()
    files = RUNTIME.export(lower(net, "onnx", inputs), folder, inputs)
    entry = {"shape": [2, 1, 8, 8], "dtype": "float32", "dynamic": {"0": "batch"}}
    out = folder / "out"
    manifest = {
        "recipe": {"steps": ["fuse_batch_norm"], "target": "onnxruntime:cpu"},
        "target": Target(runtime="onnxruntime", options={"threads": 1}),
        "origin": "module:tests",
        "inputs": {"x": entry},
        "seed": 3,
    }
    write_artifact(out, files=files, manifest=manifest, report=report())
    return out


def test_run(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    words = ["run", str(artifact), "--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz")]  # fmt: skip
    code, out, err = talk(capsys, *words, "--json")
    assert (code, err) == (0, "")
    (entry,) = json.loads(out)["outputs"]
    assert entry["shape"] == [5, 10]
    with np.load(tmp_path / "y.npz", allow_pickle=False) as made:
        y = made[entry["name"]]
    from tersor.core.artifact import Artifact

    expected = next(iter(Artifact.open(artifact).load(threads=1).bind({"x": x})().values()))
    np.testing.assert_array_equal(y, expected)


def test_run_works_where_torch_is_not_installed(artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), np.float32))
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'safetensors', 'sklearn'): sys.modules[name] = None\n"
        "from tersor.__main__ import main\n"
        f"main(['run', {str(artifact)!r}, '--input', {str(tmp_path / 'x.npz')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1x10" in done.stdout


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((1, 1, 8, 8), "f")}, "the network takes x; the file holds y."),
        ({}, "the file holds nothing"),
        ({"x": np.zeros((1, 3, 8, 8), "f")}, "input 'x' must have the shape (batch, 1, 8, 8), got (1, 3, 8, 8)"),
        ({"x": np.zeros((64,), "f")}, "input 'x' must have the shape (batch, 1, 8, 8), got (64,)"),
        ({"x": np.zeros((1, 1, 8, 8), "complex64")}, "input 'x' must be of type float32, got complex64"),
    ],
)  # fmt: skip
def test_run_refuses_arrays_that_do_not_fit(
    arrays: dict[str, np.ndarray], message: str, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    code, err = failing(capsys, "run", str(artifact), "--input", str(tmp_path / "x.npz"))
    assert code == 2
    assert message in err


def test_run_refuses_pickles_bombs_and_other_files(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zipfile

    np.savez(tmp_path / "objects.npz", x=np.array([print], dtype=object))
    (tmp_path / "text.npz").write_text("<html>")
    (tmp_path / "empty.npz").write_bytes(b"")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"  # fmt: skip
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as pack:
        pack.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name, message in [
        ("objects.npz", "holds Python objects; save plain arrays"),
        ("text.npz", "is not a .npz file of plain arrays"),
        ("empty.npz", "is not a .npz file of plain arrays"),
        ("huge.npz", "claims the shape (1000000, 1000000), more than it holds"),
        ("absent.npz", "does not exist"),
    ]:
        code, err = failing(capsys, "run", str(artifact), "--input", str(tmp_path / name))
        assert code == 2
        assert message in err, name


def test_run_leaves_no_half_written_output(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), "f"))
    words = ["run", str(artifact), "--input", str(tmp_path / "x.npz"), "--output"]
    code, err = failing(capsys, *words, str(tmp_path / "no" / "y.npz"))
    assert code == 2
    assert "the folder of --output" in err
    (tmp_path / "y.npz").mkdir()
    code, err = failing(capsys, *words, str(tmp_path / "y.npz"))
    assert code == 2
    assert "cannot be written" in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.npz", "y.npz"]


@pytest.mark.parametrize("words", [("run", "--input", "x.npz"), ("deploy", "--to", "triton", "--out", "tt")])  # fmt: skip
def test_a_model_file_is_no_artifact(words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    file = linear_onnx(tmp_path / "m.onnx")
    code, err = failing(capsys, words[0], str(file), *words[1:])
    assert code == 2
    assert err == (
        f"{str(file)!r} is a file, not a directory: an artifact is the folder that compress makes "
        f"of a network, as in: tersor compress FILE.py:FACTORY --data DATA --recipe auto --out "
        "FOLDER\n"
    )


def test_inspect_an_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = talk(capsys, "inspect", str(artifact))
    assert code == 0
    assert "x float32 (batch, 1, 8, 8)" in out
    assert "dropped" in out
    _, raw, _ = talk(capsys, "inspect", str(artifact), "--verify", "--json")
    found = json.loads(raw)
    assert found["schema"] == 1
    assert found["verified"] is True
    assert sum(layer["parameters"] for layer in found["layers"]) == found["numbers"] > 5000
    assert all(0 <= layer["sparsity"] <= 1 for layer in found["layers"])


def written(runtime: str, folder: Path) -> Path:
    """Write an artifact of a tiny network, a quarter of whose first kernel is zero."""
    from tersor.core import plugins
    from tersor.core.artifact import write_artifact
    from tersor.core.report import Report
    from tersor.core.runtime import Target
    from tersor.ops.lower import lower
    from tests import networks

    net, inputs = networks.tiny_cnn(trained=False), networks.inputs()
    net.conv1.weight.data[:2] = 0
    found = plugins.runtime(runtime)
    files = found.export(lower(net, found.takes, inputs), folder, inputs)
    manifest = {"recipe": {}, "target": Target(runtime=runtime), "inputs": {}}
    write_artifact(folder / "out", files=files, manifest=manifest, report=Report())
    return folder / "out"


def test_inspect_shows_the_zeros_of_torch_eager(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = str(written("torch_eager", tmp_path))
    code, raw, err = talk(capsys, "inspect", out, "--json")
    first = next(layer for layer in json.loads(raw)["layers"] if layer["name"] == "conv1")
    assert (code, err, first["shape"]) == (0, "", [8, 1, 3, 3])
    assert first["weight_sparsity"] == 0.25
    code, shown, _ = talk(capsys, "inspect", out)
    assert (code, "25.0 %" in shown) == (0, True)


@pytest.mark.parametrize(
    ("runtime", "file"),
    [
        pytest.param("torch_compile", "compiled.pt2", marks=pytest.mark.slow),
        ("torchscript", "model.pt"),
    ],
)
def test_inspect_shows_what_it_can_of_compiled_code(
    runtime: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = written(runtime, tmp_path)
    code, shown, err = talk(capsys, "inspect", str(out))
    assert code == 0
    assert f"{runtime}:cpu" in shown
    assert err == f"layers are not shown: {file} is compiled code ({runtime})\n"


def test_inspect_finds_an_altered_file(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    file = copy / json.loads((copy / "manifest.json").read_text())["model"][0]
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    code, err = failing(capsys, "inspect", str(copy), "--verify")
    assert code == 2
    assert "was altered" in err


def test_inspect_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    code, raw, _ = talk(capsys, "inspect", f"{NETWORKS}:TinyCnn", "--json")
    found = json.loads(raw)
    assert code == 0
    first = found["layers"][0]
    assert (first["name"], first["kind"], first["shape"]) == ("conv1", "Conv2d", [8, 1, 3, 3])
    assert first["parameters"] == 72
    assert found["form"] == "module"


def test_inspect_lists_and_draws_coupled_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    picture = tmp_path / "made" / "g.svg"
    words = ["inspect", f"{NETWORKS}:TinyCnn", "--groups", "--data", "digits"]
    code, out, err = talk(capsys, *words, "--out", str(picture))
    assert (code, err) == (0, f"drawn: {picture}\n")
    lines = out.splitlines()
    assert lines[1].split(maxsplit=2) == ["conv1", "8", "made by conv1, block1.conv2"]
    assert lines[2:4] == [
        "                        through bn1, block1.bn2",
        "                        read by block1.conv1, block2.conv1, block2.shortcut",
    ]
    assert "stays: the network's output" in out
    assert lines[-1] == "64 of 74 channels (86.5 %) can be cut, in 5 of 6 groups"
    assert picture.read_text().startswith("<svg ")
    code, raw, _ = talk(capsys, *words, "--json")
    found = json.loads(raw)
    assert (found["channels"], found["free"]) == (74, 64)
    assert found["groups"][1] == {
        "name": "block1.conv1",
        "channels": 8,
        "places": 1,
        "made_by": ["block1.conv1"],
        "through": ["block1.bn1"],
        "read_by": ["block1.conv2"],
        "stays": None,
    }
    _, out, _ = talk(capsys, *words[:1], f"{NETWORKS}:TinyTransformer", *words[2:])
    assert "made by qkv (each at 12 places)" in out


def test_groups_of_a_network_that_cannot_be_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    file = tmp_path / "odd.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
    )
    code, err = failing(capsys, "inspect", f"{file}:Net", "--groups", "--data", "digits")
    assert code == 2
    assert f"as a condition at {file}:4 (return x if x.sum() > 0 else -x)" in err


def test_inspect_finds_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx
    import torch
    from torch import nn

    net = nn.Sequential(nn.Linear(32, 16, bias=False), nn.ReLU(), nn.Linear(16, 24, bias=False))
    with torch.no_grad():
        net[0].weight.view(16, 8, 4)[..., 1::2] = 0  # 2:4
        net[2].weight.view(3, 8, 4, 4)[1, :, ::2] = 0  # 8x4 blocks
    torch.export.save(torch.export.export(net, (torch.ones(2, 32),)), tmp_path / "net.pt2")
    code, raw, _ = talk(capsys, "inspect", str(tmp_path / "net.pt2"), "--json")
    first, second = json.loads(raw)["layers"]
    assert code == 0
    assert first["structure"]["n_of_m"] == [2, 4]
    assert second["structure"] == {"n_of_m": None, "block": [8, 4], "zero_rows": 0, "zero_columns": 0}  # fmt: skip
    # the same as an ONNX file whose matrices are (inputs, outputs)
    weights = {"a": net[0].weight.detach().T.numpy(), "b": net[2].weight.detach().T.numpy()}
    made = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "a"], ["y"]),
            onnx.helper.make_node("Gemm", ["y", "b"], ["z"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 32])],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["batch", 24])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(w), n) for n, w in weights.items()],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(made, opset_imports=opset), tmp_path / "net.onnx")
    code, out, _ = talk(capsys, "inspect", str(tmp_path / "net.onnx"))
    assert code == 0
    lines = out.splitlines()
    assert any(line.split()[-1:] == ["structure"] for line in lines)
    assert any(line.startswith("a ") and line.endswith("50.0 %  2:4, 16 columns") for line in lines)
    assert any(line.startswith("b ") and line.endswith("16.7 %  8x4 blocks") for line in lines)


@pytest.mark.parametrize("step", ["static", "weight_only", "half"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch_eager", "torch_export"])
def test_the_zeros_of_all_are_those_of_weights(step: str, runtime: str, tmp_path: Path) -> None:
    """Of a pruned network with zero points, scales, shapes, and biases that are not zero."""
    import torch

    from tersor._cli_inspect import _totals
    from tersor._cli_tensors import of_file, of_net
    from tersor.core import plugins
    from tersor.ops.lower import lower
    from tersor.quantization.half import Half, half
    from tersor.quantization.static import Static, static
    from tersor.quantization.weight_only import WeightOnly, weight_only
    from tests import networks

    pytest.importorskip(runtime.partition("_")[0])
    context = networks.context(net := networks.sparse_cnn(), tmp_path / "work")
    if step == "static":
        made = static(net, Static(), context)
    elif step == "weight_only":
        made = weight_only(net, WeightOnly(), context)
    else:
        made = half(net, Half(format="fp8_e4m3"), context)
    weights = [layer.weight for layer in made.modules() if isinstance(getattr(layer, "weight", None), torch.Tensor)]  # fmt: skip
    zeros = sum(int((weight.float() == 0).sum()) for weight in weights)
    numbers = sum(w.numel() for w in weights) + sum(p.numel() for p in made.parameters())
    assert _totals(of_net(made))["sparsity"] == pytest.approx(zeros / numbers, abs=1e-3)
    found = plugins.runtime(runtime)
    lowered = lower(made, found.takes, networks.inputs())
    files = found.export(lowered, tmp_path, networks.inputs())
    file = next(f for f in files if f.suffix in (".onnx", ".xml", ".pt2", ".safetensors"))
    constants = of_file(file)
    assert sum(each.count for each in constants if each.weight) == pytest.approx(numbers, rel=0.01)
    assert _totals(constants)["sparsity"] == pytest.approx(zeros / numbers, abs=0.01)


def test_constants_of_openvino_and_safetensors_files(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from tersor._cli_tensors import of_file

    weight = torch.tensor([[0.0, 1.0], [-0.0, 2.0]])
    save_file({"a.weight": weight.bfloat16(), "a.bias": weight[0].clone()}, tmp_path / "w.safetensors")  # fmt: skip
    found = {(c.layer, c.dtype): c for c in of_file(tmp_path / "w.safetensors")}
    assert found["a", "bfloat16"].zeros == 2
    assert found["a", "float32"].size_bytes == 8
    (tmp_path / "m.bin").write_bytes(np.array([0, 3, 0, 4], np.int8).tobytes())
    layer = '<layer id="0" name="w" type="Const"><data element_type="i8" shape="2,2" offset="{}" size="4"/></layer>'  # fmt: skip
    (tmp_path / "m.xml").write_text(f"<net><layers>{layer.format(0)}</layers></net>")
    (only,) = of_file(tmp_path / "m.xml")
    assert (only.layer, only.shape, only.dtype, only.zeros) == ("w", (2, 2), "int8", 2)
    (tmp_path / "m.xml").write_text(f"<net><layers>{layer.format(1)}</layers></net>")
    from tersor.core.errors import ModelError

    with pytest.raises(ModelError, match=r"m\.xml: constant 'w' lies outside the \.bin"):
        of_file(tmp_path / "m.xml")


def test_measure_an_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, raw, _ = talk(capsys, "measure", str(artifact), "--metric", "size", "--json")
    (size,) = json.loads(raw)["measurements"]
    assert code == 0
    assert size["value"] == (artifact / "model.onnx").stat().st_size
    _, out, _ = talk(capsys, "measure", str(artifact), "--metric", "size")
    assert "kB" in out


def test_measure_refuses_another_runtime(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    code, err = failing(capsys, "measure", str(artifact), "--target", "openvino")
    assert code == 4
    assert "was made for onnxruntime:cpu" in err


def test_measuring_a_network_in_python_asks_for_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = failing(capsys, "measure", f"{NETWORKS}:TinyCnn")
    assert code == 2
    assert "give --data" in err


def test_compare(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(artifact), str(artifact), "--budget", "0.2", "--threads", "1"]
    code, raw, _ = talk(capsys, *words, "--json", "--min-effect", "0.9")
    found = json.loads(raw)["comparison"]
    assert code == 0
    assert found["verdict"] == "no difference"
    assert found["low"] <= found["speedup"] <= found["high"]
    assert len(found["samples"]["a"]) == found["blocks"]
    code, out, _ = talk(capsys, *words, "--gate", "faster", "--min-effect", "0.9")
    assert code == 1
    assert "no difference: B is" in out


def test_a_missing_package_ends_with_3_and_the_line_to_paste(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:  # fmt: skip
    from tersor.core import plugins

    np.savez(tmp_path / "x.npz", x=np.zeros((1, 1, 8, 8), np.float32))
    there = plugins.installed
    monkeypatch.setattr(plugins, "installed", lambda p: p != "onnxruntime" and there(p))
    code, err = failing(capsys, "run", str(artifact), "--input", str(tmp_path / "x.npz"))
    assert code == 3
    assert "pip install 'tersor[onnxruntime]'" in err
    _, out, _ = talk(capsys, "list", "runtimes", "--json")
    states = {row["name"]: row["installed"] for row in json.loads(out)["runtimes"]}
    assert states["onnxruntime"] is False
    assert states["torch_eager"] is True


def test_a_network_is_not_exported_for_a_runtime_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.core import plugins

    there = plugins.installed
    monkeypatch.setattr(plugins, "installed", lambda p: p != "tensorrt" and there(p))
    words = ("tersor.demo.network:trained", "--data", "digits", "--target", "tensorrt:cuda")
    code, err = failing(capsys, "measure", *words)
    assert code == 3
    assert "needs the package 'tensorrt'. Install it with: pip install 'tersor[tensorrt]'" in err
