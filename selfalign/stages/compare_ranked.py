"""compare_ranked: held-out ranked answers + a comparator → its comparisons of two answers to a question each."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, zip_longest

from selfalign.core.files import derive_seed
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction, Response
from selfalign.engines.protocol import Engine
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.comparisons import ResponsePair, bias_statistics
from selfalign.judges.protocol import JudgeContext, who_judges
from selfalign.metrics import catalog
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, stage


def size(*, judge: PairwiseComparator, policy: Artifact | None, comparisons: int, **others: object) -> Size:
    """Return the largest number of comparisons, and the judge."""
    most = f"at most {comparisons}" if comparisons else amount(float("inf"))
    return Size(f"{most} pairs of ranked answers in both orders, by {who_judges(judge, policy)}", {})


@stage(size=size, all_ranks=True)
def compare_ranked(
    out: StageOutput,
    *,
    judge: PairwiseComparator,
    policy: Artifact | None,
    ranked: Artifact,
    comparisons: int,
    engine: Engine,
    seed: int,
) -> Counts:
    """Compare answers of held-out ranked questions in both orders, as two models' answers are compared.

    A pair is a comparison of its own, like an instruction that two models have answered: `debias_position` takes off
    what the judge prefers in all other comparisons. Comparisons without a verdict are kept and counted; they are
    for the measurement to judge.

    Args:
        out: receives comparisons.jsonl; `first_id` and `second_id` are answers, in the order of the question.
        judge: the comparator.
        policy: the policy that judges; None for a server.
        ranked: instructions.jsonl and responses.jsonl of the questions.
        comparisons: the largest number of comparisons; 0 takes all.
        engine: its dtype is the judge's precision.
        seed: seeds the choice of pairs.
    """
    asked = read_records(ranked.path / "instructions.jsonl", Instruction)
    pairs = ranked_pairs(asked, read_records(ranked.path / "responses.jsonl", Response), comparisons, seed)
    with out.journal(2 * len(pairs), "verdicts") as journal:
        context = JudgeContext(
            journal=journal,
            policy=PolicyCheckpoint(policy.path) if policy else None,
            reference=None,
            engine=engine,
            seed=seed,
        )
        with context:
            compared, counts = judge.compare(context, pairs)
    write_records(out.path / "comparisons.jsonl", compared)
    unread = sum(one.outcome is None for one in compared)
    dropped = {"dropped": {"unread_comparison": unread}} if unread else {}
    return {catalog.COMPARISONS.name: len(compared), **bias_statistics(compared), **counts, **context.counts, **dropped}


def ranked_pairs(
    questions: Sequence[Instruction], answers: Sequence[Response], count: int, seed: int
) -> list[ResponsePair]:
    """Return pairs of answers to the same question, as many of each question as possible.

    Args:
        questions: the questions.
        answers: their answers.
        count: the largest number of pairs; 0 takes all.
        seed: seeds which pairs of a question come first, and which questions have one more.
    """
    of_question: dict[str, list[Response]] = {question.id: [] for question in questions}
    for answer in answers:
        of_question[answer.instruction_id].append(answer)
    rows: list[list[ResponsePair]] = []
    for question in questions:
        pairs = [
            ResponsePair(replace(question, id=f"{one.id}:{other.id}"), one, other)
            for one, other in combinations(of_question[question.id], 2)
        ]
        random.Random(derive_seed(seed, question.id)).shuffle(pairs)
        rows.append(pairs)
    random.Random(seed).shuffle(rows)
    turns = [pair for turn in zip_longest(*rows) for pair in turn if pair is not None]
    return turns[:count] if count else turns
