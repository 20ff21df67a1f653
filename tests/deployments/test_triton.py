"""A repository is served by a real Triton server, and asked by the unmodified client."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tersor
from tersor.core import environments
from tersor.core.artifact import Artifact
from tersor.core.errors import RecipeError, TargetError
from tersor.deployments._triton_repository import _check_script
from tests.deployments.conftest import expected

ASK = """
import sys
import numpy as np, tritonclient.grpc, tritonclient.http
http, grpc, x, out, name = sys.argv[1:]
made = {"x": np.load(x)}
for kind, client, address in (("http", tritonclient.http, http), ("grpc", tritonclient.grpc, grpc)):
    with client.InferenceServerClient(address) as asked:
        assert asked.is_model_ready("digits")
        port = client.InferInput("x", made["x"].shape, "FP32")
        port.set_data_from_numpy(made["x"])
        made[kind] = asked.infer("digits", [port]).as_numpy(name)
        try:
            port = client.InferInput("x", [1, 3, 3, 3], "FP32")
            port.set_data_from_numpy(np.zeros((1, 3, 3, 3), "float32"))
            asked.infer("digits", [port])
        except Exception as error:
            made[kind + " refused"] = np.array(str(error))
np.savez(out, **made)
"""
PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
parsed = text_format.Parse(open(sys.argv[1]).read(), model_config_pb2.ModelConfig())
print(json.dumps(json_format.MessageToDict(parsed, preserving_proto_field_name=True)))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    found = environments.python("triton")
    if found is None:
        pytest.skip("needs the environment: tersor doctor --create triton")
    return found


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@contextlib.contextmanager
def served(repository: Path, python: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Run the server that nvidia-pytriton brings; yield where it answers HTTP and gRPC."""
    packages = next(python.parent.parent.glob("lib/python*/site-packages"))
    home = packages / "pytriton" / "tritonserver"
    version = packages.parent.name.removeprefix("python")
    backends = folder / "backends"
    shutil.copytree(home / "backends" / "python", backends / "python")
    stub = "triton_python_backend_stub"
    shutil.copy(home / "python_backend_stubs" / version / stub, backends / "python")
    http, grpc = free_port(), free_port()
    log = folder / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [
                str(home / "bin" / "tritonserver"),
                f"--model-repository={repository}",
                f"--backend-directory={backends}",
                "--http-address=127.0.0.1",
                "--grpc-address=127.0.0.1",
                f"--http-port={http}",
                f"--grpc-port={grpc}",
                "--allow-metrics=false",
            ],
            stdout=stream,
            stderr=stream,
            env={
                **os.environ,
                "PYTHONPATH": str(packages),
                "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
            },
        )
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text(errors="replace")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready").close()
                break
            time.sleep(0.1)
        yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
def test_a_real_server_answers_as_the_artifact_does(
    artifact_of: Callable[[str], Artifact], python: Path, x: np.ndarray, tmp_path: Path
) -> None:
    artifact = artifact_of("onnxruntime")
    options = {"backend": "python", "name": "digits"}
    tersor.deploy(artifact, to="triton", out=tmp_path / "repository", options=options)
    name, wanted = expected(artifact, x)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "server").mkdir()
    with served(tmp_path / "repository", python, tmp_path / "server") as (http, grpc):
        files = [str(tmp_path / "x.npy"), str(tmp_path / "y.npz")]
        subprocess.run([str(python), "-c", ASK, http, grpc, *files, name], check=True)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as answers:
        np.testing.assert_array_equal(answers["http"], wanted)
        np.testing.assert_array_equal(answers["grpc"], wanted)
        assert "unexpected shape" in str(answers["http refused"])
        assert "unexpected shape" in str(answers["grpc refused"])
    # what Python left beside the program does not keep the folder from being written again
    tersor.deploy(artifact, to="triton", out=tmp_path / "repository", options=options)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torchscript"])
