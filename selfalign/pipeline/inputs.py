"""What a run is given: its data as artifacts, before any model is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from selfalign.config.data import Pairs, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import RankedAnswers
from selfalign.data.containers import find_data, identify_data
from selfalign.data.schemas import Schema
from selfalign.runs.labels import Label
from selfalign.runs.runner import Maker
from selfalign.stages.eval_instructions import eval_instructions, measured_by, teaching
from selfalign.stages.evaluate import PreferenceTest
from selfalign.stages.given_outputs import given_outputs
from selfalign.stages.instruct import InstructConfig
from selfalign.stages.pair import given_pairs
from selfalign.stages.preference_accuracy import preference_test
from selfalign.stages.seed_data import EFTSource, asks_known, seed_data, taught_questions, untaught_questions
from selfalign.store.artifacts import Artifact, Content
from selfalign.store.stage import StageFunction
from selfalign.training.splits import KnownTexts


@dataclass(slots=True)
class RunInputs:
    """A run's data.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        learnt: what the models to measure were trained on, where they are of other runs.
        seed_data: demonstrations and held-out ranked answers.
        ranked: the held-out ranked answers that judging is measured on; None where there are none.
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
    learnt: list[Artifact] = field(default_factory=list)
    benchmarks: dict[str, Content] = field(init=False)
    seed_data: Artifact = field(init=False)
    ranked: Artifact | None = field(init=False)
    questions: Artifact | None = field(init=False)
    outputs: Artifact | None = None
    validation: Artifact | None = None
    preferences: Artifact | None = None
    pairs: Artifact | None = None
    instructions: Artifact | None = None

    def __post_init__(self) -> None:
        data, asked, choose = self.config.data, self.config.evaluate, self.config.train.checkpoint_selection
        self.benchmarks = {
            name: Content(partial(made.sources, f"benchmark.{name}")) for name, made in self.config.benchmark.items()
        }
        self.seed_data = self._make_seeds(
            Label.input("seeds"), seed_data, data.seed_data.eft_source, judge=self.config.judge
        )
        self.ranked = self._held_out_questions()
        self.questions = self._ask(
            "questions", "evaluate.instructions", asked.instructions, asked.count, self.seed_data, self.learnt
        )
        self.validation = self._ask(
            "validation",
            "train.checkpoint_selection.instructions",
            choose.instructions,
            choose.count,
            self.seed_data,
            measured=self.held_out,
        )
        if asked.reference_outputs:
            content = content_of(asked.reference_outputs, "evaluate.reference_outputs")
            self.outputs = self.run.make(
                Label.input("given_outputs"),
                given_outputs,
                source=asked.reference_outputs,
                content=content,
                instructions=self.questions,
            )
        if isinstance(data, Pairs):
            content, aside = content_of(data.path, "data.path"), self.config.train.validation_pairs
            self.pairs = self.run.make(
                Label.iteration(1, "pairs"),
                given_pairs,
                source=data.path,
                count=data.count,
                content=content,
                held_out=self.held_out,
                set_aside=aside,
                trained_on=[self.seed_data] if aside else [],
                **self._schema,
            )
            _check_enough("data.count", data.count, self.pairs.counts["pairs"], f"pairs of {data.path}")
        else:
            source, schema = data.instruct.source, data.schema
            self.instructions = self._ask("instructions", "data.instruct.source", source, 0, None, schema=schema)
            self._check_instructions(data.instruct)
        if asked.preference_pairs.source:
            self.preferences = self._preference_pairs(asked.preference_pairs)

    @property
    def _schema(self) -> dict[str, Schema]:
        """How the user describes the rows of `data`; nothing where they are in a format that is known."""
        return {"schema": schema} if (schema := self.config.data.schema) is not None else {}

    @property
    def held_out(self) -> list[Artifact]:
        """Artifacts with instructions that no training may see."""
        return [
            *([self.ranked] if self.ranked else []),
            *(asked for asked in (self.questions, self.validation) if asked is not None),
        ]

    @property
    def trained_on(self) -> list[Artifact]:
        """Artifacts with what is given to be trained on."""
        return [self.seed_data] if self.pairs is None else [self.seed_data, self.pairs]

    def ift(self) -> Artifact:
        """The demonstrations without EFT."""
        if self.config.data.seed_data.eft_source != EFTSource.human:
            return self.seed_data
        return self._make_seeds(Label.input("ift"), seed_data, EFTSource.none, judge=self.config.judge)

    def taught_questions(self) -> Artifact:
        """The ranked questions that evaluation fine-tuning may use, with their answers."""
        how = self.config.data.seed_data.eft_source
        return self._make_seeds(Label.input("eft", "questions"), taught_questions, how)

    def _preference_pairs(self, test: PreferenceTest) -> Artifact:
        content: Content | str = ""
        ranked, key = None, "evaluate.preference_pairs.source"
        if test.source != "ranked":
            content = content_of(test.source, key)
        elif self.ranked is not None:
            ranked = self.ranked
        else:
            raise SelfalignError(f"{key}=ranked: no question of data.seed_data.ranked is held out")
        inputs = {"source": test.source, "count": test.count, "content": content, "ranked": ranked}
        label = Label.input("preferences", "pairs")
        made = self.run.make(label, preference_test, trained_on=self.trained_on, **inputs)
        _check_enough("evaluate.preference_pairs.count", test.count, made.counts["pairs"], f"pairs of {test.source}")
        return made

    def _held_out_questions(self) -> Artifact | None:
        """The held-out ranked questions, without those that the models to measure have learnt from elsewhere."""
        held_out = self.seed_data
        others = [artifact for artifact in self.learnt if artifact.digest != held_out.digest]
        if others and held_out.counts["questions_held_out"]:
            questions = read_records(held_out.path / "ranked.jsonl", RankedAnswers)
            known = [(one, KnownTexts.of([one])) for one in others]
            taught = [one for one, texts in known if any(asks_known(question, texts) for question in questions)]
            if taught:
                inputs = {"seeds": self.seed_data, "trained_on": taught}
                held_out = self.run.make(Label.input("ranked"), untaught_questions, **inputs)
        return held_out if held_out.counts["questions_held_out"] else None

    def _make_seeds(self, label: Label, stage: StageFunction, how: EFTSource, **more: Any) -> Artifact:
        given = self.config.data.seed_data
        sources = {"data.seed_data.demonstrations": given.demonstrations, "data.seed_data.ranked": given.ranked}
        contents = [content_of(source, key) for key, source in sources.items() if source]
        settings = replace(given, eft_source=how)
        return self.run.make(label, stage, config=settings, contents=contents, **self._schema, **more)

    def _ask(
        self,
        name: str,
        key: str,
        source: str,
        count: int,
        taught: Artifact | None,
        learnt: Sequence[Artifact] = (),
        measured: Sequence[Artifact] = (),
        schema: Schema | None = None,
    ) -> Artifact | None:
        """Instructions of a data source; those whose answer is taught, learnt before or measured are left out."""
        if not source:
            return None
        inputs: dict[str, Any] = {"source": source, "count": count, "content": content_of(source, key), "seeds": taught}
        if schema is not None:
            inputs["schema"] = schema
        others = [artifact for artifact in learnt if artifact.digest != self.seed_data.digest]
        if found := teaching(others, source):
            inputs["trained_on"] = found
        if found := measured_by(measured, source):
            inputs["held_out"] = found
        made = self.run.make(Label.input(name), eval_instructions, **inputs)
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
        elif (there := self.seed_data.counts["ift"]) < asked.seed_examples:
            raise SelfalignError(
                f"data.instruct.seed_examples={asked.seed_examples}, but there are {there} IFT seeds: "
                "lower it or give more data.seed_data.demonstrations"
            )


