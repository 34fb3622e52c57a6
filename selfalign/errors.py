"""The one exception a user is meant to read."""


class SelfalignError(Exception):
    """Something the user can mend: the message says what was expected, what came, where, and what to do.

    The command line prints it as one line and exits with 1; it is never a bug of selfalign's own.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, in its first line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
