"""Reading what the user gives: demonstrations, ranked answers, instructions, preference pairs.

A source is "shipped:NAME" (the seed data in this package), a file (.jsonl, .json, .parquet), or a hub id
"owner/name" with an optional ":split" behind it. Every row is checked; a message names the file and the line. Rows
in the schema of a published data set (published.py) are told by their fields.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from selfalign.errors import SelfalignError
from selfalign.files import digest_file, digest_json, digest_text, read_json
from selfalign.published import DEMONSTRATIONS, PAIRS, RANKED, schema_of
from selfalign.records import (
    Demonstration,
    Instruction,
    Message,
    PreferencePair,
    Prompt,
    RankedAnswers,
    read_typed_lines,
)

T = TypeVar("T")
Readers = dict[type, Callable[[Any], tuple[list[T], Counter[str]]]]
SHIPPED = Path(__file__).parent / "seeds"


@dataclass(kw_only=True, slots=True)
class DemonstrationRow:
    """A line of instruction data: the task and a good answer."""

    instruction: str
    response: str
    id: str = ""


@dataclass(kw_only=True, slots=True)
class InstructionRow:
    """A line of evaluation data: the task alone."""

    instruction: str
    id: str = ""
    category: str = ""


@dataclass(kw_only=True, slots=True)
class OutputRow:
    """A line of another model's answers, as alpaca_eval keeps them; what else it holds is passed over."""

    instruction: str
    output: str
    generator: str = "given"
    dataset: str = ""


@dataclass(kw_only=True, slots=True)
class AnswerRow:
    """One of several answers to a question; rank 1 is best. `score` and `justification` are a human judge's."""

    text: str
    rank: int
    score: int | None = None
    justification: str = ""


@dataclass(kw_only=True, slots=True)
class RankedRow:
    """A line of ranked data: a question and its answers, in any order."""

    instruction: str
    responses: list[AnswerRow]
    id: str = ""


@dataclass(kw_only=True, slots=True)
class PairRow:
    """A line of preference data in TRL's formats.

    Standard: three texts, taken as they stand. Conversational: `prompt` is a list of messages and the responses
    are lists with one assistant message, or both responses are whole conversations that begin alike (a text in
    `prompt` then repeats their last user turn). The scores are a judge's, where there are any.
    """

    chosen: str | list[Message]
    rejected: str | list[Message]
    prompt: str | list[Message] | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    id: str = ""


def read_demonstrations(source: str) -> tuple[list[Demonstration], Counter[str]]:
    """Prompts with good answers, and how many rows were dropped, by reason."""
    if (published := _read_published(source, DEMONSTRATIONS)) is not None:
        return published
    rows = _read(source, DemonstrationRow)
    ids = _ids(source, [(where, row.id, row) for where, row in rows])
    return [
        Demonstration(
            id=i, prompt=as_prompt(_filled(row.instruction, where)), response=_filled(row.response, where), source="ift"
        )
        for i, (where, row) in zip(ids, rows, strict=True)
    ], Counter()


def read_instructions(source: str, kind: str) -> list[Instruction]:
    """Instructions without answers."""
    rows = _read(source, InstructionRow)
    ids = _ids(source, [(where, row.id, row) for where, row in rows])
    return [
        Instruction(id=i, text=_filled(row.instruction, where), source=kind, category=row.category)
        for i, (where, row) in zip(ids, rows, strict=True)
    ]


def read_outputs(source: str) -> list[OutputRow]:
    """Reads another model's answers to instructions."""
    return [row for _, row in _read(source, OutputRow)]


def read_ranked(source: str) -> tuple[list[RankedAnswers], Counter[str]]:
    """Questions with answers in a human's order, and how many answers were dropped, by reason.

    Raises:
        SelfalignError: a question has fewer than two answers, or two of the same rank.
    """
    if (published := _read_published(source, RANKED)) is not None:
        return published
    rows = _read(source, RankedRow)
    ids = _ids(source, [(where, row.id, row) for where, row in rows])
    for where, row in rows:
        ranks = [answer.rank for answer in row.responses]
        if len(ranks) < 2 or len(set(ranks)) < len(ranks):
            raise SelfalignError(f"{where}: expected two or more responses of different rank, got ranks {ranks}")
        if len({answer.score is None for answer in row.responses}) > 1:
            raise SelfalignError(f"{where}: either every response has a score, or none")
    return [
        RankedAnswers(
            id=i,
            instruction=_filled(row.instruction, where),
            texts=[_filled(answer.text, where) for answer in row.responses],
            ranks=[answer.rank for answer in row.responses],
            scores=[answer.score for answer in row.responses if answer.score is not None],
            justifications=[answer.justification for answer in row.responses],
        )
        for i, (where, row) in zip(ids, rows, strict=True)
    ], Counter()


