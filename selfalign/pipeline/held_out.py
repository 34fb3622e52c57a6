"""Measurement of a run's models on preference pairs that none of them was trained on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from selfalign.config.experiment import ExperimentConfig
from selfalign.config.judges import PAIR_JUDGE
from selfalign.core.files import digest_json
from selfalign.losses.protocol import Loss, augmentation_of
from selfalign.losses.refinement import Refinement
from selfalign.pipeline.inputs import RunInputs
from selfalign.pipeline.models import RunJudge, RunModels
from selfalign.runs.labels import Label
from selfalign.runs.runner import StageRunner
from selfalign.stages.preference_accuracy import preference_accuracy
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.store.artifacts import Artifact
from selfalign.store.key import to_key_json

logger = logging.getLogger(__name__)

BETA = 0.1
"""β of the rewards if the loss has none."""

TOKENS_OF = 8
"""The number of pairs of which Δ is shown word by word."""


@dataclass(slots=True)
class HeldOutPairs:
    """Measures one model after the other on the pairs of `evaluate.preference_pairs`, each against its own reference.

    A model's log-probabilities are reused when it is the reference of the next model. So every policy scores the pairs
    once for each p.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        inputs: the held-out pairs and the other inputs of the run.
        logps: {(digest of the policy, digest of p): log-probabilities of the pairs}.
        scores: the judge's scores of all responses; None until they are made.
    """

    config: ExperimentConfig
    run: StageRunner
    inputs: RunInputs
    logps: dict[tuple[str, str], Artifact] = field(default_factory=dict)
    scores: Artifact | None = None

    def measure(self, name: str, models: RunModels, loss: Loss, trained_on: Sequence[Artifact]) -> None:
        """Measure the current model, if there are held-out pairs and its reference is known.

        A model that is its own reference is not measured, because all its rewards are 0.

        Args:
            name: the model's name.
            models: the models of its run so far.
            loss: the loss of its run; its β and p are used.
            trained_on: training data of its run, besides this run's inputs and the pairs that its run generated.
        """
        pairs = self.inputs.preferences
        if pairs is None:
            return
        if models.reference is None:
            logger.warning("%s has no rewards on the held-out pairs, because its reference is not known", name)
            return
        if models.current.digest == models.reference.digest:
            return
        reference = self._logps(Label.evaluation(name, "reference_logprobs"), pairs, models.reference, loss)
        policy = self._logps(Label.evaluation(name, "logps"), pairs, models.current, loss)
        training_data = [*self.inputs.trained_on, *trained_on, *models.generated_pairs]
        self.run.make(
            Label.evaluation(name, "preferences"),
            preference_accuracy,
            pairs=pairs,
            trained_on=list({artifact.digest: artifact for artifact in training_data}.values()),
            policy=policy,
            reference=reference,
            scores=self._scores(pairs, models),
            beta=getattr(loss, "beta", BETA),
        )

    def _logps(self, label: Label, pairs: Artifact, policy: Artifact, loss: Loss) -> Artifact:
        """Compute a policy's log-probabilities of the pairs, given x and p⊕x, with the loss's p or the default p."""
        augmentation = (augmentation_of(loss) or Refinement()).given_p()
        key = policy.digest, digest_json(to_key_json(augmentation))
        if key not in self.logps:
            self.logps[key] = self.run.make(
                label,
                reference_logprobs,
                policy=policy,
                pairs=pairs,
                augmentation=augmentation,
                precision=self.config.train.align.logprob_settings(self.config.model.dtype),
                tokens_of=TOKENS_OF,
            )
        return self.logps[key]

    def _scores(self, pairs: Artifact, models: RunModels) -> Artifact | None:
        """Score all responses once with `evaluate.preference_pairs.judge`; None if there is no such judge."""
        judge = self.config.evaluate.preference_pairs.judge
        if self.scores is None and judge is not None:
            judging = RunJudge(self.config, self.run, judge, PAIR_JUDGE)
            policies = replace(models, outside={**models.outside, PAIR_JUDGE: models.pair_judge})
            self.scores = judging.judge(Label.input("preferences", "scores"), judge.model, policies, pairs, pairs)
        return self.scores
