"""Who plays which part in a run: the models, and which of them judges."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from selfalign.benchmarks.protocol import judges_to_load
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import derive_seed
from selfalign.judges.protocol import OWN_MODELS, asks_a_server, wants_model
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import identify_source
from selfalign.runs.labels import Label
from selfalign.runs.runner import Maker
from selfalign.stages.judge import ImplicitReward, Judge, judge
from selfalign.stages.pretrained import pretrained
from selfalign.store.artifacts import Artefact, Content


@dataclass(slots=True)
class Models:
    """The models of a run so far.

    Attributes:
        base: M0.
        sft: M1.
        newest: M_t.
        reference: what the newest was trained from or against.
        writer: a model that only writes instructions, where there is one.
        judge: a model that only judges, where there is one.
        referee: a model that only compares answers head to head, where there is one.
        checkpoint_judge: a model that only compares checkpoints of an alignment, where there is one.
        pair_judge: a model that only scores held-out pairs, where there is one.
        own_pairs: what the run has made to train on so far, the newest last.
        examiners: models that only judge in benchmarks, by the benchmark's name.
    """

    base: Artefact
    sft: Artefact
    newest: Artefact
    reference: Artefact
    writer: Artefact | None = None
    judge: Artefact | None = None
    referee: Artefact | None = None
    checkpoint_judge: Artefact | None = None
    pair_judge: Artefact | None = None
    own_pairs: list[Artefact] = field(default_factory=list)
    examiners: dict[str, Artefact] = field(default_factory=dict)

    def named(self, name: str) -> Artefact:
        """The model a setting names: base is M0, sft is M1, self and previous are the newest."""
        return {"base": self.base, "sft": self.sft}.get(name, self.newest)

    def own_or(self, name: str | None, fixed: Artefact | None) -> Artefact | None:
        """The run's own model of this name, or where it is none of them, the one that was loaded for it."""
        return self.named(name) if name is not None and name in OWN_MODELS else fixed


def load_model(run: Maker, label: Label, model: ModelConfig, key: str) -> Artefact:
    """A model from outside the run; `key` is the setting that names it."""
    return run.make(label, pretrained, model=model, source=Content(partial(identify_source, model, key)))


def judges_of(config: ExperimentConfig) -> dict[str, Any]:
    """{setting: judge} of all who score or compare in a run, those of its benchmarks aside."""
    asked, choose = config.evaluate, config.train.choose
    named = {
        "judge": config.judge,
        "evaluate.head_to_head": asked.head_to_head,
        "evaluate.preferences.judge": asked.preferences.judge,
        "train.choose.head_to_head": choose.head_to_head if choose.every_steps else None,
    }
    return {key: judge for key, judge in named.items() if judge is not None}


def fixed_judges(config: ExperimentConfig, run: Maker) -> dict[str, Any]:
    """The models that only judge, compare, score held-out pairs or examine in benchmarks, as fields of `Models`.

    None, or none of a benchmark, where it is one of the run's own.
    """
    test, loaded = config.evaluate.preferences, judges_to_load(config.benchmark)
    return {
        "judge": _fixed_judge(config, run, Label.input("judge"), config.judge, "judge"),
        "referee": _fixed_judge(
            config, run, Label.input("referee"), config.evaluate.head_to_head, "evaluate.head_to_head"
        ),
        "pair_judge": _fixed_judge(
            config, run, Label.input("preferences", "judge"), test.judge, "evaluate.preferences.judge"
        ),
        "examiners": {
            name: _outside(config, run, Label.input("judges", name), path, f"benchmark.{name}.judge")
            for name, path in loaded.items()
        },
    }


def checkpoint_judge(config: ExperimentConfig, run: Maker) -> Artefact | None:
    """Loads the model that only compares checkpoints of an alignment, where there is one."""
    choose = config.train.choose
    judge = choose.head_to_head if choose.every_steps else None
    return _fixed_judge(config, run, Label.input("checkpoint_judge"), judge, "train.choose.head_to_head")


def _fixed_judge(config: ExperimentConfig, run: Maker, label: Label, judge: Any, key: str) -> Artefact | None:
    if not wants_model(judge):
        return None
    return _outside(config, run, label, judge.model, key)


def _outside(config: ExperimentConfig, run: Maker, label: Label, path: str, key: str) -> Artefact:
    return load_model(run, label, ModelConfig(path=path, dtype=config.model.dtype), f"{key}.model")


@dataclass(slots=True)
class Judging:
    """Judges with one judge.

    Attributes:
        config: the experiment.
        run: makes artefacts.
        how: the judge.
    """

    config: ExperimentConfig
    run: Maker
    how: Judge

    def judge(
        self, label: Label, who: str, models: Models, instructions: Artefact, responses: Artefact, purpose: str = ""
    ) -> Artefact:
        """Judges responses.

        Args:
            label: of the artefact.
            who: one of the run's own models by name; any other name is the fixed judge.
            models: of the run so far.
            instructions: what was answered.
            responses: the answers.
            purpose: what the seed is derived from, where that is not the label.
        """
        policy, reference = self.sitting(who, models)
        return self.run.make(
            label,
            judge,
            judge=self.how,
            policy=policy,
            reference=reference,
            instructions=instructions,
            responses=responses,
            generate=self.config.generate,
            seed=derive_seed(self.config.seed, purpose or str(label)),
        )

    def sitting(self, who: str, models: Models) -> tuple[Artefact | None, Artefact | None]:
        """Who judges, and, where the judge compares the two, what that model was trained from; None for no model."""
        if asks_a_server(self.how):
            return None, None
        policy = models.own_or(who, models.judge)
        if not isinstance(self.how, ImplicitReward):
            return policy, None
        return policy, models.base if who == "sft" else models.reference
