"""A row of given data: its fields without gaps, its id, and the refusal of fields that must not be ignored.

A field is absent if it is missing, null, NaN or infinite. A text without a visible character counts as empty. Other
fields of a row (source, category, model, …) are ignored, but not those that carry a part of the task or the answer.
"""

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NoReturn, TypeVar

import msgspec

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json
from selfalign.core.records import Demonstration, Instruction, PreferencePair, RankedAnswers

logger = logging.getLogger(__name__)

UNREAD = (
    "tools", "tool_calls", "functions", "function_call", "documents", "document", "article", "passage", "passages",
    "paragraph", "premise", "hypothesis", "choices", "options", "inputs", "reasoning_content", "thinking",
    "chat_template_kwargs",
)  # fmt: skip
"""Fields with a part of the task or the answer that no record can hold: refused in rows and turns, unless empty."""

MEDIA = re.compile(
    r"(?:images?|imgs?|pictures?|photos?|videos?|audios?|attachments?)(?:_(?:paths?|urls?|files?|names?|base64|bytes))?"
)
"""Names of fields with what is no text, or with where it lies: refused in the same way."""

TOOLS = ("tools", "tool_calls")
"""Those of these fields that prompts, demonstrations and pairs can hold: definitions of tools, and calls of them."""

OLDER = {"functions": "tools", "function_call": "tool_calls"}
"""{OpenAI's older name of a field, whose form is another: today's name}."""

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Fields with a list of turns; so may be `prompt`."""

INSTRUCTIONS = ("instruction", "question", "query")
"""Fields with a text that the user says."""

INPUTS = ("input", "context")
"""Fields with the input of an instruction, which follows the instruction after a blank line, as in Alpaca's and
Dolly's own programs. `input` alone is an instruction."""

SYSTEM = ("system", "system_prompt", "system_message")
"""Fields with a system turn."""

BESIDE = (*INPUTS, *SYSTEM, "history")
"""Fields with a part of a task that stands in others."""

ANSWERS = ("response", "output", "completion", "answer")
"""Fields with an answer."""

SIDES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("response", "rejected_response"))
"""Fields with the better and the worse answer: TRL's and most others', OpenAI's, ms-swift's."""

TAILS = ("chosen_turns", "rejected_turns", "chosen_calls", "rejected_calls", "response_calls")
"""Fields of pairs.jsonl and demonstrations.jsonl with turns before an answer, and with its tool calls."""

THOUGHTS = ("thought", "chosen_thought", "rejected_thought", "thought_prompt")
"""Fields of the same files with what was written before an answer: refused, because a given answer holds it itself."""

SMOOTHING = "label_smoothing"
"""Field of pairs.jsonl with a pair's own ε, how likely it is in the wrong order."""

ENDED = ("chosen_finished", "rejected_finished")
"""Fields of pairs.jsonl that tell whether an answer ended by itself. A given one does."""

CRITERIA = ("criteria", "rubric", "rubrics")
"""Fields with what responses to an instruction are judged by."""

SCORES = tuple(
    (f"{side}_score", f"score_{side}", f"{side}_rating", f"rating_{side}", f"{side}-rating", f"{side}-score")
    for side in ("chosen", "rejected")
)
"""Fields with the score of the better and of the worse answer."""

TEXTS = ("prompt", *INSTRUCTIONS, *INPUTS, *SYSTEM, *ANSWERS, *chain.from_iterable(SIDES))
"""Fields with a text."""

SPELLED_GAPS = ("nan", "none", "null", "nil", "undefined", "n/a", "#n/a", "<na>", "nat", "<noinput>")
"""How programs spell an absent text."""

READ = {
    "prompt", "responses", "id", "category", "generator", "dataset", "label", "kto_tag", "tools", SMOOTHING, *TAILS,
    *CONVERSATIONS, *INSTRUCTIONS, *BESIDE, *ANSWERS, *chain.from_iterable((*SIDES, *SCORES)), "constraints",
    *CRITERIA,
}  # fmt: skip
"""Fields that are read, by one format or another."""

TASK = ("prompt", "id", *CONVERSATIONS, *INSTRUCTIONS, *BESIDE)
"""Fields that every kind of record reads."""

MARKS = {"label": {"true": True, "false": False}, "kto_tag": {"true": True, "1": True, "false": False, "0": False}}
"""{field that tells whether an answer is wanted: {its value in small letters: whether it is}}."""

