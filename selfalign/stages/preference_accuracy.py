"""preference_accuracy: held-out pairs + log-probabilities of a policy and its reference → margin, accuracy, Δ."""

import logging
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, read_scores, write_records
from selfalign.core.records import (
    Instruction,
    PairMargin,
    PairReference,
    PreferencePair,
    RankedAnswers,
)
from selfalign.data.sources import best_against_worst, read_pairs
from selfalign.data.thinking import given_response
from selfalign.data.turns import as_text
from selfalign.losses.logps import PairLogps
from selfalign.losses.preference import rewards
from selfalign.losses.refinement import refinement
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import averages
from selfalign.metrics.intervals import bootstrap, bootstrap_correlation, bootstrap_mean
from selfalign.metrics.rewards import reward_intervals, reward_metrics
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import MANY, Size, amount, records_in, stage
from selfalign.training.splits import KnownTexts, texts_of

logger = logging.getLogger(__name__)


def size(*, pairs: Artifact, **others: object) -> Size:
    """Every pair."""
    return Size(f"margin, accuracy and Δ of {amount(records_in(pairs, 'pairs'))} pairs", {})


@stage(size=size)
def preference_accuracy(
    out: StageOutput,
    *,
    pairs: Artifact,
    trained_on: list[Artifact],
    policy: Artifact,
    reference: Artifact,
    scores: Artifact | None,
    beta: float,
) -> Counts:
    """Measures a policy's implicit rewards on pairs it was not trained on (arXiv 2405.21040, METHOD.md section 2).

    Every number has its 95 % interval over pairs: Wilson's for shares, Student's t for the mean margin, by bootstrap
    elsewhere. A correlation is left out where it is not defined.

    Args:
        out: gets preferences.jsonl, a record a pair.
        pairs: pairs.jsonl.
        trained_on: artifacts with what was trained on; a pair that shares a prompt or a response with it is dropped.
        policy: references.jsonl, the policy's log-probabilities of the pairs given x and p⊕x.
        reference: the same of the policy it is measured against.
        scores: scores.jsonl of both responses of every pair; None takes the scores that came with the pairs.
        beta: β of the rewards.

    Raises:
        SelfalignError: no pair is left, or a log-probability is not a number.
    """
    given = read_records(pairs.path / "pairs.jsonl", PreferencePair)
    apart = _apart(given, KnownTexts.of(trained_on))
    own, other = (
        {record.id: record for record in read_records(artifact.path / "references.jsonl", PairReference)}
        for artifact in (policy, reference)
    )
    kept = [pair for pair in apart if pair.id in own]
    dropped = {"trained_on": len(given) - len(apart), "too_long": len(apart) - len(kept)}
    if not kept:
        raise SelfalignError(f"{out.label}: no pair of evaluate.preference_pairs.source is left (dropped: {dropped})")
    measured = measure_pairs(
        [own[pair.id] for pair in kept],
        [other[pair.id] for pair in kept],
        beta,
        score_differences(kept, None if scores is None else read_scores(scores.path)),
    )
    write_records(out.path / "preferences.jsonl", measured)
    numbers = {**reward_numbers(measured, beta), **score_correlations(measured)}
    return {
        catalog.PREFERENCES_PAIRS.name: len(measured),
        catalog.PREFERENCES_SCORED.name: sum(pair.score_difference is not None for pair in measured),
        **{f"{catalog.PREFERENCES}{name}": value for name, value in numbers.items() if math.isfinite(value)},
        catalog.PROMPTS_CUT.name: policy.counts[catalog.PROMPTS_CUT.name],
        "dropped": dropped,
    }


def _apart(pairs: Sequence[PreferencePair], known: KnownTexts) -> list[PreferencePair]:
    """The pairs that share no prompt and no response with what was trained on."""
    return [pair for pair in pairs if not known.shares(texts_of(pair.prompt, pair.chosen, pair.rejected))]


def measure_pairs(
    policy: Sequence[PairReference], reference: Sequence[PairReference], beta: float, scores: Sequence[float | None]
) -> list[PairMargin]:
    """Log-ratios, margin and Δ of every pair, and how much higher its chosen response scores."""
    (plain, augmented), (plain_ref, augmented_ref) = as_logps(policy), as_logps(reference)
    chosen, rejected = rewards(beta, plain, plain_ref)
    columns = (
        *rewards(1.0, plain, plain_ref),
        *rewards(1.0, augmented, augmented_ref),
        chosen - rejected,
        refinement(augmented, augmented_ref, beta),
    )
    return [
        PairMargin(
            id=record.id,
            chosen=values[0],
            rejected=values[1],
            augmented_chosen=values[2],
            augmented_rejected=values[3],
            margin=values[4],
            delta=values[5],
            score_difference=score,
        )
        for record, values, score in zip(policy, torch.stack(columns, dim=1).tolist(), scores, strict=True)
    ]


def as_logps(records: Sequence[PairReference]) -> tuple[PairLogps, PairLogps]:
    """Log-probabilities given x, and given p⊕x.

    Raises:
        SelfalignError: one is not a number.
    """
    rows = [(r.chosen, r.rejected, r.augmented_chosen, r.augmented_rejected) for r in records]
    wrong = [r.id for r, row in zip(records, rows, strict=True) if any(v is None or not math.isfinite(v) for v in row)]
    if wrong:
        raise SelfalignError(f"the log-probabilities of pair {wrong[0]} ({len(wrong)} in all) are no finite numbers")
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return PairLogps(chosen=columns[0], rejected=columns[1]), PairLogps(chosen=columns[2], rejected=columns[3])


