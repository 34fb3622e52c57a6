"""The external judge against a real server, alone and in a whole run."""

import json
import logging
import re
import secrets
from pathlib import Path
from typing import Any

import pytest
from builders import RUBRIC, TINY_RUN, run, write_tiny_data
from chat_server import ChatServer, Fault, chat, chat_server
from judging import ANSWERS, given, judged, run_judge, scores

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Comparison, Judgement, JudgementStatus, Response, Verdict
from selfalign.engines.openai_client import Endpoint
from selfalign.judges.external import ExternalScore
from selfalign.judges.pairwise import Pairwise
from selfalign.store.key import to_key_json

KEY = f"sk-{secrets.token_hex(16)}"
OK, NONE = JudgementStatus.OK, JudgementStatus.NO_SCORE


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr("selfalign.engines.openai_client.pause", lambda stop, seconds: None)


def at(server: ChatServer, **settings: Any) -> Endpoint:
    return Endpoint(base_url=server.url, model="judge-1", api_key_env="JUDGE_KEY", **settings)


def shown(body: dict[str, Any]) -> str:
    """The response a request is about; empty for the one that asks whether the server answers at all."""
    found = re.search("<response>\n(.*)\n</response>", body["messages"][0]["content"], re.DOTALL)
    return found[1] if found else ""


def test_scores_are_means_of_what_the_server_wrote(tmp_path: Path) -> None:
    with chat_server(lambda body: chat(f"Words.\nScore: {len(shown(body)) % 6}")) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server, prompt_price=1.0, completion_price=3.0), num_samples=2)
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
            tmp_path,
            ExternalScore(prompt=RUBRIC, endpoint=at(server), num_samples=1),
            None,
            **given(tmp_path, [hostile]),
        )
    [message] = server.bodies[0]["messages"]
    assert message["role"] == "user"
    assert "Tea is a drink {made} from {response} leaves." in message["content"]


def test_unreadable_answer_is_asked_for_again_with_another_seed(tmp_path: Path) -> None:
    answers = iter(["I cannot say.", "Score: 9", "Score: 2"])
    with chat_server(lambda body: chat(next(answers))) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server), num_samples=1, retries=2)
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
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server, concurrency=1), num_samples=1, retries=0)
        _, judgements = judged(tmp_path, kind, None, **given(tmp_path, [ANSWERS[1], ANSWERS[0], *ANSWERS[2:]]))
    assert [j.status for j in judgements.values()] == [
        JudgementStatus.PROMPT_TOO_LONG,
        JudgementStatus.TRUNCATED,
        OK,
        OK,
        OK,
    ]


def test_one_refused_judgement_is_counted_and_tells_the_server_s_words(tmp_path: Path) -> None:
    refusals = {
        ANSWERS[0].text: Fault(400, b'{"error": {"message": "Content Exists Risk", "key": "' + KEY.encode() + b'"}}'),
        ANSWERS[1].text: Fault(400, b'{"error": "request (4390 tokens) exceeds the available context size"}'),
        ANSWERS[2].text: Fault(400, b'{"error": "I do not like this one. Score: 5"}'),
    }

    class Picky(ChatServer):
        def _enter(self, body: dict[str, Any], key: str, path: str) -> Fault:
            answer = super()._enter(body, key, path)
            return refusals.get(shown(body), answer)

    server = Picky(lambda body: chat("Score: 3"), [])
    server.start()
    kind = ExternalScore(prompt=RUBRIC, endpoint=at(server), num_samples=2, max_failure_rate=0.6)
    counts, _ = judged(tmp_path, kind, None)
    server.stop()
    assert counts["dropped"] == {"content_filter": 2, "prompt_too_long": 2, "refused": 2}
    assert (counts["retries"], counts["unjudged_responses"]) == (0, 3)
    made = {j.id: j for j in read_records(tmp_path / "out/judgements.jsonl", Judgement)}
    assert made["bees-1-1"].text == 'status 400: {"error": {"message": "Content Exists Risk", "key": "[key]"}}'
    assert made["bees-3-2"].text == 'status 400: {"error": "I do not like this one. Score: 5"}'
    strict = ExternalScore(prompt=RUBRIC, endpoint=at(server), num_samples=2, max_failure_rate=0.59)
    with chat_server(lambda body: chat("no")) as again:
        strict.endpoint.base_url = again.url  # What was answered is in the journal; nothing is asked again.
        (tmp_path / "out/judgements.jsonl").unlink()
        with pytest.raises(SelfalignError, match=r"6 of 10 judgements carry no score .*'status 400: .*Content Exists"):
            run_judge(tmp_path, strict, None)
        assert not again.bodies


