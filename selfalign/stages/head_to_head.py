"""head_to_head: responses of two models to the same instructions + a judge → wins, ties and losses."""

from dataclasses import dataclass
from typing import ClassVar

from selfalign.engines.protocol import Engine
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.head_to_head import compare_answers
from selfalign.judges.protocol import who_judges
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage


@dataclass(kw_only=True, slots=True)
class HeadToHead(PairwiseComparator):
    """The judge that compares the responses of two models."""

    model: str = "sft"
    key: ClassVar[str] = "evaluate.head_to_head"


def size(*, judge: PairwiseComparator, policy: Artifact | None, answers: Artifact, **others: object) -> Size:
    """Return the number of responses and the judge."""
    count = records_in(answers, "responses")
    what = f"{amount(count)} answers" if count else "every turn"
    return Size(f"{what} in both orders, judged by {who_judges(judge, policy)}", {})


@stage(size=size, all_ranks=True)
def head_to_head(
    out: StageOutput,
    *,
    judge: PairwiseComparator,
    policy: Artifact | None,
    instructions: Artifact,
    answers: Artifact,
    opponent: Artifact,
    engine: Engine,
    seed: int,
) -> Counts:
    """Compare two models' first responses to each instruction, in both orders.

    Args:
        out: receives comparisons.jsonl; `first_id` is the model's response, `second_id` the opponent's.
        judge: the comparator.
        policy: the policy that judges; None for a server.
        instructions: instructions.jsonl.
        answers: the model's responses.jsonl.
        opponent: the opponent's responses.jsonl.
        engine: its dtype is the judge's precision.
        seed: seeds the judge's context; a comparator samples nothing.

    Raises:
        SelfalignError: no instruction has responses of both models, or too many comparisons have no verdict.
    """
    return compare_answers(
        out,
        judge=judge,
        policy=PolicyCheckpoint(policy.path) if policy else None,
        instructions=instructions.path / "instructions.jsonl",
        answers=answers.path / "responses.jsonl",
        opponent=opponent.path / "responses.jsonl",
        engine=engine,
        seed=seed,
    )
