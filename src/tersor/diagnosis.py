"""diagnose(): why a compressed network is not faster, or not smaller, and what to do.

Evidence is gathered from the runtime's profile, the graph and the weights of the file, and from
runs in which a cause is taken away. Every cause has the share of the time, or of the bytes, that
the evidence assigns to it: what is left when it is gone bounds what a fix can buy.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tersor._causes_size import size_causes
from tersor._causes_time import Profile, time_causes
from tersor._causes_tried import race, tried_causes
from tersor._size_parts import SizePart, size_parts
from tersor.core import plugins
from tersor.core.artifact import Artifact
from tersor.core.context import Data
from tersor.core.errors import DataError, ModelError, RecipeError, TargetError, suggest
from tersor.core.hardware import probe, usable_cores
from tersor.core.packing import unpacked
from tersor.core.runtime import Arrays, Target
from tersor.core.statistics import Comparison
from tersor.feeds import timing_inputs
from tersor.ops.file_graph import FileGraph, read_onnx, read_openvino
from tersor.subjects import Place, fitting, made_inputs, place

Question = Literal["latency", "throughput", "size"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
LEAST = 0.05
"""Share below which a cause is not worth a word."""
_MORE = 32
"""Times more samples that a throughput is tried with."""
_RUNS = 32


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A cause in words, and what takes it away."""

    meaning: str
    fix: str


