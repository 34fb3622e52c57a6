"""RewardBench and JudgeBench: the run's judge against labelled comparisons."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarking import FP32, measure, read_rows, write_rows
from builders import (
    RUBRIC,
    TINY_RUN,
    Killed,
    composed,
    killed_after,
    metrics,
    nudged_policy,
    run,
    workspace,
    write_tiny_data,
)
from chat_server import chat, chat_server

from selfalign.benchmarks.judge_bench import JudgeBench
from selfalign.benchmarks.judge_test import share_of_best
from selfalign.benchmarks.protocol import BenchmarkContext
from selfalign.benchmarks.reward_bench import RewardBench
from selfalign.cli.environment import conf_folder
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Judgement
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import Transformers
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.external import ExternalScore
from selfalign.judges.implicit import ImplicitReward
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.sampled import SampledScore
from selfalign.launch.evaluate import evaluate_models
from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_share
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.pipeline.loop import plan

Kind = type[RewardBench] | type[JudgeBench]

PAIRWISE = "Which?\n<q>{instruction}</q>\n<a>\n{first}\n</a>\n<b>\n{second}\n</b>\n[[A]], [[B]] or [[C]]."


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def best_of_four(subset: str, number: int, *scores: Any) -> dict[str, Any]:
    """A row of RewardBench 2 whose responses say which score they get, the chosen one first."""
    said = [f"worth {score}" for score in scores]
    return {
        "id": str(number), "prompt": f"Task {number}?", "chosen": said[:1], "rejected": said[1:], "num_correct": 1,
        "num_rejected": 3, "total_completions": 4, "models": ["m"] * 4, "subset": subset, "additional_metadata": None,
    }  # fmt: skip


def ties_row(kind: str, number: int, right: list[Any], wrong: list[Any]) -> dict[str, Any]:
    """A row of RewardBench 2's Ties."""
    row = best_of_four("Ties", number, *right, *wrong)
    chosen = [f"worth {score}" for score in right]
    return row | {"id": f"{kind}:{number}", "chosen": chosen, "rejected": [f"worth {score}" for score in wrong]}


def pair_row(subset: str, number: int, chosen: Any, rejected: Any) -> dict[str, Any]:
    """A row of RewardBench."""
    return {
        "id": number, "prompt": f"Task {number}?", "chosen": f"worth {chosen}", "rejected": f"worth {rejected}",
        "chosen_model": "m", "rejected_model": "m", "subset": subset,
    }  # fmt: skip


def judge_row(number: int, source: str, label: str, a: Any, b: Any) -> dict[str, Any]:
    """A row of JudgeBench."""
    return {
        "pair_id": f"p{number}", "original_id": "7", "source": source, "question": f"Question {number}?",
        "response_model": "m", "response_A": f"worth {a}", "response_B": f"worth {b}", "label": label,
    }  # fmt: skip


def score_as_said(body: dict[str, Any]) -> bytes:
    """A judge that gives the score that a response says; a word is no score."""
    text = body["messages"][-1]["content"]
    said = text.split("worth ")[1].split("\n")[0]
    return chat(f"Fine.\nScore: {said}")


def compare_as_said(body: dict[str, Any]) -> bytes:
    """A pairwise judge that prefers the response that says more, and A for 'first', nobody for 'none'."""
    text = body["messages"][-1]["content"]
    a, b = (text.split(f"<{name}>\nworth ")[1].split("\n")[0] for name in ("a", "b"))
    if "none" in (a, b):
        return chat("Hm.")
    if "first" in (a, b):
        return chat("[[A]]")
    if "lazy" in (a, b):  # Right where the better one is first, a tie where it is second.
        return chat("[[A]]" if b == "lazy" else "[[C]]")
    return chat("[[C]]" if a == b else "[[A]]" if float(a) > float(b) else "[[B]]")


def scored(folder: Path, benchmark: Kind, rows: list[Any], policy: PolicyCheckpoint, **more: Any) -> Any:
    """The counts of a benchmark whose judge gives the scores that responses say."""
    source = str(write_rows(folder / "rows.jsonl", rows))
    with chat_server(score_as_said) as server:
        endpoint = Endpoint(base_url=server.url, model="judge-1", api_key_env="")
        judge = ExternalScore(prompt=RUBRIC, endpoint=endpoint, num_samples=1, retries=0, max_score=100)
        return measure(folder, benchmark(questions=source, judge=judge, **more), policy)


