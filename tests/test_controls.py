"""Controls of the whole machine: runs whose outcome is known before they are made."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from builders import TINY_RUN, metrics, run, write_tiny_data

from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Instruction
from selfalign.metrics.intervals import Estimate
from selfalign.metrics.replicates import over_seeds
from selfalign.report.instruction_values import instruction_values
from selfalign.runs.reader import Finished

OWN = ("refinement/", "rewards/accuracies_augmented", "rewards/ties_augmented")
"""What only a loss with Δ reports."""

TIMES = ("seconds", "tokens_per_second", "peak_memory_gb")


def reported(folder: Path) -> list[dict[str, Any]]:
    """Every number of a run in its order, but for times, memory and what only a loss with Δ reports."""
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMES) and not any(own in name for own in OWN)}
        for row in metrics(folder)
    ]


def test_sr_dpo_without_refinement_reports_every_number_of_dpo(tmp_path: Path) -> None:
    told = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), "train.validation_pairs=1", "judge=expected_score"]
    dpo, other = (run(tmp_path / "runs", *told, *loss) for loss in (["loss=dpo"], ["loss=sr_dpo", "loss.lam=0"]))
    assert reported(dpo) == reported(other)
    models = read_json(dpo / "summary.json")["models"]
    assert [row["model"] for row in models] == ["M1", "M2", "M3"]
    assert {"rewards/margins", "held_out/rewards/margins", "eval/kl_to_m1", "eval/mean_score"} <= models[-1].keys()


# --- the judge is right, guesses, or is always wrong -------------------------------------------------------------

ADJECTIVES = ["red", "old", "new", "big", "wet", "odd", "hot", "dry", "fat", "raw", "tin", "shy", "sad", "bad"]
NOUNS = [
    "hat", "cup", "dog", "mat", "key", "bed", "pen", "box", "car", "cat", "egg", "fan", "gem", "hen", "jar", "kit",
    "leg", "mud", "net", "oak",
]  # fmt: skip
LETTERS = {"small": ("lower_case", "yes"), "capital": ("upper_case", "YES")}

SEEDS = (0, 1, 2)
FUNCTION = "judge.function=selfalign.judges.controls"
JUDGES = {
    "verifier": ["judge=verifier"],
    "random": ["judge=function", f"{FUNCTION}:random"],
    "swapped": ["judge=function", f"{FUNCTION}:swapped"],
}
SETTINGS = [
    "experiment=smoke", "data=verifiable", "iterations=2", "loss=dpo",
    "data.seed_data.eft_source=none", "data.instruct.count=120", "pair.max_similarity=1",
    "train.sft.epochs=8", "train.sft.batch_size=8",
    "train.align.epochs=2", "train.align.batch_size=8", "train.align.learning_rate=3e-4", "evaluate.count=200",
    "evaluate.head_to_head=null", "evaluate.truth=true", "evaluate.sampling.max_new_tokens=8",
    "evaluate.sampling.temperature=1", "evaluate.sampling.top_p=1", "data.respond.candidates=4",
    "data.respond.sampling.max_new_tokens=8", "data.respond.sampling.temperature=1", "data.respond.sampling.top_p=1",
]  # fmt: skip


def write_questions(folder: Path) -> list[str]:
    """Questions to be answered in small or in capital letters, of which M1 learns two thirds of the answers right.

    Both kinds are equally many, so that a policy that likes capitals, whatever was asked, gains nothing. No question
    that is evaluated is trained on.
    """
    draw, things = random.Random(0), [f"{adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
    draw.shuffle(things)
    taught, asked, held_out = things[:60], things[60:180], things[180:]

    def rows(of: list[str]) -> list[dict[str, Any]]:
        return [
            {"instruction": f"Is this a {thing}? Answer in {name} letters.", "constraints": [{"kind": kind}]}
            for thing in of
            for name, (kind, _) in LETTERS.items()
        ]

    answers = [right for _, right in LETTERS.values()]
    demonstrations = [
        {"id": f"{index}-{n}", "instruction": row["instruction"], "response": answers[(index + (n == 2)) % 2]}
        for index, row in enumerate(rows(taught))
        for n in range(3)
    ]
    sources = {
        "data.seed_data.demonstrations": demonstrations,
        "data.instruct.source": rows(asked),
        "evaluate.instructions": rows(held_out),
    }
    for key, made in sources.items():
        draw.shuffle(made)
        (folder / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return [f"{key}={folder / key}.jsonl" for key in sources]


def gain(folders: list[Path], model: str) -> Estimate:
    """A model's true rate minus M1's: the mean over seeds and instructions, with the mixed model's interval."""
    return over_seeds([instruction_values(Finished.load(one), model, "eval/true_gain") for one in folders]).interval()


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """{judge: run folders, one for each seed}. Runs of a seed share M1 and the first candidates."""
    folder = tmp_path_factory.mktemp("controls")
    told = [*SETTINGS, *write_questions(folder)]
    return {
        name: [run(folder / "runs", f"name={name}", *told, *judge, f"seed={seed}") for seed in SEEDS]
        for name, judge in JUDGES.items()
    }


@pytest.mark.nightly
def test_first_iteration_gains_with_the_truth_and_both_lose_with_its_opposite_and_stay_with_a_guess(
    controls: dict[str, list[Path]],
) -> None:
    gains = {(judge, model): gain(folders, model) for judge, folders in controls.items() for model in ("M2", "M3")}
    for model in ("M2", "M3"):
        assert gains["swapped", model].high < 0, gains
        assert gains["random", model].low <= 0 <= gains["random", model].high, gains
    assert gains["verifier", "M2"].low > 0, gains  # M3 is left out: experiments/controls/README.md says why.
    assert gains["swapped", "M3"].value < gains["swapped", "M2"].value


@pytest.mark.nightly
def test_judge_and_pairs_of_a_control_are_as_right_as_its_judge(controls: dict[str, list[Path]]) -> None:
    found = {
        name: [read_json(folder / "artifacts/iteration_1/truth/manifest.json")["counts"] for folder in folders]
        for name, folders in controls.items()
    }
    for name, right in (("verifier", 1), ("swapped", 0)):
        for counts in found[name]:
            assert counts["truth/judge_accuracy"] == counts["truth/pairs_right"] == right
            assert counts["truth/pairs_wrong"] == 1 - right
    guessed = [counts["truth/judge_accuracy"] for counts in found["random"]]
    assert sum(guessed) / len(SEEDS) == pytest.approx(0.5, abs=0.1)


@pytest.mark.nightly
def test_no_held_out_question_of_a_control_is_trained_on(controls: dict[str, list[Path]]) -> None:
    for folder in controls["verifier"]:
        made = folder / "artifacts"

        def texts(label: str, made: Path = made) -> set[str]:
            return {one.text for one in read_records(made / label / "instructions.jsonl", Instruction)}

        assert not texts("questions") & (texts("iteration_1/instructions") | texts("iteration_2/instructions"))
        assert len(texts("questions")) == 200
