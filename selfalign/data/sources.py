"""Given data as records: demonstrations, ranked answers, instructions, preference pairs, others' outputs.

`containers` reads a source. Its rows are in one of the formats below, told by their fields and the same in every kind
of file, or in the schema of a published data set (`schemas`). `turns` reads the task of a row. Messages name the file,
the line and the field.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any, TypeVar

from msgspec import UNSET

from selfalign.core.errors import SelfalignError, reason_of
from selfalign.core.records import Demonstration, Instruction, Message, PreferencePair, Prompt, RankedAnswers
from selfalign.data.containers import Placed, read_rows
from selfalign.data.criteria import read_criteria
from selfalign.data.mixtures import DataSource, mix, renamed
from selfalign.data.preference_rows import read_pair
from selfalign.data.rows import (
    ANSWERS,
    BESIDE,
    CHECKS,
    CONVERSATIONS,
    CRITERIA,
    INSTRUCTIONS,
    MARKS,
    MEANINGS,
    SCORES,
    SIDES,
    TAILS,
    TASK,
    Row,
    give_ids,
    is_blank,
    shown,
)
from selfalign.data.schemas import (
    DEMONSTRATIONS,
    PAIRS,
    RANKED,
    RatedPair,
    Schema,
    TranscriptPair,
    against_pair,
    schema_of,
)
from selfalign.data.tails import tails_of
from selfalign.data.turns import (
    ROLES,
    as_text,
    check_prompt,
    compared,
    fault_of,
    only_answer,
    read_task,
    read_task_with_tools,
    read_turns,
    said,
    spoken,
)
from selfalign.data.verifiable import read_checks

logger = logging.getLogger(__name__)

T = TypeVar("T")
Drops = Counter[str]
Readers = dict[type, Callable[[Any], tuple[list[T], Drops]]]

TURN_MARKS = ("weight", "train", "loss")
"""Fields of a turn that tell whether it is trained on."""

UNWANTED = ("0", "0.0", "false")
"""Values of these fields, as texts in small letters, that say that it is not."""

IN_TURNS = {"role", "from", "content", "value", "name", "tool_call_id", "tool_calls", "tools", *TURN_MARKS}
"""Fields of a turn that are read."""

EMPTY = (None, "", [], {})
"""Values of a field of a turn that say nothing."""

UNTAUGHT = "untaught"
"""Key of a turn that the data mark as not to be trained on, while it is read."""

WANTED = {
    "demonstrations": "instruction (or question, query, input; with input, context, system, history) and response (or "
    "output, completion, answer); prompt and completion; or messages or conversations that end with the assistant",
    "instructions": "instruction (or question, query, prompt, input; with input or context)",
    "ranked answers": "instruction and responses, a list of text and rank",
    "outputs": "instruction and output",
}
"""Fields that a row must have, by kind of record."""


USED = {
    "demonstrations": {*TASK, *ANSWERS, *MARKS, "tools", "response_calls"},
    "instructions": {*TASK, "category", *CHECKS, *CRITERIA},
    "ranked answers": {*TASK, *CRITERIA, "responses"},
    "pairs": {*TASK, "responses", "tools", *TAILS, *chain.from_iterable((*SIDES, *SCORES))},
}
"""The fields that each kind of record is read from."""


@dataclass(frozen=True, slots=True)
class OutputRow:
    """Another model's answer, in the format of alpaca_eval, and its place. Other fields of a row are ignored.

    `turns` is the conversation that `instruction` shows, where it is more than one user turn.
    """

    where: str
    instruction: str
    output: str
    generator: str
    dataset: str
    turns: list[Message]


@dataclass(kw_only=True, slots=True)
class AnswerRow:
    """One of several answers to a question. Rank 1 is best. `score` and `justification` are a human judge's."""

    text: str
    rank: float
    score: float | None = None
    justification: str = ""


@dataclass(kw_only=True, slots=True)
class AnswersRow:
    """The answers to a question, in any order."""

    responses: list[AnswerRow]


