"""The one exception that means "the user can mend this"."""


class InputError(Exception):
    """A mistake in a config, a data file or a checkpoint.

    Its message is one line that names the thing, its place and what is allowed; the program prints it and exits
    with status 2.
    """
