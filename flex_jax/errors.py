"""What a program ends with, but for mistakes inside the package: those keep their traceback."""


class InputError(Exception):
    """A mistake in a config, a data file or a checkpoint.

    Its message is one line that names the thing, its place and what is allowed; the program prints it and exits
    with status 2.
    """


class FailedRuns(Exception):
    """Some runs of an experiment broke off, the others are finished; the program prints the message, status 1."""
