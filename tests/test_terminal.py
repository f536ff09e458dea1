"""Text from data, files and models changes neither what a terminal shows nor how many lines it has."""

import pytest

from flex_jax.checks import ANY_TEXT, TEXT
from flex_jax.command import run_command
from flex_jax.errors import FailedRuns, InputError
from flex_jax.reporting.tables import _align
from flex_jax.terminal import tell, visible

ATTACK = "red \x1b[31m\x00 back\x08 C1\x9b2J \u202etxt.exe\u2066 half \ud83d"
SHOWN = r"red \x1b[31m\x00 back\x08 C1\x9b2J \u202etxt.exe\u2066 half \ud83d"


def test_what_would_act_on_a_terminal_is_shown_as_an_escape():
    assert visible(ATTACK) == SHOWN
    for text in ("plain", "two\nlines\tand a tab", "Größe, 東京, नमस्ते, 👩‍🔬"):
        assert visible(text) == text


@pytest.mark.parametrize("error", [InputError(f"{ATTACK}\nmore"), OSError(2, "none", f"{ATTACK}\nmore")])
def test_an_error_line_is_one_line_of_visible_text(error, capsys):
    def fail(arguments):
        raise error

    assert run_command(fail, [], interrupted="") == 2
    assert capsys.readouterr().err.startswith(f"flex_jax: error: {SHOWN} more")


def test_other_lines_are_too(capsys):
    def fail(arguments):
        raise FailedRuns(ATTACK)

    tell(f"{ATTACK}\n")
    assert run_command(fail, [], interrupted="") == 1
    assert capsys.readouterr().err == f"flex_jax: {SHOWN}\nflex_jax: error: {SHOWN}\n"
    assert SHOWN in _align([["method"], [ATTACK]])


@pytest.mark.parametrize("argument", ["half \ud83d", "byte \udcff", "a\0b"])
def test_an_argument_that_is_no_text_is_refused(argument, capsys):
    def succeed(arguments):
        raise AssertionError("it must not run")

    assert run_command(succeed, ["--prompt", argument], interrupted="") == 2
    assert capsys.readouterr().err.startswith("flex_jax: error: argument ")


@pytest.mark.parametrize("value", ["a\0b", "half \ud83d"])
def test_a_config_has_no_such_text(value):
    assert not TEXT.accepts(value) and not ANY_TEXT.accepts(value)
