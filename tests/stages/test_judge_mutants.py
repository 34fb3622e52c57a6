"""Judging and answering broken on purpose, as others have broken it: each mutant is caught by a named test."""

import shutil
from functools import partial
from types import ModuleType
from typing import Any

import judging
import pytest
import test_judge as judge_tests
import test_respond as respond_tests
from builders import RUBRIC
from mutation import Check, assert_caught

from selfalign.engines import responses, transformers
from selfalign.judges import expected, protocol, sampled
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages import judge

TIED = partial(judge_tests.test_alarm_is_by_its_thresholds, alarm={"max_tie_rate": 0.5}, constant=1.0)
LOW = partial(
    judge_tests.test_alarm_is_by_its_thresholds, alarm={"max_tie_rate": 1.0, "min_entropy": 1.06}, constant=1.0
)
QUIET = partial(
    judge_tests.test_alarm_is_by_its_thresholds, alarm={"max_tie_rate": 0.51, "min_entropy": 0.0}, constant=0.0
)
LONG_WRITTEN = partial(judge_tests.test_prompt_too_long_is_counted_and_never_cut, way="sampled")
LONG_READ = partial(judge_tests.test_prompt_too_long_is_counted_and_never_cut, way="expected")
ALL = respond_tests.test_every_instruction_gets_its_candidates_and_no_other
APART = respond_tests.test_candidates_of_one_instruction_are_drawn_apart
REASONS = respond_tests.test_reason_to_finish_is_that_of_each_response
TIES = " or (tied or 0.0) >= judge.degeneracy.max_tie_rate"
ENTROPY = "nats < judge.degeneracy.min_entropy or "

# (what, module, tests, old text, new text, the test that notices)
MUTANTS: list[tuple[str, ModuleType, ModuleType, str, str, Check]] = [
    ("D2 7: ties raise no alarm", judge, judging, TIES, "", TIED),
    ("D2 7: a low entropy raises none", judge, judging, ENTROPY, "", LOW),
    ("D2 7: the alarm goes by the mean", judge, judging, ENTROPY,
     "sum(tally.scores.elements()) >= 3 * responses or ", QUIET),
    ("D2 8: a long prompt is cut", sampled, judge_tests, "prompt = encode_prompt(generator.tokenizer, asked)",
     "prompt = encode_prompt(generator.tokenizer, asked)[-limit:]", LONG_WRITTEN),
    ("D2 8: a long prompt is left out uncounted", sampled, judge_tests, "refused.append(subject)", "pass",
     LONG_WRITTEN),
    ("D2 8: the same behind one forward pass", expected, judge_tests,
     "[too_long(s, reader.digest) for s, fit in zip(candidates, fits, strict=True) if not fit]", "[]", LONG_READ),
    ("D2 11: nobody has judged", expected, judge_tests, "rationales[subject.response.id], reader.digest)",
     "rationales[subject.response.id], \"\")", judge_tests.test_judge_is_the_policy_with_its_adapter),
    ("D2 11: the policy is the base below its adapter", judge, judging, "policy=PolicyCheckpoint(policy.path) if "
    "policy",
     "policy=base_below(PolicyCheckpoint(policy.path)) if "
     "policy", judge_tests.test_judge_is_the_policy_with_its_adapter),
    ("D2 12: one seed for all", responses, respond_tests, "derive_seed(seed, record.id, n)", "seed", APART),
    ("D2 12: candidates share a seed", responses, respond_tests, "derive_seed(seed, record.id, n)",
     "derive_seed(seed, record.id)", APART),
    ("D3 4: the prompt stands in the response", transformers, respond_tests,
     "written: list[list[int]] = [[] for _ in seeds]",
     "written = [list(prompts[owner]) for owner in owners]", REASONS),
    ("D3 6: the last instruction is lost", responses, respond_tests, "zip(fitting, made, strict=True)",
     "zip(fitting[:-1], made)", ALL),
    ("D3 6: what was written is written again", responses, respond_tests,
     "_responses(record, completions, generator.digest))",
     "2 * [*_responses(record, completions, generator.digest)])", ALL),
]  # fmt: skip


def base_below(files: PolicyCheckpoint) -> PolicyCheckpoint:
    """The same policy without its adapter, under the same digest."""
    bare = files.path.with_name(f"{files.path.name}-bare")
    if not bare.exists():
        shutil.copytree(files.path, bare, symlinks=True, ignore=shutil.ignore_patterns("adapter"))
    return PolicyCheckpoint(bare)


@pytest.mark.parametrize(
    ("module", "tested_in", "old", "new", "check"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS]
)
def test_mutant_is_caught(
    module: ModuleType, tested_in: ModuleType, old: str, new: str, check: Check, given: dict[str, Any]
) -> None:
    assert_caught(module, tested_in, old, new, check, given, base_below=base_below)


def careless(template: str, values: dict[str, str]) -> str:
    """Fills one place after the other, as it stands."""
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template


@pytest.mark.parametrize("kind", [sampled.SampledScore, expected.ExpectedScore])
@pytest.mark.parametrize("fill", [str.format_map, careless], ids=["D2 10: format", "D2 10: replace"])
def test_careless_filling_of_the_rubric_is_caught(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, kind: type, fill: Check
) -> None:
    monkeypatch.setattr(protocol, "fill", fill)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        judge_tests.test_response_cannot_leave_its_section(tiny_policy, kind(prompt=RUBRIC))
