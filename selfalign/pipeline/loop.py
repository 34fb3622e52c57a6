"""The method on one page.

M0 is fine-tuned to M1. Then, in each iteration, the model writes new instructions, generates several responses to each,
and judges its own responses. The best response is paired with the worst, and the model is aligned on the pairs:
M_t → M_{t+1} (arXiv 2401.10020). The alignment loss may refine its margin with the policy's own judgement of the
responses (arXiv 2405.21040).
"""

from dataclasses import dataclass, field, replace

from selfalign.config.data import SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import derive_seed
from selfalign.judges.protocol import asks_a_server
from selfalign.losses.protocol import aligns, is_unpaired, loss_at, reference_augmentation_of
from selfalign.models.config import ModelConfig
from selfalign.pipeline.dtypes import resolve_dtypes
from selfalign.pipeline.evaluation import Evaluation
from selfalign.pipeline.generation import PairGeneration
from selfalign.pipeline.inputs import RunInputs, makes_baseline
from selfalign.pipeline.models import RunJudge, RunModels, checkpoint_judge, fixed_judges, load_from_outside
from selfalign.pipeline.requirements import check_requirements
from selfalign.runs.labels import AHEAD, BASELINE, Label, model_after
from selfalign.runs.planner import PlannedStage, Planner
from selfalign.runs.runner import StageRunner
from selfalign.stages.align import align
from selfalign.stages.distorted_instructions import distorted_instructions, distorted_questions
from selfalign.stages.evaluation_fine_tuning import evaluation_fine_tuning
from selfalign.stages.pair import gather_pairs, replay_pairs
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.stages.respond import RespondConfig, respond
from selfalign.stages.seed_data import EFTSource
from selfalign.stages.sft import sft
from selfalign.store.artifacts import Artifact
from selfalign.training.checkpoint_selection import CheckpointSelection
from selfalign.training.config import TrainableWeights


def run_pipeline(config: ExperimentConfig, run: StageRunner) -> None:
    """Train M0 → M1 → … → M_{iterations+1}, and evaluate each model."""
    config = resolve_dtypes(config)
    method = Method(config, run, RunInputs(config, run))
    models = method.models()
    method.sft_data = method.demonstrations(models)
    models.sft = models.current = method.fine_tune(models)
    method.evaluation.measure("M1", models)
    for iteration in range(1, config.iterations + 1):
        pairs = method.pairs(iteration, models)
        reference = method.reference(iteration, models)
        aligned = method.align(iteration, models, pairs)
        models.previous, models.current, models.reference = models.current, aligned, reference
        loss = config.in_iteration(iteration).loss
        method.evaluation.measure(model_after(iteration), models, loss=loss)


def plan(config: ExperimentConfig) -> list[PlannedStage]:
    """Return every stage of a run, in order, without reading or making anything."""
    planner = Planner()
    run_pipeline(config, planner)
    return planner.stages