def read_pairs(source: str) -> tuple[list[PreferencePair], Counter[str]]:
    """Preference pairs, and how many rows were dropped, by reason; of ranked answers the best against the worst.

    Raises:
        SelfalignError: a row is in none of the known formats.
    """
    if (published := _read_published(source, PAIRS)) is not None:
        return published
    if "responses" in _first_row(source):
        ranked, unused = read_ranked(source)
        return [best_against_worst(question) for question in ranked], unused
    rows = _read(source, PairRow)
    ids = _ids(source, [(where, row.id, row) for where, row in rows])
    pairs: list[PreferencePair] = []
    drops: Counter[str] = Counter()
    for record_id, (where, row) in zip(ids, rows, strict=True):
        prompt, chosen, rejected = _split_pair(row, where)
        if chosen == rejected:
            drops["identical"] += 1
        elif not chosen.strip() or not rejected.strip():
            drops["empty_response"] += 1
        else:
            pairs.append(
                PreferencePair(
                    id=record_id,
                    prompt=prompt,
                    chosen=chosen,
                    rejected=rejected,
                    chosen_score=row.chosen_score,
                    rejected_score=row.rejected_score,
                )
            )
    return pairs, drops


def as_prompt(instruction: str) -> list[Message]:
    """An instruction as a conversation of one user turn."""
    return [{"role": "user", "content": instruction}]


