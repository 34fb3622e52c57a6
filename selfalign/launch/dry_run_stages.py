"""A run's stages on a few records each that are as long as they may be: what one batch or step takes, and how many.

A rehearsal walks through the pipeline in a run's place. What is given is read for real, so there are as many
demonstrations and pairs as in the run; what the run would make is made up, as many records as it would be at most.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfalign.config.data import SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json
from selfalign.core.jsonl import HasId, read_records, write_records
from selfalign.core.records import Demonstration, Instruction, PreferencePair, Prompt
from selfalign.data.sources import as_prompt
from selfalign.engines.openai_client import Endpoint
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.protocol import InstructionResponse, asks_a_server
from selfalign.launch.profiler import Measured, ProfilingOutput, StageEstimate, forget_peak_memory, measure, peak
from selfalign.launch.worst_case import SHORTEST_PROMPT, WorstCaseRecords, max_length_generation
from selfalign.losses.protocol import PreferenceLoss
from selfalign.losses.refinement import Refinement
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.pipeline.requirements import asks, writes
from selfalign.runs.labels import Label
from selfalign.stages.align import align
from selfalign.stages.head_to_head import head_to_head
from selfalign.stages.instruct import InstructConfig, instruct
from selfalign.stages.judge import Judge
from selfalign.stages.judge import judge as judge_stage
from selfalign.stages.kl_divergence import kl_divergence
from selfalign.stages.load_model import load_model
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.stages.respond import RespondConfig, respond
from selfalign.stages.sft import group_demonstrations, sft
from selfalign.store.artifacts import Artifact, Store
from selfalign.store.key import to_key_json
from selfalign.store.stage import PlannedArtifact, StageFunction, declared, plan_stage, records_in
from selfalign.training.checkpoint_selection import CheckpointSelection
from selfalign.training.config import LogProbSettings, Optimization, TrainableWeights

FILLS_A_BATCH = 1 << 14
"""Tokens of the records that stages are given where nothing says how many a batch takes."""


@dataclass(slots=True)
class StageEstimator:
    """Takes the place of a run: measures a stage where it knows how, and else plans it.

    Attributes:
        config: the experiment.
        folder: for what is made on the way.
        estimates: what was found out, stage by stage.
        unmeasured: labels of the stages with a model that it knows no way to measure.
        measured: what it rests on, by what the measurement depends on; a stage that comes again is not run again.
        written: how many times records were written for a stage.
    """

    config: ExperimentConfig
    folder: Path
    estimates: list[StageEstimate] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    measured: dict[str, tuple[Measured, Path]] = field(default_factory=dict)
    written: int = 0
    longest: WorstCaseRecords = field(init=False)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """The artifact itself of what is given, else what stands for it."""
        return self._make(str(label), stage, inputs)

    def _make(self, label: str, stage: StageFunction, inputs: dict[str, Any]) -> Artifact:
        if declared(stage).given:
            return self._really_make(label, stage, inputs)
        if stage is load_model:
            return self._load(label, inputs)
        planned, _ = plan_stage(label, stage, inputs)
        if estimate := self._estimators.get(stage):
            return replace(planned, **(estimate(label, **inputs) or {}))
        if declared(stage).all_ranks:
            self.unmeasured.append(label)
        return planned

    @property
    def _estimators(self) -> dict[StageFunction, Callable[..., dict[str, Any] | None]]:
        """{stage: what measures it}; returns where the artifact lies, if others read more of it than its counts."""
        return {
            sft: self._sft,
            align: self._align,
            instruct: self._instruct,
            respond: self._respond,
            judge_stage: self._judge,
            head_to_head: self._head_to_head,
            kl_divergence: self._kl_divergence,
            reference_logprobs: self._reference_logprobs,
        }

    def _really_make(self, label: str, stage: StageFunction, inputs: dict[str, Any]) -> Artifact:
        store = Store(self.folder / "store")
        return store.make(stage.__name__, inputs, lambda out: stage(out, **inputs), label=label)

    # --- models ------------------------------------------------------------------------------------------------------

    def _load(self, label: str, inputs: dict[str, Any]) -> Artifact:
        forget_peak_memory()
        made = self._really_make(label, load_model, inputs)
        self.estimates.append(StageEstimate(label=label, count=1, unit="model", each=made.seconds, peak=peak()))
        if label == "M0":
            files = PolicyCheckpoint(made.path)
            self.longest = WorstCaseRecords(files.load_tokenizer(), files.context, self.config.train.align.max_length)
        return made

    def _sft(
        self,
        label: str,
        *,
        demonstrations: Artifact,
        optimization: Optimization,
        weights: TrainableWeights,
        **models: Artifact,
    ) -> dict[str, Any]:
        longest = replace(self.longest, max_length=optimization.max_length)
        tokens, family, count = optimization.max_length, 1, records_in(demonstrations, "demonstrations")
        if not isinstance(demonstrations, PlannedArtifact):
            records = read_records(demonstrations.path / "demonstrations.jsonl", Demonstration)
            groups = list(group_demonstrations(longest.tokenizer, records, optimization.max_length, Counter()))
            family = max(len(group.responses) for group in groups)
            tokens, count = max(tokens, *map(len, groups)), len(groups)
        size = min(optimization.batch_size, count)
        few = self._write(demonstrations=longest.demonstrations(2 * size, tokens, family))
        given = {"demonstrations": few, "optimization": replace(optimization, epochs=1), "weights": weights}
        measured, folder = self._measure(label, sft, [tokens, family, size], **models, **given)
        steps = optimization.epochs * math.ceil(count / optimization.batch_size)
        self._add(label, measured, steps, "steps")
        return _policy(folder)

    def _align(
        self,
        label: str,
        *,
        pairs: Artifact,
        loss: PreferenceLoss,
        held_out: int,
        selection: CheckpointSelection | None,
        optimization: Optimization,
        **others: Any,
    ) -> dict[str, Any]:
        count = records_in(pairs, "pairs") - held_out
        if count < 1:
            raise SelfalignError(
                f"train.validation_pairs={held_out} of {count + held_out} pairs leaves none to train on"
            )
        size = min(optimization.batch_size, count)
        few = self._write(pairs=self._pairs(2 * size))
        given = {"pairs": few, "loss": loss, "held_out": 0, "selection": None}
        given["optimization"] = replace(optimization, epochs=1)
        measured, folder = self._measure(label, align, [size, others["start"] is None], **given, **others)
        an_epoch = math.ceil(count / optimization.batch_size)
        # The measuring behind it is another epoch without a backward pass.
        measured = replace(measured, around=measured.around + an_epoch * measured.each)
        self._add(label, measured, optimization.epochs * an_epoch, "steps")
        if selection is not None:
            self._selection(
                label, selection, math.ceil(optimization.epochs * an_epoch / selection.interval_steps), folder
            )
        return _policy(folder)

    def _selection(self, label: str, selection: CheckpointSelection, checkpoints: int, policy: Path) -> None:
        """The answers of every checkpoint, and the comparison of each with the one before it."""
        shared = {"instructions": selection.instructions, "engine": selection.engine, "seed": selection.seed}
        config, before = RespondConfig(candidates=1, sampling=selection.sampling), len(self.estimates)
        answering = {"config": config, "policy": _trained(label, policy), **shared}
        answers = self._make(f"{label}/validation", respond, answering)
        who = {"judge": selection.comparator, "policy": selection.compared_by}
        if checkpoints > 1:
            self._make(f"{label}/validation_compared", head_to_head, {"answers": answers, **who, **shared})
        times = (checkpoints, checkpoints - 1)
        for place, (one, count) in enumerate(zip(self.estimates[before:], times, strict=False), start=before):
            more = {"count": count * one.count, "around": count * one.around, "cost": count * one.cost}
            self.estimates[place] = replace(one, **more)

    # --- what is written and judged ----------------------------------------------------------------------------------

    def _instruct(self, label: str, *, config: InstructConfig, engine: Any, policy: Artifact, **others: Any) -> None:
        shown = config.seed_examples + config.generated_examples

        def ask(*texts: str) -> Prompt:
            return as_prompt("\n\n".join([config.prompt, *(f"Task 10: {text}" for text in texts), "Task 10:"]))

        room = self.longest.context - config.sampling.longest - SHORTEST_PROMPT
        texts = self.longest.fitting(ask, [self.longest.count("the " * config.max_words)] * shown, room)
        taught = [
            Demonstration(id=f"d{n}", prompt=as_prompt(t), response="", source="ift") for n, t in enumerate(texts)
        ]
        given = {"config": config, "seeds": self._write(demonstrations=taught), "earlier": [], "held_out": []}
        given |= {"engine": max_length_generation(engine), "policy": policy, "seed": others["seed"]}
        measured, _ = self._measure(label, instruct, [], **given)
        self._add_batches(label, measured, config.most_batches)

    def _respond(
        self, label: str, *, config: RespondConfig, instructions: Artifact, engine: Any, **others: Any
    ) -> None:
        count, written = records_in(instructions, "instructions"), config.sampling.longest
        tokens = config.candidates * (self.longest.prompt_tokens(written) + written)
        few = self._few(count, tokens, engine)
        asked = self._write(instructions=self.longest.instructions(few, written))
        given = {"config": config, "instructions": asked, "engine": max_length_generation(engine), **others}
        measured, _ = self._measure(label, respond, [few], **given)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _judge(
        self, label: str, *, judge: Judge, instructions: Artifact, responses: Artifact, engine: Any, **others: Any
    ) -> None:
        count, answers = records_in(instructions, "instructions"), records_in(responses, "responses")
        each, written = math.ceil(answers / count), writes(judge)
        wanted = judge.wanted(self._subjects(1, each, ["", ""]))
        ask = asks(judge)
        texts = self._texts(ask, responses, written, server=asks_a_server(judge))
        if asks_a_server(judge):
            self._bill(label, judge, wanted * count, ask(*texts), written)
            return
        few = self._few(count, each * (self.longest.count("".join(texts)) + written), engine)
        subjects = self._subjects(few, each, texts)
        asked = list({subject.instruction.id: subject.instruction for subject in subjects}.values())
        given = self._write(instructions=asked, responses=[subject.response for subject in subjects])
        shared = {"instructions": given, "responses": given, "engine": max_length_generation(engine), "judge": judge}
        measured, _ = self._measure(label, judge_stage, [few, each], **shared, **others)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _head_to_head(
        self,
        label: str,
        *,
        judge: PairwiseComparator,
        instructions: Artifact,
        answers: Artifact,
        engine: Any,
        **others: Any,
    ) -> None:
        count, ask = records_in(instructions, "instructions"), asks(judge)
        if not count:  # On the questions of a benchmark, which is not measured either.
            self.unmeasured.append(label)
            return
        texts = self._texts(ask, answers, 0, server=asks_a_server(judge))
        if asks_a_server(judge):
            self._bill(label, judge, 2 * count, ask(*texts), judge.verdict_tokens)
            return
        few = self._few(count, 2 * self.longest.count("".join(texts)), engine)
        subjects = self._subjects(few, 1, texts)
        asked = self._write(instructions=[s.instruction for s in subjects], responses=[s.response for s in subjects])
        given = {"judge": judge, "instructions": asked, "answers": asked, "opponent": asked, "engine": engine}
        given |= {"policy": others["policy"], "seed": others["seed"]}
        measured, _ = self._measure(label, head_to_head, [few], **given)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _kl_divergence(self, label: str, *, answers: Artifact, **others: Any) -> None:
        count, written = records_in(answers, "responses"), self._written(answers)
        few = self._few(count, self.longest.prompt_tokens(written) + written, None)
        texts = [self.longest.words(self.longest.prompt_tokens(written)), self.longest.words(written)]
        subjects = self._subjects(few, 1, texts)
        given = self._write(instructions=[s.instruction for s in subjects], responses=[s.response for s in subjects])
        models = {name: others[name] for name in ("policy", "origin")}
        measured, _ = self._measure(label, kl_divergence, [few], instructions=given, answers=given, **models)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _reference_logprobs(
        self,
        label: str,
        *,
        policy: Artifact,
        pairs: Artifact,
        augmentation: Refinement | None,
        precision: LogProbSettings,
    ) -> dict[str, Any]:
        count, few = records_in(pairs, "pairs"), 2 * self.config.train.align.batch_size
        given = {"policy": policy, "augmentation": augmentation, "precision": precision}
        given["pairs"] = self._write(pairs=self._pairs(few))
        measured, folder = self._measure(label, reference_logprobs, [policy.digest], first_alone=False, **given)
        self._add_batches(label, measured, measured.batches_of(count / few))
        return {"path": folder}

    # --- how ---------------------------------------------------------------------------------------------------------

    def _measure(
        self, label: str, stage: StageFunction, depends_on: list[Any], *, first_alone: bool = True, **inputs: Any
    ) -> tuple[Measured, Path]:
        """What a stage takes, and its folder; run once for what it depends on: its settings, and `depends_on`."""
        settings = {name: value for name, value in inputs.items() if name not in ("seed", "weights")}
        plain = {name: to_key_json(value) for name, value in settings.items() if not isinstance(value, Artifact)}
        key = digest_json([stage.__name__, plain, depends_on])
        if key not in self.measured:
            folder = self.folder / f"{stage.__name__}-{key[:12]}"
            watch = ProfilingOutput(folder, label, first_alone=first_alone)
            self.measured[key] = measure(watch, lambda out: stage(out, **inputs)), folder
        return self.measured[key]

    def _add(self, label: str, measured: Measured, count: int, unit: str) -> None:
        timed = {"each": measured.each, "around": measured.around, "peak": measured.peak}
        self.estimates.append(StageEstimate(label=label, count=count, unit=unit, **timed))

    def _add_batches(self, label: str, measured: Measured, count: int) -> None:
        """These are dealt out among the processes."""
        self._add(label, measured, math.ceil(count / distributed.count()), "batches")

    def _bill(self, label: str, judge: Any, requests: int, prompt: Prompt, written: int) -> None:
        """What a server's tokens cost, as this model's tokenizer counts them."""
        endpoint: Endpoint = judge.endpoint
        read = len(encode_prompt(self.longest.tokenizer, prompt))
        cost = requests * (read * endpoint.prompt_price + written * endpoint.completion_price) / 1e6
        self.estimates.append(StageEstimate(label=label, count=requests, unit="requests", cost=cost))

    def _write(self, **files: Sequence[HasId]) -> Artifact:
        """Records as a stage is given them."""
        self.written += 1
        folder = self.folder / f"given-{self.written}"

        def write() -> None:
            folder.mkdir()
            for name, records in files.items():
                write_records(folder / f"{name}.jsonl", records)

        distributed.on_main(write)
        counts = {"ift": len(files.get("demonstrations", ()))}
        return Artifact("given", key="given", path=folder, digest="given", counts=counts, seconds=0.0)

    def _few(self, count: int, tokens: int, engine: Any) -> int:
        """How many records of so many tokens surely fill a batch, where there are as many."""
        room = max(FILLS_A_BATCH, getattr(engine, "max_batch_tokens", 0))
        return min(count, 1 + room // tokens)

    def _written(self, responses: Artifact) -> int:
        """The most tokens of these responses: as many as were asked for, of given ones as many as candidates have."""
        data = self.config.data
        candidates = data.respond.sampling.longest if isinstance(data, SelfRewarding) else self.longest.max_length
        return min(responses.counts.get("tokens_each", candidates), self.longest.context - SHORTEST_PROMPT)

    def _pairs(self, count: int) -> list[PreferencePair]:
        data = self.config.data
        written = data.respond.sampling.longest if isinstance(data, SelfRewarding) else self.longest.max_length
        return self.longest.pairs(count, written)

    def _texts(self, ask: Callable[..., Prompt], responses: Artifact, written: int, *, server: bool) -> list[str]:
        """An instruction and a response, such that the question about them leaves room for what is written."""
        answer = self._written(responses)
        room = 1 << 30 if server else self.longest.context - written - 8
        return self.longest.fitting(ask, [self.longest.prompt_tokens(answer), answer], room)

    def _subjects(self, count: int, each: int, texts: Sequence[str]) -> list[InstructionResponse]:
        """So many instructions with as many responses each."""
        asked = [Instruction(id=f"i{n}", text=texts[0], source="self") for n in range(count)]
        return [
            InstructionResponse(one, response)
            for one in asked
            for response in self.longest.responses(one, each, texts[1])
        ]


def _policy(folder: Path) -> dict[str, Any]:
    """Where a trained policy lies, and its digest."""
    return {"path": folder, "digest": PolicyCheckpoint(folder).digest}


def _trained(label: str, folder: Path) -> Artifact:
    return replace(PlannedArtifact("align", label, folder, digest=label, counts={}, seconds=0.0), **_policy(folder))
