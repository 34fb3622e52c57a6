"""The client against a real server that fails in every way servers do."""

import json
import secrets
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from builders import workspace
from chat_server import ChatServer, Fault, chat, chat_server

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason
from selfalign.engines.openai_client import Client, Endpoint, retry_after, same_model
from selfalign.engines.replies import PassingError, RefusedError, Reply
from selfalign.store.journal import Journal

EOS, TOO_LONG, REFUSED = FinishReason.EOS, FinishReason.PROMPT_TOO_LONG, FinishReason.REFUSED

KEY = f"sk-{secrets.token_hex(16)}"
ASK = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited; it does not."""
    found: list[float] = []
    monkeypatch.setattr("selfalign.engines.openai_client.pause", lambda stop, seconds: found.append(seconds))
    return found


def client(server: ChatServer, **settings: Any) -> Client:
    return Endpoint(base_url=server.url, model="judge-1", api_key_env="JUDGE_KEY", **settings).open("judge.endpoint")


def test_answer_comes_with_its_tokens_and_the_key_goes_in_the_header_only() -> None:
    with chat_server() as server, client(server) as chats:
        assert chats.complete(ASK) == Reply("Fine.\nScore: 4", EOS, 10, 3)
    assert server.bodies == [{"model": "judge-1", **ASK}]
    assert server.keys == [f"Bearer {KEY}"]


def test_no_key_is_sent_where_none_is_needed() -> None:
    with chat_server() as server:
        endpoint = Endpoint(base_url=server.url, model="m", api_key_env="")
        with endpoint.open("judge.endpoint") as chats:
            chats.complete(ASK)
    assert server.keys == [""]


def test_missing_key_is_named_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(SelfalignError, match=r"judge\.endpoint\.api_key_env: .*JUDGE_KEY is not set"):
        endpoint.open("judge.endpoint")


@pytest.mark.parametrize("secret", ["“sk-1”", "ключ", "sk-1 # mine", "sk-1\nsk-2"])
def test_key_that_cannot_be_sent_is_named_by_its_setting_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", secret)
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(SelfalignError, match=r"^judge\.endpoint\.api_key_env: JUDGE_KEY holds") as caught:
        endpoint.open("judge.endpoint")
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("HTTPS_PROXY", "proxy:port"), ("ALL_PROXY", "nosuch://proxy"), ("SSL_CERT_FILE", "/nowhere/ca.pem")],
)
def test_proxy_or_certificate_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    endpoint = Endpoint(base_url="https://example.org/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(
        SelfalignError, match=rf"^judge\.endpoint\.base_url: the proxy or certificate settings .*{name}"
    ):
        endpoint.open("judge.endpoint")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0.0.0.0"])
def test_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with chat_server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        endpoint = Endpoint(base_url=f"http://{host}:9/v1", model="m", api_key_env="", retries=0)
        with endpoint.open("judge.endpoint") as opened, pytest.raises(PassingError, match="ConnectError"):
            opened.complete({"messages": []})
        assert not proxy.bodies


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:port/v1", "http://aä..b/v1"])
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SelfalignError, match=r"^judge\.endpoint\.base_url=.* is not a valid address"):
        Endpoint(base_url=url, model="m").check("judge.endpoint")


PASSING = {
    "too_many_requests": Fault(429),
    "server_error": Fault(500),
    "overloaded": Fault(503),
    "broken_json": Fault(body=b'{"choices": [{"mess'),
    "html": Fault(body=b"<html>gateway</html>"),
    "empty": Fault(body=b""),
    "no_choices": Fault(body=b'{"id": "x"}'),
    "broken_off": Fault(body=chat("Score: 2, or", "abort")),
    "error_of_a_gateway": Fault(body=b'{"error": {"message": "upstream is gone", "code": 502}}'),
    "no_message": Fault(body=b'{"choices": [{}]}'),
    "not_an_object": Fault(body=b'["choices"]'),
    "null": Fault(body=b"null"),
    "reset": Fault(resets=True),
}


@pytest.mark.parametrize("name", PASSING)
def test_passing_fault_is_asked_again(name: str, waits: list[float]) -> None:
    with chat_server(faults=[PASSING[name]]) as server, client(server) as chats:
        assert chats.complete(ASK).text == "Fine.\nScore: 4"
    assert len(server.bodies) == 2
    assert waits == [1.0]


def test_request_that_hangs_is_asked_again(waits: list[float]) -> None:
    with chat_server(faults=[Fault(hangs=True)]) as server, client(server, timeout_seconds=0.3) as chats:
        assert chats.complete(ASK).text == "Fine.\nScore: 4"
        assert len(server.bodies) == 2


def test_waits_double_and_a_longer_retry_after_is_respected(waits: list[float]) -> None:
    later = Fault(429, headers={"Retry-After": "17"})
    sooner = Fault(429, headers={"Retry-After": "1"})
    with chat_server(faults=[Fault(500), later, Fault(500), sooner]) as server, client(server) as chats:
        chats.complete(ASK)
    assert waits == [1.0, 17.0, 4.0, 8.0]


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("12") == 12.0
    assert retry_after(" 0.5 ") == 0.5
    assert 50 < retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60
    assert retry_after(format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)) == 0.0
    assert retry_after("soon") == retry_after("") == retry_after("-3") == 0.0


def test_server_that_asks_to_wait_for_years_is_not_waited_for(waits: list[float]) -> None:
    late = Fault(429, b"slow down", {"Retry-After": "1700000000"})
    with chat_server(faults=[Fault(500), late]) as server, client(server) as chats:
        with pytest.raises(SelfalignError, match="in 2 tries, at last: status 429: slow down; it asks to wait 17"):
            chats.complete(ASK)
        assert len(server.bodies) == 2
    assert waits == [1.0]


def test_server_that_has_moved_is_named_by_its_new_address() -> None:
    moved = Fault(308, headers={"Location": "https://new.example/v1/chat/completions"})
    said = r"status 308: the server has moved to https://new\.example/v1/chat/completions; set base_url"
    with chat_server(faults=[moved]) as server, client(server) as chats, pytest.raises(RefusedError, match=said):
        chats.complete(ASK)


@pytest.mark.parametrize(
    ("asked", "told", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o-mini", "gpt-4o", False),
        ("openai/gpt-4o-mini", "gpt-4o-mini-2024-07-18", True),
        ("gemini-2.5-flash", "gemini-2.5-flash-lite", False),
        ("miniature", "miniature-1", True),
        ("gpt-4o-mini", "", True),
    ],
)
def test_model_of_another_size_is_another_model(asked: str, told: str, same: bool) -> None:
    assert same_model(asked, told) is same


@pytest.mark.parametrize(
    ("told", "warned"),
    [("judge-1", 0), ("owner/Judge-1.gguf", 0), ("judge-1-2026-01-01", 0), ("", 0), ("tiny-chat", 1)],
)
def test_answer_of_another_model_is_a_warning_once(told: str, warned: int, caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({"model": told, "choices": [{"message": {"content": "Score: 4"}}]}).encode()
    with chat_server(lambda asked: body) as server, client(server) as chats:
        chats.complete(ASK)
        chats.complete(ASK)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == warned
    assert all("asked for the model 'judge-1', the server says 'tiny-chat' answers" in one for one in warnings)


def test_server_that_never_answers_ends_with_its_last_fault(waits: list[float]) -> None:
    with chat_server(faults=[Fault(500, b"oh no")] * 3) as server, client(server, retries=2) as chats:
        with pytest.raises(
            SelfalignError, match=r"no usable answer in 3 tries, at last: status 500: oh no\. Finished answers are kept"
        ):
            chats.complete(ASK)
        assert len(server.bodies) == 3
    assert waits == [1.0, 2.0]


def test_server_that_is_not_there_is_said_so(waits: list[float]) -> None:
    with chat_server() as server:
        pass
    with client(server, retries=1) as chats, pytest.raises(SelfalignError, match="2 tries, at last: ConnectError"):
        chats.complete(ASK)


def test_request_that_the_server_waited_for_too_long_is_sent_again(waits: list[float]) -> None:
    with chat_server(faults=[Fault(408)]) as server, client(server) as chats:
        assert chats.complete(ASK).text == "Fine.\nScore: 4"
    assert waits == [1.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301])
def test_refusal_stops_at_once_and_tells_the_server_s_reason_without_the_key(status: int, waits: list[float]) -> None:
    body = f'{{"error": "Incorrect API key provided: {KEY}"}}'.encode()
    with chat_server(faults=[Fault(status, body)]) as server, client(server) as chats:
        with pytest.raises(SelfalignError, match=rf"status {status}: .*Incorrect API key provided: \[key\]") as error:
            chats.complete(ASK)
        assert len(server.bodies) == 1
    assert KEY not in repr(error.value)
    assert waits == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(413),
        Fault(400, b'{"error": {"code": "context_length_exceeded", "message": "too long"}}'),
        Fault(400, b'{"error": {"message": "This model\'s maximum context length is 4096 tokens.", "code": 400}}'),
    ],
    ids=["status", "code", "words"],
)
def test_prompt_the_server_finds_too_long_is_no_error(fault: Fault) -> None:
    with chat_server(faults=[fault]) as server, client(server) as chats:
        assert chats.complete(ASK).finish_reason is FinishReason.PROMPT_TOO_LONG


@pytest.mark.parametrize("said", [b"content_filter", b"content_policy_violation", b"our content management policy"])
def test_prompt_whose_content_the_server_refuses_is_no_error(said: bytes) -> None:
    with chat_server(faults=[Fault(400, b'{"error": "' + said + b'"}')]) as server, client(server) as chats:
        assert chats.complete(ASK) == Reply(
            f'status 400: {{"error": "{said.decode()}"}}', FinishReason.CONTENT_FILTER, 0, 0
        )


def test_parameters_are_added_replaced_and_left_out() -> None:
    other = {"max_tokens": None, "max_completion_tokens": 9, "temperature": 1}
    with chat_server() as server, client(server, parameters=other) as chats:
        chats.complete({**ASK, "max_tokens": 5, "temperature": 0.7, "top_p": 0.9})
        (body,) = server.bodies
    assert {name: value for name, value in body.items() if name not in ("messages", "model")} == {
        "max_completion_tokens": 9, "temperature": 1, "top_p": 0.9,
    }  # fmt: skip
    with pytest.raises(SelfalignError, match=r"judge.endpoint.parameters cannot set messages, stream"):
        Endpoint(base_url="http://x/v1", model="m", parameters={"stream": True, "messages": []}).check("judge.endpoint")


def test_content_that_is_null_is_an_empty_text() -> None:
    body = b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}], "usage": null}'
    with chat_server(faults=[Fault(body=body)]) as server, client(server) as chats:
        assert chats.complete(ASK) == Reply("", FinishReason.CONTENT_FILTER, 0, 0)


def test_key_a_server_repeats_is_taken_out_of_the_text() -> None:
    with chat_server(lambda body: chat(f"Your key is {KEY}. Score: 3")) as server, client(server) as chats:
        assert chats.complete(ASK).text == "Your key is [key]. Score: 3"


@pytest.mark.parametrize("word", ["0", "3", "token", "EMPTY"])
def test_word_in_place_of_a_key_is_left_in_the_answers(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Servers that need no key are given one all the same, and it may be a digit of the score or a part of a name."""
    said = f"{word} is what I say.\nScore: 3"
    monkeypatch.setenv("JUDGE_KEY", word)
    with chat_server(lambda body: chat(said)) as server, client(server) as chats:
        reply = chats.complete(ASK)
    assert server.keys == [f"Bearer {word}"]
    assert (reply.text, reply.prompt_tokens) == (said, 10)


