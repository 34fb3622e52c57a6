"""meta_judge: judgements + a judge of judgements → preference pairs of judgements."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_text
from selfalign.core.jsonl import CHUNK, chunks, join_sorted, open_records, stream_records, write_records
from selfalign.core.records import Comparison, FinishReason, Instruction, Judgement, PreferencePair, Prompt, Response
from selfalign.data.turns import as_text
from selfalign.engines.protocol import Engine
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.comparisons import (
    PositionWeights,
    ResponsePair,
    bias_statistics,
    expected_win_rates,
    unread_text,
)
from selfalign.judges.protocol import JudgeContext, who_judges
from selfalign.judges.sampled import SampledScore
from selfalign.judges.unread import Unread
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Sums, add_sums, averages
from selfalign.metrics.intervals import RunningMean
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage


@dataclass(kw_only=True, slots=True)
class MetaJudge(PairwiseComparator):
    """The model compares its own judgements, to be aligned on pairs of them (Meta-Rewarding, arXiv 2407.19594).

    A judgement answers the judge's prompt. So {instruction} in `prompt` is that prompt, with the rubric, the
    instruction and the response, and {first} and {second} are two judgements.

    Attributes:
        iterations: in which pairs of judgements are made: a list, or the last iteration with them; null takes all. The
            paper has them in its first two of four.
        judgements: the judgements of a response that are compared, the first ones with a score; 0 takes all.
        max_chosen_characters: a pair is dropped if its chosen judgement is longer; 0 is no limit.
        minimum_pairs: the run stops when there are fewer pairs of judgements; 0 never stops it.
    """

    iterations: Any = None
    judgements: int = 0
    max_chosen_characters: int = 0
    minimum_pairs: int = 1
    key: ClassVar[str] = "data.meta_judge"

    def __post_init__(self) -> None:
        PairwiseComparator.__post_init__(self)
        numbers = self.iterations if isinstance(self.iterations, list) else [self.iterations]
        if self.iterations is not None and not (numbers and all(isinstance(n, int) and n >= 1 for n in numbers)):
            raise SelfalignError(
                f"data.meta_judge.iterations must be null, a number from 1 or a list of them, got {self.iterations!r}"
            )
        if self.judgements < 0 or self.judgements == 1:
            raise SelfalignError(f"data.meta_judge.judgements must be 0 (all), 2 or more, got {self.judgements}")
        for name in ("max_chosen_characters", "minimum_pairs"):
            if getattr(self, name) < 0:
                raise SelfalignError(f"data.meta_judge.{name} must be 0 or more, got {getattr(self, name)}")

    def chosen_iterations(self, iterations: int) -> list[int]:
        """Return the iterations of a run in which pairs of judgements are made.

        Raises:
            SelfalignError: the run has no such iteration.
        """
        if self.iterations is None:
            return list(range(1, iterations + 1))
        chosen = sorted(self.iterations) if isinstance(self.iterations, list) else range(1, self.iterations + 1)
        if chosen[-1] > iterations:
            raise SelfalignError(
                f"data.meta_judge.iterations={self.iterations} goes beyond iterations={iterations}: lower it"
            )
        return list(chosen)

    def comparisons_of(self, judgements: int) -> int:
        """Return the most comparisons of a response with so many judgements."""
        compared = min(self.judgements or judgements, judgements)
        return compared * (compared - 1) // 2


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """A response with its judgements that are compared."""

    instruction: Instruction
    response: Response
    judgements: list[Judgement]

    @property
    def id(self) -> str:
        """The id of the response."""
        return self.response.id

    @property
    def variance(self) -> float:
        """The variance of the scores (n-1 in the denominator); 0 of fewer than two."""
        scores = [judgement.score for judgement in self.judgements if judgement.score is not None]
        return statistics.variance(scores) if len(scores) > 1 else 0.0

    def asked_by(self, judge: SampledScore) -> Prompt:
        """Return what the judge was asked."""
        return judge.ask(self.instruction.text, self.response.text)

    def comparisons(self, judge: SampledScore) -> list[ResponsePair]:
        """Return every two judgements, as two answers to what the judge was asked."""
        task = Instruction(id=self.id, text=as_text(self.asked_by(judge)), source="self")
        answers = [
            Response(
                id=one.id,
                instruction_id=self.id,
                text=one.text,
                finish_reason=FinishReason.EOS,
                tokens=0,
                model=one.model,
            )
            for one in self.judgements
        ]
        return [ResponsePair(task, first, second) for first, second in combinations(answers, 2)]

    def pair(self, judge: SampledScore, chosen: Judgement, rejected: Judgement) -> PreferencePair:
        """Return a preference pair of two judgements, each the text with its thought."""
        return PreferencePair(
            id=digest_text(chosen.id + rejected.id)[:16],
            prompt=self.asked_by(judge),
            chosen=chosen.text,
            rejected=rejected.text,
            instruction_id=self.instruction.id,
            chosen_id=chosen.id,
            rejected_id=rejected.id,
        )


def size(
    *, comparator: MetaJudge, judge: SampledScore, policy: Artifact | None, instructions: Artifact, **others: object
) -> Size:
    """Return the number of comparisons, and of pairs if none is dropped."""
    count = records_in(instructions, "instructions")
    compared = amount(count * comparator.comparisons_of(judge.num_samples))
    return Size(f"up to {compared} comparisons × 2 orders by {who_judges(comparator, policy)}", {"pairs": count})


@stage(size=size, all_ranks=True)
def meta_judge(
    out: StageOutput,
    *,
    comparator: MetaJudge,
    judge: SampledScore,
    policy: Artifact | None,
    instructions: Artifact,
    responses: Artifact,
    judgements: Artifact,
    engine: Engine,
    seed: int,
) -> Counts:
    """Pair the best judgement of a response with its worst, by how the judgements win against one another.

    One response of each instruction takes part: the one whose judgements' scores vary most, the first of equals; none
    if no scores vary. Every two of its judgements are compared in both orders. Wins are weighted by position
    (`PositionWeights`, over all comparisons of the stage), and ties count nothing. In a model of Bradley and Terry,
    which is Elo's, the weighted wins of two judgements against one another are their games. The judgement of the
    highest strength is chosen and that of the lowest is rejected, the first of equals.

    Differs from the paper: the fit has a prior (`expected_win_rates`), so a judgement that wins all has a finite
    strength. A comparison counts only if both orders have a verdict. Policies that compare give their verdict by
    probabilities, without reasons before it.

    Args:
        out: receives pairs.jsonl, whose prompts are the judge's, and comparisons.jsonl, whose `instruction_id` is the
            id of a response and whose `first_id` and `second_id` are those of its judgements.
        comparator: compares judgements.
        judge: the judge that wrote them.
        policy: the policy that compares; None for a server.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        judgements: judgements.jsonl.
        engine: its dtype is the comparator's precision.
        seed: seeds the comparator's context; a comparator samples nothing.

    Raises:
        SelfalignError: too many comparisons have no verdict, or too few pairs are left; the drops are counted by
            reason.
    """

    def judged() -> Iterator[JudgedResponse]:
        return most_varied(instructions, responses, judgements, comparator.judgements)

    wanted = sum(comparator.comparisons_of(len(one.judgements)) for one in judged())
    tally = JudgePairCounts(instructions=records_in(instructions, "instructions"), compared=wanted)
    file = out.path / "comparisons.jsonl"
    with out.journal(2 * wanted, "verdicts") as journal, open_records(file) as write:
        context = JudgeContext(
            journal=journal,
            policy=PolicyCheckpoint(policy.path) if policy else None,
            reference=None,
            engine=engine,
            seed=seed,
        )
        with context:
            for some in chunks(judged(), max(1, CHUNK // comparator.comparisons_of(judge.num_samples))):
                compared, counts = comparator.compare(
                    context, [pair for one in some for pair in one.comparisons(judge)]
                )
                tally.add(compared, counts)
                write(compared)
    if wanted:
        comparator.check_failures(tally.unread, wanted, out.label)
    found = join_sorted(judged(), _comparisons(file), lambda one: one.instruction_id, file)
    write_records(out.path / "pairs.jsonl", tally.pairs_of(found, judge, comparator.max_chosen_characters))
    if tally.pairs < comparator.minimum_pairs:
        raise SelfalignError(
            f"{out.label}: {tally.pairs} pairs of judgements from {tally.instructions} instructions, fewer than "
            f"data.meta_judge.minimum_pairs={comparator.minimum_pairs} (dropped: {dict(tally.drops)}). If scores do "
            "not vary, raise judge.num_samples or judge.sampling.temperature; if comparisons tie, set "
            "data.meta_judge.debias_position=true or another data.meta_judge.model"
        )
    return {
        catalog.PAIRS.name: tally.pairs,
        catalog.CANDIDATE_PAIRS.name: tally.instructions,
        catalog.COMPARISONS.name: wanted,
        "dropped": dict(sorted((tally.drops + Counter(unread_comparison=tally.unread.reasons.total())).items())),
        catalog.JUDGE_FIRST_WINS.name: tally.weights.share_of_first,
        **({} if tally.higher.value is None else {catalog.JUDGE_HIGHER_CHOSEN.name: tally.higher.value}),
        **bias_statistics(_comparisons(file)),
        **tally.counts,
        **averages(tally.means),
        **context.counts,
    }


def _comparisons(file: Path) -> Iterator[Comparison]:
    """Yield the comparisons; there are none if no scores vary."""
    return stream_records(file, Comparison) if file.stat().st_size else iter(())


def most_varied(
    instructions: Artifact, responses: Artifact, judgements: Artifact, count: int = 0
) -> Iterator[JudgedResponse]:
    """Yield the response of each instruction whose scores have the highest variance, the first of equals.

    An instruction is passed over if the scores of none of its responses vary.

    Args:
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        judgements: judgements.jsonl.
        count: how many of the judgements with a score go with the response, the first ones; 0 is all.
    """
    answers, written = responses.path / "responses.jsonl", judgements.path / "judgements.jsonl"
    scored = (judgement for judgement in stream_records(written, Judgement) if judgement.score is not None)
    judged = join_sorted(stream_records(answers, Response), scored, lambda one: one.response_id, written)
    prompts = stream_records(instructions.path / "instructions.jsonl", Instruction)
    for instruction, group in join_sorted(prompts, judged, lambda one: one[0].instruction_id, answers):
        candidates = [JudgedResponse(instruction, response, own) for response, own in group]
        best = max(candidates, key=lambda one: one.variance, default=None)
        if best is not None and best.variance:
            yield replace(best, judgements=best.judgements[: count or None])


@dataclass(slots=True)
class JudgePairCounts:
    """Running counts of comparisons of judgements, and of pairs.

    Attributes:
        instructions: number of instructions.
        compared: number of comparisons.
        unread: comparisons without a verdict.
        weights: of wins by position.
        counts: the comparator's own counts, summed.
        means: its own metrics, to be averaged.
        pairs: number of pairs.
        drops: {reason: number of instructions without a pair}.
        higher: mean over pairs of unequal scores: 1 if the chosen judgement gives the higher one, else 0.
    """

    instructions: int
    compared: int
    unread: Unread = field(default_factory=Unread)
    weights: PositionWeights = field(default_factory=PositionWeights)
    counts: Counter[str] = field(default_factory=Counter)
    means: Sums = field(default_factory=dict)
    pairs: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    higher: RunningMean = field(default_factory=RunningMean)

    def add(self, comparisons: Sequence[Comparison], counts: Counts) -> None:
        """Add some comparisons, and what the comparator counted meanwhile."""
        for comparison in comparisons:
            self.weights.add(comparison)
        self.unread.add((one.status, unread_text(one)) for one in comparisons if one.outcome is None)
        preference = counts.pop(place := catalog.JUDGE_PLACE_PREFERENCE.name, None)
        if preference is not None:
            self.means = add_sums(self.means, {place: Mean(preference * len(comparisons), float(len(comparisons)))})
        self.counts.update(counts)

    def pairs_of(
        self, compared: Iterable[tuple[JudgedResponse, list[Comparison]]], judge: SampledScore, longest: int
    ) -> Iterator[PreferencePair]:
        """Yield the pairs of judgements, and count those that are dropped.

        Args:
            compared: responses with the comparisons of their judgements.
            judge: the judge that wrote them.
            longest: the most characters of a chosen judgement; 0 is no limit.
        """
        varied = 0
        for one, own in compared:
            varied += 1
            rates = self.rates(own)
            best, worst = max(one.judgements, key=lambda j: rates[j.id]), min(one.judgements, key=lambda j: rates[j.id])
            if rates[best.id] == rates[worst.id]:
                self.drops["tie"] += 1
            elif best.text == worst.text:
                self.drops["identical"] += 1
            elif longest and len(best.text) > longest:
                self.drops["too_long"] += 1
            else:
                self.pairs += 1
                if gap := (best.score or 0.0) - (worst.score or 0.0):
                    self.higher.add(float(gap > 0))
                yield one.pair(judge, best, worst)
        self.drops["no_variance"] = self.instructions - varied

    def rates(self, comparisons: Sequence[Comparison]) -> dict[str, float]:
        """Return {judgement: its expected win rate by its weighted wins}."""
        games = [(one, self.weights.games(one)) for one in comparisons]
        outcomes = [(one.first_id, one.second_id, won / ((won + lost) or 1)) for one, (won, lost) in games]
        return expected_win_rates(outcomes, [won + lost for _, (won, lost) in games])
