"""Labelled responses: those that a rule has labelled, and the two sides of preference pairs."""

from collections.abc import Iterator
from pathlib import Path

from selfalign.core.jsonl import stream_records
from selfalign.core.records import LabelledResponse, PreferencePair

LABELLED = "labelled"
"""Name of the file of labelled responses, without its ending."""


def stream_labelled(folder: Path) -> Iterator[LabelledResponse]:
    """Yield the labelled responses of an artifact; of preference pairs, both sides as one labelled response each."""
    labelled, pairs = folder / f"{LABELLED}.jsonl", folder / "pairs.jsonl"
    if labelled.exists():
        yield from stream_records(labelled, LabelledResponse)
    else:
        for pair in stream_records(pairs, PreferencePair):
            yield from sides_of(pair)


def sides_of(pair: PreferencePair) -> tuple[LabelledResponse, LabelledResponse]:
    """Return the chosen response of a pair as a desirable one, and the rejected one as undesirable."""
    chosen = LabelledResponse(
        id=f"{pair.id}/chosen",
        prompt=pair.prompt,
        response=pair.chosen,
        desirable=True,
        score=pair.chosen_score,
        finished=pair.chosen_finished,
        instruction_id=pair.instruction_id,
        response_id=pair.chosen_id,
        ids=pair.chosen_ids,
        thought=pair.chosen_thought,
        thought_prompt=pair.thought_prompt,
        turns=pair.chosen_turns,
        calls=pair.chosen_calls,
    )
    rejected = LabelledResponse(
        id=f"{pair.id}/rejected",
        prompt=pair.prompt,
        response=pair.rejected,
        desirable=False,
        score=pair.rejected_score,
        finished=pair.rejected_finished,
        instruction_id=pair.instruction_id,
        response_id=pair.rejected_id,
        ids=pair.rejected_ids,
        thought=pair.rejected_thought,
        thought_prompt=pair.thought_prompt,
        turns=pair.rejected_turns,
        calls=pair.rejected_calls,
    )
    return chosen, rejected
