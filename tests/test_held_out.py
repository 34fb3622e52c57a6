"""A tiny run that measures its models on held-out pairs, and what becomes of bounds that are crossed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from builders import TINY_RUN, artifact, composed, metrics, planned, run, write_tiny_data

from selfalign.config.experiment import ExperimentConfig
from selfalign.config.hydra import choices
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import PairMargin, PreferencePair
from selfalign.launch.experiment import run_experiment
from selfalign.metrics.bounds import MetricBounds
from selfalign.runs.tracker import NoTracker
from selfalign.training.splits import KnownTexts, split_pairs

ASKED = ["Say one thing about bees.", "Name a bird.", "Name a fish.", "How is tea made?", "Why is the sky blue?"]
"""The first is a demonstration's prompt."""


@dataclass(frozen=True)
class Recorder(NoTracker):
    """A tracker that keeps its rows."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


@dataclass
class Recording:
    """A choice of `tracker` that hands out one recorder."""

    tracker: Recorder = field(default_factory=Recorder)

    def check_installed(self) -> None:
        pass

    @contextmanager
    def open(self, folder: Path, config: dict[str, Any]) -> Iterator[Recorder]:
        yield self.tracker


@dataclass(frozen=True)
class Study:
    """A finished run with held-out pairs and a bound that every alignment crosses."""

    output: Path
    overrides: tuple[str, ...]
    config: ExperimentConfig
    folder: Path
    tracked: list[dict[str, Any]]
    warned: str


def recorded(output: Path, *overrides: str) -> tuple[ExperimentConfig, Path, Recorder]:
    config, text, plain = composed(*overrides, f"output_dir={output}")
    recording = Recording()
    config.tracker = {"recording": recording}
    folder = run_experiment(config, text, {**plain, "choices": choices(config)})
    return config, folder, recording.tracker


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("held_out")
    rows = [
        {"id": f"p{n}", "prompt": [{"role": "user", "content": text}], "chosen": answer("Old things are good"),
         "rejected": answer("No" + "." * n)}
        for n, text in enumerate(ASKED)
    ]  # fmt: skip
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (
        *TINY_RUN,
        *write_tiny_data(root / "data"),
        f"evaluate.preference_pairs.source={root / 'pairs.jsonl'}",
        "judge@evaluate.preference_pairs.judge=expected_score",
        "evaluate.preference_pairs.judge.model=sft",
        *(
            f"evaluate.bounds.{name}={0 if name == 'min_rejected_logp_change' else 'null'}"
            for name, *_ in MetricBounds().bounds()
        ),
        "train.align.learning_rate=0.01",
        "data.seed_data.eft_source=human",
    )
    config, folder, tracker = recorded(root / "outputs", *overrides)
    return Study(root / "outputs", overrides, config, folder, tracker.rows, (folder / "run.log").read_text())


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def counts(study: Study, label: str) -> dict[str, Any]:
    return read_json(study.folder / "artifacts" / label / "manifest.json")["counts"]


def inputs(study: Study, label: str) -> dict[str, Any]:
    return read_json(study.folder / "artifacts" / label / "manifest.json")["inputs"]


def measured(study: Study, model: str) -> list[PairMargin]:
    return read_records(study.folder / f"artifacts/evaluation_{model}/preferences/preferences.jsonl", PairMargin)


def test_planned_stages_are_those_that_are_made_in_their_order(study: Study) -> None:
    made = [stage["label"] for stage in read_json(study.folder / "summary.json")["stages"]]
    assert planned(study.config) == made
    assert len([label for label in made if "/logp" in label or "/reference_logp" in label]) == 4  # M0 … M3, each once
    assert made.count("preferences/scores") == 1


def test_every_model_is_measured_against_its_own_reference(study: Study) -> None:
    digest = {name: inputs(study, f"evaluation_{name}/logps")["policy"]["digest"] for name in ("M1", "M2", "M3")}
    made = read_json(study.folder / "summary.json")["stages"]
    assert {name: read_json(study.folder / f"artifacts/{name}/manifest.json")["digest"] for name in digest} == digest
    scored = {label: read_json(study.folder / f"artifacts/{label}/manifest.json")["digest"] for label in
              [stage["label"] for stage in made] if "/logp" in label or "/reference_logp" in label}  # fmt: skip
    references = {"M1": "evaluation_M1/reference_logprobs", "M2": "evaluation_M1/logps", "M3": "evaluation_M2/logps"}
    for name, label in references.items():
        place = inputs(study, f"evaluation_{name}/preferences")
        assert place["policy"]["digest"] == scored[f"evaluation_{name}/logps"]
        assert place["reference"]["digest"] == scored[label]
        assert place["beta"] == study.config.loss.beta
    assert all(len({pair.margin for pair in measured(study, name)}) > 1 for name in references)


def test_prompts_that_were_trained_on_are_dropped(study: Study) -> None:
    for name in ("M1", "M2", "M3"):
        assert [pair.id for pair in measured(study, name)] == ["p1", "p2", "p3", "p4"]
        assert counts(study, f"evaluation_{name}/preferences")["dropped"] == {"trained_on": 1, "too_long": 0}
    assert len(inputs(study, "evaluation_M3/preferences")["trained_on"]) == 3  # seeds and the pairs of two iterations


def test_judge_scores_the_pairs_once_for_all_models(study: Study) -> None:
    differences = [[pair.score_difference for pair in measured(study, name)] for name in ("M1", "M2", "M3")]
    assert differences[0] == differences[1] == differences[2]
    assert None not in differences[0]
    m1 = read_json(study.folder / "artifacts/M1/manifest.json")["digest"]
    assert inputs(study, "preferences/scores")["policy"]["digest"] == m1


def test_numbers_reach_summary_metrics_tracker_and_report(study: Study) -> None:
    row = read_json(study.folder / "summary.json")["models"][-1]
    found = counts(study, "evaluation_M3/preferences")
    wanted = {name: value for name, value in found.items() if name.startswith("preferences/")}
    assert {"preferences/rewards/margins", "preferences/refinement/mean", "preferences/scored"} <= wanted.keys()
    assert wanted.items() <= row.items()
    assert row["pairs"] == counts(study, "M3")["pairs"]
    for rows in (metrics(study.folder), study.tracked):
        assert any(wanted.items() <= logged.items() for logged in rows)
    page = (study.folder / "report.html").read_text()
    for section in ("held-out-pairs", "drift", "training-time"):
        assert f'<section id="{section}">' in page
    assert "Held-out pairs: accuracy" in page


def test_crossed_bound_is_a_warning_in_log_report_and_tracker(study: Study) -> None:
    change = counts(study, "M2")["logps/rejected_change_per_token"]
    assert change < 0
    assert counts(study, "evaluation_M2/numbers")["bound_violated"]["min_rejected_logp_change"] == change
    said = "evaluation_M2/numbers: logps/rejected_change_per_token is "
    assert f"WARNING {said}{change:.3g}, below evaluate.bounds.min_rejected_logp_change=0" in study.warned
    assert {"bound_violated/min_rejected_logp_change": change}.items() <= next(
        row.items()
        for row in study.tracked
        if "bound_violated/min_rejected_logp_change" in row and row["iteration"] == 1
    )
    page = (study.folder / "report.html").read_text()
    warning = page.split("Warning: metrics outside their bounds")[1].split("</p>")[0]
    assert "M2: min rejected logp change" in warning


def test_crossed_bound_ends_the_run_where_that_is_asked_for(study: Study) -> None:
    with pytest.raises(SelfalignError, match=r"evaluation_M2/numbers: logps/rejected_change_per_token .*stop=true"):
        recorded(study.output, *study.overrides, "evaluate.bounds.stop=true", "name=stopped")
    assert not list(study.output.glob("stopped-*/artifacts/M3"))
    assert list(study.output.glob("stopped-*/artifacts/M2"))


def test_pairs_set_aside_share_nothing_with_seeds_nor_with_pairs_of_earlier_iterations(tmp_path: Path) -> None:
    """All ordered pairs, of all iterations so far: those of the first were trained on when those of both are."""
    overrides = [
        *TINY_RUN,
        *write_tiny_data(tmp_path / "data"),
        "evaluate=none",
        "tracker=none",
        "pair.max_similarity=1",
    ]
    folder = run(tmp_path, *overrides, "pair=all_ordered", "train.validation_pairs=1", "data.accumulate_pairs=true")
    made = {
        label: read_records(folder / f"artifacts/iteration_{label}.jsonl", PreferencePair)
        for label in ("1/pairs/pairs", "2/pairs/pairs", "2/all_pairs/pairs")
    }
    first, second, both = made.values()
    assert [pair.id for pair in both] == [pair.id for pair in (*first, *second)]
    seeds, earlier = (artifact(folder / f"artifacts/{label}") for label in ("seeds", "iteration_1/pairs"))
    for model, pairs, trained_on in (("M2", first, [seeds]), ("M3", both, [seeds, earlier])):
        split = split_pairs(pairs, 1, KnownTexts.of(trained_on))
        manifest = read_json(folder / f"artifacts/{model}/manifest.json")
        counts = {name: manifest["counts"][name] for name in ("pairs", "validation_pairs", "held_out_passed_over")}
        expected = {"pairs": len(split.training), "validation_pairs": 1, "held_out_passed_over": split.passed_over}
        assert counts == expected
        assert manifest["counts"]["dropped"]["beside_held_out"] == split.beside
        stored = [read_json(one.path.resolve() / "manifest.json")["digest"] for one in trained_on]
        assert [given["digest"] for given in manifest["inputs"]["trained_on"]] == stored
    (row,) = split.held_out.tolist()
    assert row >= len(first), "held out for M3 is a pair that M2 was not trained on"
    assert split.passed_over >= len(first)


def test_given_pairs_of_which_too_few_can_be_set_aside_end_the_run_before_any_model_is_trained(tmp_path: Path) -> None:
    rows = [{"prompt": f"Ask {n}.", "chosen": f"Good {n}.", "rejected": "No."} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["experiment=smoke", "evaluate=none", "tracker=none", "data=pairs", f"data.path={tmp_path}/pairs.jsonl"]
    with pytest.raises(SelfalignError, match=r"train\.validation_pairs=2, but only 1 of 6 pairs share no prompt"):
        run(tmp_path, *overrides, "iterations=1", "train.validation_pairs=2")
    assert not list(tmp_path.glob("smoke-*/artifacts/M*"))


def test_training_times_of_two_runs_are_told_side_by_side(study: Study) -> None:
    from selfalign.report.timing import training_times

    rows = training_times([study.folder, study.folder])
    assert [row["model"] for row in rows] == ["M1", "M2", "M3"] * 2
    assert {row["run"] for row in rows} == {study.folder.name}
    _, aligned, _ = rows[:3]
    assert (aligned["loss"], aligned["lam"], aligned["beta"]) == ("Sr-DPO", 0.5, 0.1)
    assert aligned["steps"] == aligned["pairs"] == counts(study, "M2")["pairs"]
    log = [json.loads(line) for line in (study.folder / "artifacts/M2/log.jsonl").read_text().splitlines()]
    assert aligned["seconds"] == pytest.approx(sum(row["step_seconds"] for row in log))
    assert (
        aligned["reference_seconds"]
        == read_json(study.folder / "artifacts/iteration_1/reference/manifest.json")["seconds"]
    )
    manifest = read_json(study.folder / "artifacts/M2/manifest.json")
    assert 0 < aligned["seconds"] <= manifest["seconds"]
