"""Rendering of conversations by a tokenizer's chat template, and the form of an assistant's turn.

A prompt is what the template writes before an answer when it renders the whole conversation. So a model continues the
text that it was trained behind, whatever the template's own generation prompt is.

A template that knows thoughts writes an empty one, or none, before an answer, and thoughts are written behind its
generation prompt. So there the generation prompt is the prompt, and a thought, also an empty one, is part of what is
written and trained.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, cast

from selfalign.core.errors import SelfalignError
from selfalign.core.placeholders import break_up
from selfalign.core.records import Message
from selfalign.data.thinking import Markers, PromptEnd, markers_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ANSWER = "\ue000"
"""Stands for an answer while a template is rendered around it: a character that no text uses."""

QUESTION: list[Message] = [{"role": "user", "content": "question"}]

PLAIN_TEXT = 'It\'s <b>so</b> & "1" + {x}:\n\n  - Été\n\tReally.'
"""A question or answer that a template may not change, except for white space around it."""

FOLLOW_UP = "\ue001"
"""Stands for the user's turn after an answer."""

FIXED_DATE = date(2024, 7, 26)
"""Today, for a chat template that prints it, so that it gives the same prompts tomorrow."""

DATE_PARTS = (*(f"%-{letter}" for letter in "dmyHIMSj"), *(f"%{letter}" for letter in "aAbBcdeFHIjmMpSTuUwxXyYZz"))
"""Parts of a date that a template may ask for, in strftime's notation."""

ARGUMENTS = "chat_template_arguments"
"""Name of the arguments of the chat template in a tokenizer's settings."""

MARKERS = "thought_markers"
"""Name of the markers of thoughts in a tokenizer's settings, where the user gives them: a list of two texts."""

THOUGHT_PROMPT = "thought_prompt"
"""Name of what asks for a thought in a tokenizer's settings."""

SYSTEM_PROMPT = "system_prompt"
"""Name of the system turn of conversations that have none of their own in a tokenizer's settings."""

CLOSING_SPACE = ("\n", "\n\n")
"""White space before and behind the end of an empty thought that a prompt has opened."""

ASKED: list[Message] = [{"role": "user", "content": PLAIN_TEXT}]

EARLIER: list[Message] = [{"role": "user", "content": FOLLOW_UP}, {"role": "assistant", "content": "\ue002"}]
"""Turns that stand before a question, in characters that no template writes by itself."""

RULE: Message = {"role": "system", "content": "\ue003"}

FIRST_MARK = 0x13000
"""The first of the characters, hieroglyphs, that stand for parts of tools while it is checked that a template writes
them. Private characters would not do: Python escapes them where a template writes an object as Python spells it."""

BEGINNINGS = ("The", "so", "I'm", '"Yes', "(no", "- one", "# One", "`x`", "**One", "1", "¿Qué", "Été", "日本", "</b>")
"""Beginnings of answers, to find where a tokenizer puts the boundary between a prompt and an answer."""


def template_of(tokenizer: "Tokenizer") -> str:
    """Return the chat template; of several named ones the default.

    Raises:
        SelfalignError: the tokenizer has no chat template, or none called default.
    """
    return _named_template(tokenizer, "default")


