"""Ranked questions as files: with their instructions and responses, for the judge stage."""

from pathlib import Path

from selfalign.core.jsonl import write_records
from selfalign.core.records import Instruction, RankedAnswers, Response
from selfalign.data.thinking import given_response


def write_questions(folder: Path, questions: list[RankedAnswers]) -> None:
    """Write ranked questions, and their instructions and responses for the judge stage."""
    write_records(folder / "ranked.jsonl", questions)
    write_records(
        folder / "instructions.jsonl",
        [
            Instruction(id=q.id, text=q.instruction, source="ranked", turns=q.turns, criteria=q.criteria)
            for q in questions
        ],
    )
    write_records(folder / "responses.jsonl", [answer for question in questions for answer in given_answers(question)])


def given_answers(question: RankedAnswers) -> list[Response]:
    """Return a question's answers as responses to judge."""
    return [
        given_response(f"{question.id}-{index}", question.id, text, "human")
        for index, text in enumerate(question.texts, start=1)
    ]
