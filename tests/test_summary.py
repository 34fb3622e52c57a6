from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger
from selfalign.runs.planner import PlannedStage
from selfalign.runs.runner import CacheLookup
from selfalign.runs.summary import COLUMNS, closing_text, models_of, plan_text, summarise, win_rate_matrix
from selfalign.store.artifacts import Artifact, Store


def made(stage: str, seconds: float = 1.0, **counts: Any) -> Artifact:
    return Artifact(stage=stage, key=f"key-{stage}", path=Path("/nowhere"), digest="d", counts=counts, seconds=seconds)


def labelled(artifacts: dict[str, Artifact]) -> dict[Label, Artifact]:
    return {Label.parse(text): replace(artifact, path=Path("/nowhere", text)) for text, artifact in artifacts.items()}


ARTIFACTS = labelled(
    {
        "M0": made("load_model", 9.0, parameters=7),
        "seeds": made("seed_data", 5.0, ift=3),
        "M1": made("sft", 2.0, demonstrations=8, dropped={"too_long": 0}),
        "questions": made("eval_instructions", 3.0, instructions=2),
        "evaluation_M1/answers": made("respond", 0.5, responses=2, dropped={"prompt_too_long": 0}),
        "evaluation_M1/numbers": made(
            "evaluate", 0.25, **{"eval/mean_characters": 99.6, "judge_quality/spearman": -0.5}
        ),
        "iteration_1/instructions": made("instruct", 4.0, kept=2, dropped={"copy": 3, "too_short": 0}),
        "iteration_1/pairs": made("pair", 0.125, pairs=2, dropped={"tie": 1}),
        "M2": made(
            "align", 10.0, **{"pairs": 2, "rewards/margins": 0.25, "rewards/accuracies": 0.75}, dropped={"too_long": 0}
        ),
        "evaluation_M2/numbers": made(
            "evaluate",
            0.5,
            **{
                "eval/win_rate": 0.625,
                "eval/win_rate_low": 0.4,
                "eval/win_rate_high": 0.81,
                "eval/mean_characters": 120.2,
            },
        ),
        "M3": made("align", 20.0, pairs=1),
    }
)


def test_every_model_has_a_row_with_its_training_and_its_evaluation() -> None:
    m1, m2, m3 = summarise(ARTIFACTS, models_of(ARTIFACTS))["models"]
    assert [row["model"] for row in (m1, m2, m3)] == ["M1", "M2", "M3"]
    assert [row["iteration"] for row in (m1, m2, m3)] == [0, 1, 2]
    assert (m1["demonstrations"], m1["eval/mean_characters"], m1["judge_quality/spearman"]) == (8, 99.6, -0.5)
    assert (m2["pairs"], m2["rewards/margins"], m2["eval/win_rate"]) == (2, 0.25, 0.625)
    assert m3["pairs"] == 1
    assert "eval/win_rate" not in m1


def test_seconds_of_a_model_are_those_of_its_pairs_training_and_evaluation() -> None:
    m1, m2, m3 = summarise(ARTIFACTS, models_of(ARTIFACTS))["models"]
    assert m1["seconds"] == round(2.0 + 0.5 + 0.25, 1)
    assert m2["seconds"] == round(4.0 + 0.125 + 10.0 + 0.5, 1)
    assert m3["seconds"] == 20.0


def test_artifact_under_two_labels_takes_its_time_once() -> None:
    artifacts = labelled(
        {"M1": made("sft"), "M2": made("align", 1.0), "iteration_1/responses_by_sft": made("respond", 8.0)}
    )
    shared = artifacts[Label.parse("iteration_1/responses_by_sft")]
    artifacts[Label.parse("iteration_1/ahead_responses_by_sft")] = shared
    assert summarise(artifacts, models_of(artifacts))["models"][-1]["seconds"] == 9.0


def test_rows_of_tenth_and_first_model_do_not_mix() -> None:
    artifacts = labelled(
        {
            "M1": made("sft", 1.0),
            "M2": made("align", 128.0),
            "M10": made("align", 2.0),
            "M11": made("align", 4.0),
            "iteration_1/pairs": made("pair", 8.0),
            "iteration_10/pairs": made("pair", 16.0),
            "evaluation_M1/numbers": made("evaluate", 32.0),
            "evaluation_M10/numbers": made("evaluate", 64.0),
        }
    )
    seconds = {row["model"]: row["seconds"] for row in summarise(artifacts, models_of(artifacts))["models"]}
    assert seconds == {"M1": 33.0, "M2": 136.0, "M10": 66.0, "M11": 20.0}


def test_sft_baseline_has_the_first_row_and_the_data_it_writes_is_m1s() -> None:
    artifacts = labelled(
        {
            "ift": made("seed_data", 0.5),
            "M0": made("load_model", 9.0),
            "SFT": made("sft", 2.0, demonstrations=4),
            "evaluation_SFT/numbers": made("evaluate", 1.0, **{"judge_quality/spearman": 0.25}),
            "eft/judgements": made("judge", 4.0),
            "M1": made("sft", 8.0, demonstrations=6),
        }
    )
    sft, m1 = summarise(artifacts, models_of(artifacts))["models"]
    assert (sft["model"], sft["demonstrations"], sft["judge_quality/spearman"]) == ("SFT", 4, 0.25)
    assert (m1["model"], m1["demonstrations"]) == ("M1", 6)
    assert (sft["seconds"], m1["seconds"]) == (3.5, 12.0)


