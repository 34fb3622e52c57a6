"""Memory does not grow with the number of records, in the stages that meet all of them."""

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from builders import RUBRIC, Script, completion, instruction, judgement, loaded, policy_artifact, response, workspace
from mutation import mutated

from selfalign.core.jsonl import write_records
from selfalign.core.records import ResponseScore
from selfalign.data.pair_rules import BestWorst
from selfalign.engines import responses
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.judges.sampled import SampledScore
from selfalign.models.batches import PairExample, SharedPrompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.runs.labels import Label
from selfalign.stages import judge, pair
from selfalign.stages.respond import RespondConfig, respond
from selfalign.store.artifacts import Artifact
from selfalign.tracking import tables
from selfalign.training import dataset
from selfalign.training.trainer import StepDataset

FEW, MANY = 40, 240
"""Instructions, each with two responses."""

CHUNK = 10
"""Of so many records at a time, in the place of thousands."""

TEXT = 4000
"""Characters of a response: enough that whoever keeps the responses stands out."""

Part = Callable[[Path, int, ModuleType, PolicyCheckpoint], None]


class Forgetful(Script):
    """Always writes the same, and keeps no request."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """A long text that a judge could have written."""
        return [[completion(f"{seed} {'x' * TEXT}\nScore: {seed % 6}") for seed in r.seeds] for r in requests]


def given(folder: Path, count: int) -> Artifact:
    """Instructions, responses, judgements and scores, written one by one."""
    folder.mkdir(parents=True)
    names = [f"i{number}-{n}" for number in range(count) for n in (1, 2)]
    write_records(folder / "instructions.jsonl", (instruction(f"i{number}") for number in range(count)))
    write_records(folder / "responses.jsonl", (response(name, f"{name} {'x' * TEXT}") for name in names))
    write_records(folder / "judgements.jsonl", (judgement(name, i % 6) for i, name in enumerate(names)))
    scores = (ResponseScore(id=n, score=float(i % 6), valid=1, variance=None) for i, n in enumerate(names))
    write_records(folder / "scores.jsonl", scores)
    return Artifact(stage="given", key="k", path=folder, digest="d", counts={}, seconds=0.0)


def make_responses(folder: Path, count: int, module: ModuleType, policy: PolicyCheckpoint) -> None:
    config = RespondConfig(candidates=2)
    script: Any = Forgetful(loaded(policy.path), [], per_batch=5)
    made = given(folder / "given", count)
    artifact = policy_artifact(policy)
    respond(workspace(folder), config=config, policy=artifact, instructions=made, engine=script, seed=0)


def make_judgements(folder: Path, count: int, module: ModuleType, policy: PolicyCheckpoint) -> None:
    kind = SampledScore(prompt=RUBRIC, num_samples=1, sampling=Sampling(max_new_tokens=1))
    script: Any = Forgetful(loaded(policy.path), [], per_batch=5)
    script.context = 1 << 20
    made = given(folder / "given", count)
    inputs = {"instructions": made, "responses": made, "reference": None, "policy": policy_artifact(policy)}
    module.judge(workspace(folder), judge=kind, engine=script, seed=0, **inputs)


def make_pairs(folder: Path, count: int, module: ModuleType, policy: PolicyCheckpoint) -> None:
    made = given(folder / "given", count)
    module.pair(workspace(folder), rule=BestWorst(), instructions=made, responses=made, judgements=made, seed=0)


def train(folder: Path, count: int, module: ModuleType, policy: PolicyCheckpoint) -> None:
    """Writes the table of examples, and fetches every step of two epochs."""

    def tokens() -> Iterator[PairExample]:
        for number in range(count):
            responses = [list(range(1000, 1500)), list(range(2000, 2500))]
            yield PairExample(
                plain=SharedPrompt(id=f"p{number}", prompt=[1], responses=responses, num_context_tokens=[0, 0])
            )

    stored = module.store_examples(folder, PairExample, tokens(), Counter())
    assert sum(len(step) for step in StepDataset(stored, 8, 2, 0)) == 2 * count


def read_tables(folder: Path, count: int, module: ModuleType, policy: PolicyCheckpoint) -> None:
    place = folder / "artifacts/iteration_1"
    given(place / "instructions", count)
    for name in ("responses", "judgements"):
        (place / name).symlink_to("instructions")
    for name, table in (("responses", module.candidates), ("judgements", module.scores)):
        assert sum(1 for _ in table(folder, Label.iteration(1, name))) == 2 * count


PARTS: list[tuple[ModuleType, Part, str, str]] = [
    (responses, make_responses, "written(generator, journal))", "list(written(generator, journal)))"),
    (judge, make_judgements, "for subjects in batches():", "for subjects in list(batches()):"),
    (pair, make_pairs, "join_sorted(prompts, scored,", "join_sorted(prompts, list(scored),"),
    (dataset, train, "chunks(examples, ROWS)", "chunks(list(examples), ROWS)"),
    (tables, read_tables, "join_sorted(instructions, responses,", "join_sorted(instructions, list(responses),"),
]
"""(module, what it does, and a mutant: old text and new, which keeps everything)."""


def growth(folder: Path, part: Part, module: ModuleType, policy: PolicyCheckpoint) -> int:
    """By how many bytes the peak of Python's memory is higher for many instructions than for few."""
    peaks: list[int] = []
    for count in (1, FEW, MANY):  # The first one is to import and load what there is.
        gc.collect()
        tracemalloc.start()
        try:
            part(folder / str(count), count, module, policy)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return peaks[2] - peaks[1]


@pytest.mark.parametrize(("module", "part", "old", "new"), PARTS, ids=[part.__name__ for _, part, _, _ in PARTS])
def test_memory_is_the_same_for_many_records_and_a_mutant_that_keeps_them_is_caught(
    tmp_path: Path,
    tiny_policy: PolicyCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    part: Part,
    old: str,
    new: str,
) -> None:
    more = (MANY - FEW) * 2 * TEXT
    monkeypatch.setattr(SampledScore, "instructions_per_call", CHUNK // 2)
    monkeypatch.setattr(dataset, "ROWS", CHUNK)
    monkeypatch.setattr("selfalign.core.jsonl.chunks.__defaults__", (CHUNK,))
    assert growth(tmp_path / "own", part, module, tiny_policy) < 0.1 * more
    with mutated(module, old, new) as mutant:
        assert growth(tmp_path / "mutant", part, mutant, tiny_policy) > 0.5 * more
