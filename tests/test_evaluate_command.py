"""`selfalign-evaluate` on real tiny runs and models."""

import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import warm
from builders import TINY_RUN, composed, run, write_tiny_data

from selfalign.cli.environment import conf_folder
from selfalign.cli.report import report
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Instruction, PreferencePair, RankedAnswers
from selfalign.data.turns import as_text
from selfalign.launch.evaluate import FinishedRun, evaluate_models, training_of
from selfalign.launch.sweep import Sweep
from selfalign.report.instruction_values import instruction_values
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished
from selfalign.runs.sweep_jobs import JobState
from selfalign.runs.tracker import tracked_id
from selfalign.store.artifacts import Artifact


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one iteration."""
    folder = tmp_path_factory.mktemp("evaluator")
    return run(folder / "outputs", *TINY_RUN, *write_tiny_data(folder / "data"), "iterations=1", "name=one")


def models(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in read_json(folder / "summary.json")["models"]}


PARTS = ("eval/", "judge_quality/", "calibration/", "instrument/")


def measured(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.startswith(PARTS)}


def test_models_of_a_run_are_measured_as_the_run_measured_them(finished: Path) -> None:
    folder = evaluate_models([str(finished)], [], conf_folder())
    own, again = models(finished), models(folder)
    assert list(again) == ["M1", "M2"]
    assert {name: measured(row) for name, row in again.items()} == {name: measured(own[name]) for name in again}
    assert again["M2"]["pairs"] == own["M2"]["pairs"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "nothing was trained" in page
    # All of it was there: nothing was made twice.
    keys = [{stage["key"] for stage in read_json(f / "summary.json")["stages"]} for f in (finished, folder)]
    assert keys[1] <= keys[0]


def test_finished_run_is_measured_on_held_out_pairs_afterwards(finished: Path) -> None:
    folder = evaluate_models([str(finished)], ["evaluate.preference_pairs.source=ranked"], conf_folder())
    assert [row["preferences/pairs"] for row in models(folder).values()] == [1, 1]
    inputs = {
        n: read_json(folder / f"artifacts/evaluation_{n}/preferences/manifest.json")["inputs"] for n in ("M1", "M2")
    }
    seen = {name: [one["artifact"] for one in given["trained_on"]] for name, given in inputs.items()}
    assert seen == {"M1": ["seed_data"], "M2": ["seed_data", "pair"]}
    assert inputs["M2"]["reference"] == inputs["M1"]["policy"]
    run = Finished.load(folder)
    for row, metric in product(run.models, ("preferences/rewards/margins", "preferences/rewards/accuracies")):
        assert [*instruction_values(run, row["model"], metric).values()] == pytest.approx([row[metric]])


def test_instruction_that_a_measured_run_was_trained_on_is_dropped_and_counted(finished: Path, tmp_path: Path) -> None:
    pairs = read_records((finished / "artifacts/iteration_1/pairs/pairs.jsonl").resolve(), PreferencePair)
    texts = [as_text(pairs[0].prompt), "Which of the two moons of Mars is the larger one?"]
    source = tmp_path / "asked.jsonl"
    source.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in texts), encoding="utf-8")
    folder = evaluate_models([str(finished)], [f"evaluate.instructions={source}", "evaluate.count=1"], conf_folder())
    asked = read_records(folder / "artifacts/questions/instructions.jsonl", Instruction)
    assert [instruction.text for instruction in asked] == texts[1:]
    counts = read_json(folder / "artifacts/questions/manifest.json")["counts"]
    assert counts == {"instructions": 1, "dropped": {"in_demonstrations": 0, "trained_on": 1}}


def test_model_folder_is_compared_with_a_run(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree((finished / "artifacts/M2/weights").resolve(), other)
    tokenizer = (finished / "artifacts/M2/tokenizer").resolve()
    shutil.copytree(tokenizer, other, dirs_exist_ok=True)
    folder = evaluate_models([str(finished), str(other)], ["evaluate.round_robin=true"], conf_folder())
    summary = read_json(folder / "summary.json")
    names = [f"{finished.name}.M1", f"{finished.name}.M2", "other"]
    assert [row["model"] for row in summary["models"]] == names
    # The same weights answer with the same words and tie everywhere.
    assert summary["models"][2]["eval/win_rate_vs_previous"] == 0.5
    assert summary["win_rate_matrix"]["models"] == names
    assert summary["win_rate_matrix"]["rates"][2][1] == 0.5
    assert summary["win_rate_matrix"]["rates"][0][2] == pytest.approx(1 - summary["models"][2]["eval/win_rate"])


def test_sweep_stands_for_the_first_and_the_last_models_of_its_jobs(finished: Path) -> None:
    settings = read_json(finished / "summary.json")["config"]["overrides"]
    other = run(finished.parent, *settings, "loss.beta=0.3", "name=two")
    folder = finished.parent / "sweeps/by-hand"
    sweep = Sweep(folder)
    sweep.open([["loss.beta=0.1"], ["loss.beta=0.3"], ["loss.beta=-1"]])
    for number, made in enumerate((finished, other), start=1):
        sweep.update_job(number, [], state=JobState.finished, folder=f"../../{made.name}")
    sweep.update_job(3, [], state=JobState.failed)
    sweep.held.close()
    summary = read_json(evaluate_models([str(folder)], ["evaluate.round_robin=true"], conf_folder()) / "summary.json")
    names = ["M1", "loss.beta-0.1.M2", "loss.beta-0.3.M2"]
    assert [row["model"] for row in summary["models"]] == names == summary["win_rate_matrix"]["models"]
    of_its_own = models(finished)["M2"]["eval/win_rate"]
    assert summary["models"][1]["eval/win_rate"] == of_its_own
    sweep.open([["loss.beta=0.7"]])
    sweep.held.close()
    with pytest.raises(SelfalignError, match="no job of this sweep is finished"):
        evaluate_models([str(folder)], [], conf_folder())


def test_sft_baseline_of_a_second_run_has_rewards_by_its_own_loss(finished: Path) -> None:
    settings = read_json(finished / "summary.json")["config"]["overrides"]
    second = run(finished.parent, *settings, "loss.beta=0.3", "evaluate.sft_baseline=true", "name=with_baseline")
    folder = evaluate_models([str(finished), str(second)], ["evaluate.preference_pairs.source=ranked"], conf_folder())
    rows = [row["model"] for row in read_json(folder / "summary.json")["models"]]
    assert rows[-1] == f"{second.name}.SFT"
    beta = {name: _rewards_of(folder, name)["beta"] for name in rows}
    assert beta == {name: 0.3 if name.startswith(second.name) else 0.1 for name in rows}


def _rewards_of(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / f"artifacts/evaluation_{name}/preferences/manifest.json")["inputs"]


def test_models_without_a_run_are_judged_by_the_first(finished: Path) -> None:
    settings = [o for o in read_json(finished / "summary.json")["config"]["overrides"] if not o.startswith("data.")]
    folder = evaluate_models(["random:tiny"], [*settings, "data=self_rewarding_smoke"], conf_folder())
    [row] = models(folder).values()
    assert row["eval/answers"] == 3
    assert "eval/win_rate" not in row


def test_page_says_what_stands_for_m1(finished: Path, tmp_path: Path) -> None:
    settings = [o for o in read_json(finished / "summary.json")["config"]["overrides"] if not o.startswith("data.")]

    def said(*sources: str, more: Sequence[str] = ()) -> str:
        return (evaluate_models([*sources], [*more], conf_folder()) / "report.html").read_text(encoding="utf-8")

    assert "M0 and M1 stand for <b>random-tiny</b>" in said(
        "random:tiny", more=[*settings, "data=self_rewarding_smoke"]
    )
    other = weights_of_m2(finished, tmp_path / "other")
    assert "Comparisons with M1 are comparisons with <b>other</b>" in said(other, str(finished))
    assert f" M1 stands for <b>{finished.name}.M1</b>" in said(str(finished), other)
    assert "M1 stands for" not in said(str(finished))


def weights_of_m2(finished: Path, folder: Path) -> str:
    """A run's M2 as a folder of this name."""
    for part in ("weights", "tokenizer"):
        shutil.copytree((finished / "artifacts/M2" / part).resolve(), folder, dirs_exist_ok=True)
    return str(folder)


