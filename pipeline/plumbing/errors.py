"""Errors that are the user's to mend: one clear message, exit status 2, no traceback."""


class InputError(ValueError):
    """Bad input: the message names file, key, value and remedy."""


class StageError(RuntimeError):
    """A run that could not reach what it promised (a parity failure, say): exit status 1, no traceback."""