MEANINGS = {
    "prompt": "the prompt",
    "tools": "the definitions of tools",
    **dict.fromkeys(SYSTEM, "the system turn"),
    **dict.fromkeys(CONVERSATIONS, "turns"),
    "history": "earlier turns",
    **dict.fromkeys(INSTRUCTIONS, "the user's turn"),
    **dict.fromkeys(INPUTS, "the user's turn, below the instruction"),
    **dict.fromkeys(ANSWERS, "the response"),
    "responses": "ranked answers",
    **dict.fromkeys(CRITERIA, "criteria"),
    **{name: side for names in SIDES[:2] for name, side in zip(names, ("chosen", "rejected"), strict=True)},
    "rejected_response": "rejected",
    SMOOTHING: "the label smoothing of the pair",
    **{name: f"the score of {side}" for names, side in zip(SCORES, SIDES[0], strict=True) for name in names},
}
"""{field: what it is read as}, in the order of a prompt."""

CHECKS = {"answer": "the right answer", "constraints": "what is to be checked"}
"""{field of an instruction that says what is right: what it is read as}."""

TURNS = re.compile(r"\s*(?:array\()?\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
"""Beginning of a text that spells a list of turns, as JSON or as Python."""

T = TypeVar("T")
R = TypeVar("R", Demonstration, Instruction, PreferencePair, RankedAnswers)


@dataclass(frozen=True, slots=True)
class Row:
    """A row and its place.

    Attributes:
        where: file and line, for messages.
        fields: what it says by name, without gaps.
    """

    where: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, where: str, raw: dict[str, Any]) -> "Row":
        """Return the row of a file or table.

        Raises:
            SelfalignError: a field that cannot be read is filled.
        """
        row = cls(where, _without_gaps(raw))
        row.refuse_unread(row.fields, ("tools",), why="which selfalign cannot use; join it to the text or remove it")
        known = (*READ, *UNREAD)
        alike = (name for name in row.fields if name not in READ and name.strip().casefold() in known)
        row.refuse_filled(alike, row.fields, why="but fields are named in small letters, without spaces")
        return row

    def refuse(self, message: str) -> NoReturn:
        """Raise an error that names the row.

        Raises:
            SelfalignError: always.
        """
        raise SelfalignError(f"{self.where}: {message}")

    def refuse_filled(self, names: Iterable[str], fields: dict[str, Any], place: str = "", why: str = "") -> None:
        """Raise an error if one of these fields is filled.

        Args:
            names: names of the fields.
            fields: fields of the row, or of an object in it.
            place: the place of that object in the row.
            why: what to do instead, for the message.

        Raises:
            SelfalignError: one is filled.
        """
        for name in names:
            if name in fields and is_filled(fields[name]):
                why = why or "which selfalign cannot use; convert or remove such rows"
                self.refuse(f"the field {place}{name} is filled ({shown(fields[name])}), {why}")

    def refuse_unended(self) -> None:
        """Raise an error if an answer of a run's own file was cut, or stands apart from its thought.

        Raises:
            SelfalignError: it was, or does.
        """
        self.refuse_filled(THOUGHTS, self.fields, why="but an answer is read with its thought before it; join them")
        for name in ENDED:
            if self.fields.get(name) is False:
                self.refuse(f"{name} is false: the answer was cut, and would be taught to end there; remove the row")

    def refuse_unread(self, fields: dict[str, Any], read: Iterable[str], place: str = "", why: str = "") -> None:
        """Raise an error if a part of the task is filled that no record can hold.

        Args:
            fields: fields of the row, or of an object in it.
            read: those that are read here.
            place: the place of that object in the row.
            why: what to do instead, for the message.

        Raises:
            SelfalignError: one is filled.
        """
        for name, today in OLDER.items():
            self.refuse_filled((name,), fields, place, f"the older form of OpenAI's {today}; convert it to {today}")
        media = (name for name in fields if MEDIA.fullmatch(name.strip().casefold()))
        self.refuse_filled((name for name in (*UNREAD, *media) if name not in read), fields, place, why)

    def text(self, name: str) -> str:
        """Return a text field; "" if it is absent, blank or an empty list.

        Raises:
            SelfalignError: it is something else.
        """
        value = self.fields.get(name, "")
        if value in ([], {}):
            return ""
        if not isinstance(value, str):
            self.refuse(f"{name}: expected a text, got {shown(value)}")
        if TURNS.match(value):
            self.refuse(f"{name} is a text that spells a list of turns: give the list itself")
        return "" if is_blank(value) else value

    def spelled_gaps(self) -> list[tuple[str, str]]:
        """Yield (field, its text) of texts that may stand for an absent value."""
        texts = {name: self.fields[name] for name in TEXTS if isinstance(self.fields.get(name), str)}
        return [(name, text) for name, text in texts.items() if text.strip().casefold() in SPELLED_GAPS]

    def one_text(self, names: Iterable[str]) -> str:
        """Return the only text among fields with the same meaning; "" if all are empty.

        Raises:
            SelfalignError: two of them say different things.
        """
        texts = {name: text for name in names if (text := self.text(name))}
        if len(set(texts.values())) > 1:
            self.refuse(f"{' and '.join(texts)} have different texts, but only one can be used; keep one")
        return next(iter(texts.values()), "")

    def number(self, *names: str) -> float | None:
        """Return the only number among fields with the same meaning; None if there is none. A text may spell it.

        Raises:
            SelfalignError: one is no number, or two are different ones.
        """
        found: dict[str, float] = {}
        for name in (name for name in names if name in self.fields):
            value = self.fields[name]
            try:
                number = float("x" if isinstance(value, bool) else value)
            except (ValueError, TypeError):
                self.refuse(f"{name}: expected a number, got {shown(value)}")
            if math.isfinite(number):
                found[name] = value if isinstance(value, int) else number
        if len(set(found.values())) > 1:
            self.refuse(f"{' and '.join(found)} have different numbers, but only one can be used; keep one")
        return next(iter(found.values()), None)

    def own_id(self) -> str:
        """Return the row's `id` as a text; "" if it has none. Tables turn whole numbers with gaps into 3.0, which is 3.

        Raises:
            SelfalignError: it is neither a text nor a whole number.
        """
        value = self.fields.get("id", "")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int):
            self.refuse(f"id: expected a text or a whole number, got {shown(value)}")
        return "" if is_blank(str(value)) else str(value)

    def typed(self, kind: type[T]) -> T:
        """Return the row as a dataclass.

        Raises:
            SelfalignError: a field is missing or of another type.
        """
        try:
            return msgspec.convert(self.fields, kind)
        except msgspec.ValidationError as error:
            raise SelfalignError(f"{self.where}: {error}") from error

    def found(self) -> str:
        """List the fields of the row, for messages."""
        return ", ".join(f"{name} ({shown(value)})" for name, value in self.fields.items()) or "no field"