def test_model_may_be_called_as_the_sft_baseline_but_not_as_given_outputs(finished: Path, tmp_path: Path) -> None:
    sources = [str(finished), weights_of_m2(finished, tmp_path / "SFT")]
    rows = models(evaluate_models(sources, [], conf_folder()))
    assert rows["SFT"]["eval/answers"] == rows[f"{finished.name}.M2"]["eval/answers"]
    outputs = tmp_path / "outputs.json"
    asked = read_records(finished / "artifacts/questions/instructions.jsonl", Instruction)
    outputs.write_text(json.dumps([{"instruction": one.text, "output": "So."} for one in asked]), encoding="utf-8")
    with pytest.raises(SelfalignError, match=r"a model is named given, like the outputs of evaluate.reference_outputs"):
        evaluate_models(
            [str(finished), weights_of_m2(finished, tmp_path / "given")],
            [f"evaluate.reference_outputs={outputs}"],
            conf_folder(),
        )


@pytest.mark.parametrize("name", ["questions", "judge", "iteration_1", "evaluation_1"])
def test_model_may_not_be_called_as_another_artifact(finished: Path, tmp_path: Path, name: str) -> None:
    """Its link would take the place of the other's, and the drops of that would be told nowhere."""
    with pytest.raises(SelfalignError, match=rf"a model cannot be named {name}, .* rename its folder"):
        evaluate_models([str(finished), weights_of_m2(finished, tmp_path / name)], [], conf_folder())


