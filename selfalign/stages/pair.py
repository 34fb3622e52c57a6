"""pair: responses + scores → preference pairs, labelled responses, or positives."""

import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import UNSET, to_builtins

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed, digest_json, digest_text
from selfalign.core.jsonl import count_records, join_sorted, read_records, read_scores, stream_records, write_records
from selfalign.core.records import (
    Demonstration,
    Instruction,
    LabelledResponse,
    PreferencePair,
    Response,
    ResponseScore,
)
from selfalign.data.labelled import LABELLED
from selfalign.data.mixtures import DataSource
from selfalign.data.pair_rules import ROUNDING, PairRule, ScoredResponse, agreement, pick_pairs
from selfalign.data.schemas import Schema
from selfalign.data.sources import read_pairs
from selfalign.data.tails import texts_asked_in
from selfalign.data.turns import compared_prompt
from selfalign.metrics import catalog
from selfalign.metrics.intervals import RunningMean, correlation
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import MANY, Size, amount, records_in, stage
from selfalign.training.splits import KnownTexts, split_pairs

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class PositivesOnly:
    """Good responses become SFT examples instead of pairs (arXiv 2401.10020, "positives only" variant).

    Attributes:
        minimum_score: the lowest mean score of a positive; the paper takes 5, the highest score.
        minimum_examples: the run stops with an error if there are fewer positives.
    """

    minimum_score: float = 5.0
    minimum_examples: int = 1

    def __post_init__(self) -> None:
        if self.minimum_examples < 1:
            raise SelfalignError(f"pair.minimum_examples must be 1 or more, got {self.minimum_examples}")