def read_demonstrations(source: DataSource, schema: Schema | None = None) -> tuple[list[Demonstration], Drops]:
    """Return prompts with good answers, and the number of dropped rows, by reason.

    The last turn of a conversation, which is the assistant's, is the target; the turns before it are the prompt.

    Raises:
        SelfalignError: a row is in none of the known formats.
    """
    found, drops = _read(source, "demonstrations", DEMONSTRATIONS, _demonstration, schema)
    _check_demonstrations(source, found)
    longer = sum(not isinstance(d.prompt, str) and any(t["role"] == "assistant" for t in d.prompt) for d in found)
    if longer:
        logger.info(
            "%s: in %d of %d rows only the last answer is trained on; earlier ones are part of the prompt "
            "(data.seed_data.assistant_turns=all trains on them too)",
            *(source, longer, len(found)),
        )
    return found, drops


def read_conversations(source: DataSource, schema: Schema | None = None) -> tuple[list[Demonstration], Drops]:
    """Return the same as `read_demonstrations`, for training on every turn of the assistant's.

    A turn in a prompt that the data mark as not to be trained on has the key `UNTAUGHT`. The target is the last turn
    without such a mark. A row that has none is dropped and counted.

    Raises:
        SelfalignError: a row is in none of the known formats.
    """
    found, drops = _read(source, "demonstrations", DEMONSTRATIONS, _conversation, schema)
    _check_demonstrations(source, found)
    return found, drops


def _check_demonstrations(source: DataSource, found: Sequence[Demonstration]) -> None:
    answers = [(one.prompt, (said(one.response, one.response_calls),)) for one in found]
    _check_answers(source, answers)
    _tell_plain_prompts(source, [one.prompt for one in found])


def read_instructions(source: DataSource, kind: str, schema: Schema | None = None) -> tuple[list[Instruction], Drops]:
    """Return instructions without answers, and the number of dropped rows, by reason.

    An instruction may be a conversation that ends with a user turn, or with an answer to it, which is left out. Where a
    row says what is right, as `read_checks` has it, so does its instruction.
    """

    def read(row: Row, drops: Drops) -> Instruction:
        text, turns = _instruction(row, "instructions")
        category, criteria, checks = row.text("category"), read_criteria(row), read_checks(row)
        return Instruction(id="", text=text, source=kind, category=category, turns=turns, criteria=criteria, **checks)

    return _read(source, "instructions", {}, read, schema)


def read_outputs(source: str) -> tuple[list[OutputRow], Drops]:
    """Return another model's answers to instructions, and the number of rows dropped as repetitions.

    An answer may be empty: that is the other model's answer.
    """
    found: dict[tuple[str, ...], OutputRow] = {}
    drops: Drops = Counter()
    for where, raw in read_rows(source):
        row = Row.of(where, raw)
        (asked, turns), said = _instruction(row, "outputs"), _answer(row, "outputs")
        made = OutputRow(where, asked, said, row.text("generator") or "given", row.text("dataset"), turns)
        if found.setdefault((asked, said, made.generator, made.dataset), made) is not made:
            drops["duplicate"] += 1
    return list(found.values()), drops


def read_ranked(source: DataSource, schema: Schema | None = None) -> tuple[list[RankedAnswers], Drops]:
    """Return questions with answers in a human's order, and the number of dropped answers, by reason.

    Of answers with the same text the first stays, as in published sets: nobody can tell which is better. All answers of
    a question are dropped if a worse ranked answer has the higher score, or if another row asks the same and ranks two
    of the answers the other way round.

    Raises:
        SelfalignError: a question has fewer than two answers, or two of the same rank.
    """

    def read(row: Row, drops: Drops) -> RankedAnswers | None:
        question = _ranked(row, drops)
        return question and _distinct(question, drops)

    found, drops = _read(source, "ranked answers", RANKED, read, schema)
    agreed = _agreed(found, lambda question: (question.instruction, _best_first(question)))
    drops += Counter(order_contradicts=sum(len(q.texts) for q in found) - sum(len(q.texts) for q in agreed))
    return agreed, drops