def content_of(source: str, key: str) -> Content:
    """What a data source holds; `key` is the setting that names it."""
    return Content(partial(identify_data, source, key))


def find_files(config: ExperimentConfig) -> None:
    """Looks for every file that is read, so that a missing one is known before anything is made.

    Raises:
        SelfalignError: one is missing, or cannot be read; the setting is named.
    """
    for look in searches(config):
        look()


def searches(config: ExperimentConfig) -> list[Callable[[], object]]:
    """Return a call for each data source and each benchmark that looks for its files, as `find_files` does."""
    data = [partial(find_data, source, key) for key, source in data_sources(config).items()]
    return [*data, *(partial(benchmark.sources, f"benchmark.{name}") for name, benchmark in config.benchmark.items())]


def data_sources(config: ExperimentConfig) -> dict[str, str]:
    """{setting: data source} of all data that a run is given."""
    data, asked = config.data, config.evaluate
    named = {
        "data.seed_data.demonstrations": data.seed_data.demonstrations,
        "data.seed_data.ranked": data.seed_data.ranked,
        "data.path": data.path if isinstance(data, Pairs) else "",
        "data.instruct.source": data.instruct.source if isinstance(data, SelfRewarding) else "",
        "evaluate.instructions": asked.instructions,
        "evaluate.reference_outputs": asked.reference_outputs,
        "evaluate.preference_pairs.source": ""
        if asked.preference_pairs.source == "ranked"
        else asked.preference_pairs.source,
        "train.checkpoint_selection.instructions": config.train.checkpoint_selection.instructions,
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
    how = config.data.seed_data.eft_source
    return how == EFTSource.baseline or (config.evaluate.sft_baseline and how == EFTSource.human)
