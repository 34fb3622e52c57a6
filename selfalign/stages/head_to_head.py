"""head_to_head: answers of two models to the same instructions + who judges → who won, head to head."""

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
    """Who compares the answers of two models."""

    model: str = "sft"
    key: ClassVar[str] = "evaluate.head_to_head"


def size(*, judge: PairwiseComparator, policy: Artifact | None, answers: Artifact, **others: object) -> Size:
    """Every answer, twice."""
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
    """Compares two models' first answers to each instruction in both orders.

    Args:
        out: gets comparisons.jsonl; `first` is the model, `second` its opponent, whose ids are each its own.
        judge: who compares, and how.
        policy: who judges; None for a server.
        instructions: instructions.jsonl.
        answers: the model's responses.jsonl.
        opponent: the other's.
        engine: says in what precision the judge computes.
        seed: of the context; a comparator draws nothing.

    Raises:
        SelfalignError: both have answered none of the instructions, or too many comparisons have no verdict.
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