def read_pairs(source: DataSource, schema: Schema | None = None) -> tuple[list[PreferencePair], Drops]:
    """Return preference pairs, and the number of dropped rows, by reason; of ranked answers the best and the worst.

    If two pairs of one prompt have the same answers the other way round, nobody can tell which is right, and both are
    dropped.

    Raises:
        SelfalignError: a row is in none of the known formats.
    """

    def read(row: Row, drops: Drops) -> PreferencePair | None:
        if "responses" not in row.fields:
            return read_pair(row, drops)
        question = _ranked(row, Counter())
        if question is None:
            drops["scores_contradict"] += 1
        return question and best_against_worst(question, drops)

    found, drops = _read(source, "pairs", PAIRS, read, schema)
    tails = {pair.id: tuple(tail.as_text() for tail in tails_of(pair)) for pair in found}
    _check_answers(source, [(pair.prompt, tails[pair.id]) for pair in found])
    _tell_plain_prompts(source, [pair.prompt for pair in found])
    agreed = _agreed(found, lambda pair: (as_text(pair.prompt), [*tails[pair.id]]))
    drops += Counter(order_contradicts=len(found) - len(agreed))
    return agreed, drops


def best_against_worst(question: RankedAnswers, drops: Drops) -> PreferencePair | None:
    """Return the best and the worst answer of a ranked question, so that pairs do not depend on each other.

    The ranks decide, also if the humans' scores are equal. If both have the same text there is no pair, which is
    counted.
    """
    best, worst = (question.ranks.index(end(question.ranks)) for end in (min, max))
    if reason := against_pair(question.texts[best], question.texts[worst]):
        drops[reason] += 1
        return None
    chosen_score, rejected_score = (question.scores[i] if question.scores else None for i in (best, worst))
    return PreferencePair(
        id=question.id,
        prompt=question.prompt,
        chosen=question.texts[best],
        rejected=question.texts[worst],
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )


def _distinct(question: RankedAnswers, drops: Drops) -> RankedAnswers | None:
    """Return a question with each answer once; None, with its answers counted, if only one is left."""
    kept = [place for place, text in enumerate(question.texts) if question.texts.index(text) == place]
    drops["duplicate"] += len(question.texts) - len(kept)
    if len(kept) < 2:
        drops["only_answer"] += len(kept)
        return None
    texts, ranks, notes = (
        [of[place] for place in kept] for of in (question.texts, question.ranks, question.justifications)
    )
    scores = [question.scores[place] for place in kept] if question.scores else []
    return replace(question, texts=texts, ranks=ranks, scores=scores, justifications=notes)


def _best_first(question: RankedAnswers) -> list[str]:
    """Return a question's answers, the best first."""
    return [text for _, text in sorted(zip(question.ranks, question.texts, strict=True))]


def _agreed(records: list[T], said: Callable[[T], tuple[str, list[str]]]) -> list[T]:
    """Return the records whose order of two answers no other record of the same prompt contradicts.

    Args:
        records: pairs or ranked questions.
        said: returns a record's prompt, and its answers with the best first; texts count in the form of `compared`.
    """

    def orders(record: T) -> Iterator[tuple[str, str, str]]:
        asked, answers = said(record)
        for better, worse in combinations(map(compared, answers), 2):
            if better != worse:
                yield compared(asked), better, worse

    known = {order for record in records for order in orders(record)}
    return [r for r in records if not any((asked, worse, better) in known for asked, better, worse in orders(r))]


def _tell_plain_prompts(source: DataSource, prompts: Sequence[Prompt]) -> None:
    """Warn about prompts that are texts: a chat model is trained on another form of them than it is asked in."""
    if plain := sum(isinstance(prompt, str) for prompt in prompts):
        logger.warning(
            "%s: in %d of %d rows prompt is a text, which is fed as it stands, without the chat template; if it is "
            "what a user says, call the field instruction",
            source,
            plain,
            len(prompts),
        )


