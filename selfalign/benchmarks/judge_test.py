"""Benchmarks of judges: how often the run's judge, with every model, decides comparisons as their labels do."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from selfalign.benchmarks.protocol import BenchmarkContext, check_count
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import chunks, write_records
from selfalign.core.records import Comparison, FinishReason, Instruction, Judgement, JudgementStatus
from selfalign.data.containers import identify_data
from selfalign.data.thinking import given_response
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.protocol import InstructionResponse, Judge, asks_a_server, average, last_attempts, unjudged
from selfalign.judges.unread import Unread
from selfalign.metrics.accumulate import Sums, add_sums, averages
from selfalign.store.artifacts import Counts, StageOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledResponses:
    """Responses to one instruction, the better ones first.

    Attributes:
        id: their number in the source, as a text.
        name: their id in the source.
        subset: the part of the benchmark.
        instruction: the instruction.
        responses: the responses, of which the first `correct` are labelled as better than the others.
        correct: number of better responses.
    """

    id: str
    name: str
    subset: str
    instruction: str
    responses: list[str]
    correct: int = 1

    def subjects(self) -> list[InstructionResponse]:
        """Return the responses as a judge takes them."""
        asked = Instruction(id=self.id, text=self.instruction, source="evaluation", category=self.subset)
        return [
            InstructionResponse(asked, given_response(f"{self.id}-{n}", self.id, text, "given"))
            for n, text in enumerate(self.responses, start=1)
        ]


@dataclass(slots=True)
class Judged:
    """What a judge said of labelled responses.

    Attributes:
        scores: {id: score of each response}; None for a response without one.
        comparisons: {id: comparisons}; empty for a judge that scores single responses.
        counts: the judge's own counts and metrics.
        unread: failed judgements.
    """

    scores: dict[str, list[float | None]] = field(default_factory=dict)
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)
    unread: Unread = field(default_factory=Unread)


@dataclass(kw_only=True, slots=True)
class JudgeTest(ABC):
    """Settings of a benchmark of judges.

    Attributes:
        questions: a data source of the labelled comparisons: a file, or a data set on the hub.
        judge: the judge that is measured; null takes the run's own, so that every M_t is measured where judge.model is
            self.
        count: the number of comparisons, taken from the beginning; 0 takes all.
    """

    questions: str
    judge: Any = None
    count: int = 0

    @property
    def judge_model(self) -> str | None:
        """The policy that judges; None for a server, and for the run's own judge."""
        return None if self.judge is None or asks_a_server(self.judge) else self.judge.model

    @property
    def size(self) -> str:
        """The comparisons and the judge, for the plan."""
        judge = type(self.judge).__name__ if self.judge else "the run's judge"
        return f"{self.count or 'all'} comparisons of {self.questions}, by {judge}"

    def with_judge(self, judge: Any) -> Self:
        """Return the benchmark with a judge: its own, or else the given one. A pairwise judge compares all pairs."""
        used = self.judge or judge
        return replace(self, judge=replace(used, pairs=0) if isinstance(used, Pairwise) else used)

    def check(self, key: str) -> None:
        """Check the settings. The judge has checked its own. Messages name a setting as `key`.name."""
        if self.count < 0:
            raise SelfalignError(f"{key}.count must be 0 (all) or more, got {self.count}")

    def sources(self, key: str) -> dict[str, str]:
        """Return the digest of the comparisons, after reading them once."""
        digest = identify_data(self.questions, f"{key}.questions")
        check_count(key, self.count, len(self.read()), self.questions)
        return {"questions": digest}

    def asked(self, key: str) -> list[str]:
        """Return the instructions."""
        return [labelled.instruction for labelled in self.read()]

    @abstractmethod
    def read(self) -> list[LabelledResponses]:
        """Return all comparisons of the source."""

    def chosen(self) -> list[LabelledResponses]:
        """Return the comparisons that are measured."""
        return self.read()[: self.count or None]

    def judge_all(self, context: BenchmarkContext, out: StageOutput, compared: Sequence[LabelledResponses]) -> Judged:
        """Judge all responses. Write judgements.jsonl and, if the judge compares responses, comparisons.jsonl.

        A failed judgement stops no run: the comparison counts as wrong, and a warning says how many there are.
        """
        judge: Judge = self.judge
        judged, judgements, counts = Judged(), list[Judgement](), Counter[str]()
        comparisons: list[Comparison] = []
        means: Sums = {}
        wanted = judge.wanted([subject for labelled in compared for subject in labelled.subjects()])
        with out.journal(wanted, "judgements") as journal, context.judge_context(journal) as judge_context:
            for chunk in chunks(compared, judge.instructions_per_call):
                subjects = [subject for labelled in chunk for subject in labelled.subjects()]
                asked = [s for s in subjects if s.response.finish_reason is not FinishReason.TRUNCATED]
                judgements += [
                    unjudged(s, "nobody", JudgementStatus.TRUNCATED, "")
                    for s in subjects
                    if s.response.finish_reason is FinishReason.TRUNCATED
                ]
                made = judge.judge(judge_context, asked)
                judgements += made.judgements
                comparisons += made.comparisons
                counts.update(made.counts)
                means = add_sums(means, made.means)
                scores = {one.id: one.score for one in average(subjects, made.judgements, judge.min_valid_samples)}
                judged.scores |= {
                    labelled.id: [scores[s.response.id] for s in labelled.subjects()] for labelled in chunk
                }
        for comparison in comparisons:
            judged.comparisons.setdefault(comparison.instruction_id, []).append(comparison)
        failed = [one for one in last_attempts(judgements) if one.status is not JudgementStatus.OK]
        judged.unread.add((one.status, one.text) for one in failed)
        if failed:
            logger.warning(
                "%s: %d judgements carry no score (%s), and their comparisons count as wrong; %s",
                *(out.label, len(failed), dict(judged.unread.reasons), judged.unread.describe(judge.token_setting)),
            )
        write_records(out.path / "judgements.jsonl", judgements)
        if comparisons:
            write_records(out.path / "comparisons.jsonl", comparisons)
        judged.counts = {**counts, **judge_context.counts, **averages(means)}
        return judged


def share_of_best(scores: Sequence[float | None], correct: int) -> float:
    """Return the share of correct responses among those with the highest score; 0 if one has no score."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return 0.0
    best = [index for index, score in enumerate(known) if score == max(known)]
    return sum(index < correct for index in best) / len(best)


def is_tied(scores: Sequence[float | None], correct: int) -> bool:
    """Whether the highest score is that of correct and of other responses."""
    return None not in scores and 0 < share_of_best(scores, correct) < 1


def named(text: str) -> str:
    """Return the name of a part of a benchmark as it stands in the name of a metric."""
    return "_".join(text.casefold().split()).replace("/", "_")


def result_row(labelled: LabelledResponses, judged: Judged, value: float | None) -> Mapping[str, Any]:
    """Return a line of results.jsonl: the scores of one comparison, the better responses first, and its value."""
    return {
        "id": labelled.name,
        "subset": labelled.subset,
        "num_correct": labelled.correct,
        "scores": judged.scores[labelled.id],
        "result": value,
    }
