"""Errors of others, in a line."""

from tersor.core.errors import first_lines, last_line, named_lines


def test_lines_that_say_something():
    error = ValueError("\n  first \n\n second\nlast\n")
    assert first_lines(error) == "first"
    assert first_lines(error, 2) == "first second"
    assert named_lines(error, 2) == "ValueError: first second"
    assert last_line(error) == "last"


def test_an_error_without_words_is_its_class():
    assert first_lines(KeyError()) == "KeyError"
    assert last_line(RuntimeError("  \n")) == "RuntimeError"
    assert named_lines(RuntimeError()) == "RuntimeError: RuntimeError"


def test_what_is_long_is_cut():
    assert len(first_lines(ValueError("x" * 1000))) == 300
