"""ONNX's operators in TensorFlow, one function each, with ONNX's layout (N, C, H, W) kept.

A function is given a node's inputs (None where one is left out), its attributes, and returns one
tensor or several. Quantized values are real integers: QuantizeLinear rounds half to even and
saturates, DequantizeLinear multiplies, and what is between them computes in float, as ONNX defines.

Source: the operator specifications of ONNX, opset 13 to 21.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tensorflow as tf

from tersor.core.errors import TargetError
from tersor.deployments._tensorflow_recurrent import gru, lstm

Values = Sequence[Any]
Attributes = Mapping[str, Any]
Operator = Callable[[Values, Attributes], Any]


def constant(value: Any) -> np.ndarray | None:
    """Return a tensor's value where it is known while the graph is built."""
    if value is None or isinstance(value, np.ndarray):
        return value
    return tf.get_static_value(value)  # type: ignore[no-any-return]  # tensorflow is untyped


def known(values: Values, place: int, what: str) -> list[int]:
    """Return an input that must not depend on the data, as whole numbers."""
    found = constant(values[place])
    if found is None:
        raise TargetError(f"{what} that is computed from the data")
    return [int(x) for x in np.atleast_1d(found)]


def _each(function: Callable[..., Any]) -> Operator:
    return lambda values, attributes: function(*values)


def _axes(values: Values, attributes: Attributes) -> list[int] | None:
    """Read the axes, an input in newer opsets and an attribute in older ones."""
    if len(values) > 1 and values[1] is not None:
        return known(values, 1, "axes")
    return attributes.get("axes")


def _reduce(function: Callable[..., Any]) -> Operator:
    def reduce(values: Values, attributes: Attributes) -> Any:
        axes = _axes(values, attributes)
        if not axes and attributes.get("noop_with_empty_axes"):
            return tf.identity(values[0])
        return function(values[0], axis=axes, keepdims=bool(attributes.get("keepdims", 1)))

    return reduce


def _fold(function: Callable[..., Any]) -> Operator:
    def fold(values: Values, attributes: Attributes) -> Any:
        made = values[0]
        for value in values[1:]:
            made = function(made, value)
        return made

    return fold


def _divide(values: Values, attributes: Attributes) -> Any:
    a, b = (tf.convert_to_tensor(v) for v in values)
    if a.dtype.is_integer:  # ONNX rounds towards zero
        return tf.truncatediv(a, b)
    return a / b


def _clip(values: Values, attributes: Attributes) -> Any:
    low = values[1] if len(values) > 1 else attributes.get("min")
    high = values[2] if len(values) > 2 else attributes.get("max")
    made = values[0]
    if low is not None:
        made = tf.maximum(made, low)
    return made if high is None else tf.minimum(made, high)


def _gelu(values: Values, attributes: Attributes) -> Any:
    return tf.nn.gelu(values[0], approximate=attributes.get("approximate") == "tanh")


def _cast(values: Values, attributes: Attributes) -> Any:
    kind = onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])
    return tf.cast(values[0], tf.as_dtype(kind))


def _softmax(values: Values, attributes: Attributes) -> Any:
    return tf.nn.softmax(values[0], axis=attributes.get("axis", -1))


def _log_softmax(values: Values, attributes: Attributes) -> Any:
    return tf.nn.log_softmax(values[0], axis=attributes.get("axis", -1))


def _gemm(values: Values, attributes: Attributes) -> Any:
    made = tf.matmul(
        values[0],
        values[1],
        transpose_a=bool(attributes.get("transA", 0)),
        transpose_b=bool(attributes.get("transB", 0)),
    )
    made = made * attributes.get("alpha", 1.0)
    if len(values) > 2 and values[2] is not None:
        made = made + attributes.get("beta", 1.0) * values[2]
    return made


def _matmul(values: Values, attributes: Attributes) -> Any:
    a, b = (tf.convert_to_tensor(v) for v in values)
    vector_a, vector_b = a.shape.rank == 1, b.shape.rank == 1
    made = tf.matmul(a[None, :] if vector_a else a, b[:, None] if vector_b else b)
    if vector_a:
        made = tf.squeeze(made, -2)
    return tf.squeeze(made, -1) if vector_b else made


def _padding(attributes: Attributes, rank: int) -> list[list[int]]:
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise TargetError(f"auto_pad {attributes['auto_pad']!r}")
    pads = attributes.get("pads", [0] * 2 * rank)
    return [[0, 0], *([pads[i], pads[i + rank]] for i in range(rank)), [0, 0]]


