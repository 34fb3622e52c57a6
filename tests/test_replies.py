"""Answers of the known servers, in their own spellings and wordings."""

import json
from typing import Any

import pytest

from selfalign.core.records import FinishReason
from selfalign.engines.replies import PassingError, RefusedError, Reply, fewest_tokens, read_answer, unescape

SPELLINGS = {
    FinishReason.EOS: [
        "stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE", "FINISH_REASON_STOP", "tool_calls",
        "tool-calls", "normal",
    ],
    FinishReason.LENGTH: [
        "length", "max_tokens", "MAX_TOKENS", "FINISH_REASON_MAX_TOKENS", "model_length", "max_output_tokens",
        "ERROR_LIMIT", "model_context_window_exceeded", "token_limit",
    ],
    FinishReason.CONTENT_FILTER: [
        "content_filter", "SAFETY", "refusal", "RECITATION", "PROHIBITED_CONTENT", "sensitive", "guardrail_intervened",
        "ERROR_TOXIC", "content-filter", "content_filter: SAFETY",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("finish", "spelling"), [(name, one) for name, said in SPELLINGS.items() for one in said])
def test_end_of_a_text_is_known_in_every_spelling(finish: FinishReason, spelling: str) -> None:
    assert read_answer(200, answer({"content": "Score: 4"}, spelling)) == Reply("Score: 4", finish, 0, 0)


def test_end_that_is_not_told_is_a_stop_and_one_that_nobody_knows_is_told() -> None:
    ended = [ending(None), ending(""), ending({"type": "length", "length": 512}), ending("Repetition")]
    assert [reason for reason, _ in ended] == [FinishReason.EOS] * 2 + [FinishReason.LENGTH, FinishReason.UNKNOWN]
    assert [stated for _, stated in ended] == ["stop", "stop", "length", "repetition"]


@pytest.mark.parametrize("word", ["too_long", "refused", "prompt_too_long", "eos_or_so", "unknown"])
def test_word_of_a_server_is_no_outcome_of_ours_that_is_spelled_so(word: str) -> None:
    """A text was written, so it is read, whatever the server calls its end."""
    assert ending(word) == (FinishReason.UNKNOWN, word)


def ending(finish: Any) -> tuple[FinishReason, str]:
    reply = read_answer(200, answer({"content": "Score: 4"}, finish))
    return reply.finish_reason, reply.stated_reason


def answer(message: Any, finish: Any = "stop", **more: Any) -> str:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], **more})


THOUGHT = [{"type": "thinking", "thinking": [{"type": "text", "text": "maybe 2"}]}]
TEXTS = {
    "text": ({"content": "Score: 4"}, "Score: 4"),
    "parts": ({"content": [*THOUGHT, {"type": "text", "text": "Good.\nScore: 4"}]}, "Good.\nScore: 4"),
    "two parts": ({"content": [{"type": "text", "text": "Go"}, {"type": "text", "text": "od."}]}, "Good."),
    "parts of the other API": ({"content": [{"type": "output_text", "text": "Good."}]}, "Good."),
    "parts that are texts": ({"content": ["Go", "od."]}, "Good."),
    "one part": ({"content": {"type": "text", "text": "Good."}}, "Good."),
    "parts nobody reads": ({"content": [{"type": "image_url"}, {"type": "redacted_thinking", "text": "2"}]}, ""),
    "thinking beside it": ({"content": "Score: 4", "reasoning_content": "Score: 2"}, "Score: 4"),
    "thinking beside it, otherwise": ({"content": "Score: 4", "reasoning": "Score: 2"}, "Score: 4"),
    "refusal": ({"content": None, "refusal": "I cannot."}, "I cannot."),
    "nothing": ({"content": None}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_what_the_model_answered_and_not_what_it_thought(name: str) -> None:
    message, text = TEXTS[name]
    assert read_answer(200, answer(message)).text == text


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": "hmm Score: 2"},
        {"content": "", "reasoning": "hmm Score: 2"},
        {"content": "\n", "thinking": "hmm Score: 2"},
        {"content": [{"type": "thinking", "thinking": "hmm Score: 2"}]},
        {"content": None, "reasoning_content": "hmm</think> Score: 2"},
    ],
)
@pytest.mark.parametrize(("finish", "reason"), [("length", FinishReason.LENGTH), ("stop", FinishReason.EOS)])
def test_thinking_that_ate_the_tokens_is_a_text_whose_thinking_has_no_end(
    message: dict, finish: str, reason: FinishReason
) -> None:
    reply = read_answer(200, answer(message, finish))
    assert (reply.text.split(), reply.finish_reason) == (["<think>", "hmm", "Score:", "2"], reason)


def test_tokens_are_counted_in_either_spelling_and_those_of_a_cache_are_read_too() -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 64}}
    reply = read_answer(200, answer({"content": "x"}, usage=usage))
    assert (reply.prompt_tokens, reply.completion_tokens, reply.tokens_read) == (100, 5, 164)
    usage = {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 300, "prompt_tokens_details": None}
    reply = read_answer(200, answer({"content": "x"}, usage=usage))
    assert (reply.prompt_tokens, reply.completion_tokens, reply.tokens_read) == (10, 5, 310)
    assert read_answer(200, answer({"content": "x"}, usage=None)).tokens_read == 0


