"""EFT that the SFT baseline writes, and the baseline's judging beside M1's: whole runs on the tiny model."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import composed, metrics, planned, run
from declared import declaration

from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Demonstration, Judgement, RankedAnswers, Response
from selfalign.launch.experiment import look_ahead
from selfalign.runs.reader import Finished
from selfalign.stages.judge import parse_score
from selfalign.store.artifacts import Store

RUBRIC = "<instruction>{instruction}</instruction> <response>{response}</response> Score?"
SUBJECTS = ["bees", "rivers", "clocks", "bread", "ships", "lamps", "cats", "hats"]
SETTINGS = [
    "model=tiny", "tracker=none", "name=eft", "evaluate=none", "data=pairs", "iterations=1", "loss=dpo",
    "engine.dtype=float32", "train.sft.dtype=float32", "train.align.dtype=float32", "train.sft.learning_rate=0.005",
    "train.sft.final_learning_rate=0", "train.sft.epochs=12", "train.sft.batch_size=4",
]  # fmt: skip
WRITTEN = [
    "judge=additive", f"judge.prompt='{RUBRIC}'", "judge.num_samples=6", "judge.sampling.temperature=1",
    "judge.sampling.top_p=1", "judge.sampling.max_new_tokens=16", "judge.max_failure_rate=0.9",
    "data.seed_data.eft_source=baseline",
]  # fmt: skip


SYNTHETIC = [
    *WRITTEN, "data.seed_data.eft_source=synthetic", "data.seed_data.ranked=''",
    "data.distortion.sampling.max_new_tokens=24", "data.distortion.answer_sampling.max_new_tokens=24",
    "data.distortion.sampling.temperature=1", "data.distortion.answer_sampling.temperature=1",
]  # fmt: skip


def write_data(folder: Path) -> list[str]:
    """Seeds whose demonstrations teach the form of a judgement with scores at random; returns what names them.

    A model that has learnt them writes some score to every answer, which now and then is the humans' order.
    """
    folder.mkdir(parents=True)
    ift, ranked = [], []
    for n, subject in enumerate(SUBJECTS):
        question = f"Which is the best {subject}, and why?"
        answers = [f"The oldest {subject}, for its craft.", f"Some {subject}."]
        ranked.append(
            {"id": f"r{n}", "instruction": question,
             "responses": [{"text": text, "rank": rank} for rank, text in enumerate(answers, start=1)]}
        )  # fmt: skip
        for k in range(3):
            asked = RUBRIC.replace("{instruction}", f"{question} {k}").replace("{response}", "Old.")
            ift.append({"id": f"i{n}{k}", "instruction": asked, "response": f"Fair.\nScore: {(n + 2 * k) % 6}"})
    pairs = [{"id": "p", "prompt": "Why is grass green?", "chosen": " Chlorophyll.", "rejected": " It is not."}]
    for name, rows in (("ift", ift), ("ranked", ranked), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"data.path={folder / 'pairs.jsonl'}",
        f"data.seed_data.demonstrations={folder / 'ift.jsonl'}",
        f"data.seed_data.ranked={folder / 'ranked.jsonl'}",
    ]


@dataclass(frozen=True)
class Study:
    """A finished run and how it was made."""

    folder: Path
    overrides: list[str]

    @property
    def config(self) -> ExperimentConfig:
        return composed(*self.overrides)[0]

    def manifest(self, label: str) -> dict[str, Any]:
        return read_json(self.folder / "artifacts" / label / "manifest.json")

    def records(self, label: str, name: str, kind: type) -> list[Any]:
        return read_records(self.folder / "artifacts" / label / f"{name}.jsonl", kind)

    @property
    def labels(self) -> list[str]:
        return [stage["label"] for stage in read_json(self.folder / "summary.json")["stages"]]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["model"]: row for row in read_json(self.folder / "summary.json")["models"]}


def made(root: Path, *more: str) -> Study:
    overrides = [*SETTINGS, *write_data(root / "data"), *more, f"output_dir={root / 'outputs'}"]
    return Study(run(root / "outputs", *overrides[:-1]), overrides)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """EFT written by the baseline."""
    return made(tmp_path_factory.mktemp("written"), *WRITTEN)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """EFT from human ranks, the baseline's judging measured on request."""
    more = ["judge=expected_score", f"judge.prompt='{RUBRIC}'", "evaluate.sft_baseline=true", "train.sft.epochs=2"]
    return made(tmp_path_factory.mktemp("given"), *more)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """EFT written by the baseline about its own worse answers; nobody has ranked any."""
    return made(tmp_path_factory.mktemp("synthetic"), *SYNTHETIC)