def _check_answers(source: DataSource, records: Sequence[tuple[Prompt, tuple[str, ...]]]) -> None:
    """Raise an error if most answers begin with their prompts, because the prompt would be trained on.

    A single answer may well repeat its question.

    Raises:
        SelfalignError: more than half of the answers do, of several.
    """
    asked = [(prompt if isinstance(prompt, str) else prompt[-1]["content"], answers) for prompt, answers in records]
    begun = [all(text.strip().startswith(said.strip()) for text in answers) for said, answers in asked if said.strip()]
    count = sum(begun)
    if len(records) > 1 and 2 * count > len(records):
        raise SelfalignError(
            f"{source}: in {count} of {len(records)} rows the answer begins with its own prompt, which would be "
            "trained on as a part of it. Give only the answers."
        )


# --- sources -----------------------------------------------------------------------------------------------------


def _read(
    source: DataSource, kind: str, readers: Readers[Any], read: Callable[[Row, Drops], Any], described: Schema | None
) -> tuple[list[Any], Drops]:
    """Return the records of a data source; `kind` is one of `USED`."""
    if isinstance(source, str):
        return _read_one(source, read_rows(source), kind, readers, read, described)
    return mix(source, lambda part: _read_one(part.source, renamed(part), kind, readers, read, described))


def _read_one(
    source: str,
    rows: Iterator[Placed],
    kind: str,
    readers: Readers[Any],
    read: Callable[[Row, Drops], Any],
    described: Schema | None,
) -> tuple[list[Any], Drops]:
    """Return the records of a source in a published schema, or in selfalign's formats. The first row decides.

    If the user has described the rows by a schema, that schema converts them first.

    Raises:
        SelfalignError: the schema is known, but does not give such records.
    """
    useless: Drops = Counter()
    rows = rows if described is None else _in_our_format(rows, described, useless)
    first = next(rows, None)
    if first is None:
        return [], useless
    found = (Row.of(where, raw) for where, raw in chain([first], rows))
    schema = schema_of(first[1]) if readers else None
    if schema is None:
        records, drops = _read_own(source, kind, found, read)
    elif schema not in readers:
        uses = {"demonstrations": DEMONSTRATIONS, "ranked answers": RANKED, "pairs": PAIRS}
        known = " and ".join(use for use, by_schema in uses.items() if schema in by_schema)
        raise SelfalignError(f"{source}: rows in the schema {schema.__name__} can be read as {known} only")
    else:
        logger.info("%s: rows are read in the schema %s", source, schema.__name__)
        records, drops = readers[schema](list(_of_schema(schema, found)))
    drops += useless
    if +drops:
        logger.info("%s: left out %s", source, ", ".join(f"{n} {reason}" for reason, n in sorted((+drops).items())))
    return records, drops


def _in_our_format(rows: Iterable[Placed], schema: Schema, drops: Drops) -> Iterator[Placed]:
    """Yield rows in selfalign's format, as a user's schema converts them.

    Raises:
        SelfalignError: the schema cannot convert a row, or returns something else than a row.
    """
    for where, raw in rows:
        try:
            row = schema.read(raw)
        except Exception as error:
            raise SelfalignError(f"{where}: {type(schema).__name__}: {reason_of(error)}") from error
        if row is None:
            drops["schema"] += 1
        elif isinstance(row, dict):
            yield where, row
        else:
            raise SelfalignError(f"{where}: {type(schema).__name__} must give a dictionary, got {type(row).__name__}")