def score_differences(pairs: Sequence[PreferencePair], scores: dict[str, float] | None) -> list[float | None]:
    """s⁺ - s⁻ of every pair, by a judge or as it came with the pairs; None where one of the two has no score."""
    both = [
        (pair.chosen_score, pair.rejected_score)
        if scores is None
        else (scores.get(f"{pair.id}-chosen"), scores.get(f"{pair.id}-rejected"))
        for pair in pairs
    ]
    return [None if chosen is None or rejected is None else chosen - rejected for chosen, rejected in both]


def reward_numbers(measured: Sequence[PairMargin], beta: float) -> dict[str, float]:
    """The reward metrics with their intervals."""
    deltas = [pair.delta for pair in measured]
    sums = reward_metrics([beta * pair.chosen for pair in measured], [beta * p.rejected for p in measured], deltas)
    spread = np.array(deltas)
    return {
        **averages(sums),
        **reward_intervals(sums),
        **bootstrap_mean(deltas).named(catalog.REFINEMENT_MEAN.name),
        **bootstrap(lambda units: float(spread[units].std()), len(deltas)).named(catalog.REFINEMENT_STD.name),
    }


def score_correlations(measured: Sequence[PairMargin]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of margin and of Δ with the score difference, over the scored pairs."""
    scored = [(pair.margin, pair.delta, d) for pair in measured if (d := pair.score_difference) is not None]
    if not scored:
        return {}
    margins, deltas, differences = map(list, zip(*scored, strict=True))
    numbers: dict[str, float] = {}
    for metric, values, kind in (
        (catalog.PREFERENCES_MARGIN_SCORE_PEARSON, margins, "pearson"),
        (catalog.PREFERENCES_MARGIN_SCORE_SPEARMAN, margins, "spearman"),
        (catalog.PREFERENCES_DELTA_SCORE_PEARSON, deltas, "pearson"),
        (catalog.PREFERENCES_DELTA_SCORE_SPEARMAN, deltas, "spearman"),
    ):
        numbers |= bootstrap_correlation(values, differences, kind).named(metric.last)
    return numbers


def size_of_test(*, source: str, count: int, **others: object) -> Size:
    """The first pairs, or all, with two responses each."""
    most = count or MANY
    return Size(f"{count or 'all'} pairs of {source}", {"pairs": most, "instructions": most, "responses": 2 * most})


@stage(size=size_of_test, given=True)
def preference_test(
    out: StageOutput,
    *,
    source: str,
    count: int,
    content: Content | str,
    ranked: Artifact | None,
    trained_on: list[Artifact],
) -> Counts:
    """Given preference data as pairs to measure on, and as responses that a judge can score.

    Args:
        out: gets pairs.jsonl, instructions.jsonl and responses.jsonl, whose ids are the pair's, with "-chosen" and
            "-rejected" behind it.
        source: a data source of preference pairs.
        count: the first so many; 0 takes all. Of several pairs with one instruction the first is taken and the others
            are counted, so that the pairs are independent of each other, as their intervals suppose.
        content: of the source.
        ranked: ranked.jsonl, whose answers are paired where the source names no data.
        trained_on: artifacts with what is given to be trained on. Pairs that share a text with it stay, since what a
            run writes itself may rule out others too, and `preferences` drops them all; but some must be left.

    Raises:
        SelfalignError: there is no pair, or none that could be measured.
    """
    if ranked is None:
        found, drops = read_pairs(source)
    else:
        questions = read_records(ranked.path / "ranked.jsonl", RankedAnswers)
        drops: Counter[str] = Counter()
        found = [pair for question in questions if (pair := best_against_worst(question, drops)) is not None]
    by_prompt = {texts_of(pair.prompt).own[0]: pair for pair in reversed(found)}
    apart = [pair for pair in found if by_prompt[texts_of(pair.prompt).own[0]] is pair]
    pairs = apart[: count or None]
    drops.update(same_instruction=len(found) - len(apart))
    if not pairs:
        raise SelfalignError(f"evaluate.preference_pairs.source={source}: no usable pair (dropped: {dict(+drops)})")
    _check_apart(source, pairs, KnownTexts.of(trained_on))
    write_records(out.path / "pairs.jsonl", pairs)
    asked = [Instruction(id=pair.id, text=as_text(pair.prompt), source="evaluation") for pair in pairs]
    write_records(out.path / "instructions.jsonl", asked)
    answers = [
        given_response(f"{pair.id}-{which}", pair.id, text, "given")
        for pair in pairs
        for which, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    write_records(out.path / "responses.jsonl", answers)
    return {catalog.PAIRS.name: len(pairs), "dropped": dict(sorted((+drops).items()))}


def _check_apart(source: str, pairs: Sequence[PreferencePair], known: KnownTexts) -> None:
    """Says how many pairs cannot be measured, because they share a prompt or a response with what is trained on.

    Raises:
        SelfalignError: none can.
    """
    taught = len(pairs) - len(_apart(pairs, known))
    said = (
        f"evaluate.preference_pairs.source={source}: {taught} of {len(pairs)} pairs share a prompt or a response "
        f"with what"
    )
    if taught == len(pairs):
        raise SelfalignError(f"{said} is trained on, so none could be measured: give others")
    if taught:
        logger.warning("%s is trained on, and are not measured", said)