def test_baseline_that_nobody_has_ranked_answers_for_teaches_judging(synthetic: Study) -> None:
    assert planned(synthetic.config) == synthetic.labels
    assert [label for label in synthetic.labels if label.startswith(("SFT", "eft/", "M"))] == [
        "M0", "SFT", "eft/instructions", "eft/responses", "eft/questions", "eft/judgements", "eft/demonstrations",
        "M1", "M2",
    ]  # fmt: skip
    weights = read_json(synthetic.folder / "provenance.json")["weights"]
    taught = {d.id: d for d in synthetic.records("seeds", "demonstrations", Demonstration)}
    worse = {r.instruction_id: r for r in synthetic.records("eft/responses", "responses", Response)}
    assert {one.model for one in worse.values()} == {weights["SFT"]}
    questions = {q.id: q for q in synthetic.records("eft/questions", "ranked", RankedAnswers)}
    for name, question in questions.items():
        assert taught[name].prompt == question.prompt
        assert question.texts == [taught[name].response, worse[name].text]
        assert question.ranks == [1, 2]
    scores: dict[str, dict[str, float | None]] = {}
    for example in synthetic.records("eft/demonstrations", "demonstrations", Demonstration):
        if example.source == "eft":
            number = example.id.rsplit("-", 1)[1]
            scores.setdefault(example.question, {})[number] = parse_score(example.response, 0, 5).score
    assert scores
    assert all(of["1"] > of["2"] for of in scores.values() if len(of) == 2)
    counts = {part: synthetic.manifest(f"eft/{part}")["counts"] for part in ("instructions", "responses", "questions")}
    assert counts["instructions"]["written"] == len(taught) == 24
    kept = counts["instructions"]["kept"]
    assert kept == counts["responses"]["responses"] == 24 - sum(counts["instructions"]["dropped"].values())
    assert counts["questions"]["questions"] == len(questions) == kept - sum(counts["questions"]["dropped"].values())
    inputs = synthetic.manifest("M1")["inputs"]["demonstrations"]
    assert inputs["digest"] == synthetic.manifest("eft/demonstrations")["digest"]


def test_planned_stages_are_those_that_are_made_in_their_order(written: Study, given: Study) -> None:
    for study in (written, given):
        assert planned(study.config) == study.labels
    assert [label for label in written.labels if label.startswith(("SFT", "eft/", "M"))] == [
        "M0", "SFT", "eft/questions", "eft/judgements", "eft/demonstrations", "M1", "M2",
    ]  # fmt: skip
    assert [label for label in given.labels if label in ("ift", "SFT", "M1")] == ["ift", "SFT", "M1"]


def test_baseline_learns_ift_alone_and_m1_both_from_m0(written: Study, given: Study) -> None:
    for study, ift, both in ((written, "seeds", "eft/demonstrations"), (given, "ift", "seeds")):
        m0 = study.manifest("M0")["digest"]
        for model, data in (("SFT", ift), ("M1", both)):
            inputs = study.manifest(model)["inputs"]
            assert inputs["policy"]["digest"] == m0
            assert inputs["demonstrations"]["digest"] == study.manifest(data)["digest"]
        sources = {
            label: {d.source for d in study.records(label, "demonstrations", Demonstration)} for label in (ift, both)
        }
        assert sources == {ift: {"ift"}, both: {"ift", "eft"}}
        assert study.manifest("SFT")["inputs"]["demonstrations"] != study.manifest("M1")["inputs"]["demonstrations"]


