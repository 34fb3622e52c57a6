"""The method on one page.

M0 is fine-tuned to M1. Then, in each iteration, the model writes new instructions, answers each several times,
judges its own answers, the best is paired with the worst, and the model is aligned on the pairs: M_t → M_{t+1}
(arXiv 2401.10020). The alignment loss may ask the policy itself how good an answer is (arXiv 2405.21040).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from selfalign.contest import Contest
from selfalign.data import identify_data
from selfalign.errors import SelfalignError
from selfalign.files import derive_seed
from selfalign.judges.bench import OWN_MODELS, asks_a_server
from selfalign.losses import Positives
from selfalign.models import ModelConfig, identify_source
from selfalign.run import Maker
from selfalign.stages.align import align, augmentation_of
from selfalign.stages.evaluate import Judged, evaluate
from selfalign.stages.instruct import InstructConfig, instruct
from selfalign.stages.judge import ImplicitReward, judge
from selfalign.stages.pair import given_pairs, pair
from selfalign.stages.pretrained import pretrained
from selfalign.stages.questions import questions
from selfalign.stages.reference import reference
from selfalign.stages.respond import RespondConfig, respond
from selfalign.stages.seeds import SeedsConfig, seeds
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
    """

    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)


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
        judge: a model that only judges, where there is one.
    """

    base: Artefact
    sft: Artefact
    newest: Artefact
    reference: Artefact
    judge: Artefact | None = None

    def named(self, name: str) -> Artefact:
        """The model a setting names: base is M0, sft is M1, self and previous are the newest."""
        return {"base": self.base, "sft": self.sft}.get(name, self.newest)


def run_pipeline(config: "ExperimentConfig", run: Maker) -> None:
    """M0 → M1 → … → M_{iterations+1}, each measured."""
    method = Method(config, run)
    seed_data, asked, validation, given = method.seeds(), method.questions(), method.validation(), method.given_pairs()
    base = run.make("M0", pretrained, model=config.model, source=identify_source(config.model))
    models = Models(base, base, base, base, method.fixed_judge())
    models.sft = models.newest = method.supervise("M1", models, seed_data)
    baseline = method.evaluate("M1", models, seed_data, asked, None)

    instructions: list[Artefact] = []
    for iteration in range(1, config.iterations + 1):
        pairs = given or method.pairs(iteration, models, seed_data, instructions)
        reference = models.newest if isinstance(config.loss, Positives) else models.named(config.train.reference)
        models.newest, models.reference = method.align(iteration, models, pairs, validation), reference
        method.evaluate(f"M{iteration + 1}", models, seed_data, asked, baseline)


@dataclass(slots=True)
class Method:
    """The steps, each with the settings and the seed that belong to it."""

    config: "ExperimentConfig"
    run: Maker

    def seeds(self) -> Artefact:
        """Demonstrations and held-out ranked answers."""
        given = self.config.data.seeds
        sources = {"data.seeds.demonstrations": given.demonstrations, "data.seeds.ranked": given.ranked}
        contents = [identify_data(source, key) for key, source in sources.items() if source]
        return self.run.make("seeds", seeds, config=given, judge=self.config.judge, contents=contents)

    def questions(self) -> Artefact | None:
        """The evaluation instructions."""
        settings = self.config.evaluate
        return self._given_instructions("questions", settings.instructions, settings.count, "evaluate.instructions")

    def validation(self) -> Artefact | None:
        """The instructions that checkpoints of an alignment compete on, where the last is not simply taken."""
        settings = self.config.train.choose
        return self._given_instructions(
            "validation", settings.instructions, settings.count, "train.choose.instructions"
        )

    def given_pairs(self) -> Artefact | None:
        """Preference pairs, where they are given."""
        data = self.config.data
        if not isinstance(data, Pairs):
            return None
        content = identify_data(data.path, "data.path")
        return self.run.make("iteration_1/pairs", given_pairs, source=data.path, content=content)

    def fixed_judge(self) -> Artefact | None:
        """The model that judges, where it is none of the run's own.

        Raises:
            SelfalignError: there is no such model.
        """
        who = self.config.judge.model
        if asks_a_server(self.config.judge) or who in OWN_MODELS:
            return None
        model = ModelConfig(path=who, dtype=self.config.model.dtype)
        try:
            source = identify_source(model)
        except SelfalignError as error:
            raise SelfalignError(f"judge.model is none of {', '.join(OWN_MODELS)}; {error}") from error
        return self.run.make("judge", pretrained, model=model, source=source)

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

    def pairs(self, iteration: int, models: Models, seed_data: Artefact, earlier: list[Artefact]) -> Artefact:
        """Preference pairs from the model's own instructions, answers and judgements."""
        data, place = self.config.data, f"iteration_{iteration}"
        instructions = self.run.make(
            f"{place}/instructions",
            instruct,
            config=data.instruct,
            policy=models.named(data.instruct.writer),
            seeds=seed_data,
            earlier=list(earlier),
            generate=self.config.generate,
            seed=self._seed(f"{place}/instructions"),
        )
        earlier.append(instructions)
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
            rule=self.config.pair,
            instructions=instructions,
            responses=responses,
            judgements=judgements,
        )

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

    def _given_instructions(self, label: str, source: str, count: int, key: str) -> Artefact | None:
        if not source:
            return None
        content = identify_data(source, key)
        return self.run.make(label, questions, source=source, count=count, content=content)

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
