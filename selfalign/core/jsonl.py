"""Records of several files side by side, a few at a time: what lets a stage work in constant memory.

The stages write their records in the order of the instructions, so files are joined by walking through them together.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import HasId

CHUNK = 4096
"""How many records a stage holds at a time. Batches are planned within such a chunk, so they depend on the records
alone; it is large enough to find prompts of like length, and for many processes to share."""

L = TypeVar("L", bound=HasId)
T = TypeVar("T")


def chunks(records: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """The records in lists of this size, the last one shorter."""
    remaining = iter(records)
    while chunk := list(islice(remaining, size)):
        yield chunk


def follow(
    leaders: Iterable[L], followers: Iterable[T], owner: Callable[[T], str], file: Path
) -> Iterator[tuple[L, list[T]]]:
    """Each leader with the followers that belong to it, none or several; both come in the same order.

    Args:
        leaders: records, one at a time.
        followers: what belongs to them.
        owner: the id of the leader a follower belongs to.
        file: where the followers were read, for the message.

    Raises:
        SelfalignError: behind the last leader, a follower is left: its leader is missing or was passed before.
    """
    remaining = iter(followers)
    follower = next(remaining, None)
    for leader in leaders:
        own: list[T] = []
        while follower is not None and owner(follower) == leader.id:
            own.append(follower)
            follower = next(remaining, None)
        yield leader, own
    if follower is not None:
        raise SelfalignError(
            f"{file}: what belongs to {owner(follower)!r} is out of order, or {owner(follower)!r} is missing; files of "
            "one run are joined in the order of their records"
        )
