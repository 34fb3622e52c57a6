"""pair: responses + judgements → preference pairs, or positives."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed, digest_text
from selfalign.core.jsonl import count_records, join_sorted, read_records, stream_records, write_records
from selfalign.core.records import Demonstration, Instruction, PreferencePair, Response, ResponseScore
from selfalign.data.pair_rules import PairRule, ScoredResponse, pick_pairs
from selfalign.data.schemas import Schema
from selfalign.data.sources import as_prompt, read_pairs
from selfalign.data.turns import compared, texts_in
from selfalign.metrics import catalog
from selfalign.metrics.intervals import RunningMean, correlation
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import MANY, Size, amount, records_in, stage
from selfalign.training.splits import KnownTexts, split_pairs


@dataclass(kw_only=True, slots=True)
class PositivesOnly:
    """Good responses become SFT examples instead of pairs: the paper's "positives only" variant.

    Attributes:
        minimum_score: the mean score a response needs; the paper takes perfect fives.
        minimum_examples: the run stops when fewer are left.
    """

    minimum_score: float = 5.0
    minimum_examples: int = 1

    def __post_init__(self) -> None:
        if self.minimum_examples < 1:
            raise SelfalignError(f"pair.minimum_examples must be 1 or more, got {self.minimum_examples}")


def size(*, rule: PairRule | PositivesOnly, instructions: Artifact, responses: Artifact, **others: object) -> Size:
    """As many as the rule picks where nothing is dropped."""
    count, answers = records_in(instructions, "instructions"), records_in(responses, "responses")
    positives = isinstance(rule, PositivesOnly)
    most = answers if positives else count * rule.wanted(math.ceil(answers / count))
    return Size(f"up to {most}", {"demonstrations" if positives else "pairs": most})


@stage(size=size)
def pair(
    out: StageOutput,
    *,
    rule: PairRule | PositivesOnly,
    instructions: Artifact,
    responses: Artifact,
    judgements: Artifact,
    seed: int,
    thought_prompt: str = "",
) -> Counts:
    """Turns judged responses into what alignment trains on.

    Args:
        out: gets pairs.jsonl, or demonstrations.jsonl for positives.
        rule: which responses are taken.
        instructions: instructions.jsonl.
        responses: responses.jsonl.
        judgements: scores.jsonl.
        seed: draws, together with the instruction's id, where the rule draws.
        thought_prompt: what asked for the responses' thoughts.

    Raises:
        SelfalignError: too few are left; the reasons are counted.
    """
    families = read_groups(instructions, responses, judgements)
    tally = PairCounts()
    if isinstance(rule, PositivesOnly):
        counts = _keep_positives(out, rule, tally.watch(families), tally, thought_prompt)
    else:
        counts = _keep_pairs(out, rule, tally.watch(families), tally, seed, thought_prompt)
    biased = tally.length_correlation.value
    return counts | ({} if biased is None else {catalog.SCORE_LENGTH_CORRELATION.name: biased})


@dataclass(frozen=True, slots=True)
class InstructionGroup:
    """An instruction with its responses, and the scores of those that have one, by their ids."""

    instruction: Instruction
    responses: list[Response]
    scores: dict[str, float]


def read_groups(instructions: Artifact, responses: Artifact, judgements: Artifact) -> Iterator[InstructionGroup]:
    """One instruction at a time: the three files have the same order.

    Raises:
        SelfalignError: they have not.
    """
    answers, scores = responses.path / "responses.jsonl", judgements.path / "scores.jsonl"
    judged = join_sorted(
        stream_records(answers, Response), stream_records(scores, ResponseScore), lambda score: score.id, scores
    )
    asked = stream_records(instructions.path / "instructions.jsonl", Instruction)
    for instruction, family in join_sorted(asked, judged, lambda answer: answer[0].instruction_id, answers):
        known = {response.id: score.score for response, own in family for score in own if score.score is not None}
        yield InstructionGroup(instruction, [response for response, _ in family], known)


@dataclass(slots=True)
class PairCounts:
    """What is counted while families come by.

    Attributes:
        instructions: how many came.
        unjudged: responses without a score.
        wanted: pairs that were to be made.
        drops: those, or positives, that were not, by reason.
        margin: of the scores in each pair.
        longer: tokens of the chosen response less those of the rejected one, in each pair.
        length_correlation: Spearman's correlation of score and length, in each family that has one.
    """

    instructions: int = 0
    unjudged: int = 0
    wanted: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    margin: RunningMean = field(default_factory=RunningMean)
    longer: RunningMean = field(default_factory=RunningMean)
    length_correlation: RunningMean = field(default_factory=RunningMean)

    def watch(self, families: Iterable[InstructionGroup]) -> Iterator[InstructionGroup]:
        """The same families, counted."""
        for family in families:
            self.instructions += 1
            self.unjudged += len(family.responses) - len(family.scores)
            judged = [response for response in family.responses if response.id in family.scores]
            found = correlation([family.scores[r.id] for r in judged], [r.tokens for r in judged], "spearman")
            if found is not None:
                self.length_correlation.add(found)
            yield family


def _keep_pairs(
    out: StageOutput,
    rule: PairRule,
    families: Iterable[InstructionGroup],
    tally: PairCounts,
    seed: int,
    thought_prompt: str,
) -> Counts:
    """Writes the pairs of every instruction; `candidate_pairs` is kept and dropped ones together."""

    def made() -> Iterator[PreferencePair]:
        for family in families:
            drawn = derive_seed(seed, family.instruction.id)
            picked, dropped = pick_pairs(rule, family.responses, family.scores, drawn)
            tally.drops += dropped
            tally.wanted += rule.wanted(len(family.responses))
            for chosen, rejected in picked:
                tally.margin.add(chosen.score - rejected.score)
                tally.longer.add(chosen.response.tokens - rejected.response.tokens)
                yield _pair_of(family.instruction, chosen, rejected, thought_prompt)
        if tally.margin.count < rule.minimum_pairs:
            raise SelfalignError(
                f"{out.label}: {tally.margin.count} pairs from {tally.instructions} instructions, fewer than "
                f"pair.minimum_pairs={rule.minimum_pairs} (dropped: {dict(tally.drops)}); a judge that ties too often "
                "needs evaluation fine-tuning or judge=expected_score, alike candidates a higher temperature"
            )

    write_records(out.path / "pairs.jsonl", made())
    return {
        catalog.PAIRS.name: tally.margin.count,
        catalog.CANDIDATE_PAIRS.name: tally.wanted,
        catalog.MEAN_SCORE_MARGIN.name: tally.margin.value,
        catalog.MEAN_LENGTH_DIFFERENCE.name: tally.longer.value,
        catalog.UNJUDGED_RESPONSES.name: tally.unjudged,
        "dropped": dict(sorted(tally.drops.items())),
    }


def _pair_of(
    instruction: Instruction, chosen: ScoredResponse, rejected: ScoredResponse, thought_prompt: str
) -> PreferencePair:
    best, worst = chosen.response, rejected.response
    return PreferencePair(
        id=digest_text(best.id + worst.id)[:16],
        prompt=as_prompt(instruction.text),
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


def size_of_given(*, source: str, count: int, **others: object) -> Size:
    """The first ones, or all."""
    return Size(f"the first {count} of {source}" if count else source, {"pairs": count or MANY})


@stage(size=size_of_given, given=True)
def given_pairs(
    out: StageOutput,
    *,
    source: str,
    count: int,
    content: Content | str,
    held_out: list[Artifact],
    set_aside: int,
    trained_on: list[Artifact],
    schema: Schema | None = None,
) -> Counts:
    """Given preference data as pairs, and its chosen responses as demonstrations.

    Args:
        out: gets pairs.jsonl and demonstrations.jsonl.
        source: a data source of preference pairs, or of ranked answers.
        count: takes the first so many; 0 takes all.
        content: of the source.
        held_out: instructions.jsonl of what no training may see; pairs that ask one of these are dropped.
        set_aside: how many pairs will be measured instead of trained on.
        trained_on: artifacts with what M1 learns from, with which those may share no text.
        schema: says the source's rows in a format that is known, where the user describes one.

    Raises:
        SelfalignError: no pair is left, or not so many can be set aside, which is noticed before anything is trained.
    """
    given, drops = read_pairs(source, schema)
    known = [record for part in held_out for record in read_records(part.path / "instructions.jsonl", Instruction)]
    apart = _without_held_out(given, {compared(record.text) for record in known})
    pairs = apart[: count or None]
    drops.update(held_out=len(given) - len(apart), surplus=len(apart) - len(pairs))
    if not pairs:
        raise SelfalignError(f"{source}: no usable pair (dropped: {dict(+drops)})")
    if set_aside:
        split_pairs(pairs, set_aside, KnownTexts.of(trained_on))
    write_records(out.path / "pairs.jsonl", pairs)
    chosen = [Demonstration(id=p.id, prompt=p.prompt, response=p.chosen, source="positive") for p in pairs]
    write_records(out.path / "demonstrations.jsonl", chosen)
    return {catalog.PAIRS.name: len(pairs), "dropped": dict(sorted((+drops).items()))}


def _without_held_out(pairs: list[PreferencePair], held_out: set[str]) -> list[PreferencePair]:
    """Pairs none of whose turns is a held-out instruction."""
    return [pair for pair in pairs if texts_in(pair.prompt).isdisjoint(held_out)]


def size_of_gathered(*, parts: list[Artifact]) -> Size:
    """All of the parts."""
    found = {name: sum(records_in(part, name) for part in parts) for name in ("pairs", "demonstrations")}
    name, most = ("pairs", found["pairs"]) if found["pairs"] else ("demonstrations", found["demonstrations"])
    return Size(f"{amount(most)} of {len(parts)} parts", {name: most})


@stage(size=size_of_gathered)
def gather_pairs(out: StageOutput, *, parts: list[Artifact]) -> Counts:
    """What several iterations made, together, the earliest first.

    Args:
        out: gets pairs.jsonl, or demonstrations.jsonl for positives, whichever the parts have.
        parts: what `pair` made in each iteration; M1's demonstrations may come before positives.
    """
    names = {"pairs": PreferencePair, "demonstrations": Demonstration}
    name = "pairs" if (parts[0].path / "pairs.jsonl").exists() else "demonstrations"
    gathered = (record for part in parts for record in stream_records(part.path / f"{name}.jsonl", names[name]))
    write_records(out.path / f"{name}.jsonl", gathered)
    metric = catalog.PAIRS if name == "pairs" else catalog.POSITIVES
    return {metric.name: count_records(out.path / f"{name}.jsonl")}


def _keep_positives(
    out: StageOutput,
    rule: PositivesOnly,
    families: Iterable[InstructionGroup],
    tally: PairCounts,
    thought_prompt: str,
) -> Counts:
    kept = 0

    def made() -> Iterator[Demonstration]:
        nonlocal kept
        for family in families:
            prompt = as_prompt(family.instruction.text)
            for response in family.responses:
                reason = _against_positive(response, family.scores.get(response.id), rule)
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

    write_records(out.path / "demonstrations.jsonl", made())
    return {catalog.POSITIVES.name: kept, "dropped": dict(sorted(tally.drops.items()))}


def _against_positive(response: Response, score: float | None, rule: PositivesOnly) -> str | None:
    """Why a response is no positive, or None."""
    if score is None:
        return "unjudged"
    if score < rule.minimum_score:
        return "low_score"
    if not response.text:
        return "empty_response"
    return None if response.finished else "cut_response"