def _read_own(
    source: str, kind: str, found: Iterable[Row], read: Callable[[Row, Drops], Any]
) -> tuple[list[Any], Drops]:
    """Return the records of rows in selfalign's formats. Log ignored fields and texts that may mean a missing value.

    Ignored are the fields that this kind of record does not use, whatever another kind would take them for.
    """
    drops, names, spelled, unclear = Counter[str](), set[str](), Counter[tuple[str, str]](), set[str]()

    def seen() -> Iterator[Row]:
        for row in found:
            names.update(row.fields, _beside_turns(row, kind))
            spelled.update(row.spelled_gaps())
            unclear.update(name for name in MARKS if name in row.fields and mark_of(row, name) is None)
            if kind == "instructions":
                unclear.update(CHECKS.keys() & row.fields.keys() - read_checks(row).keys())
            yield row

    records = give_ids(((row, record) for row in seen() if (record := read(row, drops)) is not None), drops)
    used = USED[kind] - unclear - (_other_sides(names) if kind == "pairs" else set())
    meanings = MEANINGS | (CHECKS if kind == "instructions" else {})
    if taken := [f"{name} as {meanings[name]}" for name in meanings if name in names & used]:
        logger.info("%s: read %s", source, ", ".join(taken))
    if ignored := sorted(names - used):
        logger.info("%s: ignored the fields %s", source, ", ".join(ignored))
    for (name, text), rows in spelled.items():
        logger.warning(
            "%s: in %d rows %s is the text %r, which may stand for an absent value; it is taken as a text",
            source,
            rows,
            name,
            text,
        )
    return records, drops


def _beside_turns(row: Row, kind: str) -> set[str]:
    """Return the fields of turns that are not read and not empty, such as "messages[].feedback".

    In a pair's answers, all of whose turns are compared, so are marks of turns that are not to be trained on.
    """
    sides = {*chain.from_iterable(SIDES)}
    lists = {name: row.fields[name] for name in (*TASK, *sides) if name in row.fields}
    listed = [(name, turn) for name, turns in lists.items() if isinstance(turns, list) for turn in turns]
    turns = [(name, turn) for name, turn in listed if isinstance(turn, dict)]
    found = {(name, key) for name, turn in turns for key in turn if turn[key] not in EMPTY and key not in IN_TURNS}
    if kind == "pairs":
        found |= {(name, mark) for name, turn in turns if name in sides and (mark := _mark(turn))}
    return {f"{name}[].{key}" for name, key in found}


def _other_sides(names: set[str]) -> set[str]:
    """Return the fields that would be sides of a pair if the rows had not others that go before."""
    read = next((sides for sides in SIDES if names.issuperset(sides)), ())
    return {name for sides in SIDES for name in sides} - {*read}


def _of_schema(schema: type, rows: Iterator[Row]) -> Iterator[Any]:
    """Return the rows of a published schema. They must not carry a part of the task in other fields."""
    for row in rows:
        own = ("prompt", *INSTRUCTIONS) if schema is TranscriptPair else ()
        own = ("prompt",) if schema is RatedPair and isinstance(row.fields.get("prompt"), list) else own
        why = f"which rows of the schema {schema.__name__}, such as the first one, do not have"
        row.refuse_filled((*BESIDE, "tools", *own), row.fields, why=why)
        read: dict[str, Any] = {}
        if schema is RatedPair:
            read = {name: read_turns(row, name) for name in ("chosen", "rejected") if name in row.fields}
            read["asked"] = [text for name in ("prompt", *INSTRUCTIONS) if (text := row.text(name))]
        yield Row(row.where, row.fields | read).typed(schema)


# --- tasks and answers -------------------------------------------------------------------------------------------


def _lacks(row: Row, kind: str) -> str:
    return f"expected {WANTED[kind]}; found {row.found()}"


def _instruction(row: Row, kind: str) -> tuple[str, list[Message]]:
    """Return the task of a row as a text, and its turns where they are more than one user turn.

    Raises:
        SelfalignError: it asks nothing, or its turns are no conversation.
    """
    task = read_task(row)
    if isinstance(task, str):
        return task, []
    if not task:
        row.refuse(_lacks(row, kind))
    asked = task[:-1] if task[-1]["role"] == "assistant" else task
    if fault := fault_of(asked):
        row.refuse(f"{kind} must be a conversation that ends with a user turn, but {fault}; got {spoken(task)}")
    return as_text(asked), asked if len(asked) > 1 else []