def test_requests_under_way_are_limited_and_answers_keep_their_names(tmp_path: Path) -> None:
    requests = {f"r{n}": {"messages": [{"role": "user", "content": str(n)}]} for n in range(12)}
    said = lambda body: chat(f"Score: {body['messages'][0]['content']}")  # noqa: E731
    out = workspace(tmp_path)
    with chat_server(said) as server, client(server, concurrency=3) as chats, out.journal(12, "x") as journal:
        answers = chats.complete_all(requests, journal, 1)
    assert {name: reply.text for name, reply in answers.items()} == {f"r{n}": f"Score: {n}" for n in range(12)}
    assert 1 <= server.most_at_once <= 3


def test_answers_before_a_failure_are_kept_and_not_asked_for_again(tmp_path: Path, waits: list[float]) -> None:
    requests = {f"r{n}": {"n": n} for n in range(6)}

    def fails_at_four(body: dict[str, Any]) -> bytes:
        return b"broken" if body["n"] == 4 else chat("Score: 1")

    out = workspace(tmp_path)
    failing = pytest.raises(SelfalignError)
    with chat_server(fails_at_four) as server, failing, client(server, concurrency=1, retries=0) as chats:
        chats.complete_all(requests, Journal(out.scratch, lambda size: None), 1)
    first = [body["n"] for body in server.bodies]
    assert first[:5] == [0, 1, 2, 3, 4]
    with chat_server("Score: 2") as server, client(server) as chats, out.journal(6, "judgements") as journal:
        answers = chats.complete_all(requests, journal, 1)
        assert not any(name in journal for name in requests), "a place in memory for each of millions"
    assert {body["n"] for body in server.bodies} == {4, 5} - set(first[5:])
    assert [answers[f"r{n}"].text for n in range(4)] == ["Score: 1"] * 4