def _last(x: Any) -> Any:
    """(N, C, spatial ...) to (N, spatial ..., C), which TensorFlow computes on processors."""
    rank = x.shape.rank
    return tf.transpose(x, [0, *range(2, rank), 1])


def _first(x: Any) -> Any:
    rank = x.shape.rank
    return tf.transpose(x, [0, rank - 1, *range(1, rank - 1)])


def _convolution(values: Values, attributes: Attributes) -> Any:
    x, weight = tf.convert_to_tensor(values[0]), tf.convert_to_tensor(values[1])
    rank = x.shape.rank - 2
    groups = attributes.get("group", 1)
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    x = tf.pad(_last(x), _padding(attributes, rank))
    kernel = tf.transpose(weight, [*range(2, rank + 2), 1, 0])
    depthwise = rank == 2 and weight.shape[1] == 1 and weight.shape[0] == groups > 1
    if depthwise and strides[0] == strides[1]:
        kernel = tf.transpose(kernel, [0, 1, 3, 2])
        made = tf.nn.depthwise_conv2d(x, kernel, [1, *strides, 1], "VALID", dilations=dilations)
    else:
        parts = zip(tf.split(x, groups, -1), tf.split(kernel, groups, -1), strict=True)
        made = tf.concat(
            [tf.nn.convolution(a, b, strides, "VALID", dilations=dilations) for a, b in parts], -1
        )
    if len(values) > 2 and values[2] is not None:
        made = made + values[2]
    return _first(made)


def _pool(kind: str) -> Operator:
    def pool(values: Values, attributes: Attributes) -> Any:
        x = _last(tf.convert_to_tensor(values[0]))
        rank = x.shape.rank - 2
        if attributes.get("ceil_mode"):
            raise TargetError("ceil_mode")
        how = {
            "strides": attributes.get("strides", [1] * rank),
            "dilations": attributes.get("dilations", [1] * rank),
            "padding": "VALID",
        }
        window, pads = attributes["kernel_shape"], _padding(attributes, rank)
        lowest = x.dtype.min if kind == "MAX" else 0
        made = tf.nn.pool(tf.pad(x, pads, constant_values=lowest), window, kind, **how)
        if kind == "AVG" and not attributes.get("count_include_pad"):
            ones = tf.pad(tf.ones_like(x), pads)
            made = made / tf.nn.pool(ones, window, kind, **how)
        return _first(made)

    return pool


def _global_mean(values: Values, attributes: Attributes) -> Any:
    x = tf.convert_to_tensor(values[0])
    return tf.reduce_mean(x, axis=list(range(2, x.shape.rank)), keepdims=True)


def _layer_norm(values: Values, attributes: Attributes) -> Any:
    x = tf.convert_to_tensor(values[0])
    axis = attributes.get("axis", -1) % x.shape.rank
    axes = list(range(axis, x.shape.rank))
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=True)
    made = (x - mean) / tf.sqrt(variance + attributes.get("epsilon", 1e-5)) * values[1]
    return made if len(values) < 3 or values[2] is None else made + values[2]


def _batch_norm(values: Values, attributes: Attributes) -> Any:
    x = tf.convert_to_tensor(values[0])
    shape = [1, -1, *[1] * (x.shape.rank - 2)]
    scale, bias, mean, variance = (tf.reshape(v, shape) for v in values[1:5])
    return (x - mean) / tf.sqrt(variance + attributes.get("epsilon", 1e-5)) * scale + bias


def _pad(values: Values, attributes: Attributes) -> Any:
    x = tf.convert_to_tensor(values[0])
    pads, rank = known(values, 1, "padding"), x.shape.rank
    axes = known(values, 3, "axes") if len(values) > 3 and values[3] is not None else range(rank)
    places = list(axes)
    ends = [[0, 0] for _ in range(rank)]
    for i, axis in enumerate(places):
        ends[axis % rank] = [pads[i], pads[i + len(places)]]
    mode = attributes.get("mode", "constant")
    if mode == "constant":
        filled = values[2] if len(values) > 2 and values[2] is not None else 0
        value = tf.reshape(tf.cast(filled, x.dtype), [])
        cut = [slice(max(0, -a), None if b >= 0 else b) for a, b in ends]
        return tf.pad(x[tuple(cut)], np.maximum(ends, 0), constant_values=value)
    if mode != "reflect":
        raise TargetError(f"mode {mode!r}")
    return tf.pad(x, ends, "REFLECT")


