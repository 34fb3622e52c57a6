import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import warm
from builders import ROOT, TINY_RUN, composed, metrics, planned, record_files, run, write_tiny_data
from declared import declaration, named_by_producers
from msgspec import UNSET

from selfalign.cli.environment import conf_folder
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import (
    Comparison,
    Demonstration,
    Instruction,
    Judgement,
    LabelledResponse,
    PairReference,
    PreferencePair,
    RankedAnswers,
    Response,
    ResponseScore,
)
from selfalign.launch.evaluate import evaluate_models
from selfalign.metrics.catalog import METRICS
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import fault_counts
from selfalign.report.timing import training_times
from selfalign.store.artifacts import StageOutput, Store


@dataclass(frozen=True)
class Study:
    """A finished run of two iterations, and what it takes to run others beside it."""

    output: Path
    overrides: tuple[str, ...]
    folder: Path
    seconds: float

    def run(self, *overrides: str) -> Path:
        """Another run over the same store."""
        return run(self.output, *self.overrides, *overrides)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    overrides = (*TINY_RUN, *write_tiny_data(root / "data"))
    started = time.monotonic()
    folder = run(root / "outputs", *overrides)
    return Study(root / "outputs", overrides, folder, time.monotonic() - started)


def manifest(folder: Path, label: str) -> dict[str, Any]:
    return read_json(folder / "artifacts" / label / "manifest.json")


def records(folder: Path, label: str, name: str, kind: type) -> list[Any]:
    return read_records(folder / "artifacts" / label / f"{name}.jsonl", kind)