def test_refusal_ends_the_waiting_of_the_others(tmp_path: Path) -> None:
    """One request waits a minute before its next try when the other one is refused."""
    waiting = threading.Event()

    def says(body: dict[str, Any]) -> bytes:
        waiting.set()
        return b"broken"

    out = workspace(tmp_path)
    with chat_server(says) as server, client(server, retries=1, backoff_seconds=3600) as chats:
        original = chats.attempt

        def refused(body: dict[str, Any]) -> Any:
            if body["n"] == 1:
                waiting.wait(10)
                raise RefusedError("status 401", 401)
            return original(body)

        chats.attempt = refused
        with pytest.raises(SelfalignError, match="status 401"):
            chats.complete_all({"a": {"n": 0}, "b": {"n": 1}}, Journal(out.scratch, lambda size: None), 1)
        assert [body["n"] for body in server.bodies].count(0) == 1


def asked(count: int) -> dict[str, dict[str, Any]]:
    """Requests of long prompts."""
    return {
        f"r{n}": {"messages": [{"role": "user", "content": f"number {n} " * 40}], "top_p": 0.9} for n in range(count)
    }


def number(body: dict[str, Any]) -> int | None:
    """Of a request; None of the short one that tells whether a server answers at all."""
    words = body["messages"][0]["content"].split()
    return int(words[1]) if words[0] == "number" else None


