"""The method on one page.

M0 is fine-tuned to M1. Then, in each iteration, the model writes new instructions, answers each several times,
judges its own answers, the best is paired with the worst, and the model is aligned on the pairs: M_t → M_{t+1}
(arXiv 2401.10020). The alignment loss may ask the policy itself how good an answer is (arXiv 2405.21040).
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from selfalign.contest import Contest
from selfalign.data import identify_data
from selfalign.files import derive_seed
from selfalign.judges.bench import OWN_MODELS, asks_a_server
from selfalign.losses import Positives
from selfalign.models import ModelConfig, identify_source
from selfalign.run import Maker, StageFunction
from selfalign.stages.align import align, augmentation_of
from selfalign.stages.eft import eft
from selfalign.stages.evaluate import Judged, evaluate
from selfalign.stages.instruct import InstructConfig, given_instructions, instruct
from selfalign.stages.judge import ImplicitReward, judge
from selfalign.stages.pair import PositivesOnly, gather_pairs, given_pairs, pair
from selfalign.stages.pretrained import pretrained
from selfalign.stages.questions import questions
from selfalign.stages.reference import reference
from selfalign.stages.respond import RespondConfig, respond
from selfalign.stages.seeds import EvaluationFineTuning, SeedsConfig, seeds, taught_questions
from selfalign.stages.sft import sft
from selfalign.store import Artefact
from selfalign.training import Weights

if TYPE_CHECKING:
    from selfalign.config import ExperimentConfig


@dataclass(kw_only=True, slots=True)
class SelfRewarding:
    """Preference pairs come from the model itself.

    Attributes:
        seeds: what M1 learns from.
        instruct: how new instructions are written.
        respond: how candidates are written.
        accumulate: aligns each iteration on the pairs of all iterations so far, instead of on its own alone.
    """

    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)
    accumulate: bool = False


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Preference pairs are given.

    Attributes:
        path: prompt, chosen and rejected in TRL's standard or conversational format: a .jsonl or .parquet file,
            or a hub id with an optional ":split".
        seeds: what M1 learns from before; without demonstrations M1 is M0, which should then be an SFT model.
    """

    path: str
    seeds: SeedsConfig = field(default_factory=SeedsConfig)


@dataclass(slots=True)
class Models:
    """The models of a run so far.

    Attributes:
        base: M0.
        sft: M1.
        newest: M_t.
        reference: what the newest was trained from or against.
        writer: a model that only writes instructions, where there is one.
        judge: a model that only judges, where there is one.
    """

    base: Artefact
    sft: Artefact
    newest: Artefact
    reference: Artefact
    writer: Artefact | None = None
    judge: Artefact | None = None

    def named(self, name: str) -> Artefact:
        """The model a setting names: base is M0, sft is M1, self and previous are the newest."""
        return {"base": self.base, "sft": self.sft}.get(name, self.newest)


def run_pipeline(config: "ExperimentConfig", run: Maker) -> None:
    """M0 → M1 → … → M_{iterations+1}, each measured."""
    method = Method(config, run)
    seed_data = method.seeds()
    asked, validation, given = method.questions(seed_data), method.validation(seed_data), method.given_pairs()
    listed, held_out = method.listed_instructions(), method.held_out(seed_data, asked, validation)
    base = run.make("M0", pretrained, model=config.model, source=identify_source(config.model))
    models = Models(base, base, base, base, method.fixed_writer(), method.fixed_judge())
    baseline = method.baseline(models, seed_data)
    taught = method.teach_judging(baseline, seed_data) if baseline else seed_data
    models.sft = models.newest = method.supervise("M1", models, taught)
    answers_of_m1 = method.evaluate("M1", models, seed_data, asked, None)

    instructions: list[Artefact] = []
    made: list[Artefact] = []
    for iteration in range(1, config.iterations + 1):
        if given is None:
            known = {"seeds": seed_data, "earlier": list(instructions), "held_out": held_out}
            instructions.append(method.instructions(iteration, models, listed, known))
        made.append(given or method.pairs(iteration, models, instructions[-1]))
        pairs = method.gather(iteration, made)
        reference = models.newest if isinstance(config.loss, Positives) else models.named(config.train.reference)
        models.newest, models.reference = method.align(iteration, models, pairs, validation), reference
        method.evaluate(f"M{iteration + 1}", models, seed_data, asked, answers_of_m1)


