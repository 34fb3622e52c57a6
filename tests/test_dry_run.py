"""dry_run=true: it covers what the run then does, with as many steps, at the greatest length, and leaves nothing."""

import importlib
import inspect
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from subprocess import DEVNULL
from typing import Any

import pytest
import torch
from builders import (
    TINY_RUN,
    Said,
    composed,
    metrics,
    planned,
    run,
    taught_policy,
    write_tiny_data,
)
from chat_server import chat_server
from mutation import mutated
from team import launch
from test_architecture import modules
from test_eft_runs import SETTINGS, SYNTHETIC, write_data
from warm import Command

from selfalign.core.errors import SelfalignError
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.transformers import Transformers
from selfalign.launch import dry_run as module
from selfalign.launch import dry_run_stages
from selfalign.launch.dry_run import dry_run, estimate_text
from selfalign.launch.dry_run_stages import StageEstimator
from selfalign.launch.profiler import ProfilingOutput, StageEstimate, fits, measure
from selfalign.launch.worst_case import SHORTEST_PROMPT, WorstCaseRecords, max_length_generation
from selfalign.losses.refinement import Refinement
from selfalign.models.batches import encode_pairs
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.pipeline import loop
from selfalign.pipeline.requirements import judge_prompt
from selfalign.runs.labels import Label
from selfalign.stages.benchmark import benchmark
from selfalign.stages.sft import group_demonstrations
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.journal import Journal
from selfalign.store.stage import declared, stage

SHORT = ["train.sft.max_length=160", "train.align.max_length=160", 'judge.prompt="Grade {instruction} of {response}"']
"""So that the longest sequence is short; its rubric leaves room for a response."""

BY_MODELS = {
    "load_model",
    "sft",
    "align",
    "instruct",
    "respond",
    "judge",
    "head_to_head",
    "compare_ranked",
    "reference_logprobs",
    "kl_divergence",
}
"""Stages that a model takes part in."""