def labels(folder: Path) -> list[str]:
    """Of everything a run made or found, in its order."""
    return [stage["label"] for stage in read_json(folder / "summary.json")["stages"]]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of what is really made, not found, while the test runs."""
    made: list[str] = []
    original = Store._build

    def build(self: Store, folder: Path, stage: str, inputs: Any, work: Any, workspace: StageOutput) -> None:
        made.append(workspace.label)
        original(self, folder, stage, inputs, work, workspace)

    monkeypatch.setattr(Store, "_build", build)
    return made


# --- the loop ----------------------------------------------------------------------------------------------------


def test_two_iterations_make_three_models_each_from_the_one_before(study: Study) -> None:
    digests = {name: manifest(study.folder, name)["digest"] for name in ("M0", "M1", "M2", "M3")}
    assert len(set(digests.values())) == 4
    for label, before in (("M1", "M0"), ("M2", "M1"), ("M3", "M2")):
        assert manifest(study.folder, label)["inputs"]["policy"]["digest"] == digests[before]
    weights = read_json(study.folder / "provenance.json")["weights"]
    assert list(weights) == ["M0", "M1", "M2", "M3"]
    assert len(set(weights.values())) == 4


def test_every_record_says_which_model_wrote_it(study: Study) -> None:
    weights = read_json(study.folder / "provenance.json")["weights"]
    for iteration, model in ((1, "M1"), (2, "M2")):
        place = f"iteration_{iteration}"
        assert {r.model for r in records(study.folder, f"{place}/responses", "responses", Response)} == {weights[model]}
        judged = records(study.folder, f"{place}/judgements", "judgements", Judgement)
        assert {j.model for j in judged} == {weights[model]}
        inputs = manifest(study.folder, f"{place}/instructions")["inputs"]
        assert inputs["policy"]["digest"] == manifest(study.folder, model)["digest"]
    for model in ("M1", "M2", "M3"):
        place = f"evaluation_{model}"
        assert {r.model for r in records(study.folder, f"{place}/answers", "responses", Response)} == {weights[model]}
        # One judge for the answers of all models; each judges the ranked answers itself.
        assert {j.model for j in records(study.folder, f"{place}/scores", "judgements", Judgement)} == {weights["M1"]}
        own = records(study.folder, f"{place}/ranked_scores", "judgements", Judgement)
        assert {j.model for j in own} == {weights[model]}


def test_records_of_an_iteration_belong_together(study: Study) -> None:
    kept: set[str] = set()
    for place in ("iteration_1", "iteration_2"):
        instructions = records(study.folder, f"{place}/instructions", "instructions", Instruction)
        responses = {r.id: r for r in records(study.folder, f"{place}/responses", "responses", Response)}
        judgements = records(study.folder, f"{place}/judgements", "judgements", Judgement)
        pairs = records(study.folder, f"{place}/pairs", "pairs", PreferencePair)
        references = records(study.folder, f"{place}/reference", "references", PairReference)
        assert len(instructions) == 3
        assert len(responses) == 9
        assert {r.instruction_id for r in responses.values()} == {i.id for i in instructions}
        assert {j.response_id for j in judgements} == responses.keys()
        assert [r.id for r in references] == [p.id for p in pairs]
        scores = {j.response_id: j.score for j in judgements}
        for pair in pairs:
            assert (responses[pair.chosen_id].text, responses[pair.rejected_id].text) == (pair.chosen, pair.rejected)
            rivals = [scores[r.id] for r in responses.values() if r.instruction_id == pair.instruction_id]
            assert (pair.chosen_score, pair.rejected_score) == (max(rivals), min(rivals))
        counts = manifest(study.folder, f"{place}/pairs")["counts"]
        assert counts["pairs"] + sum(counts["dropped"].values()) == len(instructions)
        texts = {i.text for i in instructions}
        assert not texts & kept
        kept |= texts
    seeds = records(study.folder, "seeds", "demonstrations", Demonstration)
    assert not kept & {d.prompt[0]["content"] for d in seeds}


def test_alignment_starts_at_its_reference(study: Study) -> None:
    for label in ("M2", "M3"):
        first = next(row for row in metrics(study.folder) if row["label"] == label and row.get("align/step") == 1)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
        assert first["refinement/mean"] == pytest.approx(0, abs=1e-3)


def test_run_folder_holds_what_a_reader_needs(study: Study) -> None:
    names = {path.name for path in study.folder.iterdir()}
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "summary.json", "report.html", "artifacts"} <= names
    summary = read_json(study.folder / "summary.json")
    assert [row["model"] for row in summary["models"]] == ["M1", "M2", "M3"]
    assert summary["config"]["loss"]["lam"] == 0.5
    for row in summary["models"][1:]:
        assert {"pairs", "rewards/margins", "eval/win_rate", "judge_quality/pairwise_accuracy", "seconds"} <= row.keys()
        assert 0 <= row["eval/win_rate_low"] <= row["eval/win_rate"] <= row["eval/win_rate_high"] <= 1
    assert "eval/win_rate" not in summary["models"][0]


def test_judges_of_win_rates_are_asked_once_about_ranked_answers_that_are_held_out(study: Study) -> None:
    held_out = {q.id: q for q in records(study.folder, "seeds", "ranked", RankedAnswers)}
    taught = {d.question for d in records(study.folder, "seeds", "demonstrations", Demonstration)}
    compared = records(study.folder, "evaluation_M1/ranked_comparisons", "comparisons", Comparison)
    assert not held_out.keys() & taught
    assert {c.model for c in compared} == {read_json(study.folder / "provenance.json")["weights"]["M1"]}
    points: list[float] = []
    for one in compared:
        (question, first), (same, second) = (name.rsplit("-", 1) for name in (one.first_id, one.second_id))
        ranks = held_out[question].ranks
        assert question == same
        preferred = {1.0: int(first), 0.0: int(second)}.get(one.outcome)
        other = int(first) + int(second) - (preferred or 0)
        points.append(0.5 if preferred is None else float(ranks[preferred - 1] < ranks[other - 1]))
    assert len(points) == sum(math.comb(len(q.texts), 2) for q in held_out.values())
    rows = {row["model"]: row for row in read_json(study.folder / "summary.json")["models"]}
    for row in rows.values():
        assert row["instrument/head_to_head/accuracy"] == pytest.approx(sum(points) / len(points))
        assert row["instrument/scores/accuracy"] == rows["M1"]["instrument/judge/accuracy"]
        assert row["instrument/head_to_head/passed"] in (0, 1)
    made = labels(study.folder)
    assert [label for label in made if "ranked_comparisons" in label] == ["evaluation_M1/ranked_comparisons"]
    assert not [label for label in made if "second_ranked_scores" in label]


def test_metrics_are_numbers_one_step_after_the_other(study: Study) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in metrics.jsonl")

    lines = (study.folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["iteration"] for row in rows] == sorted(row["iteration"] for row in rows)
    assert {row["label"] for row in rows} == set(labels(study.folder))


# --- the same again ----------------------------------------------------------------------------------------------


def test_same_command_again_makes_nothing_and_says_so(
    study: Study, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (study.folder / name).read_bytes() for name in ("metrics.jsonl", "summary.json", "config.yaml")}
    started = time.monotonic()
    assert study.run() == study.folder
    assert time.monotonic() - started < study.seconds
    assert built == []
    assert {name: (study.folder / name).read_bytes() for name in before} == before
    said = capsys.readouterr().out
    assert "to do" not in said
    assert "Everything was made before; nothing had to be made again." in said


def test_same_seed_in_another_folder_makes_the_same_bytes(study: Study, tmp_path: Path) -> None:
    other = run(tmp_path, *study.overrides)
    files = record_files(study.folder)
    assert len(files) == 43
    assert record_files(other) == files
    assert other.name == study.folder.name
    weights = [read_json(folder / "provenance.json")["weights"] for folder in (study.folder, other)]
    assert weights[0] == weights[1]


def test_another_seed_makes_other_models(study: Study, built: list[str]) -> None:
    other = study.run("seed=1", "iterations=1")
    weights = [read_json(folder / "provenance.json")["weights"] for folder in (study.folder, other)]
    assert weights[0]["M0"] == weights[1]["M0"]
    assert weights[0]["M1"] != weights[1]["M1"]
    assert "M0" not in built
    assert "seeds" not in built


def test_another_lambda_shares_everything_up_to_the_alignment(study: Study, built: list[str]) -> None:
    other = study.run("loss.lam=0.25", "iterations=1")
    assert other != study.folder
    assert set(built) == {"M2", *(label for label in labels(other) if label.startswith("evaluation_M2/"))}
    shared = labels(other)[: labels(other).index("M2")]
    assert shared[-1] == "iteration_1/reference"
    for label in shared:
        assert (other / "artifacts" / label).resolve() == (study.folder / "artifacts" / label).resolve()
    assert manifest(other, "M2")["digest"] != manifest(study.folder, "M2")["digest"]


def test_more_iterations_continue_those_that_are_there(study: Study, built: list[str]) -> None:
    study.run("iterations=1")
    assert built == []


def test_fresh_run_takes_a_new_folder_and_makes_everything_anew(study: Study, built: list[str]) -> None:
    fresh = study.run("iterations=1", "fresh=true")
    plain = study.run("iterations=1")
    assert fresh != plain
    assert fresh.parent == plain.parent
    assert sorted(built) == sorted(labels(fresh))
    assert record_files(fresh) == record_files(plain)


def test_fresh_run_of_a_new_configuration_takes_nothing_from_earlier_ones(study: Study, built: list[str]) -> None:
    fresh = study.run("iterations=1", "loss.lam=0.75", "fresh=true")
    assert sorted(built) == sorted(labels(fresh))


KILLER = """
import os, random, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import builders, selfalign.training.trainer

