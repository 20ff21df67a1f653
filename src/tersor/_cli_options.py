"""What the verbs of the command line share: options, and how they are described."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tersor._cli_talk import KINDS


def example(*lines: str) -> str:
    """End a help text with lines to paste, which are not wrapped."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def names(kind: str) -> list[str]:
    """List the names that a shell offers, of one kind or of any."""
    from tersor.core import plugins
    from tersor.core.recipe import recipes

    if kind == "environments":
        from tersor.core import environments

        return [*environments.known(), "all"]
    if kind == "any":
        return sorted({name for each in KINDS for name in names(each)})
    if kind == "machines":
        from tersor.core.machine import machines

        return machines()
    return recipes() if kind == "recipes" else list(plugins.names(kind))


def option(
    name: str, metavar: str | None, help: str, *, complete: str = "", after: str = "", **more: Any
) -> Any:
    """Describe an option; `complete` is the kind of names a shell offers, each with `after`."""

    def completion(incomplete: str) -> list[str]:
        return [f"{name}{after}" for name in names(complete) if name.startswith(incomplete)]

    if complete:
        more["autocompletion"] = completion
    return typer.Option(name, metavar=metavar, help=help, **more)


def argument(metavar: str, help: str, **more: Any) -> Any:
    """Describe an argument."""
    return typer.Argument(metavar=metavar, help=help, show_default=False, **more)


DATA = "digits, arrays:FILE.npz, images:FOLDER or FILE.py:FUNCTION"
SUBJECT = "a network, or a folder that compress made"
THREADS = "of the target; 0: all usable cores"
TARGET = "such as onnxruntime:cpu or openvino,streams=2"
BATCH = "samples in a timed batch"

Model = Annotated[str, argument("MODEL", "FILE.py:FACTORY, MODULE:FACTORY, x.onnx or x.pt2")]
Subject = Annotated[str, argument("MODEL|ARTIFACT", SUBJECT)]
Data = Annotated[str | None, option("--data", "DATA", DATA)]
Target = Annotated[
    str | None,
    option("--target", "TARGET", TARGET, complete="runtimes"),
]
Threads = Annotated[int | None, option("--threads", "N", THREADS, min=0)]
Batch = Annotated[int, option("--batch", "N", BATCH, min=1, show_default=True)]
Best = Annotated[
    str | None, option("--best", "METRIC", "what to improve: latency", complete="metrics")
]
Limits = Annotated[
    list[str] | None,
    option(
        "--limit",
        "METRIC=LIMIT",
        "-1pt, -1%, +2%, 25%, '3 ms', '2 MB' (repeatable)",
        complete="metrics",
        after="=",
    ),
]
Weights = Annotated[
    Path | None, option("--weights", "FILE", "a .safetensors file for the network, or an artifact")
]
Partial = Annotated[bool, option("--partial", None, "load the weights that fit, say what did not")]
Teacher = Annotated[
    str | None, option("--teacher", "MODEL", "what distillation learns from, not MODEL itself")
]
TeacherWeights = Annotated[
    Path | None, option("--teacher-weights", "FILE", "a .safetensors file for the teacher")
]
Fusion = Annotated[
    bool, option("--fusion", None, "what the runtime fuses by itself, and what steps add")
]
Resume = Annotated[bool, option("--resume", None, "go on with a run that was interrupted")]
Sweep = Annotated[bool, option("--sweep", None, "batch sizes x threads x instances")]
Batches = Annotated[str | None, option("--batches", "LIST", "of the sweep: 1,8,32")]
Cells = Annotated[
    str | None, option("--cells", "LIST", "of the sweep, threads x instances: 1x2,2x1")
]
Modes = Annotated[
    list[str] | None,
    option("--mode", "NAME", "MLPerf's single, multi, server, offline (repeatable)"),
]
Rate = Annotated[float | None, option("--rate", "X", "server: queries/s", min=1e-3)]
LatencyLimit = Annotated[
    str | None, option("--latency-limit", "TIME", "for --sweep and --mode server: '5 ms'")
]
Seconds = Annotated[float | None, option("--seconds", "S", "of a mode, or a cell", min=0.01)]
Json = Annotated[bool, option("--json", None, "one JSON document on stdout")]
Debug = Annotated[bool, option("--debug", None, "show the traceback of an error")]
