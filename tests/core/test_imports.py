"""Importing what a user names, and the messages when that fails."""

import sys

import pytest

from tersor.core.errors import DataError, ModelError
from tersor.core.imports import call_object, import_object


@pytest.fixture
def script(tmp_path):
    def write(text: str, name: str = "script.py"):
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


def test_reads_a_function_from_a_file(script):
    file = script("def factory():\n    return 42\n")
    assert import_object(f"{file}:factory")() == 42
    assert call_object(f"{file}:factory") == 42


def test_a_script_is_imported_once_for_each_content(script):
    file = script("calls = []\ndef factory():\n    calls.append(1)\n    return len(calls)\n")
    assert [call_object(f"{file}:factory") for _ in range(2)] == [1, 2]
    file.write_text("def factory():\n    return 'new'\n")
    import os

    os.utime(file, ns=(1, 1))
    assert call_object(f"{file}:factory") == "new"


def test_two_scripts_of_one_name_do_not_mix(tmp_path):
    for word in ("one", "two"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "script.py").write_text(f"def factory():\n    return {word!r}\n")
    assert call_object(f"{tmp_path / 'one' / 'script.py'}:factory") == "one"
    assert call_object(f"{tmp_path / 'two' / 'script.py'}:factory") == "two"


def test_siblings_are_found_while_importing_and_calling(script):
    script("VALUE = 7\n", "sibling_for_imports_test.py")
    script("VALUE = 8\n", "late_sibling_for_imports_test.py")
    file = script(
        "import sibling_for_imports_test\n"
        "def factory():\n"
        "    import late_sibling_for_imports_test as late\n"
        "    return sibling_for_imports_test.VALUE + late.VALUE\n"
    )
    before = list(sys.path)
    assert call_object(f"{file}:factory") == 15
    assert sys.path == before


def test_dotted_modules_are_looked_for_in_the_current_folder(script, tmp_path, monkeypatch):
    script("class Inner:\n    factory = staticmethod(lambda: 3)\n", "package_for_imports_test.py")
    monkeypatch.chdir(tmp_path)
    assert call_object("package_for_imports_test:Inner.factory") == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "'nothing' does not name a factory; write FILE.py:NAME or PACKAGE.MODULE:NAME"),
        ("x.py:", "does not name a factory"),
        ("missing_file.py:factory", "there is no file 'missing_file.py'"),
        ("no.such.module:factory", "there is no module 'no.such.module' here"),
        ("not-a-module:factory", "neither a .py file nor the dotted name of a module"),
    ],
)
def test_places_that_are_not_there(text, said):
    with pytest.raises(ModelError) as caught:
        import_object(text, what="factory")
    assert said in str(caught.value)


def test_a_file_without_a_name_lists_its_functions(script):
    file = script("def small():\n    pass\ndef large():\n    pass\n")
    with pytest.raises(ModelError, match=r"It has small, large"):
        import_object(str(file), what="factory")


def test_a_misspelt_name_suggests_the_nearest(script):
    file = script("def resnet56():\n    pass\n")
    with pytest.raises(ModelError, match=r"has no factory 'resnet65'. Did you mean 'resnet56'\?"):
        import_object(f"{file}:resnet65", what="factory")


def test_a_misspelt_file_suggests_the_nearest(script):
    file = script("", "network.py")
    with pytest.raises(ModelError, match=r"Did you mean 'network.py'\?"):
        import_object(f"{file.parent / 'netwrok.py'}:factory")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "x = 1\ny = undefined\n",
            ":2: NameError: name 'undefined' is not defined (y = undefined)",
        ),
        ("def f(:\n", ":1: SyntaxError:"),
        ("import no_such_package_at_all\n", ":1: ModuleNotFoundError: No module named 'no_such"),
        ("raise SystemExit(3)\n", ":1: it ends the program (SystemExit: 3); put that under"),
        ("raise ValueError\n", ":1: ValueError (raise ValueError)"),
    ],
)
def test_a_failing_import_names_file_and_line(script, body, said):
    file = script(body)
    with pytest.raises(ModelError) as caught:
        import_object(f"{file}:factory")
    assert f"{file}{said}" in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert not [
        name
        for name in sys.modules
        if name.endswith("_script")
        and "tersor_user" in name
        and sys.modules[name].__file__ == str(file)
    ]


def test_a_failing_call_names_the_users_line_not_the_librarys(script):
    file = script("import json\ndef factory():\n    return json.loads('{')\n")
    with pytest.raises(DataError) as caught:
        call_object(f"{file}:factory", error=DataError, what="data function")
    assert f"data function 'factory' of {str(file)!r} failed: {file}:3: JSONDecodeError" in str(
        caught.value
    )
    assert caught.value.__cause__ is not None


def test_functions_that_need_arguments_are_refused(script):
    file = script("def factory(width, depth=2, *, bits):\n    pass\n")
    with pytest.raises(
        ModelError, match=r"needs the arguments width, bits; name one that needs none"
    ):
        call_object(f"{file}:factory")


def test_what_is_not_a_function_is_refused(script):
    file = script("value = 3\n")
    with pytest.raises(ModelError, match=r"'value' in .* is int, not a factory to call"):
        call_object(f"{file}:value", what="factory")
