"""evaluate: judged responses of M_t and of M1 + judged ranked answers → win rates, drift and judge quality."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from selfalign.benchmarks.mt_bench import MTBench
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, read_scores
from selfalign.core.records import Judgement, RankedAnswers, Response
from selfalign.data.mixtures import data_source
from selfalign.data.text_filters import words_of
from selfalign.engines.protocol import Sampling
from selfalign.judges.protocol import asks_a_server
from selfalign.metrics import catalog
from selfalign.metrics.bounds import MetricBounds
from selfalign.metrics.instruments import InstrumentTest
from selfalign.metrics.intervals import correlation, distinct, repetition
from selfalign.metrics.judge_quality import RankedQuestion, calibration, judge_quality
from selfalign.metrics.summaries import outcomes_by_score, win_statistics
from selfalign.store.artifacts import Artifact, Counts, StageOutput


@dataclass(kw_only=True, slots=True)
class PreferenceTest:
    """Held-out preference pairs on which the rewards of every model are measured.

    Attributes:
        source: a data source of preference pairs, like `data.path`. "ranked" pairs the best with the worst answer of
            each held-out question of `data.seed_data.ranked`, with the humans' scores. Empty measures no pairs.
        count: number of pairs, the first ones; 0 takes all.
        judge: scores both responses of every pair, so that margin and Δ can be correlated with the score difference.
            Its model must be the same for all models. null takes the scores that the pairs have.
    """

    source: Any = ""
    count: int = 0
    judge: Any = None

    def __post_init__(self) -> None:
        self.source = data_source(self.source, "evaluate.preference_pairs.source")
        if self.count < 0:
            raise SelfalignError(f"evaluate.preference_pairs.count must be 0 or more, got {self.count}")
        if self.judge is None:
            return
        if not self.source:
            raise SelfalignError(
                "evaluate.preference_pairs.judge has no pairs to judge: set evaluate.preference_pairs.source"
            )
        if self.judge.model == "self" and not asks_a_server(self.judge):
            raise SelfalignError(
                "evaluate.preference_pairs.judge.model must be the same judge for all models: sft, base, a folder, a "
                "hub id or a packaged model; got self"
            )


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """How each model is evaluated.

    Attributes:
        instructions: a data source of held-out instructions; empty measures no win rate.
        count: number of instructions, the first ones; 0 takes all.
        judge: the model that scores the responses of all models: "sft" (M1) or "base" (M0), never the model itself.
        head_to_head: the judge that compares the responses of two models, a `HeadToHead` of stages/head_to_head.py;
            null compares none. Each model is compared with M1 and with the model before it.
        round_robin: whether each model is compared with all models before it.
        compare_benchmarks: whether models are also compared on the questions of MT-Bench and Vicuna-Bench, if
            `benchmark` selects them: every turn, in both orders.
        reference_outputs: a data source of another model's responses, which every model is also compared with. Its
            fields are those of alpaca_eval: `instruction`, `output` and, optionally, `generator`.
        sft_baseline: whether the SFT baseline (M0 trained on IFT only) is evaluated as a judge too, at the cost of one
            SFT. It always is if it writes the EFT examples. Without EFT examples, M1 is that baseline.
        sampling: how responses are sampled.
        bounds: bounds for the responses and the training.
        preference_pairs: the pairs on which every model's rewards are measured.
        instruments: how the judges of win rates are measured, and the bar that they must pass.
        truth: whether answers and candidates are checked by what their instructions say is right, beside the judge's
            scores. It always is where the judge itself does so (`judge=verifier`).
        kl_to_m1: whether the distance of every model from M1 is estimated from its answers, which two passes over them
            cost.
    """

    instructions: Any = "shipped:evaluation"
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
    instruments: InstrumentTest = field(default_factory=InstrumentTest, metadata={"keyed": "if set"})
    truth: bool = field(default=False, metadata={"keyed": "if set"})
    kl_to_m1: bool = field(default=True, metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        self.instructions = data_source(self.instructions, "evaluate.instructions")
        self.sampling.check("evaluate.sampling")
        if self.count < 0:
            raise SelfalignError(f"evaluate.count must be 0 or more, got {self.count}")
        if self.judge not in ("sft", "base"):
            raise SelfalignError(
                f"evaluate.judge must be sft or base, the same judge for all models; got {self.judge!r}"
            )
        if self.reference_outputs and not (self.head_to_head and self.instructions):
            raise SelfalignError(
                "evaluate.reference_outputs needs evaluate.head_to_head and evaluate.instructions: set both"
            )
        if self.truth and not self.instructions:
            raise SelfalignError(
                "evaluate.truth checks answers to evaluate.instructions, and there are none: set "
                "evaluate.instructions=shipped:verifiable_test, for example"
            )
        compares = self.instructions or self.compare_benchmarks
        if (self.round_robin or self.compare_benchmarks) and not (self.head_to_head and compares):
            raise SelfalignError(
                "evaluate.round_robin and evaluate.compare_benchmarks need evaluate.head_to_head (evaluate=default); "
                "evaluate.round_robin also needs evaluate.instructions or evaluate.compare_benchmarks"
            )
        if self.round_robin and self.head_to_head.model == "self" and not asks_a_server(self.head_to_head):
            raise SelfalignError(
                "evaluate.round_robin=true needs the same judge for all models: evaluate.head_to_head.model cannot be "
                "self"
            )
        if not compares:
            self.head_to_head = None  # Without responses there is nothing to compare.
        if isinstance(self.head_to_head, dict):
            raise SelfalignError(
                "evaluate.head_to_head has settings, but evaluate=none chooses no judge: take evaluate=default, or set "
                "evaluate.head_to_head=null"
            )


def opponents(config: EvaluateConfig, before: Sequence[str]) -> list[str]:
    """Return the models to compare a model with, given the models evaluated before it, in order."""
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
    """Compute the metrics of one model. They are the stage's counts; it writes no file but its manifest.

    Args:
        out: receives no file.
        judged: the model's responses to the evaluation instructions, and their scores.
        baseline: the same of M1; None for M1 itself.
        compared: {suffix of the metric names: head-to-head comparison}; the suffix is empty for the one with M1.
        moved: the KL divergence from M1; None for M1 itself.
        trained: the model and its last training data, whose counts have the training metrics that are bounded.
        ranked: held-out ranked answers, and the model's judgements of them.
        top: the highest score of the judge's scale; None if it has no scale.
        bounds: bounds for the responses and the training.

    Raises:
        SelfalignError: a bound is violated, and `bounds.stop` is set.
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
    """A model's responses and {instruction id: score}; the scores are None if the judge scores no single response."""

    responses: list[Response]
    scores: dict[str, float] | None

    @classmethod
    def of(cls, answers: Artifact, judgements: Artifact | None) -> "Answers":
        """Read responses and scores from their artifacts."""
        responses = read_records(answers.path / "responses.jsonl", Response)
        scores = read_scores(judgements.path) if judgements else None
        if scores is None:
            return cls(responses, None)
        return cls(responses, {r.instruction_id: scores[r.id] for r in responses if r.id in scores})

    @property
    def lengths(self) -> dict[str, int]:
        """{instruction id: characters of the response}."""
        return {response.instruction_id: len(response.text) for response in self.responses}


def describe_answers(answers: Answers) -> Counts:
    """Return length, share of finished responses, diversity and mean score of a model's responses."""
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
    """Return the length relative to M1's responses, and the win rate by score, also at equal length."""
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
    """Rename the counts of a head-to-head comparison to `eval/` metrics, such as `eval/win_rate_vs_previous_low`."""
    return {
        f"eval/{metric.last}{ending}{end}": counts[f"{metric.name}{end}"]
        for metric in catalog.COMPARED
        for end in ("", "_low", "_high")
        if f"{metric.name}{end}" in counts
    }


def measure_judge(ranked: Artifact, judgements: Artifact, top: int | None) -> Counts:
    """Return judge quality and calibration. Questions with an unscored answer are counted, but not in the quality."""
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
    return sum(values) / len(values)