def _answers(row: Row) -> dict[str, str]:
    """Return the row's answers by field: texts, or lists with one turn of the assistant's. A blank answer is ""."""
    found: dict[str, str] = {}
    for name in ANSWERS:
        if isinstance(row.fields.get(name), list | dict):
            found[name] = only_answer(row, name, read_turns(row, name))
        elif name in row.fields:
            found[name] = row.text(name)
    return found


def _answer(row: Row, kind: str) -> str:
    """Return the row's only answer; "" if it is blank.

    Raises:
        SelfalignError: it has none, or several that differ.
    """
    answers = _answers(row)
    if not answers:
        row.refuse(_lacks(row, kind))
    said = {text for text in answers.values() if text}
    if len(said) > 1:
        row.refuse(f"{' and '.join(answers)} are different answers; keep one")
    return said.pop() if said else ""


def _demonstration(row: Row, drops: Drops) -> Demonstration | None:
    for name in MARKS:
        if mark_of(row, name) is False:
            row.refuse(f"{name}=false marks an unwanted answer, but a demonstration is taught; remove the row")
    row.refuse_unended()
    row = _with_called(row)
    prompt = read_task_with_tools(row)
    whole = next((name for name in CONVERSATIONS if isinstance(row.fields.get(name), list)), "")
    calls: list[Any] = []
    if whole and prompt and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        _check_last(row, whole, prompt[-1]["content"])
        prompt, response, calls = prompt[:-1], prompt[-1]["content"], prompt[-1].get("tool_calls", [])
    elif isinstance(prompt, str) and any(isinstance(row.fields.get(name), list | dict) for name in ANSWERS):
        row.refuse("prompt is a text and the answer a list of turns; give both as texts or both as lists")
    else:
        response = _answer(row, "demonstrations")
    if not prompt:
        row.refuse(_lacks(row, "demonstrations"))
    check_prompt(row, prompt)
    if is_blank(said(response, calls)):
        drops["empty_response"] += 1
        return None
    return Demonstration(id="", prompt=prompt, response=response, source="ift", response_calls=calls or UNSET)


def _with_called(row: Row) -> Row:
    """Return a row whose answer is a tool call as a row with the whole conversation.

    The answer is a list with the assistant's turn, or the text and the `response_calls` of a demonstrations.jsonl.
    """
    fields = dict(row.fields)
    if calls := fields.pop("response_calls", None):
        fields["response"] = [{"role": "assistant", "content": row.text("response"), "tool_calls": calls}]
    for name in ANSWERS:
        answer = fields[name] if isinstance(fields.get(name), list | dict) else []
        turns = read_turns(Row(row.where, fields), name) if answer else []
        if any("tool_calls" in turn for turn in turns):
            prompt = read_task_with_tools(Row(row.where, {key: fields[key] for key in fields if key != name}))
            if isinstance(prompt, str) or len(turns) != 1:
                row.refuse(f"{name}: a tool call must be the only turn, behind a prompt of turns; got {spoken(turns)}")
            return Row(row.where, {"messages": [*prompt, *turns]} | {n: fields[n] for n in ("id",) if n in fields})
    return Row(row.where, fields)


def _conversation(row: Row, drops: Drops) -> Demonstration | None:
    """Return the demonstration of a row's last turn to be taught, with marks on the others that are not."""
    name = next((name for name in CONVERSATIONS if isinstance(row.fields.get(name), list)), "")
    items = row.fields[name] if name else []
    if not any(_mark(item) for item in items):
        made, prompt = _demonstration(row, drops), row.fields.get("prompt")
        return _with_marks(made, prompt) if made and isinstance(prompt, list) else made
    taught = [at for at, item in enumerate(items) if _speaks(item) and not _mark(item)]
    if not taught:
        drops["not_to_train_on"] += 1
        return None
    drops["turns_not_to_train_on"] += sum(map(_speaks, items[taught[-1] + 1 :]))
    kept = items[: taught[-1] + 1]
    made = _demonstration(Row(row.where, row.fields | {name: kept}), drops)
    return _with_marks(made, kept[:-1]) if made else None


