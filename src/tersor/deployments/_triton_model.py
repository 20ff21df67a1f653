"""Runs model.onnx in Triton's Python back end, by ONNX Runtime. Copied into repositories as it is.

Requests that Triton puts together are computed in one call, and their outputs taken apart again.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# some builds of the back end start Python without it
sys.path += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in sys.path]

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """What Triton's Python back end looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model that lies beside this file."""
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
        options.inter_op_num_threads = int(parameters["inter_op_thread_count"])
        # 4-bit weights: compute in fp32, not in int8 with activations quantized on the fly
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        file = Path(__file__).with_name("model.onnx")
        self.session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [port["name"] for port in config["input"]]
        self.outputs = [port["name"] for port in config["output"]]
        self.batched = config["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests; those of equal shapes are computed together."""
        answers: list[Any] = [None] * len(requests)
        groups: dict[Any, list[int]] = {}
        arrays = [
            {name: triton.get_input_tensor_by_name(r, name).as_numpy() for name in self.inputs}
            for r in requests
        ]
        for number, each in enumerate(arrays):
            alike = tuple(a.shape[1:] for a in each.values()) if self.batched else number
            groups.setdefault(alike, []).append(number)
        for numbers in groups.values():
            try:
                answered = self._compute([arrays[number] for number in numbers])
            except Exception as error:
                failed = triton.InferenceResponse(error=triton.TritonError(str(error)))
                answered = [failed] * len(numbers)
            for number, answer in zip(numbers, answered, strict=True):
                answers[number] = answer
        return answers

    def _compute(self, group: list[dict[str, Any]]) -> list[Any]:
        joined = {
            name: np.concatenate([arrays[name] for arrays in group])
            if len(group) > 1
            else group[0][name]
            for name in self.inputs
        }
        made = self.session.run(self.outputs, joined)
        if len(group) == 1:
            return [self._answer(made)]
        ends = np.cumsum([len(arrays[self.inputs[0]]) for arrays in group])[:-1]
        parts = [np.split(array, ends) for array in made]
        return [self._answer([part[i] for part in parts]) for i in range(len(group))]

    def _answer(self, arrays: list[Any]) -> Any:
        tensors = [
            triton.Tensor(name, np.ascontiguousarray(array))
            for name, array in zip(self.outputs, arrays, strict=True)
        ]
        return triton.InferenceResponse(output_tensors=tensors)