ODD = Fault(400, b'{"error": {"message": "I do not like this one"}}')
BROKEN = Fault(500, b"index out of range")


class Picky(ChatServer):
    """Has a fault in store for some of the requests, by their numbers."""

    def __init__(self, faults: dict[int | None, Fault]) -> None:
        super().__init__(lambda body: chat("Score: 4"), [])
        self.by_number = faults

    def _enter(self, body: dict[str, Any], key: str, path: str) -> Fault:
        answer = super()._enter(body, key, path)
        return self.by_number.get(number(body), answer)

    def __enter__(self) -> "Picky":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def finishes(answers: dict[str, Reply]) -> list[FinishReason]:
    return [reply.finish_reason for reply in answers.values()]


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("bad", [0, 2, 5])
@pytest.mark.parametrize("fault", [ODD, BROKEN, Fault(body=b'{"choices": []}')], ids=["refused", "broken", "no choice"])
def test_failure_of_one_record_is_an_answer_wherever_it_comes(
    concurrency: int, bad: int, fault: Fault, tmp_path: Path, waits: list[float]
) -> None:
    with Picky({bad: fault}) as server, client(server, concurrency=concurrency, retries=2) as chats:
        answers = chats.complete_all(asked(6), Journal(workspace(tmp_path).scratch, lambda size: None), 1)
    assert finishes(answers) == [REFUSED if n == bad else EOS for n in range(6)]
    assert answers[f"r{bad}"].text == f"status {fault.status}: {fault.body.decode()}"
    assert len(waits) == (2 if fault is BROKEN else 0)
    numbers = [number(body) for body in server.bodies]
    assert numbers.count(bad) == (3 if fault is BROKEN else 1)
    assert {body["top_p"] for body in server.bodies} == {0.9}


def test_failed_record_is_not_asked_for_again_by_the_same_command(tmp_path: Path) -> None:
    out = workspace(tmp_path)
    refused = pytest.raises(SelfalignError, match="status 401")
    with Picky({1: ODD, 3: Fault(401)}) as server, client(server, concurrency=1) as chats, refused:
        chats.complete_all(asked(6), Journal(out.scratch, lambda size: None), 1)
    with Picky({4: ODD}) as server, client(server, concurrency=1) as chats, out.journal(6, "judgements") as journal:
        answers = chats.complete_all(asked(6), journal, 1)
    assert finishes(answers) == [EOS, REFUSED, EOS, EOS, REFUSED, EOS]
    assert [number(body) for body in server.bodies] == [3, 4, None, 5]


