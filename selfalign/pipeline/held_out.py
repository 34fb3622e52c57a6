"""How a run's models are measured on preference pairs that none of them was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import digest_json
from selfalign.losses.protocol import Loss, augmentation_of
from selfalign.losses.refinement import Refinement
from selfalign.pipeline.inputs import Given
from selfalign.pipeline.models import Judging, Models
from selfalign.runs.labels import Label
from selfalign.runs.runner import Maker
from selfalign.stages.preferences import preferences
from selfalign.stages.reference import reference
from selfalign.store.artifacts import Artefact, canonical

BETA = 0.1
"""β of the rewards where the loss has none."""


@dataclass(slots=True)
class HeldOutPairs:
    """Measures one model after the other on the pairs of `evaluate.preferences`, each against its own reference.

    What one model scores serves the next as its reference, so every policy scores the pairs once with each p.

    Attributes:
        config: the experiment.
        run: makes artefacts.
        given: the held-out pairs, and what else a run was given.
        scored: log-probabilities of the pairs, by the digest of who scored them and by p.
        judged: the judge's scores of all responses, once they are there.
    """

    config: ExperimentConfig
    run: Maker
    given: Given
    scored: dict[tuple[str, str], Artefact] = field(default_factory=dict)
    judged: Artefact | None = None

    def measure(self, name: str, models: Models, loss: Loss, taught: Sequence[Artefact]) -> None:
        """Measures the newest model, where there are pairs.

        Args:
            name: of the model.
            models: of its run so far.
            loss: of that run, whose β and p are taken.
            taught: what that run was trained on besides what is given here and the pairs it made.
        """
        pairs = self.given.preferences
        if pairs is None:
            return
        origin = self._logps(Label.evaluation(name, "reference_logps"), pairs, models.reference, loss)
        policy = self._logps(Label.evaluation(name, "logps"), pairs, models.newest, loss)
        known = [*self.given.trained_on, *taught, *models.own_pairs]
        self.run.make(
            Label.evaluation(name, "preferences"),
            preferences,
            pairs=pairs,
            trained_on=list({artefact.digest: artefact for artefact in known}.values()),
            policy=policy,
            reference=origin,
            scores=self._scores(pairs, models),
            beta=getattr(loss, "beta", BETA),
        )

    def _logps(self, label: Label, pairs: Artefact, policy: Artefact, loss: Loss) -> Artefact:
        """A policy's log-probabilities of the pairs, given x and p⊕x: the loss's p, or the usual one."""
        augmentation = augmentation_of(loss) or Refinement()
        key = policy.digest, digest_json(canonical(augmentation))
        if key not in self.scored:
            self.scored[key] = self.run.make(
                label,
                reference,
                policy=policy,
                pairs=pairs,
                augmentation=augmentation,
                precision=self.config.train.align.precision(self.config.model.dtype),
            )
        return self.scored[key]

    def _scores(self, pairs: Artefact, models: Models) -> Artefact | None:
        judge = self.config.evaluate.preferences.judge
        if self.judged is None and judge is not None:
            judging = Judging(self.config, self.run, judge)
            sitting = replace(models, judge=models.pair_judge)
            self.judged = judging.judge(Label.input("preferences", "scores"), judge.model, sitting, pairs, pairs)
        return self.judged
