"""How a run's models are measured on preference pairs that none of them was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import digest_json
from selfalign.losses.protocol import Loss, augmentation_of
from selfalign.losses.refinement import Refinement
from selfalign.pipeline.inputs import RunInputs
from selfalign.pipeline.models import RunJudge, RunModels
from selfalign.runs.labels import Label
from selfalign.runs.runner import Maker
from selfalign.stages.preference_accuracy import preference_accuracy
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.store.artifacts import Artifact, to_key_json

BETA = 0.1
"""β of the rewards where the loss has none."""


@dataclass(slots=True)
class HeldOutPairs:
    """Measures one model after the other on the pairs of `evaluate.preference_pairs`, each against its own reference.

    What one model scores serves the next as its reference, so every policy scores the pairs once with each p.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        given: the held-out pairs, and what else a run was given.
        scored: log-probabilities of the pairs, by the digest of who scored them and by p.
        judged: the judge's scores of all responses, once they are there.
    """

    config: ExperimentConfig
    run: Maker
    given: RunInputs
    scored: dict[tuple[str, str], Artifact] = field(default_factory=dict)
    judged: Artifact | None = None

    def measure(self, name: str, models: RunModels, loss: Loss, taught: Sequence[Artifact]) -> None:
        """Measures the newest model, where there are pairs, and it is not its own reference, whose rewards are all 0.

        Args:
            name: of the model.
            models: of its run so far.
            loss: of that run, whose β and p are taken.
            taught: what that run was trained on besides what is given here and the pairs it made.
        """
        pairs = self.given.preferences
        if pairs is None or models.current.digest == models.reference.digest:
            return
        origin = self._logps(Label.evaluation(name, "reference_logprobs"), pairs, models.reference, loss)
        policy = self._logps(Label.evaluation(name, "logps"), pairs, models.current, loss)
        known = [*self.given.trained_on, *taught, *models.generated_pairs]
        self.run.make(
            Label.evaluation(name, "preferences"),
            preference_accuracy,
            pairs=pairs,
            trained_on=list({artifact.digest: artifact for artifact in known}.values()),
            policy=policy,
            reference=origin,
            scores=self._scores(pairs, models),
            beta=getattr(loss, "beta", BETA),
        )

    def _logps(self, label: Label, pairs: Artifact, policy: Artifact, loss: Loss) -> Artifact:
        """A policy's log-probabilities of the pairs, given x and p⊕x: the loss's p, or the usual one."""
        augmentation = augmentation_of(loss) or Refinement()
        key = policy.digest, digest_json(to_key_json(augmentation))
        if key not in self.scored:
            self.scored[key] = self.run.make(
                label,
                reference_logprobs,
                policy=policy,
                pairs=pairs,
                augmentation=augmentation,
                precision=self.config.train.align.logprob_settings(self.config.model.dtype),
            )
        return self.scored[key]

    def _scores(self, pairs: Artifact, models: RunModels) -> Artifact | None:
        judge = self.config.evaluate.preference_pairs.judge
        if self.judged is None and judge is not None:
            judging = RunJudge(self.config, self.run, judge)
            policies = replace(models, judge=models.pair_judge)
            self.judged = judging.judge(Label.input("preferences", "scores"), judge.model, policies, pairs, pairs)
        return self.judged
