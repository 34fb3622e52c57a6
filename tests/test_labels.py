"""Labels are written and read in one place, and say of an artifact what it belongs to."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import ROOT, composed, planned
from test_studies import STUDIES, study

from selfalign.pipeline.loop import plan
from selfalign.runs.labels import INPUTS, Kind, Label

LABELS = ROOT / "selfalign/runs/labels.py"


@pytest.mark.parametrize("experiment", STUDIES)
def test_every_label_of_a_run_is_read_back_as_it_was_written(experiment: str) -> None:
    labels = [one.label for one in plan(study(experiment))]
    assert len(set(map(str, labels))) == len(labels) > 5
    assert [Label.parse(str(label)) for label in labels] == labels


def test_labels_are_spelled_as_links_and_metrics_have_them() -> None:
    more = ("iterations=2", "benchmark=[mt_bench]", "evaluate.round_robin=true", "evaluate.compare_benchmarks=true")
    texts = set(planned(composed("experiment=smoke", *more)[0]))
    assert {"seeds", "questions", "M0", "M1", "M3", "iteration_1/pairs", "iteration_2/judgements"} <= texts
    assert {"evaluation_M3/numbers", "evaluation_M3/against_M2", "evaluation_M3/mt_bench_against_M1"} <= texts


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("seeds", Label.input("seeds")),
        ("judges/mt_bench", Label.input("judges", "mt_bench")),
        ("preferences/pairs", Label.input("preferences", "pairs")),
        ("M12", Label.model("M12")),
        ("SFT", Label.model("SFT")),
        ("iteration_12/pairs", Label.iteration(12, "pairs")),
        ("evaluation_SFT/numbers", Label.evaluation("SFT", "numbers")),
        ("evaluation_job_1.M2/answers", Label.evaluation("job_1.M2", "answers")),
        ("evaluation_M3/against_M1", Label.comparison("M3", "M1")),
        ("evaluation_M3/mt_bench_against_M1", Label.comparison("M3", "M1", "mt_bench")),
        ("Mistral-7B", Label.input("Mistral-7B")),
        ("iteration_of_mine", Label.input("iteration_of_mine")),
    ],
)
def test_label_is_written_and_read(text: str, label: Label) -> None:
    assert (str(label), Label.parse(text)) == (text, label)


@pytest.mark.parametrize(
    ("text", "serves"),
    [
        ("ift", "SFT"), ("evaluation_SFT/numbers", "SFT"), ("eft/judgements", "M1"), ("M1", "M1"),
        ("iteration_1/pairs", "M2"), ("iteration_10/pairs", "M11"), ("evaluation_M2/numbers", "M2"),
        ("seeds", "seeds"), ("my-model", "my-model"), ("evaluation_my-model/answers", "my-model"),
    ],
)  # fmt: skip
def test_label_tells_the_model_that_it_serves(text: str, serves: str) -> None:
    assert Label.parse(text).serves == serves


@pytest.mark.parametrize(
    ("text", "opponent", "benchmark"),
    [
        ("evaluation_M3/against_M1", "M1", ""),
        ("evaluation_M3/against_given", "given", ""),
        ("evaluation_M3/mt_bench_against_M2", "M2", "mt_bench"),
        ("evaluation_M3/mt_bench", "", ""),
        ("M3", "", ""),
    ],
)
def test_comparison_tells_the_opponent_and_the_benchmark(text: str, opponent: str, benchmark: str) -> None:
    label = Label.parse(text)
    assert (label.opponent, label.benchmark) == (opponent, benchmark)


def test_models_that_a_run_trains_and_those_that_it_aligns_are_told_apart() -> None:
    texts = ("M0", "SFT", "M1", "M2", "M10", "judge", "seeds", "iteration_1/pairs", "evaluation_M2/numbers")
    labels = [Label.parse(text) for text in texts]
    assert [str(label) for label in labels if label.is_trained] == ["SFT", "M1", "M2", "M10"]
    assert [str(label) for label in labels if label.is_aligned] == ["M2", "M10"]
    assert Label.parse("M2/validation").kind is Kind.MODEL
    assert not Label.parse("M2/validation").is_trained


def test_scores_of_the_run_s_judge_are_not_those_of_the_held_out_pairs() -> None:
    judged = ("iteration_1/judgements", "eft/judgements", "evaluation_M1/scores", "evaluation_SFT/ranked_scores")
    assert all(Label.parse(text).is_judged for text in judged)
    assert not any(Label.parse(text).is_judged for text in ("preferences/scores", "judge", "evaluation_M1/answers"))


# --- nobody else ---------------------------------------------------------------------------------------------------

SPELLED = re.compile(r"(iteration|evaluation)_($|\d|M\d|SFT|\(|\[|\\)|(^|_|/)against_($|\W)")
"""A text that is, or is a pattern of, the beginning of a label."""

TAKES_APART = {"match", "fullmatch", "partition", "rpartition", "split", "startswith", "endswith", "removeprefix"}


def texts_of(tree: ast.Module) -> Iterator[str]:
    """Every text of a module besides its docstrings."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


def taken_apart(tree: ast.Module) -> Iterator[str]:
    """Calls that take something apart that is called a label."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TAKES_APART:
            names = [ast.unparse(part) for part in (node.func.value, *node.args)]
            yield from (name for name in names if re.search(r"\blabel\b", name))


def spelling(path: Path) -> list[str]:
    """Where a module writes or parses labels."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [*(text for text in texts_of(tree) if SPELLED.search(text)), *taken_apart(tree)]


def test_no_other_module_writes_or_parses_labels() -> None:
    found = {path: places for path in (ROOT / "selfalign").rglob("*.py") if (places := spelling(path))}
    assert found.keys() == {LABELS}


def test_no_model_may_be_named_as_an_input_or_another_artifact() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "selfalign").rglob("*.py")]
    assert {name for text in sources for name in re.findall(r'Label\.input\("(\w+)"', text)} == INPUTS
    refused = [*INPUTS, "iteration_2", "evaluation_old"]
    assert [name for name in refused if Label.names_model(name)] == []
    allowed = ["M2", "SFT", "smoke-1a2b3c4d.M2", "my_questions", "checkpoint-500", "iteration_x"]
    assert [name for name in allowed if not Label.names_model(name)] == []