ODD_USAGE = [
    {"prompt_tokens": -7, "completion_tokens": -5},
    {"prompt_tokens": "1.5k", "completion_tokens": "five"},
    {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
    {"prompt_tokens": [1], "completion_tokens": {}, "prompt_tokens_details": [3], "cache_read_input_tokens": "x"},
    [1, 2],
    "n/a",
]


@pytest.mark.parametrize("usage", ODD_USAGE)
def test_usage_that_is_none_counts_as_not_said_and_the_answer_stands(usage: Any) -> None:
    reply = read_answer(200, answer({"content": "Score: 4"}, usage=usage))
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens, reply.tokens_read) == ("Score: 4", 0, 0, 0)


def error(message: str, code: Any = None, kind: str = "invalid_request_error") -> str:
    return json.dumps({"error": {"message": message, "type": kind, "code": code}}, ensure_ascii=False)


TOO_LONG = [
    (400, error("request (4390 tokens) exceeds the available context size (4096 tokens), try increasing it", 400)),
    (400, error("the request exceeds the available context size, try increasing it", 400)),
    (500, error("Context size has been exceeded.", 500, "server_error")),
    (400, error("This model's maximum context length is 4096 tokens. However, you requested 4200 tokens.", 400)),
    (400, error("too long", "context_length_exceeded")),
    (400, error("Your input exceeds the context window of this model. Please adjust your input and try again.")),
    (400, error("Input tokens exceed the configured limit of 272000 tokens.")),
    (400, error("prompt is too long: 213462 tokens > 200000 maximum")),
    (400, error("input length and `max_tokens` exceed context limit: 199000 + 20000 > 200000")),
    (413, error("Request exceeds the maximum size", "request_too_large")),
    (400, error("The input token count (1196265) exceeds the maximum number of tokens allowed (1048575).", 400)),
    (422, '{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000"}'),
    (422, '{"error":"Input validation error: `inputs` must have less than 4095 tokens. Given: 5000"}'),
    (400, error("The input (5000 tokens) is longer than the model's context length (4096 tokens).", 400)),
    (400, '{"error":"prompt too long; exceeded max context length by 300 tokens"}'),
    (400, '{"error":"Trying to keep the first 5000 tokens when context the overflows. However, the model is loaded '
          'with context length of only 4096 tokens, which is not enough."}'),
    (400, error("This model's maximum prompt length is 131072 but the request contains 537812 tokens.")),
    (400, error("Please reduce the length of the messages or completion.")),
    (400, error("Prompt contains 40000 tokens, too large for model with 32768 maximum context length")),
    (400, '{"message":"Input is too long for requested model."}'),
    (400, error("<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 30720]")),
    (400, error("Invalid request: Your request exceeded model token limit: 8192")),
    (400, error("invalid params, context window exceeds limit")),
    (400, error("too many tokens: total number of tokens in the prompt cannot exceed 4081")),
    (429, error("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 48000.", "rate_limit")),
]  # fmt: skip
UNWANTED = [
    (400, error("Content Exists Risk", "invalid_request_error")),
    (400, error("The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
                "content_filter")),
    (400, error("<400> InternalError.Algo.DataInspectionFailed: Input text data may contain inappropriate content.",
                "data_inspection_failed")),
    (400, error("Invalid prompt: your prompt was flagged as potentially violating our usage policy.")),
    (403, '{"code":"permission denied","error":"Content violates usage guidelines. Failed check: SAFETY_CHECK"}'),
    (403, error("Your chosen model requires moderation and your input was flagged", 403)),
    (400, error("系统检测到输入或生成内容可能包含不安全或敏感内容", "1301")),
    (451, error("Output blocked by content filtering policy")),
    (200, '{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}'),
    (200, '{"choices":null,"error":null,"promptFeedback":{"blockReason":"SAFETY"}}'),
]  # fmt: skip


@pytest.mark.parametrize(("status", "said"), TOO_LONG, ids=range(len(TOO_LONG)))
def test_prompt_is_too_long_in_any_wording(status: int, said: str) -> None:
    reply = read_answer(status, said)
    assert (reply.finish_reason, reply.text) == (
        FinishReason.PROMPT_TOO_LONG,
        f"status {status}: {' '.join(said.split())}",
    )


@pytest.mark.parametrize(("status", "said"), UNWANTED, ids=range(len(UNWANTED)))
def test_content_is_unwanted_in_any_wording(status: int, said: str) -> None:
    reply = read_answer(status, said)
    assert (reply.finish_reason, reply.text) == (
        FinishReason.CONTENT_FILTER,
        f"status {status}: {' '.join(said.split())}",
    )


def test_no_choice_without_a_reason_is_a_refusal_in_the_server_s_words() -> None:
    assert read_answer(200, '{"choices": []}') == Reply('status 200: {"choices": []}', FinishReason.REFUSED, 0, 0)