def test_thinking_that_ate_the_tokens_names_the_setting(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": "hmm " * 60 + "Score: 2?"}
    body = json.dumps({"choices": [{"message": message, "finish_reason": "length"}]}).encode()
    with chat_server(lambda _: body) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server), num_samples=1, retries=0)
        with pytest.raises(SelfalignError) as error:
            run_judge(tmp_path, kind, None)
    assert str(error.value).startswith(
        "stage: 5 of 5 judgements carry no score ({'truncated': 5}); the judge wrote for"
    )
    assert (
        "hmm Score: 2?'. Raise judge.sampling.max_new_tokens, at which 5 of its texts were cut, 5 of them while the "
        in (str(error.value))
    )


def test_unreadable_judgement_is_shown_by_its_end(tmp_path: Path) -> None:
    long = "回答切题，但不够完整，也没有给出足够的细节来支持它的结论。" * 8 + "\n评分:3"
    with chat_server(lambda body: chat(long)) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server), num_samples=1, retries=0)
        with pytest.raises(SelfalignError, match=r"wrote for example '….*\\n评分:3'. Try"):
            run_judge(tmp_path, kind, None)


def test_judge_that_thinks_in_parts_is_read(tmp_path: Path) -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Score: 2"}]},
        {"type": "text", "text": "Score: 4"},
    ]
    body = json.dumps({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}).encode()
    with chat_server(lambda _: body) as server:
        kind = ExternalScore(prompt=RUBRIC, endpoint=at(server), num_samples=1, retries=0)
        _, judgements = judged(tmp_path, kind, None)
    assert {(j.status, j.score, j.text) for j in judgements.values()} == {(OK, 4.0, "Score: 4")}


def test_unread_comparisons_are_shown_and_not_what_came_of_them(tmp_path: Path) -> None:
    with chat_server(lambda body: chat("<think>\nMaybe [[A]], but")) as server:
        kind = Pairwise(prompt="{instruction}{first}{second}", endpoint=at(server))
        with pytest.raises(SelfalignError, match=r"Maybe \[\[A\]\], but'.* Raise judge\.verdict_tokens, at which 4 of"):
            run_judge(tmp_path, kind, None)


def test_killed_judging_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    kind_of = lambda server: ExternalScore(prompt=RUBRIC, endpoint=at(server, concurrency=1, retries=0), num_samples=2)  # noqa: E731
    good = chat("Score: 1")
    with chat_server(lambda body: good, faults=[Fault(body=good)] * 6 + [Fault(500)] * 2) as server:
        with pytest.raises(SelfalignError, match="no usable answer"):
            run_judge(tmp_path, kind_of(server), None)
        before = len(server.bodies)
        counts = run_judge(tmp_path, kind_of(server), None)
        assert len(server.bodies) - before <= 4
    assert counts["judge/requests"] == counts["judgements"] == 10


def test_patience_key_and_prices_are_no_part_of_what_judgements_depend_on() -> None:
    one = Endpoint(base_url="http://x/v1", model="m")
    other = Endpoint(
        base_url="http://x/v1", model="m", api_key_env="OTHER", concurrency=9, timeout_seconds=1, retries=1,
        backoff_seconds=0, prompt_price=1, completion_price=1,
    )  # fmt: skip
    keyed = {"class": "Endpoint", "base_url": "http://x/v1", "model": "m", "parameters": {}}
    assert to_key_json(one) == to_key_json(other) == keyed


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
    assert counts["dropped"] == {"ambiguous": 1, "unread_comparison": 2}


