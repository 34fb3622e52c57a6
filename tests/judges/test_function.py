"""A function of the user's as a judge: what it is called with, what it may return, and who may name it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from builders import ROOT, TINY_RUN, composed, response, write_tiny_data
from judging import ANSWERS, given, judged, run_judge, scores

from selfalign.cli.environment import conf_folder
from selfalign.config.overrides import check_recorded
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import JudgementStatus, Response, ResponseScore
from selfalign.judges.function import FunctionScore
from selfalign.launch.evaluate import evaluate_models
from selfalign.store import source_code as code
from selfalign.store.key import to_key_json

WORDS = "def score(batch):\n    return [len(one.response.text.split()) for one in batch]\n"


@pytest.fixture(autouse=True)
def _nothing_stays_imported() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    for cached in (code.function_at, code._digest, code.source_code):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "file:mine")]:
        del sys.modules[name]


def judge_of(folder: Path, text: str, **settings: Any) -> FunctionScore:
    (folder / "mine.py").write_text(text)
    forget()
    return FunctionScore(function=f"{folder}/mine.py:score", **settings)


# --- what it is called with and returns --------------------------------------------------------------------------


def test_score_is_what_the_function_returns(tmp_path: Path) -> None:
    counts, judgements = judged(tmp_path, judge_of(tmp_path, WORDS), None)
    assert {name: one.score for name, one in judgements.items()} == {
        "bees-1": 5.0, "bees-2": 1.0, "bees-3": 18.0, "tea-1": 5.0, "tea-2": 8.0,
    }  # fmt: skip
    assert judgements["tea-1"].model == f"{tmp_path}/mine.py:score"
    assert counts["dropped"] == {}


def test_function_sees_all_responses_of_an_instruction_together_and_no_thoughts(tmp_path: Path) -> None:
    text = (
        "def score(batch):\n"
        "    (asked,) = {one.instruction.text for one in batch}\n"
        "    return [f'{asked} {len(batch)} {one.response.text}' for one in batch]\n"
    )
    answers = [*ANSWERS[:3], response("tea-1", "<think>\nWell.\n</think>\nHot water.")]
    kind = judge_of(tmp_path, text, instructions_per_call=1, max_failure_rate=1)
    _, judgements = judged(tmp_path, kind, None, **given(tmp_path, answers))
    assert judgements["bees-2"].text == "What do bees do all day? 3 Nothing."
    assert judgements["tea-1"].text == "How is tea made? 1 Hot water."


def test_response_without_a_score_is_counted_with_its_reason(tmp_path: Path) -> None:
    text = "def score(batch):\n    return [0.5, None, 'no unit tests', 2, 1]\n"
    counts, judgements = judged(tmp_path, judge_of(tmp_path, text), None)
    assert [one.text for one in judgements.values()] == ["", "no score", "no unit tests", "", ""]
    assert judgements["bees-2"].status is JudgementStatus.NO_SCORE
    assert [one.score for one in scores(tmp_path).values()] == [0.5, None, None, 2.0, 1.0]
    assert counts["dropped"] == {"no_score": 2}


def test_too_many_failures_stop_the_run_and_show_reasons(tmp_path: Path) -> None:
    text = "def score(batch):\n    return ['the compiler is missing'] * 3 + [1, 2]\n"
    with pytest.raises(
        SelfalignError, match=r"3 of 5 judgements carry no score .*'the compiler is missing'.*Mend what"
    ):
        run_judge(tmp_path, judge_of(tmp_path, text), None)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("[1.0] * (len(batch) - 1)", "a score for each of 5 responses, got 4 values"),
        ("None", "a score for each of 5 responses, got None"),
        ("'12345'", "a score for each of 5 responses, got '12345'"),
        ("{one.response.id: 1 for one in batch}", "a score for each of 5 responses, got an object"),
        ("{float(n) for n, one in enumerate(batch)}", "a score for each of 5 responses, got"),
        ("[1, 2, float('nan'), 4, 5]", "expected a finite number for response bees-3.*got nan"),
        ("[1, 2, 3, 10**400, 5]", "expected a finite number for response tea-1"),
        ("[True] * 5", "expected a finite number for response bees-1.*got True"),
        ("[[1]] * 5", "expected a finite number for response bees-1.*got a list of 1"),
        ("['  '] * 5", "expected a finite number for response bees-1"),
        ("[one.response.txt for one in batch]", r"AttributeError: .*'txt'.* \(.*mine\.py:2\)$"),
    ],
)
def test_anything_else_ends_the_run_in_one_line_that_names_the_function(
    tmp_path: Path, returned: str, problem: str
) -> None:
    kind = judge_of(tmp_path, f"def score(batch):\n    return {returned}\n")
    with pytest.raises(SelfalignError, match=rf"^judge\.function=\S+mine\.py:score: .*{problem}") as error:
        run_judge(tmp_path, kind, None)
    assert "\n" not in str(error.value)


def test_finished_calls_survive_an_error(tmp_path: Path) -> None:
    text = (
        "import pathlib\n"
        "seen = pathlib.Path(__file__).with_name('seen')\n"
        "def score(batch):\n"
        "    with seen.open('a') as file:\n"
        "        file.write(batch[0].instruction.id + '\\n')\n"
        "    if batch[0].instruction.id == 'tea' and not seen.with_name('mended').exists():\n"
        "        return 1 / 0\n"
        "    return [1] * len(batch)\n"
    )
    kind = judge_of(tmp_path, text, instructions_per_call=1)
    with pytest.raises(SelfalignError, match="ZeroDivisionError: division by zero"):
        run_judge(tmp_path, kind, None)
    (tmp_path / "mended").touch()
    run_judge(tmp_path, kind, None)
    assert (tmp_path / "seen").read_text().split() == ["bees", "tea", "tea"]


# --- its code ----------------------------------------------------------------------------------------------------


def test_code_of_the_function_is_part_of_the_key_wherever_it_lies(tmp_path: Path) -> None:
    keys = []
    for folder, text in (("a", WORDS), ("b", WORDS), ("b", WORDS + "\n")):
        (tmp_path / folder).mkdir(exist_ok=True)
        keys.append(to_key_json(judge_of(tmp_path / folder, text)))
    assert keys[0]["source code"] == keys[1]["source code"] != keys[2]["source code"]
    assert keys[0]["source code"].keys() == {"mine.py"}


def test_file_that_is_edited_during_a_run_is_called_as_it_was(tmp_path: Path) -> None:
    kind = judge_of(tmp_path, WORDS)
    key = to_key_json(kind)
    (tmp_path / "mine.py").write_text("def score(batch):\n    return [0] * len(batch)\n")
    assert to_key_json(kind) == key
    _, judgements = judged(tmp_path, kind, None)
    assert judgements["bees-1"].score == 5


def test_function_of_a_package_counts_with_all_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("")
    (tmp_path / "mine/rules.py").write_text(
        "from mine.help import points\ndef score(batch):\n    return points(batch)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = []
    for number in (1, 2):
        (tmp_path / "mine/help.py").write_text(f"def points(batch):\n    return [{number}.0] * len(batch)\n")
        forget()
        keys.append(to_key_json(FunctionScore(function="mine.rules:score"))["source code"])
    assert keys[0].keys() == {"mine"}
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("mine.py", r"^judge\.function must be FILE\.py:NAME or package\.module:NAME, got 'mine\.py'"),
        ("mine:", r"^judge\.function must be"),
        ("/none/mine.py:score", r"^judge\.function=/none/mine\.py:score: /none/mine\.py: no such file"),
        ("{}/mine.py:scores", r"mine\.py has no function scores; it has score$"),
        ("{}/bad.py:score", r"cannot import .*bad\.py: NameError: name 'x' is not defined"),
        ("nowhere.rules:score", r"^judge\.function=nowhere\.rules:score: no module nowhere"),
    ],
)
def test_function_that_cannot_be_called_is_refused(tmp_path: Path, function: str, problem: str) -> None:
    (tmp_path / "mine.py").write_text(WORDS)
    (tmp_path / "bad.py").write_text("x\n")
    with pytest.raises(SelfalignError, match=problem):
        to_key_json(FunctionScore(function=function.format(tmp_path)))


def test_it_cannot_be_taught() -> None:
    with pytest.raises(SelfalignError, match=r"FunctionScore writes no judgements .*data\.seed_data\.eft_source=none"):
        composed("experiment=smoke", "judge=function", "judge.function=mine.py:score")
    with pytest.raises(SelfalignError, match=r"set judge\.function=…; it has no default"):
        composed("experiment=smoke", "judge=function", "data.seed_data.eft_source=none")


# --- who may name it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "judge.function=evil.py:f", "++judge.function=evil.py:f", "evaluate.preference_pairs.judge.function=evil.py:f",
        "evaluate.preference_pairs={judge:{function:'evil.py:f'}}",
    ],
)  # fmt: skip
def test_function_that_only_a_run_folder_names_is_refused_with_what_to_give(override: str) -> None:
    with pytest.raises(SelfalignError, match=r"^outputs/run: its setting .* names a function, .* give '?[a-z_.]+="):
        check_recorded(["judge=function", override], Path("outputs/run"), ["seed=1"])


def test_function_that_the_command_names_too_is_taken() -> None:
    recorded = ["judge=function", "judge.function=mine.py:score"]
    check_recorded(recorded, Path("outputs/run"), ["judge.function=mine.py:score"])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the checkout with the judge of docs/judges.md, and a run that was judged by it."""
    folder = tmp_path_factory.mktemp("user")
    page = (ROOT / "docs/judges.md").read_text("utf-8")
    (folder / "my_judge.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    said = warm.run(
        [
            sys.executable, "-P", "-m", "selfalign", *TINY_RUN, "iterations=1", "judge=function",
            "judge.function=my_judge.py:score", "data.seed_data.eft_source=none", *write_tiny_data(folder / "data"),
            "output_dir=outputs", "name=run",
        ],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return folder


def test_judge_of_the_documentation_judges_a_run(ran: Path) -> None:
    [folder] = ran.glob("outputs/run-*")
    made = read_records(folder / "artifacts/iteration_1/judgements/scores.jsonl", ResponseScore)
    answers = read_records(folder / "artifacts/iteration_1/responses/responses.jsonl", Response)
    assert {one.id: one.score for one in made} == {one.id: -abs(len(one.text.split()) - 50) for one in answers}
    manifest = read_json(folder / "artifacts/iteration_1/judgements/manifest.json")
    assert manifest["inputs"]["policy"] is None
    assert manifest["inputs"]["judge"]["source code"].keys() == {"my_judge.py"}
    assert "my_judge.py:score judged" in (folder / "report.html").read_text("utf-8")
    assert any(path.name == "ranked_scores" for path in folder.glob("artifacts/evaluation_M2/*"))


def test_evaluation_of_a_run_calls_its_function_only_if_the_command_names_it(
    ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [folder] = ran.glob("outputs/run-*")
    monkeypatch.chdir(ran)
    (ran / "other.py").write_text("def score(batch):\n    return [1] * len(batch)\n")
    settings = ["tracker=none", "evaluate.count=1", "evaluate.head_to_head=null", "data.seed_data.ranked=''"]
    with pytest.raises(SelfalignError, match=r"names a function, .* if it is yours, give judge\.function=my_judge\.py"):
        evaluate_models([str(folder)], settings, conf_folder())
    found = evaluate_models([str(folder)], [*settings, "judge.function=other.py:score"], conf_folder())
    assert read_json(found / "summary.json")["models"][0]["eval/mean_score"] == 1
