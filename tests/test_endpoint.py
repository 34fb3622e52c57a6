"""The client against a real server that fails in every way servers do."""

import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from builders import workspace
from chat_server import ChatServer, Fault, chat, chat_server

from selfalign.endpoint import Client, Endpoint, Reply, retry_after
from selfalign.errors import SelfalignError
from selfalign.journal import Journal

KEY = "sk-very-secret-0123456789"
ASK = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited; it does not."""
    found: list[float] = []
    monkeypatch.setattr("selfalign.endpoint.pause", lambda stop, seconds: found.append(seconds))
    return found


def client(server: ChatServer, **settings: Any) -> Client:
    return Endpoint(base_url=server.url, model="judge-1", key_variable="JUDGE_KEY", **settings).open("judge.endpoint")


def test_answer_comes_with_its_tokens_and_the_key_goes_in_the_header_only() -> None:
    with chat_server() as server, client(server) as chats:
        assert chats.complete(ASK) == Reply("Fine.\nScore: 4", "stop", 10, 3)
    assert server.bodies == [{"model": "judge-1", **ASK}]
    assert server.keys == [f"Bearer {KEY}"]


def test_no_key_is_sent_where_none_is_needed() -> None:
    with chat_server() as server:
        endpoint = Endpoint(base_url=server.url, model="m", key_variable="")
        with endpoint.open("judge.endpoint") as chats:
            chats.complete(ASK)
    assert server.keys == [""]


def test_missing_key_is_named_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", key_variable="JUDGE_KEY")
    with pytest.raises(SelfalignError, match=r"judge\.endpoint\.key_variable: .*JUDGE_KEY is not set"):
        endpoint.open("judge.endpoint")


@pytest.mark.parametrize("secret", ["“sk-1”", "ключ", "sk-1 # mine", "sk-1\nsk-2"])
def test_key_that_cannot_be_sent_is_named_by_its_setting_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", secret)
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", key_variable="JUDGE_KEY")
    with pytest.raises(SelfalignError, match=r"^judge\.endpoint\.key_variable: JUDGE_KEY holds") as caught:
        endpoint.open("judge.endpoint")
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("HTTPS_PROXY", "proxy:port"), ("ALL_PROXY", "nosuch://proxy"), ("SSL_CERT_FILE", "/nowhere/ca.pem")],
)
def test_proxy_or_certificate_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    endpoint = Endpoint(base_url="https://example.org/v1", model="m", key_variable="JUDGE_KEY")
    with pytest.raises(SelfalignError, match=rf"^judge\.endpoint\.base_url: nothing can be asked .*{name}"):
        endpoint.open("judge.endpoint")


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:port/v1", "http://aä..b/v1"])
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SelfalignError, match=r"^judge\.endpoint\.base_url=.* is no address"):
        Endpoint(base_url=url, model="m").check("judge.endpoint")


PASSING = {
    "too_many_requests": Fault(429),
    "server_error": Fault(500),
    "overloaded": Fault(503),
    "broken_json": Fault(body=b'{"choices": [{"mess'),
    "html": Fault(body=b"<html>gateway</html>"),
    "empty": Fault(body=b""),
    "no_choices": Fault(body=b'{"id": "x"}'),
    "empty_choices": Fault(body=b'{"choices": []}'),
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


def test_server_that_never_answers_ends_with_its_last_fault(waits: list[float]) -> None:
    with chat_server(faults=[Fault(500, b"oh no")] * 3) as server, client(server, retries=2) as chats:
        with pytest.raises(SelfalignError, match=r"no usable answer in 3 tries, at last: status 500"):
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
        assert chats.complete(ASK).finish == "too_long"


@pytest.mark.parametrize("said", [b"content_filter", b"content_policy_violation", b"our content management policy"])
def test_prompt_whose_content_the_server_refuses_is_no_error(said: bytes) -> None:
    with chat_server(faults=[Fault(400, b'{"error": "' + said + b'"}')]) as server, client(server) as chats:
        assert chats.complete(ASK) == Reply("", "content_filter", 0, 0)


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
        assert chats.complete(ASK) == Reply("", "content_filter", 0, 0)


def test_key_a_server_repeats_is_taken_out_of_the_text() -> None:
    with chat_server(lambda body: chat(f"Your key is {KEY}. Score: 3")) as server, client(server) as chats:
        assert chats.complete(ASK).text == "Your key is [key]. Score: 3"


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
        if body["n"] == 0:
            waiting.set()
            return b"broken"
        waiting.wait(10)
        return b"too good to be true"

    out = workspace(tmp_path)
    with chat_server(says) as server, client(server, retries=1, first_wait_seconds=3600) as chats:
        original = chats.attempt

        def refused(body: dict[str, Any]) -> Any:
            tried = original(body)
            if body["n"] == 1:
                raise SelfalignError("status 401")
            return tried

        chats.attempt = refused
        with pytest.raises(SelfalignError, match="status 401"):
            chats.complete_all({"a": {"n": 0}, "b": {"n": 1}}, Journal(out.scratch, lambda size: None), 1)
        assert [body["n"] for body in server.bodies].count(0) == 1


def test_cost_is_by_the_million() -> None:
    endpoint = Endpoint(base_url="http://x/v1", model="m", prompt_price=2.0, completion_price=10.0)
    usage = endpoint.usage([Reply("", "stop", 1_000_000, 200_000), Reply("", "stop", 500_000, 0), Reply("", "x", 0, 0)])
    assert usage == {
        "judge/requests": 3,
        "judge/requests_without_usage": 1,
        "judge/prompt_tokens": 1_500_000,
        "judge/completion_tokens": 200_000,
        "judge/cost": 5.0,
    }


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
        ({"first_wait_seconds": -1}, "first_wait_seconds"),
        ({"prompt_price": -1}, "prompt_price"),
        ({"completion_price": -1}, "completion_price"),
        ({"key_variable": "sk-0123"}, "key_variable"),
    ],
)
def test_impossible_setting_is_refused_with_its_key_and_no_secret(settings: dict, named: str) -> None:
    endpoint = Endpoint(**{"base_url": "https://host/v1", "model": "m", **settings})
    with pytest.raises(SelfalignError, match=rf"judge\.endpoint\.{named}") as error:
        endpoint.check("judge.endpoint")
    assert "secret" not in str(error.value)
    assert "sk-0123" not in str(error.value)