def test_prompt_that_is_too_long_is_believed_once_anything_was_answered(tmp_path: Path) -> None:
    with Picky({0: Fault(413), 3: Fault(413), 4: ODD}) as server, client(server, concurrency=1) as chats:
        answers = chats.complete_all(asked(5), Journal(workspace(tmp_path).scratch, lambda size: None), 1)
    assert finishes(answers) == [TOO_LONG, EOS, EOS, TOO_LONG, REFUSED]
    assert [number(body) for body in server.bodies] == [0, None, 1, 2, 3, 4, None]


def test_outcome_is_readable_in_the_journal_and_an_enum_behind_it(tmp_path: Path) -> None:
    out = workspace(tmp_path)
    with Picky({1: Fault(413), 2: ODD}) as server, client(server, concurrency=1) as chats:
        answers = chats.complete_all(asked(3), Journal(out.scratch, lambda size: None), 1)
    lines = (out.scratch / "journal-0.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line)["result"]["finish_reason"] for line in lines]
    assert written == ["eos", "prompt_too_long", "refused"]
    assert all(isinstance(reason, FinishReason) for reason in finishes(answers))


FOR_ALL = {
    "key": (Fault(401, b"wrong key"), r"status 401: wrong key", 1),
    "address": (Fault(404, b"no such model"), r"status 404: no such model", 1),
    "quota": (Fault(429, b'{"error": {"code": "insufficient_quota"}}'), r'status 429: .*"insufficient_quota"', 1),
    "parameter": (Fault(400, b"top_p is not supported"), r"status 400: top_p is not supported", 2),
    "window": (
        Fault(400, b"max_tokens=4096 is above the context length"),
        "the server refuses every request, a short one too: status 400: max_tokens=4096",
        2,
    ),
    "nothing": (Fault(body=b'{"choices": []}'), "the server refuses every request, a short one too: status 200", 2),
    "outage": (Fault(503, b"going down"), r"in 2 tries, at last: status 503: going down", 4),
}


@pytest.mark.parametrize("name", FOR_ALL)
def test_failure_of_every_request_ends_the_run_at_once_with_the_server_s_words(
    name: str, tmp_path: Path, waits: list[float]
) -> None:
    fault, message, requests = FOR_ALL[name]
    journal = Journal(workspace(tmp_path).scratch, lambda size: None)
    with Picky(dict.fromkeys([*range(6), None], fault)) as server, client(server, concurrency=1, retries=1) as chats:
        with pytest.raises(SelfalignError, match=message):
            chats.complete_all(asked(6), journal, 1)
        assert len(server.bodies) == requests
    assert not any(name in journal for name in asked(6))


def test_server_that_refuses_everything_from_some_time_on_is_found_out(tmp_path: Path) -> None:
    with Picky(dict.fromkeys([2, 3, 4, 5, None], ODD)) as server, client(server, concurrency=1) as chats:
        with pytest.raises(SelfalignError, match="I do not like this one"):
            chats.complete_all(asked(6), Journal(workspace(tmp_path).scratch, lambda size: None), 1)
        assert [number(body) for body in server.bodies] == [0, 1, 2, None]


def test_limit_on_requests_is_nobody_s_failure(tmp_path: Path, waits: list[float]) -> None:
    limit = Fault(429, b'{"error": {"code": "rate_limit_exceeded"}}')
    with Picky({2: limit}) as server, client(server, concurrency=1, retries=1) as chats:
        with pytest.raises(SelfalignError, match=r'in 2 tries, at last: status 429: .*"rate_limit_exceeded"'):
            chats.complete_all(asked(4), Journal(workspace(tmp_path).scratch, lambda size: None), 1)
        assert [number(body) for body in server.bodies] == [0, 1, 2, 2]


def usage(**told: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "Score: 4"}}], "usage": told}).encode()