def test_drops_are_those_stages_that_dropped_something() -> None:
    assert summarise(ARTIFACTS, models_of(ARTIFACTS))["drops"] == {
        "iteration_1/instructions": {"copy": 3, "too_short": 0},
        "iteration_1/pairs": {"tie": 1},
    }


def test_stages_are_listed_in_the_order_they_were_made() -> None:
    stages = summarise(ARTIFACTS, models_of(ARTIFACTS))["stages"]
    assert [stage["label"] for stage in stages] == list(map(str, ARTIFACTS))
    assert stages[2] == {
        "label": "M1",
        "stage": "sft",
        "seconds": 2.0,
        "counts": {"demonstrations": 8, "dropped": {"too_long": 0}},
        "key": "key-sft",
    }


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "run", artifacts=dict(ARTIFACTS))


def test_closing_table_has_a_line_a_model_and_says_where_everything_lies(ledger: Ledger) -> None:
    text = closing_text(summarise(ARTIFACTS, models_of(ARTIFACTS)), ledger)
    lines = text.splitlines()
    without = {"judge accuracy", "test reward accuracy", "labelled responses"}
    assert {metric.heading for metric in COLUMNS if metric.heading not in lines[1]} == without
    cells = {line.split()[0]: line for line in lines[3:6]}
    assert list(cells) == ["M1", "M2", "M3"]
    assert "62.5% [40%, 81%]" in cells["M2"]
    assert "75.0%" in cells["M2"]
    assert "0.250" in cells["M2"]
    assert "100" in cells["M1"]
    assert "–" in cells["M1"]
    assert "dropped in iteration_1/instructions: 3 copy" in lines
    assert "dropped in iteration_1/pairs: 1 tie" in lines
    assert "too_short" not in text
    assert "too short" not in text
    assert str(ledger.folder / "report.html") in text
    assert ledger.tracker.place in text


def test_closing_text_of_an_evaluation_names_the_model_the_others_are_compared_with(ledger: Ledger) -> None:
    summary = summarise(ARTIFACTS, ["M2", "M3"])
    assert "win rate vs\u00a0M1" in closing_text(summary, ledger)
    assert "win rate vs\u00a0M2" in closing_text(summary | {"evaluated": ["outputs/one"]}, ledger)


def test_closing_text_says_so_only_when_nothing_had_to_be_made(ledger: Ledger) -> None:
    said = "Everything was made before; nothing had to be made again."
    assert said not in closing_text(summarise(ARTIFACTS, models_of(ARTIFACTS)), ledger)
    ledger.reused = set(ARTIFACTS)
    assert said in closing_text(summarise(ARTIFACTS, models_of(ARTIFACTS)), ledger)


def test_plan_shows_each_stage_its_size_and_whether_it_is_there(tmp_path: Path) -> None:
    m0, m1, pairs = Label.model("M0"), Label.model("M1"), Label.iteration(1, "pairs")
    look = CacheLookup(Store(tmp_path), found={m0: "0", m1: "1"})
    sizes = {m0: "random:tiny", m1: "SFT", pairs: "up to 2"}
    planned = [PlannedStage(label, "stage", size, 0, runs_model=True) for label, size in sizes.items()]
    lines = plan_text(planned, look).splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["M0", "M1", "iteration_1/pairs"]
    assert [line.endswith("done") for line in lines[3:6]] == [True, True, False]
    assert lines[5].split() == ["iteration_1/pairs", "up", "to", "2", "to", "do"]


def test_win_rate_matrix_has_both_directions_and_nothing_where_none_were_compared() -> None:
    compared = {
        Label.comparison(model, other): made("head_to_head", win_rate=rate)
        for model, other, rate in (("M2", "M1", 0.7), ("M3", "M2", 0.6), ("M3", "given", 0.1))
    }
    matrix = win_rate_matrix(["M1", "M2", "M3"], compared)
    assert matrix["models"] == ["M1", "M2", "M3"]
    assert matrix["rates"] == [
        [None, pytest.approx(0.3), None], [0.7, None, pytest.approx(0.4)], [None, 0.6, None],
    ]  # fmt: skip


def test_closing_text_names_a_blind_judge_of_a_win_rate_and_no_other(ledger: Ledger) -> None:
    def said(**measured: float) -> str:
        more = {f"instrument/{name.replace('__', '/')}": value for name, value in measured.items()}
        numbers = ARTIFACTS[Label.evaluation("M2", "numbers")]
        measured_last = {"evaluation_M3/numbers": numbers, "evaluation_M3/instruments": made("instruments", **more)}
        artifacts = ARTIFACTS | labelled(measured_last)
        return closing_text(summarise(artifacts, models_of(artifacts)), ledger)

    blind = said(head_to_head__passed=0.0, head_to_head__accuracy=0.515, scores__passed=0.0, scores__accuracy=0.5)
    assert "blind: the judge of eval/win_rate is right on 52% of ranked pairs" in blind
    assert "eval/score_win_rate" not in blind  # There is no such win rate here.
    assert "blind" not in said(head_to_head__passed=1.0, head_to_head__accuracy=0.7)
    assert "blind" not in said()