ADVICE: Mapping[str, Advice] = {
    "dense_kernels": Advice(
        meaning="kernels multiply by weights that are zero",
        fix="cut whole channels instead: `- channels: {ratio: 0.5}`; or, on a runtime with sparse "
        "products such as torch_export, run zeros as such: `- sparse_execution`",
    ),
    "stored_zeros": Advice(
        meaning="the file stores weights that are zero in full", fix="add as first step: `- pack`"
    ),
    "float_storage": Advice(
        meaning="weights of few values are stored as floats",
        fix="store codes, `- weight_only: {bits: 8}` or `- static`; or begin with `- pack`",
    ),
    "duplicates": Advice(
        meaning="the same weights are stored more than once",
        fix="share them: `- tie_layers`, or store one constant for all; or begin with `- pack`",
    ),
    "unfused_qdq": Advice(
        meaning="rounding does not merge with the layers around it",
        fix="round inputs, weights and results of each layer, after its activation: `- static`, "
        "applied to the float network",
    ),
    "float_layers": Advice(
        meaning="layers stayed in float",
        fix="quantize these, too: `- static`, or `- dynamic` for "
        "recurrent ones, with `layers` that exclude none; embeddings: `- weight_only`",
    ),
    "no_integer_kernel": Advice(
        meaning="the time goes to operators that have no integer kernel",
        fix="cheaper activations or fused ones: `- fuse_activations`, `- fuse_attention`; replace "
        "them by ReLU and train on: `- finetune`",
    ),
    "overhead": Advice(
        meaning="operators are so small that starting them is what takes time",
        fix="fewer operators: `- drop_layers`, `- fuse_batch_norm`, merged layers; or more samples "
        "at once",
    ),
    "idle_lanes": Advice(
        meaning="channels do not fill the vectors of the fast kernels",
        fix="cut channels to a multiple: `- channels: {ratio: 0.5, multiple: 16}`",
    ),
    "memory_bound": Advice(
        meaning="reading weights takes the time, not arithmetic",
        fix="fewer bytes: `- dynamic` or `- weight_only: {bits: 8}`; or more samples at once",
    ),
    "small_batch": Advice(
        meaning="too few samples at once", fix="raise the batch, as in `--batch 32`"
    ),
    "threads": Advice(
        meaning="more threads than cores, or than the work is worth",
        fix="ask for fewer, as in `--threads 1`",
    ),
    "casts": Advice(
        meaning="numbers are converted between types in each run",
        fix="keep one type in the whole network: convert what is in double or half before "
        "exporting, and leave `- half` out where the processor computes in float",
    ),
    "unpacked_each_run": Advice(
        meaning="weights are unpacked again in each run",
        fix="round activations, too: `- static`; or leave the weights in float",
    ),
    "copies": Advice(
        meaning="tensors are moved, not computed",
        fix="cut the same channels in all layers that are added or joined: `- channels`; remove "
        "transposes: `- simplify_graph`",
    ),
    "rank": Advice(
        meaning="two factors do more work than the layer they replace",
        fix="a lower rank, or none: `- svd`, which keeps factors only where they are faster",
    ),
    "not_optimized": Advice(
        meaning="the runtime may not optimize the graph",
        fix="leave the option `optimization` of the target out, or set it to `all`",
    ),
    "missing_instructions": Advice(
        meaning="the processor has no integer dot products",
        fix="half the bytes instead of integers, or another machine; keep int8 for its size",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One reason, with its evidence."""

    cause: str
    """A key of ADVICE."""
    share: float
    """Of the time, or of the bytes, that the evidence assigns to it; shares may overlap."""
    evidence: str
    meaning: str
    fix: str
    """What to do, with steps of a recipe."""

    @property
    def at_most(self) -> float:
        """Return how many times faster, or smaller, the network is without it at best."""
        return 1 / max(1 - self.share, 1e-3)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why a network is not faster, or not smaller."""

    question: str
    """One of QUESTIONS."""
    causes: tuple[Cause, ...]
    """Largest share first."""
    name: str
    target: Target | None = None
    batch: int = 1
    threads: int = 1
    comparison: Comparison | None = None
    """How many times faster it is than the network before, interleaved."""
    size_bytes: tuple[int, ...] = ()
    """Before, where there is one, and now."""
    contents: tuple[tuple[SizePart, ...], ...] = ()
    """What those bytes are; nothing where a file cannot be looked into."""

    def _repr_html_(self) -> str:
        from tersor.core.notebook import shown

        rows = [(c.meaning, f"{c.share:.0%}", c.evidence, c.fix) for c in self.causes]
        title = f"{self.name}: {self.question}"
        return shown(title, ("cause", "share", "evidence", "what to do"), rows)


def diagnose(
    after: Artifact | str | Path,
    before: Artifact | str | Path | None = None,
    *,
    question: str = "latency",
    data: Data | None = None,
    target: Target | None = None,
    batch: int = 1,
    threads: int | None = None,
    budget_s: float = 2.0,
) -> Diagnosis:
    """Say why a compressed network is not faster, or not smaller.

    Args:
        after: An artifact or a model file.
        before: The network it was made from, to compare with.
        question: What it was hoped to be better in.
        data: Batches to run; else they are made from the network's signature.
        target: Where to run a bare file, with which options.
        batch: Samples in a batch.
        threads: Of a run; 0 means all usable cores.
        budget_s: Longest time of each contest.

    Raises:
        RecipeError: no such question. ModelError: nothing that can be looked into.
        TargetError: the runtime does not tell where its time goes.
    """
    if question not in QUESTIONS:
        raise RecipeError(
            f"a network is explained by one of {', '.join(QUESTIONS)}; got {question!r}."
            f"{suggest(question, QUESTIONS)}"
        )
    if question == "size":
        return _of_size(after, before)
    found = place(after, target=target, threads=threads)
    runtime = plugins.runtime(found.target.runtime)
    if runtime.profile is None:
        able = [n for n in plugins.names("runtimes") if plugins.runtime(n).profile]
        raise TargetError(
            f"{found.target.runtime} does not tell where its time goes; explain speed on "
            f"{' or '.join(able)}, or ask --of size"
        )
    feeds = _feeds(found, data, batch)
    larger = None
    if question == "throughput":
        with suppress(DataError):  # a fixed batch
            larger = (_MORE, _feeds(found, data, batch * _MORE))
    machine = probe()
    with unpacked(found.files[0]) as file:
        graph = _graph(file, feeds[0])
        operators = runtime.profile(file, found.target, (list(feeds) * _RUNS)[:_RUNS])
        profile = Profile(operators=operators, graph=graph)
        causes = [
            *time_causes(profile, machine),
            *tried_causes(file, found.target, profile, feeds, larger, machine, budget_s / 2),
        ]
    compared = None
    if before is not None:
        compared = _compared(
            before, found, feeds, data=data, target=target, batch=batch, budget_s=budget_s
        )
    return Diagnosis(
        question=question,
        causes=_ranked(causes),
        name=found.name,
        target=found.target,
        batch=batch,
        threads=found.target.threads or usable_cores(),
        comparison=compared,
    )


def _compared(
    before: Artifact | str | Path,
    after: Place,
    feeds: Sequence[Arrays],
    *,
    data: Data | None,
    target: Target | None,
    batch: int,
    budget_s: float,
) -> Comparison:
    other = place(before, target=target, threads=after.target.threads)
    own = feeds
    if data is None:  # a compression may have changed the sizes of inputs
        own = _feeds(other, None, batch)
    return race(
        other.files[0],
        other.target,
        fitting(other, own),
        after.files[0],
        after.target,
        feeds,
        budget_s,
    )


def _of_size(after: Artifact | str | Path, before: Artifact | str | Path | None) -> Diagnosis:
    given = [each for each in (before, after) if each is not None]
    sizes = [_files(each) for each in given]
    bytes_each = tuple(sum(file.stat().st_size for file in files) for files in sizes)
    looked = [_weights(each, files[0]) for each, files in zip(given, sizes, strict=True)]
    graphs = [graph for graph, _ in looked]
    if graphs[-1] is None:
        name = sizes[-1][0].name
        raise ModelError(f"{name} cannot be looked into; give a .onnx, .xml or .pt2 file")
    return Diagnosis(
        question="size",
        causes=_ranked(size_causes(sizes[-1][0], graphs[-1], bytes_each[-1])),
        name=str(after.path if isinstance(after, Artifact) else after),
        size_bytes=bytes_each,
        contents=tuple(
            () if graph is None else size_parts(graph, size, coded)
            for (graph, coded), size in zip(looked, bytes_each, strict=True)
        ),
    )


def _weights(subject: Artifact | str | Path, first: Path) -> tuple[FileGraph | None, int]:
    """Look into a file for its constants, None where that cannot be done.

    Returns:
        The constants, and the bytes that packing took off.
    """
    with unpacked(first) as file:
        coded = 0
        if file != first:
            whole = sum(each.stat().st_size for each in file.parent.iterdir() if each.is_file())
            coded = whole - first.stat().st_size
        if file.suffix not in (".onnx", ".xml", ".pt2"):
            return None, coded
        if file.suffix == ".xml":
            place(subject)  # a child process reads it first
        return _graph(file, None), coded


def _graph(file: Path, inputs: Arrays | None) -> FileGraph:
    """Look into a file, checked as any that a user gives."""
    if file.suffix == ".onnx":
        return read_onnx(plugins.source("onnx").load(str(file)).net, inputs)
    if file.suffix == ".xml":
        return read_openvino(file, inputs)
    if file.suffix == ".pt2":
        weights = plugins.source("exported").load(str(file)).net.state_dict
        return FileGraph(constants={name: t.detach().numpy() for name, t in weights.items()})
    return FileGraph()


def _files(subject: Artifact | str | Path) -> tuple[Path, ...]:
    if isinstance(subject, Artifact):
        return subject.model_files
    path = Path(subject)
    if path.is_dir():
        return Artifact.open(path).model_files
    if not path.is_file():
        raise ModelError(f"{str(subject)!r} does not exist; give an artifact or a model file")
    beside = (path.with_suffix(".bin"), path.with_name(path.name + ".data"))
    own = beside[0] if path.suffix == ".xml" else beside[1]
    return (path, own) if own.is_file() else (path,)


def _feeds(found: Place, data: Data | None, batch: int) -> list[Arrays]:
    if data is None:
        return fitting(found, made_inputs(found, batch))
    batches: Iterable[Mapping[str, Any]] | None = data.test or data.calibration or data.train
    if batches is None:
        raise DataError("the data have no batches; give at least calibration or test")
    return fitting(found, timing_inputs(batches, batch))


def _ranked(causes: Iterable[tuple[str, float, str]]) -> tuple[Cause, ...]:
    made = [
        Cause(
            cause=name,
            share=share,
            evidence=evidence,
            meaning=ADVICE[name].meaning,
            fix=ADVICE[name].fix,
        )
        for name, share, evidence in causes
        if share >= LEAST
    ]
    return tuple(sorted(made, key=lambda cause: -cause.share))
