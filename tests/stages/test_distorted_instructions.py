from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import (
    Killed,
    Script,
    ScriptedWriter,
    completion,
    demonstration,
    instruction,
    loaded,
    policy_artifact,
    records_artifact,
    response,
    workspace,
)

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Demonstration, FinishReason, Instruction, Message, RankedAnswers, Response
from selfalign.engines.protocol import Completion, Sampling
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages.distorted_instructions import DistortionConfig, distorted_instructions, distorted_questions

TALK: list[Message] = [
    {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "A wren."},
    {"role": "user", "content": "Where does it nest?"},
]
BEES = demonstration("bees", "Explain how bees find their way home.")
CLOCKS = demonstration("clocks", "Write a short poem about old clocks.")
BREAD = demonstration("bread", "List three uses of dry bread.")
BIRDS = replace(demonstration("birds", "-"), prompt=TALK)


def distort(
    folder: Path, tiny: PolicyCheckpoint, replies: list[Completion], given: list[Demonstration], **changes: Any
) -> tuple[dict[str, Any], list[Instruction], Script]:
    """Runs the stage on scripted replies; returns its counts, what it kept, and the script."""
    script = Script(loaded(tiny.path), replies, **changes.pop("script", {}))
    inputs = {"config": DistortionConfig(), "held_out": [], "seed": 3, **changes}
    seeds = records_artifact(folder / "seeds", demonstrations=given)
    engine: Any = ScriptedWriter(script)
    out = workspace(folder / "out")
    counts = distorted_instructions(out, policy=policy_artifact(tiny), seeds=seeds, engine=engine, **inputs)
    return counts, read_records(folder / "out/instructions.jsonl", Instruction), script


