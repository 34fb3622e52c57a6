"""judge: instructions + responses + who judges → judgements and scores.

The ways to judge stand in `selfalign/judges/`; here they are given what they need, their failures are held against
a budget, and what they say is brought into one form. `parse_score` is how written judgements are read.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence

from selfalign.errors import SelfalignError
from selfalign.generation import Backend
from selfalign.judges.bench import (
    Bench,
    Judge,
    Subject,
    average,
    last_attempts,
    tied_share,
)
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.external import ExternalScore
from selfalign.judges.implicit import ImplicitReward
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.parsing import Parsed, parse_score
from selfalign.judges.sampled import SampledScore
from selfalign.metrics import judgement_statistics
from selfalign.models import PolicyFiles
from selfalign.records import (
    Instruction,
    Judgement,
    JudgementStatus,
    Response,
    ResponseScore,
    read_records,
    write_records,
)
from selfalign.statistics import entropy
from selfalign.store import Artefact, Counts, Workspace, together

__all__ = [
    "ExpectedScore",
    "ExternalScore",
    "ImplicitReward",
    "Judge",
    "Pairwise",
    "Parsed",
    "SampledScore",
    "judge",
    "parse_score",
]

logger = logging.getLogger(__name__)


@together
def judge(
    out: Workspace,
    *,
    judge: Judge,
    policy: Artefact | None,
    reference: Artefact | None,
    instructions: Artefact,
    responses: Artefact,
    generate: Backend,
    seed: int,
) -> Counts:
    """Judges every response.

    Args:
        out: gets judgements.jsonl (every attempt), scores.jsonl (one a response) and, where responses are compared
            with one another, comparisons.jsonl.
        judge: the way to judge.
        policy: who judges; None for a judge that is no policy of this run.
        reference: what the judging policy was trained from; None for judges that do not compare the two.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        generate: the backend for judgements that are written.
        seed: draws their tokens.

    Raises:
        SelfalignError: too many judgements carry no score; what came back is shown, and kept for the next try.
    """
    asked = {record.id: record for record in read_records(instructions.path / "instructions.jsonl", Instruction)}
    answers = read_records(responses.path / "responses.jsonl", Response)
    subjects = [Subject(asked[answer.instruction_id], answer) for answer in answers]
    with out.journal(judge.wanted(subjects), "judgements") as journal:
        bench = Bench(
            journal=journal,
            policy=PolicyFiles(policy.path) if policy else None,
            reference=PolicyFiles(reference.path) if reference else None,
            generate=generate,
            seed=seed,
        )
        judged = judge.judge(bench, subjects)
    judgements = judged.judgements
    counted = last_attempts(judgements)
    failed = [judgement for judgement in counted if judgement.status is not JudgementStatus.OK]
    if len(failed) > judge.max_failed_share * len(counted) or len(failed) == len(counted):
        raise SelfalignError(_failure(out.label, counted, failed))
    order = {subject.response.id: index for index, subject in enumerate(subjects)}
    judgements.sort(key=lambda judgement: (order[judgement.response_id], judgement.sample, judgement.attempt))
    scores = average(subjects, judgements, judge.minimum_valid)
    write_records(out.path / "judgements.jsonl", judgements)
    write_records(out.path / "scores.jsonl", scores)
    if judged.comparisons:
        write_records(out.path / "comparisons.jsonl", judged.comparisons)
    return {
        "judgements": len(judgements),
        "retries": len(judgements) - len(counted),
        "unjudged_responses": sum(score.score is None for score in scores),
        "dropped": dict(sorted(Counter(judgement.status.value for judgement in failed).items())),
        **judgement_statistics(judgements),
        **_constancy(out.label, judge, subjects, scores),
        **judged.counts,
    }


def _constancy(
    label: str, judge: Judge, subjects: Sequence[Subject], scores: Sequence[ResponseScore]
) -> dict[str, float]:
    """How much the scores tell responses apart; warns when that is next to nothing."""
    known = {score.id: score.score for score in scores if score.score is not None}
    if not known:
        return {}
    tied, nats, variances = tied_share(subjects, known), entropy(list(known.values())), _variances(scores)
    constant = len(known) > 1 and (nats < judge.alarm.entropy or (tied or 0.0) >= judge.alarm.tied_share)
    if constant:
        ties = "" if tied is None else f"{tied:.0%} of the instructions have equal scores for all their responses, "
        logger.warning(
            "%s: the judge says nearly the same of everything (%sentropy of the scores %.2f nats); what is learnt "
            "from it is noise",
            label,
            ties,
            nats,
        )
    spread = {"judge/score_entropy": nats, "judge/constant": float(constant)}
    return spread | ({} if tied is None else {"judge/tied_share": tied}) | variances


def _variances(scores: Sequence[ResponseScore]) -> dict[str, float]:
    known = [score.variance for score in scores if score.variance is not None]
    return {"judge/variance": math.fsum(known) / len(known)} if known else {}


def _failure(label: str, counted: list[Judgement], failed: list[Judgement]) -> str:
    reasons = dict(Counter(judgement.status.value for judgement in failed))
    shown = "; ".join(repr(judgement.text[:80]) for judgement in failed[:3])
    return (
        f"{label}: {len(failed)} of {len(counted)} judgements carry no score ({reasons}); the judge wrote for "
        f"example {shown}. Try judge=expected_score, a model that can follow the rubric, or a larger "
        "judge.max_failed_share"
    )
