"""Thoughts in texts: where a model's thinking ends and its answer begins.

Servers that know a model's format cut the thinking off. Others, and models that write in this process, leave it in the
text between the model's own markers, of which the first is often part of the prompt. `Markers` are those of one model;
the patterns read texts of any model.
"""

import re
from dataclasses import dataclass
from enum import Enum

from selfalign.core.records import FinishReason, Prompt, Response

TAG = r"[\w:.-]{0,24}(?:think(?:ing)?|thoughts?|reasoning|scratchpad)[\w:.-]{0,24}"
"""Names of thinking tags: think, thinking, seed:think, mm:think, think:opensource, thought, reasoning, …"""

OPENING = re.compile(
    rf"^[ \t]*(?i:<{TAG}>)"
    r"|◁think▷|\[THINK\]|<\|START_THINKING\|>|<\|inner_prefix\|>|<\|begin_of_thought\|>|<start_working_out>|<\|think\|>"
    r"|<\|open\|>think<\|sep\|>|<\|channel>thought|<\|channel\|>\s*(?:analysis|commentary)"
    r"|^Here (?:is|are) my (?:thought process|reasoning steps):",
    re.MULTILINE,
)
"""Begins thinking. A tag does so only at the beginning of a line; inside a line it is quoted."""

CLOSING = re.compile(
    rf"(?<![`\"'“])(?i:</{TAG}>)(?![`\"'”])"
    r"|◁/think▷|\[/THINK\]|<\|END_THINKING\|>(?:\s*<\|START_RESPONSE\|>)?|<\|inner_suffix\|>|<\|end_of_thought\|>"
    r"|<end_working_out>|<\|content\|>|<\|close\|>think<\|sep\|>(?:\s*<\|open\|>response<\|sep\|>)?|<channel\|>"
    r"|<\|channel\|>\s*final[^<\n]{0,40}(?:<\|constrain\|>[^<\n]{0,40})?<\|message\|>"
    r"|\[BEGIN FINAL RESPONSE\]|^Here is my response:",
    re.MULTILINE,
)
"""Ends thinking."""

HARMONY = re.compile(r"\s*analysis(?=[A-Z\"'])")
"""Beginning of gpt-oss's thinking in a text without control tokens."""

FINAL = "assistantfinal"
"""Beginning of gpt-oss's answer in such a text."""


def answer_behind(text: str) -> str | None:
    """Return the text behind the last end of thinking; the whole text if there is none.

    Returns:
        The end of the text, or None if thinking begins in the text and does not end.
    """
    start = max((found.end() for found in CLOSING.finditer(text)), default=0)
    if HARMONY.match(text):
        start = max(start, text.rfind(FINAL) + len(FINAL) if FINAL in text else 0)
    answer = text[start:]
    return None if OPENING.search(answer) or (not start and HARMONY.match(text)) else answer


def marks_thinking(text: str) -> bool:
    """Whether thinking begins or ends in a text."""
    return bool(OPENING.search(text) or CLOSING.search(text))


def thinks_on(prompt: str, text: str) -> bool:
    """Whether a text never ends the thinking that its prompt has begun. The end of the prompt suffices."""
    begun = [found.end() for found in OPENING.finditer(prompt)]
    return bool(begun) and not prompt[begun[-1] :].strip() and not CLOSING.search(text)


def unanswered(thinking: str) -> str:
    """Return thinking without an answer as a text that `answer_behind` recognises as such."""
    return f"<think>\n{CLOSING.sub(' ', thinking)}"