output, *overrides = sys.argv[1:]
draw, killed = random.Random(int(overrides.pop(0))), 0
for wanted in [int(number) for number in overrides.pop(0).split(",")]:
    child = os.fork()
    if child == 0:
        try:
            builders.run(Path(output), *overrides)
        finally:
            os._exit(0)
    done = 0
    while done == 0 and len(list(Path(output).glob("store/*/*/manifest.json"))) < wanted:
        done, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    time.sleep(draw.random() * 0.2)
    if done == 0:
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print("killed", killed, builders.run(Path(output), *overrides))
"""
"""Starts a run again and again, each time killing it a moment after so many artifacts are finished."""


def test_run_killed_at_several_points_ends_with_the_same_files(study: Study, tmp_path: Path) -> None:
    points = [0, 2, 4, 9, 13, 16, 22]
    order = [sys.executable, "-c", KILLER, str(tmp_path), "5", ",".join(map(str, points))]
    checkpoints = ["train.sft.checkpoint_steps=3", "train.align.checkpoint_steps=1"]  # They are in no key.
    order += [*study.overrides, *checkpoints]
    done = warm.run(order, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    _, killed, folder = done.stdout.splitlines()[-1].split(" ", 2)
    assert int(killed) >= len(points) - 2
    files, expected = record_files(Path(folder)), record_files(study.folder)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    assert labels(Path(folder)) == labels(study.folder)
    provenance = [read_json(place / "provenance.json") for place in (Path(folder), study.folder)]
    assert provenance[0]["weights"] == provenance[1]["weights"]
    assert provenance[0]["artifacts"] == provenance[1]["artifacts"]


def test_half_a_file_that_a_killed_write_left_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    def build(out: StageOutput) -> dict[str, Any]:
        (out.path / "a.jsonl").write_text("{}\n")
        return {}

    clean = Store(tmp_path / "clean").make("stage", {"a": 1}, build)
    folder = tmp_path / "killed/stage" / clean.key
    folder.mkdir(parents=True)
    (folder / ".a.jsonl.4711.tmp").write_text("{")
    assert Store(tmp_path / "killed").make("stage", {"a": 1}, build).digest == clean.digest


# --- other ways through ------------------------------------------------------------------------------------------

JUDGE_PROMPT = "<instruction>{instruction}</instruction> <response>{response}</response> Score?"
"""So short that the tiny model learns to write a score behind it."""

WAYS = {
    "self_rewarding": [],
    "no_answers_compared": ["evaluate=none", "++evaluate.head_to_head.debias_position=true", "iterations=1"],
    "positives": ["loss=positives", "pair=positives", "pair.minimum_score=0", "iterations=1",
                  "data.respond.sampling.max_new_tokens=128", "data.respond.sampling.temperature=1"],
    "positives_anew": ["loss=positives", "loss.init=base", "pair=positives", "pair.minimum_score=0", "iterations=1",
                       "data.respond.sampling.max_new_tokens=128", "data.respond.sampling.temperature=1"],
    "labels": ["loss=kto", "pair=labels", "data.accumulate_pairs=true", "train.validation_pairs=2"],
    "older_reference": ["train.reference_policy=sft", "data.instruct.model=sft", "judge.model=sft",
    "evaluate.judge=base"],
    "base_reference": ["train.reference_policy=base", "iterations=1", "loss=ipo"],
    "accumulated": ["data.accumulate_pairs=true", "pair=all_ordered", "pair.length_control=[0.3,0]"],
    "fixed_judge": ["judge.model=random:tiny", "evaluate.head_to_head.model=random:tiny", "iterations=1"],
    "matrix": ["evaluate.round_robin=true", "iterations=3"],
    "pairwise": ["judge=pairwise", "judge.pairs=2", "judge.debias_position=true", "iterations=1",
                 "loss=positives", "pair=positives", "pair.minimum_score=0",
                 "data.respond.sampling.max_new_tokens=128", "data.respond.sampling.temperature=1"],
    "implicit": ["judge=implicit", "data.seed_data.eft_source=none", "train.reference_policy=sft"],
    "writers": ["data.respond.writers=[self,previous]", "pair=by_writer", "pair.rejected_from=previous",
                "judge.model=previous"],
    "ahead": ["data.respond.writers=[next,sft]", "pair=by_writer", "pair.chosen_from=next", "iterations=1",
              "data.instruct.count=6", "data.replay.source={data}/ranked.jsonl", "data.replay.share=0.3"],
    "demonstrated": ["data.instruct.source=demonstrations", "data.respond.writers=[demonstration,self]",
                     "data.respond.candidates=1", "pair=by_writer", "pair.chosen_from=demonstration",
                     "pair.rejected_from=self", "pair.by_score=false", "data.respond.sampling.max_new_tokens=9"],
    "panel": ["judge=panel", "+judge@judge.members.read=expected_score", "+judge@judge.members.outside=expected_score",
              "judge.members.outside.model=random:tiny", "+judge.weights.read=2", "data.seed_data.eft_source=none",
              "iterations=1"],
    "consistency": ["pair=all_ordered", "pair.consistency=each", "pair.consistent_with=base", "iterations=1"],
    "meta_judged": ["data/meta_judge=pairwise", "data.meta_judge.iterations=1", "data.meta_judge.minimum_pairs=0",
                    "judge=additive", f"judge.prompt='{JUDGE_PROMPT}'", "judge.sampling.temperature=1",
                    "judge.sampling.max_new_tokens=12", "judge.max_failure_rate=1", "train.sft.epochs=20",
                    "data.respond.sampling.temperature=2"],
    "changes": ["+judge@at.2.judge=expected_score", "at.2.judge.model=random:tiny", "+loss@at.2.loss=ipo",
                "+at.2.writers=[self,sft]", "+pair@at.2.pair=random"],
    "replay": ["data.replay.source={data}/ranked.jsonl", "data.replay.share=[0.4,0.25]", "data.accumulate_pairs=true",
               "train.validation_pairs=1", "loss=dpo"],
    "adapters": ["model.lora.rank=8", "model.lora.alpha=64", "train.sft.learning_rate=2e-2", "loss=dpo"],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_planned_stages_are_those_that_are_made_in_their_order(study: Study, way: str) -> None:
    overrides = [
        o for o in study.overrides if "evaluate=none" not in WAYS[way] or not o.startswith("evaluate.instructions")
    ]
    overrides += [one.replace("{data}", str(study.output.parent / "data")) for one in WAYS[way]]
    folder = run(study.output, *overrides)
    config, *_ = composed(*overrides)
    assert planned(config) == labels(folder)
    check = globals().get(f"check_{way}")
    if check is not None:
        check(folder)


def test_demonstrations_that_teach_nothing_are_not_trained_on_anywhere(tmp_path: Path) -> None:
    """Neither M1 nor a model that is fine-tuned from M0 on positives sees them, so they rule out no held-out pair."""
    untaught = [
        *TINY_RUN,
        *write_tiny_data(tmp_path),
        "data.seed_data.eft_source=none",
        "data.seed_data.fine_tune=false",
    ]
    config, *_ = composed(*untaught, "loss=positives", "loss.init=base", "pair=positives")
    assert not {"M1", "iteration_1/demonstrations"} & set(planned(config))
    asked = ("data.instruct.source=demonstrations", "data.respond.writers=[demonstration,self]", "iterations=1")
    rule = ("pair=by_writer", "pair.chosen_from=demonstration", "pair.rejected_from=self", "pair.by_score=false")
    folder = run(tmp_path / "outputs", *untaught, *asked, *rule, "train.validation_pairs=1", "evaluate=none")
    counts = manifest(folder, "M2")["counts"]
    assert (counts["validation_pairs"], counts["held_out_passed_over"]) == (1, 0)


def check_accumulated(folder: Path) -> None:
    ids = [[p.id for p in records(folder, f"iteration_{n}/pairs", "pairs", PreferencePair)] for n in (1, 2)]
    assert all(ids)
    both = records(folder, "iteration_2/all_pairs", "pairs", PreferencePair)
    assert [p.id for p in both] == [*ids[0], *ids[1]]
    # Of the earlier pairs too, the reference is the policy the iteration starts from.
    assert [r.id for r in records(folder, "iteration_2/reference", "references", PairReference)] == [p.id for p in both]
    inputs = manifest(folder, "iteration_2/reference")["inputs"]
    assert inputs["policy"]["digest"] == manifest(folder, "M2")["digest"]
    assert [manifest(folder, label)["counts"]["pairs"] for label in ("M2", "M3")] == [len(ids[0]), len(both)]
    rules = [manifest(folder, f"iteration_{n}/pairs")["inputs"]["rule"] for n in (1, 2)]
    assert [(rule["class"], rule["length_control"]) for rule in rules] == [("AllOrdered", 0.3), ("AllOrdered", 0)]


def check_no_answers_compared(folder: Path) -> None:
    numbers = manifest(folder, "evaluation_M2/numbers")["counts"]
    assert numbers["judge_quality/questions"] == 1
    assert "eval/answers" not in numbers


def check_positives(folder: Path) -> None:
    kept = records(folder, "iteration_1/pairs", "demonstrations", Demonstration)
    counts = manifest(folder, "iteration_1/pairs")["counts"]
    assert len(kept) == counts["positives"] >= 1
    assert {d.source for d in kept} == {"positive"}
    assert manifest(folder, "M2")["stage"] == "sft"
    assert manifest(folder, "M2")["inputs"]["policy"]["digest"] == manifest(folder, "M1")["digest"]


def check_labels(folder: Path) -> None:
    """Both iterations' labelled responses train M3, but for those beside the two that are held out."""
    kept = [records(folder, f"iteration_{n}/pairs", "labelled", LabelledResponse) for n in (1, 2)]
    counts = manifest(folder, "iteration_1/pairs")["counts"]
    assert counts["labelled"] == len(kept[0])
    assert counts["desirable"] == sum(one.desirable for one in kept[0])
    assert records(folder, "iteration_2/all_pairs", "labelled", LabelledResponse) == [*kept[0], *kept[1]]
    numbers = manifest(folder, "M3")["counts"]
    left_out = numbers["validation_pairs"] + numbers["dropped"]["beside_held_out"] + numbers["dropped"]["too_long"]
    assert numbers["labelled"] + left_out == len(kept[0]) + len(kept[1])
    assert manifest(folder, "iteration_2/reference")["inputs"]["unpaired"] is True
    page = (folder / "report.html").read_text()
    assert "✓ desirable" in page
    assert "were labelled desirable" in page
    assert "KL to the reference" in page
    assert "Loss of a response: KTO" in (folder / "model_card.md").read_text()


