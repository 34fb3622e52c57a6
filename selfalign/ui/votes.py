"""Votes between two replies: preference pairs in a JSONL file that `data=pairs data.path=FILE` takes."""

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from selfalign.core.errors import SelfalignError
from selfalign.core.failures import naming
from selfalign.core.files import digest_json
from selfalign.core.records import FinishReason, Message
from selfalign.ui.chat import Conversation, Reply


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """A row of the file. `chosen_model` and `rejected_model` say who wrote the replies; training passes them over."""

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_model: str
    rejected_model: str


def vote_of(conversation: Conversation, chosen: int) -> Vote:
    """Return the vote for one of the two replies to the last question.

    Raises:
        SelfalignError: there are no two replies, or training could not learn from the pair.
    """
    replies = conversation.exchanges[-1].replies if conversation.exchanges else []
    if len(replies) != 2:
        raise SelfalignError("a vote needs replies of two models: choose a second model and ask something")
    for reply in replies:
        _check_usable(reply)
    best, worst = replies[chosen], replies[1 - chosen]
    if best.text.strip() == worst.text.strip():
        raise SelfalignError("both replies are the same text, so neither can be better: ask again")
    system: list[Message] = [{"role": "system", "content": best.system}] if best.system else []
    prompt = [*system, *conversation.messages()]
    return Vote(
        id=digest_json([prompt, best.whole, worst.whole])[:16],
        prompt=prompt,
        chosen=best.whole,
        rejected=worst.whole,
        chosen_model=best.model,
        rejected_model=worst.model,
    )


def _check_usable(reply: Reply) -> None:
    if reply.finish_reason is not FinishReason.EOS:
        raise SelfalignError(
            f"the reply of {reply.model} was cut at the token limit, and training would teach to end there: raise the "
            "limit and ask again"
        )
    if not reply.text.strip():
        raise SelfalignError(f"the reply of {reply.model} is empty: ask again")


def append_vote(path: Path, vote: Vote) -> int:
    """Append a vote to the file, which is made if it is missing, and return the number of its votes.

    The line is on disk when this returns. What a killed program left of a line is ended first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a+b") as file:
        file.seek(0)
        before = file.read()
        torn = before and not before.endswith(b"\n")
        file.write(b"\n" * bool(torn) + msgspec.json.encode(vote) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return before.count(b"\n") + bool(torn) + 1
