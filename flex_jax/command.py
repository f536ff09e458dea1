"""What all commands do: one line for what the user can mend, and an end in good order when they are stopped."""

import argparse
import re
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from flex_jax.errors import FailedRuns, InputError
from flex_jax.terminal import tell

PENDING: list[int] = []  # the signal that has asked this process to end
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the signals that end a command in good order


class Stopped(BaseException):
    """A signal asks the process to end. Like KeyboardInterrupt it is no Exception, so that nothing goes on after it."""

    def __init__(self, signal_number: int):
        self.signal = signal.Signals(signal_number)


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError; argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run_command(function: Callable[[list[str]], None], arguments: list[str], *, interrupted: str) -> int:
    """Runs a command and returns its exit status.

    It is 0, 2 with one line for an InputError or for a file that cannot be read or written, 1 if runs failed, or with
    the line `interrupted` 130 after Ctrl-C and 143 after SIGTERM or SIGHUP. A mistake inside the package keeps its
    traceback. After a signal the command finishes what it is writing; a second signal ends the process at once.
    """
    PENDING.clear()
    former = _handle_signals()
    try:
        for argument in arguments:
            if re.search("[\0\ud800-\udfff]", argument):  # Python gives other bytes of the command line so
                raise InputError(f"argument {argument:.80}: not UTF-8")
        function(arguments)
    except InputError as error:
        tell(f"error: {error}")
        return 2
    except OSError as error:
        tell(f"error: {_describe(error)}")
        return 2
    except FailedRuns as error:
        tell(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        tell(f"interrupted: {interrupted}")
        return 130
    except Stopped as stop:
        tell(f"stopped by {stop.signal.name}: {interrupted}")
        return 143
    finally:
        PENDING.clear()
        for number, handler in former.items():
            signal.signal(number, handler)
    return 0


def raise_if_stopped() -> None:
    """Raises what ends a command if a signal has asked for it.

    The signal's handler does so at once, but Python drops an exception that it raises within a callback of the garbage
    collector. So long loops ask again.
    """
    if PENDING:
        raise KeyboardInterrupt if PENDING[0] == signal.SIGINT else Stopped(PENDING[0])


def _describe(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _handle_signals() -> dict[signal.Signals, Any]:
    """Makes the signals raise, once, except those that are ignored (nohup). Returns the handlers before."""

    def stop(number, frame):
        for one in former:
            signal.signal(one, signal.SIG_DFL)
        PENDING.append(number)
        raise_if_stopped()

    if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
        return {}
    former = {number: signal.getsignal(number) for number in STOPPING}
    former = {number: handler for number, handler in former.items() if handler is not signal.SIG_IGN}
    for number in former:
        signal.signal(number, stop)
    return former