def check_positives_anew(folder: Path) -> None:
    taught, kept, both = (
        [d.id for d in records(folder, label, "demonstrations", Demonstration)]
        for label in ("seeds", "iteration_1/pairs", "iteration_1/demonstrations")
    )
    assert taught
    assert kept
    assert both == [*taught, *kept]
    inputs = {name: manifest(folder, name)["inputs"] for name in ("M1", "M2")}
    assert inputs["M2"]["policy"] == inputs["M1"]["policy"]
    assert inputs["M2"]["demonstrations"]["digest"] == manifest(folder, "iteration_1/demonstrations")["digest"]


def check_older_reference(folder: Path) -> None:
    digests = {name: manifest(folder, name)["digest"] for name in ("M0", "M1", "M2")}
    for iteration in (1, 2):
        place = f"iteration_{iteration}"
        assert manifest(folder, f"{place}/reference")["inputs"]["policy"]["digest"] == digests["M1"]
        assert manifest(folder, f"{place}/instructions")["inputs"]["policy"]["digest"] == digests["M1"]
        assert manifest(folder, f"{place}/judgements")["inputs"]["policy"]["digest"] == digests["M1"]
        assert manifest(folder, f"{place}/responses")["inputs"]["policy"]["digest"] == digests[f"M{iteration}"]
    assert manifest(folder, "evaluation_M2/scores")["inputs"]["policy"]["digest"] == digests["M0"]
    assert manifest(folder, "M2")["inputs"]["start"] is None
    assert manifest(folder, "M3")["inputs"]["start"] == {
        "artifact": "reference_logprobs",
        "digest": manifest(folder, "iteration_2/start")["digest"],
    }
    assert manifest(folder, "iteration_2/start")["inputs"]["policy"]["digest"] == digests["M2"]
    first = next(row for row in metrics(folder) if row["label"] == "M3" and row.get("align/step") == 1)
    assert abs(first["rewards/chosen"]) > 1e-3


