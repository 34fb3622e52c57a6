"""The one exception that a user is meant to read."""


class SelfalignError(Exception):
    """An error that the user can mend. The message says what was expected, what came, where, and what to do.

    The command line prints it as one line and exits with 1. It is never a bug of selfalign's own.
    """


def one_line(said: object, longest: int = 300) -> str:
    """Return a text on one line, cut to `length` characters."""
    return " ".join(str(said).split())[:longest]


def reason_of(error: BaseException) -> str:
    """Return a library's error on a line of at most 300 characters, with its type where that says more."""
    said = one_line(error)
    plain = said and isinstance(error, ImportError | OSError | ValueError | RuntimeError)
    return said if plain else f"{type(error).__name__}: {said}"
