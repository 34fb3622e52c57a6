"""The end of a model's thinking in its text, behind which its answer begins.

Servers that know a model's format cut the thinking off. Others, and models that write in this process, leave it in the
text between the model's own markers, of which the first is often part of the prompt.
"""

import re

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
