"""The verbs that look at what there is: log, list, show, inspect, doctor; advise, and the demo."""

from pathlib import Path
from typing import Annotated

import typer

from tersor._cli_options import (
    DATA,
    Batch,
    Best,
    Data,
    Debug,
    Json,
    Limits,
    Model,
    Partial,
    Resume,
    Subject,
    Target,
    Threads,
    Weights,
    argument,
    example,
    names,
    option,
)
from tersor._cli_talk import KINDS

verbs: typer.Typer = typer.Typer(rich_markup_mode=None)
"""Has no name of its own: `cli.py` puts its commands beside the others."""


@verbs.command(
    short_help="write a report for TensorBoard or MLflow",
    epilog=example("tersor demo --out demo && tersor log demo --to tensorboard:runs"),
)
def log(
    artifact: Annotated[str, argument("ARTIFACT", "a folder that compress made")],
    to: Annotated[str, option("--to", "tensorboard:FOLDER|mlflow:FOLDER", "where to")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an artifact's report as a run of TensorBoard or MLflow, into a local folder.

    The metrics of a run are a series: the original, then the network after each stage.
    """
    from tersor import _cli_log

    del debug
    raise typer.Exit(_cli_log.log(artifact, to=to, as_json=json))


@verbs.command(
    "list",
    short_help="list techniques, recipes, runtimes, metrics ...",
    epilog=example("tersor list techniques"),
)
def list_(
    kind: Annotated[
        str | None,
        argument("KIND", f"{', '.join(KINDS)}; all if left out", autocompletion=lambda: KINDS),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List what there is: installed, or the line that installs it."""
    from tersor import _cli_catalog

    del debug
    raise typer.Exit(_cli_catalog.listing(kind, as_json=json))


@verbs.command(
    short_help="show a technique's settings, a recipe's file ...",
    epilog=example("tersor show static"),
)
def show(
    name: Annotated[
        str | None,
        argument(
            "NAME",
            "a technique, recipe, runtime, metric, dataset, machine ...",
            autocompletion=lambda: names("any"),
        ),
    ] = None,
    schema: Annotated[
        bool, option("--schema", None, "the JSON Schema of recipe files, for editors")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show all about a name: settings, defaults, types, paper; or a recipe's file."""
    from tersor import _cli_catalog

    del debug
    raise typer.Exit(_cli_catalog.show_name(name, schema=schema, as_json=json))


@verbs.command(
    short_help="show layers, parameters, sizes and sparsity",
    epilog=example(
        "tersor inspect tersor.demo.network:trained",
        "tersor inspect tersor.demo.network:trained --data digits --groups --out g.svg",
    ),
)
def inspect(
    subject: Subject,
    weights: Weights = None,
    partial: Partial = False,
    verify: Annotated[
        bool, option("--verify", None, "compare an artifact's files with their hashes")
    ] = False,
    trust: Annotated[
        bool, option("--trust", None, "let compiled code in an artifact run, whoever made it")
    ] = False,
    groups: Annotated[
        bool, option("--groups", None, "list the channels that must be cut together")
    ] = False,
    data: Annotated[str | None, option("--data", "DATA", f"what --groups runs on: {DATA}")] = None,
    out: Annotated[Path | None, option("--out", "FILE.svg", "draw the groups, too")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show layers, parameters, sizes and sparsity of a network or an artifact."""
    from tersor import _cli_inspect

    del debug
    code = _cli_inspect.inspect(
        subject,
        weights=weights,
        partial=partial,
        verify=verify,
        trust=trust,
        groups=groups,
        data=data,
        out=out,
        as_json=json,
    )
    raise typer.Exit(code)


@verbs.command(
    short_help="try what may help, and write the recipe of what does",
    epilog=example(
        "tersor advise tersor.demo.network:trained --data digits",
        "tersor advise tersor.demo.network:trained --data digits --machine all",
    ),
)
def advise(
    model: Model,
    data: Data = None,
    target: Target = None,
    best: Best = None,
    limit: Limits = None,
    batch: Batch = 1,
    threads: Threads = None,
    minutes: Annotated[
        float, option("--minutes", "M", "of training, in a stage", min=0, show_default=True)
    ] = 3.0,
    weights: Weights = None,
    partial: Partial = False,
    out: Annotated[Path | None, option("--out", "FILE.yaml", "write the recipe, too")] = None,
    machine: Annotated[
        list[str] | None,
        option(
            "--machine",
            "NAME|FILE",
            "predict for a machine not here, or for all (repeatable)",
            complete="machines",
        ),
    ] = None,
    link: Annotated[
        str | None, option("--link", "MBIT,RTT", "from that machine to --server: 50Mbit,30ms")
    ] = None,
    server: Annotated[
        str | None,
        option("--server", "NAME", "at the other end of the link", complete="machines"),
    ] = None,
    edge: Annotated[
        str | None, option("--edge", "NAME", "a second server, near", complete="machines")
    ] = None,
    edge_link: Annotated[str | None, option("--edge-link", "MBIT,RTT", "to the edge")] = None,
    deadline: Annotated[str | None, option("--deadline", "TIME", "of a run: 20ms")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Try what may help this network on a target, and say what does, with predicted gains.

    Steps without training are applied, exported and timed; steps with it are trained for seconds.
    With --machine nothing is run: machines are compared by their descriptions.
    """
    from tersor import _cli_advise, _cli_described
    from tersor._cli_compress import goal_of
    from tersor.core.recipe import read_target

    del debug
    if machine or link or server or edge or edge_link or deadline:
        _cli_advise.check_described(target=target, best=best, limit=limit, threads=threads, out=out)
        code = _cli_described.described(
            model,
            data=data,
            machines=machine or [],
            link=link,
            deadline=deadline,
            server=server,
            batch=batch,
            as_json=json,
            edge=edge,
            edge_link=edge_link,
            weights=weights,
            partial=partial,
        )
        raise typer.Exit(code)
    code = _cli_advise.advise(
        model,
        data=data,
        goal=goal_of(None, best, limit or []),
        target=read_target(target),
        batch=batch,
        threads=threads,
        minutes=minutes,
        weights=weights,
        partial=partial,
        out=out,
        as_json=json,
    )
    raise typer.Exit(code)


@verbs.command(
    short_help="look at this machine, and say what to do about it", epilog=example("tersor doctor")
)
def doctor(
    create: Annotated[
        list[str] | None,
        option(
            "--create",
            "NAME",
            "make the environment of a runtime or source, or all (repeatable)",
            complete="environments",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at this machine: cores, instructions, packages, and whether it can time fairly.

    Runtimes whose packages do not live beside others get an environment of their own with --create,
    which downloads packages. Exit code 1: there is something to do.
    """
    from tersor import _cli_doctor

    del debug
    code = _cli_doctor.create(create, as_json=json) if create else _cli_doctor.doctor(as_json=json)
    raise typer.Exit(code)


@verbs.command(
    short_help="compress the small network that ships with tersor",
    epilog=example("tersor demo --out demo"),
)
def demo(
    context: typer.Context,
    out: Annotated[Path, option("--out", "DIR", "the artifact's folder", show_default=True)] = Path(
        "demo"
    ),
    target: Target = None,
    threads: Threads = None,
    resume: Resume = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress the small network that ships with tersor; takes a minute or two."""
    from tersor import _cli_compress

    del debug
    code = _cli_compress.demo(
        words=context.obj["words"],
        out=out,
        target=target,
        threads=threads,
        resume=resume,
        as_json=json,
    )
    raise typer.Exit(code)
