"""Replies of an OpenAI-compatible server: a text, an error that may pass, or a refusal.

Servers agree on little more than the names of the fields. The spellings and wordings known here come from vLLM,
SGLang, llama.cpp, TGI, Ollama, LM Studio, TensorRT-LLM, OpenAI and Azure, Anthropic, Gemini, Bedrock, Cohere, Mistral,
DeepSeek, DashScope, Zhipu, Moonshot, MiniMax, xAI, Groq, Together, watsonx and OpenRouter.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, Message
from selfalign.data.thinking import unanswered

FINISHES = {
    FinishReason.EOS: "stop eos eos_token end end_turn end_of_turn stop_sequence stop_token stop_word complete "
    "completed normal finished tool_calls tool_use function_call",
    FinishReason.LENGTH: "length max_tokens max_output_tokens max_new_tokens max_length max_output token_limit "
    "model_length model_context_window_exceeded context_length_exceeded error_limit incomplete truncated",
    FinishReason.CONTENT_FILTER: "content_filter content_filtered content_policy content_policy_violation filtered "
    "safety blocked image_safety sensitive output_sensitive refusal recitation blocklist prohibited_content spii "
    "guardrail_intervened error_toxic moderation",
}
"""How servers spell why a text ended."""

SPELLED = {spelling: reason for reason, spellings in FINISHES.items() for spelling in spellings.split()}

BROKEN_OFF = {"error", "abort", "aborted", "cancel", "cancelled", "canceled", "user_cancel", "timeout", "time_limit"}
BROKEN_OFF |= {"network_error", "server_error", "insufficient_system_resource", "not_finished"}
"""How servers spell that a text was broken off, which is no answer."""

FOR_ALL = (401, 402, 403, 404, 405, 407, 410)
"""Statuses that concern every request: the key, the account, the address."""

TOO_LONG = re.compile(
    r"context[_ -]?(?:length|window|size|limit)|exceed_context"
    r"|(?:prompt|input|request|messages?)(?: is| are)?[_ ]too[_ ](?:long|large)|too large for model|above_max_length"
    r"|too many (?:input |prompt )?tokens|token limit|tokens exceed|input token count|reduce the length"
    r"|maximum (?:prompt|input|model|allowed input) length|max(?:imum)?[_ ](?:seq|length|input|prompt)"
    r"|exceeds? the (?:maximum|model'?s)|input length should be|inputs?`? (?:tokens|must have less)",
    re.IGNORECASE,
)
"""How servers say that a prompt does not fit."""

CONTENT = re.compile(
    r"content[_ -]?(?:filter|polic|management|moderation|violation|blocked)|content exists risk"
    r"|data[_ ]?inspection[_ ]?failed|(?:inappropriate|prohibited|harmful|sensitive|unsafe|illegal) "
    r"(?:content|input|prompt|information|words?)|usage (?:guideline|polic)|responsible[_ ]?ai|safety|flagged"
    r"|requires moderation|high[_ ]risk|违规|敏感|不安全",
    re.IGNORECASE,
)
"""How servers say that a prompt's content is not allowed."""

NO_CREDIT = re.compile(
    r"insufficient[_ ](?:quota|balance|credit|funds)|credit balance|billing[_ ](?:hard|not|limit)|payment required"
    r"|arrearage|overdue|account (?:is )?(?:deactivated|suspended)|余额不足|欠费",
    re.IGNORECASE,
)
"""How servers say that there is no credit left."""

QUOTA = re.compile(r"exceeded your current quota", re.IGNORECASE)
PASSES = re.compile(r"retry|per[_ ]?minute|RESOURCE_EXHAUSTED", re.IGNORECASE)
"""How servers say that a quota is full again soon."""

LONGEST_WORDS = 300


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of the server.

    Attributes:
        text: the completion; of a refusal the server's message, or what was written before its filter stepped in.
        finish_reason: why the text ended, or why the server did not fulfil the request.
        prompt_tokens: tokens of the prompt, 0 where the server gives no number.
        completion_tokens: tokens of the completion, 0 where the server gives no number.
        stated_reason: the server's own word for why the text ended.
        tokens_read: tokens of the prompt, those from a cache included.
        model: the server's name for the model that answered.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    stated_reason: str = field(default="", compare=False)
    tokens_read: int = field(default=0, compare=False)
    model: str = field(default="", compare=False)