@dataclass(slots=True)
class Method:
    """The steps of the method with their settings and seeds.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        inputs: the run's data.
        generated_pairs: the pairs that the iterations so far generated.
        replayed_pairs: {iteration: the given pairs that it drew}.
        sft_data: the demonstrations that M1 is trained on.
        judging: judges with the run's judge.
        generation: generates pairs.
        evaluation: evaluates the models.
    """

    config: ExperimentConfig
    run: StageRunner
    inputs: RunInputs
    generated_pairs: list[Artifact] = field(default_factory=list)
    replayed_pairs: dict[int, Artifact] = field(default_factory=dict)
    sft_data: Artifact = field(init=False)
    judging: RunJudge = field(init=False)
    generation: PairGeneration = field(init=False)
    evaluation: Evaluation = field(init=False)

    def __post_init__(self) -> None:
        self.judging = RunJudge(self.config, self.run, self.config.judge)
        self.generation = PairGeneration(self.config, self.run, self.inputs, self.align)
        self.evaluation = Evaluation(self.config, self.run, self.inputs, self.judging)

    def models(self) -> RunModels:
        """Load M0, and the models that only write instructions or judge."""
        base = load_from_outside(self.run, Label.model("M0"), self.config.model, "model.path")
        check_requirements(self.config, base, self.inputs)
        writer, judges = self._fixed_writer(), fixed_judges(self.config, self.run)
        judges["checkpoint_judge"] = checkpoint_judge(self.config, self.run)
        return RunModels(base, base, base, base, base, writer, generated_pairs=self.generated_pairs, **judges)

    def demonstrations(self, models: RunModels) -> Artifact:
        """Return the IFT and EFT demonstrations. The SFT baseline writes the EFT part if `eft_source` asks for it."""
        if not makes_baseline(self.config):
            return self.inputs.seed_data
        baseline = replace(models, current=self.supervise(BASELINE, models, self.inputs.ift()))
        self.evaluation.measure(BASELINE, baseline, judging_only=True)
        seeds = self.config.data.seed_data
        if seeds.eft_source == EFTSource.human:
            return self.inputs.seed_data
        synthetic = seeds.eft_source == EFTSource.synthetic
        questions = self._synthetic_questions(baseline.current) if synthetic else self.inputs.eft_questions()
        return self.run.make(
            Label.input("eft", "demonstrations"),
            evaluation_fine_tuning,
            judge=self.config.judge,
            policy=baseline.current,
            seeds=self.inputs.seed_data,
            questions=questions,
            judgements=self.judging.judge(Label.input("eft", "judgements"), "self", baseline, questions, questions),
            max_score_imbalance=seeds.max_score_imbalance,
        )

    def _synthetic_questions(self, baseline: Artifact) -> Artifact:
        """Rank demonstrations above the SFT baseline's answers to distorted instructions (arXiv 2408.02666)."""
        config, seeds = self.config.data.distortion, self.inputs.seed_data
        label, writer = Label.input("eft", "instructions"), {"policy": baseline, "engine": self.config.engine}
        distorted = self.run.make(
            label,
            distorted_instructions,
            config=config,
            seeds=seeds,
            held_out=self.inputs.held_out,
            seed=self._seed(label),
            **writer,
        )
        label = label.sibling("responses")
        responses = self.run.make(
            label,
            respond,
            config=RespondConfig(candidates=1, sampling=config.answer_sampling),
            instructions=distorted,
            seed=self._seed(label),
            **writer,
        )
        label = label.sibling("questions")
        return self.run.make(label, distorted_questions, seeds=seeds, instructions=distorted, responses=responses)

    def fine_tune(self, models: RunModels) -> Artifact:
        """Return M1: M0 fine-tuned on the demonstrations, or M0 itself if nothing is to be taught."""
        return self.supervise("M1", models, self.sft_data) if self.config.data.seed_data.fine_tune else models.base

    def supervise(self, name: str, models: RunModels, demonstrations: Artifact) -> Artifact:
        """Fine-tune the current model on demonstrations; without demonstrations, return it unchanged."""
        if not demonstrations.counts.get("ift", 1) + demonstrations.counts.get("eft", 0):
            return models.current
        return self.run.make(
            Label.model(name),
            sft,
            policy=models.current,
            base=models.base,
            demonstrations=demonstrations,
            optimization=self.config.train.sft,
            weights=self._weights(name),
        )

    def pairs(self, iteration: int, models: RunModels) -> Artifact:
        """Return the preference pairs of an iteration: given or generated ones, with or without earlier iterations'.

        Given pairs that are replayed stand behind the generated ones.
        """
        if self.inputs.pairs is not None:
            return self.inputs.pairs
        self.generated_pairs.append(self.generation.pairs(iteration, models))
        pairs, replayed = self._with_others(iteration, self.generated_pairs)
        if replayed is not None:
            self.replayed_pairs[iteration] = replayed
        return pairs

    def _with_others(
        self, iteration: int, generated: list[Artifact], prefix: str = ""
    ) -> tuple[Artifact, Artifact | None]:
        """Return the pairs that an iteration trains on, the newest of `generated` among them, and the replayed ones."""
        data, label, replayed = self.config.data, Label.iteration(iteration, "replayed_pairs"), None
        parts = list(generated) if data.accumulate_pairs else generated[-1:]
        if share := data.replay.at(iteration):
            drawn = {"share": share, "pairs": parts, "given": self.inputs.replay, "seed": self._seed(label)}
            replayed = self.run.make(label.sibling(f"{prefix}{label.part}"), replay_pairs, **drawn)
            parts.append(replayed)
        if len(parts) > 1:
            return self.run.make(label.sibling(f"{prefix}all_pairs"), gather_pairs, parts=parts), replayed
        return parts[0], replayed

    def reference(self, iteration: int, models: RunModels) -> Artifact:
        """Return the reference policy of an alignment, or the start of another fine-tuning."""
        if not aligns(loss := self.config.in_iteration(iteration).loss):
            return models.base if loss.init == "base" else models.current
        name = self.config.train.reference_policy
        return models.current if name == "previous" else models.named(name)

    def align(self, iteration: int, models: RunModels, pairs: Artifact, *, ahead: bool = False) -> Artifact:
        """Align the current model on the pairs, against the reference policy.

        A model that is aligned ahead only writes in its iteration. It is aligned on these pairs and all others that the
        iteration trains on. It has no validation and no checkpoint selection.
        """
        if ahead:
            pairs, _ = self._with_others(iteration, [*self.generated_pairs, pairs], AHEAD)
        config, prefix = self.config.in_iteration(iteration), AHEAD * ahead
        name, loss, train = model_after(iteration), loss_at(config.loss, iteration), config.train
        policy = reference = self.reference(iteration, models)
        start = None
        if not aligns(loss):
            if loss.init == "base" and config.data.seed_data.fine_tune:
                label = Label.iteration(iteration, "demonstrations")
                pairs = self.run.make(label, gather_pairs, parts=[self.sft_data, pairs])
            return self.supervise(name, replace(models, current=policy), pairs)
        inputs = {"pairs": pairs, "precision": train.align.logprob_settings(config.model.dtype)}
        inputs |= {"unpaired": True} if is_unpaired(loss) else {}
        if train.reference_logprobs == "precomputed":
            p = reference_augmentation_of(loss)
            label = Label.iteration(iteration, f"{prefix}reference")
            reference = self.run.make(label, reference_logprobs, policy=policy, augmentation=p, **inputs)
            if policy.digest != models.current.digest:
                label = label.sibling(f"{prefix}start")
                start = self.run.make(label, reference_logprobs, policy=models.current, augmentation=None, **inputs)
        held_out = 0 if ahead else train.validation_pairs
        return self.run.make(
            Label.iteration(iteration, f"{AHEAD}model") if ahead else Label.model(name),
            align,
            policy=models.current,
            base=models.base,
            pairs=pairs,
            reference=reference,
            loss=loss,
            start=start,
            held_out=held_out,
            trained_on=self._trained_on(iteration) if held_out else [],
            selection=None if ahead else self._selection(name, models),
            optimization=train.align,
            weights=self._weights(name),
        )

    def _trained_on(self, iteration: int) -> list[Artifact]:
        """Return what the current model was trained on before an iteration."""
        taught = [self.inputs.seed_data] if self.config.data.seed_data.fine_tune else []
        replayed = [part for number, part in self.replayed_pairs.items() if number < iteration]
        return [*taught, *self.generated_pairs[:-1], *replayed]

    def _selection(self, name: str, models: RunModels) -> CheckpointSelection | None:
        """Return the checkpoint selection of an alignment, or None."""
        if self.inputs.validation is None:
            return None
        settings = self.config.train.checkpoint_selection
        judge = settings.head_to_head
        return CheckpointSelection(
            interval_steps=settings.interval_steps,
            level=settings.level,
            instructions=self.inputs.validation,
            comparator=judge,
            compared_by=None if asks_a_server(judge) else models.own_or(judge.model, models.checkpoint_judge),
            engine=self.config.engine,
            sampling=settings.sampling,
            seed=self._seed(f"{name}/validation"),
        )

    def _fixed_writer(self) -> Artifact | None:
        data = self.config.data
        if not isinstance(data, SelfRewarding) or not data.instruct.fixed_writer:
            return None
        model = ModelConfig(path=data.instruct.model, dtype=self.config.model.dtype)
        return load_from_outside(self.run, Label.input("writer"), model, "data.instruct.model")

    def _weights(self, name: str) -> TrainableWeights:
        model, parallelism = self.config.model, self.config.train.parallelism
        return TrainableWeights(dtype=model.dtype, lora=model.lora, seed=self._seed(name), parallelism=parallelism)

    def _seed(self, purpose: Label | str) -> int:
        return derive_seed(self.config.seed, str(purpose))