def _named_template(tokenizer: "Tokenizer", name: str) -> str:
    """Return the chat template of this name; the default one, or the only one, where none has it."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and name in templates:
        return templates[name]
    if isinstance(templates, dict) and "default" not in templates:
        raise SelfalignError(
            f"the model's tokenizer has the chat templates {', '.join(map(repr, templates))}, but none called "
            "'default': give one with model.chat_template=FILE"
        )
    if not templates:
        raise SelfalignError(
            "the model's tokenizer has no chat template: give one with model.chat_template=FILE (a Jinja file), "
            "or take model.chat_template=shipped:dialogue"
        )
    return templates["default"] if isinstance(templates, dict) else templates


def render_prompt(tokenizer: "Tokenizer", messages: list[Message]) -> str:
    """Return the text up to the assistant's answer to these messages.

    Control tokens spelled out inside a message are broken up first, so that no text can end its own turn.

    Raises:
        SelfalignError: there is no template, or it refuses these messages (its own message is quoted), or a control
            token in a message cannot be broken up.
    """
    return _render_around(tokenizer, _prepared(tokenizer, messages))[0]


def render_call(tokenizer: "Tokenizer", messages: list[Message], answer: Message) -> tuple[str, str, bool]:
    """Return an answer with tool calls as the template writes it behind a prompt.

    Args:
        tokenizer: has the template.
        messages: the prompt.
        answer: the assistant's turn, with `tool_calls`.

    Returns:
        (text of the prompt, text of the answer, whether that text ends its turn).

    Raises:
        SelfalignError: the template refuses the turns, leaves out a part of them, or writes another prompt before them.
    """
    turns = _prepared(tokenizer, [*messages, answer])
    before, after = _render_around(tokenizer, turns[:-1])
    before = before.removesuffix(answer_shape(tokenizer).margin)  # A call may begin without the space before a text.
    whole = _apply(tokenizer, turns, add_generation_prompt=False)
    if not whole.startswith(before):
        raise SelfalignError(
            "the chat template writes another prompt before a tool call than before a text, so that a call cannot be "
            "trained as its answer. Leave such records out, or give another template with model.chat_template=FILE."
        )
    said = whole[len(before) :]
    _check_text_of(tokenizer, turns[-1]["content"] or "", said)
    end = _first_control_word(tokenizer, after)
    if end and said.endswith(after):
        return before, said[: len(said) - len(after)] + after[: after.index(end) + len(end)], True
    last = max((said.rindex(word) + len(word) for word in control_words(tokenizer) if word in said), default=0)
    return (before, said[:last], True) if last and not said[last:].strip() else (before, said.rstrip(), False)


def _check_text_of(tokenizer: "Tokenizer", text: str, said: str) -> None:
    """Check that what stands beside a tool call is written whole: its thought, and its text."""
    markers = markers_of(tokenizer)
    thought, answer = markers.split(text) if markers is not None else ("", text)
    words = (markers.open, markers.close, markers.end) if markers is not None else ()
    for word in sorted(words, key=len, reverse=True):
        thought = thought.replace(word, "")
    if left := [part for part in (thought.strip(), (answer or "").strip()) if part not in said]:
        raise SelfalignError(
            f"the chat template leaves out a text beside a tool call ({left[0][:40]!r}). Remove it from the data, or "
            "give another template with model.chat_template=FILE."
        )


def _prepared(tokenizer: "Tokenizer", messages: list[Message]) -> list[Message]:
    """Return messages as the template takes them: no text in them has a control token, and no part is left out."""
    safe = [
        {name: value if name == "role" else _broken_up(tokenizer, value) for name, value in message.items()}
        for message in messages
    ]
    has_tools = any(message["role"] == "tool" or message.keys() & {"tools", "tool_calls"} for message in safe)
    return _with_arguments(tokenizer, safe) if has_tools else safe


def _broken_up(tokenizer: "Tokenizer", value: Any) -> Any:
    """Return a value of a message with the control tokens in its texts broken up."""
    if isinstance(value, str):
        return without_control(tokenizer, value)
    if isinstance(value, dict):
        return {without_control(tokenizer, name): _broken_up(tokenizer, item) for name, item in value.items()}
    return [_broken_up(tokenizer, item) for item in value] if isinstance(value, list) else value


ARGUMENT_FORMS: tuple[Callable[[dict[str, Any]], Any], ...] = (
    lambda arguments: arguments,
    lambda arguments: json.dumps(arguments, ensure_ascii=False),
)
"""Forms of a call's arguments that templates take: an object, or its JSON text."""

NO_TEXT = ("", None)
"""Forms of the content of a call without text that templates take. transformers leaves None out."""