def test_other_model_is_asked_as_the_command_line_says_and_settings_without_effect_are_told(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = weights_of_m2(finished, tmp_path / "other")
    edited = edited_since(finished, tmp_path.name, {"model": {"system_prompt": "Be kind."}})
    given, nothing = "model.system_prompt='Be brief.'", ["evaluate.instructions=''", "data.seed_data.ranked=''"]

    evaluate_models([str(edited), other], nothing, conf_folder())
    [line] = [line for line in caplog.messages if "is asked without" in line]
    assert line.startswith(f"{other} is asked without model.system_prompt of the runs")
    caplog.clear()
    folder = evaluate_models([str(edited), other], [given, "model.lora.rank=4", *nothing], conf_folder())
    inputs = read_json(folder / "artifacts/other/manifest.json")["inputs"]
    assert inputs["model"]["system_prompt"] == "Be brief."
    assert not any("is asked without" in line for line in caplog.messages)
    told = [line for line in caplog.messages if line.startswith("model.")]
    assert told == ["model.lora.rank=4 has no effect: the models to evaluate are named, and nothing is trained"]
    caplog.clear()
    evaluate_models([str(finished)], [given, *nothing], conf_folder())
    assert f"{given} has no effect: the models of a run are asked as they were trained" in caplog.messages


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ({"loss": {"beta": 0.7}}, "loss.beta=0.7 is now 0.1"),
        ({"judge": {"prompt": "Rate {instruction} {response}"}}, "judge.prompt=Rate {instruction} {response} is now "),
        ({"evaluate": {"head_to_head": None}}, "evaluate.head_to_head=null is now {"),
    ],
    ids=["loss", "rubric", "comparison"],
)
def test_run_whose_options_or_files_were_edited_since_is_not_measured_by_what_they_say_now(
    finished: Path, tmp_path: Path, then: dict[str, Any], told: str
) -> None:
    """The run was started with options that said so then; its overrides compose to something else today."""
    edited = edited_since(finished, tmp_path.name, then)
    with pytest.raises(SelfalignError, match=re.escape(told)) as raised:
        evaluate_models([str(edited)], ["evaluate.instructions=''"], conf_folder())
    assert str(edited) in str(raised.value)
    # Of a run that is measured beside the first only its own rewards are.
    of_rewards = then.keys() == {"loss"}
    with pytest.raises(SelfalignError, match=re.escape(told)) if of_rewards else nullcontext():
        evaluate_models([str(finished), str(edited)], ["evaluate.instructions=''"], conf_folder())


def test_what_is_given_on_the_command_line_may_be_another_than_the_run_had(finished: Path, tmp_path: Path) -> None:
    edited = edited_since(finished, tmp_path.name, {"loss": {"beta": 0.7}})
    asked = ["loss.beta=0.7", "evaluate.instructions=''", "evaluate.preference_pairs.source=ranked"]
    folder = evaluate_models([str(edited)], asked, conf_folder())
    assert read_json(folder / "artifacts/evaluation_M2/preferences/manifest.json")["inputs"]["beta"] == 0.7