def check_fixed_judge(folder: Path) -> None:
    weights = read_json(folder / "provenance.json")["weights"]
    judged = records(folder, "iteration_1/judgements", "judgements", Judgement)
    assert {j.model for j in judged} == {PolicyCheckpoint(folder / "artifacts/judge").digest} == {weights["M0"]}
    assert (
        manifest(folder, "iteration_1/judgements")["inputs"]["policy"]["digest"] == manifest(folder, "judge")["digest"]
    )
    # How well M2 itself judges is measured all the same.
    assert {j.model for j in records(folder, "evaluation_M2/ranked_scores", "judgements", Judgement)} == {weights["M2"]}


def check_pairwise(folder: Path) -> None:
    counts = manifest(folder, "iteration_1/judgements")["counts"]
    made = records(folder, "iteration_1/judgements", "comparisons", Comparison)
    assert len(made) == counts["comparisons"] == 3 * 2
    assert {s.valid for s in records(folder, "iteration_1/judgements", "scores", ResponseScore)} == {1}
    taught = [d for d in records(folder, "seeds", "demonstrations", Demonstration) if d.source == "eft"]
    assert {d.response for d in taught} == {"A]]", "B]]"}
    assert manifest(folder, "evaluation_M2/numbers")["counts"]["judge_quality/questions"] == 1


def check_implicit(folder: Path) -> None:
    """M1's reference is M0, and that of M2 and M3 what they were aligned against."""
    digests = {name: manifest(folder, name)["digest"] for name in ("M0", "M1", "M2", "M3")}
    judges = {
        "iteration_1/judgements": ("M1", "M0"),
        "iteration_2/judgements": ("M2", "M1"),
        "evaluation_M1/ranked_scores": ("M1", "M0"),
        "evaluation_M3/ranked_scores": ("M3", "M1"),
        "evaluation_M3/scores": ("M1", "M0"),
    }
    for label, (policy, reference) in judges.items():
        inputs = manifest(folder, label)["inputs"]
        assert (inputs["policy"]["digest"], inputs["reference"]["digest"]) == (digests[policy], digests[reference]), (
            label
        )
    assert "judge_quality/top_score_precision" not in manifest(folder, "evaluation_M3/numbers")["counts"]


def check_base_reference(folder: Path) -> None:
    assert manifest(folder, "iteration_1/reference")["inputs"]["policy"]["digest"] == manifest(folder, "M0")["digest"]
    assert manifest(folder, "iteration_1/start")["inputs"]["policy"]["digest"] == manifest(folder, "M1")["digest"]


def digest_in(folder: Path, label: str, name: str) -> str:
    return manifest(folder, label)["inputs"][name]["digest"]


def check_meta_judged(folder: Path) -> None:
    compared = records(folder, "iteration_1/judge_pairs", "comparisons", Comparison)
    judged = {j.id: j for j in records(folder, "iteration_1/judgements", "judgements", Judgement)}
    assert compared
    for one in compared:
        assert judged[one.first_id].response_id == judged[one.second_id].response_id == one.instruction_id
    assert {one.model for one in compared} == {read_json(folder / "provenance.json")["weights"]["M1"]}
    parts = [
        (folder / f"artifacts/iteration_1/{part}/pairs.jsonl").read_text().splitlines()
        for part in ("pairs", "judge_pairs", "joined_pairs")
    ]
    assert parts[0]
    assert parts[2] == [*parts[0], *parts[1]]
    for number, part in ((1, "joined_pairs"), (2, "pairs")):
        assert digest_in(folder, f"M{number + 1}", "pairs") == manifest(folder, f"iteration_{number}/{part}")["digest"]


def check_writers(folder: Path) -> None:
    """M_{t-1} is M0 for M1: it writes what is rejected, and judges."""
    digests = {name: manifest(folder, name)["digest"] for name in ("M0", "M1", "M2")}
    weights = read_json(folder / "provenance.json")["weights"]
    for iteration, now, before in ((1, "M1", "M0"), (2, "M2", "M1")):
        place = f"iteration_{iteration}"
        assert digest_in(folder, f"{place}/responses_by_previous", "policy") == digests[before]
        assert digest_in(folder, f"{place}/judgements", "policy") == digests[before]
        assert digest_in(folder, f"{place}/reference", "policy") == digests[now]
        written = {r.id: r for r in records(folder, f"{place}/responses", "responses", Response)}
        assert len(written) == 2 * 3 * 3
        assert {(r.writer, r.model) for r in written.values()} == {
            ("self", weights[now]),
            ("previous", weights[before]),
        }
        pairs = records(folder, f"{place}/pairs", "pairs", PreferencePair)
        assert pairs
        assert {(written[p.chosen_id].writer, written[p.rejected_id].writer) for p in pairs} == {("self", "previous")}
        assert all(written[p.chosen_id].ids == p.chosen_ids != [] for p in pairs)


