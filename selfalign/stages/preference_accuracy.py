"""preference_accuracy: held-out pairs + log-probabilities of policy and reference → margin, accuracy and Δ."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, read_scores, write_records
from selfalign.core.records import (
    Instruction,
    PairMargin,
    PairReference,
    PairTokens,
    PreferencePair,
    RankedAnswers,
)
from selfalign.data.mixtures import DataSource
from selfalign.data.sources import best_against_worst, read_pairs
from selfalign.data.tails import is_plain
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
from selfalign.training.splits import KnownTexts, texts_of, texts_of_pair

logger = logging.getLogger(__name__)


def size(*, pairs: Artifact, **others: object) -> Size:
    """Return the number of pairs."""
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
    """Measure a policy's implicit rewards on pairs that it was not trained on (arXiv 2405.21040).

    Every metric has a 95 % interval over pairs: Wilson's for shares, Student's t for the mean margin, and a bootstrap
    interval for the others. An undefined correlation is left out.

    Args:
        out: receives preferences.jsonl, one record for each pair. tokens.jsonl has, of those pairs whose tokens were
            scored, what each token adds to Δ.
        pairs: pairs.jsonl.
        trained_on: artifacts that were trained on. A pair that shares a prompt or a response with them is dropped.
        policy: references.jsonl with the policy's log-probabilities of the pairs, given x and p⊕x.
        reference: references.jsonl with the reference's log-probabilities.
        scores: scores.jsonl of both responses of every pair; None takes the scores that the pairs have.
        beta: β of the rewards.

    Raises:
        SelfalignError: no pair is left, or a log-probability is not finite.
    """
    given = read_records(pairs.path / "pairs.jsonl", PreferencePair)
    unseen = _unseen(given, KnownTexts.of(trained_on))
    policy_logps, reference_logps = (
        {record.id: record for record in read_records(artifact.path / "references.jsonl", PairReference)}
        for artifact in (policy, reference)
    )
    kept = [pair for pair in unseen if pair.id in policy_logps]
    dropped = {"trained_on": len(given) - len(unseen), "too_long": len(unseen) - len(kept)}
    if not kept:
        raise SelfalignError(
            f"{out.label}: no pair of evaluate.preference_pairs.source is left (dropped: {dropped}). Give others"
        )
    measured = measure_pairs(
        [policy_logps[pair.id] for pair in kept],
        [reference_logps[pair.id] for pair in kept],
        beta,
        score_differences(kept, None if scores is None else read_scores(scores.path)),
    )
    write_records(out.path / "preferences.jsonl", measured)
    if tokens := token_deltas(policy, reference, {pair.id for pair in kept}, beta):
        write_records(out.path / "tokens.jsonl", tokens)
    numbers = {**reward_numbers(measured, beta), **score_correlations(measured)}
    return {
        catalog.PREFERENCES_PAIRS.name: len(measured),
        catalog.PREFERENCES_SCORED.name: sum(pair.score_difference is not None for pair in measured),
        **{f"{catalog.PREFERENCES}{name}": value for name, value in numbers.items() if math.isfinite(value)},
        catalog.PROMPTS_CUT.name: policy.counts[catalog.PROMPTS_CUT.name],
        "dropped": dropped,
    }


def token_deltas(policy: Artifact, reference: Artifact, kept: set[str], beta: float) -> list[PairTokens]:
    """Return what each token of some pairs adds to Δ, in units of reward.

    That is β (log π - log π_ref) of the token given p⊕x in the chosen response, and its negative in the rejected one,
    so that all tokens of a pair add up to its Δ (arXiv 2405.21040, eq. 11).
    """
    files = [artifact.path / "tokens.jsonl" for artifact in (policy, reference)]
    if not all(map(Path.is_file, files)):
        return []
    own, others = (read_records(file, PairTokens) for file in files)
    return [
        replace(
            one,
            chosen_values=[beta * (a - b) for a, b in zip(one.chosen_values, other.chosen_values, strict=True)],
            rejected_values=[beta * (b - a) for a, b in zip(one.rejected_values, other.rejected_values, strict=True)],
        )
        for one, other in zip(own, others, strict=True)
        if one.id in kept
    ]


def _unseen(pairs: Sequence[PreferencePair], known: KnownTexts) -> list[PreferencePair]:
    """Return the pairs that share no prompt and no response with the training data."""
    return [pair for pair in pairs if not known.shares(texts_of_pair(pair))]


def measure_pairs(
    policy: Sequence[PairReference], reference: Sequence[PairReference], beta: float, scores: Sequence[float | None]
) -> list[PairMargin]:
    """Return log-ratios (nats), margin and Δ (units of reward) and score difference of every pair."""
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
    """Return the log-probabilities given x and those given p⊕x, as float64 of shape (pairs,).

    Raises:
        SelfalignError: a log-probability is missing or not finite.
    """
    rows = [(r.chosen, r.rejected, r.augmented_chosen, r.augmented_rejected) for r in records]
    wrong = [r.id for r, row in zip(records, rows, strict=True) if any(v is None or not math.isfinite(v) for v in row)]
    if wrong:
        raise SelfalignError(
            f"references.jsonl: log-probabilities of {len(wrong)} pairs, such as {wrong[0]}, are missing or not finite"
        )
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return PairLogps(chosen=columns[0], rejected=columns[1]), PairLogps(chosen=columns[2], rejected=columns[3])


def score_differences(pairs: Sequence[PreferencePair], scores: dict[str, float] | None) -> list[float | None]:
    """Return s⁺ - s⁻ of every pair, from `scores` or else from the pairs; None if a response has no score."""
    both = [
        (pair.chosen_score, pair.rejected_score)
        if scores is None
        else (scores.get(f"{pair.id}-chosen"), scores.get(f"{pair.id}-rejected"))
        for pair in pairs
    ]
    return [None if chosen is None or rejected is None else chosen - rejected for chosen, rejected in both]


def reward_numbers(measured: Sequence[PairMargin], beta: float) -> dict[str, float]:
    """Return the reward metrics with their intervals."""
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
    """Return Pearson's and Spearman's correlation of margin and of Δ with the score difference, over scored pairs."""
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


def size_of_test(*, source: DataSource, count: int, **others: object) -> Size:
    """Return the number of pairs, with two responses each."""
    most = count or MANY
    return Size(f"{count or 'all'} pairs of {source}", {"pairs": most, "instructions": most, "responses": 2 * most})


@stage(size=size_of_test, given=True)
def preference_test(
    out: StageOutput,
    *,
    source: DataSource,
    count: int,
    content: Content | str,
    ranked: Artifact | None,
    trained_on: list[Artifact],
) -> Counts:
    """Read given preference data as held-out pairs, and as responses that a judge can score.

    Only the first pair of an instruction is taken, because the intervals assume independent pairs. The others are
    counted as dropped.

    Args:
        out: receives pairs.jsonl, instructions.jsonl and responses.jsonl. A response's id is the pair's id with
            "-chosen" or "-rejected" appended. Tails of several turns and tool calls are no responses to an instruction,
            so they are counted and left out there.
        source: a data source of preference pairs, or "ranked".
        count: number of pairs, the first ones; 0 takes all.
        content: digest of the source.
        ranked: ranked.jsonl, whose answers are paired if the source is "ranked"; else None.
        trained_on: artifacts of the given training data. Pairs that share a text with them are kept here, because
            `preference_accuracy` drops them together with those that share one with generated data.

    Raises:
        SelfalignError: there is no pair, or all pairs share a text with `trained_on`.
    """
    if ranked is None:
        found, drops = read_pairs(source)
    else:
        questions = read_records(ranked.path / "ranked.jsonl", RankedAnswers)
        drops: Counter[str] = Counter()
        found = [pair for question in questions if (pair := best_against_worst(question, drops)) is not None]
    first_of_prompt = {texts_of(pair.prompt).own[0]: pair for pair in reversed(found)}
    independent = [pair for pair in found if first_of_prompt[texts_of(pair.prompt).own[0]] is pair]
    pairs = independent[: count or None]
    drops.update(same_instruction=len(found) - len(independent))
    if not pairs:
        raise SelfalignError(f"evaluate.preference_pairs.source={source}: no usable pair (dropped: {dict(+drops)})")
    _check_unseen(source, pairs, KnownTexts.of(trained_on))
    write_records(out.path / "pairs.jsonl", pairs)
    plain = [pair for pair in pairs if is_plain(pair)]
    instructions = [
        Instruction(
            id=pair.id,
            text=as_text(pair.prompt),
            source="evaluation",
            turns=pair.prompt if isinstance(pair.prompt, list) and len(pair.prompt) > 1 else [],
        )
        for pair in pairs
    ]
    write_records(out.path / "instructions.jsonl", instructions)
    responses = [
        given_response(f"{pair.id}-{role}", pair.id, text, "given")
        for pair in plain
        for role, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    write_records(out.path / "responses.jsonl", responses)
    longer = {catalog.LONGER_PAIRS.name: len(pairs) - len(plain)} if len(plain) < len(pairs) else {}
    return {catalog.PAIRS.name: len(pairs), **longer, "dropped": dict(sorted((+drops).items()))}


def _check_unseen(source: DataSource, pairs: Sequence[PreferencePair], known: KnownTexts) -> None:
    """Warn about pairs that share a prompt or a response with the training data.

    Raises:
        SelfalignError: all pairs do.
    """
    seen = len(pairs) - len(_unseen(pairs, known))
    problem = (
        f"evaluate.preference_pairs.source={source}: {seen} of {len(pairs)} pairs share a prompt or a response with "
        "the training data"
    )
    if seen == len(pairs):
        raise SelfalignError(f"{problem}, so none can be measured: give others")
    if seen:
        logger.warning("%s and are not measured", problem)
