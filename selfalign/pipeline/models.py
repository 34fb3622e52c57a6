"""Who plays which part in a run: the models, and which of them judges."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from selfalign.benchmarks.protocol import judges_to_load
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import derive_seed
from selfalign.judges.protocol import OWN_MODELS, asks_a_server, wants_model
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import source_digest
from selfalign.runs.labels import Label
from selfalign.runs.runner import Maker
from selfalign.stages.judge import ImplicitReward, Judge, judge
from selfalign.stages.load_model import load_model
from selfalign.store.artifacts import Artifact, Content


@dataclass(slots=True)
class RunModels:
    """The models of a run so far.

    Attributes:
        base: M0.
        sft: M1.
        current: M_t.
        reference: what the newest was trained from or against.
        writer: a model that only writes instructions, where there is one.
        judge: a model that only judges, where there is one.
        comparator: a model that only compares answers head to head, where there is one.
        checkpoint_judge: a model that only compares checkpoints of an alignment, where there is one.
        pair_judge: a model that only scores held-out pairs, where there is one.
        generated_pairs: what the run has made to train on so far, the newest last.
        benchmark_judges: models that only judge in benchmarks, by the benchmark's name.
    """

    base: Artifact
    sft: Artifact
    current: Artifact
    reference: Artifact
    writer: Artifact | None = None
    judge: Artifact | None = None
    comparator: Artifact | None = None
    checkpoint_judge: Artifact | None = None
    pair_judge: Artifact | None = None
    generated_pairs: list[Artifact] = field(default_factory=list)
    benchmark_judges: dict[str, Artifact] = field(default_factory=dict)

    def named(self, name: str) -> Artifact:
        """The model a setting names: base is M0, sft is M1, self and previous are the newest."""
        return {"base": self.base, "sft": self.sft}.get(name, self.current)

    def own_or(self, name: str | None, fixed: Artifact | None) -> Artifact | None:
        """The run's own model of this name, or where it is none of them, the one that was loaded for it."""
        return self.named(name) if name is not None and name in OWN_MODELS else fixed


def load_from_outside(run: Maker, label: Label, model: ModelConfig, key: str) -> Artifact:
    """A model from outside the run; `key` is the setting that names it."""
    return run.make(label, load_model, model=model, source=Content(partial(source_digest, model, key)))


def judges_of(config: ExperimentConfig) -> dict[str, Any]:
    """{setting: judge} of all who score or compare in a run, those of its benchmarks aside."""
    asked, choose = config.evaluate, config.train.checkpoint_selection
    named = {
        "judge": config.judge,
        "evaluate.head_to_head": asked.head_to_head,
        "evaluate.preference_pairs.judge": asked.preference_pairs.judge,
        "train.checkpoint_selection.head_to_head": choose.head_to_head if choose.interval_steps else None,
    }
    return {key: judge for key, judge in named.items() if judge is not None}


def fixed_judges(config: ExperimentConfig, run: Maker) -> dict[str, Any]:
    """The models that only judge, compare, score held-out pairs or examine in benchmarks, as fields of `Models`.

    None, or none of a benchmark, where it is one of the run's own.
    """
    test, loaded = config.evaluate.preference_pairs, judges_to_load(config.benchmark)
    return {
        "judge": _fixed_judge(config, run, Label.input("judge"), config.judge, "judge"),
        "comparator": _fixed_judge(
            config, run, Label.input("comparator"), config.evaluate.head_to_head, "evaluate.head_to_head"
        ),
        "pair_judge": _fixed_judge(
            config, run, Label.input("preferences", "judge"), test.judge, "evaluate.preference_pairs.judge"
        ),
        "benchmark_judges": {
            name: _outside(config, run, Label.input("judges", name), path, f"benchmark.{name}.judge")
            for name, path in loaded.items()
        },
    }


def checkpoint_judge(config: ExperimentConfig, run: Maker) -> Artifact | None:
    """Loads the model that only compares checkpoints of an alignment, where there is one."""
    choose = config.train.checkpoint_selection
    judge = choose.head_to_head if choose.interval_steps else None
    return _fixed_judge(config, run, Label.input("checkpoint_judge"), judge, "train.checkpoint_selection.head_to_head")


def _fixed_judge(config: ExperimentConfig, run: Maker, label: Label, judge: Any, key: str) -> Artifact | None:
    if not wants_model(judge):
        return None
    return _outside(config, run, label, judge.model, key)


def _outside(config: ExperimentConfig, run: Maker, label: Label, path: str, key: str) -> Artifact:
    return load_from_outside(run, label, ModelConfig(path=path, dtype=config.model.dtype), f"{key}.model")


@dataclass(slots=True)
class RunJudge:
    """Judges with one judge.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        how: the judge.
    """

    config: ExperimentConfig
    run: Maker
    how: Judge

    def judge(
        self, label: Label, who: str, models: RunModels, instructions: Artifact, responses: Artifact, purpose: str = ""
    ) -> Artifact:
        """Judges responses.

        Args:
            label: of the artifact.
            who: one of the run's own models by name; any other name is the fixed judge.
            models: of the run so far.
            instructions: what was answered.
            responses: the answers.
            purpose: what the seed is derived from, where that is not the label.
        """
        policy, reference = self.resolve_policy(who, models)
        return self.run.make(
            label,
            judge,
            judge=self.how,
            policy=policy,
            reference=reference,
            instructions=instructions,
            responses=responses,
            engine=self.config.engine,
            seed=derive_seed(self.config.seed, purpose or str(label)),
        )

    def resolve_policy(self, who: str, models: RunModels) -> tuple[Artifact | None, Artifact | None]:
        """Who judges, and, where the judge compares the two, what that model was trained from; None for no model."""
        if asks_a_server(self.how):
            return None, None
        policy = models.own_or(who, models.judge)
        if not isinstance(self.how, ImplicitReward):
            return policy, None
        return policy, models.base if who == "sft" else models.reference