def test_comparisons_without_a_verdict_count_although_every_response_has_a_score(tmp_path: Path) -> None:
    prompt = "{instruction}\n{first}\n{second}"

    def decides_all_but_one(body: dict[str, Any]) -> bytes:
        asked = body["messages"][0]["content"]
        return chat("Hm." if "They fly" in asked and "Nothing." in asked else "[[A]]")

    with chat_server(decides_all_but_one) as server:
        kind = Pairwise(prompt=prompt, endpoint=at(server), max_failure_rate=0.2)
        with pytest.raises(SelfalignError, match=r"0 of 5 judgements .*, 1 of 4 comparisons carry no verdict"):
            judged(tmp_path, kind, None)


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
        *TINY_RUN, *write_tiny_data(tmp_path / "data"), "iterations=1", "judge=external", "judge.num_samples=2",
        "judge.endpoint.model=judge-1", "judge.endpoint.api_key_env=JUDGE_KEY", "judge.endpoint.timeout_seconds=1",
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
        assert "Everything was made before" in until_then.out
        refusal = Fault(401, f"no such key: {KEY}".encode())
        server.faults.append(refusal)
        with pytest.raises(SelfalignError, match=r"status 401: no such key: \[key\]"):
            run(tmp_path / "outputs", *overrides, f"judge.endpoint.base_url={server.url}", "seed=7", "name=refused")
    counts = {stage["label"]: stage["counts"] for stage in read_json(folder / "summary.json")["stages"]}
    assert counts["iteration_1/judgements"]["judge/requests"] == 2 * 9
    assert counts["iteration_1/judgements"]["judge/cost"] == pytest.approx((0.5 * 180 + 2 * 54) / 1e6)
    # The judge is the same for every model, so it judges the ranked answers once.
    links = {(folder / f"artifacts/evaluation_M{n}/ranked_scores").resolve() for n in (1, 2)}
    assert len(links) == 1
    said = capfd.readouterr()
    printed = until_then.out + until_then.err + said.out + said.err
    haystack = everything_below(tmp_path) + printed.encode() + caplog.text.encode()
    assert b"[key]" in haystack
    assert b"JUDGE_KEY" in haystack
    assert KEY.encode() not in haystack
    assert json.dumps(KEY)[1:-1].encode()[3:12] not in haystack


def test_whole_run_takes_the_verdicts_of_a_judge_that_thinks_and_refuses_its_first_record(tmp_path: Path) -> None:
    """The thinking names other scores, the first record is refused for its content, and prompts are cut."""
    refused: list[str] = []

    class Thinking(ChatServer):
        def _enter(self, body: dict[str, Any], key: str, path: str) -> Fault:
            answer, text = super()._enter(body, key, path), shown(body)
            refused.extend([] if refused or text == "Hello." else [text])  # That is the check beforehand.
            return Fault(400, b'{"error": {"message": "Content Exists Risk"}}') if text in refused else answer

    def verdict(text: str) -> int:
        return sum(map(ord, text)) % 6

    def says(body: dict[str, Any]) -> bytes:
        score = verdict(shown(body))
        return chat(
            f"<think>\nMaybe:\nScore: {(score + 2) % 6}\nNo.\n</think>\nIt will do.\n**Score:** {score}/5", "end_turn"
        )

    server = Thinking(says, [])
    server.start()
    overrides = [
        *TINY_RUN, *write_tiny_data(tmp_path / "data"), "iterations=1", "judge=external", "judge.num_samples=1",
        "judge.endpoint.model=judge-1", "judge.endpoint.api_key_env=JUDGE_KEY", "judge.endpoint.concurrency=1",
        f"judge.endpoint.base_url={server.url}",
    ]  # fmt: skip
    folder = run(tmp_path / "outputs", *overrides)
    asked = len(server.bodies)
    assert run(tmp_path / "outputs", *overrides) == folder
    server.stop()
    assert len(server.bodies) == asked
    counts = {stage["label"]: stage["counts"] for stage in read_json(folder / "summary.json")["stages"]}
    judged = [label for label, counted in counts.items() if "judge/requests" in counted]
    assert sum(counts[label]["dropped"].get("content_filter", 0) for label in judged) == 1
    assert [shown(body) for body in server.bodies].count("") == 1, "only the first refusal makes it ask for more"
    place = folder / "artifacts/iteration_1"
    texts = {one.id: one.text for one in read_records(place / "responses/responses.jsonl", Response)}
    made = read_records(place / "judgements/judgements.jsonl", Judgement)
    assert {one.response_id for one in made} == set(texts)
    assert [one.score for one in made] == [verdict(texts[one.response_id]) for one in made]
    assert "the server read 10 tokens of a prompt" in (folder / "run.log").read_text()
