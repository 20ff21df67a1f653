"""Imports stay light: looked at in fresh interpreters. Times are in benchmarks/startup.py."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "sklearn", "scipy", "safetensors")


def loaded(code: str) -> set[str]:
    """Run code in a fresh interpreter and return which of the heavy packages it imported."""
    watch = f"{code}\nimport sys as s\ns.stderr.write('LOADED ' + ' '.join(n for n in {HEAVY!r} if n in s.modules))"
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True)
    return set(done.stderr.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import tersor",
        "import tersor; dir(tersor); tersor.__version__",
        "import tersor; tersor.Recipe; tersor.Goal; tersor.Artifact; tersor.TersorError; tersor.Data",
        "import tersor; tersor.catalog()",
        "from tersor.core import artifact, context, goal, hardware, imports, report, recipe, schema, statistics",
        "import tersor.cli",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded(code) == set()


@pytest.mark.parametrize("words", [["--help"], ["list"], ["show", "--help"], ["--version"]])
def test_the_command_line_answers_without_torch(words: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['tersor', *{words!r}]\n"
        "from tersor.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert loaded(code) == set()


def test_the_whole_public_surface_is_there() -> None:
    import tersor

    for name in tersor.__all__:
        assert getattr(tersor, name) is not None
    assert set(dir(tersor)) >= set(tersor.__all__)
    with pytest.raises(AttributeError, match="module 'tersor' has no attribute 'compres'"):
        _ = tersor.compres
