"""judge: instructions + responses + who judges → judgements and scores.

The ways to judge stand in `selfalign/judges/`; here they are given what they need, their failures are held against
a budget, and what they say is brought into one form. `parse_score` is how written judgements are read.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import chunks, join_sorted, open_records, stream_records
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
"""A share of judgements beyond the scale that tells of a rubric with another one."""


def size(
    *, judge: Judge, policy: Artifact | None, instructions: Artifact, responses: Artifact, **others: object
) -> Size:
    """How many judgements or comparisons, and who makes them."""
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
        engine: the engine for judgements that are written.
        seed: draws their tokens.

    Raises:
        SelfalignError: too many judgements carry no score; what came back is shown, and kept for the next try.
    """

    def batches() -> Iterator[list[InstructionResponse]]:
        asked = stream_records(instructions.path / "instructions.jsonl", Instruction)
        file = responses.path / "responses.jsonl"
        families = join_sorted(asked, stream_records(file, Response), lambda response: response.instruction_id, file)
        for chunk in chunks(families, judge.instructions_per_call):
            yield [InstructionResponse(instruction, response) for instruction, family in chunk for response in family]

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
    """In the order of the responses, then of the samples, then of the attempts."""
    order = {subject.response.id: index for index, subject in enumerate(subjects)}
    return sorted(judgements, key=lambda one: (order[one.response_id], one.sample, one.attempt))


@dataclass(slots=True)
class JudgeCounts:
    """What is counted of judgements while they are made.

    Attributes:
        judgements: all attempts.
        wanted: the judgements that count, the last attempt of each.
        failed: those of them without a score, by reason.
        compared: comparisons they come from, where responses are compared.
        undecided: those of them without a verdict.
        unread: what the judge wrote in these, or in the comparisons they come from.
        unjudged: responses without a score.
        truncated: those of them without an answer, because their thought has no end.
        scores: how many responses have each score, to three digits.
        tied: of each instruction with several judged responses, whether their scores are equal.
        variances: of each response's scores.
        counts: the judge's own, added up.
        means: the judge's own, to be averaged.
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
        """Counts some instructions in."""
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
        """(failed, wanted) of judgements, and of comparisons, a few of which give a response its score already."""
        return [(self.failed.total(), self.wanted), (self.undecided, self.compared)]


def _check_scale(label: str, judge: Judge, tally: JudgeCounts) -> None:
    """Warns where many scores lie beyond the scale: those in it are then the low ones of a longer scale."""
    beyond = tally.failed[JudgementStatus.OUT_OF_RANGE.value]
    if isinstance(judge, WrittenScore) and beyond > OFTEN_BEYOND * tally.wanted:
        logger.warning(
            "%s: %d of %d judgements lie beyond judge.min_score=%d and judge.max_score=%d and are left out, so that "
            "the other "
            "responses alone are compared; set them to the scale of the rubric",
            label,
            beyond,
            tally.wanted,
            judge.min_score,
            judge.max_score,
        )


def _constancy(label: str, judge: Judge, tally: JudgeCounts) -> dict[str, float]:
    """How much the scores tell responses apart; warns when that is next to nothing."""
    responses = tally.scores.total()
    if not responses:
        return {}
    tied, nats, variance = tally.tied.value, entropy(tally.scores.elements()), tally.variances.value
    constant = responses > 1 and (nats < judge.degeneracy.min_entropy or (tied or 0.0) >= judge.degeneracy.max_tie_rate)
    if constant:
        ties = "" if tied is None else f"{tied:.0%} of the instructions have equal scores for all their responses, "
        logger.warning(
            "%s: the judge says nearly the same of everything (%sentropy of the scores %.2f nats); what is learnt "
            "from it is noise",
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
    undecided = f", {tally.undecided} of {tally.compared} comparisons no verdict" if tally.compared else ""
    return (
        f"{label}: {tally.failed.total()} of {tally.wanted} judgements carry no score ({dict(tally.failed)})"
        f"{undecided}; "
        f"{tally.unread.describe(judge.token_setting)}Try judge=expected_score, a model that can follow the rubric, or "
        "a larger judge.max_failure_rate"
    )