def give_ids(read: Iterable[tuple[Row, R]], drops: Counter[str]) -> list[R]:
    """Return the records with their ids: the row's own, or the digest of the record's content. Equal rows are one.

    Rows with the same id and the same content are copies: the first stays, the others are counted as `duplicate`. Rows
    with the same id and different content are refused, because dropping one would lose data.

    Raises:
        SelfalignError: two rows have the same id and different content; both places are named.
    """
    kept: dict[str, R] = {}
    places: dict[str, str] = {}
    contents: set[str] = set()
    for row, record in read:
        content = digest_json(msgspec.to_builtins(replace(record, id="")))[:16]
        named = replace(record, id=row.own_id() or content)
        before = kept.setdefault(named.id, named)
        if before is named:
            places[named.id] = row.where
            contents.add(content)
        elif before == named:
            drops["duplicate"] += 1
        else:
            row.refuse(f"has the id of {places[named.id]} ({named.id!r}), but other content; ids must be unique")
    if again := len(kept) - len(contents):
        file = next(iter(places.values())).rpartition(":")[0]
        logger.info("%s: %d rows repeat another row under another id; they are kept", file, again)
    return list(kept.values())


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character: only spaces, and characters of no width such as U+200B."""
    return not text.strip() or all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in text)


def shown(value: Any) -> str:
    """Return the type of a value; a short value itself."""
    if isinstance(value, str):
        return repr(value) if len(value) < 30 else "a text"
    if isinstance(value, bool | int | float) or value is None:
        return repr(value)
    kinds = {list: f"a list of {len(value) if isinstance(value, list) else 0}", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def is_filled(value: Any) -> bool:
    """Return whether a field is filled. Lists and objects of empty values are not, nor are texts that spell them."""
    if isinstance(value, dict):
        return any(map(is_filled, value.values()))
    if isinstance(value, list):
        return any(map(is_filled, value))
    if isinstance(value, str):
        return not is_blank(value) and value.strip() not in ("[]", "{}", "null")
    return bool(value)


def _without_gaps(value: Any) -> Any:
    """Return a value without the fields that are null or NaN, which tables put where a field is missing."""
    if isinstance(value, dict):
        return {name: _without_gaps(item) for name, item in value.items() if not _is_gap(item)}
    return [_without_gaps(item) for item in value] if isinstance(value, list) else value


def _is_gap(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
