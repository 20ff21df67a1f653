"""Read an ONNX network as layers on fixed-point numbers, as hls4ml describes them.

Codes whose scale is a power of two and whose zero is 0 are fixed-point numbers: 8 bits, the point
somewhere among them. Roundings become types of the tensors before them (round half to even,
saturate: what QuantizeLinear does), products and sums get types that hold every result. A network
whose roundings are all such is then computed without any error of its own. What is not rounded gets
the type that is given.

Images are described with their channels last, as hls4ml computes: weights are laid out for it here.
hls4ml's own conversion is left alone, since it was seen to change results (1.3.0, an input that is
flattened before a Dense).

numpy and onnx only: runs where hls4ml does.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from tersor.core.errors import TargetError

_CURE = (
    "quantize with `static: {symmetric: true, power_of_two: true}`, whose codes are fixed-point "
    "numbers"
)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Numbers of `bits` bits, `fraction` of them behind the point."""

    bits: int
    fraction: int
    signed: bool = True
    rounds: bool = False
    """Round half to even and saturate; else a number that does not fit is cut."""

    def __str__(self) -> str:
        mode = ",RND_CONV,SAT" if self.rounds else ""
        return f"{'' if self.signed else 'u'}fixed<{self.bits},{self.bits - self.fraction}{mode}>"

    @property
    def most(self) -> float:
        """Largest magnitude."""
        return float(math.ldexp(2 ** (self.bits - self.signed), -self.fraction))

    @classmethod
    def holding(cls, bound: float, fraction: int) -> Self:
        """Return the type of numbers of a magnitude up to `bound` in steps of 2**-fraction."""
        codes = math.ceil(math.ldexp(bound, fraction))
        return cls(bits=max(codes.bit_length(), 1) + 1, fraction=fraction)

    @classmethod
    def of(cls, values: np.ndarray, fraction: int) -> Self:
        """Return the type that holds these values, which are multiples of 2**-fraction."""
        return cls.holding(float(np.abs(values).max(initial=0.0)), fraction)


