"""judge: instructions + responses + a judge → judgements and scores.

The judges are in `selfalign/judges/`. This stage gives them their inputs, limits their failures, and writes their
judgements in one format. `parse_score` reads the score of a written judgement.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import chunks, join_sorted, open_records, read_scores, stream_records
from selfalign.core.records import (
    Comparison,
    FinishReason,
    Instruction,
    Judgement,
    JudgementStatus,
    Response,
    ResponseScore,
)
from selfalign.engines.protocol import Engine
from selfalign.judges.comparisons import bias_statistics, unread_text
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.external import ExternalScore
from selfalign.judges.implicit import ImplicitReward
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.parsing import Parsed, parse_score
from selfalign.judges.protocol import (
    NO_MODEL,
    InstructionResponse,
    Judge,
    JudgeContext,
    JudgeOutput,
    average,
    last_attempts,
    ties,
    unjudged,
    who_judges,
)
from selfalign.judges.sampled import SampledScore
from selfalign.judges.unread import Unread
from selfalign.judges.written import WrittenScore
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Sums, add_sums, averages
from selfalign.metrics.intervals import RunningMean, entropy
from selfalign.metrics.summaries import judgement_statistics
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import MANY, Size, amount, records_in, stage

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

OFTEN_BEYOND = 0.1
"""A share of judgements outside the scale above which the rubric probably has another scale."""


def size(
    *, judge: Judge, policy: Artifact | None, instructions: Artifact, responses: Artifact, **others: object
) -> Size:
    """Return the number of judgements or comparisons, and the judge."""
    count, answers = records_in(instructions, "instructions"), records_in(responses, "responses")
    text = f"{amount(answers)} responses" + (f" × {judge.num_samples}" if isinstance(judge, WrittenScore) else "")
    if isinstance(judge, Pairwise):
        compared = count * judge.pairs_of(math.ceil(answers / count)) if math.isfinite(answers) else MANY
        text = f"{amount(compared)} comparisons × 2 orders"
    return Size(f"{text} by {type(judge).__name__}, {who_judges(judge, policy)}", {"scores": answers})


@stage(size=size, all_ranks=True)
def judge(
    out: StageOutput,
    *,
    judge: Judge,
    policy: Artifact | None,
    reference: Artifact | None,
    instructions: Artifact,
    responses: Artifact,
    engine: Engine,
    seed: int,
    members: dict[str, Artifact] | None = None,
) -> Counts:
    """Judge every response.

    Args:
        out: receives judgements.jsonl (every attempt), scores.jsonl (one for each response) and, if the judge compares
            responses, comparisons.jsonl.
        judge: the judge.
        policy: the policy that judges; None if the judge is no policy of this run.
        reference: the policy that the judging policy was trained from; None if the judge needs none.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        engine: generates written judgements.
        seed: seeds their sampling.
        members: {member of a panel: scores.jsonl}; None for a judge that judges by itself.

    Raises:
        SelfalignError: too many judgements have no score. Some are quoted, and all are kept for the next attempt.
    """

    def batches() -> Iterator[list[InstructionResponse]]:
        prompts = stream_records(instructions.path / "instructions.jsonl", Instruction)
        file = responses.path / "responses.jsonl"
        groups = join_sorted(prompts, stream_records(file, Response), lambda response: response.instruction_id, file)
        for chunk in chunks(groups, judge.instructions_per_call):
            yield [InstructionResponse(instruction, response) for instruction, group in chunk for response in group]

    tally = JudgeCounts()
    names = ["judgements", "scores", *(["comparisons"] if isinstance(judge, Pairwise) else [])]
    wanted = sum(judge.wanted(answered(subjects)) for subjects in batches())
    with out.journal(wanted, "judgements") as journal, ExitStack() as opened:
        write = {name: opened.enter_context(open_records(out.path / f"{name}.jsonl")) for name in names}
        context = JudgeContext(
            journal=journal,
            policy=PolicyCheckpoint(policy.path) if policy else None,
            reference=PolicyCheckpoint(reference.path) if reference else None,
            engine=engine,
            seed=seed,
            member_scores={name: read_scores(part.path) for name, part in (members or {}).items()},
        )
        opened.enter_context(context)
        for subjects in batches():
            asked, silent = answered(subjects), without_answer(subjects)
            judged = judge.judge(context, asked) if asked else JudgeOutput(judgements=[])
            scores = average(subjects, judged.judgements, judge.min_valid_samples)
            tally.add(subjects, judged, scores)
            tally.truncated += len(silent)
            made = (in_order(subjects, [*judged.judgements, *silent]), scores, judged.comparisons)
            for name, records in zip(names, made, strict=False):
                write[name](records)
        if any(failed > judge.max_failure_rate * wanted for failed, wanted in tally.shares):
            raise SelfalignError(_failure(out.label, judge, tally))
        if tally.wanted and tally.failed.total() == tally.wanted:
            logger.warning("%s", _failure(out.label, judge, tally))
        _check_scale(out.label, judge, tally)
    compared = out.path / "comparisons.jsonl"
    return {
        catalog.JUDGEMENTS.name: tally.judgements,
        catalog.RETRIES.name: tally.judgements - tally.wanted,
        catalog.UNJUDGED_RESPONSES.name: tally.unjudged,
        "dropped": dict(sorted(tally.dropped.items())),
        **judgement_statistics(stream_records(out.path / "judgements.jsonl", Judgement)),
        **_constancy(out.label, judge, tally),
        **tally.counts,
        **context.counts,
        **averages(tally.means),
        **(bias_statistics(stream_records(compared, Comparison)) if compared.exists() else {}),
    }


def answered(subjects: Sequence[InstructionResponse]) -> list[InstructionResponse]:
    """Those whose response has an answer to judge."""
    return [subject for subject in subjects if subject.response.finish_reason is not FinishReason.TRUNCATED]


def without_answer(subjects: Sequence[InstructionResponse]) -> list[Judgement]:
    """The judgements, without a score, of those whose response is a thought without an end: nobody is asked."""
    silent = [subject for subject in subjects if subject.response.finish_reason is FinishReason.TRUNCATED]
    return [unjudged(subject, "nobody", JudgementStatus.TRUNCATED, "") for subject in silent]


def in_order(subjects: Sequence[InstructionResponse], judgements: Sequence[Judgement]) -> list[Judgement]:
    """Sort judgements by response, then sample, then attempt."""
    order = {subject.response.id: index for index, subject in enumerate(subjects)}
    return sorted(judgements, key=lambda one: (order[one.response_id], one.sample, one.attempt))


@dataclass(slots=True)
class JudgeCounts:
    """Running counts of judgements.

    Attributes:
        judgements: number of attempts.
        wanted: number of final judgements, the last attempt of each.
        failed: {reason: number of final judgements without a score}.
        compared: number of comparisons, if the judge compares responses.
        undecided: number of comparisons without a verdict.
        unread: texts of the judge that have no score or verdict.
        unjudged: number of responses without a score.
        truncated: number of those without an answer, because their thought has no end.
        scores: {score, to three digits: number of responses}.
        tied: mean over instructions with several judged responses: 1 if their scores are all equal, else 0.
        variances: mean variance of a response's scores.
        counts: the judge's own counts, summed.
        means: the judge's own metrics, to be averaged.
    """

    judgements: int = 0
    wanted: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    undecided: int = 0
    unread: Unread = field(default_factory=Unread)
    unjudged: int = 0
    truncated: int = 0
    scores: Counter[float] = field(default_factory=Counter)
    tied: RunningMean = field(default_factory=RunningMean)
    variances: RunningMean = field(default_factory=RunningMean)
    counts: Counter[str] = field(default_factory=Counter)
    means: Sums = field(default_factory=dict)

    def add(
        self, subjects: Sequence[InstructionResponse], judged: JudgeOutput, scores: Sequence[ResponseScore]
    ) -> None:
        """Add the judgements of some responses."""
        counted = last_attempts(judged.judgements)
        failed = [judgement for judgement in counted if judgement.status is not JudgementStatus.OK]
        self.judgements += len(judged.judgements)
        self.wanted += len(counted)
        self.failed.update(judgement.status.value for judgement in failed)
        compared = [(one.status, unread_text(one)) for one in judged.comparisons if one.outcome is None]
        self.compared += len(judged.comparisons)
        self.undecided += len(compared)
        self.unread.add(compared or [(judgement.status, judgement.text) for judgement in failed])
        known = {score.id: score.score for score in scores if score.score is not None}
        self.unjudged += len(scores) - len(known)
        self.scores.update(round(score, 3) for score in known.values())
        for tied in ties(subjects, known):
            self.tied.add(tied)
        for score in scores:
            if score.variance is not None:
                self.variances.add(score.variance)
        self.counts.update(judged.counts)
        self.means = add_sums(self.means, judged.means)

    @property
    def dropped(self) -> Counter[str]:
        """Judgements without a score, by reason, comparisons without a verdict, and responses without an answer."""
        return self.failed + Counter(unread_comparison=self.undecided, truncated_response=self.truncated)

    @property
    def shares(self) -> list[tuple[int, int]]:
        """(failed, wanted) of judgements, and of comparisons.

        Comparisons count by themselves, because a few with a verdict already give a response its score.
        """
        return [(self.failed.total(), self.wanted), (self.undecided, self.compared)]


def _check_scale(label: str, judge: Judge, tally: JudgeCounts) -> None:
    """Warn if many scores are outside the scale. Those inside are then the low end of a longer scale."""
    beyond = tally.failed[JudgementStatus.OUT_OF_RANGE.value]
    if isinstance(judge, WrittenScore) and beyond > OFTEN_BEYOND * tally.wanted:
        logger.warning(
            "%s: %d of %d judgements are outside judge.min_score=%d to judge.max_score=%d and are left out, so only "
            "the other responses are compared. Set both to the scale of the rubric",
            label,
            beyond,
            tally.wanted,
            judge.min_score,
            judge.max_score,
        )


def _constancy(label: str, judge: Judge, tally: JudgeCounts) -> dict[str, float]:
    """Return how much scores differ between responses. Warn if they are nearly constant."""
    responses = tally.scores.total()
    if not responses:
        return {}
    tied, nats, variance = tally.tied.value, entropy(tally.scores.elements()), tally.variances.value
    constant = responses > 1 and (nats < judge.degeneracy.min_entropy or (tied or 0.0) >= judge.degeneracy.max_tie_rate)
    if constant:
        ties = "" if tied is None else f"{tied:.0%} of the instructions have equal scores for all their responses, "
        logger.warning(
            "%s: the judge's scores are nearly constant (%sentropy of the scores %.2f nats), so training on them is "
            "training on noise. Use a stronger judge or another rubric",
            label,
            ties,
            nats,
        )
    found = {
        catalog.JUDGE_SCORE_ENTROPY.name: nats,
        catalog.JUDGE_CONSTANT.name: float(constant),
        catalog.JUDGE_TIED_SHARE.name: tied,
        catalog.JUDGE_VARIANCE.name: variance,
    }
    return {name: value for name, value in found.items() if value is not None}


def _failure(label: str, judge: Judge, tally: JudgeCounts) -> str:
    better = "Try judge=expected_score, a model that can follow the rubric"
    better = "Mend what cannot be scored" if judge.model == NO_MODEL else better
    undecided = f", {tally.undecided} of {tally.compared} comparisons carry no verdict" if tally.compared else ""
    return (
        f"{label}: {tally.failed.total()} of {tally.wanted} judgements carry no score ({dict(tally.failed)})"
        f"{undecided}; "
        f"{tally.unread.describe(judge.token_setting)}{better}, or raise judge.max_failure_rate"
    )