def edited_since(finished: Path, name: str, then: dict[str, dict[str, Any]]) -> Path:
    """A copy of a run, whose settings were these when it was made."""
    copy = finished.with_name(name)
    shutil.copytree(finished, copy, symlinks=True)
    summary = read_json(copy / "summary.json")
    for group, settings in then.items():
        summary["config"][group] |= settings
    write_json(copy / "summary.json", summary)
    return copy


def test_questions_that_a_measured_run_was_taught_are_not_held_out(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the file of ranked questions has grown since, so that others of them are held out."""
    taught = read_records(finished / "artifacts/seeds/taught.jsonl", RankedAnswers)
    held_out = read_records(finished / "artifacts/seeds/ranked.jsonl", RankedAnswers)
    rows = [
        {
            "instruction": q.instruction,
            "responses": [{"text": t, "rank": r} for t, r in zip(q.texts, q.ranks, strict=True)],
        }
        for q in [*taught, *held_out]
    ]
    source = tmp_path / "ranked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = [f"data.seed_data.ranked={source}", "data.seed_data.held_out_share=0.99", "evaluate.instructions=''"]
    asked.append("data.seed_data.eft_source=none")
    folder = evaluate_models([str(finished)], asked, conf_folder())
    known = {question.instruction for question in taught}
    again = read_records(folder / "artifacts/ranked/ranked.jsonl", RankedAnswers)
    assert again
    assert not {question.instruction for question in again} & known
    counts = read_json(folder / "artifacts/ranked/manifest.json")["counts"]
    assert counts == {"questions_held_out": len(again), "dropped": {"trained_on": len(rows) - len(again)}}
    for row in models(folder).values():
        assert row["judge_quality/questions"] == len(again)
        assert row["instrument/judge/comparisons"] == sum(math.comb(len(question.texts), 2) for question in again)


def test_data_that_changed_since_a_run_are_named(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = finished.parents[1] / "data/asked.jsonl"
    before = source.read_text(encoding="utf-8")
    names = [tracked_id(evaluate_models([str(finished)], [], conf_folder())) for _ in range(2)]
    try:
        source.write_text(f'{before}{{"instruction": "What is a moon?"}}\n', encoding="utf-8")
        folder = evaluate_models([str(finished)], [], conf_folder())
    finally:
        source.write_text(before, encoding="utf-8")
    assert names[0] == names[1] != tracked_id(folder)
    assert f"evaluate.instructions={source} holds other data than when {finished.name} was made" in caplog.text
    assert {row["eval/answers"] for row in models(folder).values()} == {4}


def test_model_that_is_its_own_reference_has_no_rewards(finished: Path) -> None:
    """All of them are 0, so that it would seem to order no pair as humans do."""
    settings = [o for o in read_json(finished / "summary.json")["config"]["overrides"] if not o.startswith("data.")]
    pairs = finished.parents[1] / "data/pairs.jsonl"
    pairs.write_text('{"instruction": "Name a metal.", "chosen": "Zinc.", "rejected": "Wood."}\n', encoding="utf-8")
    asked = ["data=self_rewarding_smoke", f"evaluate.preference_pairs.source={pairs}", "evaluate.instructions=''"]
    [row] = models(evaluate_models(["random:tiny"], [*settings, *asked], conf_folder())).values()
    assert not [name for name in row if name.startswith("preferences/")]


@pytest.mark.parametrize("ours", ["judge=expected_score", "judge=implicit"])
def test_model_from_elsewhere_has_no_rewards(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: str
) -> None:
    """Its log-ratios to another model's M0 say nothing about how it was trained."""
    other = tmp_path / "other"
    for part in ("weights", "tokenizer"):
        shutil.copytree((finished / f"artifacts/M2/{part}").resolve(), other, dirs_exist_ok=True)
    asked = ["evaluate.preference_pairs.source=ranked", "evaluate.instructions=''"]
    judge = [ours, *(["data.seed_data.eft_source=none"] if ours == "judge=implicit" else [])]
    with caplog.at_level("WARNING"):
        rows = models(evaluate_models([str(finished), str(other)], [*asked, *judge], conf_folder()))
    assert "preferences/rewards/margins" in rows[f"{finished.name}.M2"]
    assert not [name for name in rows["other"] if name.startswith("preferences/")]
    assert "other has no rewards on the held-out pairs, because its reference is not known" in caplog.text
    judges = "judge_quality/pairwise_accuracy" in rows["other"]
    assert judges == ("cannot judge by its implicit reward" not in caplog.text) == (ours != "judge=implicit")


def test_evaluation_can_be_reported_again(finished: Path, tmp_path: Path) -> None:
    folder = evaluate_models([str(finished)], [], conf_folder())
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert report([folder]).read_text(encoding="utf-8") == page
    assert report([folder, finished], tmp_path).exists()


@pytest.mark.parametrize("broken", ["unfinished", "nothing", "twice"])
def test_what_cannot_be_measured_is_named(finished: Path, tmp_path: Path, broken: str) -> None:
    sources, named = {
        "unfinished": ([str(tmp_path / "run")], "is not finished"),
        "nothing": ([str(tmp_path / "nowhere")], "the model to evaluate"),
        "twice": ([str(finished), str(finished)], "have the same name"),
    }[broken]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    extra = [f"output_dir={tmp_path}", "experiment=smoke"] if broken != "twice" else []
    with pytest.raises(SelfalignError, match=named):
        evaluate_models(sources, extra, conf_folder())


def test_command_says_how_it_is_used_and_fails_in_one_line(tmp_path: Path) -> None:
    def command(*arguments: str) -> CompletedProcess[Any]:
        code = "from selfalign.cli.evaluate import evaluate; evaluate()"
        return warm.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
        )

    assert command().returncode == 2
    assert command("--help").returncode == 0
    told = command("nowhere", "experiment=smoke")
    assert told.returncode == 1
    assert told.stderr.strip().splitlines()[-1].startswith("error: the model to evaluate")


