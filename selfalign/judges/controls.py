"""The judges of the negative controls: one that guesses, and one that calls the worst the best."""

from collections.abc import Sequence

from selfalign.core.files import digest_text
from selfalign.judges.protocol import InstructionResponse
from selfalign.judges.verifier import passed_checks


def random(batch: Sequence[InstructionResponse]) -> list[float]:
    """Return scores from 0 to 1 that know nothing of the response but its digest, so that they stay the same."""
    return [int(digest_text(one.response.id + one.response.text)[:8], 16) / 0xFFFFFFFF for one in batch]


def swapped(batch: Sequence[InstructionResponse]) -> list[float]:
    """Return the share of the instruction's checks that the response does not pass."""
    return [1 - passed_checks(one.instruction, one.response).score for one in batch]
