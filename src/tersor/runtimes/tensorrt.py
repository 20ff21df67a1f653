"""TensorRT on NVIDIA GPUs: engines in fp32, fp16, bf16 or int8, with 2:4 sparsity.

What is exported is `model.onnx`; the engine is built when it is loaded, on the GPU that runs it,
and never stored: a plan is native code, and fits one kind of GPU. What was timed for it is kept in
the user's cache folder, where that can be written, so that the next load is quick.

Types are as the network has them (strongly typed, the only way since TensorRT 11): `half` with fp16
or bf16 turns all of them; integers come from `static: {symmetric: true}`, whose Q/DQ TensorRT
fuses. TF32 is off. Batches may have any size within `batches`, other free axes up to twice the size
at export.

Options: `precision` (fp32, fp16, bf16), `sparse: true` (use the 2:4 zeros of `semi_structured`),
`batches` ([smallest, usual, largest], [1, 8, 64]), `optimization` (0 to 5, how long to search, 3),
`threads` (of the builder).

Not verified on hardware.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core import files
from tersor.core.errors import TargetError, suggest
from tersor.core.model import Inputs
from tersor.core.runtime import Arrays, Runner, Runtime, Target

_PRECISIONS = ("fp32", "fp16", "bf16")
_SIZES = "tersor.sizes"
"""Property of the ONNX file: the sizes of its inputs at export."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the options of a target say."""

    precision: str = "fp32"
    sparse: bool = False
    batches: tuple[int, int, int] = (1, 8, 64)
    optimization: int = 3


def settings(options: Mapping[str, Any]) -> Settings:
    """Read and check options.

    Raises:
        TargetError: a value that cannot be.
    """
    precision = options.get("precision", "fp32")
    if precision not in _PRECISIONS:
        raise TargetError(
            f"precision must be one of {', '.join(_PRECISIONS)}; got {precision!r}."
            f"{suggest(str(precision), _PRECISIONS)}"
        )
    sparse = options.get("sparse", False)
    if not isinstance(sparse, bool):
        raise TargetError(f"sparse must be true or false; got {sparse!r}")
    batches = options.get("batches", (1, 8, 64))
    if (
        not isinstance(batches, (list, tuple))
        or [type(n) for n in batches] != [int] * 3
        or not 1 <= batches[0] <= batches[1] <= batches[2]
    ):
        raise TargetError(
            f"batches must be [SMALLEST, USUAL, LARGEST], rising from 1; got {batches!r}"
        )
    level = options.get("optimization", 3)
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= 5:
        raise TargetError(f"optimization must be 0 to 5; got {level!r}")
    return Settings(
        precision=precision,
        sparse=sparse,
        batches=(batches[0], batches[1], batches[2]),
        optimization=level,
    )


def export(net: Any, folder: Path, inputs: Inputs) -> Sequence[Path]:
    """Write `model.onnx` as TensorRT's parser takes it."""
    from onnx import helper

    made = fitting(net)
    sizes = {name: list(tensor.shape) for name, tensor in inputs.example.items()}
    helper.set_model_props(made, {_SIZES: json.dumps(sizes)})
    file = folder / "model.onnx"
    file.write_bytes(made.SerializeToString(deterministic=True))
    return [file]


def fitting(net: Any) -> Any:
    """Return a copy with biases in float, which TensorRT reads no integers for.

    Raises:
        TargetError: tensors are rounded with a zero, which TensorRT does not have.
    """
    import onnx
    from onnx import numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(net)
    constants = {i.name: i for i in made.graph.initializer}
    for node in made.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        codes = None if zero is None else numpy_helper.to_array(zero)
        if codes is None or codes.dtype == np.uint8 or np.any(codes):
            raise TargetError(
                f"{node.input[0]!r} is rounded to uint8 or with a zero point; TensorRT has int8 "
                "around 0 only. Quantize with `static: {symmetric: true}`"
            )
    left = []
    for node in made.graph.node:
        codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != onnx.TensorProto.INT32:
            left.append(node)
            continue
        scale = numpy_helper.to_array(constants[node.input[1]])
        values = (numpy_helper.to_array(codes) * scale.astype(np.float64)).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
    del made.graph.node[:]
    made.graph.node.extend(left)
    return made


def profile_shapes(net: Any, batches: tuple[int, int, int]) -> dict[str, list[tuple[int, ...]]]:
    """Return the smallest, usual and largest shape of each input that has a free size.

    Args:
        net: onnx.ModelProto that `export` wrote.
        batches: Sizes of the first axis.
    """
    props = {p.key: p.value for p in net.metadata_props}
    usual = json.loads(props.get(_SIZES, "{}"))
    made = {}
    for value in net.graph.input:
        dims = value.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            continue
        seen = usual.get(value.name, [1] * len(dims))
        ranges = [
            (d.dim_value,) * 3
            if d.HasField("dim_value")
            else batches
            if axis == 0
            else (1, int(seen[axis]), 2 * int(seen[axis]))
            for axis, d in enumerate(dims)
        ]
        made[value.name] = [tuple(r[i] for r in ranges) for i in range(3)]
    return made


def sparse_layers(net: Any) -> list[str]:
    """Name the layers whose weights have two zeros in every four along their inputs."""
    from onnx import numpy_helper

    constants = {i.name: i for i in net.graph.initializer}
    reads = {n.output[0]: n.input[0] for n in net.graph.node if n.op_type == "DequantizeLinear"}
    found = []
    for node in net.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        tensor = constants.get(reads.get(node.input[1], node.input[1]))
        if tensor is None:
            continue
        weight = numpy_helper.to_array(tensor)
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 1 if node.op_type == "Conv" or transposed else weight.ndim - 2
        last = np.moveaxis(weight, axis, -1)
        if last.shape[-1] % 4 == 0 and (
            np.count_nonzero(last.reshape(-1, 4), axis=1) <= 2
        ).all():  # fmt: skip
            found.append(str(node.name or node.output[0]))
    return found


