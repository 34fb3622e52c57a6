"""ExperimentConfig, the tree of all settings; the dataclasses behind it are the components themselves."""

from dataclasses import dataclass, field
from typing import Any

from selfalign.core.files import path_of
from selfalign.metrics import catalog
from selfalign.models.config import ModelConfig
from selfalign.stages.evaluate import EvaluateConfig
from selfalign.stages.seed_data import EFTSource
from selfalign.training.config import TrainConfig

MISSING: Any = "???"
"""What OmegaConf takes for a value that must be given."""


@dataclass(kw_only=True, slots=True)
class HubConfig:
    """Where the last model goes when the run is finished.

    Attributes:
        push: sends the last model and its card to a model hub, with the user's own login.
        repo_id: the repository there, owner/name; it is made where there is none.
        private: whether a repository made so is private; one that is there stays as it is.
    """

    push: bool = False
    repo_id: str = ""
    private: bool = True


@dataclass(kw_only=True, slots=True)
class ExperimentConfig:
    """All knobs of an experiment.

    Attributes:
        name: of the run; its folder is `<output_dir>/<name>-<digest of the settings>`.
        seed: everything random derives from it.
        iterations: how often the policy is aligned; M_{iterations+1} is the last model.
        output_dir: where runs and the store of their artifacts lie.
        fresh: makes everything anew instead of continuing what is there.
        sweep_metric: the number of the last model, as in summary.json, that a search such as Optuna's goes by, and by
            which a comparison calls a job the best: the one with the highest, or of "-name" the lowest.
        model: M0.
        data: where demonstrations and preference pairs come from.
        engine: the engine that writes.
        judge: how responses are scored.
        pair: which responses become training data.
        loss: what alignment minimises.
        train: how weights are moved.
        evaluate: how models are measured.
        benchmark: the published benchmarks that measure them too, by name.
        tracker: where metrics go besides the run folder.
        dry_run: makes nothing, but takes one batch or two steps of every stage at its greatest length, and estimates
            from that what the run needs in memory, time and money.
        price_per_hour: of the machine, in any currency, for that estimate.
        hub: sends the last model and its card to a model hub.
    """

    name: str = "selfalign"
    seed: int = 0
    iterations: int = 2
    output_dir: str = field(default="outputs", metadata={"keyed": False})
    fresh: bool = field(default=False, metadata={"keyed": False})
    sweep_metric: str = field(default=catalog.EVAL_WIN_RATE.name, metadata={"keyed": False})
    model: ModelConfig = MISSING
    data: Any = MISSING
    engine: Any = MISSING
    judge: Any = MISSING
    pair: Any = MISSING
    loss: Any = MISSING
    train: TrainConfig = MISSING
    evaluate: EvaluateConfig = MISSING
    benchmark: dict[str, Any] = field(default_factory=dict)
    tracker: Any = field(default=MISSING, metadata={"keyed": False})
    dry_run: bool = field(default=False, metadata={"keyed": False})
    price_per_hour: float = field(default=0.0, metadata={"keyed": False})
    hub: HubConfig = field(default_factory=HubConfig, metadata={"keyed": False})

    def __post_init__(self) -> None:
        self.output_dir = str(path_of(self.output_dir))

    @property
    def trains_m1(self) -> bool:
        """Whether there are demonstrations; without any M1 is M0."""
        seeds = self.data.seed_data
        return bool(seeds.demonstrations or (seeds.ranked and seeds.eft_source == EFTSource.human))
