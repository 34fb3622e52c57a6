"""truth: answers to instructions that say what is right → true rates, and how the judge's scores stand against them.

The truth is what `judge=verifier` would score, whoever judges: the share of an instruction's checks that a response
passes. It is measured beside the judge and never trained on.
"""

from collections.abc import Iterator
from typing import NamedTuple

from selfalign.core.jsonl import join_sorted, read_records, read_scores, stream_records, write_records
from selfalign.core.records import Instruction, PreferencePair, Response, ResponseScore
from selfalign.judges.verifier import passed_checks
from selfalign.metrics.truth import judged_truth, true_gaps, true_rates
from selfalign.store.artifacts import Artifact, Counts, StageOutput


class Checked(NamedTuple):
    """The share of an instruction's checks that a response passes, and whose it is."""

    instruction_id: str
    response_id: str
    share: float


def truth(out: StageOutput, *, instructions: Artifact, answers: Artifact, baseline: Artifact | None) -> Counts:
    """Check a model's answers to the evaluation instructions.

    Args:
        out: receives scores.jsonl, the share of the checks that each answer passes.
        instructions: instructions.jsonl, each with an answer or constraints.
        answers: responses.jsonl, one for each instruction.
        baseline: responses.jsonl of M1; None for M1 itself.

    Raises:
        SelfalignError: an instruction does not say what is right.
    """
    own = _check(out, instructions, answers)
    others = {} if baseline is None else {one.instruction_id: one.share for one in _checked(instructions, baseline)}
    return true_rates({one.instruction_id: one.share for one in own}, others)


def truth_of_candidates(
    out: StageOutput, *, instructions: Artifact, responses: Artifact, judgements: Artifact, pairs: Artifact | None
) -> Counts:
    """Check the candidates of an iteration, and compare the judge's scores and the pairs with what is right.

    Args:
        out: receives scores.jsonl, the share of the checks that each candidate passes.
        instructions: instructions.jsonl, each with an answer or constraints.
        responses: responses.jsonl.
        judgements: scores.jsonl of the judge.
        pairs: pairs.jsonl; None where the rule makes none.

    Raises:
        SelfalignError: an instruction does not say what is right.
    """
    own, judged = _check(out, instructions, responses), read_scores(judgements.path)
    groups: dict[str, list[tuple[float, float | None]]] = {}
    for one in own:
        groups.setdefault(one.instruction_id, []).append((one.share, judged.get(one.response_id)))
    made = [] if pairs is None else read_records(pairs.path / "pairs.jsonl", PreferencePair)
    known = {one.response_id: one.share for one in own}
    gaps = [known[pair.chosen_id] - known[pair.rejected_id] for pair in made]
    return judged_truth([*groups.values()]) | true_gaps(gaps)


def _check(out: StageOutput, instructions: Artifact, responses: Artifact) -> list[Checked]:
    """Check responses, and write the shares as scores."""
    checked = list(_checked(instructions, responses))
    scores = (ResponseScore(id=one.response_id, score=one.share, valid=1, variance=None) for one in checked)
    write_records(out.path / "scores.jsonl", scores)
    return checked


def _checked(instructions: Artifact, responses: Artifact) -> Iterator[Checked]:
    file = responses.path / "responses.jsonl"
    asked = stream_records(instructions.path / "instructions.jsonl", Instruction)
    for instruction, group in join_sorted(asked, stream_records(file, Response), lambda r: r.instruction_id, file):
        yield from (Checked(instruction.id, one.id, passed_checks(instruction, one).score) for one in group)