def makes_baseline(config: "ExperimentConfig") -> bool:
    """Whether there is an SFT baseline beside M1: it writes EFT, or its judging is to be compared with M1's."""
    how = config.data.seeds.evaluation_fine_tuning
    return how == EvaluationFineTuning.baseline or (config.evaluate.baseline and how == EvaluationFineTuning.human)


@dataclass(slots=True)
class Method:
    """The steps, each with the settings and the seed that belong to it."""

    config: "ExperimentConfig"
    run: Maker

    def seeds(self) -> Artefact:
        """Demonstrations and held-out ranked answers."""
        how = self.config.data.seeds.evaluation_fine_tuning
        return self._seeds("seeds", seeds, how, judge=self.config.judge)

    def baseline(self, models: Models, seed_data: Artefact) -> Models | None:
        """The SFT baseline as the newest model: M0 fine-tuned on IFT only, its judging measured; if it is needed."""
        if not makes_baseline(self.config):
            return None
        ift = seed_data
        if self.config.data.seeds.evaluation_fine_tuning == EvaluationFineTuning.human:
            ift = self._seeds("ift", seeds, EvaluationFineTuning.none, judge=self.config.judge)
        baseline = replace(models, newest=self.supervise("SFT", models, ift))
        self.evaluate("SFT", baseline, seed_data, None, None)
        return baseline

    def teach_judging(self, baseline: Models, seed_data: Artefact) -> Artefact:
        """IFT + EFT: as given by humans, or with EFT that the baseline writes and the humans' ranks confirm."""
        how = self.config.data.seeds.evaluation_fine_tuning
        if how == EvaluationFineTuning.human:
            return seed_data
        asked = self._seeds("eft/questions", taught_questions, how)
        return self.run.make(
            "eft/demonstrations",
            eft,
            judge=self.config.judge,
            policy=baseline.newest,
            seeds=seed_data,
            questions=asked,
            judgements=self._judge("eft/judgements", "self", baseline, asked, asked),
            most_common_ratio=self.config.data.seeds.most_common_ratio,
        )

    def questions(self, seed_data: Artefact) -> Artefact | None:
        """The evaluation instructions."""
        given = self.config.evaluate
        return self._given_instructions(
            "questions", given.instructions, given.count, "evaluate.instructions", seed_data
        )

    def validation(self, seed_data: Artefact) -> Artefact | None:
        """The instructions that checkpoints of an alignment compete on, where the last is not simply taken."""
        given = self.config.train.choose
        return self._given_instructions(
            "validation", given.instructions, given.count, "train.choose.instructions", seed_data
        )

    def given_pairs(self) -> Artefact | None:
        """Preference pairs, where they are given."""
        data = self.config.data
        if not isinstance(data, Pairs):
            return None
        content = identify_data(data.path, "data.path")
        return self.run.make("iteration_1/pairs", given_pairs, source=data.path, content=content)

    def listed_instructions(self) -> Artefact | None:
        """All new instructions, where they are read instead of written."""
        data = self.config.data
        source = data.instruct.source if isinstance(data, SelfRewarding) else ""
        return self._given_instructions("instructions", source, 0, "data.instruct.source", None)

    def held_out(self, seed_data: Artefact, *measured: Artefact | None) -> list[Artefact]:
        """Artefacts with instructions that no training may see."""
        ranked = [seed_data] if seed_data.counts["questions_held_out"] else []
        return [*ranked, *(artefact for artefact in measured if artefact is not None)]

    def fixed_writer(self) -> Artefact | None:
        """The model that writes instructions, where it is none of the run's own."""
        data = self.config.data
        if not isinstance(data, SelfRewarding) or not data.instruct.fixed_writer:
            return None
        model = ModelConfig(path=data.instruct.writer, dtype=self.config.model.dtype)
        source = identify_source(model, "data.instruct.writer")
        return self.run.make("writer", pretrained, model=model, source=source)

    def fixed_judge(self) -> Artefact | None:
        """The model that judges, where it is none of the run's own."""
        who = self.config.judge.model
        if asks_a_server(self.config.judge) or who in OWN_MODELS:
            return None
        model = ModelConfig(path=who, dtype=self.config.model.dtype)
        return self.run.make("judge", pretrained, model=model, source=identify_source(model, "judge.model"))

    def supervise(self, label: str, models: Models, demonstrations: Artefact) -> Artefact:
        """SFT of the newest model; without demonstrations it stays as it is."""
        if not demonstrations.counts.get("ift", 1) + demonstrations.counts.get("eft", 0):
            return models.newest
        return self.run.make(
            label,
            sft,
            policy=models.newest,
            base=models.base,
            demonstrations=demonstrations,
            optimization=self.config.train.sft,
            weights=self._weights(label),
        )

    def instructions(
        self, iteration: int, models: Models, listed: Artefact | None, known: dict[str, Artefact | list[Artefact]]
    ) -> Artefact:
        """New instructions, written or read, that differ from all that are known."""
        label, config = f"iteration_{iteration}/instructions", self.config.data.instruct
        if listed is not None:
            return self.run.make(label, given_instructions, config=config, given=listed, **known)
        return self.run.make(
            label,
            instruct,
            config=config,
            policy=models.writer or models.named(config.writer),
            generate=self.config.generate,
            seed=self._seed(label),
            **known,
        )

    def pairs(self, iteration: int, models: Models, instructions: Artefact) -> Artefact:
        """Preference pairs from the model's own answers and judgements."""
        data, rule, place = self.config.data, self.config.pair, f"iteration_{iteration}"
        responses = self.run.make(
            f"{place}/responses",
            respond,
            config=data.respond,
            policy=models.newest,
            instructions=instructions,
            generate=self.config.generate,
            seed=self._seed(f"{place}/responses"),
        )
        judgements = self._judge(f"{place}/judgements", self.config.judge.model, models, instructions, responses)
        return self.run.make(
            f"{place}/pairs",
            pair,
            rule=rule if isinstance(rule, PositivesOnly) else rule.at(iteration),
            instructions=instructions,
            responses=responses,
            judgements=judgements,
            seed=self._seed(f"{place}/pairs"),
        )

    def gather(self, iteration: int, made: list[Artefact]) -> Artefact:
        """What an iteration trains on: its own pairs, or those of all iterations so far."""
        data = self.config.data
        if len(made) == 1 or not (isinstance(data, SelfRewarding) and data.accumulate):
            return made[-1]
        return self.run.make(f"iteration_{iteration}/all_pairs", gather_pairs, parts=list(made))

    def align(self, iteration: int, models: Models, pairs: Artefact, validation: Artefact | None) -> Artefact:
        """The newest model, aligned on the pairs against the reference policy."""
        label, loss, train = f"M{iteration + 1}", self.config.loss, self.config.train
        if isinstance(loss, Positives):
            return self.supervise(label, models, pairs)
        policy = references = models.named(train.reference)
        if train.reference_logps == "stored":
            references = self.run.make(
                f"iteration_{iteration}/reference",
                reference,
                policy=policy,
                pairs=pairs,
                augmentation=augmentation_of(loss),
                precision=train.align.precision(self.config.model.dtype),
            )
        return self.run.make(
            label,
            align,
            policy=models.newest,
            base=models.base,
            pairs=pairs,
            reference=references,
            loss=loss,
            starts_as_reference=policy.digest == models.newest.digest,
            held_out=train.held_out_pairs,
            contest=self._contest(label, models, validation) if validation else None,
            optimization=train.align,
            weights=self._weights(label),
        )

    def _contest(self, label: str, models: Models, validation: Artefact) -> Contest:
        settings, (policy, reference) = self.config.train.choose, self._judging(self.config.judge.model, models)
        return Contest(
            every_steps=settings.every_steps,
            instructions=validation,
            judge=self.config.judge,
            judged_by=policy,
            reference=reference,
            generate=self.config.generate,
            sampling=settings.sampling,
            seed=self._seed(f"{label}/validation"),
        )

    def evaluate(
        self, name: str, models: Models, seed_data: Artefact, asked: Artefact | None, baseline: Judged | None
    ) -> Judged | None:
        """Measures the newest model: its answers against M1's, and how well it judges; returns its judged answers."""
        place, judged, ranked = f"evaluation_{name}", None, None
        if asked is not None:
            answers = self.run.make(
                f"{place}/answers",
                respond,
                config=RespondConfig(candidates=1, sampling=self.config.evaluate.sampling),
                policy=models.newest,
                instructions=asked,
                generate=self.config.generate,
                seed=self._seed("evaluation"),
            )
            judged = (
                answers,
                self._judge(f"{place}/scores", self.config.evaluate.judge, models, asked, answers),
            )
        if seed_data.counts["questions_held_out"]:
            ranked = self._judge(f"{place}/ranked_scores", "self", models, seed_data, seed_data, "ranked_scores")
        self.run.make(
            f"{place}/numbers",
            evaluate,
            judged=judged,
            baseline=baseline,
            ranked=(seed_data, ranked) if ranked is not None else None,
            top=getattr(self.config.judge, "high", None),
        )
        return judged

    def _seeds(self, label: str, stage: StageFunction, how: EvaluationFineTuning, **more: Any) -> Artefact:
        """What a stage makes of the given seeds."""
        given = self.config.data.seeds
        sources = {"data.seeds.demonstrations": given.demonstrations, "data.seeds.ranked": given.ranked}
        contents = [identify_data(source, key) for key, source in sources.items() if source]
        settings = replace(given, evaluation_fine_tuning=how)
        return self.run.make(label, stage, config=settings, contents=contents, **more)

    def _given_instructions(
        self, label: str, source: str, count: int, key: str, seed_data: Artefact | None
    ) -> Artefact | None:
        if not source:
            return None
        content = identify_data(source, key)
        return self.run.make(label, questions, source=source, count=count, content=content, seeds=seed_data)

    def _judge(
        self, label: str, who: str, models: Models, instructions: Artefact, responses: Artefact, purpose: str = ""
    ) -> Artefact:
        policy, reference = self._judging(who, models)
        return self.run.make(
            label,
            judge,
            judge=self.config.judge,
            policy=policy,
            reference=reference,
            instructions=instructions,
            responses=responses,
            generate=self.config.generate,
            seed=self._seed(purpose or label),
        )

    def _judging(self, who: str, models: Models) -> tuple[Artefact | None, Artefact | None]:
        """Who judges, and, where the judge compares the two, what that model was trained from; None for no model."""
        if asks_a_server(self.config.judge):
            return None, None
        policy = models.named(who) if who in OWN_MODELS else models.judge
        if not isinstance(self.config.judge, ImplicitReward):
            return policy, None
        return policy, models.base if who == "sft" else models.reference

    def _weights(self, label: str) -> Weights:
        return Weights(dtype=self.config.model.dtype, lora=self.config.model.lora, seed=self._seed(label))

    def _seed(self, purpose: str) -> int:
        return derive_seed(self.config.seed, purpose)
