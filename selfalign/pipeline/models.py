"""The models of a run and their roles: base, reference, writer and judges."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from selfalign.benchmarks.protocol import judges_to_load
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.judges import PAIR_JUDGE, judges_of
from selfalign.core.files import derive_seed
from selfalign.judges.criteria import CriteriaConfig, written_criteria
from selfalign.judges.panel import Panel, model_of
from selfalign.judges.protocol import OWN_MODELS, asks_a_policy, head_of, wants_model
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import source_digest
from selfalign.models.reward_model import RewardHead
from selfalign.runs.labels import Label
from selfalign.runs.runner import StageRunner
from selfalign.stages.judge import ImplicitReward, Judge, judge
from selfalign.stages.load_model import load_model
from selfalign.stages.write_criteria import write_criteria
from selfalign.store.artifacts import Artifact, Content


@dataclass(slots=True)
class RunModels:
    """The models of a run so far. Models from outside the run are None if the run has no such model.

    Attributes:
        base: M0.
        sft: M1.
        current: M_t.
        reference: the reference policy of M_t, or the model that M_t was fine-tuned from; None if it is not known,
            because M_t was trained elsewhere.
        previous: M_{t-1}, or M0 before there is one.
        writer: a model from outside that writes instructions.
        judge: a model from outside that judges responses.
        outside: {setting of another judge: its model from outside}: those of `at`, of panels, and of
            `data.meta_judge`.
        comparator: a model from outside that compares responses head to head.
        checkpoint_judge: a model from outside that compares checkpoints of an alignment.
        pair_judge: a model from outside that scores held-out pairs.
        generated_pairs: pairs or positives that the run has generated, the newest last.
        benchmark_judges: {benchmark: a model from outside that judges its responses}.
    """

    base: Artifact
    sft: Artifact
    current: Artifact
    reference: Artifact | None
    previous: Artifact
    writer: Artifact | None = None
    judge: Artifact | None = None
    outside: dict[str, Artifact | None] = field(default_factory=dict)
    comparator: Artifact | None = None
    checkpoint_judge: Artifact | None = None
    pair_judge: Artifact | None = None
    generated_pairs: list[Artifact] = field(default_factory=list)
    benchmark_judges: dict[str, Artifact] = field(default_factory=dict)

    def named(self, name: str) -> Artifact:
        """Return the model that a setting names: "base" is M0, "sft" is M1, "self" is M_t, "previous" is M_{t-1}."""
        return {"base": self.base, "sft": self.sft, "previous": self.previous, "self": self.current}[name]

    def own_or(self, name: str | None, fixed: Artifact | None) -> Artifact | None:
        """Return the run's own model of this name, or `fixed` if the name is of no own model."""
        return self.named(name) if name is not None and name in OWN_MODELS else fixed


def load_from_outside(
    run: StageRunner, label: Label, model: ModelConfig, key: str, head: RewardHead | None = None
) -> Artifact:
    """Load a model from outside the run; `key` is the setting that names it, `head` sums a reward model's logits."""
    reads = {} if head is None else {"head": head}
    return run.make(label, load_model, model=model, source=Content(partial(source_digest, model, key)), **reads)


def fixed_judges(config: ExperimentConfig, run: StageRunner) -> dict[str, Any]:
    """Load the models that only judge. Return them as keyword arguments of `RunModels`.

    A judge is None, or missing among `benchmark_judges`, if it needs no model from outside the run.
    """
    test, loaded = config.evaluate.preference_pairs, judges_to_load(config.benchmark)
    return {
        "judge": _fixed_judge(config, run, Label.input("judge"), config.judge, "judge"),
        "outside": {
            key: _fixed_judge(config, run, Label.input("judges", key), judge, key)
            for key, judge in judges_of(config).items()
            if key.startswith(("at.", "data.")) or ".members." in key
        },
        "comparator": _fixed_judge(
            config, run, Label.input("comparator"), config.evaluate.head_to_head, "evaluate.head_to_head"
        ),
        "pair_judge": _fixed_judge(config, run, Label.input("preferences", "judge"), test.judge, PAIR_JUDGE),
        "benchmark_judges": {
            name: _outside(config, run, Label.input("judges", name), path, f"benchmark.{name}.judge")
            for name, path in loaded.items()
        },
    }