FOR_ALL = [
    (401, error("Incorrect API key provided")),
    (402, error("Insufficient Balance")),
    (403, error("Country, region, or territory not supported")),
    (404, error("The model `x` does not exist", "model_not_found")),
    (429, error("You exceeded your current quota, please check your plan and billing details.", "insufficient_quota")),
    (429, error("You exceeded your current quota, please check your plan.")),
    (400, error("Your credit balance is too low to access the API.")),
    (400, error("Billing hard limit has been reached", "billing_hard_limit_reached")),
    (403, error("Sorry, your account balance is insufficient: insufficient_quota")),
    (400, error("Access denied, please make sure your account is in good standing.", "Arrearage")),
    (301, ""),
    (200, json.dumps({"error": {"message": "Insufficient credits", "code": 402}})),
]
OF_ONE = [
    (400, error("Unsupported parameter: 'max_tokens'", "unsupported_parameter")),
    (422, '{"detail":[{"loc":["body","messages"],"msg":"invalid"}]}'),
    (400, ""),
]
PASSING = [
    (429, error("Rate limit reached for requests", "rate_limit_exceeded"), False),
    (429, error("You exceeded your current quota. Please retry in 32s.", 429, "RESOURCE_EXHAUSTED"), False),
    (408, "", False),
    (500, "oh no", True),
    (503, error("Loading model", 503), True),
    (529, error("Overloaded", kind="overloaded_error"), True),
    (200, "<html>gateway</html>", True),
    (200, '{"choices": [{}]}', True),
    (200, "null", True),
    (200, json.dumps({"error": {"message": "Provider returned error", "code": 502}}), True),
    (200, json.dumps({"error": {"message": "Rate limited upstream", "code": "429"}}), False),
    (200, json.dumps({"error": "upstream is gone"}), True),
    (200, answer({"content": 4}), True),
    *((200, answer({"content": "Score: 2, or"}, reason), True) for reason in ("error", "abort", "network_error")),
    (200, answer({"content": "Score: 2, or"}, "insufficient_system_resource"), True),
    # A text that an error broke off, told beside it in the body or in the choice.
    (200, json.dumps({**json.loads(answer({"content": "Score: 1"})), "error": {"message": "gone", "code": 502}}), True),
    (200, json.dumps({**json.loads(answer({"content": "Score: 1"})), "error": {"message": "gone"}}), True),
    (200, '{"choices": [{"message": {"content": "Score: 1"}, "error": {"code": 502, "message": "gone"}}]}', True),
]


@pytest.mark.parametrize(("status", "said"), FOR_ALL, ids=range(len(FOR_ALL)))
def test_what_every_request_would_be_told_is_not_of_this_one(status: int, said: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read_answer(status, said)
    assert not refused.value.by_request
    assert " ".join(said.split()) in refused.value.words


@pytest.mark.parametrize(("status", "said"), OF_ONE, ids=range(len(OF_ONE)))
def test_other_refusals_may_be_of_this_request(status: int, said: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read_answer(status, said)
    assert refused.value.by_request
    assert refused.value.words == f"status {status}: {said}"


@pytest.mark.parametrize(("status", "said", "by_request"), PASSING, ids=range(len(PASSING)))
def test_trouble_that_may_pass_has_the_server_s_words(status: int, said: str, by_request: bool) -> None:
    with pytest.raises(PassingError) as trouble:
        read_answer(status, said)
    assert trouble.value.by_request is by_request
    assert " ".join(said.split()) in trouble.value.words


def test_body_that_spells_letters_as_numbers_is_read() -> None:
    assert unescape(json.dumps({"error": "敏感 content"})) == '{"error": "敏感 content"}'
    assert unescape('{"error": "\\u654f') == '{"error": "\\u654f'
    assert unescape("oh  no") == "oh  no"


def test_half_of_a_letter_in_a_body_is_a_letter_nobody_knows() -> None:
    said = r'{"choices": [{"message": {"content": "bad \ud83d\nScore: 4 \ud83d\ude00"}}]}'
    assert read_answer(200, unescape(said)).text == "bad \ufffd\nScore: 4 \U0001f600"


@pytest.mark.parametrize("text", ["", None])
def test_text_of_a_completion_beside_a_message_hides_no_answer(text: str | None) -> None:
    choice = {"text": text, "message": {"content": "Score: 4"}, "finish_reason": "stop"}
    assert read_answer(200, json.dumps({"choices": [choice]})).text == "Score: 4"


def test_long_words_are_shortened() -> None:
    with pytest.raises(RefusedError) as refused:
        read_answer(404, "x\n" * 1000)
    assert len(refused.value.words) < 320


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("one two  three\nfour", 3),
        ("", 0),
        ("=" * 4000, 0),
        (" " * 4000, 0),
        ("回答切题，但不够完整。", 3),
        ("def f(x):\n    return x\n", 3),
    ],
)
def test_fewest_tokens_of_a_prompt(text: str, tokens: int) -> None:
    assert fewest_tokens([{"role": "user", "content": text}]) == tokens
