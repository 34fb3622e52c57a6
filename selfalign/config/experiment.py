"""`ExperimentConfig`, the tree of all settings. The dataclasses of its groups are the components themselves."""

from dataclasses import dataclass, field, replace
from typing import Any

from selfalign.core.files import path_of
from selfalign.metrics import catalog
from selfalign.models.config import ModelConfig
from selfalign.stages.evaluate import EvaluateConfig
from selfalign.stages.seed_data import EFTSource
from selfalign.training.config import TrainConfig

MISSING: Any = "???"
"""OmegaConf's mark of a value that must be given."""


@dataclass(kw_only=True, slots=True)
class HubConfig:
    """Pushing the last model to a hub, and the data that it was aligned on.

    Attributes:
        push: push the last model and its card after the run, with the user's own login.
        repo_id: the repository, owner/name; created if it does not exist.
        private: whether a created repository is private; an existing one stays as it is.
        data: push the pairs and judgements that the run made too, as a data set of the same owner/name.
    """

    push: bool = False
    repo_id: str = ""
    private: bool = True
    data: bool = True


@dataclass(kw_only=True, slots=True)
class ExperimentConfig:
    """All settings of an experiment.

    Attributes:
        name: of the run; its folder is `<output_dir>/<name>-<digest of the settings>`.
        seed: all random draws derive from it.
        iterations: how often the policy is aligned; M_{iterations+1} is the last model.
        output_dir: the folder of the runs and of the artifact store.
        fresh: make everything again instead of reusing finished artifacts.
        sweep_metric: the metric of the last model in summary.json that a search such as Optuna's optimises, and that
            ranks the jobs of a comparison. The highest value is the best; for "-name", the lowest.
        model: M0.
        data: the sources of demonstrations and preference pairs.
        engine: generates text.
        judge: scores responses.
        pair: selects training data among the responses.
        loss: what the alignment minimises.
        train: how models are trained.
        evaluate: how models are evaluated.
        benchmark: {name: published benchmark} that also evaluates the models.
        at: {iteration: what is different from this iteration on}: another `judge`, `pair` or `loss`, as in
            `+judge@at.2.judge=external`, or another list of `writers`. `judge` itself stays the judge of evaluation
            fine-tuning and of all evaluations.
        tracker: {name: tracker} that receives metrics besides the run folder.
        dry_run: make nothing, but run one batch or two steps of every stage on records of the largest size, and
            estimate the memory, time and money that the run needs.
        price_per_hour: of the machine, in any currency, for that estimate.
        hub: pushes the last model with its card, and the run's pairs and judgements, to a hub.
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
    at: dict[str, Any] = field(default_factory=dict, metadata={"keyed": "if set"})
    tracker: dict[str, Any] = field(default_factory=dict, metadata={"keyed": False})
    dry_run: bool = field(default=False, metadata={"keyed": False})
    price_per_hour: float = field(default=0.0, metadata={"keyed": False})
    hub: HubConfig = field(default_factory=HubConfig, metadata={"keyed": False})

    def __post_init__(self) -> None:
        self.output_dir = str(path_of(self.output_dir))

    def in_iteration(self, iteration: int) -> "ExperimentConfig":
        """Return the settings of an iteration, counted from 1, with all that changed until then."""
        changes: dict[str, Any] = {}
        for start in sorted(self.at, key=int):
            if int(start) <= iteration:
                changes |= self.at[start]
        data = self.data
        if (writers := changes.pop("writers", None)) is not None:
            data = replace(data, respond=replace(data.respond, writers=list(writers)))
        return replace(self, data=data, **changes) if changes or writers else self

    def judge_setting(self, iteration: int) -> str:
        """Return the setting that holds the judge of an iteration."""
        starts = [start for start in self.at if int(start) <= iteration and "judge" in self.at[start]]
        return f"at.{max(starts, key=int)}.judge" if starts else "judge"

    @property
    def meta_judge(self) -> Any:
        """The comparator of the judgements of new responses; None without one, or for given pairs."""
        return getattr(self.data, "meta_judge", None)

    @property
    def trains_m1(self) -> bool:
        """Whether M1 is trained. Without demonstrations to train on, M1 is M0."""
        seeds = self.data.seed_data
        return seeds.fine_tune and bool(seeds.demonstrations or (seeds.ranked and seeds.eft_source == EFTSource.human))