def check_ahead(folder: Path) -> None:
    """A model aligned on M1's responses against others of M1 writes in its place, and M2 is aligned from M1."""
    place = "iteration_1"
    ahead = manifest(folder, f"{place}/ahead_model")["digest"]
    m1 = manifest(folder, "M1")["digest"]
    assert digest_in(folder, f"{place}/ahead_model", "policy") == digest_in(folder, "M2", "policy") == m1
    assert digest_in(folder, f"{place}/ahead_responses_by_self", "policy") == m1
    assert digest_in(folder, f"{place}/responses_by_next", "policy") == ahead
    assert ahead not in (m1, manifest(folder, "M2")["digest"])
    # It is aligned on all that the iteration trains on: given pairs are replayed for it too.
    parts = manifest(folder, f"{place}/ahead_all_pairs")["inputs"]["parts"]
    given = [manifest(folder, f"{place}/{part}")["digest"] for part in ("ahead_pairs", "ahead_replayed_pairs")]
    assert [part["digest"] for part in parts] == given
    assert digest_in(folder, f"{place}/ahead_model", "pairs") == manifest(folder, f"{place}/ahead_all_pairs")["digest"]
    assert [row["model"] for row in training_times([folder])] == ["M1", f"{place}/ahead_model", "M2"]
    # What is rejected was written once.
    both = [(folder / "artifacts" / place / part).resolve() for part in ("ahead_responses_by_sft", "responses_by_sft")]
    assert both[0] == both[1]
    rows = [row for row in metrics(folder) if row["label"] in ("M2", f"{place}/ahead_model") and "align/step" in row]
    assert {row["label"] for row in rows} == {"M2", f"{place}/ahead_model"}


def check_demonstrated(folder: Path) -> None:
    taught = {d.prompt[0]["content"]: d for d in records(folder, "seeds", "demonstrations", Demonstration)}
    for iteration in (1, 2):
        place = f"iteration_{iteration}"
        assert not (folder / "artifacts" / place / "judgements").exists()
        pairs = records(folder, f"{place}/pairs", "pairs", PreferencePair)
        assert pairs
        for pair in pairs:
            assert pair.chosen == taught[pair.prompt[0]["content"]].response != pair.rejected
            assert (pair.chosen_score, pair.rejected_score) == (None, None)
        counts = manifest(folder, f"{place}/pairs")["counts"]
        assert "mean_score_margin" not in counts
        answers = {r.id: r for r in records(folder, f"{place}/responses", "responses", Response)}
        assert all(r.tokens > 1 for r in answers.values())
        lengths = [answers[p.chosen_id].tokens - answers[p.rejected_id].tokens for p in pairs]
        assert counts["mean_length_difference"] == pytest.approx(sum(lengths) / len(lengths))


def check_panel(folder: Path) -> None:
    """Every member judges by its own model, and scores are the weighted shares of won comparisons."""
    m0, m1 = (manifest(folder, name)["digest"] for name in ("M0", "M1"))
    place = "iteration_1/judgements"
    assert (digest_in(folder, f"{place}_by_read", "policy"), digest_in(folder, f"{place}_by_outside", "policy")) == (
        m1,
        m0,
    )
    assert digest_in(folder, "evaluation_M2/ranked_scores_by_outside", "policy") == m0
    members = {
        name: {s.id: s.score for s in records(folder, f"{place}_by_{name}", "scores", ResponseScore)}
        for name in ("read", "outside")
    }
    combined = {s.id: s.score for s in records(folder, place, "scores", ResponseScore)}
    by_instruction: dict[str, list[str]] = {}
    for response in records(folder, "iteration_1/responses", "responses", Response):
        by_instruction.setdefault(response.instruction_id, []).append(response.id)
    for ids in by_instruction.values():
        for one in ids:
            shares = {
                name: sum(
                    (scores[one] > scores[other]) + (scores[one] == scores[other]) / 2 for other in ids if other != one
                )
                / 2
                for name, scores in members.items()
            }
            assert combined[one] == pytest.approx((2 * shares["read"] + shares["outside"]) / 3)
    assert 0 <= manifest(folder, place)["counts"]["judge/disagreement"] <= 1
    assert not (folder / "artifacts/evaluation_M2/scores").exists(), "votes score no single answer"
    assert not [name for name in manifest(folder, "evaluation_M2/numbers")["counts"] if "score_win_rate" in name]


def check_consistency(folder: Path) -> None:
    """M0 judges a second time, and what both judges order alike is how far a pair is trusted."""
    place = "iteration_1"
    assert digest_in(folder, f"{place}/second_judgements", "policy") == manifest(folder, "M0")["digest"]
    first, second = (
        {s.id: s.score for s in records(folder, f"{place}/{part}", "scores", ResponseScore)}
        for part in ("judgements", "second_judgements")
    )
    by_instruction: dict[str, list[str]] = {}
    for response in records(folder, f"{place}/responses", "responses", Response):
        by_instruction.setdefault(response.instruction_id, []).append(response.id)
    alike = {
        name: [(first[a] - first[b]) * (second[a] - second[b]) > 0 for a, b in combinations(ids, 2)]
        for name, ids in by_instruction.items()
    }
    pairs = records(folder, f"{place}/pairs", "pairs", PreferencePair)
    assert pairs
    for pair in pairs:
        share = sum(alike[pair.instruction_id]) / len(alike[pair.instruction_id])
        assert pair.label_smoothing == pytest.approx(1 - share)
    every = [sum(found) / len(found) for found in alike.values()]
    assert manifest(folder, f"{place}/pairs")["counts"]["consistency"] == pytest.approx(sum(every) / len(every))


