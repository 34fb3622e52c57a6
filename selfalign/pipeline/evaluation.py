"""How the models of a run are measured: what they answer, how they judge, and how far they have moved."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import derive_seed
from selfalign.judges.protocol import asks_a_server
from selfalign.losses.protocol import Loss
from selfalign.pipeline.held_out import HeldOutPairs
from selfalign.pipeline.inputs import RunInputs
from selfalign.pipeline.models import RunJudge, RunModels
from selfalign.runs.labels import Label
from selfalign.runs.runner import Maker
from selfalign.stages.benchmark import benchmark
from selfalign.stages.evaluate import JudgedTexts, MaybeJudged, compares_on, evaluate, opponents
from selfalign.stages.head_to_head import head_to_head
from selfalign.stages.judge import Pairwise
from selfalign.stages.kl_divergence import kl_divergence
from selfalign.stages.respond import RespondConfig, respond
from selfalign.store.artifacts import Artifact

GIVEN = "given"
"""What another model is called whose outputs are given."""


@dataclass(slots=True)
class Evaluation:
    """Measures one model after the other.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        given: the evaluation instructions and the held-out ranked answers.
        judging: judges with the run's judge.
        answered: {model: its answers and their scores}, of those measured so far.
        conversed: {benchmark: {model: its answers}}, of those whose questions models are compared on.
    """

    config: ExperimentConfig
    run: Maker
    given: RunInputs
    judging: RunJudge
    answered: dict[str, MaybeJudged] = field(default_factory=dict)
    conversed: dict[str, dict[str, Artifact]] = field(default_factory=dict)
    held_out: HeldOutPairs = field(init=False)

    def __post_init__(self) -> None:
        self.held_out = HeldOutPairs(self.config, self.run, self.given)

    def measure(
        self,
        name: str,
        models: RunModels,
        *,
        judging_only: bool = False,
        loss: Loss | None = None,
        taught: Sequence[Artifact] = (),
    ) -> None:
        """Measures the newest model: its answers against those of the models before, and its judging, or that alone.

        Args:
            name: of the model.
            models: of its run so far.
            judging_only: measures its judging alone.
            loss: of its run, where that is another than the experiment's.
            taught: what its run was trained on besides what is given here and the pairs it made.
        """
        label, asked = Label.evaluation(name, "numbers"), None if judging_only else self.given.questions
        judged, moved, compared = None, None, {}
        if asked is not None:
            answers = self._answer(label, models, asked)
            judged = answers, self._score(label, models, asked, answers)
            compared = self._compare(label, models, asked, answers)
            moved = self._distance(label, models, asked, answers)
        if not judging_only:
            self.held_out.measure(name, models, loss or self.config.loss, taught)
        self.run.make(
            label,
            evaluate,
            judged=judged,
            baseline=next(iter(self.answered.values()), None),
            compared=compared,
            moved=moved,
            trained=[models.current, *models.generated_pairs[-1:]],
            ranked=self._judge_ranked(label, models),
            top=getattr(self.config.judge, "max_score", None),
            bounds=self.config.evaluate.bounds,
        )
        if judged is not None:
            self.answered[name] = judged
        if not judging_only:
            self._benchmark(name, models)

    def _answer(self, label: Label, models: RunModels, asked: Artifact) -> Artifact:
        return self.run.make(
            label.sibling("answers"),
            respond,
            config=RespondConfig(candidates=1, sampling=self.config.evaluate.sampling),
            policy=models.current,
            instructions=asked,
            engine=self.config.engine,
            seed=self._seed(),
        )

    def _score(self, label: Label, models: RunModels, asked: Artifact, answers: Artifact) -> Artifact | None:
        """What one judge, the same for all models, gives each answer; a pairwise judge cannot score a single one."""
        if isinstance(self.config.judge, Pairwise):
            return None
        return self.judging.judge(label.sibling("scores"), self.config.evaluate.judge, models, asked, answers)

    def _compare(self, label: Label, models: RunModels, asked: Artifact, answers: Artifact) -> dict[str, Artifact]:
        """Head to head with the models before, and with given outputs: what each is called among the numbers."""
        judge = self.config.evaluate.head_to_head
        if judge is None:
            return {}
        others = {name: opponent for name, (opponent, _) in self.answered.items()}
        if self.given.outputs is not None:
            others[GIVEN] = self.given.outputs
        names = opponents(self.config.evaluate, list(self.answered)) + [GIVEN] * (self.given.outputs is not None)
        compared = {
            name: self._head_to_head(Label.comparison(label.owner, name), models, asked, answers, others[name])
            for name in names
        }
        endings = {
            "": next(iter(self.answered), ""),
            "_vs_previous": next(reversed(self.answered), ""),
            "_vs_given": GIVEN,
        }
        return {ending: compared[name] for ending, name in endings.items() if name in compared}

    def _head_to_head(
        self, label: Label, models: RunModels, asked: Artifact, answers: Artifact, opponent: Artifact
    ) -> Artifact:
        """Compares answers of the newest model with another's."""
        judge = self.config.evaluate.head_to_head
        return self.run.make(
            label,
            head_to_head,
            judge=judge,
            policy=None if asks_a_server(judge) else models.own_or(judge.model, models.comparator),
            instructions=asked,
            answers=answers,
            opponent=opponent,
            engine=self.config.engine,
            seed=self._seed(),
        )

    def _distance(self, label: Label, models: RunModels, asked: Artifact, answers: Artifact) -> Artifact | None:
        if not self.answered:
            return None
        policies = {"policy": models.current, "origin": models.sft}
        return self.run.make(
            label.sibling("divergence"), kl_divergence, **policies, instructions=asked, answers=answers
        )

    def _judge_ranked(self, label: Label, models: RunModels) -> JudgedTexts | None:
        """The held-out ranked answers, judged by the newest model."""
        ranked = self.given.ranked
        if ranked is None:
            return None
        label = label.sibling("ranked_scores")
        return ranked, self.judging.judge(label, "self", models, ranked, ranked, "ranked_scores")

    def _benchmark(self, name: str, models: RunModels) -> None:
        """Puts the newest model through every benchmark, and compares it there with models before."""
        for title, settings in self.config.benchmark.items():
            made = self.run.make(
                Label.evaluation(name, title),
                benchmark,
                name=title,
                benchmark=settings,
                contents=self.given.benchmarks[title],
                model=name,
                policy=models.current,
                judge=models.own_or(settings.judge_model, models.benchmark_judges.get(title)),
                engine=self.config.engine,
                seed=derive_seed(self.config.seed, "benchmark", title),
            )
            if compares_on(self.config.evaluate, settings):
                before = self.conversed.setdefault(title, {})
                for other in opponents(self.config.evaluate, list(before)):
                    self._head_to_head(Label.comparison(name, other, title), models, made, made, before[other])
                before[name] = made

    def _seed(self) -> int:
        return derive_seed(self.config.seed, "evaluation")
