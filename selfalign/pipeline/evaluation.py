"""Evaluation of the models of a run: their responses, their judging, and their distance from M1."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from selfalign.benchmarks.judge_test import JudgeTest
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import derive_seed
from selfalign.judges.protocol import asks_a_server, only_compares
from selfalign.losses.protocol import Loss
from selfalign.pipeline.held_out import HeldOutPairs
from selfalign.pipeline.inputs import RunInputs
from selfalign.pipeline.instruments import Instruments
from selfalign.pipeline.models import RunJudge, RunModels
from selfalign.runs.labels import Label
from selfalign.runs.runner import StageRunner
from selfalign.stages.benchmark import benchmark, overlapping
from selfalign.stages.evaluate import JudgedTexts, MaybeJudged, compares_on, evaluate, opponents
from selfalign.stages.head_to_head import head_to_head
from selfalign.stages.judge import ImplicitReward
from selfalign.stages.kl_divergence import kl_divergence
from selfalign.stages.respond import RespondConfig, respond
from selfalign.stages.truth import truth
from selfalign.store.artifacts import Artifact

logger = logging.getLogger(__name__)

GIVEN = "given"
"""Name of the model whose outputs are given as `evaluate.reference_outputs`."""


@dataclass(slots=True)
class Evaluation:
    """Evaluates one model after the other.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        inputs: the evaluation instructions and the held-out ranked answers.
        judging: judges with the run's judge.
        responses: {model: (responses, their scores)} of the models evaluated so far.
        benchmark_responses: {benchmark: {model: responses}} of the benchmarks on which models are compared.
        held_out: measures the models on held-out pairs.
        instruments: measures the judges that the comparisons of models rest on.
    """

    config: ExperimentConfig
    run: StageRunner
    inputs: RunInputs
    judging: RunJudge
    responses: dict[str, MaybeJudged] = field(default_factory=dict)
    benchmark_responses: dict[str, dict[str, Artifact]] = field(default_factory=dict)
    held_out: HeldOutPairs = field(init=False)
    instruments: Instruments = field(init=False)

    def __post_init__(self) -> None:
        self.held_out = HeldOutPairs(self.config, self.run, self.inputs)
        self.instruments = Instruments(self.config, self.run, self.judging)

    def measure(
        self,
        name: str,
        models: RunModels,
        *,
        judging_only: bool = False,
        loss: Loss | None = None,
        trained_on: Sequence[Artifact] = (),
    ) -> None:
        """Evaluate the current model: compare its responses with those of earlier models, and measure its judging.

        Args:
            name: the model's name.
            models: the models of its run so far.
            judging_only: whether to measure its judging alone.
            loss: the loss of its run; None is the experiment's loss.
            trained_on: training data of its run, besides this run's inputs and the pairs that its run generated.
        """
        label, instructions = Label.evaluation(name, "numbers"), None if judging_only else self.inputs.questions
        judged, divergence, compared = None, None, {}
        if instructions is not None:
            responses = self._respond(label, models, instructions)
            judged = responses, self._score(label, models, instructions, responses)
            self._check(label, instructions, responses)
            compared = self._compare(label, models, instructions, responses)
            divergence = self._divergence(label, models, instructions, responses)
        if not judging_only:
            self.held_out.measure(name, models, loss or self.config.loss, trained_on)
        ranked = self._judge_ranked(label, models)
        self.run.make(
            label,
            evaluate,
            judged=judged,
            baseline=next(iter(self.responses.values()), None),
            compared=compared,
            moved=divergence,
            trained=[models.current, *models.generated_pairs[-1:]],
            ranked=ranked,
            top=getattr(self.config.judge, "max_score", None),
            bounds=self.config.evaluate.bounds,
        )
        if ranked is not None:
            self.instruments.measure(label, models, ranked, judging_only=judging_only)
        if judged is not None:
            self.responses[name] = judged
        if not judging_only:
            self._benchmark(name, models, trained_on or self.inputs.trained_on)

    def _respond(self, label: Label, models: RunModels, instructions: Artifact) -> Artifact:
        return self.run.make(
            label.sibling("answers"),
            respond,
            config=RespondConfig(candidates=1, sampling=self.config.evaluate.sampling),
            policy=models.current,
            instructions=instructions,
            engine=self.config.engine,
            seed=self._seed(),
        )

    def _score(self, label: Label, models: RunModels, instructions: Artifact, responses: Artifact) -> Artifact | None:
        """Score responses with the judge of all models. Return None for a judge that only compares."""
        if only_compares(self.config.judge):
            return None
        return self.judging.judge(label.sibling("scores"), self.config.evaluate.judge, models, instructions, responses)

    def _check(self, label: Label, instructions: Artifact, responses: Artifact) -> None:
        """Check responses by what the instructions say is right, where they must say it."""
        if self.inputs.say_what_is_right:
            first, _ = next(iter(self.responses.values()), (None, None))
            inputs = {"instructions": instructions, "answers": responses, "baseline": first}
            self.run.make(label.sibling("truth"), truth, **inputs)

    def _compare(
        self, label: Label, models: RunModels, instructions: Artifact, responses: Artifact
    ) -> dict[str, Artifact]:
        """Compare with earlier models and given outputs. Return {suffix of the metric names: comparison}."""
        judge = self.config.evaluate.head_to_head
        if judge is None:
            return {}
        names = opponents(self.config.evaluate, list(self.responses))
        others = {name: opponent for name, (opponent, _) in self.responses.items()}
        if self.inputs.outputs is not None:
            names, others = [*names, GIVEN], {**others, GIVEN: self.inputs.outputs}
        compared = {
            name: self._head_to_head(Label.comparison(label.owner, name), models, instructions, responses, others[name])
            for name in names
        }
        suffixes = {
            "": next(iter(self.responses), ""),
            "_vs_previous": next(reversed(self.responses), ""),
            "_vs_given": GIVEN,
        }
        return {suffix: compared[name] for suffix, name in suffixes.items() if name in compared}

    def _head_to_head(
        self, label: Label, models: RunModels, instructions: Artifact, responses: Artifact, opponent: Artifact
    ) -> Artifact:
        """Compare responses of the current model with an opponent's."""
        judge = self.config.evaluate.head_to_head
        return self.run.make(
            label,
            head_to_head,
            judge=judge,
            policy=None if asks_a_server(judge) else models.own_or(judge.model, models.comparator),
            instructions=instructions,
            answers=responses,
            opponent=opponent,
            engine=self.config.engine,
            seed=self._seed(),
        )

    def _divergence(
        self, label: Label, models: RunModels, instructions: Artifact, responses: Artifact
    ) -> Artifact | None:
        """Estimate the KL divergence from M1; None for the first evaluated model, or if it is not wanted."""
        if not self.responses or not self.config.evaluate.kl_to_m1:
            return None
        policies = {"policy": models.current, "origin": models.sft}
        return self.run.make(
            label.sibling("divergence"), kl_divergence, **policies, instructions=instructions, answers=responses
        )

    def _judge_ranked(self, label: Label, models: RunModels) -> JudgedTexts | None:
        """Judge the held-out ranked answers with the current model; None if there are none, or if it cannot judge."""
        ranked = self.inputs.ranked
        if ranked is None:
            return None
        if isinstance(self.config.judge, ImplicitReward) and models.reference is None:
            logger.warning("%s cannot judge by its implicit reward, because its reference is not known", label.owner)
            return None
        label = label.sibling("ranked_scores")
        return ranked, self.judging.judge(label, "self", models, ranked, ranked, "ranked_scores")

    def _benchmark(self, name: str, models: RunModels, trained_on: Sequence[Artifact]) -> None:
        """Run every benchmark on the current model, and compare it with earlier models on its questions."""
        for benchmark_name, settings in self.config.benchmark.items():
            known = overlapping(settings, benchmark_name, [*trained_on, *models.generated_pairs])
            judge, reference = models.own_or(settings.judge_model, models.benchmark_judges.get(benchmark_name)), None
            if isinstance(settings, JudgeTest):
                settings, judge, reference = self._tested_judge(benchmark_name, settings, models)
                if isinstance(settings.judge, ImplicitReward) and reference is None:
                    logger.warning("%s is not measured on %s: it has no reference to judge by", name, benchmark_name)
                    continue
            responses = self.run.make(
                Label.evaluation(name, benchmark_name),
                benchmark,
                name=benchmark_name,
                benchmark=settings,
                contents=self.inputs.benchmarks[benchmark_name],
                model=name,
                policy=models.current,
                judge=judge,
                engine=self.config.engine,
                seed=derive_seed(self.config.seed, "benchmark", benchmark_name),
                **({"trained_on": known} if known else {}),
                **({"reference": reference} if reference else {}),
            )
            if compares_on(self.config.evaluate, settings):
                earlier = self.benchmark_responses.setdefault(benchmark_name, {})
                for other in opponents(self.config.evaluate, list(earlier)):
                    label = Label.comparison(name, other, benchmark_name)
                    self._head_to_head(label, models, responses, responses, earlier[other])
                earlier[name] = responses

    def _tested_judge(
        self, name: str, settings: JudgeTest, models: RunModels
    ) -> tuple[JudgeTest, Artifact | None, Artifact | None]:
        """Return a benchmark of judges with its judge or the run's, the policy that judges, and its reference policy.

        A policy that is its own reference has none.
        """
        tested, outside = settings.with_judge(self.config.judge), models.judge
        if settings.judge is not None:
            outside = models.benchmark_judges.get(name)
        judging = RunJudge(self.config, self.run, tested.judge)
        policy, reference = judging.resolve_policy(tested.judge.model, replace(models, judge=outside))
        alone = policy is not None and reference is not None and policy.digest == reference.digest
        return tested, policy, None if alone else reference

    def _seed(self) -> int:
        return derive_seed(self.config.seed, "evaluation")