def check_changes(folder: Path) -> None:
    """From iteration 2 on, others judge, write, pair and align; evaluations keep their judge."""
    m0, m1 = (manifest(folder, name)["digest"] for name in ("M0", "M1"))
    inputs = [manifest(folder, f"iteration_{n}/pairs")["inputs"] for n in (1, 2)]
    assert [one["rule"]["class"] for one in inputs] == ["BestWorst", "RandomPair"]
    assert [manifest(folder, name)["inputs"]["loss"]["class"] for name in ("M2", "M3")] == ["SrDPO", "IPO"]
    assert [digest_in(folder, f"iteration_{n}/judgements", "policy") for n in (1, 2)] == [m1, m0]
    assert digest_in(folder, "evaluation_M3/scores", "policy") == m1
    writers = [{r.writer for r in records(folder, f"iteration_{n}/responses", "responses", Response)} for n in (1, 2)]
    assert writers == [{UNSET}, {"self", "sft"}]


def check_replay(folder: Path) -> None:
    """The pair of the held-out question is left out; .4 and .25 of all are drawn from the other three."""
    given = {p.id: p for p in records(folder, "replay/pairs", "pairs", PreferencePair)}
    assert manifest(folder, "replay/pairs")["counts"]["dropped"] == {"held_out": 1}
    own: list[str] = []
    for iteration, odds in ((1, 2 / 3), (2, 1 / 3)):
        place = f"iteration_{iteration}"
        own += [p.id for p in records(folder, f"{place}/pairs", "pairs", PreferencePair)]
        drawn = [p.id for p in records(folder, f"{place}/replayed_pairs", "pairs", PreferencePair)]
        assert len(drawn) == round(odds * len(own)) >= 1
        assert set(drawn) <= given.keys()
        mixed = records(folder, f"{place}/all_pairs", "pairs", PreferencePair)
        assert [p.id for p in mixed] == [*own, *drawn]
        assert digest_in(folder, f"M{iteration + 1}", "pairs") == manifest(folder, f"{place}/all_pairs")["digest"]
    known = [one["digest"] for one in manifest(folder, "M3")["inputs"]["trained_on"]]
    parts = ("seeds", "iteration_1/pairs", "iteration_1/replayed_pairs")
    assert known == [manifest(folder, part)["digest"] for part in parts]
    source = folder.parent / "measured.jsonl"
    source.write_text('{"prompt": "Which way is up?", "chosen": "Over your head.", "rejected": "Down there."}')
    measured = evaluate_models(
        [str(folder)], ["evaluate=none", f"evaluate.preference_pairs.source={source}"], conf_folder()
    )
    for model, iterations in (("M2", [1]), ("M3", [1, 2])):
        known = [one["digest"] for one in manifest(measured, f"evaluation_{model}/preferences")["inputs"]["trained_on"]]
        parts = [f"iteration_{n}/{part}" for part in ("replayed_pairs", "pairs") for n in iterations]
        assert known == [manifest(folder, part)["digest"] for part in ("seeds", "replay/pairs", *parts)]


def check_adapters(folder: Path) -> None:
    base = (folder / "artifacts/M0/weights").resolve()
    adapters = []
    for label in ("M1", "M2", "M3"):
        assert (folder / "artifacts" / label / "weights").resolve() == base
        adapters.append((folder / "artifacts" / label / "adapter/adapter_model.safetensors").read_bytes())
    assert len(set(adapters)) == 3
    for label in ("M2", "M3"):
        first = next(row for row in metrics(folder) if row["label"] == label and row.get("align/step") == 1)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert (
        PolicyCheckpoint(folder / "artifacts/M3").load("float32").digest
        == read_json(folder / "provenance.json")["weights"]["M3"]
    )


def test_fixed_model_writes_what_it_would_as_one_of_the_run_s_own(study: Study, built: list[str]) -> None:
    own = study.folder / "artifacts/M1"
    overrides = [f"data.instruct.model={own}/weights", "iterations=2", "name=fixed"]
    folder = study.run(*overrides)
    config, *_ = composed(*study.overrides, *overrides)
    assert planned(config) == labels(folder)
    assert built[:2] == ["writer", "iteration_1/instructions"]
    for place in ("iteration_1/instructions", "iteration_2/instructions"):
        assert manifest(folder, place)["inputs"]["policy"]["digest"] == manifest(folder, "writer")["digest"]
    texts = [
        [i.text for i in records(where, "iteration_1/instructions", "instructions", Instruction)]
        for where in (folder, study.folder)
    ]
    assert texts[0] == texts[1]


LISTED = [
    "What do people make of bees?",  # asked in the evaluation
    "Explain how glass is blown by hand.",
    "Say one thing about bread.",  # a seed
    "Give two reasons to learn chess.",
    "Compare cider with sweet lemon juice.",
    "Compare cider with sour lemon juice.",
    "Tell me why the sea is salty.",
    "How do owls hunt at night?",
    "Who first mapped the far side of Mars?",
]


def test_given_instructions_are_taken_iteration_by_iteration(study: Study, tmp_path: Path) -> None:
    source = tmp_path / "listed.jsonl"
    source.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in LISTED))
    overrides = [f"data.instruct.source={source}", "data.instruct.keywords=[]", "name=listed"]
    folder = study.run(*overrides)
    config, *_ = composed(*study.overrides, *overrides)
    assert planned(config) == labels(folder)
    taken = [
        [i.text for i in records(folder, f"iteration_{iteration}/instructions", "instructions", Instruction)]
        for iteration in (1, 2)
    ]
    assert taken == [[LISTED[1], LISTED[3], LISTED[4]], LISTED[6:]]
    dropped = [manifest(folder, f"iteration_{n}/instructions")["counts"]["dropped"] for n in (1, 2)]
    assert dropped == [{"held_out": 1, "copy_of_seed": 1}, {"similar": 1}]


