"""compare: answers of two models to the same instructions + who judges → who won, head to head."""

from dataclasses import dataclass
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Instruction, Response, read_records, write_records
from selfalign.engines.protocol import Backend
from selfalign.judges.comparator import Referee
from selfalign.judges.comparisons import Duel
from selfalign.judges.protocol import Bench
from selfalign.models.checkpoint import PolicyFiles
from selfalign.store.artifacts import Artefact, Counts, Workspace, together


@dataclass(kw_only=True, slots=True)
class HeadToHead(Referee):
    """Who compares the answers of two models."""

    model: str = "sft"
    key: ClassVar[str] = "evaluate.head_to_head"


@together
def compare(
    out: Workspace,
    *,
    judge: Referee,
    policy: Artefact | None,
    instructions: Artefact,
    answers: Artefact,
    opponent: Artefact,
    generate: Backend,
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
        generate: says in what precision the judge computes.
        seed: of the bench; a referee draws nothing.

    Raises:
        SelfalignError: both have answered none of the instructions, or too many comparisons have no verdict.
    """
    asked = read_records(instructions.path / "instructions.jsonl", Instruction)
    mine, theirs = ({r.instruction_id: r for r in reversed(answers_of(a))} for a in (answers, opponent))
    duels = [Duel(one, mine[one.id], theirs[one.id]) for one in asked if one.id in mine and one.id in theirs]
    if not duels:
        raise SelfalignError(f"{out.label}: the two models have answered no instruction in common")
    with out.journal(2 * len(duels), "verdicts") as journal:
        bench = Bench(
            journal=journal,
            policy=PolicyFiles(policy.path) if policy else None,
            reference=None,
            generate=generate,
            seed=seed,
        )
        with bench:
            comparisons, counts = judge.decide(bench, duels, out.label)
    write_records(out.path / "comparisons.jsonl", comparisons)
    return counts | bench.counts | {"dropped": {"unanswered": len(asked) - len(duels), **counts["dropped"]}}


def answers_of(answers: Artefact) -> list[Response]:
    """The responses of an artefact."""
    return read_records(answers.path / "responses.jsonl", Response)