def estimated(output: Path, *overrides: str) -> dict[str, StageEstimate]:
    """The estimates of a run, by stage."""
    return {one.label: one for one in dry_run(composed(*overrides, f"output_dir={output}")[0])}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How many batches every stage journals from now on, by its folder."""
    counted: Counter[Path] = Counter()
    original = Journal.keep

    def keep(self: Journal, name: str, result: Any) -> None:
        counted[self._folder.parent.resolve()] += 1
        original(self, name, result)

    monkeypatch.setattr(Journal, "keep", keep)
    return counted


def steps_of(folder: Path) -> Counter[str]:
    """How many optimiser steps a run has made, by the label of the training."""
    return Counter(row["label"] for row in metrics(folder) if any(name.endswith("/step") for name in row))


def test_every_stage_with_a_model_is_estimated_and_takes_as_many_batches_or_steps_at_most(
    tmp_path: Path, batches: Counter[Path]
) -> None:
    told = [*TINY_RUN, *SHORT, *write_tiny_data(tmp_path / "data"), "train.sft.epochs=2"]
    told += ["judge=expected_score", "data.instruct.max_batches=40"]
    estimates = estimated(tmp_path / "dry", *told)
    batches.clear()
    folder = run(tmp_path / "run", *told)
    made = {row["label"] for row in metrics(folder) if row["stage"] in BY_MODELS}
    assert list(estimates) == [row for row in dict.fromkeys(r["label"] for r in metrics(folder)) if row in made]
    steps = steps_of(folder)
    assert steps["M1"] == estimates["M1"].count > 4
    assert 0 < steps["M2"] <= estimates["M2"].count == 3
    for label in made - {"M0", "M1", "M2", "M3", "iteration_1/instructions", "iteration_2/instructions"}:
        assert 0 < batches[(folder / "artifacts" / label).resolve()] <= estimates[label].count, label
    assert all(one.seconds > 0 and one.peak > 1 << 20 for one in estimates.values())


def test_stages_of_synthetic_evaluation_fine_tuning_take_as_many_batches_at_most(
    tmp_path: Path, batches: Counter[Path]
) -> None:
    """Among them the one that distorts instructions, in several batches."""
    told = [*SETTINGS, *write_data(tmp_path / "data"), *SYNTHETIC, "engine.max_batch_tokens=600"]
    estimates = estimated(tmp_path / "dry", *told)
    batches.clear()
    folder = run(tmp_path / "run", *told)
    for label in ("eft/instructions", "eft/responses"):
        made = batches[(folder / "artifacts" / label).resolve()]
        assert 1 < made <= estimates[label].count, label
        assert estimates[label].seconds > 0


GIVEN_PAIRS = ["data=pairs", "iterations=1", "train.validation_pairs=1", "train.align.epochs=2", "evaluate=none"]
STEPS = {"M1": 9, "M2": 4}
"""Three epochs of 8 IFT and 3 EFT groups, 4 a step; two epochs of 3 pairs but for the one held out, 1 a step."""


def on_given_pairs(folder: Path) -> list[str]:
    """A tiny run that aligns on pairs which its seeds do not teach."""
    of_others = ("data.instruct", "data.respond", "evaluate.")
    told = [*TINY_RUN, *SHORT, *write_tiny_data(folder), f"data.path={folder / 'pairs.jsonl'}", *GIVEN_PAIRS]
    asked = {n: f"Say two things about {subject}." for n, subject in enumerate(("rain", "salt", "wool"))}
    rows = [{"prompt": text, "chosen": f"Old, and {n}.", "rejected": f"None. {n}"} for n, text in asked.items()]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [override for override in told if not override.startswith(of_others)]


def test_steps_of_an_alignment_on_given_pairs_are_those_of_the_run(tmp_path: Path) -> None:
    told = on_given_pairs(tmp_path / "data")
    estimates = estimated(tmp_path / "dry", *told)
    assert {label: estimates[label].count for label in STEPS} == STEPS == steps_of(run(tmp_path / "run", *told))


def test_checkpoints_answer_once_each_and_all_but_the_first_are_compared(tmp_path: Path) -> None:
    """Of two epochs of two steps, one in two is looked at: two checkpoints, one comparison."""
    told = on_given_pairs(tmp_path / "data")
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(f'{{"instruction": "What is {n} and 1?"}}\n' for n in range(3)), encoding="utf-8")
    asked = f"train.checkpoint_selection.instructions={validation}"
    told += [asked, "train.checkpoint_selection.sampling.max_new_tokens=8", "train.align.batch_size=1"]
    estimates = {
        every: estimated(tmp_path / str(every), *told, f"train.checkpoint_selection.interval_steps={every}")
        for every in (2, 1)
    }
    answered = {every: found["M2/validation"].count for every, found in estimates.items()}
    assert answered[1] == 2 * answered[2] > 0
    compared = {every: found["M2/validation_compared"].count for every, found in estimates.items()}
    assert compared[1] == 3 * compared[2] > 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("unpaired=unpaired) - held_out", "unpaired=unpaired)"),
        ("optimization.epochs * an_epoch, ", "an_epoch, "),
        ("steps = optimization.epochs * ", "steps = "),
    ],
    ids=["held-out pairs counted", "epochs of alignment forgotten", "epochs of SFT forgotten"],
)
def test_wrong_counts_of_steps_are_caught(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mutated(dry_run_stages, old, new) as copy:
        monkeypatch.setattr(module, "StageEstimator", copy.StageEstimator)
        estimates = estimated(tmp_path / "dry", *on_given_pairs(tmp_path / "data"))
        assert {label: estimates[label].count for label in STEPS} != STEPS


def test_command_line_prints_every_stage_and_leaves_nothing(call: Callable[..., Said], tmp_path: Path) -> None:
    told = [*TINY_RUN, *SHORT, *write_tiny_data(tmp_path / "data"), "iterations=1", "tracker=wandb"]
    said = call(*told, "dry_run=true", "price_per_hour=3600")
    assert said.code == 0, said.err
    for label in (
        "M0",
        "M1",
        "M2",
        "iteration_1/responses",
        "iteration_1/judgements",
        "evaluation_M1/ranked_comparisons",
    ):
        assert re.search(rf"^{label} +\d+ (model|steps|batches) +[\d.]+ +[\d.]+ +\d", said.out, re.MULTILINE), label
    assert re.search(r"^time +at most .*\s(s|min)$", said.out, re.MULTILINE)
    assert re.search(r"^cost +at most \d+\.\d\d: the machine", said.out, re.MULTILINE)
    assert "This is an upper bound." in said.out
    assert re.search(r"^sees    \d+ instructions with 33\u00a0% ties can see no difference", said.out, re.MULTILINE)
    assert list((tmp_path / "outputs").iterdir()) == []
    assert not (tmp_path / "wandb").exists()


def test_several_processes_measure_a_run_of_as_many_in_its_layout(call: Callable[..., Said], tmp_path: Path) -> None:
    told = [*TINY_RUN, *SHORT, *write_tiny_data(tmp_path / "data"), "iterations=1", "engine.max_batch_tokens=40"]
    told += [f"output_dir={tmp_path / 'outputs'}", "dry_run=true"]
    alone = call(*told)
    said = launch(tmp_path, "torchrun", *told, "train.parallelism.strategy=fsdp2", module="sharded")
    assert said.code == 0, said.err
    assert re.search(r"^memory +at most [\d.]+ GiB in each of 2 processes, in ", said.out, re.MULTILINE)
    assert said.out.count("This is an upper bound.") == 1
    work = r"^(\S+) +(\d+) (model|batches|steps) "
    shares = [
        (label, math.ceil(int(count) / 2) if unit == "batches" else int(count))
        for label, count, unit in re.findall(work, alone.out, re.MULTILINE)
    ]
    assert shares == [(label, int(count)) for label, count, _ in re.findall(work, said.out, re.MULTILINE)]
    assert any(label.endswith("responses") and count > 1 for label, count in shares)
    assert list((tmp_path / "outputs").iterdir()) == []


def test_dry_run_that_is_told_to_stop_leaves_nothing(tmp_path: Path) -> None:
    told = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), f"output_dir={tmp_path}/outputs", "dry_run=true"]
    with Command([sys.executable, "-m", "selfalign", *told], stderr=DEVNULL) as process:
        while not list(tmp_path.glob("outputs/.dry-run-*/*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 143
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize("key", ["train.sft", "train.align"])
def test_longest_sequence_above_the_context_is_refused_in_one_line(
    call: Callable[..., Said], tmp_path: Path, key: str
) -> None:
    data = write_tiny_data(tmp_path / "data")
    said = call(*TINY_RUN, *SHORT, *data, "evaluate=none", "dry_run=true", f"{key}.max_length=4096")
    assert said.code == 1
    assert said.err.splitlines()[-1] == (
        f"error: {key}.max_length=4096 is above the model's context of 2048 tokens: set it to that or less"
    )
    assert list((tmp_path / "outputs").iterdir()) == []


def test_sweep_has_no_dry_run(call: Callable[..., Said]) -> None:
    said = call("-m", "experiment=smoke", "loss.lam=0.1,0.5", "dry_run=true")
    assert said.code == 1
    assert "dry_run=true measures one run, not a sweep: set hydra.mode=RUN" in said.err


def test_stages_with_a_model_declare_their_sizes_and_most_are_measured(tmp_path: Path) -> None:
    names = [name for name in modules() if name.startswith("stages.")]
    members = [vars(importlib.import_module(f"selfalign.{name}")).values() for name in names]
    with_models = {one for several in members for one in several if inspect.isfunction(one) and declared(one).all_ranks}
    assert len(with_models) == 13
    assert all(declared(one).size for one in with_models)
    assert with_models - StageEstimator(composed()[0], tmp_path)._estimators.keys() == {benchmark}


# --- records ------------------------------------------------------------------------------------------------------


@pytest.fixture
def longest(tiny_tokenizer: Any) -> WorstCaseRecords:
    return WorstCaseRecords(tiny_tokenizer, context=2048, max_length=400)


def test_pairs_fill_the_longest_sequence_and_none_is_cut_or_dropped(longest: WorstCaseRecords) -> None:
    for p in (None, Refinement()):
        for written in (50, 1000):
            tally: Counter[str] = Counter()
            made = longest.pairs(3, written)
            examples = list(encode_pairs(longest.tokenizer, made, p, longest.max_length, tally))
            assert (len(examples), tally["too_long"], tally["cut"]) == (3, 0, 0)
            assert 0.9 * 400 <= max(example.plain.longest() for example in examples) <= 400, "p comes on top"
            answers = [len(response) for response in examples[0].plain.responses]
            assert all(0.9 * min(written, 400 - SHORTEST_PROMPT) <= n <= written for n in answers)


@pytest.mark.parametrize(("tokens", "family"), [(400, 1), (400, 4), (1200, 4)])
def test_demonstrations_fill_the_longest_group(longest: WorstCaseRecords, tokens: int, family: int) -> None:
    records = longest.demonstrations(3, tokens, family)
    groups = list(group_demonstrations(longest.tokenizer, records, longest.max_length, Counter()))
    assert [len(group.responses) for group in groups] == [family] * 3
    assert all(0.9 * tokens <= len(group) <= tokens for group in groups)


def test_instructions_leave_room_for_the_answer(longest: WorstCaseRecords) -> None:
    lengths = [
        len(encode_prompt(longest.tokenizer, as_prompt(longest.instructions(1, written)[0].text)))
        for written in (100, 390)
    ]
    assert 0.9 * 300 <= lengths[0] <= 300
    assert lengths[1] <= SHORTEST_PROMPT


def test_question_about_texts_that_do_not_fit_is_asked_about_shorter_ones(longest: WorstCaseRecords) -> None:
    judge = composed("experiment=smoke", "judge=expected_score")[0].judge
    rubric = len(encode_prompt(longest.tokenizer, judge.ask("", "")))
    texts = longest.fitting(judge_prompt(judge), [1000, 1000], rubric + 300)
    assert rubric + 250 <= len(encode_prompt(longest.tokenizer, judge.ask(*texts))) <= rubric + 300
    with pytest.raises(SelfalignError, match=r"longer than the 20 tokens that are available"):
        longest.fitting(judge_prompt(judge), [1000, 1000], 20)


def test_texts_are_written_to_their_last_token(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    taught, backend = taught_policy(tiny_policy, tmp_path), Transformers(dtype="float32")
    prompt = encode_prompt(taught.load_tokenizer(), as_prompt("Say one thing about bees."))
    lengths = [
        engine.load(taught).generate([Request(prompt=prompt, seeds=[1])], Sampling(max_new_tokens=48))[0][0].tokens
        for engine in (backend, max_length_generation(backend))
    ]
    assert lengths[0] < lengths[1] == 48


# --- measuring ----------------------------------------------------------------------------------------------------


def test_a_stage_ends_behind_its_first_batch_and_says_how_many_there_would_be(tmp_path: Path) -> None:
    done: list[str] = []

    def stage(out: Any) -> None:
        with out.journal(10, "records") as journal:
            for _ in journal.batches((name, 4, lambda name=name: done.append(name)) for name in "abc"):
                pass

    one = measure(ProfilingOutput(tmp_path / "one", "M1", first_alone=True), stage)
    assert done == ["a"]
    assert [one.batches_of(share) for share in (0.4, 1, 4, 4.01)] == [1, 3, 10, 11]
    whole = measure(ProfilingOutput(tmp_path / "whole", "M1", first_alone=False), stage)
    assert done == ["a", "a", "b", "c"]
    assert whole.batches == 2.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its memory is measured")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system cannot forget a peak")
def test_memory_of_a_stage_is_its_own(tmp_path: Path) -> None:
    def holds(gigabytes: float) -> int:
        def stage(out: Any) -> None:
            with out.journal(1, "records") as journal:
                list(journal.batches([("a", 1, lambda: float(torch.ones(int(gigabytes * (1 << 28))).sum()))]))

        return measure(ProfilingOutput(tmp_path / str(gigabytes), "M1", first_alone=True), stage).peak

    first, second = holds(0.5), holds(0.1)
    assert 0.3 * (1 << 30) < first - second < 0.5 * (1 << 30)


def test_what_does_not_fit_is_said_in_one_line_with_what_to_set() -> None:
    advice = r"^M2 does not fit into memory .*gradient_checkpointing=true.*nf4\)$"
    with pytest.raises(SelfalignError, match=advice), fits("M2"):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="another"), fits("M2"):
        raise RuntimeError("another")


def test_time_is_that_of_all_batches_and_the_rest_and_costs_by_the_hour() -> None:
    one = StageEstimate(label="M1", count=10, unit="steps", each=350, around=100, peak=3 << 29)
    assert one.seconds == 3600
    billed = StageEstimate(label="iteration_1/judgements", count=7, unit="requests", cost=1.25)
    text = estimate_text([one, billed], price_per_hour=2)
    assert "time    at most 1\u00a0h 0\u00a0min" in text
    assert "memory  at most 1.50 GiB, in M1" in text
    assert "cost    at most 3.25: the machine 2.00, servers 1.25" in text
    assert re.search(r"^iteration_1/judgements +7 requests +– +– +–$", text, re.MULTILINE)


def test_stages_that_nobody_knows_are_planned_measured_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def thin_pairs(out: StageOutput, *, pairs: Artifact) -> Counts:
        copy(pairs.path / "pairs.jsonl", out.path)
        return {"thinned": pairs.counts["pairs"]}

    @stage(all_ranks=True)
    def weigh_pairs(out: StageOutput, *, pairs: Artifact) -> Counts:
        return {"weighed": pairs.counts["thinned"]}

    align = loop.Method.align

    def thin_and_align(self: loop.Method, iteration: int, models: Any, pairs: Artifact) -> Artifact:
        thinned = self.run.make(Label.iteration(iteration, "thinned"), thin_pairs, pairs=pairs)
        self.run.make(Label.iteration(iteration, "weighed"), weigh_pairs, pairs=thinned)
        return align(self, iteration, models, thinned)

    monkeypatch.setattr(loop.Method, "align", thin_and_align)
    told = on_given_pairs(tmp_path / "data")
    assert {"iteration_1/thinned", "iteration_1/weighed"} < set(planned(composed(*told)[0]))
    estimates = estimated(tmp_path / "dry", *told)
    assert {label: estimates[label].count for label in STEPS} == STEPS
    assert {"iteration_1/thinned", "iteration_1/weighed"}.isdisjoint(estimates)
    assert "\nNot measured: iteration_1/weighed\n" in capsys.readouterr().out
    rows = metrics(run(tmp_path / "run", *told))
    assert [row.get("thinned", row.get("weighed")) for row in rows if row["stage"].endswith("_pairs")][-2:] == [3, 3]


def test_server_is_asked_once_and_its_tokens_are_billed(tmp_path: Path) -> None:
    told = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), "evaluate=none", "iterations=1", "judge=external"]
    told += ["judge.num_samples=2", "judge.sampling.max_new_tokens=100", "train.sft.max_length=160"]
    told += ["judge.endpoint.api_key_env=''", "judge.endpoint.model=m", "train.align.max_length=160"]
    told += ["judge.endpoint.completion_price=1e6", "data.seed_data.eft_source=none"]
    told = [override for override in told if not override.startswith("evaluate.")]
    with chat_server() as server:
        estimates = estimated(tmp_path / "free", *told, f"judge.endpoint.base_url={server.url}")
        assert len(server.bodies) == 1, "once before, to see whether it is there"
    asked = estimates["iteration_1/judgements"]
    assert (asked.count, asked.unit, asked.cost) == (3 * 3 * 2, "requests", 3 * 3 * 2 * 100)
