"""Two models' answers compared, for the head-to-head stage and for checkpoint selection."""

from pathlib import Path

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction, Response
from selfalign.engines.protocol import Engine
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.comparisons import ResponsePair
from selfalign.judges.protocol import JudgeContext
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Counts, StageOutput


def compare_answers(
    out: StageOutput,
    *,
    judge: PairwiseComparator,
    policy: PolicyCheckpoint | None,
    instructions: Path,
    answers: Path,
    opponent: Path,
    engine: Engine,
    seed: int,
) -> Counts:
    """Compare two models' first answers to each instruction in both orders.

    Args:
        out: gets comparisons.jsonl; `first` is the model, `second` its opponent, whose ids are each its own.
        judge: who compares, and how.
        policy: who judges; None for a server.
        instructions: an instructions.jsonl.
        answers: the model's responses.jsonl.
        opponent: the other's.
        engine: says in what precision the judge computes.
        seed: of the context; a comparator draws nothing.

    Raises:
        SelfalignError: both have answered none of the instructions, or too many comparisons have no verdict.
    """
    asked = read_records(instructions, Instruction)
    mine, theirs = ({r.instruction_id: r for r in reversed(read_records(a, Response))} for a in (answers, opponent))
    pairs = [ResponsePair(one, mine[one.id], theirs[one.id]) for one in asked if one.id in mine and one.id in theirs]
    if not pairs:
        raise SelfalignError(f"{out.label}: there is no instruction that both models answered")
    with out.journal(2 * len(pairs), "verdicts") as journal:
        context = JudgeContext(
            journal=journal,
            policy=policy,
            reference=None,
            engine=engine,
            seed=seed,
        )
        with context:
            comparisons, counts = judge.compare_models(context, pairs, out.label)
    write_records(out.path / "comparisons.jsonl", comparisons)
    return counts | context.counts | {"dropped": {"unanswered": len(asked) - len(pairs), **counts["dropped"]}}
