"""Text to token ids: prompts and responses, so that both together have the ids of the whole conversation.

prompt ids + response ids = the ids of the whole conversation as the chat template renders it. A response that a model
wrote keeps the ids it was written as, because a tokenizer would not always read its text as the same ids again.
"""

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Message, Prompt
from selfalign.data.thinking import PromptEnd, ask_to_think
from selfalign.data.turns import said, turn_text
from selfalign.models.chat_template import (
    SYSTEM_PROMPT,
    THOUGHT_PROMPT,
    answer_shape,
    control_ids,
    control_words,
    empty_thought,
    joined_space,
    marker_ids,
    markers_of,
    render_call,
    render_prompt,
    rendered_ids,
    spelled_at,
    text_ids,
    without_control,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

OWN_STOPS = "stop_token_ids"
"""Name of the model's own stop tokens in a tokenizer's settings."""

ANCHORS = ("\n", "x", "1", ".")
"""Short texts: behind one of them a text is tokenised as in the middle of another."""


TEXT_WINDOW = 8
"""The number of tokens before one that its text may depend on."""

HALF = "\ufffd"
"""What a part of a character is decoded to."""

RARE = "\U00012031"
"""A letter, a cuneiform sign, that only complete vocabularies can spell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A response to be put behind a prompt.

    Attributes:
        text: what it says; it may begin with a thought where `thought` is empty.
        finished: whether it ended by itself; one that was cut is not taught to end there.
        ids: those it was written as, its end of turn included; empty where only the text is known.
        thought: what was written before it.
        calls: its tool calls.
        bare: whether no empty thought stands before it, as before a turn that others follow.
        turns: turns between the prompt and it, the first of them the assistant's. `encode_tail` encodes these.
    """

    text: str
    finished: bool = True
    ids: list[int] = field(default_factory=list)
    thought: str = ""
    calls: list[Message] = field(default_factory=list)
    bare: bool = False
    turns: list[Message] = field(default_factory=list)

    def said(self) -> str:
        """The answer with its calls and the turns before it, to look for characters in."""
        return "\n".join([*map(turn_text, self.turns), said(self.text, self.calls)])


def encode_prompt(tokenizer: "Tokenizer", prompt: Prompt, prefill: str = "", thought: str = "") -> list[int]:
    """Return the ids that the model continues from.

    Messages go through the chat template up to the assistant's thought, or to its answer where the model does not
    think. Then follows `prefill`, the beginning of the answer, behind `thought`, or behind an empty one; if the last
    message is the assistant's, that one is continued. A plain text is taken as it stands. There is one BOS if the
    tokenizer or the template wants one.

    Raises:
        SelfalignError: messages are given, and the tokenizer has no chat template, or it refuses them.
    """
    return _context(tokenizer, prompt, prefill, thought)[1]


def prompt_end(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Return the end of an encoded prompt as a text, control tokens included, from which the model continues."""
    return str(tokenizer.decode(ids[-16:]))


def encode_answers(
    tokenizer: "Tokenizer", prompt: Prompt, answers: Sequence[Answer], prefill: str = ""
) -> list[list[int]]:
    """Return the ids of each answer behind a prompt (and behind the prefill).

    An answer that the model wrote keeps the ids it was written as. The others are tokenised together with the prompt,
    whose ids do not change, and with their thought, which is an empty one where there is none. A tool call is what the
    template writes.

    Raises:
        SelfalignError: a tool call cannot be written behind the prompt.
    """
    before, ids, margin = _context(tokenizer, prompt, prefill)
    shape = answer_shape(tokenizer)
    closing = shape.closing if isinstance(prompt, list) else ""

    def encode(answer: Answer) -> list[int]:
        if answer.ids:
            return answer.ids
        if answer.calls:
            return _encode_call(tokenizer, prompt, prefill, ids, answer)
        begun = isinstance(prompt, str) or prefill or answer.bare or _begun_answer(prompt)[1]
        thought, said = ("", answer.thought + answer.text) if begun else _parted(tokenizer, before, margin, answer)
        text = margin + thought + said + closing * answer.finished
        text = text.rstrip() if answer.finished and strips_answers(tokenizer) else text
        marked = _marked(tokenizer, margin, thought)
        own = _continued(tokenizer, before, ids, text, marked)
        return [*own, *([end_of_turn_id(tokenizer)] if answer.finished else [])]

    return [encode(answer) for answer in answers]


def _encode_call(tokenizer: "Tokenizer", prompt: Prompt, prefill: str, ids: list[int], answer: Answer) -> list[int]:
    """Return the ids of an answer with tool calls behind a prompt of these ids."""
    if isinstance(prompt, str) or prefill or _begun_answer(prompt)[1]:
        raise SelfalignError(
            "a tool call needs a prompt of turns that ends with the user's or a tool's, which a chat template renders"
        )
    turn = {"role": "assistant", "content": answer.thought + answer.text, "tool_calls": answer.calls}
    before, text, ends = render_call(tokenizer, prompt, turn)
    text = text.removeprefix(empty_thought(tokenizer)) if answer.bare else text
    whole = rendered_ids(tokenizer, before + text)
    if whole[: len(ids)] != ids:
        raise SelfalignError(
            "the tokenizer joins the end of the prompt with the beginning of a tool call, so that the call has no ids "
            "of its own. Leave such records out, or give another template with model.chat_template=FILE."
        )
    return [*whole[len(ids) :], *([] if ends else [end_of_turn_id(tokenizer)])]


def encode_tail(
    tokenizer: "Tokenizer", prompt: list[Message], ids: list[int], answer: Answer
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of an answer with turns before it, behind a prompt of these ids, and where assistant turns stand.

    Prompt and tail together are the ids of the template over the whole conversation. A turn of the assistant's is its
    text and the token that ends it.

    Args:
        tokenizer: the policy's.
        prompt: the turns before the tail.
        ids: the prompt's.
        answer: the last answer, with the turns before it.

    Returns:
        (ids, [(start, end) of each assistant turn in them]).

    Raises:
        SelfalignError: in the whole conversation the template writes the prompt or an earlier turn in another way.
    """
    turns = [*prompt, *answer.turns]
    context = encode_prompt(tokenizer, turns)
    [last] = encode_answers(tokenizer, turns, [replace(answer, turns=[])])
    whole = [*context, *last]
    spans: list[tuple[int, int]] = []
    for at, turn in enumerate(answer.turns):
        if turn["role"] == "assistant":
            start = ids if not at else encode_prompt(tokenizer, turns[: len(prompt) + at])
            own = _as_earlier_turn(tokenizer, turns[: len(prompt) + at], turn)
            length = next((len(one) for one in own if whole[: len(start) + len(one)] == [*start, *one]), 0)
            if not length:
                raise SelfalignError(
                    "in a longer conversation the chat template writes a turn, or the turns before it, in another way "
                    f"than where it is asked for it (turn {len(prompt) + at + 1} of {len(turns) + 1}), so that several "
                    "turns cannot be compared as one response. Give a pair of single answers for such a turn, without "
                    "a thought in it, or another template with model.chat_template=FILE."
                )
            spans.append((len(start) - len(ids), len(start) - len(ids) + length))
    return whole[len(ids) :], [*spans, (len(context) - len(ids), len(whole) - len(ids))]


def _as_earlier_turn(tokenizer: "Tokenizer", prompt: list[Message], turn: Message) -> list[list[int]]:
    """Return the ids that a turn of the assistant's may have behind a prompt if the conversation goes on.

    It may lose the empty thought of a last turn. Its end may be the token that begins the next turn, or nothing where a
    text begins that.
    """
    own = Answer(text=without_control(tokenizer, turn["content"]), calls=turn.get("tool_calls", []))
    both = [own, replace(own, bare=True)] if empty_thought(tokenizer) else [own]
    forms, follower = encode_answers(tokenizer, prompt, both), answer_shape(tokenizer).next
    others = [one[:-1] for one in forms] if follower is None else [[*one[:-1], follower] for one in forms]
    return [*forms, *others]


def _parted(tokenizer: "Tokenizer", before: str, margin: str, answer: Answer) -> tuple[str, str]:
    """Return an answer's thought as it goes on behind its prompt, and the answer itself."""
    markers = markers_of(tokenizer)
    if markers is None:
        return answer.thought, answer.text
    prompt = markers.prompt_end(before)
    space = before[len(before.rstrip()) :] + margin
    thought, text = answer.thought, answer.text
    if not thought and prompt is not PromptEnd.CLOSED:
        # A text behind a prompt that has opened a thought may go on with it; one without its end is an answer.
        begun = prompt is PromptEnd.OPENED and markers.end in text
        thought, said = markers.split(text, PromptEnd.OPENED if begun else PromptEnd.BARE)
        text = said if said is not None else ""
    return markers.inside(thought, prompt, space) or empty_thought(tokenizer), text


def _marked(tokenizer: "Tokenizer", margin: str, thought: str) -> list[tuple[int, int]]:
    """Return where a thought behind a margin has the model's own markers."""
    markers = markers_of(tokenizer)
    spans = markers.spans(thought) if markers is not None and thought else []
    return [(start + len(margin), end + len(margin)) for start, end in spans]


@lru_cache(maxsize=16)
def strips_answers(tokenizer: "Tokenizer") -> bool:
    """Whether the token that ends a turn absorbs the white space before it wherever a text spells it."""
    end = tokenizer.added_tokens_decoder.get(end_of_turn_id(tokenizer))
    return bool(end and end.lstrip)


def settle_boundary(tokenizer: "Tokenizer", prompt: Prompt, answers: Sequence[Answer]) -> tuple[Prompt, list[Answer]]:
    """Return a prompt and its answers, with white space between the two where the tokenizer wants it.

    "2 + 2 = " and "4" become "2 + 2 =" and " 4" if these are the words of the whole. The prompt is a text, or its last
    message begins the answer. Behind other messages the template decides.
    """
    end = prompt if isinstance(prompt, str) else _begun_answer(prompt)[1]
    if not end[-1:].isspace():
        return prompt, list(answers)
    before = prompt if isinstance(prompt, str) else _context(tokenizer, prompt, "")[0]
    space = joined_space(tokenizer, before, tuple(answer.text for answer in answers))
    end = end[: len(end) - len(space)]
    settled = end if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": end}]
    return settled, [replace(answer, text=space + answer.text) for answer in answers]


def end_of_turn_id(tokenizer: "Tokenizer") -> int:
    """Return the token that ends an assistant turn: the first control token that the chat template puts after one.

    Without a chat template, or if that template puts none, it is the tokenizer's EOS.

    Raises:
        SelfalignError: the tokenizer has neither.
    """
    end = answer_shape(tokenizer).end
    if end is None:
        raise SelfalignError("the tokenizer has neither an EOS token nor a chat template that ends a turn")
    return end


def stop_ids(tokenizer: "Tokenizer") -> list[int]:
    """Return the tokens that end generation.

    These are EOS, the end of turn, the token after an answer in a conversation, and those that the model's own files
    name (see `own_stops`); but none that ends a thought, such as `<|end|>` of gpt-oss.
    """
    eos, named = cast(int | None, tokenizer.eos_token_id), tokenizer.init_kwargs.get(OWN_STOPS, [])
    between = {answer_shape(tokenizer).next, *named} - marker_ids(tokenizer)
    return sorted(token for token in {eos, end_of_turn_id(tokenizer), *between} if token is not None)


def own_stops(tokenizer: "Tokenizer", named: int | Sequence[int] | None) -> list[int]:
    """Return the stop tokens in a model's own files that no text spells."""
    listed = [named] if isinstance(named, int) else named or []
    return sorted(control_ids(tokenizer) & {*listed})


def decode_response(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Return the text of generated ids, without control tokens except for the markers of a thought."""
    written = decode_written(tokenizer, ids)
    return answer_text(tokenizer, written, finished=bool(ids) and ids[-1] in stop_ids(tokenizer))


def decode_written(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Return the same with the white space that the template puts around an answer."""
    control = control_ids(tokenizer) - marker_ids(tokenizer)
    return decode_behind(tokenizer, [token for token in ids if token not in control])


def token_texts(tokenizer: "Tokenizer", ids: list[int]) -> list[str]:
    """Return what each token adds to the text, control tokens included. A character of several tokens is the last's."""
    texts: list[str] = []
    for at in range(len(ids)):
        window = ids[max(0, at - TEXT_WINDOW) : at + 1]
        before, behind = (str(tokenizer.decode(some)) for some in (window[:-1], window))
        texts.append("" if behind.endswith(HALF) else behind[len(before.rstrip(HALF)) :])
    return texts


def answer_prompt(tokenizer: "Tokenizer", prompt: Prompt) -> Prompt:
    """Return a prompt as a policy is asked to answer it.

    It begins with the model's system prompt, if it has no system turn of its own, and asks for a thought, where the
    model has such a prompt.
    """
    return under_system(tokenizer, ask_to_think(tokenizer.init_kwargs.get(THOUGHT_PROMPT, ""), prompt))


def under_system(tokenizer: "Tokenizer", prompt: Prompt) -> Prompt:
    """Return a conversation with the model's system prompt before it, unless it has a system turn of its own."""
    system = tokenizer.init_kwargs.get(SYSTEM_PROMPT, "")
    if not system or isinstance(prompt, str):
        return prompt
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    # A system turn of nothing but definitions of tools has no text of its own.
    return prompt if prompt[0]["content"].strip() else [{**prompt[0], "content": system}, *prompt[1:]]


def split_written(tokenizer: "Tokenizer", prompt: list[int], text: str) -> tuple[str, str | None]:
    """Split a text behind an encoded prompt into thought and answer (see `Markers.split`), by the model's markers."""
    markers = markers_of(tokenizer)
    if markers is None:
        return "", text
    return markers.split(text, markers.prompt_end(prompt_end(tokenizer, prompt)))


def count_thought(tokenizer: "Tokenizer", prompt: list[int], ids: list[int]) -> int:
    """Return how many of the ids behind a prompt are a thought. The last one never is."""
    thought, _ = split_written(tokenizer, prompt, decode_response(tokenizer, ids))
    return min(thought_length(tokenizer, ids, thought), len(ids) - 1) if thought else 0


def thought_length(tokenizer: "Tokenizer", ids: list[int], thought: str) -> int:
    """Return the number of ids, at the beginning of generated ones, that a thought was written as."""
    margin = answer_shape(tokenizer).margin
    written = decode_written(tokenizer, ids)
    length = len(written) - len(written.removeprefix(margin)) + len(thought)
    # The first token that ends behind the thought is the answer's.
    return bisect_right(range(1, len(ids) + 1), length, key=lambda n: len(decode_written(tokenizer, ids[:n])))


def answer_text(tokenizer: "Tokenizer", written: str, *, finished: bool) -> str:
    """Return an answer without the white space that the template puts around it; its own stays."""
    shape = answer_shape(tokenizer)
    return written.removeprefix(shape.margin).removesuffix(shape.closing * finished)


def decode_behind(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Return the text of ids that follow others, with the space that some tokenizers leave out at the beginning."""
    anchor = text_ids(tokenizer, ANCHORS[1])
    before, whole = (
        str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for part in (anchor, [*anchor, *ids])
    )
    return whole[len(before) :].removeprefix(" " * reads_no_space(tokenizer))


@lru_cache(maxsize=16)
def reads_no_space(tokenizer: "Tokenizer") -> bool:
    """Whether white space is only the end of a word, so that a decoder puts a space before every word."""
    return text_ids(tokenizer, "x\nx") == text_ids(tokenizer, "x  x")


def silent_ids(tokenizer: "Tokenizer", rows: int) -> list[int]:
    """Return those of a model's first `rows` ids that stand for no text: ids without a token, or without a text."""
    unknown = {unknown_id(tokenizer)}.difference(stop_ids(tokenizer))
    known = set(tokenizer.get_vocab().values()) - unknown
    # Several tokens of a tokenizer in Python may have one spelling, of which its vocabulary names the first.
    first = 0 if tokenizer.is_fast else max(known) + 1
    return [token for token in range(first, rows) if token not in known]


@lru_cache(maxsize=16)
def unknown_id(tokenizer: "Tokenizer") -> int | None:
    """Return the token for whatever the vocabulary cannot spell; None if it can spell everything."""
    unknown = cast(int | None, tokenizer.unk_token_id)
    return unknown if unknown in text_ids(tokenizer, RARE) else None


def text_faults(tokenizer: "Tokenizer", prompt: Prompt, answers: Sequence[Answer] = ()) -> list[str]:
    """Return what the model does not see as it stands in a prompt, and in answers of which only the text is known.

    These are "unknown" for characters that the vocabulary lacks, and "spelled" for control tokens, because no text has
    one: they are read as the characters that spell them.
    """
    texts = [prompt] if isinstance(prompt, str) else [turn_text(message) for message in prompt]
    texts += [answer.said() for answer in answers if not answer.ids]
    unknown, words = unknown_id(tokenizer), turn_words(tokenizer)
    return [
        *(["unknown"] if unknown is not None and any(unknown in text_ids(tokenizer, text) for text in texts) else []),
        *(["spelled"] if any(word in text for text in texts for word in words) else []),
    ]


@lru_cache(maxsize=16)
def turn_words(tokenizer: "Tokenizer") -> tuple[str, ...]:
    """Return the control tokens but the markers of thoughts, which an answer may spell."""
    markers = marker_ids(tokenizer)
    return tuple(word for word in control_words(tokenizer) if tokenizer.convert_tokens_to_ids(word) not in markers)


def warn_of_faults(tokenizer: "Tokenizer", counts: Mapping[str, int], of: int, noun: str) -> None:
    """Warn of the numbers of texts that the model does not see as they are."""
    if count := counts.get("unknown"):
        logger.warning(
            "%d of %d %s (%.3g %%) have characters that the tokenizer has no token for: the model reads %s instead, "
            "and learns to write it where it is trained on them",
            *(count, of, noun, 100 * count / of, tokenizer.unk_token),
        )
    if count := counts.get("spelled"):
        logger.warning(
            "%d of %d %s (%.3g %%) spell control tokens, as %s is one: the model reads their characters, and learns to "
            "write these where it is trained on them. Give conversations as turns, not as a chat template renders "
            "them, and answers without the token that ends them",
            *(count, of, noun, 100 * count / of, tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))),
        )


def fault_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Return these numbers for a stage's manifest."""
    names = {"unknown": "with_unknown_tokens", "spelled": "with_control_tokens"}
    return {name: counts[fault] for fault, name in names.items() if counts.get(fault)}


def plain_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Return the ids of a text in the middle of another. A control token that it spells is text."""
    return [token for piece in _pieces(tokenizer, text) for token in _behind_anchor(tokenizer, piece)]


def ids_to_exact_text(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Return the text that the tokenizer reads as these ids, for programs that take only texts; they add BOS
    themselves.

    Raises:
        SelfalignError: no text has these ids.
    """
    text, bos = str(tokenizer.decode(ids)), str(tokenizer.bos_token or "")
    if bos and text_ids(tokenizer, "", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    if text_ids(tokenizer, text, add_special_tokens=True) != ids:
        raise SelfalignError(
            f"cannot convert {len(ids)} prompt tokens to a text that tokenizes back to the same ids (starts with "
            f"{text[:40]!r})"
        )
    return text


def _context(tokenizer: "Tokenizer", prompt: Prompt, prefill: str, thought: str = "") -> tuple[str, list[int], str]:
    """Return a prompt's text and ids, and the white space to write before an answer."""
    marked: list[tuple[int, int]] = []
    if isinstance(prompt, str):
        first, *rest = _pieces(tokenizer, prompt)
        ids = rendered_ids(tokenizer, first)
        before, ids = first, [*ids, *_continued(tokenizer, first, ids, "".join(rest))]
        margin = ""
    else:
        messages, begun = _begun_answer(prompt)
        margin, prefill = answer_shape(tokenizer).margin, begun + prefill
        before = render_prompt(tokenizer, messages)
        before = before[: len(before) - len(margin)]
        ids = rendered_ids(tokenizer, before)
        if prefill or thought:
            thought, prefill = _parted(tokenizer, before, margin, Answer(text=prefill, thought=thought))
            prefill, marked = thought + prefill, _marked(tokenizer, margin, thought)
    if not prefill:
        return before, ids, margin
    return before + margin + prefill, [*ids, *_continued(tokenizer, before, ids, margin + prefill, marked)], ""


def _begun_answer(messages: list[Message]) -> tuple[list[Message], str]:
    """Return the messages to answer, and the beginning of the answer if the last message is the assistant's."""
    if messages[-1:] and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""


def _continued(
    tokenizer: "Tokenizer", before: str, ids: list[int], text: str, marked: Sequence[tuple[int, int]] = ()
) -> list[int]:
    """Return the ids of a text behind another, whose ids stay as they are.

    A control token that it spells is text, except in the parts that are `marked`.

    They come from the ids of both texts together if these begin with the ids of the first. Else, as for an answer that
    begins with more white space than the prompt ends with, the text is tokenised alone.
    """
    first, *rest = _pieces(tokenizer, text, marked)
    whole = rendered_ids(tokenizer, before + first)
    behind = whole[len(ids) :] if whole[: len(ids)] == ids else _behind_anchor(tokenizer, first)
    return [*behind, *(token for piece in rest for token in _behind_anchor(tokenizer, piece))]


def _behind_anchor(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Return the ids of a text as in the middle of another, without the space that some tokenizers put first."""
    if not text:
        return []
    for anchor in ANCHORS:
        ids, whole = text_ids(tokenizer, anchor), text_ids(tokenizer, anchor + text)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
    return text_ids(tokenizer, text)


def _pieces(tokenizer: "Tokenizer", text: str, marked: Sequence[tuple[int, int]] = ()) -> list[str]:
    """Return the text in pieces none of which spells a control token outside the marked parts; at least one."""
    spelled = [at for at in spelled_at(tokenizer, text) if not any(start <= at < end for start, end in marked)]
    cuts = [0, *(start + 1 for start in spelled), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]
