"""What a run is given: its data as artefacts, before any model is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from selfalign.config.data import Pairs, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.errors import SelfalignError
from selfalign.data.containers import find_data, identify_data
from selfalign.data.schemas import Schema
from selfalign.runs.labels import Label
from selfalign.runs.runner import Maker
from selfalign.stages.evaluate import PreferenceTest
from selfalign.stages.instruct import InstructConfig
from selfalign.stages.outputs import outputs
from selfalign.stages.pair import given_pairs
from selfalign.stages.preferences import preference_test
from selfalign.stages.questions import questions, teaching
from selfalign.stages.seeds import EvaluationFineTuning, seeds, taught_questions
from selfalign.store.artifacts import Artefact, Content
from selfalign.store.stage import StageFunction


@dataclass(slots=True)
class Given:
    """A run's data.

    Attributes:
        config: the experiment.
        run: makes artefacts.
        learnt: what the models to measure were trained on, where they are of other runs.
        seeds: demonstrations and held-out ranked answers.
        questions: the evaluation instructions.
        outputs: another model's answers to the evaluation instructions, where they are given.
        validation: the instructions that checkpoints of an alignment are compared on, where they are.
        preferences: preference pairs to measure on, where there are any.
        pairs: preference pairs, where they are given.
        instructions: all new instructions, where they are read instead of written.
        benchmarks: {benchmark: the files it reads}.
    """

    config: ExperimentConfig
    run: Maker
    learnt: list[Artefact] = field(default_factory=list)
    benchmarks: dict[str, Content] = field(init=False)
    seeds: Artefact = field(init=False)
    questions: Artefact | None = field(init=False)
    outputs: Artefact | None = None
    validation: Artefact | None = field(init=False)
    preferences: Artefact | None = None
    pairs: Artefact | None = None
    instructions: Artefact | None = None

    def __post_init__(self) -> None:
        data, asked, choose = self.config.data, self.config.evaluate, self.config.train.choose
        self.benchmarks = {
            name: Content(partial(made.sources, f"benchmark.{name}")) for name, made in self.config.benchmark.items()
        }
        self.seeds = self._make_seeds(
            Label.input("seeds"), seeds, data.seeds.evaluation_fine_tuning, judge=self.config.judge
        )
        self.questions = self._ask(
            "questions", "evaluate.instructions", asked.instructions, asked.count, self.seeds, self.learnt
        )
        self.validation = self._ask(
            "validation", "train.choose.instructions", choose.instructions, choose.count, self.seeds
        )
        if asked.against:
            content = content_of(asked.against, "evaluate.against")
            self.outputs = self.run.make(
                Label.input("given_outputs"),
                outputs,
                source=asked.against,
                content=content,
                instructions=self.questions,
            )
        if isinstance(data, Pairs):
            content, aside = content_of(data.path, "data.path"), self.config.train.held_out_pairs
            self.pairs = self.run.make(
                Label.iteration(1, "pairs"),
                given_pairs,
                source=data.path,
                count=data.count,
                content=content,
                held_out=self.held_out,
                set_aside=aside,
                trained_on=[self.seeds] if aside else [],
                **self._schema,
            )
            _check_enough("data.count", data.count, self.pairs.counts["pairs"], f"pairs of {data.path}")
        else:
            source, schema = data.instruct.source, data.schema
            self.instructions = self._ask("instructions", "data.instruct.source", source, 0, None, schema=schema)
            self._check_instructions(data.instruct)
        if asked.preferences.source:
            self.preferences = self._held_out_pairs(asked.preferences)

    @property
    def _schema(self) -> dict[str, Schema]:
        """How the user describes the rows of `data`; nothing where they are in a format that is known."""
        return {"schema": schema} if (schema := self.config.data.schema) is not None else {}

    @property
    def held_out(self) -> list[Artefact]:
        """Artefacts with instructions that no training may see."""
        ranked = [self.seeds] if self.seeds.counts["questions_held_out"] else []
        return [*ranked, *(asked for asked in (self.questions, self.validation) if asked is not None)]

    @property
    def trained_on(self) -> list[Artefact]:
        """Artefacts with what is given to be trained on."""
        return [self.seeds] if self.pairs is None else [self.seeds, self.pairs]

    def ift(self) -> Artefact:
        """The demonstrations without EFT."""
        if self.config.data.seeds.evaluation_fine_tuning != EvaluationFineTuning.human:
            return self.seeds
        return self._make_seeds(Label.input("ift"), seeds, EvaluationFineTuning.none, judge=self.config.judge)

    def taught_questions(self) -> Artefact:
        """The ranked questions that evaluation fine-tuning may use, with their answers."""
        how = self.config.data.seeds.evaluation_fine_tuning
        return self._make_seeds(Label.input("eft", "questions"), taught_questions, how)

    def _held_out_pairs(self, test: PreferenceTest) -> Artefact:
        content: Content | str = ""
        ranked, key = None, "evaluate.preferences.source"
        if test.source != "ranked":
            content = content_of(test.source, key)
        elif self.seeds.counts["questions_held_out"]:
            ranked = self.seeds
        else:
            raise SelfalignError(f"{key}=ranked: no question of data.seeds.ranked is held out")
        inputs = {"source": test.source, "count": test.count, "content": content, "ranked": ranked}
        label = Label.input("preferences", "pairs")
        made = self.run.make(label, preference_test, trained_on=self.trained_on, **inputs)
        _check_enough("evaluate.preferences.count", test.count, made.counts["pairs"], f"pairs of {test.source}")
        return made

    def _make_seeds(self, label: Label, stage: StageFunction, how: EvaluationFineTuning, **more: Any) -> Artefact:
        given = self.config.data.seeds
        sources = {"data.seeds.demonstrations": given.demonstrations, "data.seeds.ranked": given.ranked}
        contents = [content_of(source, key) for key, source in sources.items() if source]
        settings = replace(given, evaluation_fine_tuning=how)
        return self.run.make(label, stage, config=settings, contents=contents, **self._schema, **more)

    def _ask(
        self,
        name: str,
        key: str,
        source: str,
        count: int,
        taught: Artefact | None,
        learnt: Sequence[Artefact] = (),
        schema: Schema | None = None,
    ) -> Artefact | None:
        """Instructions of a data source; those whose answer is taught, or learnt before, are left out."""
        if not source:
            return None
        inputs: dict[str, Any] = {"source": source, "count": count, "content": content_of(source, key), "seeds": taught}
        if schema is not None:
            inputs["schema"] = schema
        others = [artefact for artefact in learnt if artefact.digest != self.seeds.digest]
        if found := teaching(others, source):
            inputs["trained_on"] = found
        made = self.run.make(Label.input(name), questions, **inputs)
        _check_enough(
            f"{key.rpartition('.')[0]}.count", count, made.counts["instructions"], f"instructions of {source}"
        )
        return made

    def _check_instructions(self, asked: InstructConfig) -> None:
        """There are as many seeds as the writer is shown, or as many given instructions as all iterations take."""
        if self.instructions is not None:
            wanted, there = asked.count * self.config.iterations, self.instructions.counts["instructions"]
            if there < wanted:
                raise SelfalignError(
                    f"data.instruct.count={asked.count} in each of iterations={self.config.iterations} takes {wanted} "
                    f"instructions, but data.instruct.source={asked.source} has {there}: lower it or give more"
                )
        elif (there := self.seeds.counts["ift"]) < asked.seed_demonstrations:
            raise SelfalignError(
                f"data.instruct.seed_demonstrations={asked.seed_demonstrations}, but there are {there} IFT seeds: "
                "lower it or give more data.seeds.demonstrations"
            )


def content_of(source: str, key: str) -> Content:
    """What a data source holds; `key` is the setting that names it."""
    return Content(partial(identify_data, source, key))


def find_files(config: ExperimentConfig) -> None:
    """Looks for every file that is read, so that a missing one is known before anything is made.

    Raises:
        SelfalignError: one is missing, or cannot be read; the setting is named.
    """
    for key, source in data_sources(config).items():
        find_data(source, key)
    for name, benchmark in config.benchmark.items():
        benchmark.sources(f"benchmark.{name}")


def data_sources(config: ExperimentConfig) -> dict[str, str]:
    """{setting: data source} of all data that a run is given."""
    data, asked = config.data, config.evaluate
    named = {
        "data.seeds.demonstrations": data.seeds.demonstrations,
        "data.seeds.ranked": data.seeds.ranked,
        "data.path": data.path if isinstance(data, Pairs) else "",
        "data.instruct.source": data.instruct.source if isinstance(data, SelfRewarding) else "",
        "evaluate.instructions": asked.instructions,
        "evaluate.against": asked.against,
        "evaluate.preferences.source": "" if asked.preferences.source == "ranked" else asked.preferences.source,
        "train.choose.instructions": config.train.choose.instructions,
    }
    return {key: source for key, source in named.items() if source}


def _check_enough(key: str, wanted: int, there: int, what: str) -> None:
    """A count that is set is reached."""
    if there < wanted:
        raise SelfalignError(
            f"{key}={wanted}, but there are {there} usable {what}: lower it (0 takes all) or give more"
        )


def makes_baseline(config: ExperimentConfig) -> bool:
    """Whether there is an SFT baseline beside M1: it writes EFT, or its judging is to be compared with M1's."""
    how = config.data.seeds.evaluation_fine_tuning
    return how == EvaluationFineTuning.baseline or (config.evaluate.baseline and how == EvaluationFineTuning.human)
