"""Which layer of the network an operator of an ONNX file belongs to, by the name of its weights."""

import re
from typing import Any

from tersor.ops.onnx_cover import name_of

_PASSES = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast", "Reshape", "Identity")
"""A weight keeps its name through these."""
_END = re.compile(r"\.\w*(weight|bias)\w*$")


def layers_of(model: Any) -> dict[str, str]:
    """Tell the layers of operators: {"node_conv2d_3": "stage1.0.conv2"}.

    Args:
        model: onnx.ModelProto, as an exporter of PyTorch writes it: weights have the names of
            parameters. Operators whose weights have other names are left out.
    """
    known = {tensor.name: tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in _PASSES and node.input and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
            continue
        weights = (known[name] for name in node.input if name in known)
        layer = next((_END.sub("", name) for name in weights if _END.search(name)), "")
        if layer:
            found[name_of(node)] = layer
    return found