def test_a_configuration_is_what_the_published_schema_says(
    runtime: str, artifact_of: Callable[[str], Artifact], python: Path, tmp_path: Path
) -> None:
    import json

    pytest.importorskip("torch" if runtime == "torchscript" else runtime)
    artifact = artifact_of(runtime)
    options = {"instances": 2, "max_batch": 16, "delay_us": 50}
    tersor.deploy(artifact, to="triton", out=tmp_path / "out", options=options)
    file = tmp_path / "out" / "net" / "config.pbtxt"
    done = subprocess.run(
        [str(python), "-c", PARSE, str(file)], check=True, capture_output=True, text=True
    )
    parsed = json.loads(done.stdout)
    assert parsed["backend"] == runtime.replace("torchscript", "pytorch")
    assert parsed["max_batch_size"] == 16
    assert parsed["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["1", "8", "8"]}]
    (output,) = parsed["output"]
    assert (output["data_type"], output["dims"]) == ("TYPE_FP32", ["10"])
    assert parsed["instance_group"][0]["count"] == 2
    assert parsed["dynamic_batching"]["max_queue_delay_microseconds"] == "50"
    assert output["name"].endswith("__0") == (runtime == "torchscript")
    key = {
        "onnxruntime": "intra_op_thread_count",
        "openvino": "INFERENCE_NUM_THREADS",
        "torchscript": "INTRA_OP_THREAD_COUNT",
    }[runtime]
    assert parsed["parameters"][key]["string_value"] == "1"


def test_openvino_is_told_its_options_and_a_precision_is_refused(
    artifact_of: Callable[[str], Artifact],
) -> None:
    from tersor.deployments._triton_repository import Serving, _parameters

    pytest.importorskip("openvino")
    artifact = artifact_of("openvino")

    def told(**options: object) -> dict[str, str]:
        target = replace(artifact.target, options={**artifact.target.options, **options})
        serving = Serving(name="net", backend="openvino", instances=1, max_batch=8, delay_us=0)
        return _parameters(replace(artifact, target=target), serving)

    assert told(hint="throughput", streams=2) == {
        "INFERENCE_NUM_THREADS": "1",
        "NUM_STREAMS": "2",
        "PERFORMANCE_HINT": "THROUGHPUT",
    }
    with pytest.raises(TargetError, match="is not told to compute in bf16"):
        told(precision="bf16")


def test_a_repository_has_its_files_and_nothing_of_this_machine(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("onnxruntime")
    made = tersor.deploy(artifact, to="triton", out=tmp_path / "out")
    assert made.files == ("net/1/model.onnx", "net/config.pbtxt")
    copied = (tmp_path / "out" / "net" / "1" / "model.onnx").read_bytes()
    assert copied == artifact.model_files[0].read_bytes()
    texts = [
        (tmp_path / "out" / name).read_text() for name in ("net/config.pbtxt", "deployment.json")
    ]
    assert not any(str(tmp_path) in text or str(artifact.path) in text for text in texts)
    assert "dynamic_batching" in texts[0]


def test_without_a_batch_size_the_batch_is_a_dimension(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    tersor.deploy(
        artifact_of("onnxruntime"), to="triton", out=tmp_path / "out", options={"max_batch": 0}
    )
    text = (tmp_path / "out" / "net" / "config.pbtxt").read_text()
    assert "max_batch_size: 0\n" in text
    assert "dims: [ -1, 1, 8, 8 ]" in text
    assert "dims: [ -1, 10 ]" in text
    assert "dynamic_batching" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "a/b"}, "triton: name must be letters, digits, '.', '_' and '-', got 'a/b'"),
        ({"instances": 0}, "triton: instances must be at least 1, got 0"),
        ({"delay_us": -1}, "triton: delay_us must not be negative, got -1"),
        ({"max_bach": 1}, "triton: unknown field 'max_bach'. Did you mean 'max_batch'?"),
    ],
)
def test_settings_that_make_no_sense(
    options: dict[str, object], said: str, artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        tersor.deploy(
            artifact_of("onnxruntime"), to="triton", out=tmp_path / "out", options=options
        )
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_python_back_end_runs_onnx_files_only(
    artifact_of: Callable[[str], Artifact], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(
        TargetError, match="backend 'python' runs artifacts of onnxruntime, not of openvino"
    ):
        tersor.deploy(
            artifact_of("openvino"),
            to="triton",
            out=tmp_path / "out",
            options={"backend": "python"},
        )
    assert not (tmp_path / "out").exists()


def test_scripts_with_operators_of_others_are_refused(tmp_path: Path) -> None:
    for body, said in (
        ("torch.relu(x)", ""),
        ("ops.quantized_decomposed.q(x)", "quantized_decomposed.q"),
    ):
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as pack:
            pack.writestr("model/code/__torch__.py", f"def forward(self, x):\n  return {body}\n")
        if not said:
            _check_script(tmp_path / "model.pt")
            continue
        with pytest.raises(
            TargetError, match=f"triton's PyTorch back end has no operator '{said}'"
        ):
            _check_script(tmp_path / "model.pt")


def test_plain_pytorch_runs_a_script(
    artifact_of: Callable[[str], Artifact], x: np.ndarray, tmp_path: Path
) -> None:
    """The back end has only what PyTorch registers: so has a new interpreter without tersor."""
    artifact = artifact_of("torchscript")
    tersor.deploy(artifact, to="triton", out=tmp_path / "out")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np, torch; file, x, y = sys.argv[1:]; torch.set_num_threads(1)\n"
        "np.save(y, torch.jit.load(file)(x=torch.from_numpy(np.load(x))).detach().numpy())"
    )
    files = [str(tmp_path / "out/net/1/model.pt"), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run([sys.executable, "-W", "ignore", "-I", "-c", code, *files], check=True)
    _, wanted = expected(artifact, x)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, rtol=1e-5, atol=1e-6)
