"""Names of what an exported program returns."""

from torch.export import ExportedProgram


def output_names(program: ExportedProgram) -> list[str]:
    """Name the outputs in their order: the keys of a mapping, else output, output_1 ..."""
    spec = program.call_spec.out_spec
    if spec is not None and spec.type is not None and issubclass(spec.type, dict):
        return [str(key) for key in spec.context]
    count = len(program.graph_signature.user_outputs)
    return [f"output_{i}" if i else "output" for i in range(count)]
