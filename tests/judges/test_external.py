"""The external judge against a real server, alone and in a whole run."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from builders import RUBRIC, TINY_RUN, run, write_tiny_data
from chat_server import ChatServer, Fault, chat, chat_server
from judging import ANSWERS, given, judged, run_judge, scores

from selfalign.endpoint import Endpoint
from selfalign.errors import SelfalignError
from selfalign.files import read_json
from selfalign.judges.external import ExternalScore
from selfalign.judges.pairwise import Pairwise
from selfalign.records import Comparison, Judgement, JudgementStatus, Verdict, read_records
from selfalign.store import canonical

KEY = "sk-very-secret-0123456789"
OK, NONE = JudgementStatus.OK, JudgementStatus.NO_SCORE


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr("selfalign.endpoint.pause", lambda stop, seconds: None)


def at(server: ChatServer, **settings: Any) -> Endpoint:
    return Endpoint(base_url=server.url, model="judge-1", key_variable="JUDGE_KEY", **settings)


def shown(body: dict[str, Any]) -> str:
    """The response a request is about."""
    return re.search("<response>\n(.*)\n</response>", body["messages"][0]["content"], re.DOTALL)[1]


def test_scores_are_means_of_what_the_server_wrote(tmp_path: Path) -> None:
    with chat_server(lambda body: chat(f"Words.\nScore: {len(shown(body)) % 6}")) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server, prompt_price=1.0, completion_price=3.0), samples=2)
        counts, judgements = judged(tmp_path, kind, None)
    assert {name: j.score for name, j in judgements.items()} == {a.id: len(a.text) % 6 for a in ANSWERS}
    assert {j.model for j in judgements.values()} == {f"judge-1 at {server.url}"}
    assert {name: (s.valid, s.variance) for name, s in scores(tmp_path).items()} == {a.id: (2, 0.0) for a in ANSWERS}
    assert (counts["judge/requests"], counts["judge/prompt_tokens"], counts["judge/completion_tokens"]) == (10, 100, 30)
    assert counts["judge/cost"] == pytest.approx((100 + 90) / 1e6)
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 10
    assert {j.seed % 2**31 for j in read_records(tmp_path / "out/judgements.jsonl", Judgement)} == set(seeds)
    sampling = {(body["temperature"], body["top_p"], body["max_tokens"]) for body in server.bodies}
    assert sampling == {(0.7, 0.9, 512)}


def test_server_is_asked_with_the_rubric_in_one_user_turn(tmp_path: Path) -> None:
    hostile = ANSWERS[4]
    with chat_server() as server:
        run_judge(
            tmp_path, ExternalScore(prompt=RUBRIC, endpoint=at(server), samples=1), None, **given(tmp_path, [hostile])
        )
    [message] = server.bodies[0]["messages"]
    assert message["role"] == "user"
    assert "Tea is a drink {made} from {response} leaves." in message["content"]


def test_unreadable_answer_is_asked_for_again_with_another_seed(tmp_path: Path) -> None:
    answers = iter(["I cannot say.", "Score: 9", "Score: 2"])
    with chat_server(lambda body: chat(next(answers))) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server), samples=1, retries=2)
        counts, judgements = judged(tmp_path, kind, None, **given(tmp_path, ANSWERS[:1]))
    records = read_records(tmp_path / "out/judgements.jsonl", Judgement)
    assert [(j.status, j.attempt) for j in records] == [(NONE, 1), (JudgementStatus.OUT_OF_RANGE, 2), (OK, 3)]
    assert judgements["bees-1"].score == 2.0
    assert (counts["retries"], counts["dropped"]) == (2, {})
    assert len({body["seed"] for body in server.bodies}) == 3


def test_cut_and_refused_answers_have_their_own_status(tmp_path: Path) -> None:
    def says(body: dict[str, Any]) -> bytes:
        return chat("It is rather", "length") if shown(body).startswith("They") else chat("Score: 3")

    too_long = Fault(413)
    with chat_server(says, faults=[too_long]) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server, concurrency=1), samples=1, retries=0)
        _, judgements = judged(tmp_path, kind, None, **given(tmp_path, [ANSWERS[1], ANSWERS[0], *ANSWERS[2:]]))
    assert [j.status for j in judgements.values()] == [
        JudgementStatus.PROMPT_TOO_LONG,
        JudgementStatus.TRUNCATED,
        OK,
        OK,
        OK,
    ]


def test_killed_judging_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    kind_of = lambda server: ExternalScore(prompt=RUBRIC, endpoint=at(server, concurrency=1, retries=0), samples=2)  # noqa: E731
    good = chat("Score: 1")
    with chat_server(lambda body: good, faults=[Fault(body=good)] * 6 + [Fault(500)]) as server:
        with pytest.raises(SelfalignError, match="no usable answer"):
            run_judge(tmp_path, kind_of(server), None)
        before = len(server.bodies)
        counts = run_judge(tmp_path, kind_of(server), None)
        assert len(server.bodies) - before <= 4
    assert counts["judge/requests"] == counts["judgements"] == 10


def test_patience_key_and_prices_are_no_part_of_what_judgements_depend_on() -> None:
    one = Endpoint(base_url="http://x/v1", model="m")
    other = Endpoint(
        base_url="http://x/v1", model="m", key_variable="OTHER", concurrency=9, timeout_seconds=1, retries=1,
        first_wait_seconds=0, prompt_price=1, completion_price=1,
    )  # fmt: skip
    keyed = {"class": "Endpoint", "base_url": "http://x/v1", "model": "m", "parameters": {}}
    assert canonical(one) == canonical(other) == keyed


def test_pairwise_verdicts_are_read_from_what_a_server_writes(tmp_path: Path) -> None:
    prompt = "{instruction}\n<first>\n{first}\n</first>\n<second>\n{second}\n</second>"

    def longer_wins(body: dict[str, Any]) -> bytes:
        text = body["messages"][0]["content"]
        first, second = (len(re.search(f"<{n}>\n(.*)\n</{n}>", text, re.DOTALL)[1]) for n in ("first", "second"))
        if "Nothing." in text:
            return chat("[[A]] or [[B]]")
        return chat("The longer one: [[A]]" if first > second else "[[B]]")

    with chat_server(longer_wins) as server:
        counts, judgements = judged(tmp_path, Pairwise(prompt=prompt, endpoint=at(server)), None)
    made = {c.id: c for c in read_records(tmp_path / "out/comparisons.jsonl", Comparison)}
    assert (made["bees-1:bees-3"].forward, made["bees-1:bees-3"].backward) == (Verdict.B, Verdict.A)
    assert made["bees-1:bees-2"].status is JudgementStatus.AMBIGUOUS
    assert {n: j.score for n, j in judgements.items()} == {
        "bees-1": 0.0, "bees-2": None, "bees-3": 5.0, "tea-1": 0.0, "tea-2": 5.0,
    }  # fmt: skip
    assert judgements["bees-2"].status is JudgementStatus.AMBIGUOUS
    assert counts["judge/requests"] == 8


def everything_below(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_whole_run_is_judged_by_a_faulty_server_and_the_key_is_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once it was found there, the server fails in every way, and repeats the key in its errors and in every text."""
    caplog.set_level(logging.DEBUG)
    faults = [
        None, Fault(429, f"slow down, {KEY}".encode(), {"Retry-After": "1"}), Fault(500, KEY.encode()),
        Fault(body=f'{{"choices": "{KEY}'.encode()), Fault(body=b"{}"), Fault(hangs=True),
    ]  # fmt: skip
    overrides = [
        *TINY_RUN, *write_tiny_data(tmp_path / "data"), "iterations=1", "judge=external", "judge.samples=2",
        "judge.endpoint.model=judge-1", "judge.endpoint.key_variable=JUDGE_KEY", "judge.endpoint.timeout_seconds=1",
        "judge.endpoint.prompt_price=0.5", "judge.endpoint.completion_price=2",
    ]  # fmt: skip

    def says(body: dict[str, Any]) -> bytes:
        return chat(f"You sent {KEY}.\nScore: {sum(map(ord, shown(body))) % 6}")

    with chat_server(says, faults) as server:
        folder = run(tmp_path / "outputs", *overrides, f"judge.endpoint.base_url={server.url}")
        asked = len(server.bodies)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("JUDGE_KEY")
            assert run(tmp_path / "outputs", *overrides, f"judge.endpoint.base_url={server.url}") == folder
        assert len(server.bodies) == asked, "a finished run asked again"
        until_then = capfd.readouterr()
        assert "Everything was there already" in until_then.out
        refusal = Fault(401, f"no such key: {KEY}".encode())
        server.faults.append(refusal)
        with pytest.raises(SelfalignError, match=r"status 401: no such key: \[key\]"):
            run(tmp_path / "outputs", *overrides, f"judge.endpoint.base_url={server.url}", "seed=7", "name=refused")
    counts = {stage["label"]: stage["counts"] for stage in read_json(folder / "summary.json")["stages"]}
    assert counts["iteration_1/judgements"]["judge/requests"] == 2 * 9
    assert counts["iteration_1/judgements"]["judge/cost"] == pytest.approx((0.5 * 180 + 2 * 54) / 1e6)
    # The judge is the same for every model, so it judges the ranked answers once.
    links = {(folder / f"artefacts/evaluation_M{n}/ranked_scores").resolve() for n in (1, 2)}
    assert len(links) == 1
    said = capfd.readouterr()
    printed = until_then.out + until_then.err + said.out + said.err
    haystack = everything_below(tmp_path) + printed.encode() + caplog.text.encode()
    assert b"[key]" in haystack
    assert b"JUDGE_KEY" in haystack
    assert KEY.encode() not in haystack
    assert json.dumps(KEY)[1:-1].encode()[3:12] not in haystack
