"""ExperimentConfig, the tree of all knobs; the dataclasses behind it are the components themselves.

Hydra composes `conf/` against them, `OmegaConf.to_object` turns the result into plain, live objects, and from
there on nothing knows of Hydra.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from selfalign.benchmarks.alpaca_eval import AlpacaEval
from selfalign.benchmarks.lm_eval import LmEval
from selfalign.benchmarks.mt_bench import MTBench
from selfalign.config.feasibility import check_counts, check_effects
from selfalign.config.overrides import no_such
from selfalign.core.errors import SelfalignError
from selfalign.core.files import path_of
from selfalign.data.pair_rules import AllOrdered, BestVsK, BestWorst, PairRule, RandomPair
from selfalign.engines.server import Server
from selfalign.engines.transformers import Transformers
from selfalign.engines.vllm_engine import VLLM
from selfalign.launch.push_to_hub import check_repository
from selfalign.losses.preference import DPO, IPO, ODPO, Positives, SrDPO, SrIPO
from selfalign.models.checkpoint import ModelConfig
from selfalign.models.quantization import check_engine
from selfalign.pipeline.inputs import Pairs, SelfRewarding
from selfalign.runs.runner import check_name
from selfalign.stages.compare import HeadToHead
from selfalign.stages.evaluate import EvaluateConfig
from selfalign.stages.judge import ExpectedScore, ExternalScore, ImplicitReward, Pairwise, SampledScore
from selfalign.stages.pair import PositivesOnly
from selfalign.stages.seeds import EvaluationFineTuning
from selfalign.tracking.wandb import NoTracking, Wandb
from selfalign.training.checkpoint_selection import CheckpointComparator
from selfalign.training.config import TrainConfig


@dataclass(kw_only=True, slots=True)
class ExperimentConfig:
    """All knobs of an experiment.

    Attributes:
        name: of the run; its folder is `<output_dir>/<name>-<digest of the settings>`.
        seed: everything random derives from it.
        iterations: how often the policy is aligned; M_{iterations+1} is the last model.
        output_dir: where runs and the store of their artefacts lie.
        fresh: makes everything anew instead of continuing what is there.
        sweep_metric: the number of the last model, as in summary.json, that a search such as Optuna's goes by, and by
            which a comparison calls a job the best: the one with the highest, or of "-name" the lowest.
        model: M0.
        data: where demonstrations and preference pairs come from.
        generate: the backend that writes.
        judge: how responses are scored.
        pair: which responses become training data.
        loss: what alignment minimises.
        train: how weights are moved.
        evaluate: how models are measured.
        benchmark: the published benchmarks that measure them too, by name.
        track: where metrics go besides the run folder.
        dry_run: makes nothing, but takes one batch or two steps of every stage at its greatest length, and estimates
            from that what the run needs in memory, time and money.
        price_per_hour: of the machine, in any currency, for that estimate.
        push: sends the last model and its card to a model hub when the run is finished, with the user's own login.
        push_to: the repository there, owner/name; it is made where there is none.
        push_private: whether a repository made so is private; one that is there stays as it is.
    """

    name: str = "selfalign"
    seed: int = 0
    iterations: int = 2
    output_dir: str = field(default="outputs", metadata={"keyed": False})
    fresh: bool = field(default=False, metadata={"keyed": False})
    sweep_metric: str = field(default="eval/win_rate", metadata={"keyed": False})
    model: ModelConfig = MISSING
    data: Any = MISSING
    generate: Any = MISSING
    judge: Any = MISSING
    pair: Any = MISSING
    loss: Any = MISSING
    train: TrainConfig = MISSING
    evaluate: EvaluateConfig = MISSING
    benchmark: dict[str, Any] = field(default_factory=dict)
    track: Any = field(default=MISSING, metadata={"keyed": False})
    dry_run: bool = field(default=False, metadata={"keyed": False})
    price_per_hour: float = field(default=0.0, metadata={"keyed": False})
    push: bool = field(default=False, metadata={"keyed": False})
    push_to: str = field(default="", metadata={"keyed": False})
    push_private: bool = field(default=True, metadata={"keyed": False})

    def __post_init__(self) -> None:
        check_name(self.name)
        self.output_dir = str(path_of(self.output_dir))
        if self.push or self.push_to:
            check_repository(self.push_to)
        if self.price_per_hour < 0:
            raise SelfalignError(f"price_per_hour must be 0 or more, got {self.price_per_hour}")
        if self.iterations < 1:
            raise SelfalignError(f"iterations must be 1 or more, got {self.iterations}")
        if self.model.quantization != "none" and self.train.layout.sharded:
            raise SelfalignError(
                "train.layout.kind=fsdp2 cannot share out weights in 4 bits: set model.quantization=none"
            )
        check_engine(self.model.quantization, type(self.generate).__name__.lower())
        if isinstance(self.data, Pairs) and self.iterations != 1:
            raise SelfalignError(
                f"iterations={self.iterations}, but data=pairs gives one set of pairs: set iterations=1"
            )
        if isinstance(self.pair, PairRule):
            self.pair.check_iterations(self.iterations)
        if isinstance(self.data, SelfRewarding) and isinstance(self.loss, Positives) != isinstance(
            self.pair, PositivesOnly
        ):
            raise SelfalignError("loss=positives and pair=positives go together: one of them alone has no meaning")
        self._check_evaluation_fine_tuning()
        self._check_judge()
        self._check_benchmarks()
        check_effects(self)
        check_counts(self)

    def _check_evaluation_fine_tuning(self) -> None:
        """What its examples need is there."""
        seeds = self.data.seeds
        if self.evaluate.baseline and not (seeds.demonstrations and seeds.ranked):
            raise SelfalignError(
                "evaluate.baseline=true needs data.seeds.demonstrations to train the SFT baseline, and "
                "data.seeds.ranked to measure it"
            )
        if seeds.evaluation_fine_tuning == EvaluationFineTuning.baseline and not isinstance(self.judge, SampledScore):
            raise SelfalignError(
                "data.seeds.evaluation_fine_tuning=baseline needs a judge that writes justifications: choose "
                "judge=additive or judge=multiple_choice"
            )

    def _check_benchmarks(self) -> None:
        """Every one is a component, with a name that can be part of a label, and has settings that make sense."""
        for name, benchmark in self.benchmark.items():
            if type(benchmark) not in COMPONENTS["benchmark"].values():
                raise SelfalignError(f"unknown key benchmark.{name}: choose benchmarks with benchmark=[NAME,...]")
            check_name(name)
            benchmark.check(f"benchmark.{name}")

    def _check_judge(self) -> None:
        """What a judge cannot do is refused before anything is made."""
        seeds = self.data.seeds
        if isinstance(self.judge, ImplicitReward):
            if seeds.ranked and seeds.evaluation_fine_tuning == EvaluationFineTuning.human:
                raise SelfalignError(
                    "judge=implicit writes no judgements that could be taught: set "
                    "data.seeds.evaluation_fine_tuning=none"
                )
            if self.evaluate.instructions and self.evaluate.judge == "base":
                raise SelfalignError("evaluate.judge=base has no reference, which judge=implicit needs: set sft")


COMPONENTS: dict[str, dict[str, type]] = {
    "model": {"model": ModelConfig},
    "data": {"self_rewarding": SelfRewarding, "pairs": Pairs},
    "generate": {"transformers": Transformers, "vllm": VLLM, "server": Server},
    "judge": {
        "sampled_score": SampledScore,
        "expected_score": ExpectedScore,
        "pairwise": Pairwise,
        "implicit": ImplicitReward,
        "external": ExternalScore,
    },
    "pair": {
        "best_worst": BestWorst,
        "random": RandomPair,
        "all_ordered": AllOrdered,
        "best_vs_k": BestVsK,
        "positives": PositivesOnly,
    },
    "loss": {"dpo": DPO, "ipo": IPO, "sr_dpo": SrDPO, "sr_ipo": SrIPO, "odpo": ODPO, "positives": Positives},
    "train": {"train": TrainConfig, "head_to_head": CheckpointComparator},
    "evaluate": {"evaluate": EvaluateConfig, "head_to_head": HeadToHead},
    "benchmark": {"mt_bench": MTBench, "alpaca_eval": AlpacaEval, "lm_eval": LmEval},
    "track": {"wandb": Wandb, "none": NoTracking},
}
"""Group → name → component; `conf/<group>/*.yaml` refer to them as /schema/<group>/<name>."""


def register() -> None:
    """Makes the components known to Hydra, so that it checks every key and type."""
    store = ConfigStore.instance()
    store.store(name="experiment_schema", node=ExperimentConfig)
    for group, components in COMPONENTS.items():
        for name, component in components.items():
            store.store(group=f"schema/{group}", name=name, node=component)


def to_experiment(config: DictConfig) -> ExperimentConfig:
    """The composed configuration as live objects.

    Raises:
        SelfalignError: a key is unknown, a value out of range, or one that must be given is not.
    """
    check_keys(config, "")
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise SelfalignError("\n".join(f"set {key}=…; it has no default" for key in missing))
    experiment = OmegaConf.to_object(config)
    assert isinstance(experiment, ExperimentConfig)
    check_finite(OmegaConf.to_container(config, resolve=True), "")
    return experiment


def describe(config: DictConfig) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """A composed configuration as live objects, as YAML, and plain with the class of each component.

    Raises:
        SelfalignError: a key is unknown, or a value out of range.
    """
    experiment = to_experiment(config)
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(plain, dict)
    described = {**{str(key): value for key, value in plain.items()}, "choices": choices(experiment)}
    return experiment, OmegaConf.to_yaml(config, resolve=True), described


def compose_experiment(folder: Path, overrides: Sequence[str]) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """What the command line makes of these overrides, described; `folder` is `conf/`."""
    register()
    with initialize_config_dir(str(folder), version_base="1.3"):
        return describe(compose("config", overrides=list(overrides)))


def choices(experiment: ExperimentConfig) -> dict[str, str]:
    """{group: class} of the components whose class is a choice, so that runs can be told apart by it."""
    groups = [group for group, components in COMPONENTS.items() if len(components) > 1 and group != "benchmark"]
    return {group: type(getattr(experiment, group)).__name__ for group in groups}


def check_finite(value: Any, path: str) -> None:
    """Refuses infinite numbers and NaN, with which every comparison is false, wherever they stand.

    Raises:
        SelfalignError: such a number, with its path.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise SelfalignError(f"{path.strip('.')} must be a finite number, got {value}")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        check_finite(item, f"{path}{name}.")


def check_keys(node: DictConfig, path: str) -> None:
    """Refuses keys that were added with `+` and that no component knows.

    Raises:
        SelfalignError: such a key, with its path.
    """
    kind = OmegaConf.get_type(node) or dict
    known = {f.name for f in fields(kind)} if is_dataclass(kind) else {str(name) for name in node}
    for name in node:
        if str(name) not in known:
            raise SelfalignError(no_such(f"{path}{name}", known))
        if isinstance(node._get_node(name), DictConfig):
            check_keys(node[name], f"{path}{name}.")
