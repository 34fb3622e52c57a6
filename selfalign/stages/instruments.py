"""instruments: held-out ranked answers + verdicts on them → accuracy and bias of each judge, and whether it passes.

An instrument is a judge by which two models' answers are told apart.
"""

from collections.abc import Mapping, Sequence

from selfalign.core.jsonl import read_records, read_scores
from selfalign.core.records import Comparison, Judgement, RankedAnswers
from selfalign.judges.comparisons import PositionWeights, bias_statistics
from selfalign.judges.protocol import last_attempts
from selfalign.metrics import catalog
from selfalign.metrics.instruments import (
    InstrumentTest,
    RankedOutcome,
    instrument_quality,
    outcomes_of_scores,
    ranks_of,
    repeated_order,
)
from selfalign.store.artifacts import Artifact, Counts, StageOutput


def instruments(
    out: StageOutput, *, ranked: Artifact, readings: Mapping[str, Artifact], test: InstrumentTest
) -> Counts:
    """Measure the instruments of a model's evaluation. The metrics are the stage's counts; it writes no other file.

    Args:
        out: receives no file.
        ranked: ranked.jsonl of the held-out questions.
        readings: {instrument: comparisons.jsonl of their answers, or judgements.jsonl and scores.jsonl}.
        test: the bar.
    """
    questions = read_records(ranked.path / "ranked.jsonl", RankedAnswers)
    counts: Counts = {}
    for name, made in readings.items():
        compares = (made.path / "comparisons.jsonl").exists()
        found = _by_comparisons(name, questions, made) if compares else _by_scores(name, questions, made)
        if not found:  # No question has two answers.
            continue
        lowest = found.get(f"{catalog.INSTRUMENT_ACCURACY.of(instrument=name).name}_low", float("nan"))
        one_place = found.get(catalog.INSTRUMENT_ONE_PLACE.of(instrument=name).name, 0.0)
        counts |= {catalog.INSTRUMENT_PASSED.of(instrument=name).name: float(test.passes(lowest, one_place)), **found}
    return counts


def _by_comparisons(name: str, questions: Sequence[RankedAnswers], made: Artifact) -> dict[str, float]:
    """Measure an instrument that compares two answers in both orders."""
    compared, ranks = read_records(made.path / "comparisons.jsonl", Comparison), ranks_of(questions)
    outcomes: list[RankedOutcome] = []
    weights = PositionWeights()
    for one in compared:
        (question, first), (_, second) = ranks[one.first_id], ranks[one.second_id]
        better = one.outcome if one.outcome is None or first < second else 1 - one.outcome
        outcomes.append(RankedOutcome(question, better))
        weights.add(one)
    found = instrument_quality(name, outcomes)
    bias = bias_statistics(compared)
    if bias:
        found[catalog.INSTRUMENT_ONE_PLACE.of(instrument=name).name] = bias[catalog.JUDGE_POSITION_BIAS.name]
        found[catalog.INSTRUMENT_FIRST_PLACE.of(instrument=name).name] = weights.share_of_first
    return found


def _by_scores(name: str, questions: Sequence[RankedAnswers], made: Artifact) -> dict[str, float]:
    """Measure an instrument that scores single answers."""
    found = instrument_quality(name, outcomes_of_scores(questions, read_scores(made.path)))
    samples: dict[str, dict[int, float]] = {}
    for judgement in last_attempts(read_records(made.path / "judgements.jsonl", Judgement)):
        if judgement.score is not None:
            samples.setdefault(judgement.response_id, {})[judgement.sample] = judgement.score
    if (alike := repeated_order(questions, samples)) is not None:
        found[catalog.INSTRUMENT_REPEATED.of(instrument=name).name] = alike
    return found
