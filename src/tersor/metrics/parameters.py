"""Numbers that the network consists of: weights, biases, gains."""

from typing import Any

from tersor.core.metric import Measurement, Subject, metric

_CODES = ("torch.int8", "torch.uint8")


@metric(unit="1", better="lower", needs=("net",))
def parameters(subject: Subject) -> Measurement:
    """Count numbers, whatever their format; one used twice counts once.

    Scales and zero points of quantization and the running statistics of batch norm are not counted.
    In ONNX, where names do not tell, every other constant of floats that is not a single number is.
    """
    return Measurement(
        metric="parameters",
        value=float(count(subject.net)),
        unit="1",
        better="lower",
        how="numbers in weights, biases and gains",
    )


def count(net: Any) -> int:
    """Count the numbers of a network in any form."""
    if type(net).__name__ == "ModelProto":
        from tersor.ops import onnx_count

        return onnx_count.count_parameters(net)
    return sum(tensor.numel() for tensor in parts(net))


def parts(net: Any) -> list[Any]:
    """List the tensors that count of a module or an exported program, each once."""
    codes = [
        buffer
        for name, buffer in net.named_buffers()
        if str(buffer.dtype) in _CODES and name.rpartition(".")[2] != "zero"
    ]
    return list({id(tensor): tensor for tensor in [*net.parameters(), *codes]}.values())
