"""`tersor inspect`: layers, parameters, sizes and sparsity; with --groups, coupled channels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._cli_talk import colored, show, show_json, table, tell
from tersor.core.errors import DependencyError, ModelError, RecipeError
from tersor.core.packing import unpacked
from tersor.core.sparsity import Structure

if TYPE_CHECKING:
    from tersor._cli_tensors import Constant
    from tersor.core.artifact import Artifact


def inspect(
    subject: str,
    *,
    weights: Path | None,
    partial: bool,
    verify: bool,
    trust: bool,
    groups: bool,
    data: str | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Look into a network or an artifact."""
    if not groups and (data is not None or out is not None):
        raise RecipeError(
            f"{'--out' if data is None else '--data'} is for --groups; give that, too"
        )
    if out is not None and out.suffix != ".svg":
        raise RecipeError(f"--out {str(out)!r} must end in .svg, which is what is drawn")
    if Path(subject).is_dir():
        if groups:
            raise ModelError(
                "--groups follows the channels of a network in Python, such as FILE.py:FACTORY; "
                f"{subject!r} is a folder"
            )
        if trust:
            from tersor.core.artifact import Artifact

            Artifact.open(subject).trust()
            tell(f"compiled code in {subject} may run from now on")
        return _artifact(subject, verify, as_json)
    if verify or trust:
        word = "--verify" if verify else "--trust"
        raise ModelError(f"{word} is for artifacts; {subject!r} is not a folder")
    from tersor import pipeline
    from tersor._cli_tensors import of_net

    model = pipeline.load(subject, weights=weights, partial=partial)
    for note in model.notes:
        tell(note)
    if groups:
        from tersor import _cli_groups

        return _cli_groups.groups(model, data=data, out=out, as_json=as_json)
    found = of_net(model.net)
    layers = _layers(found)
    if as_json:
        show_json({"origin": model.origin, "form": model.form, **_totals(found), "layers": layers})
        return 0
    show(f"{model.origin} (form: {model.form})\n")
    show(_written(found, layers))
    return 0


def _artifact(place: str, verify: bool, as_json: bool) -> int:
    from tersor.core.artifact import Artifact

    artifact = Artifact.open(place, check="hashes" if verify else "sizes")
    found = _constants(artifact)
    layers = _layers(found)
    if as_json:
        about = {key: value for key, value in artifact.describe().items() if key != "schema"}
        show_json({**about, "verified": verify, **_totals(found), "layers": layers})
        return 0
    show(_about(artifact, verify))
    if found:
        show()
        show(_written(found, layers))
    return 0


def _constants(artifact: "Artifact") -> "list[Constant]":
    """Read the tensors of an artifact's model; what cannot be read here is said."""
    from tersor._cli_tensors import of_file
    from tersor.core import plugins

    known = (".onnx", ".xml", ".pt2", ".safetensors")
    name = artifact.target.runtime
    compiled = name in plugins.names("runtimes") and plugins.own_runtime(name).runs_code
    try:
        with unpacked(artifact.model_files[0]) as file:
            # a graph of torch_eager is followed by its weights
            weights = file.with_name("weights.safetensors")
            given = weights if file.suffix == ".json" and weights.is_file() else file
            if given.suffix in known and not compiled:
                return of_file(given)
            reason = "is compiled code" if compiled else "is not looked into"
            tell(f"layers are not shown: {file.name} {reason} ({name})")
    except DependencyError as error:
        tell(f"layers are not shown: {error}")
    return []


def _about(artifact: "Artifact", verified: bool) -> str:
    from tersor.core.report_words import human

    about = artifact.describe()
    inputs = ", ".join(f"{name} {_signature(entry)}" for name, entry in about["inputs"].items())
    stages = [
        (f"stage {number}", f"{stage['name']}: {colored(stage['verdict'])}")
        for number, stage in enumerate(about["stages"], 1)
    ]
    rows = [
        ("target", artifact.target.text),
        ("from", str(about.get("origin", ""))),
        ("inputs", inputs),
        ("made by", f"{about['tool']['name']} {about['tool']['version']}"),
        ("files", "hashes agree" if verified else "sizes agree; --verify compares their hashes"),
        ("model", f"{', '.join(about['model'])} ({human(about['model_bytes'], 'B')})"),
        *stages,
    ]
    return table(("artifact", about["path"]), [row for row in rows if row[1]])


def _signature(entry: Mapping[str, Any]) -> str:
    free = entry.get("dynamic", {})
    sizes = (str(free.get(str(axis), size)) for axis, size in enumerate(entry["shape"]))
    return f"{entry['dtype']} ({', '.join(sizes)})"


def _layers(found: "Iterable[Constant]") -> list[dict[str, Any]]:
    """Sum the tensors up by layer, in order; the shape is that of the largest."""
    layers: dict[str, list[Constant]] = {}
    for each in found:
        layers.setdefault(each.layer, []).append(each)
    rows = []
    for name, own in layers.items():
        largest = max(own, key=lambda each: each.count)
        rows.append(
            {
                "name": name,
                "kind": largest.kind,
                "shape": list(largest.shape),
                "dtype": largest.dtype,
                "parameters": sum(each.count for each in own),
                "bytes": sum(each.size_bytes for each in own),
                "sparsity": _share(own),
                "weight_sparsity": _share([largest]),
                "structure": asdict(largest.structure),
            }
        )
    return rows


def _share(found: "Sequence[Constant]") -> float:
    count = sum(each.count for each in found)
    return sum(each.zeros for each in found) / count if count else 0.0


def _totals(found: "Sequence[Constant]") -> dict[str, Any]:
    """Sum up; what is no weight, such as a zero point, has no part in the sparsity."""
    return {
        "numbers": sum(each.count for each in found),
        "bytes": sum(each.size_bytes for each in found),
        "sparsity": _share([each for each in found if each.weight]),
    }


def _written(found: "Sequence[Constant]", layers: Sequence[Mapping[str, Any]]) -> str:
    from tersor.core.report_words import human

    rows = [
        (
            row["name"],
            row["kind"],
            "x".join(map(str, row["shape"])) or "1",
            row["dtype"],
            human(row["parameters"], "1"),
            human(row["bytes"], "B"),
            f"{100 * row['weight_sparsity']:.1f} %",
            str(Structure(**row["structure"])),
        )
        for row in layers
    ]
    totals = _totals(found)
    rows.append(
        (
            "all",
            "",
            "",
            "",
            human(totals["numbers"], "1"),
            human(totals["bytes"], "B"),
            f"{100 * totals['sparsity']:.1f} %",
            "",
        )
    )
    head = ("layer", "kind", "weight", "type", "numbers", "bytes", "zeros", "structure")
    if any(row[-1] for row in rows):
        return table(head, rows)
    return table(head[:-1], [row[:-1] for row in rows])
