"""The inputs of a run: its data as artifacts, made before any model is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from selfalign.config.checks import check_checkpoints
from selfalign.config.data import Pairs, ReplayConfig, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.judges import judges_of
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import RankedAnswers
from selfalign.data.mixtures import DataSource, find_sources, identify_source
from selfalign.data.schemas import Schema
from selfalign.judges.panel import judges_in
from selfalign.judges.protocol import verifies
from selfalign.losses.protocol import is_unpaired
from selfalign.metrics import catalog
from selfalign.runs.labels import Label
from selfalign.runs.runner import StageRunner
from selfalign.stages.eval_instructions import eval_instructions, measured_by, overlapping
from selfalign.stages.evaluate import PreferenceTest
from selfalign.stages.given_outputs import given_outputs
from selfalign.stages.instruct import DEMONSTRATIONS, InstructConfig
from selfalign.stages.pair import given_pairs
from selfalign.stages.preference_accuracy import preference_test
from selfalign.stages.seed_data import EFTSource, asks_known, seed_data, taught_questions, untrained_questions
from selfalign.store.artifacts import Artifact, Content
from selfalign.store.stage import PlannedArtifact, StageFunction
from selfalign.training.splits import KnownTexts
from selfalign.training.unpaired import examples_in


@dataclass(slots=True)
class RunInputs:
    """The inputs of a run. An artifact is None if the configuration asks for none.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        other_training_data: training data of the evaluated models, if other runs trained them.
        seed_data: demonstrations and held-out ranked answers.
        ranked: the held-out ranked answers that judging is measured on; None where there are none.
        questions: the evaluation instructions.
        outputs: another model's responses to the evaluation instructions.
        validation: the instructions on which checkpoints of an alignment are compared.
        preferences: held-out preference pairs.
        pairs: given preference pairs to train on.
        replay: given preference pairs of which each iteration draws some.
        instructions: all given instructions, if instructions are not generated.
        benchmarks: {benchmark: contents of its files}.
    """

    config: ExperimentConfig
    run: StageRunner
    other_training_data: list[Artifact] = field(default_factory=list)
    benchmarks: dict[str, Content] = field(init=False)
    seed_data: Artifact = field(init=False)
    ranked: Artifact | None = field(init=False)
    questions: Artifact | None = field(init=False)
    outputs: Artifact | None = None
    validation: Artifact | None = None
    preferences: Artifact | None = None
    pairs: Artifact | None = None
    replay: Artifact | None = None
    instructions: Artifact | None = None

    def __post_init__(self) -> None:
        data, evaluation, selection = self.config.data, self.config.evaluate, self.config.train.checkpoint_selection
        self.benchmarks = {
            name: Content(partial(settings.sources, f"benchmark.{name}"))
            for name, settings in self.config.benchmark.items()
        }
        self.seed_data = self._make_seeds(
            Label.input("seeds"), seed_data, self._given_eft(data.seed_data.eft_source), judge=self.config.judge
        )
        self.ranked = self._held_out_questions()
        self.questions = self._read_instructions(
            "questions",
            "evaluate.instructions",
            evaluation.instructions,
            evaluation.count,
            self.seed_data,
            self.other_training_data,
            verifiable=self.say_what_is_right,
        )
        self.validation = self._read_instructions(
            "validation",
            "train.checkpoint_selection.instructions",
            selection.instructions,
            selection.count,
            self.seed_data,
            measured=self.held_out,
        )
        if evaluation.reference_outputs:
            self.outputs = self.run.make(
                Label.input("given_outputs"),
                given_outputs,
                source=evaluation.reference_outputs,
                content=content_of(evaluation.reference_outputs, "evaluate.reference_outputs"),
                instructions=self.questions,
            )
        if isinstance(data, Pairs):
            self.pairs = self._given_pairs(data)
        else:
            self.replay = self._replayed(data.replay)
            source, schema = data.instruct.source, data.schema
            if source != DEMONSTRATIONS:
                later = any(verifies(judge) for key, judge in judges_of(self.config).items() if key.startswith("at."))
                checked = self.say_what_is_right or later
                self.instructions = self._read_instructions(
                    "instructions", "data.instruct.source", source, 0, None, schema=schema, verifiable=checked
                )
                self._check_instructions(data.instruct)
        if evaluation.preference_pairs.source:
            self.preferences = self._preference_pairs(evaluation.preference_pairs)

    @property
    def _schema(self) -> dict[str, Schema]:
        """The user's description of the rows of `data`, as a stage input; empty for known formats."""
        return {"schema": schema} if (schema := self.config.data.schema) is not None else {}

    @property
    def say_what_is_right(self) -> bool:
        """Whether instructions must say what is right, because responses are checked by it."""
        return self.config.evaluate.truth or any(map(verifies, judges_in("judge", self.config.judge).values()))

    @property
    def held_out(self) -> list[Artifact]:
        """Artifacts with instructions that no training may see."""
        artifacts = (self.ranked, self.questions, self.validation)
        return [artifact for artifact in artifacts if artifact is not None]

    @property
    def trained_on(self) -> list[Artifact]:
        """Artifacts of the given training data."""
        artifacts = (self.seed_data, self.pairs, self.replay)
        return [artifact for artifact in artifacts if artifact is not None]

    @staticmethod
    def _given_eft(eft_source: EFTSource) -> EFTSource:
        """Return the source of EFT examples as far as the data give it: nobody teaches with synthetic ranks there."""
        return EFTSource.none if eft_source == EFTSource.synthetic else eft_source

    def ift(self) -> Artifact:
        """Return the demonstrations without EFT."""
        if self.config.data.seed_data.eft_source != EFTSource.human:
            return self.seed_data
        return self._make_seeds(Label.input("ift"), seed_data, EFTSource.none, judge=self.config.judge)

    def eft_questions(self) -> Artifact:
        """Return the ranked questions for evaluation fine-tuning, with their answers."""
        eft_source = self.config.data.seed_data.eft_source
        return self._make_seeds(Label.input("eft", "questions"), taught_questions, eft_source)

    def _given_pairs(self, data: Pairs) -> Artifact:
        set_aside = self.config.train.validation_pairs
        pairs = self.run.make(
            Label.iteration(1, "pairs"),
            given_pairs,
            source=data.path,
            count=data.count,
            content=content_of(data.path, "data.path"),
            held_out=self.held_out,
            set_aside=set_aside,
            trained_on=[self.seed_data] if set_aside else [],
            **self._schema,
        )
        _check_count("data.count", data.count, pairs.counts["pairs"], f"pairs of {data.path}")
        if not isinstance(pairs, PlannedArtifact):
            examples = examples_in(pairs, unpaired=is_unpaired(self.config.loss))
            check_checkpoints(self.config.train, examples - set_aside)
        return pairs

    def _replayed(self, replay: ReplayConfig) -> Artifact | None:
        """Return the given pairs of which iterations draw some; None if they draw none."""
        if not replay.largest_share:
            return None
        return self.run.make(
            Label.input("replay", "pairs"),
            given_pairs,
            source=replay.source,
            count=0,
            content=content_of(replay.source, "data.replay.source"),
            held_out=self.held_out,
            set_aside=0,
            trained_on=[],
            **self._schema,
        )

    def _preference_pairs(self, test: PreferenceTest) -> Artifact:
        content: Content | str = ""
        ranked, key = None, "evaluate.preference_pairs.source"
        if test.source != "ranked":
            content = content_of(test.source, key)
        elif self.ranked is not None:
            ranked = self.ranked
        else:
            raise SelfalignError(
                f"{key}=ranked: no question of data.seed_data.ranked is held out. Raise data.seed_data.held_out_share "
                "or give another source"
            )
        inputs = {"source": test.source, "count": test.count, "content": content, "ranked": ranked}
        label = Label.input("preferences", "pairs")
        pairs = self.run.make(label, preference_test, trained_on=self.trained_on, **inputs)
        if test.judge is not None and (longer := pairs.counts.get(catalog.LONGER_PAIRS.name)):
            raise SelfalignError(
                f"{longer} of {pairs.counts['pairs']} pairs of evaluate.preference_pairs.source={test.source} have "
                "responses of several turns or with tool calls, and evaluate.preference_pairs.judge scores single "
                "answers: leave the judge out (evaluate.preference_pairs.judge=null) or give other pairs"
            )
        _check_count("evaluate.preference_pairs.count", test.count, pairs.counts["pairs"], f"pairs of {test.source}")
        return pairs

    def _held_out_questions(self) -> Artifact | None:
        """Return the held-out ranked questions, without those that other runs trained the evaluated models on."""
        held_out = self.seed_data
        others = [artifact for artifact in self.other_training_data if artifact.digest != held_out.digest]
        if others and held_out.counts["questions_held_out"]:
            questions = read_records(held_out.path / "ranked.jsonl", RankedAnswers)
            known = [(artifact, KnownTexts.of([artifact])) for artifact in others]
            trained_on = [one for one, texts in known if any(asks_known(question, texts) for question in questions)]
            if trained_on:
                inputs = {"seeds": self.seed_data, "trained_on": trained_on}
                held_out = self.run.make(Label.input("ranked"), untrained_questions, **inputs)
        return held_out if held_out.counts["questions_held_out"] else None

    def _make_seeds(self, label: Label, stage: StageFunction, eft_source: EFTSource, **more: Any) -> Artifact:
        data = self.config.data.seed_data
        sources = {"data.seed_data.demonstrations": data.demonstrations, "data.seed_data.ranked": data.ranked}
        contents = [content_of(source, key) for key, source in sources.items() if source]
        settings = replace(data, eft_source=eft_source)
        return self.run.make(label, stage, config=settings, contents=contents, **self._schema, **more)

    def _read_instructions(
        self,
        name: str,
        key: str,
        source: DataSource,
        count: int,
        seeds: Artifact | None,
        trained_on: Sequence[Artifact] = (),
        measured: Sequence[Artifact] = (),
        schema: Schema | None = None,
        *,
        verifiable: bool = False,
    ) -> Artifact | None:
        """Read the instructions of a data source, without the prompts of `seeds`, `trained_on` and `measured`.

        Responses to those that are `verifiable` are checked by what these say is right.
        """
        if not source:
            return None
        inputs: dict[str, Any] = {"source": source, "count": count, "content": content_of(source, key), "seeds": seeds}
        if schema is not None:
            inputs["schema"] = schema
        if verifiable:
            inputs["verifiable"] = True
        others = [artifact for artifact in trained_on if artifact.digest != self.seed_data.digest]
        if found := overlapping(others, source):
            inputs["trained_on"] = found
        if found := measured_by(measured, source):
            inputs["held_out"] = found
        instructions = self.run.make(Label.input(name), eval_instructions, **inputs)
        count_key = f"{key.rpartition('.')[0]}.count"
        _check_count(count_key, count, instructions.counts["instructions"], f"instructions of {source}")
        return instructions

    def _check_instructions(self, instruct: InstructConfig) -> None:
        """Check that there are enough IFT seeds for the few-shot prompt, or enough given instructions."""
        if self.instructions is not None:
            wanted, found = instruct.count * self.config.iterations, self.instructions.counts["instructions"]
            if found < wanted:
                raise SelfalignError(
                    f"data.instruct.count={instruct.count} in each of iterations={self.config.iterations} takes "
                    f"{wanted} instructions, but data.instruct.source={instruct.source} has {found}: lower it or give "
                    "more"
                )
        elif (found := self.seed_data.counts["ift"]) < instruct.seed_examples:
            raise SelfalignError(
                f"data.instruct.seed_examples={instruct.seed_examples}, but there are {found} IFT seeds: "
                "lower it or give more data.seed_data.demonstrations"
            )


