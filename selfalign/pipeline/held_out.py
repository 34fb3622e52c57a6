"""How a run's models are measured on preference pairs that none of them was trained on."""

from dataclasses import dataclass, field, replace

from selfalign.config.experiment import ExperimentConfig
from selfalign.losses.refinement import Refinement
from selfalign.pipeline.inputs import Given
from selfalign.pipeline.models import Judging, Models
from selfalign.runs.runner import Maker
from selfalign.stages.align import augmentation_of
from selfalign.stages.preferences import preferences
from selfalign.stages.reference import reference
from selfalign.store.artifacts import Artefact

BETA = 0.1
"""β of the rewards where the loss has none."""


@dataclass(slots=True)
class HeldOutPairs:
    """Measures one model after the other on the pairs of `evaluate.preferences`, each against its own reference.

    What one model scores serves the next as its reference, so every policy scores the pairs once.

    Attributes:
        config: the experiment.
        run: makes artefacts.
        given: the held-out pairs, and what else a run was given.
        scored: log-probabilities of the pairs, by the digest of who scored them.
        judged: the judge's scores of all responses, once they are there.
    """

    config: ExperimentConfig
    run: Maker
    given: Given
    scored: dict[str, Artefact] = field(default_factory=dict)
    judged: Artefact | None = None

    def measure(self, name: str, models: Models) -> None:
        """Measures the newest model, where there are pairs; the SFT baseline is left out."""
        pairs = self.given.preferences
        if pairs is None or name == "SFT":
            return
        place = f"evaluation_{name}"
        origin = self._logps(f"{place}/reference_logps", pairs, models.reference)
        policy = self._logps(f"{place}/logps", pairs, models.newest)
        self.run.make(
            f"{place}/preferences",
            preferences,
            pairs=pairs,
            trained_on=[*self.given.trained_on, *(models.own_pairs if self.given.pairs is None else ())],
            policy=policy,
            reference=origin,
            scores=self._scores(pairs, models),
            beta=getattr(self.config.loss, "beta", BETA),
        )

    def _logps(self, label: str, pairs: Artefact, policy: Artefact) -> Artefact:
        """A policy's log-probabilities of the pairs, given x and p⊕x: the loss's p, or the usual one."""
        if policy.digest not in self.scored:
            self.scored[policy.digest] = self.run.make(
                label,
                reference,
                policy=policy,
                pairs=pairs,
                augmentation=augmentation_of(self.config.loss) or Refinement(),
                precision=self.config.train.align.precision(self.config.model.dtype),
            )
        return self.scored[policy.digest]

    def _scores(self, pairs: Artefact, models: Models) -> Artefact | None:
        judge = self.config.evaluate.preferences.judge
        if self.judged is None and judge is not None:
            judging = Judging(self.config, self.run, judge)
            sitting = replace(models, judge=models.pair_judge)
            self.judged = judging.judge("preferences/scores", judge.model, sitting, pairs, pairs)
        return self.judged