@dataclass(kw_only=True, slots=True)
class Labels:
    """Label each judged response as desirable or undesirable, for a loss that takes responses one by one (`loss=kto`).

    Attributes:
        threshold: responses with at least this mean score are desirable, and all others undesirable. null compares with
            the mean score of all responses to the instruction: those above it are desirable, those below undesirable,
            and those equal to it dropped.
        finished_only: only responses that ended by themselves are labelled, not those cut at the token limit.
        minimum_examples: the run stops with an error if there are fewer desirable or fewer undesirable responses.
    """

    threshold: float | None = None
    finished_only: bool = False
    minimum_examples: int = 1

    def __post_init__(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise SelfalignError(f"pair.threshold must be null or finite, got {self.threshold}")
        if self.minimum_examples < 1:
            raise SelfalignError(f"pair.minimum_examples must be 1 or more, got {self.minimum_examples}")

    def label(
        self, responses: Sequence[Response], scores: Mapping[str, float]
    ) -> Iterator[tuple[Response, bool | str]]:
        """Yield each response to an instruction with its label, or with the reason to drop it.

        Args:
            responses: all responses to the instruction.
            scores: {response id: mean score} of those that have one.
        """
        middle = math.fsum(scores.values()) / len(scores) if self.threshold is None and scores else self.threshold
        for response in responses:
            score = scores.get(response.id)
            if score is None or middle is None:
                yield response, "unjudged"
            elif self.finished_only and not response.finished:
                yield response, "unfinished"
            elif not response.text:
                yield response, "empty_response"
            elif self.threshold is None and abs(score - middle) <= ROUNDING:
                yield response, "tie"
            else:
                yield response, score >= middle


Rule = PairRule | PositivesOnly | Labels
"""What makes training data of judged responses."""


def size(*, rule: Rule, instructions: Artifact, responses: Artifact, **others: object) -> Size:
    """Return the number of pairs, positives or labelled responses if none is dropped."""
    count, answers = records_in(instructions, "instructions"), records_in(responses, "responses")
    most = count * rule.wanted(math.ceil(answers / count)) if isinstance(rule, PairRule) else answers
    return Size(f"up to {most}", {file_of(rule): most})


def file_of(rule: Rule) -> str:
    """Return the name of the file that a rule fills, without its ending."""
    return "demonstrations" if isinstance(rule, PositivesOnly) else LABELLED if isinstance(rule, Labels) else "pairs"


@stage(size=size)
def pair(
    out: StageOutput,
    *,
    rule: Rule,
    instructions: Artifact,
    responses: Artifact,
    judgements: Artifact | None,
    seed: int,
    thought_prompt: str = "",
    second: Artifact | None = None,
) -> Counts:
    """Turn scored responses into preference pairs, labelled responses or positives.

    Args:
        out: receives pairs.jsonl, labelled.jsonl, or demonstrations.jsonl for positives.
        rule: selects the responses.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        judgements: scores.jsonl; None for a rule that needs no scores.
        seed: seeds the rule's random choices, together with the instruction's id.
        thought_prompt: the prompt that asked for the thoughts of the responses.
        second: scores.jsonl of a second judge, for `rule.consistency`.

    Raises:
        SelfalignError: too few are left; the drops are counted by reason.
    """
    if judgements is not None:
        groups = read_groups(instructions, responses, judgements)
    else:
        assert isinstance(rule, PairRule)
        groups = _unjudged(rule, instructions, responses)
    tally = PairCounts()
    if second is not None and judgements is not None and isinstance(rule, PairRule):
        seen = read_groups(instructions, responses, judgements)
        tally.consistency = Consistency.of(seen, read_scores(second.path), each=rule.consistency == "each")
    if isinstance(rule, PositivesOnly):
        counts = _keep_positives(out, rule, tally.count_groups(groups), tally, thought_prompt)
    elif isinstance(rule, Labels):
        counts = _keep_labelled(out, rule, tally.count_groups(groups), tally, thought_prompt)
    else:
        counts = _keep_pairs(out, rule, tally.count_groups(groups), tally, seed, thought_prompt)
    if judgements is None:
        return counts
    length_correlation = tally.length_correlation.value
    if length_correlation is not None:
        counts |= {catalog.SCORE_LENGTH_CORRELATION.name: length_correlation}
    return counts


@dataclass(frozen=True, slots=True)
class InstructionGroup:
    """An instruction, its responses, and {response id: score} of the responses that have one."""

    instruction: Instruction
    responses: list[Response]
    scores: dict[str, float]


def read_groups(instructions: Artifact, responses: Artifact, judgements: Artifact) -> Iterator[InstructionGroup]:
    """Yield one instruction at a time. The three files must have the same order.

    Raises:
        SelfalignError: their orders differ.
    """
    responses_file, scores_file = responses.path / "responses.jsonl", judgements.path / "scores.jsonl"
    score_records = stream_records(scores_file, ResponseScore)
    scored = join_sorted(stream_records(responses_file, Response), score_records, lambda score: score.id, scores_file)
    prompts = stream_records(instructions.path / "instructions.jsonl", Instruction)
    for instruction, group in join_sorted(prompts, scored, lambda one: one[0].instruction_id, responses_file):
        known = {response.id: score.score for response, own in group for score in own if score.score is not None}
        yield InstructionGroup(instruction, [response for response, _ in group], known)


def _unjudged(rule: PairRule, instructions: Artifact, responses: Artifact) -> Iterator[InstructionGroup]:
    """Yield one instruction at a time, with the scores that a rule assumes."""
    file = responses.path / "responses.jsonl"
    prompts = stream_records(instructions.path / "instructions.jsonl", Instruction)
    written = stream_records(file, Response)
    for instruction, group in join_sorted(prompts, written, lambda one: one.instruction_id, file):
        yield InstructionGroup(instruction, group, rule.assumed_scores(group))


@dataclass(frozen=True, slots=True)
class Consistency:
    """How far two judges agree on the order of the responses.

    Attributes:
        mean: the mean agreement over all instructions with two responses that both have scored.
        each: {instruction id: its agreement}; empty if all instructions have the mean.
    """

    mean: float
    each: dict[str, float]

    @classmethod
    def of(cls, groups: Iterable[InstructionGroup], others: dict[str, float], *, each: bool) -> "Consistency | None":
        """Compare the scores of groups with those of another judge; None where no instruction can be compared."""
        found = {group.instruction.id: agreement(group.scores, others) for group in groups}
        known = {name: value for name, value in found.items() if value is not None}
        return cls(math.fsum(known.values()) / len(known), known if each else {}) if known else None

    def label_smoothing(self, instruction: str) -> float:
        """Return ε of an instruction's pairs. One that cannot be compared has that of the mean."""
        return 1 - self.each.get(instruction, self.mean)


@dataclass(slots=True)
class PairCounts:
    """Running counts over instructions and pairs.

    Attributes:
        instructions: number of instructions.
        unjudged: number of responses without a score.
        wanted: number of pairs if none were dropped.
        drops: {reason: number of dropped pairs or positives}.
        margin: mean score margin of the pairs.
        length_difference: mean tokens of the chosen response minus those of the rejected one.
        length_correlation: mean over instructions of Spearman's correlation of score and length.
        consistency: of two judges, where there are two.
    """

    instructions: int = 0
    unjudged: int = 0
    wanted: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    margin: RunningMean = field(default_factory=RunningMean)
    length_difference: RunningMean = field(default_factory=RunningMean)
    length_correlation: RunningMean = field(default_factory=RunningMean)
    consistency: Consistency | None = None

    def count_groups(self, groups: Iterable[InstructionGroup]) -> Iterator[InstructionGroup]:
        """Yield the groups unchanged and count each one."""
        for group in groups:
            self.instructions += 1
            self.unjudged += len(group.responses) - len(group.scores)
            judged = [response for response in group.responses if response.id in group.scores]
            found = correlation([group.scores[r.id] for r in judged], [r.tokens for r in judged], "spearman")
            if found is not None:
                self.length_correlation.add(found)
            yield group


def _keep_pairs(
    out: StageOutput,
    rule: PairRule,
    groups: Iterable[InstructionGroup],
    tally: PairCounts,
    seed: int,
    thought_prompt: str,
) -> Counts:
    """Write the pairs of every instruction. `candidate_pairs` counts kept and dropped pairs."""

    def pairs() -> Iterator[PreferencePair]:
        for group in groups:
            group_seed = derive_seed(seed, group.instruction.id)
            picked, dropped = pick_pairs(rule, group.responses, group.scores, group_seed)
            tally.drops += dropped
            tally.wanted += rule.wanted(len(group.responses))
            for chosen, rejected in picked:
                tally.margin.add(chosen.score - rejected.score)
                tally.length_difference.add(chosen.response.tokens - rejected.response.tokens)
                made = _pair_of(group.instruction, chosen, rejected, thought_prompt)
                if tally.consistency is not None:
                    made = replace(made, label_smoothing=tally.consistency.label_smoothing(group.instruction.id))
                yield made if rule.needs_scores else replace(made, chosen_score=None, rejected_score=None)
        if tally.margin.count < rule.minimum_pairs:
            raise SelfalignError(
                f"{out.label}: {tally.margin.count} pairs from {tally.instructions} instructions, fewer than "
                f"pair.minimum_pairs={rule.minimum_pairs} (dropped: {dict(tally.drops)}). If the judge ties too often, "
                "use evaluation fine-tuning or judge=expected_score; if candidates are alike, raise the temperature"
            )

    write_records(out.path / "pairs.jsonl", pairs())
    return {
        catalog.PAIRS.name: tally.margin.count,
        catalog.CANDIDATE_PAIRS.name: tally.wanted,
        **({catalog.MEAN_SCORE_MARGIN.name: tally.margin.value} if rule.needs_scores else {}),
        catalog.MEAN_LENGTH_DIFFERENCE.name: tally.length_difference.value,
        **({catalog.CONSISTENCY.name: tally.consistency.mean} if tally.consistency is not None else {}),
        **({catalog.UNJUDGED_RESPONSES.name: tally.unjudged} if rule.needs_scores else {}),
        "dropped": dict(sorted(tally.drops.items())),
    }


def _pair_of(
    instruction: Instruction, chosen: ScoredResponse, rejected: ScoredResponse, thought_prompt: str
) -> PreferencePair:
    best, worst = chosen.response, rejected.response
    return PreferencePair(
        id=digest_text(best.id + worst.id)[:16],
        prompt=instruction.prompt,
        chosen=best.text,
        rejected=worst.text,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        chosen_finished=best.finished,
        rejected_finished=worst.finished,
        instruction_id=instruction.id,
        chosen_id=best.id,
        rejected_id=worst.id,
        chosen_ids=best.ids,
        rejected_ids=worst.ids,
        chosen_thought=best.thought,
        rejected_thought=worst.thought,
        thought_prompt=thought_prompt,
    )


def size_of_given(*, source: DataSource, count: int, **others: object) -> Size:
    """Return the number of pairs."""
    return Size(f"the first {count} of {source}" if count else str(source), {"pairs": count or MANY})


@stage(size=size_of_given, given=True)
def given_pairs(
    out: StageOutput,
    *,
    source: DataSource,
    count: int,
    content: Content | str,
    held_out: list[Artifact],
    set_aside: int,
    trained_on: list[Artifact],
    schema: Schema | None = None,
) -> Counts:
    """Read given preference data as pairs, and their chosen responses as demonstrations.

    Args:
        out: receives pairs.jsonl and demonstrations.jsonl.
        source: a data source of preference pairs, or of ranked answers.
        count: number of pairs, the first ones; 0 takes all.
        content: digest of the source.
        held_out: artifacts with instructions.jsonl that no training may see. Pairs with one of them are dropped.
        set_aside: number of pairs that the alignment will measure on instead of training on them.
        trained_on: artifacts that M1 is trained on. The pairs set aside must share no text with them.
        schema: the user's description of the source's rows; None for a known format.

    Raises:
        SelfalignError: no pair is left, or too few can be set aside. The latter is checked before any training.
    """
    given, drops = read_pairs(source, schema)
    known = [record for part in held_out for record in read_records(part.path / "instructions.jsonl", Instruction)]
    usable = _without_held_out(given, {compared_prompt(record.prompt) for record in known})
    pairs = usable[: count or None]
    drops.update(held_out=len(given) - len(usable), surplus=len(usable) - len(pairs))
    if not pairs:
        raise SelfalignError(f"{source}: no usable pair (dropped: {dict(+drops)})")
    if set_aside:
        split_pairs(pairs, set_aside, KnownTexts.of(trained_on))
    write_records(out.path / "pairs.jsonl", pairs)
    write_records(out.path / "demonstrations.jsonl", (one for pair in pairs for one in positives_of(pair)))
    return {catalog.PAIRS.name: len(pairs), "dropped": dict(sorted((+drops).items()))}


def positives_of(pair: PreferencePair) -> list[Demonstration]:
    """Return a given pair's chosen response as a demonstration, or one for each of its turns of the assistant's."""
    turns = pair.chosen_turns or []
    last = Demonstration(
        id=pair.id,
        prompt=pair.prompt if isinstance(pair.prompt, str) else [*pair.prompt, *turns],
        response=pair.chosen,
        source="positive",
        response_calls=pair.chosen_calls,
    )
    whole, before = last.prompt, len(last.prompt) - len(turns)
    if isinstance(whole, str) or not turns:
        return [last]
    places = [at for at in range(before, len(whole)) if whole[at]["role"] == "assistant"]
    calls = [whole[at].get("tool_calls", UNSET) for at in places]
    made = [
        replace(last, prompt=whole[:at], response=whole[at]["content"], response_calls=called)
        for at, called in zip(places, calls, strict=True)
    ]
    numbered = enumerate([*made, last], start=1)
    return [replace(one, id=f"{pair.id}/turn-{number}", question=pair.id) for number, one in numbered]


def _without_held_out(pairs: list[PreferencePair], held_out: set[str]) -> list[PreferencePair]:
    """Return the pairs that have no held-out instruction among their turns."""
    return [pair for pair in pairs if texts_asked_in(pair).isdisjoint(held_out)]


def size_of_gathered(*, parts: list[Artifact]) -> Size:
    """Return the number of pairs or demonstrations of all parts."""
    counts = {name: sum(records_in(part, name) for part in parts) for name in GATHERED}
    name = next((name for name, count in counts.items() if count), "demonstrations")
    return Size(f"{amount(counts[name])} {name} of {len(parts)} parts", {name: counts[name]})


GATHERED: dict[str, tuple[type[Any], catalog.Metric]] = {
    "pairs": (PreferencePair, catalog.PAIRS),
    LABELLED: (LabelledResponse, catalog.LABELLED),
    "demonstrations": (Demonstration, catalog.DEMONSTRATIONS),
}
"""{file that is gathered, without its ending: (its records, their number)}."""


@stage(size=size_of_gathered)
def gather_pairs(out: StageOutput, *, parts: list[Artifact]) -> Counts:
    """Join the pairs, labelled responses or positives of several iterations, the earliest first, or several kinds of
    pairs.

    A record whose id an earlier part has, as rows of two given files may, is named by its content.

    Args:
        out: receives the file of the parts: pairs.jsonl, labelled.jsonl, or demonstrations.jsonl for positives.
        parts: artifacts of `pair`, `meta_judge` and `replay_pairs`. Before positives there may be M1's demonstrations.
            Only pairs of judgements may be none.
    """
    name = next(name for name in GATHERED if (parts[0].path / f"{name}.jsonl").exists())
    kind, metric = GATHERED[name]
    known: set[str] = set()

    def gathered() -> Iterator[Any]:
        for file in (part.path / f"{name}.jsonl" for part in parts):
            for record in stream_records(file, kind) if file.stat().st_size else ():
                yield replace(record, id=digest_json(to_builtins(record))[:16]) if record.id in known else record
                known.add(record.id)

    write_records(out.path / f"{name}.jsonl", gathered())
    return {metric.name: count_records(out.path / f"{name}.jsonl")}


def size_of_replayed(*, share: float, pairs: list[Artifact], **others: object) -> Size:
    """Return the number of given pairs that are drawn if there are enough."""
    own = sum(records_in(part, "pairs") for part in pairs)
    count = own if math.isinf(own) else _replayed(share, own)
    return Size(f"{amount(count)} given pairs beside {amount(own)}", {"pairs": count})


@stage(size=size_of_replayed)
def replay_pairs(out: StageOutput, *, share: float, pairs: list[Artifact], given: Artifact, seed: int) -> Counts:
    """Draw given pairs to be trained on beside an iteration's own, as DICE does (arXiv 2406.09760), none twice.

    Args:
        out: receives pairs.jsonl, in the order in which they are given.
        share: γ, the share of given pairs among all, between 0 and 1. Where there are too few, all are taken.
        pairs: the iteration's own pairs, and those of earlier iterations that are trained on again.
        given: pairs.jsonl to draw from.
        seed: of the draw.
    """
    own, count = sum(records_in(part, "pairs") for part in pairs), records_in(given, "pairs")
    wanted = _replayed(share, own)
    if wanted > count:
        logger.warning(
            "%s: data.replay.share=%s of %d own pairs takes %d given ones, but data.replay.source has %d usable: all "
            "are taken, a share of %.3f",
            *(out.label, share, own, wanted, count, count / (own + count)),
        )
    drawn = set(random.Random(seed).sample(range(count), min(wanted, count)))
    records = enumerate(stream_records(given.path / "pairs.jsonl", PreferencePair))
    write_records(out.path / "pairs.jsonl", (record for at, record in records if at in drawn))
    return {catalog.REPLAYED_PAIRS.name: len(drawn), catalog.REPLAYED_PAIRS_MISSING.name: wanted - len(drawn)}


def _replayed(share: float, own: float) -> int:
    """Return how many given pairs are the share of all beside so many own ones: one at least."""
    return max(1, round(own * share / (1 - share)))


def _keep_positives(
    out: StageOutput,
    rule: PositivesOnly,
    groups: Iterable[InstructionGroup],
    tally: PairCounts,
    thought_prompt: str,
) -> Counts:
    kept = 0

    def positives() -> Iterator[Demonstration]:
        nonlocal kept
        for group in groups:
            prompt = group.instruction.prompt
            for response in group.responses:
                reason = reason_to_drop(response, group.scores.get(response.id), rule)
                if reason:
                    tally.drops[reason] += 1
                else:
                    kept += 1
                    yield Demonstration(
                        id=response.id,
                        prompt=prompt,
                        response=response.text,
                        source="positive",
                        ids=response.ids,
                        thought=response.thought,
                        thought_prompt=thought_prompt,
                    )
        if kept < rule.minimum_examples:
            raise SelfalignError(
                f"{out.label}: {kept} responses score {rule.minimum_score} or more, fewer than "
                f"pair.minimum_examples={rule.minimum_examples} (dropped: {dict(tally.drops)}); lower "
                "pair.minimum_score"
            )

    write_records(out.path / "demonstrations.jsonl", positives())
    return {catalog.POSITIVES.name: kept, "dropped": dict(sorted(tally.drops.items()))}


def _keep_labelled(
    out: StageOutput, rule: Labels, groups: Iterable[InstructionGroup], tally: PairCounts, thought_prompt: str
) -> Counts:
    kept = Counter[bool]()

    def labelled() -> Iterator[LabelledResponse]:
        for group in groups:
            for response, label in rule.label(group.responses, group.scores):
                if isinstance(label, str):
                    tally.drops[label] += 1
                    continue
                kept[label] += 1
                yield LabelledResponse(
                    id=response.id,
                    prompt=group.instruction.prompt,
                    response=response.text,
                    desirable=label,
                    score=group.scores[response.id],
                    finished=response.finished,
                    instruction_id=group.instruction.id,
                    response_id=response.id,
                    ids=response.ids,
                    thought=response.thought,
                    thought_prompt=thought_prompt,
                )
        if min(kept[True], kept[False]) < rule.minimum_examples:
            raise SelfalignError(
                f"{out.label}: {kept[True]} desirable and {kept[False]} undesirable responses, of one kind fewer than "
                f"pair.minimum_examples={rule.minimum_examples} (dropped: {dict(tally.drops)}). If the judge ties too "
                "often, use evaluation fine-tuning or judge=expected_score; else set another pair.threshold, or null"
            )

    write_records(out.path / f"{LABELLED}.jsonl", labelled())
    return {
        catalog.LABELLED.name: kept.total(),
        catalog.DESIRABLE.name: kept[True],
        "dropped": dict(sorted(tally.drops.items())),
    }


def reason_to_drop(response: Response, score: float | None, rule: PositivesOnly) -> str | None:
    """Return the reason why a response is no positive, or None."""
    if score is None:
        return "unjudged"
    if score < rule.minimum_score:
        return "low_score"
    if not response.text:
        return "empty_response"
    return None if response.finished else "cut_response"