def test_baseline_itself_wrote_what_is_taught_and_the_humans_ranks_confirm_it(written: Study) -> None:
    weights = read_json(written.folder / "provenance.json")["weights"]
    assert list(weights) == ["M0", "SFT", "M1", "M2"]
    judgements = written.records("eft/judgements", "judgements", Judgement)
    assert {j.model for j in judgements} == {weights["SFT"]}
    texts = {(j.response_id, j.text) for j in judgements}
    ranks = {q.id: q.ranks for q in written.records("eft/questions", "ranked", RankedAnswers)}
    scores: dict[str, dict[int, float]] = {}
    for example in written.records("eft/demonstrations", "demonstrations", Demonstration):
        if example.source == "eft":
            number = int(example.id.rsplit("-", 1)[1])
            assert (f"{example.question}-{number}", example.response) in texts
            score = parse_score(example.response, 0, 5).score
            assert score is not None
            scores.setdefault(example.question, {})[ranks[example.question][number - 1]] = score
    assert scores
    assert all(of[1] > of[2] for of in scores.values() if len(of) == 2)
    counts = written.manifest("eft/demonstrations")["counts"]
    drops = counts["dropped"]
    assert counts["eft"] == 2 * counts["questions_agreeing"] - drops.get("examples_of_most_common_score", 0) >= 1
    unused = drops.get("questions_in_other_order", 0) + drops.get("questions_without_scores", 0)
    assert counts["questions_agreeing"] + unused == counts["questions"] == 6


def test_nothing_that_is_taught_is_held_out(written: Study, given: Study) -> None:
    for study, label in ((written, "eft/demonstrations"), (given, "seeds")):
        held_out = {q.instruction for q in study.records("seeds", "ranked", RankedAnswers)}
        assert len(held_out) == 2
        taught = [d.prompt[0]["content"] for d in study.records(label, "demonstrations", Demonstration)]
        assert not [text for text in taught for question in held_out if f"<instruction>{question}</" in text]


@pytest.mark.parametrize("name", ["written", "given"])
def test_judging_of_the_baseline_stands_beside_that_of_m1(name: str, request: pytest.FixtureRequest) -> None:
    study: Study = request.getfixturevalue(name)
    rows = study.rows
    assert list(rows) == ["SFT", "M1", "M2"]
    for model in rows:
        assert rows[model]["judge_quality/questions"] + rows[model]["judge_quality/unjudged"] == 2
    ranked = [study.manifest(f"evaluation_{model}/ranked_scores")["inputs"] for model in rows]
    assert len({inputs["responses"]["digest"] for inputs in ranked}) == 1
    assert [inputs["policy"]["digest"] for inputs in ranked] == [study.manifest(model)["digest"] for model in rows]
    assert [row["iteration"] for row in rows.values()] == [0, 0, 1]
    assert all(row["seconds"] > 0 for row in rows.values())
    named = {key for row in metrics(study.folder) for key in row if key.startswith("judge_quality/")}
    assert named
    assert all(map(declaration, named))


def test_report_shows_the_baseline_with_its_interval(given: Study) -> None:
    sft = Finished.load(given.folder).models[0]
    low, value, high = (sft[f"judge_quality/pairwise_accuracy{end}"] for end in ("_low", "", "_high"))
    assert low <= value <= high
    assert all(map(math.isfinite, (low, high)))
    page = (given.folder / "report.html").read_text(encoding="utf-8")
    models = page[page.index('id="models"') : page.index("</table>")]
    assert [models.count(f">{name}<") for name in ("SFT", "M1", "M2")] == [1, 1, 1]


def test_report_says_who_wrote_the_examples_of_judging(written: Study, given: Study) -> None:
    said = (written.folder / "report.html").read_text(encoding="utf-8")
    eft = written.manifest("eft/demonstrations")["counts"]["eft"]
    assert f"{eft} of judging that the SFT baseline wrote made M1" in said
    assert "that the SFT baseline wrote" not in (given.folder / "report.html").read_text(encoding="utf-8")


def test_everything_is_found_again_until_a_file_says_something_else(written: Study) -> None:
    """Files are known by their content: another ranking under the same name is another experiment."""
    path = Path(written.config.data.seed_data.ranked)
    store, before = Store(written.folder.parent / "store"), path.read_text(encoding="utf-8")
    assert [str(label) for label in look_ahead(written.config, store, "").found] == written.labels
    try:
        path.write_text(before.replace("The oldest", "The newest"), encoding="utf-8")
        assert not look_ahead(written.config, store, "").found
    finally:
        path.write_text(before, encoding="utf-8")


def test_without_eft_m1_is_the_baseline_and_no_other_is_made(written: Study) -> None:
    config, *_ = composed(*written.overrides, "data.seed_data.eft_source=none", "evaluate.sft_baseline=true")
    assert [label for label in planned(config) if label in ("ift", "SFT", "M1")] == ["M1"]