class RefusedError(SelfalignError):
    """A request that the server will refuse again. `status` is HTTP's.

    `by_request`: another request may succeed. `words` is the server's message without the address.
    """

    def __init__(self, message: str, status: int, by_request: bool = False, words: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.by_request = by_request
        self.words = words or message


class PassingError(SelfalignError):
    """An error that may have passed when the request is sent again.

    `by_request`: the error may be due to this request. `words` is the server's message without the address.
    `wait_seconds` is how long the server asks to wait.
    """

    def __init__(self, message: str, by_request: bool = False, words: str = "") -> None:
        super().__init__(message)
        self.by_request = by_request
        self.words = words or message
        self.wait_seconds = 0.0


def read_answer(status: int, said: str) -> Reply:
    """Return the reply in an HTTP status and body. Secrets have been taken out of the body before.

    Raises:
        RefusedError: the server would refuse the request again.
        PassingError: the same request may succeed later.
    """
    words = shorten(status, said)
    if status == 200:
        return _read_success(said)
    if status in (400, 403, 429) and (NO_CREDIT.search(said) or (QUOTA.search(said) and not PASSES.search(said))):
        raise RefusedError(words, status)
    if status == 429 and "request too large" in said.lower():
        return Reply(words, FinishReason.PROMPT_TOO_LONG, 0, 0)
    if status in (408, 425, 429):
        raise PassingError(words)
    if status == 413 or (status in (400, 422, 500) and TOO_LONG.search(said)):
        return Reply(words, FinishReason.PROMPT_TOO_LONG, 0, 0)
    if status >= 500:
        raise PassingError(words, by_request=True)
    if status >= 400 and status not in {*FOR_ALL} - {403} and CONTENT.search(said):
        return Reply(words, FinishReason.CONTENT_FILTER, 0, 0)
    raise RefusedError(words, status, by_request=status >= 400 and status not in FOR_ALL)


def unescape(said: str) -> str:
    """Return a JSON body with its \\u escapes as characters. Half of a surrogate pair becomes U+FFFD."""
    if "\\u" not in said:
        return said
    try:
        spelled = json.dumps(json.loads(said), ensure_ascii=False)
    except ValueError:
        return said
    return spelled.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shorten(status: int, said: str) -> str:
    """Return the server's message on one line of limited length."""
    line = " ".join(said.split())
    return f"status {status}: {line[:LONGEST_WORDS]}{'…' * (len(line) > LONGEST_WORDS)}"


def _read_success(said: str) -> Reply:
    """Return the reply in a body with status 200, which may still be a failure."""
    words = shorten(200, said)
    try:
        answer = json.loads(said)
        if (status := _status_inside(answer)) is not None:
            return read_answer(status, said)
        if not answer["choices"]:
            filtered = "prompt_filter" in said or CONTENT.search(said)
            return Reply(words, FinishReason.CONTENT_FILTER if filtered else FinishReason.REFUSED, 0, 0)
        if answer.get("error"):
            raise PassingError(f"the text was broken off; {words}", by_request=True)
        reply = _read_choice(answer["choices"][0], answer.get("usage") or {}, words)
        return replace(reply, model=str(answer.get("model") or ""))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise PassingError(f"no completion ({type(error).__name__}); {words}", by_request=True) from error


def _status_inside(answer: Any) -> int | None:
    """Return the HTTP status that a body gives as its error code, as gateways do; a text beside it is only a part."""
    error = answer.get("error")
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return int(code) if re.fullmatch("[45][0-9]{2}", code) else None


def _read_choice(choice: Any, usage: Any, words: str) -> Reply:
    stated = stated_reason(choice.get("finish_reason"))
    if spelling(stated) in BROKEN_OFF or choice.get("error"):
        raise PassingError(f"the text was broken off ({choice.get('finish_reason')}); {words}", by_request=True)
    usage = usage if isinstance(usage, dict) else {}
    read = _count(usage.get("prompt_tokens") or usage.get("input_tokens"))
    return Reply(
        text=_written(choice["message"]) if choice.get("message") else str(choice["text"] or ""),
        finish_reason=SPELLED.get(spelling(stated), FinishReason.UNKNOWN),
        prompt_tokens=read,
        completion_tokens=_count(usage.get("completion_tokens") or usage.get("output_tokens")),
        stated_reason=stated,
        tokens_read=read and read + _cached(usage),
    )


def _count(told: Any) -> int:
    """Return a number of tokens; 0 where the server gives none that can be read."""
    try:
        return max(0, int(told or 0))
    except (TypeError, ValueError, OverflowError):
        return 0


def _cached(usage: Any) -> int:
    """Return the prompt tokens that came from a cache. Most servers count them among those read as well."""
    details = usage.get("prompt_tokens_details")
    told = [details.get("cached_tokens") if isinstance(details, dict) else None]
    told += [usage.get(name) for name in ("cache_read_input_tokens", "cache_creation_input_tokens")]
    return sum(map(_count, told))


def stated_reason(reason: Any) -> str:
    """Return the server's word for why a text ended, in lower case. A server that says nothing means "stop"."""
    reason = reason.get("type") if isinstance(reason, dict) else reason
    return str(reason or "stop").strip().lower()


def spelling(stated: str) -> str:
    """Return a stated reason as the tables of spellings have it."""
    return re.sub(r"[\s-]+", "_", stated.partition(":")[0]).removeprefix("finish_reason_")


def _written(message: Mapping[str, Any]) -> str:
    """Return the text of a message. If there is only thinking, return that, as a text whose thinking has no end."""
    parts = message.get("content")
    parts = [parts] if isinstance(parts, dict) else parts or []
    if isinstance(parts, str):
        text, thoughts = parts, []
    else:
        text = "".join(part if isinstance(part, str) else _text_of(part) for part in parts)
        thoughts = [part for part in parts if isinstance(part, dict) and "thinking" in part]
    text = text or message.get("refusal") or ""
    told = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    thinking = _flat([*told, *(part["thinking"] for part in thoughts)])
    return text if text.strip() or not thinking.strip() else unanswered(thinking)


def _text_of(part: Mapping[str, Any]) -> str:
    return str(part.get("text") or "") if part.get("type", "text") in ("text", "output_text") else ""


def _flat(thinking: Any) -> str:
    """Return the text in thinking that is a text, a part with a text, or a list of such."""
    if isinstance(thinking, dict):
        return _flat(thinking.get("text"))
    if isinstance(thinking, list):
        return "".join(map(_flat, thinking))
    return thinking if isinstance(thinking, str) else ""


def fewest_tokens(messages: Sequence[Message]) -> int:
    """Return a lower bound of a prompt's tokens with any tokenizer: three quarters of its words.

    Tokenizers begin a new token at every space, but for a few that join words and save a third with that. Chinese and
    Japanese, which have no spaces, count as four characters a token; the largest vocabularies come to two.
    """
    text = " ".join(message["content"] for message in messages)
    return int(0.75 * len(text.split()) + len(re.findall("[\u3040-\u30ff\u3400-\u9fff]", text)) / 4)