def _with_marks(made: Demonstration, before: list[Any]) -> Demonstration:
    """Return a demonstration with marks on turns of its prompt; `before` has these turns as they were given."""
    if isinstance(made.prompt, str):
        return made
    # From the end, because a system turn may have come from another field, or be blank and gone.
    marked = dict(zip(range(len(made.prompt) - 1, -1, -1), reversed(before), strict=False))
    prompt = [
        turn | {UNTAUGHT: True} if turn["role"] == "assistant" and _mark(marked.get(at)) else turn
        for at, turn in enumerate(made.prompt)
    ]
    return replace(made, prompt=prompt)


def _speaks(item: Any) -> bool:
    """Whether an item of a conversation is a turn of the assistant's."""
    return isinstance(item, dict) and ROLES.get(str(item.get("role", item.get("from")))) == "assistant"


def _mark(item: Any) -> str:
    """Return the field that marks an item of a conversation as not to be trained on; "" if none does.

    Its value is 0 or false, or a text that spells one of them.
    """
    marks = TURN_MARKS if isinstance(item, dict) else ()
    return next((mark for mark in marks if mark in item and str(item[mark] or 0).strip().casefold() in UNWANTED), "")


def mark_of(row: Row, name: str) -> bool | None:
    """Return whether a field says that the row's answer is wanted; None if it is absent, or says something else."""
    return MARKS[name].get(str(row.fields.get(name)).strip().casefold())


def _check_last(row: Row, name: str, response: str) -> None:
    """Raise an error if a conversation's last turn is not one to be taught."""
    last = row.fields[name][-1]
    if mark := _mark(last):
        row.refuse(f"{name}[{len(row.fields[name]) - 1}].{mark}={shown(last[mark])}: the last turn is what is taught")
    for other, text in _answers(row).items():
        if text and text != response:
            row.refuse(f"{other} differs from the last turn of {name}; keep one")


def _ranked(row: Row, drops: Drops) -> RankedAnswers | None:
    for index, answer in enumerate(row.fields.get("responses", ())):
        if isinstance(answer, dict):
            row.refuse_unread(answer, (), f"responses[{index}].")
            row.refuse_filled(("reasoning",), answer, f"responses[{index}].")
    asked, turns = _instruction(row, "ranked answers")
    answers = row.typed(AnswersRow).responses
    ranks, scores = [a.rank for a in answers], [a.score for a in answers if a.score is not None]
    if len(ranks) < 2 or len(set(ranks)) < len(ranks):
        row.refuse(f"expected two or more responses of different rank, got ranks {ranks}")
    if not all(number.is_integer() for number in map(float, (*ranks, *scores))):
        row.refuse(f"ranks and scores must be whole numbers, got ranks {ranks} and scores {scores}")
    if len(scores) not in (0, len(ranks)):
        row.refuse("some responses have a score and others have none: give all scores, or none")
    if any(is_blank(answer.text) for answer in answers):
        row.refuse("responses: expected texts, got an empty one")
    by_rank = [score for _, score in sorted(zip(ranks, scores, strict=False))]
    if by_rank != sorted(by_rank, reverse=True):
        drops["scores_contradict"] += len(answers)
        return None
    return RankedAnswers(
        id="",
        instruction=asked,
        texts=[answer.text for answer in answers],
        ranks=list(map(int, ranks)),
        scores=list(map(int, scores)),
        justifications=[answer.justification for answer in answers],
        turns=turns,
        criteria=read_criteria(row),
    )