def content_of(source: DataSource, key: str) -> Content:
    """Return the content of a data source; `key` is the setting that names it."""
    return Content(partial(identify_source, source, key))


def find_files(config: ExperimentConfig) -> None:
    """Check that every input file exists, before anything is made.

    Raises:
        SelfalignError: a file is missing or cannot be read. The message names the setting.
    """
    for search in searches(config):
        search()


def searches(config: ExperimentConfig) -> list[Callable[[], object]]:
    """Return one function for each data source and benchmark. It raises if a file is missing, as in `find_files`."""
    data = [partial(find_sources, source, key) for key, source in data_sources(config).items()]
    return [*data, *(partial(benchmark.sources, f"benchmark.{name}") for name, benchmark in config.benchmark.items())]


def data_sources(config: ExperimentConfig) -> dict[str, DataSource]:
    """Return {setting: data source} of all data that a run reads."""
    data, evaluation = config.data, config.evaluate
    named = {
        "data.seed_data.demonstrations": data.seed_data.demonstrations,
        "data.seed_data.ranked": data.seed_data.ranked,
        "data.path": data.path if isinstance(data, Pairs) else "",
        "data.instruct.source": data.instruct.source
        if isinstance(data, SelfRewarding) and data.instruct.source != DEMONSTRATIONS
        else "",
        "data.replay.source": data.replay.source
        if isinstance(data, SelfRewarding) and data.replay.largest_share
        else "",
        "evaluate.instructions": evaluation.instructions,
        "evaluate.reference_outputs": evaluation.reference_outputs,
        "evaluate.preference_pairs.source": ""
        if evaluation.preference_pairs.source == "ranked"
        else evaluation.preference_pairs.source,
        "train.checkpoint_selection.instructions": config.train.checkpoint_selection.instructions,
    }
    return {key: source for key, source in named.items() if source}


def _check_count(key: str, wanted: int, found: int, records: str) -> None:
    """Check that a source has as many records as the setting asks for."""
    if found < wanted:
        raise SelfalignError(
            f"{key}={wanted}, but there are {found} usable {records}: lower it (0 takes all) or give more"
        )


def makes_baseline(config: ExperimentConfig) -> bool:
    """Whether an SFT baseline is trained besides M1, to write EFT examples or to compare its judging with M1's."""
    eft_source = config.data.seed_data.eft_source
    return eft_source.by_baseline or (config.evaluate.sft_baseline and eft_source == EFTSource.human)