def compared(folder: Path, benchmark: Kind, rows: list[Any], policy: PolicyCheckpoint) -> Any:
    """The counts of a benchmark whose judge compares what responses say."""
    source = str(write_rows(folder / "rows.jsonl", rows))
    with chat_server(compare_as_said) as server:
        endpoint = Endpoint(base_url=server.url, model="judge-1", api_key_env="")
        made = benchmark(questions=source).with_judge(Pairwise(prompt=PAIRWISE, endpoint=endpoint, pairs=1))
        return measure(folder, made, policy)


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["judge=rubric"], "criteria of every instruction"),
        (["judge=panel", "+judge@judge.members.a=contrastive", "+judge@judge.members.b=expected_score"], "its members"),
        (["judge@benchmark.judge_bench.judge=verifier"], "say what is right"),
        (["judge=rubric", "judge@benchmark.judge_bench.judge=expected_score"], ""),
    ],
)
def test_judge_that_needs_more_than_responses_is_refused(overrides: list[str], needed: str) -> None:
    measured = ["benchmark=[judge_bench]", "benchmark.judge_bench.questions=q.jsonl", "data.seed_data.eft_source=none"]
    if not needed:
        composed("experiment=smoke", *measured, *overrides)
        return
    with pytest.raises(SelfalignError, match=rf"^benchmark\.judge_bench\.judge: .*{needed}.* judge@benchmark"):
        composed("experiment=smoke", *measured, *overrides)


# --- RewardBench 2 -----------------------------------------------------------------------------------------------

FOUR = [
    best_of_four("Factuality", 0, 9, 1, 2, 3),  # right
    best_of_four("Factuality", 1, 5, 5, 5, 1),  # one of three best: 1/3
    best_of_four("Factuality", 2, 4, 5, 1, 1),  # wrong
    best_of_four("Precise IF", 3, 7, "nothing", 2, 1),  # failed
    best_of_four("Precise IF", 4, 7, 6, 2, 1),  # right
]