class PromptEnd(Enum):
    """What the end of a prompt has of a thought: nothing, its opening marker, or a whole one."""

    BARE = "bare"
    OPENED = "opened"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Markers:
    """The texts that a model writes around its thought.

    Attributes:
        open: begins a thought.
        close: ends it.
        final: the end of `close` that begins an answer also where nothing was thought; empty if all of `close` does.
    """

    open: str
    close: str
    final: str = ""

    @property
    def end(self) -> str:
        """The text behind which the answer begins."""
        return self.final or self.close

    def prompt_end(self, prompt: str) -> PromptEnd:
        """Return what a prompt's end has of a thought."""
        prompt = prompt.rstrip()
        if prompt.endswith(self.open.rstrip()):
            return PromptEnd.OPENED
        return PromptEnd.CLOSED if prompt.endswith(self.end.rstrip()) else PromptEnd.BARE

    def split(self, text: str, prompt: PromptEnd = PromptEnd.BARE) -> tuple[str, str | None]:
        """Split a text that a model wrote into thought and answer, which together are the text.

        A thought begins in the prompt or with the text; markers further on belong to the answer. White space between
        marker and answer belongs to the thought.

        Args:
            text: what was written.
            prompt: what the end of its prompt has of a thought.

        Returns:
            The thought, markers included; "" if there is none. The answer; None if the thought has no end.
        """
        at, inside = 0, prompt is PromptEnd.OPENED
        while inside or text.startswith((self.open, self.end), len(text) - len(text[at:].lstrip())):
            found = text.find(self.end, at)
            if found < 0:
                return text, None
            rest = text[found + len(self.end) :]
            at, inside = len(text) - len(rest.lstrip()), False
        return text[:at], text[at:]

    def spans(self, thought: str) -> list[tuple[int, int]]:
        """Return (start, end) of the markers at the beginning and at the end of a thought."""
        first = len(thought) - len(thought.lstrip())
        spans = [(first, first + len(self.open))] if thought.startswith(self.open, first) else []
        last = len(thought.rstrip())
        ends = [end for end in (self.close, self.end) if thought.endswith(end.rstrip(), 0, last)]
        return [*spans, *((last - len(end.rstrip()), last) for end in ends[:1])]

    def inside(self, thought: str, prompt: PromptEnd, space: str) -> str:
        """Return a thought as it goes on behind a prompt that has opened it already, with this white space behind."""
        begun = thought.lstrip()
        if prompt is not PromptEnd.OPENED or not begun.startswith(self.open):
            return thought
        return begun.removeprefix(self.open).removeprefix(space)


HARMONY_FINAL = "<|channel|>final<|message|>"

FAMILIES = (
    Markers("<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{HARMONY_FINAL}", HARMONY_FINAL),
    Markers("<|channel>thought\n", "<channel|>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>", "<|START_RESPONSE|>"),
    Markers("<|inner_prefix|>", "<|inner_suffix|>"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("◁think▷", "◁/think▷"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<think>", "</think>"),
    Markers("<thought>", "</thought>"),
    Markers("Here is my thought process:", "Here is my response:"),
)
"""gpt-oss, Gemma 4, Command A, Apertus, Seed, Kimi, Magistral, Qwen with most others, EXAONE, Granite."""


def markers_in(template: str) -> Markers | None:
    """Return the markers that a chat template knows; None if it knows no thoughts."""
    return next((one for one in FAMILIES if one.open.rstrip() in template or one.end in template), None)


def ask_to_think(thought_prompt: str, prompt: Prompt) -> Prompt:
    """Return a prompt with what asks for a thought before it, at the start of the first user turn."""
    if not thought_prompt:
        return prompt
    if isinstance(prompt, str):
        return f"{thought_prompt}\n\n{prompt}"
    first = next(at for at, turn in enumerate(prompt) if turn["role"] == "user")
    turn = {**prompt[first], "content": f"{thought_prompt}\n\n{prompt[first]['content']}"}
    return [*prompt[:first], turn, *prompt[first + 1 :]]


def split_given(text: str) -> tuple[str, str | None]:
    """Split a text of an unknown model as `Markers.split` does. Its thought must begin with the text."""
    if not OPENING.match(text.lstrip()) and not HARMONY.match(text):
        return "", text
    answer = answer_behind(text)
    if answer is None:
        return text, None
    answer = answer.lstrip()
    return text.removesuffix(answer), answer


def answer_given(text: str) -> str:
    """Return the answer in a text of an unknown model; "" if its thought has no end."""
    return split_given(text)[1] or ""


def given_response(name: str, instruction: str, text: str, model: str) -> Response:
    """Return a response that was read from data, its thought apart.

    It counts as finished, because nothing tells how it ended, unless its thought has no end.
    """
    thought, answer = split_given(text)
    return Response(
        id=name,
        instruction_id=instruction,
        text=answer or "",
        thought=thought,
        finish_reason=FinishReason.TRUNCATED if answer is None else FinishReason.EOS,
        tokens=0,
        model=model,
    )
