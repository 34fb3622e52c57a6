"""Text to token ids: the chat template around prompts, one BOS, an end of turn only where a response ended."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from selfalign.errors import SelfalignError
from selfalign.records import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Before a chat template that prints today's date, so that it gives the same prompts tomorrow."""


def encode_prompt(tokenizer: "Tokenizer", prompt: Prompt, prefill: str = "") -> list[int]:
    """The ids the model continues from.

    Messages go through the chat template up to where the assistant begins to write, followed by `prefill`, the
    beginning of its answer. A plain text is taken as it stands, with the BOS the tokenizer asks for. Control
    tokens spelled out inside a message are broken up first, so that no text can end its own turn.

    Raises:
        SelfalignError: messages are given but the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return _ids(tokenizer, prompt + prefill, split_special_tokens=True)
    ids = _ids(tokenizer, _render(tokenizer, prompt, add_generation_prompt=True) + prefill, add_special_tokens=False)
    opening = [token for token in _ids(tokenizer, "") if token == tokenizer.bos_token_id]
    return ids if not opening or ids[:1] == opening else [*opening, *ids]


def prompt_end(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """The end of an encoded prompt as a text, control tokens included, from which the model continues."""
    return str(tokenizer.decode(ids[-16:]))


def encode_response(tokenizer: "Tokenizer", text: str, *, finished: bool) -> list[int]:
    """The ids of a response, encoded apart from its prompt; a finished one ends with the end-of-turn token."""
    ids = _ids(tokenizer, text, add_special_tokens=False, split_special_tokens=True)
    return [*ids, end_of_turn_id(tokenizer)] if finished else ids


@lru_cache(maxsize=16)
def end_of_turn_id(tokenizer: "Tokenizer") -> int:
    """The token that ends an assistant turn: the first control token the chat template puts behind one.

    Without a chat template, or where that template puts none, it is the tokenizer's EOS.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        tail = _render(tokenizer, turns, add_generation_prompt=False).rsplit("answer", 1)[1]
        control = {cast(int, tokenizer.convert_tokens_to_ids(token)) for token in _control_tokens(tokenizer)}
        for token in _ids(tokenizer, tail, add_special_tokens=False):
            if token in control:
                return token
    if tokenizer.eos_token_id is None:
        raise SelfalignError("the tokenizer has neither an EOS token nor a chat template that ends a turn")
    return cast(int, tokenizer.eos_token_id)


def stop_ids(tokenizer: "Tokenizer") -> list[int]:
    """The tokens generation stops at: EOS and the end of turn."""
    eos = cast(int | None, tokenizer.eos_token_id)
    return sorted({end_of_turn_id(tokenizer)} | (set() if eos is None else {eos}))


def decode_response(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """The text of generated ids, without control tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def spell(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """The text that the tokenizer reads as these ids, for programs that take texts only; BOS is left to them.

    Raises:
        SelfalignError: there is none.
    """
    text, bos = str(tokenizer.decode(ids)), str(tokenizer.bos_token or "")
    if bos and _ids(tokenizer, "")[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    if _ids(tokenizer, text) != ids:
        raise SelfalignError(f"no text is read as these {len(ids)} tokens again, which begin with {text[:40]!r}")
    return text


def fill(template: str, values: dict[str, str]) -> str:
    """Puts each value where `{name}` stands in the template, once and literally.

    Braces inside a value stay as they are. A value that spells one of the template's own tags (`<response>`,
    `</response>`, …) has it broken up, so that no text can close the section it stands in.

    Raises:
        SelfalignError: the template lacks one of the names.
    """
    for name in values:
        if f"{{{name}}}" not in template:
            raise SelfalignError(f"the prompt template lacks {{{name}}}")
    tags = sorted(set(re.findall(r"</?[A-Za-z_]+>", template)))
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda match: _defuse(values[match.group(0)[1:-1]], tags), template)


def _ids(tokenizer: "Tokenizer", text: str, **options: bool) -> list[int]:
    return cast(list[int], cast(Any, tokenizer)(text, **options)["input_ids"])


def _render(tokenizer: "Tokenizer", messages: list[Message], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise SelfalignError(
            "the model's tokenizer has no chat template: give one with model.chat_template=FILE (a Jinja file), "
            "or take model.chat_template=shipped:dialogue"
        )
    safe = [{**message, "content": _defuse(message["content"], _control_tokens(tokenizer))} for message in messages]
    template = str(tokenizer.chat_template)
    template = FIXED_DATE + template if "strftime_now" in template else template
    return str(
        tokenizer.apply_chat_template(
            safe, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


@lru_cache(maxsize=16)
def _control_tokens(tokenizer: "Tokenizer") -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True))


def _defuse(text: str, words: "list[str] | tuple[str, ...]") -> str:
    """Breaks up each of the words in a text with a space behind its first letter, whatever their case."""
    present = [word for word in words if word.casefold() in text.casefold()]
    if not present:
        return text
    pattern = re.compile("|".join(re.escape(word) for word in present), re.IGNORECASE)
    return pattern.sub(lambda match: f"{match.group(0)[0]} {match.group(0)[1:]}", text)