def test_best_of_four_shares_its_ties_and_a_failure_is_wrong(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        counts = scored(tmp_path, RewardBench, FOUR, tiny_policy)
    assert counts["accuracy/factuality"] == pytest.approx(4 / 9)
    assert counts["accuracy/precise_if"] == 0.5
    assert counts["accuracy"] == pytest.approx((4 / 9 + 1 / 2) / 2)
    assert counts["accuracy/factuality_low"] == bootstrap_share([(1, 1), (1 / 3, 1), (0, 1)]).low
    assert counts["accuracy_low"] < counts["accuracy"] < counts["accuracy_high"]
    assert (counts["chance"], counts["labelled"]) == (0.25, 5)
    assert (counts["failed"], counts["tied"]) == (1 / 5, 1 / 5)
    assert counts["judge/requests"] == 20
    assert counts["dropped"] == {}
    assert "1 judgements carry no score ({'no_score': 1}), and their comparisons count as wrong" in caplog.text
    rows = read_rows(tmp_path / "out/results.jsonl")
    assert [row["result"] for row in rows] == [1.0, pytest.approx(1 / 3), 0.0, 0.0, 1.0]
    assert rows[3]["scores"] == [7, None, 2, 1]
    assert len(read_records(tmp_path / "out/judgements.jsonl", Judgement)) == 20


def test_share_of_best_is_of_the_highest_scores() -> None:
    assert share_of_best([3, 1, 1, 1], 1) == 1.0
    assert share_of_best([3, 3, 1, 3], 1) == pytest.approx(1 / 3)
    assert share_of_best([2, 3], 1) == 0.0
    assert share_of_best([3, None], 1) == 0.0


def test_score_of_ties_is_reward_bench_2s(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    rows = [
        # 1: both right. Spread 2, gaps 5 and 3: both above the spread.
        ties_row("ref", 1, [9], [4, 1]), ties_row("tied", 1, [10, 8], [5, 2]),
        # 2: both right. Spread 6, gaps 1 and 8: only the tied one is above.
        ties_row("ref", 2, [5], [4]), ties_row("tied", 2, [16, 10], [2]),
        # 3: the tied one is wrong by a hair. Spread 3, gaps 7 and 0.
        ties_row("ref", 3, [9], [2]), ties_row("tied", 3, [8, 5], [5]),
        # 4: a failure is wrong; 5: without a partner, left out.
        ties_row("ref", 4, [9], [2]), ties_row("tied", 4, [8, "nothing"], [5]), ties_row("ref", 5, [9], [2]),
    ]  # fmt: skip
    counts = scored(tmp_path, RewardBench, rows, tiny_policy)
    margins = [np.tanh(3 / 2 - 1), np.tanh(1 / 6 - 1), np.tanh(0 / 3 - 1), -1]
    expected = 0.3 * 4 / 4 + 0.3 * 2 / 4 + 0.2 * 2 / 4 + 0.2 * 1 / 4 + 0.01 * sum(margins) / 4
    assert counts["accuracy/ties"] == pytest.approx(expected)
    assert counts["accuracy"] == pytest.approx(expected)
    assert counts["dropped"] == {"ties_without_partner": 1}
    assert counts["labelled"] == 8
    assert counts["failed"] == 1 / 8
    assert "tied" not in counts


def test_equal_scores_of_correct_answers_leave_no_spread(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    rows = [
        ties_row("ref", 1, [9], [4]), ties_row("tied", 1, [8, 8], [5]),
        ties_row("ref", 2, [4], [4]), ties_row("tied", 2, [8, 8], [8]),
    ]  # fmt: skip
    counts = scored(tmp_path, RewardBench, [*FOUR[:1], *rows], tiny_policy)
    # 1 is right in all, and its gap is beyond a spread of 0; 2 in none, with 0 / 0 counting nothing.
    assert counts["accuracy/ties"] == pytest.approx((0.3 + 0.3 + 0.2 + 0.2 + 0.01) / 2)
    assert counts["accuracy"] == pytest.approx((1 + 0.505) / 2)


def test_pairwise_judge_compares_all_four_in_both_orders_and_leaves_ties_out(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    rows = [FOUR[0], FOUR[1], ties_row("ref", 1, [9], [4]), ties_row("tied", 1, [8, 8], [5])]
    counts = compared(tmp_path, RewardBench, rows, tiny_policy)
    assert counts["judge/requests"] == 2 * 2 * 6
    assert counts["accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert counts["dropped"] == {"ties_without_scores": 2}
    assert counts["labelled"] == 2


# --- RewardBench -------------------------------------------------------------------------------------------------


def test_pairs_are_averaged_by_section_with_mathematics_as_much_as_code(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    rows = [
        pair_row("alpacaeval-easy", 0, 5, 4), pair_row("mt-bench-med", 1, 3, 3),  # 1 and a tie, ½
        pair_row("llmbar-adver-GPTInst", 2, 1, 4),
        pair_row("math-prm", 3, 5, 4), pair_row("hep-go", 4, 1, 4),
        pair_row("my own", 5, 5, 4),
    ]  # fmt: skip
    counts = scored(tmp_path, RewardBench, rows, tiny_policy)
    sections = {name: counts[f"accuracy/{name}"] for name in ("chat", "chat_hard", "reasoning", "my_own")}
    weight = 984 / 447
    assert sections == {"chat": 0.75, "chat_hard": 0.0, "reasoning": pytest.approx(weight / (1 + weight)), "my_own": 1}
    assert counts["accuracy"] == pytest.approx(sum(sections.values()) / 4)
    assert (counts["chance"], counts["tied"]) == (0.5, 1 / 6)


def test_implicit_reward_judges_with_its_reference(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    rows = [pair_row("chat", 0, "gold", "tin"), pair_row("chat", 1, "silver and more", "lead")]
    made = RewardBench(questions=str(write_rows(tmp_path / "rows.jsonl", rows)), judge=ImplicitReward(alpha=0.0))
    other = nudged_policy(tiny_policy, tmp_path / "other", size=0.2)
    for n, (judge, reference) in enumerate(((other, tiny_policy), (tiny_policy, other))):
        context = BenchmarkContext(
            key="benchmark.tried", label="M2", policy=judge, judge=judge, engine=FP32, seed=7, reference=reference
        )
        made.measure(context, workspace(tmp_path / f"out{n}"))
    there, back = (read_rows(tmp_path / f"out{n}/results.jsonl") for n in (0, 1))
    # The reward of the one is minus that of the other, so they never agree.
    assert [score for row in there for score in row["scores"]] == pytest.approx(
        [-score for row in back for score in row["scores"]]
    )
    assert [row["result"] for row in there] == [1 - row["result"] for row in back]


# --- JudgeBench --------------------------------------------------------------------------------------------------


def test_scores_decide_pairs_and_a_tie_is_wrong(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    rows = [
        judge_row(0, "mmlu-pro-law", "A>B", 5, 4),
        judge_row(1, "mmlu-pro-physics", "B>A", 5, 4),
        judge_row(2, "livebench-math", "B>A", 2, 4),
        judge_row(3, "livebench-math", "B>A", 4, 4),
        judge_row(4, "livecodebench", "A>B", 4, "nothing"),
        judge_row(5, "Mine", "A>B", 4, 1),
    ]
    counts = scored(tmp_path, JudgeBench, rows, tiny_policy)
    found = {name: counts[f"accuracy/{name}"] for name in ("knowledge", "math", "coding", "mine")}
    assert found == {"knowledge": 0.5, "math": 0.5, "coding": 0.0, "mine": 1.0}
    assert counts["accuracy"] == 0.5
    assert (counts["chance"], counts["failed"], counts["tied"], counts["labelled"]) == (0.5, 1 / 6, 1 / 6, 6)
    assert [row["id"] for row in read_rows(tmp_path / "out/results.jsonl")] == [f"p{n}" for n in range(6)]


def test_pairwise_judge_must_be_right_on_the_whole(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    rows = [
        judge_row(0, "livebench-math", "A>B", 5, 4),
        judge_row(1, "livebench-math", "B>A", 5, 4),
        judge_row(2, "livebench-math", "A>B", "first", "first"),  # right in one order, wrong in the other
        judge_row(3, "livebench-math", "B>A", "lazy", 1),  # right in one order, a tie in the other: right
        judge_row(4, "livebench-math", "A>B", "none", 1),
    ]
    counts = compared(tmp_path, JudgeBench, rows, tiny_policy)
    assert [row["result"] for row in read_rows(tmp_path / "out/results.jsonl")] == [1, 0, 0, 1, 0]
    assert (counts["accuracy"], counts["chance"]) == (0.4, 0.25)
    assert (counts["failed"], counts["tied"]) == (0.2, 0.2)
    assert counts["judge/position_bias"] == 1 / 4
    assert counts["judge/requests"] == 10


# --- files and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (RewardBench, {"prompt": "a", "chosen": "b", "subset": "s"}, r"rows.jsonl:1: .*rejected"),
        (RewardBench, pair_row("s", 0, 1, 2) | {"rejected": []}, r"rows.jsonl:1: expected a prompt, a subset"),
        (RewardBench, best_of_four("Ties", 3, 1, 2), r"rows.jsonl:1: the id of a row of Ties must be ref:N or tied:N"),
        (RewardBench, ties_row("tied", 3, [1], [2]), r"rows.jsonl:1: a tied row of Ties has two chosen"),
        (JudgeBench, judge_row(0, "s", "A=B", 1, 2), r"rows.jsonl:1: the label must be A>B or B>A, got 'A=B'"),
        (JudgeBench, {"pair_id": "p", "question": "q", "label": "A>B"}, r"rows.jsonl:1: .*response_A"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, kind: Kind, row: dict[str, Any], message: str) -> None:
    source = str(write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(SelfalignError, match=message):
        kind(questions=source).sources("benchmark.k")


def test_count_takes_the_first_and_is_held_against_what_there_is(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    assert scored(tmp_path, RewardBench, FOUR, tiny_policy, count=1)["accuracy"] == 1.0
    with pytest.raises(SelfalignError, match=r"benchmark.k.count=6, but .* has 5"):
        RewardBench(questions=str(tmp_path / "rows.jsonl"), count=6).sources("benchmark.k")
    with pytest.raises(SelfalignError, match=r"benchmark.k.count must be 0"):
        RewardBench(questions="a", count=-1).check("benchmark.k")


def test_killed_benchmark_continues_and_loses_no_finished_batch(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(write_rows(tmp_path / "rows.jsonl", FOUR))
    judge = SampledScore(prompt=RUBRIC, num_samples=1, retries=0, sampling=Sampling(max_new_tokens=4))
    made, backend = RewardBench(questions=source, judge=judge), Transformers(max_batch_tokens=40)
    with killed_after(100, monkeypatch) as all_sizes:
        counts = measure(tmp_path / "whole", made, tiny_policy, tiny_policy, engine=backend)
    assert counts["failed"] == 1.0
    assert counts["accuracy"] == 0.0
    with killed_after(3, monkeypatch) as sizes, pytest.raises(Killed):
        measure(tmp_path / "killed", made, tiny_policy, tiny_policy, engine=backend)
    with killed_after(100, monkeypatch) as rest:
        assert measure(tmp_path / "killed", made, tiny_policy, tiny_policy, engine=backend) == counts
    assert sizes + rest == all_sizes
    whole, killed = (
        [(tmp_path / name / "out" / f"{file}.jsonl").read_bytes() for file in ("judgements", "results")]
        for name in ("whole", "killed")
    )
    assert whole == killed


# --- in a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run whose judge is measured after every iteration, and its overrides."""
    root = tmp_path_factory.mktemp("tested")
    overrides = [
        *TINY_RUN,
        *write_tiny_data(root / "data"),
        "iterations=1",
        "benchmark=[reward_bench,judge_bench]",
        f"benchmark.reward_bench.questions={write_rows(root / 'reward.jsonl', FOUR)}",
        f"benchmark.judge_bench.questions={write_rows(root / 'judge.jsonl', [judge_row(0, 'x', 'A>B', 5, 4)] * 2)}",
        "judge@benchmark.judge_bench.judge=pairwise",
        "benchmark.judge_bench.judge.model=base",
    ]
    return run(root / "outputs", *overrides), overrides


def test_every_models_judging_is_measured_and_planned(tested: tuple[Path, list[str]]) -> None:
    folder, overrides = tested
    made = {stage["label"]: stage for stage in read_json(folder / "summary.json")["stages"]}
    planned = {str(one.label): one.size for one in plan(composed(*overrides)[0])}
    assert list(planned) == list(made)
    assert planned["evaluation_M1/reward_bench"].startswith("all comparisons of ")
    assert planned["evaluation_M1/reward_bench"].endswith("by ExpectedScore")
    judges = {
        name: {row["model"] for row in read_rows(folder / f"artifacts/evaluation_{name}/reward_bench/judgements.jsonl")}
        for name in ("M1", "M2")
    }
    assert judges["M1"] != judges["M2"], "the judge is the model itself"
    by_base = [read_rows(folder / f"artifacts/evaluation_{name}/judge_bench/judgements.jsonl") for name in ("M1", "M2")]
    assert by_base[0] == by_base[1], "the judge is M0 for both"


def test_numbers_stand_in_summary_and_report_with_their_meaning(tested: tuple[Path, list[str]]) -> None:
    folder, _ = tested
    for row in read_json(folder / "summary.json")["models"]:
        assert 0 <= row["reward_bench/accuracy"] <= 1
        assert (row["reward_bench/chance"], row["judge_bench/chance"]) == (0.25, 0.25)
    html = (folder / "report.html").read_text()
    assert "<h3>reward_bench</h3>" in html
    assert "Judged by <b>self</b>." in html
    assert "Judged by <b>base</b>." in html
    assert catalog.BENCHMARK_ACCURACY.meaning in html
    assert catalog.BENCHMARK_FAILED.meaning in html
    logged = {name for row in metrics(folder) if row["stage"] == "benchmark" for name in row}
    assert {"reward_bench/accuracy", "reward_bench/accuracy/factuality", "judge_bench/failed"} <= logged


def test_finished_run_is_measured_again_under_the_same_keys(tested: tuple[Path, list[str]]) -> None:
    folder, _ = tested
    again = evaluate_models([str(folder)], [], conf_folder())
    keys = [
        {stage["label"]: stage["key"] for stage in read_json(place / "summary.json")["stages"]}
        for place in (folder, again)
    ]
    assert keys[0]["evaluation_M2/reward_bench"] == keys[1]["evaluation_M2/reward_bench"]


def test_judge_of_given_pairs_has_an_effect_where_it_is_measured(tmp_path: Path) -> None:
    pairs = ["data=pairs", "data.path=p.jsonl", "iterations=1", "data.seed_data.ranked=''", "evaluate=none"]
    measured = ["benchmark=[judge_bench]", "benchmark.judge_bench.questions=q.jsonl"]
    config, _, _ = composed("experiment=smoke", *pairs, *measured, "judge=expected_score", "judge.max_score=4")
    assert isinstance(config.judge, ExpectedScore)
    assert json.dumps(config.judge.max_score) == "4"


def test_policy_without_a_reference_is_not_measured_by_its_implicit_reward(tmp_path: Path) -> None:
    """M1 is M0 here, so all its rewards would be 0."""
    pairs = write_rows(
        tmp_path / "p.jsonl", [{"prompt": f"Say {n}.", "chosen": "Yes.", "rejected": "No."} for n in "ab"]
    )
    given = ["data=pairs", f"data.path={pairs}", "data.count=0", "iterations=1", "evaluate=none", "judge=implicit"]
    seeds = [f"data.seed_data.{name}" for name in ("demonstrations=''", "ranked=''", "eft_source=none")]
    rows = write_rows(tmp_path / "rows.jsonl", [judge_row(0, "x", "A>B", 5, 4)])
    measured = ["benchmark=[judge_bench]", f"benchmark.judge_bench.questions={rows}"]
    folder = run(tmp_path / "outputs", *TINY_RUN[:1], "train.align.batch_size=1", *given, *seeds, *measured)
    made = [stage["label"] for stage in read_json(folder / "summary.json")["stages"]]
    assert "evaluation_M2/judge_bench" in made
    assert "evaluation_M1/judge_bench" not in made