def test_prompt_that_the_server_has_cut_is_a_warning_once_with_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    says = lambda body: usage(prompt_tokens=59, completion_tokens=3)  # noqa: E731
    with chat_server(says) as server, client(server) as chats:
        chats.complete_all(asked(6), Journal(workspace(tmp_path).scratch, lambda size: None), 1)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the server read 59 tokens of a prompt whose words make at least 60" in warning


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"prompt_tokens": 0},
        {"prompt_tokens": 60},
        {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 64}},
        {"input_tokens": 9, "cache_read_input_tokens": 64},
    ],
)
def test_server_that_reads_all_or_does_not_say_is_no_warning(told: dict, caplog: pytest.LogCaptureFixture) -> None:
    with chat_server(lambda body: usage(**told)) as server, client(server) as chats:
        chats.complete(asked(1)["r0"])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_end_that_nobody_knows_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with chat_server(lambda body: chat("Score: 4", "Repetition")) as server, client(server) as chats:
        assert chats.complete(ASK).finish_reason is chats.complete(ASK).finish_reason is FinishReason.UNKNOWN
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == f"{server.url}: a text ended for the unknown reason 'repetition', which counts as finished"


def test_attempt_tells_trouble_and_raises_refusals() -> None:
    with chat_server(faults=[Fault(503, b"Loading", {"Retry-After": "3"}), ODD]) as server, client(server) as chats:
        with pytest.raises(PassingError, match="status 503: Loading") as passing:
            chats.attempt(ASK)
        assert passing.value.wait_seconds == 3.0
        with pytest.raises(RefusedError, match=r"/chat/completions: status 400: .*I do not like") as refused:
            chats.attempt(ASK)
        assert (refused.value.status, refused.value.by_request) == (400, True)
        assert chats.attempt(ASK) == Reply("Fine.\nScore: 4", EOS, 10, 3)


def test_cost_is_by_the_million() -> None:
    endpoint = Endpoint(base_url="http://x/v1", model="m", prompt_price=2.0, completion_price=10.0)
    usage = endpoint.usage([Reply("", EOS, 1_000_000, 200_000), Reply("", EOS, 500_000, 0), Reply("", TOO_LONG, 0, 0)])
    assert usage == {
        "judge/requests": 3,
        "judge/requests_without_usage": 1,
        "judge/prompt_tokens": 1_500_000,
        "judge/completion_tokens": 200_000,
        "judge/cost": 5.0,
    }


def test_without_a_price_there_is_no_cost() -> None:
    usage = Endpoint(base_url="http://x/v1", model="m").usage([Reply("", EOS, 1_000_000, 200_000)])
    assert usage["judge/prompt_tokens"] == 1_000_000
    assert "judge/cost" not in usage


def test_tokens_that_nobody_told_cost_no_0_and_are_named_where_there_are_prices(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies: list[Reply] = []
    cases: list[tuple[dict[str, float], int]] = [({}, 0), ({"prompt_price": 1.0}, 1)]
    with chat_server(lambda body: chat("Fine.", usage=False)) as server:
        for settings, warnings in cases:
            with client(server, **settings) as chats:
                replies = [chats.complete(ASK), chats.complete(ASK)]
            assert caplog.text.count("does not say how many tokens it took") == warnings
    usage = Endpoint(base_url=server.url, model="m", prompt_price=1.0).usage(replies)
    assert "judge/cost" not in usage
    assert usage["judge/requests_without_usage"] == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": ""}, "model"),
        ({"base_url": ""}, "base_url"),
        ({"base_url": "ftp://x/v1"}, "base_url"),
        ({"base_url": "https://user:secret@host/v1"}, "base_url"),
        ({"base_url": "https://host/v1?key=secret"}, "base_url"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"retries": -1}, "retries"),
        ({"backoff_seconds": -1}, "backoff_seconds"),
        ({"prompt_price": -1}, "prompt_price"),
        ({"completion_price": -1}, "completion_price"),
        ({"api_key_env": "sk-0123"}, "api_key_env"),
    ],
)
def test_impossible_setting_is_refused_with_its_key_and_no_secret(settings: dict, named: str) -> None:
    endpoint = Endpoint(**{"base_url": "https://host/v1", "model": "m", **settings})
    with pytest.raises(SelfalignError, match=rf"judge\.endpoint\.{named}") as error:
        endpoint.check("judge.endpoint")
    assert "secret" not in str(error.value)
    assert "sk-0123" not in str(error.value)