def test_distorted_instruction_has_the_id_of_its_original_and_stands_in_its_conversation(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    replies = [completion(" Explain how bees make honey."), completion("Where does it fly in winter?\n")]
    counts, made, script = distort(tmp_path, tiny_policy, replies, [BEES, BIRDS])
    assert [one.id for one in made] == ["bees", "birds"]
    assert made[0].prompt == [{"role": "user", "content": "Explain how bees make honey."}]
    assert (made[0].text, made[0].turns) == ("Explain how bees make honey.", [])
    assert made[1].prompt == [*TALK[:2], {"role": "user", "content": "Where does it fly in winter?"}]
    assert counts == {"written": 2, "kept": 2, "dropped": {}}
    asked = [script.tokenizer.decode(request.prompt) for request in script.requests]
    assert all(text.endswith("Task:") for text in asked)
    assert "<task>\nWhere does it nest?\n</task>" in asked[1]
    assert "A wren." not in asked[1]


def test_what_is_no_other_instruction_is_dropped_and_counted(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """Of 7 and 8 words, 7 are common in their order: ROUGE-L is 14/15."""
    replies = [
        completion("Explain how the bees find their way home!"),
        completion("Write a poem about", cut=True),
        completion(" ..."),
    ]
    with pytest.raises(SelfalignError, match=r"of 3 distorted instructions none is left \(dropped: .*'cut': 1"):
        distort(tmp_path / "none", tiny_policy, replies, [BEES, CLOCKS, BREAD])
    looser = DistortionConfig(max_rouge_l=0.95)
    counts, made, _ = distort(tmp_path / "one", tiny_policy, replies, [BEES, CLOCKS, BREAD], config=looser)
    assert [one.id for one in made] == ["bees"]
    assert counts == {"written": 3, "kept": 1, "dropped": {"cut": 1, "empty": 1}}


def test_only_instructions_that_may_be_taught_are_distorted(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """Neither EFT examples, held-out instructions, plain texts nor a second turn of one conversation."""
    others = [
        replace(CLOCKS, source="eft"),
        replace(demonstration("text", "-"), prompt="Once upon"),
        replace(BIRDS, id="talk/turn-1", prompt=TALK[:1], question="talk"),
        replace(BIRDS, id="talk/turn-2", question="talk"),
    ]
    held_out = [records_artifact(tmp_path / "asked", instructions=[instruction("b", "List three uses of dry bread.")])]
    replies = [completion("Name a river in France."), completion("How do bees sleep?")]
    counts, made, _ = distort(tmp_path, tiny_policy, replies, [*others, BREAD, BEES], held_out=held_out)
    assert [one.id for one in made] == ["talk/turn-1", "bees"]
    assert counts == {"written": 2, "kept": 2, "dropped": {"held_out": 1, "no_instruction": 1}}


def test_count_takes_the_first(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    replies = [completion("How do bees sleep?"), completion("What is a sundial?")]
    counts, made, _ = distort(tmp_path, tiny_policy, replies, [BEES, CLOCKS, BREAD], config=DistortionConfig(count=2))
    assert [one.id for one in made] == ["bees", "clocks"]
    assert counts["written"] == 2


def test_killed_distortion_goes_on_where_it_stopped(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    replies = [completion(f"Other task {n}.") for n in range(3)]
    given = [BEES, CLOCKS, BREAD]
    with pytest.raises(Killed):
        distort(tmp_path, tiny_policy, replies, given, script={"per_batch": 1, "dies_after": 2})
    _, made, script = distort(tmp_path, tiny_policy, replies[2:], given, script={"per_batch": 1})
    assert len(script.requests) == 1
    assert [one.text for one in made] == ["Other task 0.", "Other task 1.", "Other task 2."]


def ranked(folder: Path, answers: list[Response]) -> tuple[dict[str, Any], list[RankedAnswers]]:
    """Ranks the demonstrations above answers to four distorted instructions."""
    given = [BEES, CLOCKS, BREAD, BIRDS]
    seeds = records_artifact(folder / "seeds", demonstrations=given)
    distorted = records_artifact(folder / "distorted", instructions=[instruction(one.id) for one in given])
    written = records_artifact(folder / "written", responses=answers)
    counts = distorted_questions(workspace(folder / "out"), seeds=seeds, instructions=distorted, responses=written)
    return counts, read_records(folder / "out/ranked.jsonl", RankedAnswers)


def test_answer_to_the_distorted_instruction_is_ranked_below_the_demonstration(tmp_path: Path) -> None:
    counts, (bees, birds) = ranked(tmp_path, [response("bees-1", "In hives."), response("birds-1", "Far south.")])
    assert (bees.instruction, bees.texts, bees.ranks) == (BEES.prompt[0]["content"], ["Yes.", "In hives."], [1, 2])
    assert birds.prompt == TALK
    assert birds.instruction == "user: Name a bird.\n\nassistant: A wren.\n\nuser: Where does it nest?"
    assert counts == {"questions": 2, "responses": 4, "dropped": {"prompt_too_long": 2}}
    asked = read_records(tmp_path / "out/instructions.jsonl", Instruction)
    assert [one.text for one in asked] == [bees.instruction, birds.instruction]
    judged = read_records(tmp_path / "out/responses.jsonl", Response)
    assert [(one.id, one.text) for one in judged] == [
        ("bees-1", "Yes."), ("bees-2", "In hives."), ("birds-1", "Yes."), ("birds-2", "Far south."),
    ]  # fmt: skip


def test_answer_that_may_not_be_worse_or_says_nothing_is_dropped_and_counted(tmp_path: Path) -> None:
    answers = [
        response("bees-1", "In hiv", reason=FinishReason.LENGTH),
        response("clocks-1", " Yes.\n"),
        response("bread-1", "..."),
    ]
    with pytest.raises(SelfalignError, match=r"of 4 answers to distorted instructions none is left \(dropped: "):
        ranked(tmp_path / "none", answers)
    counts, _ = ranked(tmp_path / "one", [*answers, response("birds-1", "Far south.")])
    assert counts == {
        "questions": 1,
        "responses": 2,
        "dropped": {"cut_answer": 1, "empty_answer": 1, "equal_answer": 1},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Write a task."}, r"data\.distortion\.prompt lacks \{instruction\}"),
        ({"max_rouge_l": 0.0}, r"data\.distortion\.max_rouge_l must be above 0 and at most 1, got 0\.0"),
        ({"count": -1}, r"data\.distortion\.count must be 0 or more, got -1"),
        ({"sampling": Sampling(thought_tokens=9)}, r"data\.distortion\.sampling\.thought_tokens has no effect"),
        ({"answer_sampling": Sampling(top_p=0)}, r"data\.distortion\.answer_sampling\.top_p must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        DistortionConfig(**changes)
