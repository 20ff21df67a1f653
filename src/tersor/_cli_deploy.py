"""`tersor deploy`: what a server, a cluster or a program needs to run an artifact."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersor._cli_talk import show, show_json, table


def deploy(artifact: str, *, to: str, out: Path, options: Sequence[str], as_json: bool) -> int:
    """Write the folder, and say how to see that it works."""
    from tersor.deployer import deploy as write

    made = write(artifact, to=to, out=out, options=_settings(options))
    sizes = {name: (made.path / name).stat().st_size for name in made.files}
    if as_json:
        files = [{"name": name, "bytes": size} for name, size in sizes.items()]
        show_json({"deployment": to, "path": str(out), "files": files, "check": made.check})
    else:
        show(table(("file", "bytes"), [(name, str(size)) for name, size in sizes.items()]))
        show(f"\nto see that it works, in {out}:\n  {made.check}")
    return 0


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE; a value is a number, true, false or text, as in a recipe."""
    import yaml

    from tersor.core.errors import RecipeError

    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise RecipeError(f"--option must be NAME=VALUE, got {word!r}")
        if name in found:
            raise RecipeError(f"--option {name} is given twice")
        try:
            found[name] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise RecipeError(f"--option {name}: {value!r} cannot be read as a value") from error
    return found
