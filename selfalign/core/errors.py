"""The one exception a user is meant to read."""


class SelfalignError(Exception):
    """Something the user can mend: the message says what was expected, what came, where, and what to do.

    The command line prints it as one line and exits with 1; it is never a bug of selfalign's own.
    """


def one_line(said: object, longest: int = 300) -> str:
    """What somebody says, on one line of so many characters at most."""
    return " ".join(str(said).split())[:longest]


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in a line of 300 characters at most; its kind too where that says more."""
    said = one_line(error)
    plain = said and isinstance(error, ImportError | OSError | ValueError | RuntimeError)
    return said if plain else f"{type(error).__name__}: {said}"
