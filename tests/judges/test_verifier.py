"""The judge that checks what the instruction says is right, by itself and in a whole run."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import warm
from builders import ROOT, TINY_RUN, composed, instruction, records_artifact, response, workspace, write_tiny_data
from judging import judged

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import FinishReason, Instruction, PreferencePair, Response, ResponseScore
from selfalign.data.verifiable import verify
from selfalign.judges.verifier import Verifier
from selfalign.pipeline.loop import plan
from selfalign.stages.eval_instructions import eval_instructions

TASKS = ["judge=verifier", "data=verifiable", "evaluate.instructions=shipped:verifiable_test"]


def test_score_is_the_share_of_checks_that_the_answer_passes(tmp_path: Path) -> None:
    sums = replace(instruction("sum", "What is 2 plus 2?"), answer={"kind": "number", "value": 4})
    text = replace(
        instruction("tea", "Praise tea."),
        constraints=[{"kind": "words", "at_most": 3}, {"kind": "ends_with", "text": "tea", "weight": 3}],
    )
    answers = [
        response("sum-1", "It is 4."),
        response("sum-2", "<think>\n4\n</think>\nIt is 5."),
        response("sum-3", "It is 4", reason=FinishReason.LENGTH),
        response("tea-1", "How good is tea!"),
        response("tea-2", "Good tea!"),
    ]
    given = records_artifact(tmp_path / "given", instructions=[sums, text], responses=answers)
    counts, judgements = judged(tmp_path, Verifier(), None, instructions=given, responses=given)
    assert [one.score for one in judgements.values()] == [1, 0, 0, 0.75, 1]
    assert judgements["tea-1"].text == "words: 4, wanted 0 to 3\nends_with: passed"
    assert counts["dropped"] == {}


def test_instruction_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    given = records_artifact(tmp_path / "given", instructions=[instruction("a")], responses=[response("a-1")])
    with pytest.raises(SelfalignError, match=r"^judge=verifier: instruction a has neither an answer nor constraints"):
        judged(tmp_path, Verifier(), None, instructions=given, responses=given)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["judge=verifier"], r"Verifier checks what .*set data=verifiable, or data\.instruct\.source"),
        (
            [*TASKS, "data.seed_data.ranked=shipped:ranked"],
            r"cannot judge ranked answers.*set data\.seed_data\.ranked",
        ),
        (
            ["judge@evaluate.preference_pairs.judge=verifier", "evaluate.preference_pairs.source=a.jsonl"],
            r"^evaluate\.preference_pairs\.judge cannot be verifier",
        ),
        (
            [*TASKS, "pair.minimum_margin=1"],
            r"pair\.minimum_margin=1.* from judge\.min_score=0 to judge\.max_score=1",
        ),
    ],
)
def test_use_that_cannot_be_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(SelfalignError, match=problem):
        composed("experiment=smoke", *overrides)


def test_judge_has_no_model_in_the_plan() -> None:
    stages = {str(one.label): one.size for one in plan(composed("experiment=smoke", *TASKS)[0])}
    assert stages["iteration_1/judgements"].endswith("responses by Verifier, no model")
    assert "judge" not in stages


def read(folder: Path, *lines: str, verifiable: bool = True) -> list[Instruction]:
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    out = workspace(folder / "out")
    given = {"source": str(folder / "rows.jsonl"), "count": 0, "content": "", "seeds": None}
    eval_instructions(out, **given, verifiable=verifiable)
    return read_records(out.path / "instructions.jsonl", Instruction)


def test_source_without_checks_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    right = '{"id": "a", "instruction": "a", "answer": {"kind": "exact", "value": "b"}}'
    lines = [right, '{"id": "c", "instruction": "d"}']
    with pytest.raises(SelfalignError, match=r"rows\.jsonl: 1 of 2 instructions, such as c, have neither an answer"):
        read(tmp_path, *lines)
    assert [one.id for one in read(tmp_path, *lines, verifiable=False)] == ["a", "c"]


def test_rows_that_ask_the_same_and_differ_in_what_is_right_are_refused(tmp_path: Path) -> None:
    lines = [f'{{"id": "{n}", "instruction": "a", "answer": {{"kind": "number", "value": {n}}}}}' for n in (1, 2)]
    with pytest.raises(SelfalignError, match=r"rows\.jsonl: 1 and 2 ask the same, but differ in what is right"):
        read(tmp_path, *lines)


def test_run_is_judged_by_what_its_instructions_say(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    said = warm.run(
        [
            sys.executable, "-P", "-m", "selfalign", *TINY_RUN, data[0], *TASKS, "data=verifiable", "iterations=1",
            "data.instruct.source=shipped:verifiable:20", "data.instruct.count=12", "evaluate.count=4",
            "data.respond.sampling.max_new_tokens=16", "evaluate.head_to_head=null", "pair.minimum_pairs=1",
            "output_dir=outputs",
        ],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    [folder] = tmp_path.glob("outputs/tiny-*")
    made = folder / "artifacts/iteration_1"
    asked = {one.id: one for one in read_records(made / "instructions/instructions.jsonl", Instruction)}
    scores = {one.id: one.score for one in read_records(made / "judgements/scores.jsonl", ResponseScore)}
    assert len(asked) == 12
    for one in read_records(made / "responses/responses.jsonl", Response):
        verdict = verify(asked[one.instruction_id], one.text, cut=one.finish_reason is FinishReason.LENGTH)
        assert verdict is not None
        assert scores[one.id] == verdict.score
    pairs = read_records(made / "pairs/pairs.jsonl", PreferencePair)
    assert pairs
    for pair in pairs:
        chosen, rejected = scores[pair.chosen_id], scores[pair.rejected_id]
        assert chosen is not None
        assert rejected is not None
        assert chosen > rejected
    assert read_json(made / "judgements/manifest.json")["inputs"]["policy"] is None
    assert "which Verifier judged (<b>share of what was to be checked</b>)" in (folder / "report.html").read_text(
        "utf-8"
    )