def checkpoint_judge(config: ExperimentConfig, run: StageRunner) -> Artifact | None:
    """Load the model that compares checkpoints of an alignment; None if it needs no model from outside the run."""
    selection = config.train.checkpoint_selection
    judge = selection.head_to_head if selection.interval_steps else None
    return _fixed_judge(config, run, Label.input("checkpoint_judge"), judge, "train.checkpoint_selection.head_to_head")


def _fixed_judge(config: ExperimentConfig, run: StageRunner, label: Label, judge: Any, key: str) -> Artifact | None:
    if not wants_model(judge):
        return None
    return _outside(config, run, label, judge.model, key, head_of(judge))


def _outside(
    config: ExperimentConfig, run: StageRunner, label: Label, path: str, key: str, head: RewardHead | None = None
) -> Artifact:
    return load_from_outside(run, label, ModelConfig(path=path, dtype=config.model.dtype), f"{key}.model", head)


@dataclass(slots=True)
class RunJudge:
    """Judges responses with one judge.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        settings: the judge.
        key: the setting that holds the judge.
    """

    config: ExperimentConfig
    run: StageRunner
    settings: Judge
    key: str = "judge"

    def judge(
        self,
        label: Label,
        model_name: str | None,
        models: RunModels,
        instructions: Artifact,
        responses: Artifact,
        purpose: str = "",
    ) -> Artifact:
        """Judge responses.

        Args:
            label: the label of the scores.
            model_name: the name of one of the run's own models; any other name is the model from outside. None is the
                model that the judge's settings name.
            models: the models of the run so far.
            instructions: instructions.jsonl.
            responses: responses.jsonl.
            purpose: the text from which the seed is derived; the label if empty.
        """
        members = {
            name: RunJudge(self.config, self.run, member, key).judge(
                label.sibling(f"{label.part}_by_{name}"),
                None if model_name is None else model_of(member, model_name),
                models,
                instructions,
                responses,
                purpose and f"{purpose}_by_{name}",
            )
            for name, (key, member) in self._members.items()
        }
        policy, reference = self.resolve_policy(model_name or self.settings.model, models)
        if (config := written_criteria(self.settings)) is not None:
            writer = policy if config.model == "judge" else models.named(config.model)
            instructions = self._write_criteria(label.criteria, config, writer, instructions)
        return self.run.make(
            label,
            judge,
            judge=self.settings,
            policy=policy,
            reference=reference,
            instructions=instructions,
            responses=responses,
            engine=self.config.engine,
            seed=derive_seed(self.config.seed, purpose or str(label)),
            **({"members": members} if members else {}),
        )

    @property
    def _members(self) -> dict[str, tuple[str, Judge]]:
        """Return {name: (setting, judge)} of the members of a panel; nothing for another judge."""
        if not isinstance(self.settings, Panel):
            return {}
        return {name: (f"{self.key}.members.{name}", member) for name, member in self.settings.members.items()}

    def _write_criteria(
        self, label: Label, config: CriteriaConfig, writer: Artifact | None, instructions: Artifact
    ) -> Artifact:
        """Write criteria for instructions; those for the same instructions by the same writer are the same."""
        return self.run.make(
            label,
            write_criteria,
            config=config,
            policy=writer,
            instructions=instructions,
            engine=self.config.engine,
            seed=derive_seed(self.config.seed, "criteria"),
        )

    def resolve_policy(self, model_name: str, models: RunModels) -> tuple[Artifact | None, Artifact | None]:
        """Return the policy that judges and its reference policy; None where the judge needs none."""
        if not asks_a_policy(self.settings):
            return None, None
        fixed = models.judge if self.key == "judge" else models.outside.get(self.key)
        if head_of(self.settings) is not None:
            return fixed, None
        policy = models.own_or(model_name, fixed)
        if not isinstance(self.settings, ImplicitReward):
            return policy, None
        return policy, models.base if model_name == "sft" else models.reference
