import json
from dataclasses import replace
from pathlib import Path

import pytest
from builders import (
    TINY_RUN,
    demonstration,
    instruction,
    preference,
    records_artifact,
    run,
    workspace,
    write_tiny_data,
)

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Demonstration, Instruction, Prompt
from selfalign.data.turns import as_prompt
from selfalign.stages.eval_instructions import eval_instructions, measured_by
from selfalign.store.artifacts import Artifact

ROWS = [{"id": f"q{n}", "instruction": f"Question {n}?", "category": "some"} for n in range(5)]


def seed_data(folder: Path, *taught: str) -> Artifact:
    """Seeds that teach answers to these prompts."""
    made = records_artifact(folder / "seeds", demonstrations=[demonstration(t, t) for t in taught])
    return replace(made, counts={"ift": len(taught)})


def asked(folder: Path, count: int, *taught: str, dropped: int = 0) -> list[Instruction]:
    source = folder / "asked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    counts = eval_instructions(
        workspace(folder / "out"), source=str(source), count=count, content="d", seeds=seed_data(folder, *taught)
    )
    kept = read_records(folder / "out/instructions.jsonl", Instruction)
    assert counts == {"instructions": len(kept), "dropped": {"in_demonstrations": dropped}}
    return kept


@pytest.mark.parametrize(
    ("count", "ids"), [(2, ["q0", "q1"]), (0, ["q0", "q1", "q2", "q3", "q4"]), (5, ["q0", "q1", "q2", "q3", "q4"])]
)
def test_first_so_many_instructions_are_taken(tmp_path: Path, count: int, ids: list[str]) -> None:
    kept = asked(tmp_path, count)
    assert [record.id for record in kept] == ids
    assert kept[0] == Instruction(id="q0", text="Question 0?", source="evaluation", category="some")


def test_instruction_whose_answer_is_taught_measures_nothing_and_is_dropped(tmp_path: Path) -> None:
    kept = asked(tmp_path, 2, "Question 0?", "Question 7?", "Question 2?", dropped=2)
    assert [record.id for record in kept] == ["q1", "q3"]


def test_instruction_that_stands_there_again_under_another_id_counts_once(tmp_path: Path) -> None:
    source = tmp_path / "asked.jsonl"
    rows = [{"id": 1, "instruction": "Why?"}, {"id": 2, "instruction": " Why?"}, {"id": 3, "instruction": "How?"}]
    source.write_text("\n".join(map(json.dumps, rows)))
    counts = eval_instructions(workspace(tmp_path / "out"), source=str(source), count=0, content="d", seeds=None)
    assert counts == {"instructions": 2, "dropped": {"in_demonstrations": 0, "duplicate": 1}}
    assert [record.id for record in read_records(tmp_path / "out/instructions.jsonl", Instruction)] == ["1", "3"]


def test_instruction_that_is_taught_in_another_encoding_is_dropped_too(tmp_path: Path) -> None:
    kept = asked(tmp_path, 2, "Question\u00a00?", dropped=1)
    assert [record.id for record in kept] == ["q1", "q2"]


def test_instruction_that_is_taught_with_spaces_around_it_is_dropped_too(tmp_path: Path) -> None:
    kept = asked(tmp_path, 2, " Question 0?\n", "Question 2? ", dropped=2)
    assert [record.id for record in kept] == ["q1", "q3"]


def test_instruction_that_a_model_was_trained_on_otherwise_is_dropped_and_counted_apart(tmp_path: Path) -> None:
    source = tmp_path / "asked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked_for = preference("p", "Question 3? ", "Yes.", "No.")
    trained_on = [records_artifact(tmp_path / "pairs", pairs=[asked_for]), seed_data(tmp_path, "Question 1?")]
    counts = eval_instructions(
        workspace(tmp_path / "out"), source=str(source), count=2, content="d", seeds=None, trained_on=trained_on
    )
    assert counts == {"instructions": 2, "dropped": {"in_demonstrations": 0, "trained_on": 2}}
    assert [record.id for record in read_records(tmp_path / "out/instructions.jsonl", Instruction)] == ["q0", "q2"]


def test_instructions_that_are_all_taught_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"all 5 instructions are prompts of data\.seed_data\.demonstrations"):
        asked(tmp_path, 2, *[row["instruction"] for row in ROWS])


def test_instruction_that_is_taught_as_a_text_or_in_a_dialogue_is_dropped_too(tmp_path: Path) -> None:
    prompts: list[Prompt] = [
        "Question 0?",
        [{"role": "system", "content": "Be brief."}, *as_prompt("Question 1?")],
        [*as_prompt("Question 3?"), {"role": "assistant", "content": "Yes."}, *as_prompt("And then?")],
    ]
    taught = [Demonstration(id=f"d{n}", prompt=prompt, response="x", source="ift") for n, prompt in enumerate(prompts)]
    given = replace(records_artifact(tmp_path / "seeds", demonstrations=taught), counts={"ift": 3})
    source = tmp_path / "asked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[4]]))
    counts = eval_instructions(workspace(tmp_path / "out"), source=str(source), count=0, content="d", seeds=given)
    assert counts == {"instructions": 2, "dropped": {"duplicate": 1, "in_demonstrations": 3}}
    kept = read_records(tmp_path / "out/instructions.jsonl", Instruction)
    assert [record.id for record in kept] == ["q2", "q4"]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"nowhere\.jsonl"):
        eval_instructions(
            workspace(tmp_path / "out"),
            source=str(tmp_path / "nowhere.jsonl"),
            count=0,
            content="d",
            seeds=seed_data(tmp_path),
        )


def test_shipped_instructions_are_found_by_name(tmp_path: Path) -> None:
    out, given = workspace(tmp_path / "out"), seed_data(tmp_path)
    assert eval_instructions(out, source="shipped:evaluation", count=7, content="d", seeds=given)["instructions"] == 7


def test_instruction_that_models_are_measured_on_chooses_no_checkpoint(tmp_path: Path) -> None:
    source, others = tmp_path / "asked.jsonl", tmp_path / "others.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    others.write_text(json.dumps({"instruction": "Why?"}) + "\n")
    measured = records_artifact(tmp_path / "measured", instructions=[instruction("q1", "Question\u00a01?")])
    assert measured_by([measured], str(source)) == [measured]
    assert measured_by([measured], str(others)) == []
    counts = eval_instructions(
        workspace(tmp_path / "out"), source=str(source), count=2, content="d", seeds=None, held_out=[measured]
    )
    assert counts == {"instructions": 2, "dropped": {"in_demonstrations": 0, "held_out": 1}}
    assert [record.id for record in read_records(tmp_path / "out/instructions.jsonl", Instruction)] == ["q0", "q2"]


def test_run_does_not_choose_its_checkpoints_by_what_it_is_measured_on(tmp_path: Path) -> None:
    given = write_tiny_data(tmp_path / "data")
    choose = [f"train.checkpoint_selection.instructions={tmp_path}/data/asked.jsonl"]
    choose += ["train.checkpoint_selection.interval_steps=1", "data.instruct.count=4"]
    with pytest.raises(SelfalignError, match="instructions that the models are evaluated on"):
        run(tmp_path / "outputs", *TINY_RUN, *given, *choose)