@dataclass
class Network:
    """What hls4ml's ModelGraph is made of."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    types: dict[str, dict[str, str]] = field(default_factory=dict)
    """Precision of the tensors of each layer."""
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """ONNX name -> shape of a sample, channels first as the ONNX file has it."""
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    """Layers that make the outputs."""
    exact: bool = True
    """Whether every layer with weights computes on rounded numbers."""


@dataclass
class _Tensor:
    layer: str
    shape: tuple[int, ...]
    """Of a sample, channels first."""
    type: Fixed | None
    """None: not rounded, and not the exact result of what is."""
    writers: tuple[str, ...] = ()
    """Layers that write it, and may still write it rounded: nobody else has read it."""
    image: tuple[int, ...] | None = None
    """Channels, height and width of the image that a vector was; its numbers lie channels last."""


def read(model: Any, default: Fixed) -> Network:
    """Read a network.

    Args:
        model: onnx.ModelProto; one input for each sample's tensor, the first axis is the batch.
        default: Type of what is not rounded.

    Raises:
        TargetError: an operator, or a rounding, that cannot be built; it is named.
    """
    return _Reader(model, default).read()


class _Reader:
    def __init__(self, model: Any, default: Fixed) -> None:
        from onnx import numpy_helper

        self.model, self.default, self.made = model, default, Network()
        self.constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        self.grids: dict[str, np.ndarray] = {}  # scale of each channel of a constant's codes
        self.tensors: dict[str, _Tensor] = {}
        self.codes: dict[str, tuple[str, Fixed]] = {}  # rounded tensors, before DequantizeLinear
        self.readers: dict[str, int] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1

    def read(self) -> Network:
        for value in self.model.graph.input:
            if value.name not in self.constants:
                self._input(value)
        for node in self.model.graph.node:
            handle = getattr(self, f"_{node.op_type.lower()}", None)
            if handle is None:
                raise TargetError(
                    f"hls has no operator {node.op_type} ({_name(node)!r}); it has Gemm, MatMul, "
                    "Conv, Relu, MaxPool, Add, Flatten and Reshape. Choose another target, or a "
                    "network of these"
                )
            handle(node)
        for value in self.model.graph.output:
            tensor = self._tensor(value.name, None)
            if tensor.image is not None:
                raise TargetError(f"hls cannot give out {value.name!r}, an image as a vector")
            self.made.outputs[value.name] = tensor.shape
            self.made.ends.append(tensor.layer)
        return self.made

    def _input(self, value: Any) -> None:
        shape = value.type.tensor_type.shape.dim
        sizes = tuple(int(d.dim_value) for d in shape[1:])
        if 0 in sizes or len(sizes) not in (1, 3):
            raise TargetError(
                f"input {value.name!r} has the shape {[d.dim_param or d.dim_value for d in shape]};"
                " hls takes vectors and images (batch, channels, height, width) of known size"
            )
        layer = self._layer("InputLayer", [], input_shape=[*sizes[1:], sizes[0]])
        self.made.inputs[value.name] = sizes
        self._write(value.name, layer, sizes, None)

    def _quantizelinear(self, node: Any) -> None:
        source, out = node.input[0], node.output[0]
        wanted = self._grid(node)
        if source in self.constants:
            scale, _ = self._scale(node)
            low, high = (-128, 127) if wanted.signed else (0, 255)
            rounded = np.rint(self.constants[source] / scale).clip(low, high)
            self.constants[out] = rounded.astype(np.int8 if wanted.signed else np.uint8)
            return
        tensor = self._tensor(source, node)
        if tensor.type == wanted:
            self.codes[out] = (source, wanted)
            return
        if tensor.writers and self.readers[source] == 1:
            for layer in tensor.writers:
                self.made.types[layer]["result"] = str(wanted)
            tensor.type, tensor.writers = wanted, ()
            self.codes[out] = (source, wanted)
            return
        layer = self._layer("Activation", [tensor.layer], activation="linear", **_size(tensor))
        self.made.types[layer]["result"] = str(wanted)
        name = f"{out} rounded"
        self.tensors[name] = _Tensor(layer, tensor.shape, wanted, image=tensor.image)
        self.codes[out] = (name, wanted)

    def _dequantizelinear(self, node: Any) -> None:
        source, out = node.input[0], node.output[0]
        if source in self.constants:
            scale, axis = self._scale(node)
            codes = self.constants[source].astype(np.float64)
            zero = self.constants[node.input[2]] if len(node.input) > 2 else np.zeros(())
            if np.any(zero):
                raise TargetError(f"{source!r} has codes with a zero point; {_CURE}")
            shape = [1] * codes.ndim
            if scale.ndim and codes.ndim:
                shape[axis] = -1
            self.constants[out] = codes * scale.reshape(shape if scale.ndim else ())
            self.grids[out] = np.asarray(scale, np.float64)
            return
        if source not in self.codes:
            raise TargetError(f"{source!r} is integers before anything rounded it")
        name, grid = self.codes[source]
        if grid != self._grid(node):
            raise TargetError(f"{out!r} reads codes with another scale than they were written with")
        self.tensors[out] = self.tensors[name]

    def _gemm(self, node: Any) -> None:
        about = _attributes(node)
        if about.get("transA") or about.get("alpha", 1) != 1 or about.get("beta", 1) != 1:
            raise TargetError(f"hls has no Gemm with transA, alpha or beta ({_name(node)!r})")
        weight = self._constant(node.input[1], node)
        self._linear(node, weight if about.get("transB") else weight.T)

    def _matmul(self, node: Any) -> None:
        self._linear(node, self._constant(node.input[1], node).T)

    def _linear(self, node: Any, weight_OI: np.ndarray) -> None:
        source = self._tensor(node.input[0], node)
        if len(source.shape) != 1:
            raise TargetError(
                f"{_name(node)!r} multiplies a tensor of shape {source.shape}; hls takes vectors"
            )
        if source.image is not None:
            weight_OCHW = weight_OI.reshape(-1, *source.image)
            weight_OI = weight_OCHW.transpose(0, 2, 3, 1).reshape(weight_OI.shape)
        self._weighted(node, "Dense", source, weight_OI, (len(weight_OI),), {
            "n_in": weight_OI.shape[1],
            "n_out": len(weight_OI),
        })  # fmt: skip

    def _conv(self, node: Any) -> None:
        source, about = self._tensor(node.input[0], node), _attributes(node)
        weight_OIHW = self._constant(node.input[1], node)
        if about.get("group", 1) != 1 or set(about.get("dilations", [1])) != {1}:
            raise TargetError(f"hls has no Conv with groups or dilations ({_name(node)!r})")
        if weight_OIHW.ndim != 4 or about.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise TargetError(f"hls takes a Conv of 2 dimensions and plain pads ({_name(node)!r})")
        top, left, bottom, right = about.get("pads", [0] * 4)
        stride_H, stride_W = about.get("strides", [1, 1])
        filters, channels, tall, wide = weight_OIHW.shape
        height, width = source.shape[1:]
        if tall == wide == 1 and (stride_H, stride_W) != (1, 1):
            raise TargetError(f"hls has no 1 x 1 Conv with a stride ({_name(node)!r})")
        out_H = (height + top + bottom - tall) // stride_H + 1
        out_W = (width + left + right - wide) // stride_W + 1
        self._weighted(node, "Conv2D", source, weight_OIHW, (filters, out_H, out_W), {
            "data_format": "channels_last",
            "in_height": height, "in_width": width, "n_chan": channels, "n_filt": filters,
            "filt_height": tall, "filt_width": wide,
            "stride_height": stride_H, "stride_width": stride_W,
            "pad_top": top, "pad_bottom": bottom, "pad_left": left, "pad_right": right,
            "out_height": out_H, "out_width": out_W, "dilation": 1,
        })  # fmt: skip

    def _weighted(
        self,
        node: Any,
        kind: str,
        source: _Tensor,
        weight: np.ndarray,
        shape: tuple[int, ...],
        about: Mapping[str, Any],
    ) -> None:
        """Add a layer with weights, its sums exact where its inputs and weights are."""
        channels = len(weight)
        bias_O = np.zeros(channels)
        if len(node.input) > 2:
            bias_O = self._constant(node.input[2], node).astype(np.float64)
        scale_O = self.grids.get(node.input[1])
        last = weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)
        layer = self._layer(
            kind, [source.layer], weight_data=last, use_bias=True, bias_data=bias_O, **about
        )
        if source.type is None or scale_O is None:
            self.made.exact = False
            self._write(node.output[0], layer, shape, None)
            return
        fraction = max(_exponents(scale_O, node.input[1]))
        step_O = np.broadcast_to(scale_O, (channels,)) * 2.0**-source.type.fraction
        # as runtimes do: a bias is an integer number of steps of the sums it is added to
        bias_O = np.rint(bias_O / step_O) * step_O
        self.made.layers[-1]["bias_data"] = bias_O
        sums = fraction + source.type.fraction
        bound_O = np.abs(weight).reshape(channels, -1).sum(1) * source.type.most + np.abs(bias_O)
        result = Fixed.holding(float(bound_O.max()), sums)
        self.made.types[layer] = {
            "weight": str(Fixed.of(weight, fraction)),
            "bias": str(Fixed.of(bias_O, sums)),
            "accum": str(result),
            "result": str(result),
        }
        self._write(node.output[0], layer, shape, result)

    def _relu(self, node: Any) -> None:
        source = self._tensor(node.input[0], node)
        layer = self._layer("Activation", [source.layer], activation="relu", **_size(source))
        if source.type is not None:
            self.made.types[layer]["result"] = str(source.type)
        self._write(node.output[0], layer, source.shape, source.type, source.image)

    def _maxpool(self, node: Any) -> None:
        source, about = self._tensor(node.input[0], node), _attributes(node)
        plain = (
            not any(about.get("pads", []))
            and not about.get("ceil_mode")
            and set(about.get("dilations", [1])) == {1}
            and about.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        )
        if len(source.shape) != 3 or not plain:
            raise TargetError(f"hls takes a MaxPool of 2 dimensions without pads ({_name(node)!r})")
        channels, height, width = source.shape
        tall, wide = about["kernel_shape"]
        stride_H, stride_W = about.get("strides", [1, 1])
        shape = (channels, (height - tall) // stride_H + 1, (width - wide) // stride_W + 1)
        layer = self._layer(
            "MaxPooling2D", [source.layer], data_format="channels_last", count_pad=True,
            in_height=height, in_width=width, n_filt=channels, pool_height=tall, pool_width=wide,
            stride_height=stride_H, stride_width=stride_W, padding="valid",
            out_height=shape[1], out_width=shape[2],
            pad_top=0, pad_bottom=0, pad_left=0, pad_right=0,
        )  # fmt: skip
        if source.type is not None:
            self.made.types[layer] = {"accum": str(source.type), "result": str(source.type)}
        self._write(node.output[0], layer, shape, source.type)

    def _add(self, node: Any) -> None:
        a, b = (self._tensor(name, node) for name in node.input)
        if (a.shape, a.image) != (b.shape, b.image):
            raise TargetError(
                f"hls adds tensors of one shape, not {a.shape} and {b.shape} ({_name(node)!r})"
            )
        layer = self._layer("Merge", [a.layer, b.layer], op="add")
        result = None
        if a.type is not None and b.type is not None:
            result = Fixed.holding(a.type.most + b.type.most, max(a.type.fraction, b.type.fraction))
            self.made.types[layer]["result"] = str(result)
        self._write(node.output[0], layer, a.shape, result, a.image)

    def _flatten(self, node: Any) -> None:
        self._to_shape(node, (math.prod(self._tensor(node.input[0], node).shape),))

    def _reshape(self, node: Any) -> None:
        source = self._tensor(node.input[0], node)
        wanted = [int(n) for n in self._constant(node.input[1], node)][1:]
        count = math.prod(source.shape)
        rest = math.prod(n for n in wanted if n != -1)
        self._to_shape(node, tuple(count // rest if n == -1 else n for n in wanted))

    def _to_shape(self, node: Any, shape: tuple[int, ...]) -> None:
        source = self._tensor(node.input[0], node)
        if shape == source.shape:
            self.tensors[node.output[0]] = source
            return
        if len(shape) != 1 or math.prod(shape) != math.prod(source.shape):
            raise TargetError(f"hls reshapes to vectors only, not to {shape} ({_name(node)!r})")
        layer = self._layer("Reshape", [source.layer], target_shape=list(shape))
        if source.type is not None:
            self.made.types[layer]["result"] = str(source.type)
        # it moves what it is given, and cannot round: that is done before it
        alone = self.readers[node.input[0]] == 1
        writers = (*source.writers, layer) if alone and source.writers else ()
        image = source.shape if source.shape[0] > 1 and source.shape[1:] != (1, 1) else None
        self.tensors[node.output[0]] = _Tensor(layer, shape, source.type, writers, image)

    def _layer(self, kind: str, inputs: Sequence[str], **about: Any) -> str:
        word = re.sub(r"\d", "", kind.lower())
        name = f"{word}_{len(self.made.layers)}"
        entry: dict[str, Any] = {"name": name, "class_name": kind, **about}
        if inputs:
            entry["inputs"] = list(inputs)
        self.made.layers.append(entry)
        self.made.types[name] = {"result": str(self.default)}
        return name

    def _write(
        self,
        name: str,
        layer: str,
        shape: tuple[int, ...],
        kind: Fixed | None,
        image: tuple[int, ...] | None = None,
    ) -> None:
        self.tensors[name] = _Tensor(layer, shape, kind, (layer,), image)

    def _tensor(self, name: str, node: Any) -> _Tensor:
        if name not in self.tensors:
            where = f" in {_name(node)!r}" if node is not None else ""
            raise TargetError(f"hls cannot build {name!r}{where}: it is no tensor of numbers")
        return self.tensors[name]

    def _constant(self, name: str, node: Any) -> np.ndarray:
        if name not in self.constants:
            raise TargetError(
                f"{node.op_type} ({_name(node)!r}) reads {name!r}, which is computed; hls takes "
                "weights that are fixed"
            )
        return np.asarray(self.constants[name])

    def _scale(self, node: Any) -> tuple[np.ndarray, int]:
        scale = np.asarray(self._constant(node.input[1], node), np.float64)
        return scale, int(_attributes(node).get("axis", 1))

    def _grid(self, node: Any) -> Fixed:
        """Return the type of a rounding's codes."""
        scale, _ = self._scale(node)
        zero = (
            self._constant(node.input[2], node) if len(node.input) > 2 else np.zeros((), np.uint8)
        )
        if scale.size != 1 or np.any(zero):
            raise TargetError(
                f"{node.input[0]!r} is rounded with a zero point, or by channel, which no "
                f"fixed-point number can; {_CURE}"
            )
        if zero.dtype.itemsize != 1:
            raise TargetError(f"{node.input[0]!r} is rounded to {zero.dtype}; hls takes 8 bits")
        (exponent,) = _exponents(scale, node.input[0])
        return Fixed(bits=8, fraction=exponent, signed=zero.dtype.kind == "i", rounds=True)


def _exponents(scale: np.ndarray, of: str) -> list[int]:
    """Return n for scales 2**-n."""
    mantissas, exponents = np.frexp(np.atleast_1d(scale))
    wrong = np.atleast_1d(scale)[mantissas != 0.5]
    if wrong.size:
        raise TargetError(f"{of!r} has the scale {wrong[0]:.6g}, which is no power of two; {_CURE}")
    return [1 - int(e) for e in exponents]


def _size(tensor: _Tensor) -> dict[str, int]:
    return {"n_in": math.prod(tensor.shape)}


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _name(node: Any) -> str:
    return str(node.name or node.output[0])
