"""The command line: parses words, nothing else. What a verb does is in `_cli_*.py`."""

from pathlib import Path
from typing import Annotated

import typer

from tersor._cli_options import (
    BATCH,
    DATA,
    Batch,
    Batches,
    Best,
    Cells,
    Data,
    Debug,
    Fusion,
    Json,
    LatencyLimit,
    Limits,
    Model,
    Modes,
    Partial,
    Rate,
    Resume,
    Seconds,
    Subject,
    Sweep,
    Target,
    Teacher,
    TeacherWeights,
    Threads,
    Weights,
    argument,
    example,
    option,
)
from tersor._cli_verbs import verbs

VERBS = (
    "compress",
    "measure",
    "compare",
    "explain",
    "profile",
    "run",
    "deploy",
    "log",
    "list",
    "show",
    "inspect",
    "advise",
    "doctor",
    "demo",
)


app: typer.Typer = typer.Typer(
    name="tersor",
    help="Make a trained neural network smaller and faster for a named target, inside your limits, "
    "with a measured verdict on every step.",
    epilog=example("tersor demo"),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from tersor import __version__

        typer.echo(f"tersor {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Carry the options of the command itself."""


@app.command(
    short_help="compress a network, keeping only the steps that pay",
    epilog=example("tersor compress tersor.demo.network:trained --data digits --recipe demo"),
)
def compress(
    context: typer.Context,
    model: Model,
    data: Annotated[str, option("--data", "DATA", DATA)],
    recipe: Annotated[
        str | None,
        option("--recipe", "NAME|FILE", "`tersor list recipes`; or auto", complete="recipes"),
    ] = None,
    target: Target = None,
    best: Best = None,
    limit: Limits = None,
    metric: Annotated[
        list[str] | None,
        option("--metric", "NAME", "measure this, too (repeatable)", complete="metrics"),
    ] = None,
    minutes: Annotated[
        float | None,
        option("--minutes", "N", "of training in a stage of --recipe auto; 3", min=0),
    ] = None,
    out: Annotated[Path, option("--out", "DIR", "the artifact's folder", show_default=True)] = Path(
        "out"
    ),
    batch: Annotated[int | None, option("--batch", "N", f"{BATCH}; 1 if not given", min=1)] = None,
    threads: Threads = None,
    seed: Annotated[
        int | None, option("--seed", "N", "decides all random numbers; 0", min=0)
    ] = None,
    weights: Weights = None,
    partial: Partial = False,
    teacher: Teacher = None,
    teacher_weights: TeacherWeights = None,
    fit: Annotated[
        str | None, option("--fit", "FILE.py:FUNCTION", "your trainer instead of ours")
    ] = None,
    quality: Annotated[
        str | None,
        option("--quality", "FILE.py:FUNCTION", "your metric: (outputs, labels) -> number"),
    ] = None,
    strict: Annotated[
        bool, option("--strict", None, "a limit must hold for the whole interval")
    ] = False,
    again: Annotated[
        Path | None, option("--again", "DIR", "repeat the run that made this artifact")
    ] = None,
    resume: Resume = False,
    dry_run: Annotated[bool, option("--dry-run", None, "check and predict, do nothing")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress a network; keep only the steps that pay inside the limits.

    Exit code 1: a limit is not reached; the artifact is written all the same.
    """
    from tersor import _cli_compress

    del debug  # read from the words, in __main__
    code = _cli_compress.compress(
        model,
        words=context.obj["words"],
        data=data,
        recipe=recipe,
        again=again,
        target=target,
        best=best,
        limits=limit or [],
        metrics=metric or [],
        minutes=minutes,
        out=out,
        batch=batch,
        threads=threads,
        seed=seed,
        weights=weights,
        partial=partial,
        teacher=teacher,
        teacher_weights=teacher_weights,
        fit=fit,
        quality=quality,
        strict=strict,
        resume=resume,
        dry_run=dry_run,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command(
    short_help="measure a network, a model file or an artifact",
    epilog=example("tersor measure tersor.demo.network:trained --data digits --metric accuracy"),
)
def measure(
    subject: Subject,
    data: Data = None,
    target: Target = None,
    metric: Annotated[
        list[str] | None,
        option(
            "--metric", "NAME", "size and latency if not given (repeatable)", complete="metrics"
        ),
    ] = None,
    batch: Batch = 1,
    threads: Threads = None,
    split: Annotated[
        str, option("--split", "NAME", "where quality is measured", show_default=True)
    ] = "test",
    weights: Weights = None,
    partial: Partial = False,
    all_runtimes: Annotated[
        bool, option("--all-runtimes", None, "one table over every runtime that is here")
    ] = False,
    runtime: Annotated[
        list[str] | None,
        option("--runtime", "NAME", "of these only (repeatable)", complete="runtimes"),
    ] = None,
    sweep: Sweep = False,
    batches: Batches = None,
    cells: Cells = None,
    mode: Modes = None,
    rate: Rate = None,
    latency_limit: LatencyLimit = None,
    seconds: Seconds = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a network, a model file or an artifact on its target, or on every runtime.

    What is not here, or does not run, is a row that says why.
    """
    from tersor import _cli_load, _cli_measure, _cli_survey

    del debug
    if sweep or mode or batches or cells or rate or latency_limit or seconds:
        code = _cli_load.load(
            subject,
            sweep=sweep,
            modes=mode or [],
            batches=batches,
            cells=cells,
            rate=rate,
            limit=latency_limit,
            seconds=seconds,
            data=data,
            target=target,
            batch=batch,
            threads=threads,
            split=split,
            weights=weights,
            partial=partial,
            as_json=json,
        )
        raise typer.Exit(code)
    if all_runtimes or runtime:
        if target is not None:
            from tersor.core.errors import RecipeError

            raise RecipeError(
                f"--target {target} cannot be given with --all-runtimes or --runtime, which choose "
                "the targets"
            )
        code = _cli_survey.survey(
            subject,
            data=data,
            runtimes=runtime or [],
            metrics=metric or [],
            batch=batch,
            threads=threads,
            split=split,
            weights=weights,
            partial=partial,
            as_json=json,
        )
        raise typer.Exit(code)
    code = _cli_measure.measure(
        subject,
        data=data,
        target=target,
        metrics=metric or [],
        batch=batch,
        threads=threads,
        split=split,
        weights=weights,
        partial=partial,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command(
    short_help="say which of two is faster, with an interval",
    epilog=example("tersor demo --out demo && tersor compare demo/original demo"),
)
def compare(
    a: Annotated[
        str, argument("A", "an artifact or a model file; OUT/original: the network before")
    ],
    b: Annotated[str | None, argument("B", "another; may be left out with --aa")] = None,
    data: Data = None,
    target: Target = None,
    batch: Batch = 1,
    threads: Threads = None,
    min_effect: Annotated[
        float,
        option("--min-effect", "X", "smallest difference called one", min=0.0, show_default=True),
    ] = 0.03,
    budget: Annotated[
        float, option("--budget", "SECONDS", "longest contest", min=0.1, show_default=True)
    ] = 20.0,
    aa: Annotated[
        int, option("--aa", "N", "check the method: A against itself, N times", min=0)
    ] = 0,
    gate: Annotated[
        str | None, option("--gate", "faster|not-slower", "exit code 1 unless B is")
    ] = None,
    seed: Annotated[int, option("--seed", "N", "decides orders and intervals", min=0)] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether B is faster or slower than A, with an interval; they run interleaved."""
    from tersor import _cli_measure

    del debug
    code = _cli_measure.compare(
        a,
        b,
        data=data,
        target=target,
        batch=batch,
        threads=threads,
        min_effect=min_effect,
        budget_s=budget,
        aa=aa,
        gate=gate,
        seed=seed,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command(
    short_help="say why a network is faster or smaller, or not",
    epilog=example("tersor explain tersor.demo.network:trained --data digits"),
)
def explain(
    model: Annotated[str, argument("MODEL", "a network in Python, an artifact or a model file")],
    after: Annotated[
        str | None, argument("AFTER", "what a compression made of the artifact or file")
    ] = None,
    of: Annotated[
        str | None, option("--of", "latency|throughput|size", "of an artifact or file: what for")
    ] = None,
    data: Data = None,
    target: Target = None,
    technique: Annotated[
        str | None, option("--technique", "static|dynamic", "dynamic if layers are recurrent")
    ] = None,
    batch: Batch = 1,
    threads: Threads = None,
    fusion: Fusion = False,
    budget: Annotated[
        float, option("--budget", "SECONDS", "longest contest", min=0.1, show_default=True)
    ] = 6.0,
    weights: Weights = None,
    partial: Partial = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say why a network is faster or smaller, or not. Nothing is written.

    A network in Python is quantized and runs in float and in integers under the runtime's profiler:
    what gets faster, and what holds the rest back. Of an artifact or a model file, alone or after
    the one it was made from, the causes are told that take time or bytes in vain, largest first.
    """
    from tersor import _cli_explain

    del debug
    code = _cli_explain.explain(
        model,
        after,
        question=of,
        data=data,
        target=target,
        technique=technique,
        fusion=fusion,
        batch=batch,
        threads=threads,
        budget_s=budget,
        weights=weights,
        partial=partial,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command(
    short_help="say where a network's time goes, and what limits it",
    epilog=example("tersor profile tersor.demo.network:trained --data digits --threads 1"),
)
def profile(
    subject: Annotated[str | None, argument("MODEL|ARTIFACT", "what to profile")] = None,
    data: Data = None,
    target: Target = None,
    sparsity: Annotated[
        bool, option("--sparsity", None, "instead: time layers sparse and dense, by their zeros")
    ] = False,
    shapes: Annotated[
        str | None,
        option("--shapes", "LIST", "such as 1024x1024,64x64k3@32: in x out, kernel @ image"),
    ] = None,
    batch: Batch = 1,
    threads: Threads = None,
    weights: Weights = None,
    partial: Partial = False,
    fresh: Annotated[
        bool, option("--fresh", None, "measure the machine's peak and bandwidth again")
    ] = False,
    out: Annotated[Path | None, option("--out", "FILE.html", "write the picture, too")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Profile a network by operator: time, work, place on the machine's roofline, what can move it.

    With --sparsity, this machine: layers are timed sparse and by every dense kernel that is
    installed. The step sparse_execution uses what was found.
    """
    from tersor import _cli_profile

    del debug
    code = _cli_profile.profile(
        subject,
        sparsity=sparsity,
        shapes=shapes,
        batch=batch,
        threads=threads,
        out=out,
        data=data,
        target=target,
        weights=weights,
        partial=partial,
        fresh=fresh,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command(
    short_help="run an artifact on arrays; torch is not needed",
    epilog=example(
        "tersor demo --out demo",
        "python -c \"import numpy as n; n.savez('x.npz', x=n.zeros((1, 1, 8, 8), 'f'))\"",
        "tersor run demo --input x.npz --output y.npz",
    ),
)
def run(
    artifact: Annotated[str, argument("ARTIFACT", "a folder that compress made")],
    inputs: Annotated[Path, option("--input", "X.npz", "one array for each input, by name")],
    output: Annotated[
        Path | None, option("--output", "Y.npz", "where the outputs go; else only described")
    ] = None,
    device: Annotated[
        str | None, option("--device", "NAME", "another device of the runtime")
    ] = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run an artifact on arrays. Needs its runtime, but not torch."""
    from tersor import _cli_run

    del debug
    code = _cli_run.run(
        artifact, inputs=inputs, output=output, device=device, threads=threads, as_json=json
    )
    raise typer.Exit(code)


@app.command(
    short_help="write what a server or a program needs to run an artifact",
    epilog=example(
        "tersor demo --out demo",
        "tersor deploy demo --to triton --out repository --option name=digits",
    ),
)
def deploy(
    artifact: Annotated[str, argument("ARTIFACT", "a folder that compress made")],
    to: Annotated[
        str,
        option("--to", "NAME", "such as triton: `tersor list deployments`", complete="deployments"),
    ],
    out: Annotated[Path, option("--out", "DIR", "the folder to write")],
    options: Annotated[
        list[str] | None,
        option("--option", "NAME=VALUE", "a setting that `tersor show NAME` lists (repeatable)"),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what a server, a cluster or a program needs to run an artifact.

    The artifact's hashes are compared first, and it is run once to see what it takes and gives.
    """
    from tersor import _cli_deploy

    del debug
    code = _cli_deploy.deploy(artifact, to=to, out=out, options=options or [], as_json=json)
    raise typer.Exit(code)


app.add_typer(verbs)