def as_text(prompt: Prompt) -> str:
    """A prompt to read: its only message, or its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def identify_data(source: str, key: str) -> str:
    """What a data source is keyed by: the digest of its file, or the name of a hub data set.

    Raises:
        SelfalignError: there is no such file; the message names the setting, `key`.
    """
    try:
        path = _as_file(source)
    except SelfalignError as error:
        raise SelfalignError(f"{key}: {error}") from error
    if path is None:
        return source
    if not path.is_file():
        raise SelfalignError(f"{key}: {path}: no such file")
    return digest_file(path)


def best_against_worst(question: RankedAnswers) -> PreferencePair:
    """Of a ranked question the best answer and the worst, so that pairs do not depend on each other."""
    best, worst = (question.ranks.index(end(question.ranks)) for end in (min, max))
    chosen_score, rejected_score = (question.scores[i] if question.scores else None for i in (best, worst))
    return PreferencePair(
        id=question.id,
        prompt=as_prompt(question.instruction),
        chosen=question.texts[best],
        rejected=question.texts[worst],
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )


def _split_pair(row: PairRow, where: str) -> tuple[Prompt, str, str]:
    prompt, chosen, rejected = row.prompt, row.chosen, row.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if isinstance(chosen, list) and isinstance(rejected, list):
        repeated = prompt
        if not isinstance(prompt, list):
            turns = enumerate(zip(chosen, rejected, strict=False))
            same = next((i for i, (a, b) in turns if a != b), len(chosen) - 1)
            prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if isinstance(repeated, str) and (not prompt or prompt[-1].get("content") != repeated):
            raise SelfalignError(f"{where}: prompt is a text, but not the last user turn of chosen and rejected")
        turns = [*chosen, *rejected]
        if prompt and len(chosen) == len(rejected) == 1 and all(_is_answer(turn) for turn in turns):
            _check_messages(prompt, where)
            return prompt, chosen[0]["content"], rejected[0]["content"]
    raise SelfalignError(
        f"{where}: expected prompt, chosen and rejected as three texts, or as lists of messages in which chosen "
        "and rejected are one assistant message each behind the common prompt"
    )


def _is_answer(turn: Message) -> bool:
    return turn.get("role") == "assistant" and isinstance(turn.get("content"), str)


def _check_messages(messages: list[Message], where: str) -> None:
    wrong = [m for m in messages if not isinstance(m.get("content"), str) or not isinstance(m.get("role"), str)]
    if wrong or not any(message["role"] == "user" for message in messages):
        raise SelfalignError(f"{where}: a prompt is a list of messages with role and content, one of them the user's")


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise SelfalignError(f"{where}: expected a text, got an empty one")
    return text


def _as_file(source: str) -> Path | None:
    """The file a source names, or None for a hub id."""
    if source.startswith("shipped:"):
        return SHIPPED / f"{source.removeprefix('shipped:')}.jsonl"
    if Path(source).suffix in (".jsonl", ".json", ".parquet") or Path(source).exists():
        return Path(source).expanduser()
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        return None
    raise SelfalignError(f"{source!r} is no data: give shipped:NAME, a .jsonl or .parquet file, or a hub id owner/name")


def _is_table(path: Path) -> bool:
    """Whether rows are counted, because lines do not hold one each: parquet, or a list in a .json file."""
    return path.suffix == ".parquet" or (path.suffix == ".json" and path.is_file() and _begins_with(path, b"["))


def _begins_with(path: Path, sign: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(sign)


def _read(source: str, kind: type[T]) -> list[tuple[str, T]]:
    """Rows with where they stand, for messages."""
    path = _as_file(source)
    if path is not None and not _is_table(path):
        return [(f"{path}:{number}", row) for number, row in read_typed_lines(path, kind)]
    rows: list[tuple[str, T]] = []
    for index, row in enumerate(_load_dataset(source, path)):
        where = f"{source} row {index}"
        try:
            rows.append((where, msgspec.convert(_without_gaps(row), kind)))
        except msgspec.ValidationError as error:
            raise SelfalignError(f"{where}: {error}") from error
    if not rows:
        raise SelfalignError(f"{source}: no rows")
    return rows


def _read_published(source: str, readers: Readers[T]) -> tuple[list[T], Counter[str]] | None:
    """The records of a source in a published schema, and what was dropped; None for one in our own formats.

    Raises:
        SelfalignError: the schema is known, but it is of other use.
    """
    schema = schema_of(_first_row(source))
    if schema is None:
        return None
    if schema not in readers:
        uses = {"demonstrations": DEMONSTRATIONS, "ranked answers": RANKED, "pairs": PAIRS}
        known = " and ".join(use for use, by_schema in uses.items() if schema in by_schema)
        raise SelfalignError(f"{source}: rows like {schema.__name__} in published.py give {known} only")
    return readers[schema]([row for _, row in _read(source, schema)])


def _first_row(source: str) -> dict[str, Any]:
    path = _as_file(source)
    if path is not None and not _is_table(path):
        return next(read_typed_lines(path, dict))[1]
    return next(_load_dataset(source, path), {})


def _without_gaps(value: Any) -> Any:
    """A row without the nulls that a table puts where a field is missing."""
    if isinstance(value, dict):
        return {name: _without_gaps(item) for name, item in value.items() if item is not None}
    return [_without_gaps(item) for item in value] if isinstance(value, list) else value


def _load_dataset(source: str, path: Path | None) -> Iterator[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if path is not None:
            if not path.is_file():
                raise SelfalignError(f"{path}: no such file")
            if path.suffix == ".json":
                return iter(read_json(path))
            return iter(datasets.Dataset.from_parquet(str(path)))  # pyright: ignore[reportReturnType, reportArgumentType]
        name, _, split = source.partition(":")
        return iter(datasets.load_dataset(name, split=split or "train"))  # pyright: ignore[reportReturnType, reportArgumentType]
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SelfalignError(
            f"{source}: cannot be read as a data set ({reason}); check the name, file and network"
        ) from error


def _ids(source: str, rows: list[tuple[str, str, Any]]) -> list[str]:
    """Every row's id: its own, or the digest of what it says.

    Raises:
        SelfalignError: two rows have the same.
    """
    seen: dict[str, str] = {}
    for where, own, row in rows:
        record_id = own or digest_text(digest_json(msgspec.to_builtins(row)))[:16]
        if record_id in seen:
            raise SelfalignError(
                f"{where}: the same id or content as {seen[record_id]} ({record_id!r}); ids are unique"
            )
        seen[record_id] = where
    return list(seen)
