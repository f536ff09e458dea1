"""The errors that end a program with one line. Mistakes inside the package keep their traceback."""


class InputError(Exception):
    """A mistake in a config, a data file or a checkpoint.

    Its message is one line that names the thing, its place and what is allowed. The program prints it and exits with
    status 2.
    """


class Diverged(Exception):
    """A run whose training has become NaN or infinite. Its message says where, and what would help."""


class FailedRuns(Exception):
    """Some runs of an experiment failed; the others are finished. The program prints the message, status 1."""
