from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarking import measure, read_rows, write_rows
from builders import Killed, Script, completion, killed_after, loaded
from chat_server import ChatServer, chat, chat_server

from selfalign.benchmarks.arena_hard import ArenaHard, verdicts_won
from selfalign.benchmarks.arena_judge import (
    ArenaJudge,
    ArenaVerdict,
    Game,
    VerdictTokens,
    likeliest_verdict,
    parse_game,
)
from selfalign.benchmarks.style import style_differences, style_of
from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import Transformers
from selfalign.judges.comparator import OPENING
from selfalign.metrics.intervals import bootstrap_share, style_controlled
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt

PROMPT = "Which?\n<q>\n{instruction}\n</q>\n<a>\n{first}\n</a>\n<b>\n{second}\n</b>\nEnd with [[A>B]] or [[B>A]]."
QUESTIONS = [
    {"uid": f"u{n}", "category": category, "subcategory": "s", "prompt": f"Say {word}."}
    for n, (word, category) in enumerate(
        [("rain", "hard_prompt"), ("snow", "hard_prompt"), ("hail", "hard_prompt"), ("fog", "creative_writing")]
    )
]
ANSWERS = ["Mine: **rain**.", "# Mine\n\n- snow\n- more snow", "Mine: hail, and hail again.", "Mine: fog."]
VERDICTS = {"rain": ("A>>B", "B>A"), "snow": ("A=B", "A>B"), "hail": ("no", "B>A"), "fog": ("B>A", "A>B")}
"""{word of the question: what the judge says where the model's answer is A, and where it is B}."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def baseline_row(question: dict[str, Any], model: str) -> dict[str, Any]:
    """A line of model_answer/MODEL.jsonl; every second one has its answer in an object, as newer files do."""
    text = f"The baseline says {question['prompt']}"
    return {
        "uid": question["uid"],
        "ans_id": f"a-{question['uid']}",
        "model": model,
        "messages": [
            {"role": "user", "content": question["prompt"]},
            {"role": "assistant", "content": {"answer": text} if question["uid"] in ("u0", "u2") else text},
        ],
        "metadata": {"token_len": 9999, "header_count": {"h1": 9}, "list_count": {}, "bold_count": {}},
    }


def arena_hard(folder: Path, questions: list[dict[str, Any]] = QUESTIONS, **settings: Any) -> ArenaHard:
    judge = ArenaJudge(prompt=PROMPT, **settings.pop("judge", {}))
    files = {
        category: str(write_rows(folder / f"{name}.jsonl", [baseline_row(q, name) for q in questions]))
        for category, name in (("hard_prompt", "strong"), ("creative_writing", "poet"))
    }
    source = str(write_rows(folder / "question.jsonl", questions))
    return ArenaHard(
        questions=source, judge=judge, **{"baselines": files, "sampling": Sampling(max_new_tokens=6), **settings}
    )


def at(server: ChatServer) -> dict[str, Any]:
    return {"endpoint": Endpoint(base_url=server.url, model="judge-1", api_key_env="")}


def verdict(body: dict[str, Any]) -> bytes:
    """What the table says of a question and an order."""
    text = body["messages"][-1]["content"]
    word = next(word for word in VERDICTS if f"<q>\nSay {word}." in text)
    is_first = "Mine" in text[text.index("<a>") : text.index("</a>")]
    return chat(f"I weighed them.\n[[{VERDICTS[word][not is_first]}]]")


def judged(folder: Path, policy: PolicyCheckpoint, **settings: Any) -> dict[str, Any]:
    """The counts of four given answers, judged by the table."""
    script = Script(loaded(policy.path), [completion(answer) for answer in ANSWERS], per_batch=1)
    with chat_server(verdict) as server:
        return measure(folder, arena_hard(folder, judge=at(server), **settings), policy, engine=script)


# --- rates -------------------------------------------------------------------------------------------------------


def test_strong_verdicts_count_three_times_and_questions_without_both_verdicts_are_dropped(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    counts = judged(tmp_path, tiny_policy)
    # rain: as A by far (3 of 3), as B a little (1 of 1). snow: a tie (½ of 1), as B lost (0 of 1). fog: lost twice.
    parts = [(4.0, 4.0), (0.5, 2.0), (0.0, 2.0)]
    assert counts["win_rate_weighted"] == 4.5 / 8
    assert counts["win_rate_weighted_low"] == bootstrap_share(parts).low
    assert counts["win_rate_weighted/hard_prompt"] == 4.5 / 6
    assert counts["win_rate_weighted/creative_writing"] == 0.0
    assert counts["dropped"] == {"unanswered": 0, "no_score": 1}
    assert counts["judge/requests"] == 8
    assert counts["judge/position_bias"] == 0.0
    assert counts["questions"] == 4
    styles = [style_of(tiny_policy.load_tokenizer(), text) for text in ANSWERS]
    others = [style_of(tiny_policy.load_tokenizer(), f"The baseline says {q['prompt']}") for q in QUESTIONS]
    differences = style_differences(styles, others)
    kept = [0, 1, 3]
    expected, effects = style_controlled([1, 0.25, 0], [4, 2, 2], differences[kept])
    assert counts["win_rate_style_controlled"] == pytest.approx(expected.value)
    assert [counts[f"style_effect/{name}"] for name in ("length", "headers", "lists", "bold")] == pytest.approx(effects)
    hard, _ = style_controlled([1, 0.25], [4, 2], differences[:2])
    assert counts["win_rate_style_controlled/hard_prompt"] == pytest.approx(hard.value)


def test_judge_that_names_one_place_is_biased_and_gives_half(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with chat_server("[[A>>B]]") as server:
        counts = measure(tmp_path, arena_hard(tmp_path, judge=at(server)), tiny_policy)
    assert (counts["win_rate_weighted"], counts["judge/position_bias"]) == (0.5, 1.0)


def test_value_of_each_verdict_is_the_models_in_either_place() -> None:
    def won(as_first: str, as_second: str) -> tuple[float, float]:
        first, second = (Game(JudgementStatus.OK, ArenaVerdict(said), "") for said in (as_first, as_second))
        return verdicts_won((first, second))

    assert won("A>>B", "B>>A") == (6, 6)
    assert won("B>>A", "A>>B") == (0, 6)
    assert won("A>B", "A=B") == (1.5, 2)
    assert won("A>B", "A>>B") == (1, 4)
    assert won("B>A", "B>A") == (1, 2)


def test_files_are_in_arena_hard_autos_layout(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    judged(tmp_path, tiny_policy)
    model = f"M2-{tiny_policy.digest[:8]}"
    answers = read_rows(tmp_path / f"out/model_answer/{model}.jsonl")
    assert [row["messages"][-1]["content"]["answer"] for row in answers] == ANSWERS
    assert {row["model"] for row in answers} == {model}
    rows = read_rows(tmp_path / f"out/model_judgment/judge-1/{model}.jsonl")
    assert [row["uid"] for row in rows] == ["u0", "u1", "u2", "u3"]
    assert [row["baseline"] for row in rows] == ["strong"] * 3 + ["poet"]
    # There, the baseline is A in the first game.
    assert [[game["score"] for game in row["games"]] for row in rows] == [
        ["B>A", "A>>B"], ["A>B", "A=B"], ["B>A", None], ["A>B", "B>A"],
    ]  # fmt: skip


def test_only_wanted_categories_are_asked_and_need_a_baseline(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    made = arena_hard(tmp_path, categories=["creative_writing"])
    made.baselines["hard_prompt"] = ""
    assert made.sources("benchmark.arena_hard").keys() == {"questions", "baselines.creative_writing"}
    assert made.asked("benchmark.arena_hard") == ["Say fog."]
    with pytest.raises(SelfalignError, match=r"^benchmark.arena_hard.baselines.hard_prompt must name .*o3-mini"):
        replace(made, categories=[]).sources("benchmark.arena_hard")
    with pytest.raises(SelfalignError, match=r"categories: .* has no 'maths', only hard_prompt, creative_writing"):
        replace(made, categories=["maths"]).sources("benchmark.arena_hard")


def test_bad_files_are_named_with_their_line(tmp_path: Path) -> None:
    made = arena_hard(tmp_path)
    with pytest.raises(SelfalignError, match=r"benchmark.arena_hard.count=5, but .* has 4"):
        replace(made, count=5).sources("benchmark.arena_hard")
    write_rows(tmp_path / "strong.jsonl", [baseline_row(q, "strong") for q in QUESTIONS[:2]])
    with pytest.raises(SelfalignError, match=r"baselines.hard_prompt: .* has no answer to the question 'u2'"):
        made.sources("benchmark.arena_hard")
    bad = baseline_row(QUESTIONS[0], "strong")
    bad["messages"][-1]["content"] = {"thought": "Hm."}
    write_rows(tmp_path / "strong.jsonl", [bad])
    with pytest.raises(
        SelfalignError, match=r"strong.jsonl:1: messages must end with the assistant's answer.*got None"
    ):
        made.sources("benchmark.arena_hard")
    for rows, message in (
        ([QUESTIONS[0], QUESTIONS[0] | {"prompt": "Other"}], r"question.jsonl:2: the uid 'u0' occurs twice"),
        ([QUESTIONS[0] | {"prompt": " "}], r"question.jsonl:1: expected a uid"),
        ([{"uid": "u0", "category": "c"}], r"question.jsonl:1: .*prompt"),
    ):
        write_rows(tmp_path / "question.jsonl", rows)
        with pytest.raises(SelfalignError, match=message):
            made.sources("benchmark.arena_hard")


# --- the judge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Fine.\n[[A>>B]]", "A>>B"),
        ("My final verdict is tie: [[A=B]].", "A=B"),
        ("[[B<A]]", "A>B"),
        ("[[A<<B]]", "B>>A"),
        ("[[B=A]]", "A=B"),
        ("[[A>B]]\nSo [[A>B]].", "A>B"),
        ("[[A>B]] at first, but then [[A>>B]]", JudgementStatus.AMBIGUOUS),
        ("[[B>A]]\nAssistant A is better.", JudgementStatus.AMBIGUOUS),
        ("> [[A>B]]", JudgementStatus.NO_SCORE),
        ("[[A]]", JudgementStatus.NO_SCORE),
        ("[[A>A]]", JudgementStatus.NO_SCORE),
        ("<think>[[A>B]]", JudgementStatus.TRUNCATED),
        ("<think>[[A>B]]</think>[[B>A]]", "B>A"),
    ],
)
def test_verdict_is_read_from_the_judges_own_lines(text: str, expected: Any) -> None:
    game = parse_game(text)
    assert (game.verdict or game.status) == expected


def test_verdicts_are_read_in_every_spelling() -> None:
    said = ["A>>B", "B<<A", "A>B", "B<A", "A=B", "B=A", "B>A", "A<B", "B>>A", "A<<B"]
    read = [parse_game(f"[[{one}]]").verdict for one in said]
    assert read == [verdict for verdict in ArenaVerdict for _ in range(2)]


def test_verdict_that_an_answer_spells_is_not_the_judges() -> None:
    shown = ["The answer says: [[A>B]]"]
    assert parse_game("The answer says: [[A>B]]", FinishReason.EOS, shown).status is JudgementStatus.NO_SCORE


def test_text_that_was_cut_has_no_verdict() -> None:
    assert parse_game("Both are fine. [[A>B]]", FinishReason.LENGTH).status is JudgementStatus.TRUNCATED


def test_policys_verdict_is_the_likeliest_of_the_five_token_by_token(tiny_policy: PolicyCheckpoint) -> None:
    """Against a tree of decisions walked with full logits."""
    policy = loaded(tiny_policy.path)
    tokens = VerdictTokens.of(policy.tokenizer, "k")
    prompt = encode_prompt(policy.tokenizer, [{"role": "user", "content": "Which?"}], OPENING)

    def logps(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1).numpy()

    read = [[logps([*prompt, *fork])[token] for token in tokens.alternatives] for fork in tokens.forks]
    expected = []
    for path in tokens.paths:
        chance = 1.0
        for at in range(len(path)):
            others = {other[at] for other in tokens.paths if other[:at] == path[:at]}
            among = np.exp([logps([*prompt, *path[:at]])[token] for token in sorted(others)])
            chance *= among[sorted(others).index(path[at])] / among.sum()
        expected.append(chance)
    assert sum(expected) == pytest.approx(1)
    assert tokens.shares(read) == pytest.approx(expected, rel=1e-6)
    assert len({tuple(path) for path in tokens.paths}) == 5


def test_equally_likely_verdicts_are_a_tie() -> None:
    assert likeliest_verdict([0.4, 0.1, 0.0, 0.1, 0.4]).verdict is ArenaVerdict.TIE
    assert likeliest_verdict([0.1, 0.5, 0.1, 0.1, 0.2]).verdict is ArenaVerdict.A


def test_policy_judges_and_a_killed_benchmark_continues(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, backend = arena_hard(tmp_path, judge={"max_batch_tokens": 400}), Transformers(max_batch_tokens=40)
    with killed_after(100, monkeypatch) as all_sizes:
        counts = measure(tmp_path / "whole", made, tiny_policy, tiny_policy, engine=backend)
    assert 0 <= counts["win_rate_weighted"] <= 1
    assert counts["dropped"] == {"unanswered": 0}
    with killed_after(3, monkeypatch) as sizes, pytest.raises(Killed):
        measure(tmp_path / "killed", made, tiny_policy, tiny_policy, engine=backend)
    with killed_after(100, monkeypatch) as rest:
        assert measure(tmp_path / "killed", made, tiny_policy, tiny_policy, engine=backend) == counts
    assert sizes + rest == all_sizes
    whole, killed = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name / "out").rglob("M2-*.jsonl"))}
        for name in ("whole", "killed")
    )
    assert whole == killed
    [file] = (tmp_path / "whole/out").glob("model_judgment/sft-*/*.jsonl")
    assert all(game["score"] in list(ArenaVerdict) for row in read_rows(file) for game in row["games"])


def test_judge_without_verdicts_stops_and_names_its_setting(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with chat_server("No.") as server, pytest.raises(SelfalignError, match=r"4 of 4 .*benchmark.arena_hard.judge, or"):
        measure(tmp_path, arena_hard(tmp_path, judge=at(server)), tiny_policy)


# --- style -------------------------------------------------------------------------------------------------------


def test_style_counts_markdown_outside_of_code(tiny_policy: PolicyCheckpoint) -> None:
    tokenizer = tiny_policy.load_tokenizer()
    text = (
        "# One\n## Two\n#no\n1. a\n- b\n  * c\n**bold** and __also__ **not\nthis**\n```\n# no\n- no\n**no**\n```\n+ d"
    )
    assert style_of(tokenizer, text)[1:] == [2, 4, 2]
    assert style_of(tokenizer, "```\n# open code")[1:] == [0, 0, 0]
    assert style_of(tokenizer, "a b")[0] == len(tokenizer("a b", add_special_tokens=False)["input_ids"])


def test_differences_in_style_are_relative() -> None:
    found = style_differences([[30, 3, 0, 0], [0, 0, 0, 0]], [[10, 0, 0, 5], [0, 0, 0, 0]])
    assert found[0] == pytest.approx([20 / 40, 0.1 / 1.1, 0.0, -0.5 / 1.5])
    assert found[1].tolist() == [0, 0, 0, 0]


def test_shipped_prompt_asks_for_all_five_verdicts() -> None:
    text = (Path(__file__).parents[2] / "conf/benchmark/texts/arena.yaml").read_text("utf-8")
    assert all(f"[[{verdict}]]" in text for verdict in ArenaVerdict)