def _with_arguments(tokenizer: "Tokenizer", messages: list[Message]) -> list[Message]:
    """Return messages with their tool calls in the form in which the template writes them.

    A copy of the messages tells: its tools, calls and results are single characters that no template writes by itself.

    Raises:
        SelfalignError: in no form is everything written.
    """
    copy, marks = _marked_copy(messages)
    faults: list[str] = []
    for nothing, form in product(NO_TEXT, ARGUMENT_FORMS):
        try:
            text = _render_to_check(tokenizer, _in_form(copy, form, nothing))
        except SelfalignError as error:
            faults.append(str(error))
            continue
        # A name in single quotes is Python's spelling of an object, which is no JSON.
        missing = [what for mark, what in marks.items() if mark not in text or f"{{'{mark}':" in text]
        if not missing:
            return _in_form(messages, form, nothing)
        faults.append(
            f"the chat template leaves out {missing[0]}. Remove the tools from the data, or give a template that "
            "writes them with model.chat_template=FILE."
        )
    raise SelfalignError(faults[0])


def _render_to_check(tokenizer: "Tokenizer", messages: list[Message]) -> str:
    if "tool_calls" in messages[-1]:
        return _apply(tokenizer, messages, add_generation_prompt=False)
    return _render_around(tokenizer, messages)[0]