def load(path: Path, target: Target) -> Runner:
    """Build an engine for this GPU."""
    import onnx

    from tersor.ops import cuda_memory
    from tersor.ops.onnx_half import to_half

    wanted = settings(target.options)
    try:
        net = onnx.load(path)
    except Exception as error:
        raise TargetError(f"{path.name} is no ONNX file: {error}") from error
    if wanted.sparse and not sparse_layers(net):
        raise TargetError(
            "sparse: no layer has two zeros in every four weights; prune with "
            "`semi_structured` first, or leave the option out"
        )
    cuda_memory.check_gpu()
    shapes = profile_shapes(net, wanted.batches)
    if wanted.precision != "fp32":
        net = to_half(net, wanted.precision)
    return _Runner(_build(net.SerializeToString(), path, wanted, shapes, target.threads), shapes)


def _build(
    content: bytes,
    path: Path,
    wanted: Settings,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    threads: int,
) -> Any:
    import tensorrt

    from tersor.ops import native

    logger = _logger()
    builder = tensorrt.Builder(logger)
    typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(content):
        said = [parser.get_error(i) for i in range(parser.num_errors)]
        about = "; ".join(f"{e.node_operator()} ({e.node_name()!r}): {e.desc()}" for e in said[:3])
        raise TargetError(f"TensorRT cannot read {path.name}: {about[:600] or logger.last}")
    if threads:
        builder.max_threads = threads
    config = builder.create_builder_config()
    config.builder_optimization_level = wanted.optimization
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    if wanted.sparse:
        config.set_flag(tensorrt.BuilderFlag.SPARSE_WEIGHTS)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    timing = _timing_file(content)
    known = b""
    with contextlib.suppress(OSError):
        known = timing.read_bytes()
    # one that another version wrote is refused and begun anew
    cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TargetError(f"TensorRT cannot build an engine for {path.name}: {logger.last}")
    with contextlib.suppress(OSError):
        timing.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(timing, bytes(memoryview(config.get_timing_cache().serialize())))
        native.trim(timing.parent, "tensorrt-*.timing")
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise TargetError(f"TensorRT cannot load its engine for {path.name}: {logger.last}")
    return engine


def _timing_file(content: bytes) -> Path:
    """Return where timings for a network are kept; never beside it: an artifact stays as it is."""
    from tersor.ops import native

    return native.cache_folder() / f"tensorrt-{hashlib.sha256(content).hexdigest()[:32]}.timing"


def _logger() -> Any:
    """Make a logger that keeps the last error, which TensorRT tells in no other way."""
    import tensorrt

    class Logger(tensorrt.ILogger):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.last = message[:300]

    return Logger()


class _Runner:
    """An engine; bindings have memory of their own and share one context."""

    def __init__(self, engine: Any, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
        import tensorrt

        from tersor.ops.cuda_memory import Stream

        self.engine, self.shapes, self.stream = engine, shapes, Stream()
        self.context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        ins = tensorrt.TensorIOMode.INPUT
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == ins]
        self.outputs = [n for n in names if engine.get_tensor_mode(n) != ins]
        self.dtypes = {n: np.dtype(tensorrt.nptype(engine.get_tensor_dtype(n))) for n in names}
        self.set_for: object = None

    def bind(self, inputs: Arrays) -> Callable[[], Arrays]:
        from tersor.ops.cuda_memory import Buffer

        given = {n: np.asarray(inputs[n], self.dtypes[n]) for n in self.inputs}
        for name, array in given.items():
            if not self.context.set_input_shape(name, array.shape):
                raise TargetError(self._misfit(name, array.shape))
        buffers = {n: Buffer(array.shape, array.dtype) for n, array in given.items()}
        for name, array in given.items():
            buffers[name].write(array, self.stream)
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise TargetError(f"the size of output {name!r} depends on values; not supported")
            buffers[name] = Buffer(shape, self.dtypes[name])
        self.stream.wait()
        self.set_for = None

        def call() -> Arrays:
            if self.set_for is not buffers:
                for name, array in given.items():
                    self.context.set_input_shape(name, array.shape)
                for name, buffer in buffers.items():
                    self.context.set_tensor_address(name, buffer.address)
                self.set_for = buffers
            if not self.context.execute_async_v3(self.stream.handle):
                raise TargetError("TensorRT failed while running")
            made = {name: buffers[name].read(self.stream) for name in self.outputs}
            self.stream.wait()
            return made

        return call

    def _misfit(self, name: str, shape: tuple[int, ...]) -> str:
        if name not in self.shapes:
            return f"input {name!r} has the shape {shape}, which the engine was not built for"
        least, _, most = self.shapes[name]
        return (
            f"input {name!r} has the shape {shape}; the engine was built for {least} to {most}. "
            "Change the option batches, or export with larger inputs"
        )

    def close(self) -> None:
        """Free the engine; memory of bindings goes with them."""
        del self.context, self.engine
        self.stream.close()


RUNTIME = Runtime(
    takes="onnx",
    devices=("cuda",),
    export=export,
    load=load,
    options=("threads", "precision", "sparse", "batches", "optimization"),
    check=lambda target: settings(target.options),
    to_export=("onnx", "onnxscript"),
    to_run=("tensorrt", "cuda", "onnx"),
)