def _reshape(values: Values, attributes: Attributes) -> Any:
    x, wanted = values[0], constant(values[1])
    if wanted is not None and not attributes.get("allowzero") and 0 in wanted:
        sizes = tf.shape(x, tf.int64)
        return tf.reshape(x, [sizes[i] if s == 0 else s for i, s in enumerate(wanted)])
    return tf.reshape(x, values[1])


def _flatten(values: Values, attributes: Attributes) -> Any:
    x = tf.convert_to_tensor(values[0])
    axis = attributes.get("axis", 1)
    sizes = tf.shape(x)
    return tf.reshape(x, [tf.reduce_prod(sizes[:axis]), tf.reduce_prod(sizes[axis:])])


def _transpose(values: Values, attributes: Attributes) -> Any:
    return tf.transpose(values[0], attributes.get("perm"))


def _concatenate(values: Values, attributes: Attributes) -> Any:
    return tf.concat(list(values), attributes["axis"])


def _slice(values: Values, attributes: Attributes) -> Any:
    x = tf.convert_to_tensor(values[0])
    starts, ends = tf.unstack(values[1]), tf.unstack(values[2])
    given = len(values) > 3 and values[3] is not None
    axes = known(values, 3, "axes") if given else list(range(len(starts)))
    steps = known(values, 4, "steps") if len(values) > 4 else [1] * len(axes)
    cut = [slice(None)] * x.shape.rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis % x.shape.rank] = slice(_end(start), _end(end), step)
    return x[tuple(cut)]


def _end(value: Any) -> Any:
    """Ends far outside mean the whole axis; TensorFlow's indices have 32 bits."""
    found = constant(value)
    if found is None:
        return tf.cast(value, tf.int32)
    return None if abs(int(found)) >= 2**31 - 1 else int(found)