def _marked_copy(messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """Return messages with marks for what belongs to tools, and what each mark stands for."""
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        marks[character := chr(FIRST_MARK + len(marks))] = what
        return character

    def renamed(tool: dict[str, Any], what: str) -> dict[str, Any]:
        return tool | {"function": tool["function"] | {"name": mark(what)}}

    def called(call: dict[str, Any]) -> dict[str, Any]:
        made, what = renamed(call, "tool calls"), "the arguments of tool calls"
        values = call["function"]["arguments"].values()
        made["function"]["arguments"] = {mark(what): mark(what) if isinstance(v, str) else v for v in values}
        return made

    def copied(message: Message) -> Message:
        made = dict(message)
        if message["role"] == "tool" and message["content"]:
            made["content"] = mark("what a tool returns")
        if "tools" in message:
            made["tools"] = [renamed(tool, "the definitions of tools") for tool in message["tools"]]
        if "tool_calls" in message:
            made["tool_calls"] = [called(call) for call in message["tool_calls"]]
            made["content"] = message["content"] and mark("the text beside tool calls")
        return made

    return [copied(message) for message in messages], marks


def _in_form(messages: list[Message], form: Callable[[dict[str, Any]], Any], nothing: str | None) -> list[Message]:
    """Return messages with the arguments of their calls in this form, and this content where a call has no text."""

    def formed(call: dict[str, Any]) -> dict[str, Any]:
        return call | {"function": call["function"] | {"arguments": form(call["function"]["arguments"])}}

    return [
        message | {"content": message["content"] or nothing, "tool_calls": list(map(formed, message["tool_calls"]))}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def without_control(tokenizer: "Tokenizer", text: str) -> str:
    """Return the text with a space after the first letter of every control token."""
    text = break_up(text, control_words(tokenizer))
    spelled = spelled_at(tokenizer, text)
    for start in reversed(spelled):
        text = f"{text[: start + 1]} {text[start + 1 :]}"
    if spelled and (left := spelled_at(tokenizer, text)):
        raise SelfalignError(
            f"the tokenizer reads a control token in {text[left[0] :][:40]!r}, even with a space in it. Remove it from "
            "the text."
        )
    return text


def spelled_at(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Return the positions where a text spells control tokens, as written or after the tokenizer's normalizer."""
    present = [word for word in control_words(tokenizer) if word in text]
    found = {match.start() for match in re.finditer("|".join(map(re.escape, present)), text)} if present else set()
    if normalizes_control_words(tokenizer):
        read = cast(Any, tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
        control = {token for token in control_ids(tokenizer) if token != tokenizer.unk_token_id}
        pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
        spans = [span for token, span in pairs if token in control]
        # White space that a control token takes to itself is none of its spelling.
        found |= {end - len(text[start:end].lstrip()) for start, end in spans}
    return sorted(found)


@lru_cache(maxsize=16)
def normalizes_control_words(tokenizer: "Tokenizer") -> bool:
    """Whether the tokenizer looks for control tokens after its normalizer has changed the text."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    added = tokenizer.added_tokens_decoder.values()
    return normalizer is not None and any(
        token.normalized and token.content in control_words(tokenizer) for token in added
    )


@lru_cache(maxsize=16)
def markers_of(tokenizer: "Tokenizer") -> Markers | None:
    """Return the markers of the model's thoughts: those that the user gives, or those that its chat template knows."""
    if given := tokenizer.init_kwargs.get(MARKERS):
        return Markers(*given)
    return markers_in(template_of(tokenizer)) if tokenizer.chat_template else None


@lru_cache(maxsize=16)
def marker_ids(tokenizer: "Tokenizer") -> frozenset[int]:
    """Return the ids of control tokens that markers of thoughts are made of, such as gpt-oss's channels."""
    markers = markers_of(tokenizer)
    if markers is None:
        return frozenset()
    return frozenset(text_ids(tokenizer, markers.open + markers.close)) & control_ids(tokenizer)


@lru_cache(maxsize=16)
def template_thinks(tokenizer: "Tokenizer") -> bool:
    """Whether the chat template knows the markers of the model's thoughts."""
    markers = markers_of(tokenizer)
    if markers is None or not tokenizer.chat_template:
        return False
    template = template_of(tokenizer)
    return markers.open.rstrip() in template or markers.end in template


@lru_cache(maxsize=16)
def empty_thought(tokenizer: "Tokenizer") -> str:
    """Return the text between a prompt and an answer before which nothing was thought.

    It is what the template writes there, or the end of a thought that its prompt has opened.
    """
    markers = markers_of(tokenizer)
    if markers is None or not template_thinks(tokenizer):
        return ""
    prompt, before = _render_around(tokenizer, QUESTION)[0], _whole_around(tokenizer, QUESTION)[0]
    if markers.prompt_end(prompt) is PromptEnd.OPENED:
        return markers.close.join(CLOSING_SPACE)
    return before[len(prompt) :] if before.startswith(prompt) else ""


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """Tokens and text around an answer in the ids of a conversation.

    Attributes:
        margin: white space at the end of the prompt that a tokenizer joins to the answer's first word. The prompt ends
            before it, and it is written (and trained) as the beginning of the answer.
        closing: text between the answer and the token that ends its turn, such as Llama 2's space.
        end: the token that ends the turn; None where the tokenizer has none.
        next: the token that stands first behind an answer when the conversation goes on; None where there is none. It
            is another one where a template ends no turn, or not the last: GLM-4's answers end as the user's turn opens.
    """

    margin: str = ""
    closing: str = ""
    end: int | None = None
    next: int | None = None


@lru_cache(maxsize=16)
def answer_shape(tokenizer: "Tokenizer") -> AnswerShape:
    """Return the form of answers; without a chat template, plain text with EOS behind it."""
    eos = cast(int | None, tokenizer.eos_token_id)
    if not tokenizer.chat_template:
        return AnswerShape(end=eos)
    before, behind = _render_around(tokenizer, QUESTION)
    margin, follower = joined_space(tokenizer, before, BEGINNINGS), _id_of_first(tokenizer, _follow_up(tokenizer))
    first = _first_control_word(tokenizer, behind)
    if not first:
        return AnswerShape(margin=margin, end=eos, next=follower)
    end = cast(int, tokenizer.convert_tokens_to_ids(first))
    return AnswerShape(margin, behind[: behind.index(first)], end, follower)


def _first_control_word(tokenizer: "Tokenizer", text: str) -> str:
    """Return the first control token that a text spells; "" where there is none."""
    words = [word for word in control_words(tokenizer) if word in text]
    return min(words, key=lambda word: (text.index(word), -len(word)), default="")


def _id_of_first(tokenizer: "Tokenizer", text: str) -> int | None:
    """Return the id of the first control token that a text spells."""
    first = _first_control_word(tokenizer, text)
    return cast(int, tokenizer.convert_tokens_to_ids(first)) if first else None


def _follow_up(tokenizer: "Tokenizer") -> str:
    """Return the text between an answer and the next question; "" if the template takes no second question."""
    again: list[Message] = [
        *QUESTION,
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": FOLLOW_UP},
    ]
    try:
        text = _apply(tokenizer, again, add_generation_prompt=False)
    except SelfalignError:
        return ""
    return text.partition(ANSWER)[2].partition(FOLLOW_UP)[0]


def joined_space(tokenizer: "Tokenizer", before: str, answers: tuple[str, ...]) -> str:
    """Return the white space at the end of a text that the tokenizer joins to an answer's first word.

    It is the shortest one without which the text's ids begin the ids of text and answer, for as many answers as
    possible.
    """
    longest = len(before) - len(before.rstrip())
    wholes = [rendered_ids(tokenizer, before + answer) for answer in answers]

    def misfits(length: int) -> int:
        ids = rendered_ids(tokenizer, before[: len(before) - length])
        return sum(whole[: len(ids)] != ids for whole in wholes)

    return before[len(before) - min(range(longest + 1), key=misfits) :]


@lru_cache(maxsize=16)
def control_words(tokenizer: "Tokenizer") -> tuple[str, ...]:
    """Return the control tokens, the longest first: those marked as special, and the template's turn markers."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    return tuple(sorted(special | unmarked_control_words(tokenizer), key=lambda word: (-len(word), word)))


@lru_cache(maxsize=16)
def control_ids(tokenizer: "Tokenizer") -> frozenset[int]:
    """Return the ids of the control tokens."""
    return frozenset(cast(int, tokenizer.convert_tokens_to_ids(word)) for word in control_words(tokenizer))


@lru_cache(maxsize=16)
def unmarked_control_words(tokenizer: "Tokenizer") -> frozenset[str]:
    """Return added tokens that the template writes around turns although they are not marked as special."""
    if not tokenizer.chat_template:
        return frozenset()
    before, behind = _whole_around(tokenizer, QUESTION)
    # A thought that the template opens or closes on one side only belongs to the answer, not to the turn.
    both = zip(before, generation_prompt(tokenizer, QUESTION), strict=False)
    agreed = takewhile(lambda pair: pair[0] == pair[1], both)
    text = "".join(character for character, _ in agreed) + behind
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    # Words and spaces that were added to the vocabulary are text, also where the template writes them.
    return frozenset(word for word in added if re.search(r"[^\w\s]", word) and word in text)


def rendered_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Return the ids of a text whose control tokens count as such, after the BOS that the tokenizer asks for, once."""
    ids = text_ids(tokenizer, text)
    # Around some text, because one token may be both BOS and EOS.
    opening = [
        token for token in text_ids(tokenizer, "x", add_special_tokens=True)[:1] if token == tokenizer.bos_token_id
    ]
    return ids if not opening or ids[:1] == opening else [*opening, *ids]


def text_ids(tokenizer: "Tokenizer", text: str, **options: bool) -> list[int]:
    """Return the tokenizer's ids of a text, without anything added unless asked for."""
    return cast(list[int], cast(Any, tokenizer)(text, **{"add_special_tokens": False, **options})["input_ids"])


def altered_answer(tokenizer: "Tokenizer") -> str | None:
    """Return `PLAIN_TEXT` as the template writes it if that differs, as when it escapes characters, or None."""
    before, behind = _whole_around(tokenizer, QUESTION)
    written = render_whole(tokenizer, QUESTION, PLAIN_TEXT).removeprefix(before).removesuffix(behind)
    return None if written == PLAIN_TEXT else written


def writes_all(tokenizer: "Tokenizer", messages: list[Message]) -> bool:
    """Whether the template takes these messages and writes the text of each unchanged."""
    try:
        text = _render_around(tokenizer, messages)[0]
    except SelfalignError:
        return False
    return all(message["content"] in text for message in messages)


def render_whole(tokenizer: "Tokenizer", messages: list[Message], answer: str) -> str:
    """Return messages and the assistant's answer as the template renders them."""
    return _apply(tokenizer, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)


def render_conversation(tokenizer: "Tokenizer", messages: list[Message], answer: str) -> str:
    """Return messages and the assistant's answer as the template renders them, with no control token in a text.

    Raises:
        SelfalignError: the template refuses the turns, or leaves one out.
    """
    turns = _prepared(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    text = _apply(tokenizer, turns, add_generation_prompt=False)
    if left_out := [turn["role"] for turn in turns if turn["content"].strip() not in text]:
        raise SelfalignError(f"the chat template leaves out or changes the {left_out[0]}'s turn")
    return text


def render_trained(tokenizer: "Tokenizer", messages: list[Message], answer: str) -> str:
    """Return messages and the assistant's answer as they are trained: before the answer nothing is thought."""
    before, behind = _render_around(tokenizer, messages)
    return before + empty_thought(tokenizer) + answer + behind


def generation_prompt(tokenizer: "Tokenizer", messages: list[Message]) -> str:
    """Return the text that the template itself would have the model continue."""
    return _apply(tokenizer, messages, add_generation_prompt=True)


def _render_around(tokenizer: "Tokenizer", messages: list[Message]) -> tuple[str, str]:
    """Return the prompt of these messages, and the text behind the assistant's answer to them."""
    before, behind = _whole_around(tokenizer, messages)
    return (generation_prompt(tokenizer, messages) if _asks_by_itself(tokenizer) else before), behind


@lru_cache(maxsize=16)
def _asks_by_itself(tokenizer: "Tokenizer") -> bool:
    """Whether the chat template knows thoughts and has a generation prompt."""
    asked = _apply(tokenizer, QUESTION, add_generation_prompt=False) if template_thinks(tokenizer) else ""
    return bool(asked) and generation_prompt(tokenizer, QUESTION) != asked


def _whole_around(tokenizer: "Tokenizer", messages: list[Message]) -> tuple[str, str]:
    """Return the text before and after the assistant's answer to these messages in the whole conversation."""
    answered = [*messages, {"role": "assistant", "content": ANSWER}]
    before, mark, behind = _apply(tokenizer, answered, add_generation_prompt=False).rpartition(ANSWER)
    if not mark:
        raise SelfalignError(
            "the chat template leaves out the assistant's answer. Give another with model.chat_template=FILE."
        )
    return before, behind


def _apply(tokenizer: "Tokenizer", messages: list[Message], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    tools = next((message["tools"] for message in messages[:1] if "tools" in message), None)
    if tools is not None:
        opening = {name: value for name, value in messages[0].items() if name != "tools"}
        messages = [*([opening] if opening["content"] else []), *messages[1:]]
    template = template_of(tokenizer) if tools is None else _named_template(tokenizer, "tool_use")
    template = _fixed_date() + template if "strftime_now" in template else template
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.init_kwargs.get(ARGUMENTS, {}),
            )
        )
    except (TemplateError, TypeError, KeyError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise SelfalignError(
            f"the chat template refuses turns of {roles}: {' '.join(str(error).split())}. Give another with "
            "model.chat_template=FILE."
        ) from error


def _fixed_date() -> str:
    """Return a macro that replaces transformers' `strftime_now`, so that every date is `FIXED_DATE`."""
    filters = "".join(f"|replace('{part}', '{FIXED_DATE.strftime(part)}')" for part in DATE_PARTS)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro +%}}"
