"""seed_data: given data → demonstrations (IFT + EFT) and held-out ranked answers."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_text
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, Instruction, RankedAnswers, Response, given_response
from selfalign.data.schemas import Schema
from selfalign.data.sources import read_demonstrations, read_ranked
from selfalign.data.turns import as_prompt, compared, texts_in
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.protocol import TeachableJudge
from selfalign.metrics import catalog
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import MANY, Size, stage
from selfalign.training.splits import KnownTexts, texts_of

logger = logging.getLogger(__name__)


class EFTSource(StrEnum):
    """Who writes the EFT examples: nobody, a human (scores or ranks as they were given), or the SFT baseline."""

    none = "none"
    human = "human"
    baseline = "baseline"


@dataclass(kw_only=True, slots=True)
class SeedDataConfig:
    """What M1 learns from, and what its judging is measured on.

    Attributes:
        demonstrations: instructions with good answers (IFT); empty for none.
        ranked: questions with ranked answers, for evaluation fine-tuning (EFT) and judge quality; empty for none.
        max_demonstrations: at most so many IFT examples, in the order of the file; 0 takes all.
        max_ranked: at most so many ranked questions, in the order of the file; 0 takes all.
        held_out_share: share of the ranked questions that no training sees.
        eft_source: who writes the EFT examples: "none" (there are none, M1 is the paper's SFT baseline),
            "human" (targets straight from human scores or ranks, which small models need) or "baseline" (the SFT
            baseline writes justification and score, of which those in the humans' order are kept; arXiv 2401.10020,
            section 3.1).
        max_score_imbalance: of EFT examples by the baseline, the most common score keeps at most so many times the
            examples of the second most common one; the paper drops "part" of them.
    """

    demonstrations: str = "shipped:ift"
    ranked: str = "shipped:ranked"
    max_demonstrations: int = 0
    max_ranked: int = 0
    held_out_share: float = 0.3
    eft_source: EFTSource = EFTSource.human
    max_score_imbalance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise SelfalignError(f"data.seed_data.held_out_share must lie between 0 and 1, got {self.held_out_share}")
        for name in ("max_demonstrations", "max_ranked"):
            if getattr(self, name) < 0:
                raise SelfalignError(f"data.seed_data.{name} must be 0 or more, got {getattr(self, name)}")
        if self.max_score_imbalance < 1:
            raise SelfalignError(
                f"data.seed_data.max_score_imbalance must be 1 or more, got {self.max_score_imbalance}"
            )
        if self.eft_source == EFTSource.baseline and not (self.demonstrations and self.ranked):
            raise SelfalignError(
                "data.seed_data.eft_source=baseline needs data.seed_data.demonstrations to train the baseline, "
                "and data.seed_data.ranked for it to judge"
            )


def size(*, config: SeedDataConfig, **others: object) -> Size:
    """As many as the data have, which is not known before they are read."""
    human = config.eft_source == EFTSource.human
    ift, ranked = MANY if config.demonstrations else 0, MANY if config.ranked else 0
    eft = ranked if human else 0
    counts = {"ift": ift, "eft": eft, "demonstrations": ift + eft}
    held_out = {"questions_held_out": ranked, "instructions": ranked, "responses": ranked}
    return Size(f"{config.demonstrations} {config.ranked}".strip(), counts | held_out)


@stage(size=size, given=True)
def seed_data(
    out: StageOutput,
    *,
    config: SeedDataConfig,
    judge: TeachableJudge | Pairwise,
    contents: Sequence[Content | str],
    schema: Schema | None = None,
) -> Counts:
    """Builds the SFT examples and sets ranked questions aside.

    Args:
        out: gets demonstrations.jsonl; taught.jsonl, the ranked questions that M1 learns to judge on, whoever writes
            the judgements; and, of the held-out questions, ranked.jsonl, instructions.jsonl and responses.jsonl.
        config: which data, and how it is split.
        judge: its prompt is what EFT examples are written in.
        contents: of the data sources.
        schema: says their rows in a format that is known, where the user describes one.
    """
    data = read_seeds(config, schema)
    human = config.eft_source == EFTSource.human
    examples = on_scale(data, judge) if human else []
    eft = [demonstration for question in examples for demonstration in demonstrate_judging(question, judge)]
    write_records(out.path / "demonstrations.jsonl", [*data.ift, *eft])
    judged = config.eft_source != EFTSource.none
    write_records(out.path / "taught.jsonl", data.taught if judged else [])
    write_questions(out, data.held_out)
    return {
        catalog.IFT.name: len(data.ift),
        catalog.EFT.name: len(eft),
        catalog.QUESTIONS_TAUGHT.name: len(data.taught),
        catalog.QUESTIONS_HELD_OUT.name: len(data.held_out),
        "dropped": dict(sorted((+data.drops).items())),
    }


def size_of_taught(**others: object) -> Size:
    """As many as the data have."""
    return Size("ranked questions to teach judging with", {"instructions": MANY, "responses": MANY})


@stage(size=size_of_taught, given=True)
def taught_questions(
    out: StageOutput, *, config: SeedDataConfig, contents: Sequence[Content | str], schema: Schema | None = None
) -> Counts:
    """The ranked questions that are not held out, with their answers, for the SFT baseline to judge.

    Args:
        out: gets ranked.jsonl, instructions.jsonl and responses.jsonl.
        config: which data, and how it is split.
        contents: of the data sources.
        schema: as of `seeds`.
    """
    taught = read_seeds(config, schema).taught
    write_questions(out, taught)
    return {
        catalog.QUESTIONS.name: len(taught),
        catalog.RESPONSES.name: sum(len(question.texts) for question in taught),
    }


@stage(given=True)
def untaught_questions(out: StageOutput, *, seeds: Artifact, trained_on: Sequence[Artifact]) -> Counts:
    """Of the held-out ranked questions those that no model to measure was trained on.

    Runs may have been given other ranked questions, or the same file before it grew: what is held out here may have
    been taught there.

    Args:
        out: gets ranked.jsonl, instructions.jsonl and responses.jsonl.
        seeds: ranked.jsonl, the held-out questions.
        trained_on: what the models were trained on, demonstrations.jsonl, taught.jsonl or pairs.jsonl.
    """
    questions = read_records(seeds.path / "ranked.jsonl", RankedAnswers)
    known = KnownTexts.of(trained_on)
    untaught = [question for question in questions if not asks_known(question, known)]
    write_questions(out, untaught)
    return {
        catalog.QUESTIONS_HELD_OUT.name: len(untaught),
        "dropped": {"trained_on": len(questions) - len(untaught)},
    }


def asks_known(question: RankedAnswers, known: KnownTexts) -> bool:
    """Whether a ranked question is a prompt that was trained on, or one whose answers were taught to be judged."""
    return known.shares(texts_of(as_prompt(question.instruction)))


@dataclass(frozen=True, slots=True)
class SeedData:
    """What was given, split: IFT examples, and ranked questions that teach judging or measure it."""

    ift: list[Demonstration]
    taught: list[RankedAnswers]
    held_out: list[RankedAnswers]
    drops: Counter[str]


def read_seeds(config: SeedDataConfig, schema: Schema | None = None) -> SeedData:
    """Reads both sources; a ranked question that is also an IFT prompt is dropped, so that no text has two uses.

    Raises:
        SelfalignError: no ranked question is left.
    """
    drops: Counter[str] = Counter()
    ift: list[Demonstration] = []
    questions: list[RankedAnswers] = []
    if config.demonstrations:
        ift, unused = read_demonstrations(config.demonstrations, schema)
        ift = ift[: config.max_demonstrations or None]
        drops.update({f"demonstrations_{reason}": count for reason, count in unused.items()})
        _check_any("demonstrations", config.demonstrations, ift, unused)
    if config.ranked:
        questions, unused = read_ranked(config.ranked, schema)
        drops.update({f"ranked_{reason}": count for reason, count in unused.items()})
        _check_any("ranked", config.ranked, questions, unused)
    asked = {text for demonstration in ift for text in texts_in(demonstration.prompt)}
    apart = [question for question in questions if compared(question.instruction) not in asked]
    drops["questions_in_demonstrations"] = len(questions) - len(apart)
    if questions and not apart:
        raise SelfalignError(
            f"all {len(questions)} questions of data.seed_data.ranked are prompts of data.seed_data.demonstrations: "
            f"leave some "
            "to it with data.seed_data.max_demonstrations"
        )
    apart = apart[: config.max_ranked or None]
    held_out = held_out_ids(apart, config.held_out_share)
    return SeedData(
        ift=ift,
        taught=[question for question in apart if question.id not in held_out],
        held_out=[question for question in apart if question.id in held_out],
        drops=drops,
    )


def _check_any(key: str, source: str, found: Sequence[object], unused: Counter[str]) -> None:
    if not found:
        raise SelfalignError(f"data.seed_data.{key}={source}: no row is of use (dropped: {dict(+unused)})")


def write_questions(out: StageOutput, questions: list[RankedAnswers]) -> None:
    """Writes ranked questions and, as the judge stage reads them, their instructions and responses."""
    write_records(out.path / "ranked.jsonl", questions)
    write_records(
        out.path / "instructions.jsonl",
        [Instruction(id=q.id, text=q.instruction, source="ranked") for q in questions],
    )
    write_records(
        out.path / "responses.jsonl", [answer for question in questions for answer in given_answers(question)]
    )


def held_out_ids(questions: list[RankedAnswers], share: float) -> set[str]:
    """The questions set aside: those whose text has the smallest digests, so their file's order does not matter.

    A text that occurs twice, however it is encoded, is on one side both times.
    """
    digests = {question.id: digest_text(compared(question.instruction)) for question in questions}
    order = sorted(set(digests.values()))
    chosen = set(order[: round(share * len(order))])
    return {name for name, digest in digests.items() if digest in chosen}


def on_scale(data: SeedData, judge: TeachableJudge | Pairwise) -> list[RankedAnswers]:
    """The questions that teach judging: without scores where these are not of the judge's scale.

    Scores of one source have one scale. Where any lies outside the judge's, those within mean something else too: 4 of
    10 is not 4 of 5.
    """
    given = [score for question in (*data.taught, *data.held_out) for score in question.scores]
    if isinstance(judge, Pairwise) or not given or judge.min_score <= min(given) <= max(given) <= judge.max_score:
        return data.taught
    logger.warning(
        "data.seed_data.ranked has scores from %d to %d, which is not the judge's scale from %d to %d: judging is "
        "taught by the ranks alone, spread over that scale",
        min(given),
        max(given),
        judge.min_score,
        judge.max_score,
    )
    return [replace(question, scores=[]) for question in data.taught]


def demonstrate_judging(question: RankedAnswers, judge: TeachableJudge | Pairwise) -> list[Demonstration]:
    """One EFT example an answer: the judge's prompt, and the judgement a human's score or rank asks for."""
    if isinstance(judge, Pairwise):
        return judge.demonstrate(question)
    scores = question.scores or scores_from_ranks(question.ranks, judge.min_score, judge.max_score)
    return [
        Demonstration(
            id=f"eft-{question.id}-{index}",
            prompt=judge.ask(question.instruction, text),
            response=judge.answer(score, justification),
            source="eft",
            question=question.id,
            prefill=judge.opening,
        )
        for index, (text, score, justification) in enumerate(
            zip(question.texts, scores, question.justifications, strict=True), start=1
        )
    ]


def scores_from_ranks(ranks: list[int], low: int, high: int) -> list[int]:
    """Scores that keep the human order: the best gets `high`, the worst `low`, the others lie evenly between."""
    order = sorted(ranks)
    step = (high - low) / (len(ranks) - 1)
    return [round(high - step * order.index(rank)) for rank in ranks]


def given_answers(question: RankedAnswers) -> list[Response]:
    """A question's answers as responses to judge."""
    return [
        given_response(f"{question.id}-{index}", question.id, text, "human")
        for index, text in enumerate(question.texts, start=1)
    ]
