"""A run's pairs and judgements as a data set: loaded by `datasets` as they were written, and trained on again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import ROOT, TINY_RUN, run, write_tiny_data
from data_hub import data_hub
from datasets import load_dataset

from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction, Judgement, PreferencePair, Response
from selfalign.data.containers import read_rows
from selfalign.data.sources import read_pairs
from selfalign.report.data_set import features_of, tables, write_data_set
from selfalign.runs.reader import Finished

TINY = [*TINY_RUN, "evaluate=none", "data.seed_data.ranked=''", "data.seed_data.eft_source=none", "loss=dpo"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations whose pairs ended by themselves, but for the first of the second iteration.

    The tiny model's answers are cut, so the records are told otherwise.
    """
    folder = tmp_path_factory.mktemp("made")
    told = [*TINY, "pair.minimum_pairs=1", write_tiny_data(folder / "data")[0]]
    shutil.copytree(run(folder / "outputs", *told), folder / "run")
    for number in (1, 2):
        file = folder / f"run/artifacts/iteration_{number}/pairs/pairs.jsonl"
        pairs = [
            replace(one, chosen_finished=True, rejected_finished=index > 0 or number == 1)
            for index, one in enumerate(read_records(file, PreferencePair))
        ]
        write_records(file, pairs)
    return folder / "run"


@pytest.fixture(scope="module")
def data(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its data set."""
    folder = tmp_path_factory.mktemp("data")
    assert write_data_set(Finished.load(made), folder, "me/tiny")
    return folder


def pairs_of(made: Path, number: int) -> list[PreferencePair]:
    return read_records(made / f"artifacts/iteration_{number}/pairs/pairs.jsonl", PreferencePair)


def head_of(data: Path) -> dict[str, Any]:
    return yaml.safe_load((data / "README.md").read_text("utf-8").split("---\n")[1])


def splits_of(data: Path) -> Iterator[tuple[str, str]]:
    for config in head_of(data)["configs"]:
        yield from ((config["config_name"], file["split"]) for file in config["data_files"])


# --- what it holds -----------------------------------------------------------------------------------------------


def test_loads_back_as_it_was_written(made: Path, data: Path, tmp_path: Path) -> None:
    found = list(splits_of(data))
    assert {name for name, _ in found} == {"pairs", "cut_pairs", "judgements"}
    for name, split in found:
        loaded = load_dataset(str(data), name, split=split, cache_dir=str(tmp_path))
        assert loaded.features == features_of(name)
        assert loaded.to_list() == list(tables(Finished.load(made), int(split[-1]))[name])


def test_pairs_have_the_texts_and_scores_of_the_run(made: Path, data: Path) -> None:
    for number, (whole, cut) in {1: (slice(None), slice(0)), 2: (slice(1, None), slice(1))}.items():
        own = pairs_of(made, number)
        assert own
        for name, part in (("pairs", whole), ("cut_pairs", cut)):
            file = data / f"{name}/iteration_{number}.parquet"
            rows = [row for _, row in read_rows(str(file))] if file.exists() else []
            wanted = [(p.id, p.prompt, p.chosen, p.rejected, p.chosen_score, p.rejected_score) for p in own[part]]
            keys = ("id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score")
            assert [tuple(row[key] for key in keys) for row in rows] == wanted
            assert all(row["rejected_finished"] is False for row in rows if name == "cut_pairs")


def test_judgements_stand_beside_what_was_judged(made: Path, data: Path) -> None:
    part = made / "artifacts/iteration_1"
    asked = {one.id: one.prompt for one in read_records(part / "instructions/instructions.jsonl", Instruction)}
    answers = {one.id: one for one in read_records(part / "responses/responses.jsonl", Response)}
    judged = read_records(part / "judgements/judgements.jsonl", Judgement)
    rows = [row for _, row in read_rows(str(data / "judgements/iteration_1.parquet"))]
    assert [row["id"] for row in rows] == [one.id for one in judged]
    for row, one in zip(rows, judged, strict=True):
        answer = answers[one.response_id]
        assert row["prompt"] == asked[answer.instruction_id]
        assert (row["response"], row["writer"]) == (answer.text, answer.model)
        assert (row["status"], row["score"], row["text"], row["judge"]) == (one.status, one.score, one.text, one.model)


def test_thoughts_stand_before_their_answers(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    first = pairs_of(made, 1)[0]
    thinking = replace(first, chosen_thought="<think>a</think>", thought_prompt="Think.", label_smoothing=0.0)
    write_records(tmp_path / "run/artifacts/iteration_1/pairs/pairs.jsonl", [thinking])
    [row] = tables(Finished.load(tmp_path / "run"), 1)["pairs"]
    assert row["chosen"] == f"<think>a</think>{first.chosen}"
    assert row["prompt"][0]["content"] == f"Think.\n\n{first.prompt[0]['content']}"
    assert (row["rejected"], row["label_smoothing"]) == (first.rejected, 0.0)


def test_run_on_given_pairs_has_made_none(data: Path, again: Path, tmp_path: Path) -> None:
    assert write_data_set(Finished.load(again), tmp_path) == {}
    assert not list(tmp_path.iterdir())


# --- training on it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains on the pairs of the first iteration, from the folder."""
    folder = tmp_path_factory.mktemp("again")
    given = [
        *(word for word in TINY if not word.startswith("data.")),
        "data=pairs",
        f"data.path={data}/pairs:iteration_1",
    ]
    sft = write_tiny_data(folder / "data")[0]
    return run(
        folder / "outputs", *given, sft, "data.seed_data.ranked=''", "data.seed_data.eft_source=none", "iterations=1"
    )


def test_run_trains_on_its_pairs(made: Path, again: Path) -> None:
    own = {one.id: (one.prompt, one.chosen, one.rejected) for one in pairs_of(made, 1)}
    assert {one.id: (one.prompt, one.chosen, one.rejected) for one in pairs_of(again, 1)} == own
    assert [row["model"] for row in Finished.load(again).models] == ["M1", "M2"]


READ = """
import msgspec, sys
from selfalign.data.sources import read_pairs
print(msgspec.json.encode(read_pairs(sys.argv[1])[0]).decode())
"""


def test_pairs_of_the_hub_are_those_of_the_folder(data: Path, tmp_path: Path) -> None:
    files = {path.relative_to(data).as_posix(): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    with data_hub("me/tiny", files) as address:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        told = kept | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", READ, "me/tiny:pairs:iteration_1"]
        said = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=True).stdout
    from_folder, _ = read_pairs(f"{data}/pairs:iteration_1")
    assert [one["chosen"] for one in json.loads(said.splitlines()[-1])] == [one.chosen for one in from_folder]


# --- its card ----------------------------------------------------------------------------------------------------


def test_card_states_files_and_sources_and_guesses_no_licence(made: Path, data: Path) -> None:
    card, head = (data / "README.md").read_text("utf-8"), head_of(data)
    assert {info["config_name"] for info in head["dataset_info"]} == {"pairs", "cut_pairs", "judgements"}
    assert not [key for key in head if key.startswith("license")]
    assert "load_dataset('me/tiny', 'pairs', split='iteration_1')" in card
    assert "selfalign data=pairs data.path=me/tiny:pairs:iteration_1 iterations=1" in card
    assert "selfalign cannot know it" in card
    assert "ift.jsonl" in card.partition("## Licence")[2]
    assert f"| `pairs` | {len(pairs_of(made, 1))} | {len(pairs_of(made, 2)) - 1} |" in card
