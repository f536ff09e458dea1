"""What all commands do: one line and exit status 2 for a mistake that the user can mend."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from flex_jax.errors import FailedRuns, InputError


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError; argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run_command(function: Callable[[list[str]], None], arguments: list[str], *, interrupted: str) -> int:
    """Runs a command and returns its exit status.

    It is 0, 2 with one line for an InputError, 1 if runs failed, or 130 with the line `interrupted`. A mistake inside
    the package keeps its traceback.
    """
    try:
        function(arguments)
    except InputError as error:
        print("flex_jax: error:", *str(error).split(), file=sys.stderr)  # one line, whatever the message holds
        return 2
    except FailedRuns as error:
        print(f"flex_jax: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"flex_jax: interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0
