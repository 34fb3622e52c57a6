"""Estimate the stages of a run: measure each on a few records of the largest possible size.

`StageEstimator` takes the place of the runner in the pipeline. Given data is read, so the numbers of demonstrations and
pairs are those of the run. What the run would generate is replaced by dummy records, as many as the run makes at most.
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
from selfalign.core.records import (
    Criterion,
    Demonstration,
    Instruction,
    Judgement,
    JudgementStatus,
    Prompt,
    Response,
)
from selfalign.data.labelled import LABELLED
from selfalign.data.turns import as_prompt, as_text
from selfalign.engines.openai_client import Endpoint
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.criteria import CriteriaConfig, criteria_of
from selfalign.judges.protocol import NO_MODEL, InstructionResponse, asks_a_server
from selfalign.judges.rubric import EXAMPLE
from selfalign.judges.sampled import SampledScore
from selfalign.launch.profiler import Measured, ProfilingOutput, StageEstimate, forget_peak_memory, measure, peak
from selfalign.launch.worst_case import SHORTEST_PROMPT, WorstCaseRecords, distinct, max_length_generation
from selfalign.losses.protocol import PreferenceLoss, UnpairedLoss, is_unpaired
from selfalign.losses.refinement import Refinement
from selfalign.metrics import catalog
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.pipeline.requirements import judge_prompt, max_judgement_tokens
from selfalign.runs.labels import Label
from selfalign.stages.align import align
from selfalign.stages.compare_ranked import compare_ranked, ranked_pairs
from selfalign.stages.distorted_instructions import DistortionConfig, distorted_instructions
from selfalign.stages.head_to_head import head_to_head
from selfalign.stages.instruct import InstructConfig, instruct
from selfalign.stages.judge import Judge
from selfalign.stages.judge import judge as judge_stage
from selfalign.stages.kl_divergence import kl_divergence
from selfalign.stages.load_model import load_model
from selfalign.stages.meta_judge import MetaJudge, meta_judge
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.stages.respond import RespondConfig, respond
from selfalign.stages.sft import group_demonstrations, sft
from selfalign.stages.write_criteria import write_criteria
from selfalign.store.artifacts import Artifact, Store
from selfalign.store.key import to_key_json
from selfalign.store.stage import PlannedArtifact, StageFunction, declared, plan_stage, records_in
from selfalign.training.checkpoint_selection import CheckpointSelection
from selfalign.training.config import LogProbSettings, Optimization, TrainableWeights
from selfalign.training.unpaired import examples_in

FILLS_A_BATCH = 1 << 14
"""Tokens of a batch, where the engine does not set them."""


@dataclass(slots=True)
class StageEstimator:
    """Runner of a dry run: measures a stage where it knows how, and otherwise only plans it.

    Attributes:
        config: the experiment.
        folder: the folder for measured stages and their records.
        estimates: the estimates so far, in the order of the stages.
        unmeasured: labels of the stages that run a model and have no estimator here.
        measured: {digest of what a measurement depends on: (result, folder)}, so that an equal stage is not run again.
        written: the number of artifacts written with dummy records.
        longest: makes the dummy records; set when M0 is loaded.
        instructions: number of evaluation instructions, known when they are read.
    """

    config: ExperimentConfig
    folder: Path
    estimates: list[StageEstimate] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    measured: dict[str, tuple[Measured, Path]] = field(default_factory=dict)
    written: int = 0
    longest: WorstCaseRecords = field(init=False)
    instructions: int = 0

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return the artifact of given data or of M0, and for every other stage a planned artifact."""
        made = self._make(str(label), stage, inputs)
        if label == Label.input("questions"):
            self.instructions = made.counts[catalog.INSTRUCTIONS.name]
        return made

    def _make(self, label: str, stage: StageFunction, inputs: dict[str, Any]) -> Artifact:
        if declared(stage).given:
            return self._run(label, stage, inputs)
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
        """Return {stage: its estimator}.

        An estimator returns the fields of the planned artifact that later stages read, such as its path.
        """
        return {
            sft: self._sft,
            align: self._align,
            instruct: self._instruct,
            distorted_instructions: self._distorted_instructions,
            respond: self._respond,
            write_criteria: self._write_criteria,
            judge_stage: self._judge,
            head_to_head: self._head_to_head,
            compare_ranked: self._compare_ranked,
            meta_judge: self._meta_judge,
            kl_divergence: self._kl_divergence,
            reference_logprobs: self._reference_logprobs,
        }

    def _run(self, label: str, stage: StageFunction, inputs: dict[str, Any]) -> Artifact:
        store = Store(self.folder / "store")
        return store.make(stage.__name__, inputs, lambda out: stage(out, **inputs), label=label)

    # --- models ------------------------------------------------------------------------------------------------------

    def _load(self, label: str, inputs: dict[str, Any]) -> Artifact:
        forget_peak_memory()
        made = self._run(label, load_model, inputs)
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
        tokens, each, count = optimization.max_length, 1, records_in(demonstrations, "demonstrations")
        if not isinstance(demonstrations, PlannedArtifact):
            records = read_records(demonstrations.path / "demonstrations.jsonl", Demonstration)
            length, reduction = optimization.max_length, optimization.loss_reduction
            tokenizer = longest.tokenizer
            groups = list(group_demonstrations(tokenizer, records, length, Counter(), loss_reduction=reduction))
            each = max(len(group.responses) for group in groups)
            tokens, count = max(tokens, *map(len, groups)), len(groups)
        size = min(optimization.batch_size, count)
        few = self._write(demonstrations=longest.demonstrations(2 * size, tokens, each))
        given = {"demonstrations": few, "optimization": replace(optimization, epochs=1), "weights": weights}
        measured, folder = self._measure(label, sft, [tokens, each, size], **models, **given)
        steps = optimization.epochs * math.ceil(count / optimization.batch_size)
        self._add(label, measured, steps, "steps")
        return _policy(folder)

    def _align(
        self,
        label: str,
        *,
        pairs: Artifact,
        loss: PreferenceLoss | UnpairedLoss,
        held_out: int,
        selection: CheckpointSelection | None,
        optimization: Optimization,
        **others: Any,
    ) -> dict[str, Any]:
        unpaired = is_unpaired(loss)
        count = examples_in(pairs, unpaired=unpaired) - held_out
        if count < 1:
            raise SelfalignError(
                f"train.validation_pairs={held_out} of {count + held_out} pairs leaves none to train on: lower it"
            )
        size = min(optimization.batch_size, count)
        few = self._examples(2 * size, unpaired=unpaired)
        given = {"pairs": few, "loss": loss, "held_out": 0, "selection": None}
        given["optimization"] = replace(optimization, epochs=1)
        measured, folder = self._measure(label, align, [size, others["start"] is None], **given, **others)
        an_epoch = math.ceil(count / optimization.batch_size)
        # After training, the stage measures the log-probabilities of all pairs: at most an epoch.
        measured = replace(measured, around=measured.around + an_epoch * measured.each)
        self._add(label, measured, optimization.epochs * an_epoch, "steps")
        if selection is not None:
            self._selection(
                label, selection, math.ceil(optimization.epochs * an_epoch / selection.interval_steps), folder
            )
        return _policy(folder)

    def _selection(self, label: str, selection: CheckpointSelection, checkpoints: int, policy: Path) -> None:
        """Estimate the responses of every checkpoint, and the comparison of each checkpoint with the one before it."""
        shared = {"instructions": selection.instructions, "engine": selection.engine, "seed": selection.seed}
        config, before = RespondConfig(candidates=1, sampling=selection.sampling), len(self.estimates)
        answering = {"config": config, "policy": _trained(label, policy), **shared}
        answers = self._make(f"{label}/validation", respond, answering)
        judging = {"judge": selection.comparator, "policy": selection.compared_by}
        if checkpoints > 1:
            self._make(f"{label}/validation_compared", head_to_head, {"answers": answers, **judging, **shared})
        times = (checkpoints, checkpoints - 1)
        for index, (one, count) in enumerate(zip(self.estimates[before:], times, strict=False), start=before):
            more = {"count": count * one.count, "around": count * one.around, "cost": count * one.cost}
            self.estimates[index] = replace(one, **more)

    # --- generation and judging --------------------------------------------------------------------------------------

    def _instruct(self, label: str, *, config: InstructConfig, engine: Any, policy: Artifact, **others: Any) -> None:
        shown = config.seed_examples + config.generated_examples

        def ask(*texts: str) -> Prompt:
            return as_prompt("\n\n".join([config.prompt, *(f"Task 10: {text}" for text in texts), "Task 10:"]))

        room = self.longest.context - config.sampling.longest - SHORTEST_PROMPT
        texts = self.longest.fitting(ask, [self.longest.count("the " * config.max_words)] * shown, room)
        seeds = [Demonstration(id=f"d{n}", prompt=as_prompt(t), response="", source="ift") for n, t in enumerate(texts)]
        given = {"config": config, "seeds": self._write(demonstrations=seeds), "earlier": [], "held_out": []}
        given |= {"engine": max_length_generation(engine), "policy": policy, "seed": others["seed"]}
        measured, _ = self._measure(label, instruct, [], **given)
        self._add_batches(label, measured, config.most_batches)

    def _respond(
        self, label: str, *, config: RespondConfig, instructions: Artifact, engine: Any, **others: Any
    ) -> None:
        count, written = records_in(instructions, "instructions"), config.sampling.longest
        tokens = config.candidates * (self.longest.prompt_tokens(written) + written)
        few = self._few(count, tokens, engine)
        instructed = self._write(instructions=self.longest.instructions(few, written))
        given = {"config": config, "instructions": instructed, "engine": max_length_generation(engine), **others}
        measured, _ = self._measure(label, respond, [few], **given)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _judge(
        self, label: str, *, judge: Judge, instructions: Artifact, responses: Artifact, engine: Any, **others: Any
    ) -> None:
        if judge.model == NO_MODEL:  # What it scores is not like any text.
            self.unmeasured.append(label)
            return
        count, answers = records_in(instructions, "instructions"), records_in(responses, "responses")
        each, written = math.ceil(answers / count), max_judgement_tokens(judge)
        wanted = judge.wanted(self._subjects(1, each, ["", ""]))
        ask = judge_prompt(judge)
        texts = self._texts(ask, responses, written, server=asks_a_server(judge))
        if asks_a_server(judge):
            self._bill(label, judge, wanted * count, ask(*texts), written)
            return
        few = self._few(count, each * (self.longest.count("".join(texts)) + written), engine)
        subjects = self._subjects(few, each, texts)
        unique = list({subject.instruction.id: subject.instruction for subject in subjects}.values())
        if (most := self._criteria_each(judge, instructions)) is not None:
            criteria = [Criterion(text=distinct(EXAMPLE, number)) for number in range(most)]
            unique = [replace(instruction, criteria=criteria) for instruction in unique]
        given = self._write(instructions=unique, responses=[subject.response for subject in subjects])
        shared = {"instructions": given, "responses": given, "engine": max_length_generation(engine), "judge": judge}
        measured, _ = self._measure(label, judge_stage, [few, each], **shared, **others)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _distorted_instructions(
        self, label: str, *, config: DistortionConfig, seeds: Artifact, engine: Any, **others: Any
    ) -> None:
        count = records_in(seeds, "demonstrations")
        count, written = min(count, config.count or count), config.sampling.longest
        few = self._few(count, self.longest.prompt_tokens(written) + written, engine)
        room = self.longest.context - written - SHORTEST_PROMPT
        [text] = self.longest.fitting(config.ask, [self.longest.prompt_tokens(written)], room)
        asked = [
            Demonstration(id=f"d{n}", prompt=as_prompt(distinct(text, n)), response="Yes.", source="ift")
            for n in range(few)
        ]
        given = {"config": config, "seeds": self._write(demonstrations=asked), "held_out": []}
        given |= {"engine": max_length_generation(engine), "policy": others["policy"], "seed": others["seed"]}
        measured, _ = self._measure(label, distorted_instructions, [few], **given)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _write_criteria(
        self, label: str, *, config: CriteriaConfig, instructions: Artifact, engine: Any, **others: Any
    ) -> None:
        count, written = records_in(instructions, "instructions"), config.sampling.longest
        few = self._few(count, self.longest.prompt_tokens(written) + written, engine)
        room = self.longest.context - written
        [text] = self.longest.fitting(config.ask, [self.longest.prompt_tokens(written)], room)
        given = self._write(instructions=[subject.instruction for subject in self._subjects(few, 1, [text, ""])])
        shared = {"config": config, "instructions": given, "engine": max_length_generation(engine)}
        measured, _ = self._measure(label, write_criteria, [few], **shared, **others)
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
        count, ask = records_in(instructions, "instructions"), judge_prompt(judge)
        if not count:  # The instructions are those of a benchmark, which is not measured either.
            self.unmeasured.append(label)
            return
        texts = self._texts(ask, answers, 0, server=asks_a_server(judge))
        if asks_a_server(judge):
            self._bill(label, judge, 2 * count, ask(*texts), judge.verdict_tokens)
            return
        few = self._few(count, 2 * self.longest.count("".join(texts)), engine)
        subjects = self._subjects(few, 1, texts)
        few_of = self._write(instructions=[s.instruction for s in subjects], responses=[s.response for s in subjects])
        opponents = self._write(responses=[replace(s.response, text=distinct(texts[1], 1)) for s in subjects])
        given = {"judge": judge, "instructions": few_of, "answers": few_of, "opponent": opponents, "engine": engine}
        given |= {"policy": others["policy"], "seed": others["seed"]}
        measured, _ = self._measure(label, head_to_head, [few], **given)
        self._add_batches(label, measured, measured.batches_of(count / few))

    def _compare_ranked(self, label: str, *, judge: PairwiseComparator, ranked: Artifact, **others: Any) -> None:
        """Measure the first batch of the run's own ranked answers, which are given."""
        if asks_a_server(judge):
            asked = read_records(ranked.path / "instructions.jsonl", Instruction)
            answers = read_records(ranked.path / "responses.jsonl", Response)
            pairs = ranked_pairs(asked, answers, others["comparisons"], others["seed"])
            texts = [(pair.instruction.text, pair.first.text, pair.second.text) for pair in pairs]
            longest = max(texts, key=lambda one: sum(map(len, one)))
            self._bill(label, judge, 2 * len(pairs), judge.ask(*longest), judge.verdict_tokens)
            return
        measured, _ = self._measure(label, compare_ranked, [ranked.digest], judge=judge, ranked=ranked, **others)
        self._add_batches(label, measured, measured.batches_of(1))

    def _meta_judge(
        self,
        label: str,
        *,
        comparator: MetaJudge,
        judge: SampledScore,
        instructions: Artifact,
        responses: Artifact,
        engine: Any,
        **others: Any,
    ) -> None:
        def ask(instruction: str, response: str, judgement: str) -> Prompt:
            return comparator.ask(as_text(judge.ask(instruction, response)), judgement, judgement)

        count, answer = records_in(instructions, "instructions"), self._written(responses)
        compared = count * comparator.comparisons_of(judge.num_samples)
        room = 1 << 30 if asks_a_server(comparator) else self.longest.context - max_judgement_tokens(comparator) - 8
        tokens = [self.longest.prompt_tokens(answer), answer, judge.sampling.longest]
        *texts, written = self.longest.fitting(ask, tokens, room)
        if asks_a_server(comparator):
            self._bill(
                label, comparator, 2 * compared, ask(texts[0], texts[1], written), max_judgement_tokens(comparator)
            )
            return
        scores = [judge.min_score, judge.max_score, judge.max_score]
        each = comparator.comparisons_of(len(scores))
        few = self._few(count, 2 * each * self.longest.count("".join([*texts, written, written])), engine)
        subjects = self._subjects(few, 1, texts)
        given = self._write(
            instructions=[subject.instruction for subject in subjects],
            responses=[subject.response for subject in subjects],
            judgements=[
                Judgement(
                    id=f"{subject.response.id}-{n}",
                    response_id=subject.response.id,
                    status=JudgementStatus.OK,
                    score=score,
                    text=distinct(written, n),
                    model="dry run",
                )
                for subject in subjects
                for n, score in enumerate(scores)
            ],
        )
        shared = {"instructions": given, "responses": given, "engine": engine, "judge": judge}
        shared |= {"comparator": replace(comparator, minimum_pairs=0), "policy": others["policy"]}
        measured, _ = self._measure(label, meta_judge, [few], seed=others["seed"], **shared, judgements=given)
        self._add_batches(label, measured, measured.batches_of(compared / (few * each)))

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
        unpaired: bool = False,
        tokens_of: int = 0,  # a few passes more
    ) -> dict[str, Any]:
        count, few = examples_in(pairs, unpaired=unpaired), 2 * self.config.train.align.batch_size
        given = {"policy": policy, "augmentation": augmentation, "precision": precision, "unpaired": unpaired}
        given["pairs"] = self._examples(few, unpaired=unpaired)
        measured, folder = self._measure(label, reference_logprobs, [policy.digest], first_alone=False, **given)
        self._add_batches(label, measured, measured.batches_of(count / few))
        return {"path": folder}

    # --- measurements and dummy records ------------------------------------------------------------------------------

    def _measure(
        self, label: str, stage: StageFunction, depends_on: list[Any], *, first_alone: bool = True, **inputs: Any
    ) -> tuple[Measured, Path]:
        """Run a stage and return its measurement and folder.

        A stage with the same settings and the same `depends_on` is run once.
        """
        settings = {name: value for name, value in inputs.items() if name not in ("seed", "weights")}
        plain = {name: to_key_json(value) for name, value in settings.items() if not isinstance(value, Artifact)}
        key = digest_json([stage.__name__, plain, depends_on])
        if key not in self.measured:
            folder = self.folder / f"{stage.__name__}-{key[:12]}"
            out = ProfilingOutput(folder, label, first_alone=first_alone)
            self.measured[key] = measure(out, lambda out: stage(out, **inputs)), folder
        return self.measured[key]

    def _add(self, label: str, measured: Measured, count: int, unit: str) -> None:
        timed = {"each": measured.each, "around": measured.around, "peak": measured.peak}
        self.estimates.append(StageEstimate(label=label, count=count, unit=unit, **timed))

    def _add_batches(self, label: str, measured: Measured, count: int) -> None:
        """Add an estimate in batches, which are shared among the processes."""
        self._add(label, measured, math.ceil(count / distributed.count()), "batches")

    def _bill(self, label: str, judge: Any, requests: int, prompt: Prompt, written: int) -> None:
        """Add the cost of a server's tokens, counted with M0's tokenizer."""
        endpoint: Endpoint = judge.endpoint
        read = len(encode_prompt(self.longest.tokenizer, prompt))
        cost = requests * (read * endpoint.prompt_price + written * endpoint.completion_price) / 1e6
        self.estimates.append(StageEstimate(label=label, count=requests, unit="requests", cost=cost))

    def _write(self, **files: Sequence[HasId]) -> Artifact:
        """Write records to an artifact and return it."""
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
        """Return how many records of this many tokens fill a batch, at most `count`."""
        room = max(FILLS_A_BATCH, getattr(engine, "max_batch_tokens", 0))
        return min(count, 1 + room // tokens)

    def _written(self, responses: Artifact) -> int:
        """Return the maximum number of tokens of these responses; given ones count like candidates."""
        data = self.config.data
        candidates = data.respond.sampling.longest if isinstance(data, SelfRewarding) else self.longest.max_length
        return min(responses.counts.get("tokens_each", candidates), self.longest.context - SHORTEST_PROMPT)

    def _examples(self, count: int, *, unpaired: bool) -> Artifact:
        """Write so many pairs, or labelled responses for an unpaired loss."""
        data = self.config.data
        own = isinstance(data, SelfRewarding) and not data.replay.largest_share
        written = data.respond.sampling.longest if own else self.longest.max_length
        if unpaired:
            return self._write(**{LABELLED: self.longest.labelled(count, written)})
        return self._write(pairs=self.longest.pairs(count, written))

    def _texts(self, ask: Callable[..., Prompt], responses: Artifact, written: int, *, server: bool) -> list[str]:
        """Return a longest instruction and response whose judge prompt leaves room for the judgement."""
        answer = self._written(responses)
        room = 1 << 30 if server else self.longest.context - written - 8
        return self.longest.fitting(ask, [self.longest.prompt_tokens(answer), answer], room)

    def _criteria_each(self, judge: Judge, instructions: Artifact) -> int | None:
        """Return the most criteria of an instruction; None for a judge without criteria."""
        config = criteria_of(judge)
        if config is None or isinstance(instructions, PlannedArtifact):
            return config and config.count
        records = read_records(instructions.path / "instructions.jsonl", Instruction)
        return max(len(record.criteria or []) for record in records)

    def _subjects(self, count: int, each: int, texts: Sequence[str]) -> list[InstructionResponse]:
        """Return `count` instructions with `each` responses each."""
        instructions = [Instruction(id=f"i{n}", text=distinct(texts[0], n), source="self") for n in range(count)]
        return [
            InstructionResponse(instruction, response)
            for instruction in instructions
            for response in self.longest.responses(instruction, each, texts[1])
        ]


def _policy(folder: Path) -> dict[str, Any]:
    """Return the path and the digest of a trained policy."""
    return {"path": folder, "digest": PolicyCheckpoint(folder).digest}


def _trained(label: str, folder: Path) -> Artifact:
    return replace(PlannedArtifact("align", label, folder, digest=label, counts={}, seconds=0.0), **_policy(folder))