def test_each_run_is_measured_by_its_own_loss_and_reference_and_against_its_own_training(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the first run are another β, another reference, and pairs that the second was trained on."""
    settings = read_json(finished / "summary.json")["config"]["overrides"]
    asked = ["evaluate.preference_pairs.source=ranked", "evaluate.instructions=''"]
    own = ["loss.beta=0.3", "train.reference_policy=sft", "loss.refinement.scale=10", "judge.max_score=6", "name=own"]
    given = ["iterations=2", "data.seed_data.max_demonstrations=4", "seed=3"]
    other = run(finished.parent, *settings, *own, *given, *asked)
    with caplog.at_level("WARNING"):
        folder = evaluate_models([str(finished), str(other)], asked, conf_folder())
    said = f"the runs differ in data.seed_data, judge: all models are evaluated with the settings of {finished.name}"
    assert said in caplog.text
    for name in ("M1", "M2", "M3"):
        alone = read_json(other / f"artifacts/evaluation_{name}/preferences/manifest.json")
        beside = read_json(folder / f"artifacts/evaluation_{other.name}.{name}/preferences/manifest.json")
        for key in ("beta", "policy", "reference"):
            assert beside["inputs"][key] == alone["inputs"][key], (name, key)
        taught = [known["digest"] for known in alone["inputs"]["trained_on"]]
        assert {*taught} <= {known["digest"] for known in beside["inputs"]["trained_on"]}


def test_model_of_a_later_loss_has_the_rewards_of_that_loss(tmp_path: Path) -> None:
    """As in its run, where `at.2.loss` made M3."""
    made = {
        Label.model(name): Artifact(stage="s", key=name, path=tmp_path, digest=name, counts={}, seconds=0.0)
        for name in ("M0", "SFT", "M1", "M2", "M3", "M4")
    }
    config, _, plain = composed(*TINY_RUN, "iterations=3", "loss.beta=0.1", "+loss@at.2.loss=ipo", "at.2.loss.beta=0.7")
    later, plainer = (FinishedRun("r", tmp_path, made, {**plain, "at": at}) for at in (plain["at"], {}))
    entered: list[Any] = later.contestants(config, named=False)
    rated = {one.name: (one.loss.title, one.loss.beta) for one in entered}
    first, last = ("Sr-DPO", 0.1), ("IPO", 0.7)
    assert rated == {"M1": first, "M2": first, "M3": last, "M4": last, "SFT": first}
    assert training_of(later) != training_of(plainer)
    del plainer.settings["at"]
    assert training_of(plainer), "a run of before there was `at`"
