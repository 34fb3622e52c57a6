"""evaluate: judged answers of M_t and of M1 + judged ranked answers → win rates, drift and judge quality."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from selfalign.benchmarks.mt_bench import MTBench
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, read_scores
from selfalign.core.records import Judgement, RankedAnswers, Response
from selfalign.data.text_filters import words_of
from selfalign.engines.protocol import Sampling
from selfalign.judges.protocol import asks_a_server
from selfalign.metrics import catalog
from selfalign.metrics.bounds import MetricBounds
from selfalign.metrics.intervals import correlation, distinct, repetition
from selfalign.metrics.judge_quality import RankedQuestion, calibration, judge_quality
from selfalign.metrics.summaries import outcomes_by_score, win_statistics
from selfalign.store.artifacts import Artifact, Counts, StageOutput


@dataclass(kw_only=True, slots=True)
class PreferenceTest:
    """Held-out preference pairs on which the rewards of every model are measured.

    Attributes:
        source: a data source of preference pairs, as `data.path`; or "ranked": of the held-out questions of
            `data.seed_data.ranked` the best answer against the worst, with the humans' scores; empty measures none.
        count: the first so many of them; 0 takes all.
        judge: scores both responses of every pair, so that margin and Δ can be compared with its score difference:
            any judge, with who judges fixed for all models; null takes the scores that came with the pairs.
    """

    source: str = ""
    count: int = 0
    judge: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise SelfalignError(f"evaluate.preference_pairs.count must be 0 or more, got {self.count}")
        if self.judge is None:
            return
        if not self.source:
            raise SelfalignError(
                "evaluate.preference_pairs.judge has nothing to judge: set evaluate.preference_pairs.source"
            )
        if self.judge.model == "self" and not asks_a_server(self.judge):
            raise SelfalignError(
                "evaluate.preference_pairs.judge.model must be one judge for all models, not self: sft, base, a "
                "folder, hub "
                "id or packaged model"
            )


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """How each model is measured.

    Attributes:
        instructions: a data source of held-out instructions; empty measures no win rate.
        count: the first so many of them; 0 takes all.
        judge: who scores the answers of all models alike: "sft" (M1) or "base" (M0), never the model itself.
        head_to_head: who compares the answers of two models: a `HeadToHead` of stages/head_to_head.py; null compares
            none. Each model is compared with M1 and with the model before it.
        round_robin: compares each model with all models before it.
        compare_benchmarks: compares models on the questions of MT-Bench and Vicuna-Bench too, where `benchmark` chooses
            them: every turn, in both orders.
        reference_outputs: a data source of another model's answers (fields `instruction`, `output`, optional
            `generator`, as alpaca_eval keeps them), with which every model is compared too.
        sft_baseline: also measures how well the SFT baseline (M0 trained on IFT only) judges, at the cost of one SFT;
            it is measured anyway where it writes the EFT examples, and where there are none M1 is that baseline.
        sampling: how answers are written.
        bounds: bounds for the answers and the training.
        preference_pairs: pairs that every model's rewards are measured on.
    """

    instructions: str = "shipped:evaluation"
    count: int = 0
    judge: str = "sft"
    head_to_head: Any = None
    round_robin: bool = False
    compare_benchmarks: bool = False
    reference_outputs: str = ""
    sft_baseline: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    bounds: MetricBounds = field(default_factory=MetricBounds)
    preference_pairs: PreferenceTest = field(default_factory=PreferenceTest)

    def __post_init__(self) -> None:
        self.sampling.check("evaluate.sampling")
        if self.count < 0:
            raise SelfalignError(f"evaluate.count must be 0 or more, got {self.count}")
        if self.judge not in ("sft", "base"):
            raise SelfalignError(f"evaluate.judge must be sft or base, one judge for all models; got {self.judge!r}")
        if self.reference_outputs and not (self.head_to_head and self.instructions):
            raise SelfalignError("evaluate.reference_outputs needs evaluate.head_to_head and evaluate.instructions")
        compares = self.instructions or self.compare_benchmarks
        if (self.round_robin or self.compare_benchmarks) and not (self.head_to_head and compares):
            raise SelfalignError(
                "evaluate.round_robin and evaluate.compare_benchmarks need evaluate.head_to_head (evaluate=default), "
                "and "
                "evaluate.round_robin one of evaluate.instructions and evaluate.compare_benchmarks"
            )
        if self.round_robin and self.head_to_head.model == "self" and not asks_a_server(self.head_to_head):
            raise SelfalignError(
                "evaluate.round_robin=true needs one judge for all: evaluate.head_to_head.model cannot be self"
            )
        if not compares:
            self.head_to_head = None  # Without answers there is nothing to compare.


def opponents(config: EvaluateConfig, before: Sequence[str]) -> list[str]:
    """With which of the models measured before it, in order, a model is compared."""
    if config.head_to_head is None:
        return []
    return list(before) if config.round_robin else list(dict.fromkeys([*before[:1], *before[-1:]]))


def compares_on(config: EvaluateConfig, benchmark: object) -> bool:
    """Whether models are compared on the questions of a benchmark."""
    return config.compare_benchmarks and isinstance(benchmark, MTBench)


JudgedTexts = tuple[Artifact, Artifact]
"""Responses, or ranked answers, and their judgements."""

MaybeJudged = tuple[Artifact, Artifact | None]
"""Responses and their judgements, where they are scored."""


def evaluate(
    out: StageOutput,
    *,
    judged: MaybeJudged | None,
    baseline: MaybeJudged | None,
    compared: dict[str, Artifact],
    moved: Artifact | None,
    trained: Sequence[Artifact],
    ranked: JudgedTexts | None,
    top: int | None,
    bounds: MetricBounds,
) -> Counts:
    """Puts numbers to one model; they are the stage's counts, and its manifest is all it writes.

    Args:
        out: nothing is written.
        judged: the model's answers to the evaluation instructions, judged.
        baseline: M1's; None for M1 itself.
        compared: head-to-head comparisons by what their numbers' names end in: "" for that with M1.
        moved: how far the model is from M1, None for M1 itself.
        trained: the model and what it was trained on last, whose counts tell of the training what bounds are set for.
        ranked: held-out ranked answers, judged by the model.
        top: the highest score of the scale, if it has one.
        bounds: bounds for the answers and the training.

    Raises:
        SelfalignError: a bound is crossed, and `bounds.stop` is set.
    """
    numbers: Counts = bounds.among(*(artifact.counts for artifact in trained))
    if judged is not None:
        own = Answers.of(*judged)
        numbers |= describe_answers(own)
        if baseline is not None:
            numbers |= compare_answers(own, Answers.of(*baseline))
    for ending, comparison in compared.items():
        numbers |= name_comparison(comparison.counts, ending)
    if moved is not None:
        numbers |= moved.counts
    if crossed := bounds.check(out.label, numbers):
        numbers["bound_violated"] = crossed
    if ranked is not None:
        numbers |= measure_judge(*ranked, top)
    return numbers


@dataclass(frozen=True, slots=True)
class Answers:
    """A model's answers, and {instruction id: score} of those that are judged; None where they are not scored."""

    responses: list[Response]
    scores: dict[str, float] | None

    @classmethod
    def of(cls, answers: Artifact, judgements: Artifact | None) -> "Answers":
        """Reads them."""
        responses = read_records(answers.path / "responses.jsonl", Response)
        scores = read_scores(judgements.path) if judgements else None
        if scores is None:
            return cls(responses, None)
        return cls(responses, {r.instruction_id: scores[r.id] for r in responses if r.id in scores})

    @property
    def lengths(self) -> dict[str, int]:
        """{instruction id: characters of the answer}."""
        return {response.instruction_id: len(response.text) for response in self.responses}


