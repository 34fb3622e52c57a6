"""Read the metrics of a finished run's models instruction by instruction, from the records that they are means of."""

from collections.abc import Callable, Iterator
from typing import Any

from selfalign.core.records import Comparison, Instruction, PairMargin, RankedAnswers, Response, ResponseScore
from selfalign.metrics import catalog
from selfalign.metrics.judge_quality import RankedQuestion
from selfalign.metrics.summaries import outcomes_by_score
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished

Units = dict[str, float]
ALL = Label.input("questions")
PAIRS = Label.input("preferences", "pairs")


def instruction_values(run: Finished, model: str, metric: str) -> Units:
    """Return {text of the instruction: value} of one model, whose mean is the metric; empty if no record has it.

    Instructions are named by their texts, because ids and artifacts of different runs may differ.
    """
    return READERS[metric](run, model) if metric in READERS else {}


def _texts(run: Finished, label: Label) -> dict[str, str]:
    return {instruction.id: instruction.text for instruction in run.records(label, Instruction)}


def _win_rate(run: Finished, model: str) -> Units:
    texts = _texts(run, ALL)
    compared = run.records(Label.comparison(model, "M1"), Comparison)
    return {texts[one.instruction_id]: one.outcome for one in compared if one.outcome is not None}


def _of_responses(value: Callable[[Response], float]) -> Callable[[Finished, str], Units]:
    def read(run: Finished, model: str) -> Units:
        texts = _texts(run, ALL)
        responses = run.records(Label.evaluation(model, "answers"), Response)
        return {texts[one.instruction_id]: value(one) for one in responses}

    return read


def _mean_score(run: Finished, model: str) -> Units:
    return _scores(run, model, "scores")


def _true(run: Finished, model: str) -> Units:
    """Return the share of an instruction's checks that the model's answer passes."""
    return _scores(run, model, "truth")


def _scores(run: Finished, model: str, part: str) -> Units:
    """Return the scores of a model's answers in one part of its evaluation."""
    texts = _texts(run, ALL)
    asked = {one.id: one.instruction_id for one in run.records(Label.evaluation(model, "answers"), Response)}
    scores = run.records(Label.evaluation(model, part), ResponseScore)
    return {texts[asked[one.id]]: one.score for one in scores if one.score is not None}


def _true_beside_first(run: Finished, model: str) -> tuple[Units, Units]:
    """Return the true shares of a model and of the first evaluated model; empty for that one itself."""
    first = next((row["model"] for row in run.models if catalog.EVAL_TRUE_RATE.name in row), model)
    return ({}, {}) if first == model else (_true(run, model), _true(run, first))


def _true_gain(run: Finished, model: str) -> Units:
    own, others = _true_beside_first(run, model)
    return {text: own[text] - others[text] for text in own if text in others}


def _true_win_rate(run: Finished, model: str) -> Units:
    return outcomes_by_score(*_true_beside_first(run, model))


def _of_pairs(value: Callable[[PairMargin], float]) -> Callable[[Finished, str], Units]:
    def read(run: Finished, model: str) -> Units:
        texts = _texts(run, PAIRS)
        measured = run.records(Label.evaluation(model, "preferences"), PairMargin)
        return {texts[one.id]: value(one) for one in measured}

    return read


def _judged(run: Finished, model: str) -> Iterator[tuple[str, RankedQuestion]]:
    """Yield the held-out ranked questions of which the model scored every answer, each with its text."""
    scored = run.records(Label.evaluation(model, "ranked_scores"), ResponseScore)
    scores = {one.id: one.score for one in scored if one.score is not None}
    own = Label.input("ranked")
    questions = run.records(own if own in run.stages else Label.input("seeds"), RankedAnswers)
    for question in questions if scores else ():
        values = [scores[name] for n in range(1, len(question.texts) + 1) if (name := f"{question.id}-{n}") in scores]
        if len(values) == len(question.texts):
            yield question.instruction, RankedQuestion(question.ranks, values)


def _pairwise_accuracy(run: Finished, model: str) -> Units:
    """Return the terms of the linearised ratio of sums, R + (agreeing − R·pairs)/mean(pairs) (Cochran 1977, chapter 6).

    They are the questions' own shares if all questions have equally many answers.
    """
    agreement = {text: question.agreement() for text, question in _judged(run, model)}
    if not agreement:
        return {}
    pairs = sum(pairs for _, pairs in agreement.values())
    ratio, mean = sum(agreeing for agreeing, _ in agreement.values()) / pairs, pairs / len(agreement)
    return {text: ratio + (agreeing - ratio * pairs) / mean for text, (agreeing, pairs) in agreement.items()}


def _correlation(kind: str) -> Callable[[Finished, str], Units]:
    def read(run: Finished, model: str) -> Units:
        found = {text: question.correlation(kind) for text, question in _judged(run, model)}
        return {text: value for text, value in found.items() if value is not None}

    return read


READERS: dict[str, Callable[[Finished, str], Any]] = {
    catalog.EVAL_WIN_RATE.name: _win_rate,
    catalog.EVAL_MEAN_CHARACTERS.name: _of_responses(lambda one: float(len(one.text))),
    catalog.EVAL_FINISHED_SHARE.name: _of_responses(lambda one: float(one.finished)),
    catalog.EVAL_MEAN_SCORE.name: _mean_score,
    catalog.EVAL_TRUE_RATE.name: _true,
    catalog.EVAL_TRUE_GAIN.name: _true_gain,
    catalog.EVAL_TRUE_WIN_RATE.name: _true_win_rate,
    catalog.over(catalog.PREFERENCES, catalog.REWARDS_MARGINS).name: _of_pairs(lambda one: one.margin),
    catalog.over(catalog.PREFERENCES, catalog.REWARDS_ACCURACIES).name: _of_pairs(lambda one: float(one.margin > 0)),
    catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY.name: _pairwise_accuracy,
    catalog.JUDGE_QUALITY_SPEARMAN.name: _correlation("spearman"),
    catalog.JUDGE_QUALITY_KENDALL.name: _correlation("kendall"),
}
"""{metric: reader of its values}."""