def _split(values: Values, attributes: Attributes) -> Any:
    axis = attributes.get("axis", 0)
    if len(values) > 1 and values[1] is not None:
        return tf.split(values[0], known(values, 1, "sizes"), axis)
    count = attributes["num_outputs"]
    size = values[0].shape[axis]
    part = -(-size // count)
    return tf.split(values[0], [part] * (count - 1) + [size - part * (count - 1)], axis)


def _squeeze(values: Values, attributes: Attributes) -> Any:
    return tf.squeeze(values[0], _axes(values, attributes))


def _unsqueeze(values: Values, attributes: Attributes) -> Any:
    made = tf.convert_to_tensor(values[0])
    axes = _axes(values, attributes) or []
    for axis in sorted(a % (made.shape.rank + len(axes)) for a in axes):
        made = tf.expand_dims(made, axis)
    return made


def _expand(values: Values, attributes: Attributes) -> Any:
    shape = tf.cast(values[1], tf.int32)
    return tf.broadcast_to(values[0], tf.broadcast_dynamic_shape(tf.shape(values[0]), shape))


def _gather(values: Values, attributes: Attributes) -> Any:
    x, axis = tf.convert_to_tensor(values[0]), attributes.get("axis", 0)
    places = tf.cast(values[1], tf.int64)
    size = tf.cast(tf.shape(x)[axis], tf.int64)
    return tf.gather(x, tf.where(places < 0, places + size, places), axis=axis)


def _shape(values: Values, attributes: Attributes) -> Any:
    found = tf.convert_to_tensor(values[0]).shape
    cut = slice(attributes.get("start", 0), attributes.get("end"))
    if found.is_fully_defined():
        return np.array(found.as_list()[cut], np.int64)
    return tf.shape(values[0], tf.int64)[cut]


def _trilu(values: Values, attributes: Attributes) -> Any:
    if len(values) > 1 and known(values, 1, "diagonal") != [0]:
        raise TargetError("a diagonal other than the main one")
    x = tf.convert_to_tensor(values[0])
    keep = (0, -1) if attributes.get("upper", 1) else (-1, 0)
    if x.dtype == tf.bool:
        return tf.cast(tf.linalg.band_part(tf.cast(x, tf.int32), *keep), tf.bool)
    return tf.linalg.band_part(x, *keep)


def _resize(values: Values, attributes: Attributes) -> Any:
    x = tf.convert_to_tensor(values[0])
    mode, place = (
        attributes.get("mode", "nearest"),
        attributes.get("coordinate_transformation_mode", "half_pixel"),
    )
    if x.shape.rank != 4 or None in x.shape[2:].as_list():
        raise TargetError("resizing other than of images of a fixed size")
    sizes = len(values) > 3 and values[3] is not None
    scales = None if sizes else constant(values[2])
    old = x.shape[2:].as_list()
    new = (
        known(values, 3, "sizes")[2:]
        if scales is None
        else [int(np.floor(size * scale)) for size, scale in zip(old, scales[2:], strict=True)]
    )
    whole = all(b % a == 0 for a, b in zip(old, new, strict=True))
    if mode == "nearest" and whole and place in ("half_pixel", "asymmetric"):
        for axis in (0, 1):
            x = tf.repeat(x, new[axis] // old[axis], axis=axis + 2)
        return x
    if mode == "linear" and place in ("half_pixel", "pytorch_half_pixel") and min(new) > 1:
        return _first(tf.image.resize(_last(x), new, "bilinear"))
    raise TargetError(f"mode {mode!r} with {place!r} from {old} to {new}")


def _placed(scale: Any, x: Any, attributes: Attributes) -> Any:
    """Shape a scale or zero point so that it meets the axis, or the blocks, that it is of."""
    scale, rank = tf.convert_to_tensor(scale), len(x.shape)
    axis = attributes.get("axis", 1)
    if attributes.get("block_size"):
        repeated = tf.repeat(scale, attributes["block_size"], axis=axis)
        return repeated[tuple(slice(0, size) for size in x.shape)]
    if scale.shape.num_elements() == 1:
        return tf.reshape(scale, [])
    return tf.reshape(scale, [-1 if i == axis % rank else 1 for i in range(rank)])


def _quantize(values: Values, attributes: Attributes) -> Any:
    x, scale = values[0], _placed(values[1], values[0], attributes)
    given = len(values) > 2 and values[2] is not None
    kind = tf.convert_to_tensor(values[2]).dtype if given else tf.uint8
    zero = tf.cast(_placed(values[2], x, attributes), x.dtype) if given else 0.0
    made = tf.round(x / scale) + zero
    return tf.cast(tf.clip_by_value(made, kind.min, kind.max), kind)


def _dequantize(values: Values, attributes: Attributes) -> Any:
    x, scale = values[0], _placed(values[1], values[0], attributes)
    made = tf.cast(x, scale.dtype)
    if len(values) > 2 and values[2] is not None:
        made = made - tf.cast(_placed(values[2], x, attributes), scale.dtype)
    return made * scale


OPERATORS: Mapping[str, Operator] = {
    "Abs": _each(tf.abs),
    "Add": _each(tf.add),
    "And": _each(tf.logical_and),
    "AveragePool": _pool("AVG"),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concatenate,
    "Conv": _convolution,
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Equal": _each(tf.equal),
    "Erf": _each(tf.math.erf),
    "Exp": _each(tf.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_mean,
    "GRU": gru,
    "Greater": _each(tf.greater),
    "HardSigmoid": lambda v, a: tf.clip_by_value(
        v[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0.0, 1.0
    ),
    "HardSwish": lambda v, a: v[0] * tf.clip_by_value(v[0] / 6.0 + 0.5, 0.0, 1.0),
    "Identity": _each(tf.identity),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda v, a: tf.nn.leaky_relu(v[0], a.get("alpha", 0.01)),
    "LSTM": lstm,
    "Less": _each(tf.less),
    "Log": _each(tf.math.log),
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "Max": _fold(tf.maximum),
    "MaxPool": _pool("MAX"),
    "Min": _fold(tf.minimum),
    "Mul": _each(tf.multiply),
    "Neg": _each(tf.negative),
    "Not": _each(tf.logical_not),
    "Or": _each(tf.logical_or),
    "Pad": _pad,
    "Pow": lambda v, a: tf.pow(v[0], tf.cast(v[1], v[0].dtype)),
    "QuantizeLinear": _quantize,
    "Reciprocal": _each(tf.math.reciprocal),
    "ReduceMax": _reduce(tf.reduce_max),
    "ReduceMean": _reduce(tf.reduce_mean),
    "ReduceSum": _reduce(tf.reduce_sum),
    "Relu": _each(tf.nn.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _each(tf.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _each(tf.sqrt),
    "Squeeze": _squeeze,
    "Sub": _each(tf.subtract),
    "Tanh": _each(tf.tanh),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _each(tf.where),
}
