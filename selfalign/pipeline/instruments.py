"""Measurement of the judges that tell a run's models apart, on held-out answers in a human's order."""

from dataclasses import dataclass, field

from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import derive_seed
from selfalign.judges.panel import judges_in
from selfalign.judges.protocol import asks_a_server, only_compares
from selfalign.metrics.instruments import HEAD_TO_HEAD, JUDGE, SCORES
from selfalign.pipeline.models import RunJudge, RunModels
from selfalign.runs.labels import Label
from selfalign.runs.runner import StageRunner
from selfalign.stages.compare_ranked import compare_ranked
from selfalign.stages.evaluate import JudgedTexts
from selfalign.stages.instruments import instruments
from selfalign.stages.judge import ImplicitReward
from selfalign.store.artifacts import Artifact


@dataclass(slots=True)
class Instruments:
    """Measures the judges of one model after the other; a judge of all models is asked once.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        judging: judges with the run's judge.
        compared: {digest of the policy that compares, empty for a server: its comparisons of the ranked answers}.
        scored: {(digest of the policy that scores, of its reference policy): its scores of the ranked answers}.
    """

    config: ExperimentConfig
    run: StageRunner
    judging: RunJudge
    compared: dict[str, Artifact] = field(default_factory=dict)
    scored: dict[tuple[str, str], Artifact] = field(default_factory=dict)

    def measure(self, label: Label, models: RunModels, ranked: JudgedTexts, *, judging_only: bool) -> None:
        """Measure the judges of the current model's evaluation, and its own judging.

        Args:
            label: of its evaluation.
            models: the models of its run so far.
            ranked: the held-out ranked answers, and the model's own judgements of them.
            judging_only: whether only its own judging counts, because it answers nothing.
        """
        questions, own = ranked
        self.scored[self._judges("self", models)] = own
        found = {JUDGE: own}
        if not judging_only and self.config.evaluate.instructions:
            found |= self._of_scores(label, models, questions) | self._of_comparisons(label, models, questions)
        test = self.config.evaluate.instruments
        self.run.make(label.sibling("instruments"), instruments, ranked=questions, readings=found, test=test)

    def _of_comparisons(self, label: Label, models: RunModels, questions: Artifact) -> dict[str, Artifact]:
        """Compare ranked answers with the judge of head-to-head comparisons, if there is one."""
        judge = self.config.evaluate.head_to_head
        if judge is None:
            return {}
        policy = None if asks_a_server(judge) else models.own_or(judge.model, models.comparator)
        key = policy.digest if policy else ""
        if key not in self.compared:
            self.compared[key] = self.run.make(
                label.sibling("ranked_comparisons"),
                compare_ranked,
                judge=judge,
                policy=policy,
                ranked=questions,
                comparisons=self.config.evaluate.instruments.comparisons,
                engine=self.config.engine,
                seed=derive_seed(self.config.seed, "instruments"),
            )
        return {HEAD_TO_HEAD: self.compared[key]}

    def _of_scores(self, label: Label, models: RunModels, questions: Artifact) -> dict[str, Artifact]:
        """Score ranked answers with the judge that scores all models' answers, if its reference policy is known."""
        judge, name = self.config.judge, self.config.evaluate.judge
        if only_compares(judge):
            return {}
        if (key := self._judges(name, models)) not in self.scored:
            label = label.sibling("second_ranked_scores")
            self.scored[key] = self.judging.judge(label, name, models, questions, questions, "ranked_scores")
        return {SCORES: self.scored[key]}

    def _judges(self, name: str, models: RunModels) -> tuple[str, str]:
        """Return the digests of the model that judges and of its reference policy, empty for judges that need none."""
        compares = any(isinstance(judge, ImplicitReward) for judge in judges_in("judge", self.config.judge).values())
        reference = (models.base if name == "sft" else models.reference) if compares else None
        return models.named(name).digest, reference.digest if reference else ""
