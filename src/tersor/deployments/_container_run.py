"""Runs the network on arrays: the program of the image. Needs numpy and the runtime, nothing else.

python run.py --input x.npz --output y.npz
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def main() -> int:
    """Read a .npz file with one array for each input, run, and write one with the outputs."""
    parser = argparse.ArgumentParser(description="Run the network on arrays.")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the network")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: all cores")
    parser.add_argument("--input", type=Path, metavar="X.npz", help="an array for each input")
    parser.add_argument("--output", type=Path, metavar="Y.npz", help="where the outputs go")
    words = parser.parse_args()
    try:
        run(words)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class RefusedError(Exception):
    """What was asked cannot be done; says why."""


def run(words: argparse.Namespace) -> None:
    """Do what the words say.

    Raises:
        RefusedError: a file is missing or does not fit.
    """
    given = {} if words.input is None else read(words.input)
    if words.output is not None and not words.output.absolute().parent.is_dir():
        raise RefusedError(f"--output {words.output}: the folder does not exist")
    load = openvino if words.model.suffix == ".xml" else onnxruntime
    if not words.model.is_file():
        raise RefusedError(f"--model {words.model} does not exist")
    wanted, compute = load(words.model, words.threads)
    if words.input is None:
        print("the network takes:", *wanted)
        return
    if set(given) != set(wanted):
        raise RefusedError(
            f"the network takes {', '.join(wanted)}; the file holds {', '.join(given)}"
        )
    try:
        made = compute(given)
    except Exception as error:  # each runtime has its own
        shapes = ", ".join(f"{name} {a.shape} {a.dtype}" for name, a in given.items())
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise RefusedError(f"the network cannot be run on {shapes}: {reason}") from error
    for name, array in made.items():
        print(name, "x".join(map(str, array.shape)), array.dtype)
    if words.output is not None:
        try:
            np.savez(words.output, **made)
        except OSError as error:
            raise RefusedError(f"--output {words.output}: {error.strerror or error}") from error


def read(file: Path) -> dict[str, Any]:
    """Read the arrays of a .npz file.

    Raises:
        RefusedError: it is missing, or is no such file.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise RefusedError(f"--input {file}: {error.strerror or error}") from error
    except Exception as error:  # numpy and zipfile have many
        raise RefusedError(f"--input {file} is not a .npz file of plain arrays") from error


def onnxruntime(file: Path, threads: int) -> tuple[list[str], Any]:
    """Load an ONNX file; return the names of its inputs, and what computes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # 4-bit weights: compute in fp32, not in int8 with activations quantized on the fly
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    outputs = [port.name for port in session.get_outputs()]

    def compute(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(outputs, session.run(outputs, dict(arrays)), strict=True))

    return [port.name for port in session.get_inputs()], compute


def openvino(file: Path, threads: int) -> tuple[list[str], Any]:
    """Load OpenVINO's .xml and .bin; return the names of the inputs, and what computes."""
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    # compressed weights: no quantization of activations on the fly
    settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    outputs = [name_of(port) for port in compiled.outputs]

    def compute(arrays: Mapping[str, Any]) -> dict[str, Any]:
        made = compiled.create_infer_request().infer(dict(arrays))
        return {name: np.array(made[i]) for i, name in enumerate(outputs)}

    return [name_of(port) for port in compiled.inputs], compute


def name_of(port: Any) -> str:
    """Return the name that an OpenVINO port was exported with, of all that merged into it."""
    names = port.get_names()
    own: str = port.get_node().get_friendly_name().partition("/sink_port_")[0]
    return own if own in names or not names else min(names)


if __name__ == "__main__":
    sys.exit(main())