def test_held_out_instructions_are_what_new_ones_must_differ_from(study: Study) -> None:
    held_out = manifest(study.folder, "iteration_1/instructions")["inputs"]["held_out"]
    assert [given["digest"] for given in held_out] == [
        manifest(study.folder, label)["digest"] for label in ("seeds", "questions")
    ]


def write_pairs(path: Path) -> Path:
    rows = [
        {"id": "p1", "prompt": "Why is grass green?", "chosen": " Chlorophyll.", "rejected": " It is not."},
        {
            "id": "p2",
            "prompt": [{"role": "user", "content": "Name a bird."}],
            "chosen": [{"role": "assistant", "content": "A wren."}],
            "rejected": [{"role": "assistant", "content": "A stone."}],
        },
        {"id": "p3", "prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_given_pairs_are_aligned_on_after_the_same_m1(study: Study, built: list[str], tmp_path: Path) -> None:
    overrides = [o for o in study.overrides if not o.startswith(("data.instruct", "data.respond"))]
    overrides += ["data=pairs", f"data.path={write_pairs(tmp_path / 'pairs.jsonl')}", "iterations=1", "loss=ipo"]
    folder = run(study.output, *overrides)
    config, *_ = composed(*overrides)
    assert planned(config) == labels(folder)
    # The seeds are the same, so M1 and its evaluation are those of the other run.
    assert not {label for label in built if label.startswith(("M1", "evaluation_M1"))}
    assert {"iteration_1/pairs", "iteration_1/reference", "M2", "evaluation_M2/numbers"} <= set(built)
    counts = manifest(folder, "iteration_1/pairs")["counts"]
    assert counts == {"pairs": 2, "dropped": {"identical": 1}}
    first = next(row for row in metrics(folder) if row["label"] == "M2" and row.get("align/step") == 1)
    assert first["loss"] == pytest.approx(25.0, rel=1e-3)


def test_given_pairs_without_seeds_align_m0_itself(study: Study, tmp_path: Path) -> None:
    overrides = [
        "model=tiny", "tracker=none", "name=bare", "evaluate=none", "iterations=1", "data=pairs",
        f"data.path={write_pairs(tmp_path / 'pairs.jsonl')}", "data.seed_data.demonstrations=''",
        "data.seed_data.ranked=''",
        "train.align.dtype=float32", "engine.dtype=float32",
    ]  # fmt: skip
    folder = run(study.output, *overrides)
    config, *_ = composed(*overrides)
    assert planned(config) == labels(folder)
    assert manifest(folder, "M2")["inputs"]["policy"]["digest"] == manifest(folder, "M0")["digest"]
    assert "M1" not in labels(folder)


# --- names of metrics --------------------------------------------------------------------------------------------

BOOKKEEPING = {"step", "iteration", "label", "stage", "model"}


def written_metrics(folder: Path) -> set[str]:
    """The declarations of all numbers in metrics.jsonl and in the models' rows of summary.json."""
    rows = [*metrics(folder), *read_json(folder / "summary.json")["models"]]
    return {declaration(name) for row in rows for name in row.keys() - BOOKKEEPING}


def test_every_number_a_run_writes_is_declared(study: Study) -> None:
    assert len(written_metrics(study.folder)) > 80


def test_every_declared_metric_is_written_by_a_run_or_named_by_a_producer(study: Study) -> None:
    known = (
        written_metrics(study.folder)
        | named_by_producers()
        | set(map(declaration, fault_counts({"unknown": 1, "spelled": 1})))
    )
    assert sorted(METRICS.keys() - known) == []


# --- runs that stop ----------------------------------------------------------------------------------------------


def test_judge_that_writes_no_scores_stops_the_run_which_keeps_what_it_made(study: Study, built: list[str]) -> None:
    overrides = [
        "judge=additive",
        "judge.num_samples=1",
        "judge.retries=1",
        "judge.sampling.max_new_tokens=4",
        "iterations=1",
        "name=unjudged",
    ]
    with pytest.raises(SelfalignError, match="evaluation_M1/scores: 3 of 3 judgements carry no score"):
        study.run(*overrides)
    assert set(built) == {"seeds", "questions", "M1", "evaluation_M1/answers", "evaluation_M1/scores"}
    folder = next(study.output.glob("unjudged-*"))
    assert (folder / "artifacts/M1/weights.json").exists()
    assert "M1" in read_json(folder / "provenance.json")["weights"]
    assert "carry no score" in (folder / "run.log").read_text()
    built.clear()
    with pytest.raises(SelfalignError):
        study.run(*overrides)
    assert built == ["evaluation_M1/scores"]


def test_too_few_pairs_stop_the_run_which_keeps_what_it_made(study: Study, built: list[str]) -> None:
    with pytest.raises(
        SelfalignError, match=r"iteration_1/pairs: 0 pairs from 3 instructions.*minimum_pairs=1 .*margin"
    ):
        study.run("pair.minimum_margin=4.9", "iterations=1", "name=few")
    assert built == ["iteration_1/pairs"]
    folder = next(study.output.glob("few-*"))
    assert {row["label"] for row in metrics(folder)} >= {"M1", "iteration_1/judgements"}


def test_identical_candidates_stop_the_run_with_the_reason(study: Study) -> None:
    with pytest.raises(SelfalignError, match=r"0 pairs from 3 instructions.*(tie|identical)"):
        study.run("data.respond.sampling.temperature=0", "iterations=1", "name=alike")


def test_damaged_artifact_is_noticed(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.output, tmp_path / "copy", symlinks=True)
    folder = tmp_path / "copy" / study.folder.name
    path = (folder / "artifacts/iteration_1/pairs").resolve() / "pairs.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SelfalignError, match=r"pairs\.jsonl: missing or not of its recorded size; delete"):
        run(tmp_path / "copy", *study.overrides)
