"""seed_data: data sources → demonstrations (IFT + EFT) and held-out ranked answers."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from msgspec import UNSET

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json, digest_text
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, RankedAnswers
from selfalign.data.mixtures import DataSource, data_source
from selfalign.data.questions import write_questions
from selfalign.data.schemas import Schema
from selfalign.data.sources import UNTAUGHT, read_conversations, read_demonstrations, read_ranked
from selfalign.data.turns import compared_prompt, texts_in
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.protocol import TeachableJudge
from selfalign.metrics import catalog
from selfalign.store.artifacts import Artifact, Content, Counts, StageOutput
from selfalign.store.stage import MANY, Size, stage
from selfalign.training.splits import KnownTexts, texts_of

logger = logging.getLogger(__name__)


class EFTSource(StrEnum):
    """The author of the EFT examples: none, humans (through their scores or ranks), or the SFT baseline.

    What the baseline judges was ranked by humans, or is synthetic: demonstrations beside worse answers of its own.
    """

    none = "none"
    human = "human"
    baseline = "baseline"
    synthetic = "synthetic"

    @property
    def by_baseline(self) -> bool:
        """Whether the SFT baseline writes the examples."""
        return self in (EFTSource.baseline, EFTSource.synthetic)


class AssistantTurns(StrEnum):
    """The turns of a conversation that SFT teaches: the assistant's last one, or all of the assistant's."""

    last = "last"
    all = "all"


@dataclass(kw_only=True, slots=True)
class SeedDataConfig:
    """The training data of M1, and the ranked questions on which its judging is measured.

    Attributes:
        demonstrations: a data source of instructions with good responses (IFT); empty for none.
        ranked: a data source of questions with ranked answers, for evaluation fine-tuning (EFT) and judge quality;
            empty for none.
        max_demonstrations: the most IFT examples, the first of the file; 0 takes all. A conversation is one.
        max_ranked: the most ranked questions, the first of the file; 0 takes all.
        held_out_share: share of the ranked questions that are held out of all training.
        eft_source: the author of the EFT examples. "none": there are none, and M1 is the paper's SFT baseline.
            "human": targets come from human scores or ranks, which small models need. "baseline": the SFT baseline
            writes justifications and scores, and those in the humans' order are kept (arXiv 2401.10020, section 3.1).
            "synthetic": it judges demonstrations beside worse answers, which `data.distortion` makes of them (arXiv
            2408.02666), and `ranked` only serves to measure judging.
        max_score_imbalance: for EFT examples by the baseline, the largest ratio of the examples with the most common
            score to those with the second most common score. The paper drops "part" of the former.
        assistant_turns: the turns of a demonstration with several turns that are taught. "last": the last one; those
            before it are its prompt. "all": each of the assistant's, except for those that the data mark as not to be
            trained on.
        fine_tune: whether M0 is fine-tuned on these data to M1. If false, M1 is M0, and demonstrations are examples of
            instructions, or answers to train against.
    """

    demonstrations: Any = "shipped:ift"
    ranked: Any = "shipped:ranked"
    max_demonstrations: int = 0
    max_ranked: int = 0
    held_out_share: float = 0.3
    eft_source: EFTSource = EFTSource.human
    max_score_imbalance: float = 1.0
    assistant_turns: AssistantTurns = field(default=AssistantTurns.last, metadata={"keyed": "if set"})
    fine_tune: bool = field(default=True, metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        self.demonstrations = data_source(self.demonstrations, "data.seed_data.demonstrations")
        self.ranked = data_source(self.ranked, "data.seed_data.ranked")
        if not 0 < self.held_out_share < 1:
            raise SelfalignError(
                f"data.seed_data.held_out_share must be above 0 and below 1, got {self.held_out_share}"
            )
        for name in ("max_demonstrations", "max_ranked"):
            if getattr(self, name) < 0:
                raise SelfalignError(f"data.seed_data.{name} must be 0 or more, got {getattr(self, name)}")
        if self.max_score_imbalance < 1:
            raise SelfalignError(
                f"data.seed_data.max_score_imbalance must be 1 or more, got {self.max_score_imbalance}"
            )
        if self.eft_source == EFTSource.synthetic and not self.demonstrations:
            raise SelfalignError(
                "data.seed_data.eft_source=synthetic needs data.seed_data.demonstrations, which the worse answers are "
                "made of: set it"
            )
        if not self.fine_tune and self.teaches_judging:
            raise SelfalignError(
                f"data.seed_data.eft_source={self.eft_source.value} teaches judging, and "
                "data.seed_data.fine_tune=false teaches nothing: set data.seed_data.eft_source=none"
            )
        if self.eft_source == EFTSource.baseline and not (self.demonstrations and self.ranked):
            raise SelfalignError(
                "data.seed_data.eft_source=baseline needs data.seed_data.demonstrations to train the baseline, "
                "and data.seed_data.ranked for it to judge"
            )

    @property
    def teaches_judging(self) -> bool:
        """Whether M1 is trained on EFT examples."""
        return self.eft_source == EFTSource.synthetic or bool(self.ranked and self.eft_source != EFTSource.none)


def size(*, config: SeedDataConfig, **others: object) -> Size:
    """Return unknown numbers of demonstrations and questions: they are known once the data are read."""
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
    """Make the SFT examples, and hold ranked questions out.

    Args:
        out: receives demonstrations.jsonl; taught.jsonl, the ranked questions that EFT uses; and ranked.jsonl,
            instructions.jsonl and responses.jsonl of the held-out questions.
        config: the data sources and their split.
        judge: its prompt becomes the prompt of EFT examples.
        contents: digests of the data sources.
        schema: the user's description of their rows; None for known formats.
    """
    data = read_seeds(config, schema)
    human = config.eft_source == EFTSource.human
    questions = match_scale(data, judge) if human else []
    eft = [demonstration for question in questions for demonstration in demonstrate_judging(question, judge)]
    write_records(out.path / "demonstrations.jsonl", [*data.ift, *eft])
    taught = data.training if config.eft_source != EFTSource.none else []
    write_records(out.path / "taught.jsonl", taught)
    write_questions(out.path, data.held_out)
    return {
        catalog.IFT.name: len({one.question or one.id for one in data.ift}),
        **({catalog.IFT_TURNS.name: len(data.ift)} if config.assistant_turns == AssistantTurns.all else {}),
        catalog.EFT.name: len(eft),
        catalog.QUESTIONS_TAUGHT.name: len(taught),
        catalog.QUESTIONS_HELD_OUT.name: len(data.held_out),
        "dropped": dict(sorted((+data.drops).items())),
    }


def size_of_taught(**others: object) -> Size:
    """Return unknown numbers: they are known once the data are read."""
    return Size("ranked questions to teach judging with", {"instructions": MANY, "responses": MANY})


@stage(size=size_of_taught, given=True)
def taught_questions(
    out: StageOutput, *, config: SeedDataConfig, contents: Sequence[Content | str], schema: Schema | None = None
) -> Counts:
    """Write the ranked questions that are not held out, with their answers, for the SFT baseline to judge.

    Args:
        out: receives ranked.jsonl, instructions.jsonl and responses.jsonl.
        config: the data sources and their split.
        contents: digests of the data sources.
        schema: the user's description of their rows; None for known formats.
    """
    questions = read_seeds(config, schema).training
    write_questions(out.path, questions)
    return {
        catalog.QUESTIONS.name: len(questions),
        catalog.RESPONSES.name: sum(len(question.texts) for question in questions),
    }


@stage(given=True)
def untrained_questions(out: StageOutput, *, seeds: Artifact, trained_on: Sequence[Artifact]) -> Counts:
    """Keep the held-out ranked questions that no evaluated model was trained on.

    Runs may have read other ranked questions, or the same file before it grew. So what is held out here may have been
    training data there.

    Args:
        out: receives ranked.jsonl, instructions.jsonl and responses.jsonl.
        seeds: ranked.jsonl, the held-out questions.
        trained_on: training data of the models: demonstrations.jsonl, taught.jsonl or pairs.jsonl.
    """
    questions = read_records(seeds.path / "ranked.jsonl", RankedAnswers)
    known = KnownTexts.of(trained_on)
    untrained = [question for question in questions if not asks_known(question, known)]
    write_questions(out.path, untrained)
    return {
        catalog.QUESTIONS_HELD_OUT.name: len(untrained),
        "dropped": {"trained_on": len(questions) - len(untrained)},
    }


def asks_known(question: RankedAnswers, known: KnownTexts) -> bool:
    """Return whether a ranked question is a prompt of known training data."""
    return known.shares(texts_of(question.prompt))


@dataclass(frozen=True, slots=True)
class SeedData:
    """The given data after the split.

    Attributes:
        ift: demonstrations of following instructions, one for each turn that is taught.
        training: ranked questions for EFT.
        held_out: ranked questions for judge quality.
        drops: {reason: number of dropped rows}.
    """

    ift: list[Demonstration]
    training: list[RankedAnswers]
    held_out: list[RankedAnswers]
    drops: Counter[str]


def read_seeds(config: SeedDataConfig, schema: Schema | None = None) -> SeedData:
    """Read and split both sources. A ranked question that is also an IFT prompt is dropped.

    Raises:
        SelfalignError: no ranked question is left, or none for EFT.
    """
    drops: Counter[str] = Counter()
    ift: list[Demonstration] = []
    questions: list[RankedAnswers] = []
    if config.demonstrations:
        every = config.assistant_turns == AssistantTurns.all
        ift, unused = (read_conversations if every else read_demonstrations)(config.demonstrations, schema)
        ift = ift[: config.max_demonstrations or None]
        ift = distinct_turns([turn for one in ift for turn in every_turn(one, unused)], unused) if every else ift
        drops.update({f"demonstrations_{reason}": count for reason, count in unused.items()})
        _check_any("demonstrations", config.demonstrations, ift, unused)
    if config.ranked:
        questions, unused = read_ranked(config.ranked, schema)
        drops.update({f"ranked_{reason}": count for reason, count in unused.items()})
        _check_any("ranked", config.ranked, questions, unused)
    prompts = {text for demonstration in ift for text in texts_in(demonstration.prompt)}
    usable = [question for question in questions if compared_prompt(question.prompt) not in prompts]
    drops["questions_in_demonstrations"] = len(questions) - len(usable)
    if questions and not usable:
        raise SelfalignError(
            f"all {len(questions)} questions of data.seed_data.ranked are prompts of data.seed_data.demonstrations: "
            "lower data.seed_data.max_demonstrations or give other questions"
        )
    usable = usable[: config.max_ranked or None]
    held_out = held_out_ids(usable, config.held_out_share)
    if usable and len(held_out) == len(usable) and config.eft_source != EFTSource.none:
        raise SelfalignError(
            f"data.seed_data.held_out_share={config.held_out_share} holds out all {len(usable)} questions of "
            "data.seed_data.ranked, so none teaches judging: lower it, give more questions, or set "
            "data.seed_data.eft_source=none"
        )
    return SeedData(
        ift=ift,
        training=[question for question in usable if question.id not in held_out],
        held_out=[question for question in usable if question.id in held_out],
        drops=drops,
    )


def _check_any(key: str, source: DataSource, found: Sequence[object], unused: Counter[str]) -> None:
    if not found:
        raise SelfalignError(f"data.seed_data.{key}={source}: no usable row (dropped: {dict(+unused)})")


def every_turn(conversation: Demonstration, drops: Counter[str]) -> list[Demonstration]:
    """Return a demonstration for each of the assistant's turns behind a user's, with the turns before it as prompt.

    The `question` of all is the conversation's id, so that training reads their common beginning once. Turns that are
    marked as not to be trained on are counted. A conversation with a single turn to teach keeps its id.
    """
    prompt = conversation.prompt
    if isinstance(prompt, str):
        return [conversation]
    first = next(at for at, turn in enumerate(prompt) if turn["role"] == "user")
    bare = [{name: value for name, value in turn.items() if name != UNTAUGHT} for turn in prompt]
    earlier = [at for at in range(first, len(prompt) - 1) if prompt[at]["role"] == "assistant"]
    taught = [at for at in earlier if UNTAUGHT not in prompt[at]]
    drops["turns_not_to_train_on"] += len(earlier) - len(taught)
    turns = [
        replace(
            conversation,
            prompt=bare[:at],
            response=bare[at]["content"],
            response_calls=bare[at].get("tool_calls", UNSET),
        )
        for at in taught
    ]
    turns.append(replace(conversation, prompt=bare))
    if len(turns) == 1:
        return turns
    name = conversation.id
    return [replace(turn, id=f"{name}/turn-{number}", question=name) for number, turn in enumerate(turns, start=1)]


def _content_of(turn: Demonstration) -> str:
    return digest_json([turn.prompt, turn.response, turn.response_calls or []])


def distinct_turns(turns: Sequence[Demonstration], drops: Counter[str]) -> list[Demonstration]:
    """Return each turn behind the same prompt once; conversations that begin alike have some in common."""
    kept = {_content_of(turn): turn for turn in reversed(turns)}
    distinct = [turn for turn in turns if kept.get(_content_of(turn)) is turn]
    drops["turns_repeated"] += len(turns) - len(distinct)
    return distinct


def held_out_ids(questions: list[RankedAnswers], share: float) -> set[str]:
    """Return the ids of the held-out questions: those whose texts have the smallest digests.

    So the split does not depend on the order of the file, and equal texts are on the same side.
    """
    digests = {question.id: digest_text(compared_prompt(question.prompt)) for question in questions}
    ordered = sorted(set(digests.values()))
    held_out = set(ordered[: round(share * len(ordered))])
    return {question_id for question_id, digest in digests.items() if digest in held_out}


def match_scale(data: SeedData, judge: TeachableJudge | Pairwise) -> list[RankedAnswers]:
    """Return the questions for EFT, without their scores if these have another scale than the judge's.

    All scores of a source have one scale. If one is outside the judge's scale, the others mean something else too:
    4 of 10 is not 4 of 5. Nor is 5 of 5 a 5 of 10: with none in the upper half of the judge's scale, theirs is shorter.
    """
    scores = [score for question in (*data.training, *data.held_out) for score in question.scores]
    if isinstance(judge, Pairwise) or not scores:
        return data.training
    middle = (judge.min_score + judge.max_score) / 2
    if judge.min_score <= min(scores) and middle < max(scores) <= judge.max_score:
        if max(scores) < judge.max_score:
            logger.warning(
                "data.seed_data.ranked has scores of at most %d, and the judge's scale ends at %d. They are taught as "
                "they are: if their scale ends earlier, leave them out, and EFT targets come from the ranks",
                max(scores),
                judge.max_score,
            )
        return data.training
    logger.warning(
        "data.seed_data.ranked has scores from %d to %d, but the judge's scale is %d to %d. EFT targets come from the "
        "ranks instead, spread over the judge's scale",
        min(scores),
        max(scores),
        judge.min_score,
        judge.max_score,
    )
    return [replace(question, scores=[]) for question in data.training]


def demonstrate_judging(question: RankedAnswers, judge: TeachableJudge | Pairwise) -> list[Demonstration]:
    """Return one EFT example for each answer: the judge's prompt, and a judgement with the human's score."""
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
    """Return evenly spaced scores in the human order: `high` for the best answer, `low` for the worst."""
    order = sorted(ranks)
    step = (high - low) / (len(ranks) - 1)
    return [round(high - step * order.index(rank)) for rank in ranks]
