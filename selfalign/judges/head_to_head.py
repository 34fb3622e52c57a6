"""Two models' answers compared, for the head-to-head stage and for checkpoint selection."""

from pathlib import Path

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction, Response
from selfalign.engines.protocol import Backend
from selfalign.judges.comparator import Referee
from selfalign.judges.comparisons import Duel
from selfalign.judges.protocol import Bench
from selfalign.models.checkpoint import PolicyFiles
from selfalign.store.artifacts import Counts, Workspace


def compare_answers(
    out: Workspace,
    *,
    judge: Referee,
    policy: PolicyFiles | None,
    instructions: Path,
    answers: Path,
    opponent: Path,
    generate: Backend,
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
        generate: says in what precision the judge computes.
        seed: of the bench; a referee draws nothing.

    Raises:
        SelfalignError: both have answered none of the instructions, or too many comparisons have no verdict.
    """
    asked = read_records(instructions, Instruction)
    mine, theirs = ({r.instruction_id: r for r in reversed(read_records(a, Response))} for a in (answers, opponent))
    duels = [Duel(one, mine[one.id], theirs[one.id]) for one in asked if one.id in mine and one.id in theirs]
    if not duels:
        raise SelfalignError(f"{out.label}: there is no instruction that both models answered")
    with out.journal(2 * len(duels), "verdicts") as journal:
        bench = Bench(
            journal=journal,
            policy=policy,
            reference=None,
            generate=generate,
            seed=seed,
        )
        with bench:
            comparisons, counts = judge.decide(bench, duels, out.label)
    write_records(out.path / "comparisons.jsonl", comparisons)
    return counts | bench.counts | {"dropped": {"unanswered": len(asked) - len(duels), **counts["dropped"]}}
