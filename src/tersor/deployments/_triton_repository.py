"""A model repository of the Triton Inference Server: NAME/config.pbtxt and NAME/1/.

Source: the message ModelConfig of Triton's model_config.proto, in protobuf's text format.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tersor.core.artifact import Artifact
from tersor.core.errors import TargetError
from tersor.deployments._interface import Interface, Port, interface
from tersor.deployments._model_files import copy_model

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a model may be called: it is a folder, and a part of addresses."""
_PROGRAM = Path(__file__).with_name("_triton_model.py")
_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a model is served."""

    name: str
    backend: str
    """The runtime's own, or python."""
    max_batch: int
    instances: int
    delay_us: int
    """How long a request may wait for others; 0: requests are not put together."""


def write_repository(artifact: Artifact, folder: Path, serving: Serving) -> Interface:
    """Write the repository of one model into `folder`; return what the model takes and gives."""
    found = interface(artifact)
    version = folder / serving.name / "1"
    version.mkdir(parents=True)
    copy_model(artifact, version)
    if serving.backend == "pytorch":
        found = _as_pytorch_names(found)
        _check_script(version / "model.pt")
    if serving.backend == "python":
        shutil.copyfile(_PROGRAM, version / "model.py")
    text = config(found, serving, _parameters(artifact, serving))
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    return found


def _parameters(artifact: Artifact, serving: Serving) -> dict[str, str]:
    """Name the threads of one inference as the back end does."""
    threads = str(artifact.target.threads)
    if serving.backend == "openvino":
        options = artifact.target.options
        precision = options.get("precision", "fp32")
        if precision != "fp32":
            raise TargetError(
                f"triton's OpenVINO back end is not told to compute in {precision}, as the "
                "artifact was measured; deploy one in fp32 or int8"
            )
        chosen = {"INFERENCE_NUM_THREADS": threads} if artifact.target.threads else {}
        hint = str(options.get("hint", "latency")).upper()
        return {**chosen, "NUM_STREAMS": str(options.get("streams", 1)), "PERFORMANCE_HINT": hint}
    if serving.backend == "pytorch":
        chosen = {"INTRA_OP_THREAD_COUNT": threads} if artifact.target.threads else {}
        return {**chosen, "INTER_OP_THREAD_COUNT": "1"}
    return {"intra_op_thread_count": threads, "inter_op_thread_count": "1"}


def _as_pytorch_names(found: Interface) -> Interface:
    """Call outputs NAME__0, NAME__1 ..., by which the back end of PyTorch tells their places."""
    outputs = (replace(p, name=f"{p.name}__{i}") for i, p in enumerate(found.outputs))
    return replace(found, outputs=tuple(outputs))


def _check_script(file: Path) -> None:
    """Refuse TorchScript that calls operators which a server has not registered."""
    with zipfile.ZipFile(file) as pack:
        names = [name for name in pack.namelist() if "/code/" in name and name.endswith(".py")]
        text = "\n".join(pack.read(name).decode("utf-8") for name in names)
    foreign = re.search(r"\bops\.(?!prim\b|aten\b)\w+\.\w+", text)
    if foreign:
        raise TargetError(
            f"triton's PyTorch back end has no operator {foreign[0].removeprefix('ops.')!r}; "
            "compress with --target onnxruntime"
        )


def config(found: Interface, serving: Serving, parameters: Mapping[str, str]) -> str:
    """Write a model's config.pbtxt."""
    batched = found.batched and serving.max_batch > 0
    lines = [
        f"name: {json.dumps(serving.name)}",
        f"backend: {json.dumps(serving.backend)}",
        f"max_batch_size: {serving.max_batch if batched else 0}",
        *_ports("input", found.inputs, batched),
        *_ports("output", found.outputs, batched),
        f"instance_group [ {{ count: {serving.instances} kind: KIND_CPU }} ]",
    ]
    if batched and serving.delay_us:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {serving.delay_us} }}")
    for key, value in parameters.items():
        text = f"key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }}"
        lines.append(f"parameters {{ {text} }}")
    return "\n".join(lines) + "\n"


def _ports(word: str, ports: Sequence[Port], batched: bool) -> list[str]:
    return [
        f"{word} [ {{ name: {json.dumps(port.name)} data_type: {_type(port)} "
        f"dims: [ {', '.join(_dims(port, batched))} ] }} ]"
        for port in ports
    ]


def _dims(port: Port, batched: bool) -> list[str]:
    sizes = port.shape[1:] if batched else port.shape
    return ["-1" if isinstance(size, str) else str(size) for size in sizes]


def _type(port: Port) -> str:
    if port.dtype not in _TYPES:
        raise TargetError(f"triton has no type for {port.dtype}, that of {port.name!r}")
    return _TYPES[port.dtype]
