from pathlib import Path
from typing import Any

import pytest
from builders import (
    Killed,
    Script,
    completion,
    instruction,
    killed_after,
    loaded,
    policy_artifact,
    records_artifact,
    small_context_policy,
    workspace,
)
from msgspec import UNSET

from selfalign.core.jsonl import read_records
from selfalign.core.records import Criterion, Instruction
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import Transformers
from selfalign.judges.criteria import CriteriaConfig
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.stages.write_criteria import write_criteria

ASKED = [instruction("bees", "What do bees do all day?"), instruction("tea", "How is tea made?")]
FEW = CriteriaConfig(sampling=Sampling(max_new_tokens=8), retries=0)


def written(folder: Path, config: CriteriaConfig, policy: PolicyCheckpoint, engine: Any, seed: int = 3):
    """Runs the stage; returns its counts and the instructions."""
    counts = write_criteria(
        workspace(folder / "out"),
        config=config,
        policy=policy_artifact(policy),
        instructions=records_artifact(folder / "given", instructions=ASKED),
        engine=engine,
        seed=seed,
    )
    return counts, read_records(folder / "out/instructions.jsonl", Instruction)


# --- reading -----------------------------------------------------------------------------------------------------


def test_lines_with_a_known_word_are_criteria_and_others_are_not() -> None:
    text = (
        "Here they are:\n\n"
        "1. **Essential:** The response names flowers.\n"
        "- Important - It says why.\n"
        "* optional: **It is short.**\n"
        "Pitfall: It says that “bees sleep all day”.\n"
        "Essential\n"
        "Essential: …\n"
        "Essentially, it must be good: yes.\n"
        "Crucial: It is polite.\n"
        "Important points are covered.\n"
        "Optional: The response names flowers.\n"
    )
    assert CriteriaConfig().read(text) == [
        Criterion(text="The response names flowers.", weight=1.0),
        Criterion(text="It says why.", weight=0.7),
        Criterion(text="It is short.", weight=0.3),
        Criterion(text="It says that “bees sleep all day”.", weight=-0.9),
    ]


def test_no_more_criteria_are_kept_than_are_wanted() -> None:
    text = "\n".join(f"Essential: It names {subject}." for subject in ("bees", "tea", "clocks"))
    assert [one.text for one in CriteriaConfig(count=2).read(text)] == ["It names bees.", "It names tea."]


def test_question_has_the_number_and_the_instruction() -> None:
    [turn] = CriteriaConfig(count=4).ask("Why {count}?")
    assert "Write the 4 lines" in turn["content"]
    assert "<instruction>\nWhy {count}?\n</instruction>" in turn["content"]
    [turn] = CriteriaConfig(prompt="Criteria of {instruction}, please.").ask("Why?")
    assert turn["content"] == "Criteria of Why?, please."


# --- the stage ---------------------------------------------------------------------------------------------------


def test_instructions_get_their_criteria_and_keep_the_rest(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    replies = [completion("Essential: It names flowers.\nPitfall: It rambles."), completion("Optional: It is warm.")]
    script = Script(loaded(tiny_policy.path), replies)
    counts, made = written(tmp_path, CriteriaConfig(), tiny_policy, script)
    assert [one.criteria for one in made] == [
        [Criterion(text="It names flowers.", weight=1.0), Criterion(text="It rambles.", weight=-0.9)],
        [Criterion(text="It is warm.", weight=0.3)],
    ]
    assert [(one.id, one.text, one.source) for one in made] == [(one.id, one.text, one.source) for one in ASKED]
    assert counts == {"instructions": 2, "criteria": 3, "dropped": {"no_criteria": 0, "prompt_too_long": 0}}


def test_instruction_without_a_criterion_is_asked_about_again(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    replies = [completion("Hm."), completion("Optional: It is warm."), completion("Essential: It names flowers.")]
    script = Script(loaded(tiny_policy.path), replies)
    counts, made = written(tmp_path, CriteriaConfig(retries=1), tiny_policy, script)
    assert [one.criteria[0].text for one in made] == ["It names flowers.", "It is warm."]
    first, _, again = script.requests
    assert first.prompt == again.prompt
    assert first.seeds != again.seeds
    assert counts["dropped"]["no_criteria"] == 0


@pytest.mark.parametrize(("temperature", "asked"), [(0.7, 6), (0.0, 2)])
def test_instruction_that_nothing_is_written_for_has_none_and_is_counted(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, temperature: float, asked: int
) -> None:
    script = Script(loaded(tiny_policy.path), [])
    config = CriteriaConfig(retries=2, sampling=Sampling(temperature=temperature, max_new_tokens=8))
    counts, made = written(tmp_path, config, tiny_policy, script)
    assert [one.criteria for one in made] == [UNSET, UNSET]
    assert "criteria" not in (tmp_path / "out/instructions.jsonl").read_text("utf-8")
    assert counts["dropped"] == {"no_criteria": 2, "prompt_too_long": 0}
    assert len(script.requests) == asked


def test_line_that_the_limit_cut_is_no_criterion(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    replies = [completion("Essential: It names flowers.\nPitfall: It does not", cut=True)] * 2
    _, made = written(tmp_path, CriteriaConfig(), tiny_policy, Script(loaded(tiny_policy.path), replies))
    assert [[one.text for one in record.criteria] for record in made] == [["It names flowers."]] * 2


def test_instruction_that_leaves_no_room_is_counted(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    lengths = [len(encode_prompt(loaded(tiny_policy.path).tokenizer, FEW.ask(one.text))) for one in ASKED]
    small = small_context_policy(tiny_policy, tmp_path / "small", min(lengths) + 8)
    script = Script(loaded(small.path), [completion("Essential: It is warm.")])
    counts, made = written(tmp_path, FEW, small, script)
    assert sum(bool(one.criteria) for one in made) == 1
    assert counts["dropped"] == {"no_criteria": 0, "prompt_too_long": 1}


def test_killed_writing_goes_on_where_it_was(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Transformers(dtype="float32", max_batch_tokens=1)
    written(tmp_path / "whole", FEW, tiny_policy, engine)
    with killed_after(1, monkeypatch), pytest.raises(Killed):
        written(tmp_path, FEW, tiny_policy, engine)
    with killed_after(9, monkeypatch) as sizes:
        written(tmp_path, FEW, tiny_policy, engine)
    assert sizes == [1]
    whole, resumed = (folder / "out/instructions.jsonl" for folder in (tmp_path / "whole", tmp_path))
    assert whole.read_bytes() == resumed.read_bytes()
