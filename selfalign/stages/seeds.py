"""seeds: given data → demonstrations (IFT + EFT) and held-out ranked answers."""

from dataclasses import dataclass
from typing import Protocol

from selfalign.data import read_demonstrations, read_ranked
from selfalign.errors import SelfalignError
from selfalign.files import digest_text
from selfalign.judges.pairwise import Pairwise
from selfalign.records import (
    Demonstration,
    FinishReason,
    Instruction,
    Prompt,
    RankedAnswers,
    Response,
    write_records,
)
from selfalign.store import Counts, Workspace


@dataclass(kw_only=True, slots=True)
class SeedsConfig:
    """What M1 learns from, and what its judging is measured on.

    Attributes:
        demonstrations: instructions with good answers (IFT); empty for none.
        ranked: questions with ranked answers, for evaluation fine-tuning (EFT) and judge quality; empty for none.
        max_demonstrations: at most so many IFT examples, in the order of the file; 0 takes all.
        held_out_share: share of the ranked questions that no training sees.
        evaluation_fine_tuning: EFT examples are among the demonstrations; false gives the paper's SFT baseline.
    """

    demonstrations: str = "shipped:ift"
    ranked: str = "shipped:ranked"
    max_demonstrations: int = 0
    held_out_share: float = 0.3
    evaluation_fine_tuning: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise SelfalignError(f"data.seeds.held_out_share must lie between 0 and 1, got {self.held_out_share}")
        if self.max_demonstrations < 0:
            raise SelfalignError(f"data.seeds.max_demonstrations must be 0 or more, got {self.max_demonstrations}")


class JudgeFormat(Protocol):
    """What evaluation fine-tuning asks of a judge: its prompt, and the answer it should give."""

    def ask(self, instruction: str, response: str) -> Prompt: ...

    def answer(self, score: int, justification: str) -> str: ...

    @property
    def opening(self) -> str: ...

    @property
    def low(self) -> int: ...

    @property
    def high(self) -> int: ...


def seeds(out: Workspace, *, config: SeedsConfig, judge: JudgeFormat | Pairwise, contents: list[str]) -> Counts:
    """Builds the SFT examples and sets ranked questions aside.

    Args:
        out: gets demonstrations.jsonl and, of the held-out questions, ranked.jsonl, instructions.jsonl and
            responses.jsonl.
        config: which data, and how it is split.
        judge: its prompt is what EFT examples are written in.
        contents: digests of the data sources.
    """
    ift = read_demonstrations(config.demonstrations) if config.demonstrations else []
    ift = ift[: config.max_demonstrations or None]
    questions = read_ranked(config.ranked) if config.ranked else []
    held_out = held_out_ids(questions, config.held_out_share)
    taught = [question for question in questions if question.id not in held_out]
    kept = [question for question in questions if question.id in held_out]
    eft = [d for q in taught for d in demonstrate_judging(q, judge)] if config.evaluation_fine_tuning else []
    write_records(out.path / "demonstrations.jsonl", [*ift, *eft])
    write_records(out.path / "ranked.jsonl", kept)
    write_records(
        out.path / "instructions.jsonl",
        [Instruction(id=q.id, text=q.instruction, source="ranked") for q in kept],
    )
    write_records(out.path / "responses.jsonl", [answer for question in kept for answer in given_answers(question)])
    return {
        "ift": len(ift),
        "eft": len(eft),
        "questions_taught": len(taught),
        "questions_held_out": len(kept),
    }


def held_out_ids(questions: list[RankedAnswers], share: float) -> set[str]:
    """The questions set aside: those whose text has the smallest digests, so their file's order does not matter."""
    order = sorted(questions, key=lambda question: digest_text(question.instruction))
    return {question.id for question in order[: round(share * len(questions))]}


def demonstrate_judging(question: RankedAnswers, judge: JudgeFormat | Pairwise) -> list[Demonstration]:
    """One EFT example an answer: the judge's prompt, and the judgement a human's score or rank asks for."""
    if isinstance(judge, Pairwise):
        return judge.demonstrate(question)
    given = question.scores
    fits = bool(given) and judge.low <= min(given) and max(given) <= judge.high
    scores = given if fits else scores_from_ranks(question.ranks, judge.low, judge.high)
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
        Response(
            id=f"{question.id}-{index}",
            instruction_id=question.id,
            text=text,
            finish_reason=FinishReason.EOS,
            tokens=0,
            model="human",
        )
        for index, text in enumerate(question.texts, start=1)
    ]