def describe_answers(answers: Answers) -> Counts:
    """Length, ending, variety and mean score of a model's answers."""
    responses, values = answers.responses, answers.scores or {}
    described = {
        catalog.EVAL_ANSWERS.name: len(responses),
        catalog.EVAL_MEAN_CHARACTERS.name: mean([len(response.text) for response in responses]),
        catalog.EVAL_FINISHED_SHARE.name: mean([response.finished for response in responses]),
    }
    words = [words_of(response.text) for response in responses]
    lengths = [len(response.text) for response in responses if response.instruction_id in values]
    varied = {
        catalog.EVAL_DISTINCT_2.name: distinct(words, 2),
        catalog.EVAL_REPEATED_4.name: repetition(words, 4),
        catalog.EVAL_SCORE_LENGTH_CORRELATION.name: correlation(list(values.values()), lengths, "spearman"),
    }
    described |= {name: value for name, value in varied.items() if value is not None}
    return described | ({catalog.EVAL_MEAN_SCORE.name: mean(list(values.values()))} if values else {})


def compare_answers(answers: Answers, baseline: Answers) -> Counts:
    """How much longer the answers are than M1's, and how often they have the higher score, also at equal length."""
    lengths, other_lengths = answers.lengths, baseline.lengths
    numbers: Counts = {}
    if written := sum(other_lengths.values()):
        numbers[catalog.EVAL_LENGTH_GROWTH.name] = mean(list(lengths.values())) / (written / len(other_lengths))
    if answers.scores is None or baseline.scores is None:
        return numbers
    outcomes = outcomes_by_score(answers.scores, baseline.scores)
    won = win_statistics(list(outcomes.values()), [float(lengths[name] - other_lengths[name]) for name in outcomes])
    return numbers | {f"eval/score_{name}": value for name, value in won.items() if name.startswith("win_rate")}


def name_comparison(counts: Counts, ending: str) -> Counts:
    """A head-to-head comparison's numbers as `eval/` metrics: `eval/win_rate_vs_previous_low`, for example."""
    return {
        f"eval/{metric.last}{ending}{end}": counts[f"{metric.name}{end}"]
        for metric in catalog.COMPARED
        for end in ("", "_low", "_high")
        if f"{metric.name}{end}" in counts
    }


def measure_judge(ranked: Artifact, judgements: Artifact, top: int | None) -> Counts:
    """Judge quality over the questions whose every answer has a score (the others are counted), and calibration."""
    questions = read_records(ranked.path / "ranked.jsonl", RankedAnswers)
    judged = read_records(judgements.path / "judgements.jsonl", Judgement)
    scores = read_scores(judgements.path)
    whole: list[RankedQuestion] = []
    for question in questions:
        values = [scores.get(f"{question.id}-{n}") for n in range(1, len(question.texts) + 1)]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            whole.append(RankedQuestion(question.ranks, known))
    counts: Counts = {
        catalog.JUDGE_QUALITY_QUESTIONS.name: len(whole),
        catalog.JUDGE_QUALITY_UNJUDGED.name: len(questions) - len(whole),
    }
    if catalog.JUDGE_POSITION_BIAS.name in judgements.counts:
        counts[catalog.CALIBRATION_POSITION_BIAS.name] = judgements.counts[catalog.JUDGE_POSITION_BIAS.name]
    return counts | (judge_quality(whole, top) if whole else {}) | calibration(judged, questions)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
