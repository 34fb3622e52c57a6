"""The lineage of a record: instruction → candidates → judgements → training data → log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from selfalign.core.records import (
    Comparison,
    Demonstration,
    Instruction,
    Judgement,
    LabelledResponse,
    PairMargin,
    PairReference,
    PreferencePair,
    Response,
    ResponseKL,
    ResponseScore,
)
from selfalign.runs.labels import Kind, Label, model_after
from selfalign.ui.record_file import id_of
from selfalign.ui.run_records import RunRecords
from selfalign.ui.search import Searcher

TrainingRecord = PreferencePair | LabelledResponse | Demonstration
TRAINING = (PreferencePair, LabelledResponse, Demonstration)


@dataclass(frozen=True, slots=True)
class JudgedBy:
    """What one judge says of a response.

    Attributes:
        label: its judgements.
        model: the model of the run that judged; empty for another.
        score: the mean; None where there is no record.
        judgements: every attempt.
    """

    label: Label
    model: str
    score: ResponseScore | None
    judgements: list[Judgement]


@dataclass(frozen=True, slots=True)
class CandidateLine:
    """A response, what judges say of it, its status with its role, and why it has none."""

    response: Response
    judged: list[JudgedBy]
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """The responses of one artifact to an instruction, and their comparisons with one another or with others."""

    label: Label
    lines: list[CandidateLine]
    comparisons: list[tuple[Label, Comparison]]


@dataclass(frozen=True, slots=True)
class LogProbability:
    """Log-probabilities of a training record under one model.

    Attributes:
        label: the artifact.
        model: the model; empty if it is none of the run's.
        when: "before" or "after" the training on the record; empty if that is not known.
        record: the log-probabilities.
    """

    label: Label
    model: str
    when: str
    record: PairReference


@dataclass(frozen=True, slots=True)
class Trained:
    """A record of training data, or of the pairs that models are measured on, with its log-probabilities."""

    label: Label
    record: TrainingRecord
    logps: list[LogProbability]
    margins: list[tuple[Label, PairMargin]]


@dataclass(slots=True)
class Lineage:
    """All that a run knows of an instruction. Parts that the run does not have are None or empty.

    Attributes:
        label: the instructions.
        instruction: the instruction.
        candidates: its responses, one artifact after the other.
        trained: the training data made of them.
    """

    label: Label | None = None
    instruction: Instruction | None = None
    candidates: list[Candidates] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)


def lineage_of(searcher: Searcher, label: Label, record: Any) -> Lineage:
    """Return the lineage of a record.

    Args:
        searcher: knows what became of each response.
        label: the artifact of the record.
        record: any record.

    Raises:
        SelfalignError: a file is damaged.
    """
    run = searcher.run
    if isinstance(record, PairReference | PairMargin):
        found = _measured(run, label, record)
        return lineage_of(searcher, *found) if found else Lineage()
    lineage = Lineage()
    if isinstance(record, TRAINING):
        label = _part_with(run, label, record)
        lineage.trained.append(_trained(run, label, record))
    name, responses = _origin(run, label, record)
    if isinstance(record, Instruction):
        lineage.label, lineage.instruction = label, record
    for one in responses:
        instructions = run.instructions_of(one)
        known = run.records(instructions, Instruction) if instructions else None
        if lineage.instruction is None and known is not None:
            lineage.label, lineage.instruction = instructions, known.with_id(name)
        lineage.candidates.append(candidates_of(searcher, one, name))
        shown = {id_of(trained.record) for trained in lineage.trained}
        for pairs, made in _training_records(run, one, name):
            if id_of(made) not in shown:
                lineage.trained.append(_trained(run, pairs, made))
    lineage.candidates = [one for one in lineage.candidates if one.lines]
    return lineage


def _origin(run: RunRecords, label: Label, record: Any) -> tuple[str, list[Label]]:
    """Return the id of a record's instruction, and the responses to look for; an empty id if it has none."""
    match record:
        case Instruction():
            made = run.made_from(label, "instructions")
            return record.id, [one for one in dict.fromkeys([*made, label]) if run.records(one, Response)]
        case Response():
            return record.instruction_id, [label]
        case PreferencePair() | LabelledResponse():
            return record.instruction_id, run.sources(label, "responses")
        case Demonstration():
            return _of_response(run, run.sources(label, "responses"), record.id)
        case Comparison():
            keys = ("responses", "answers", "opponent", "ranked")
            responses = [one for key in keys for one in run.sources(label, key)]
            inner, found = _of_response(run, responses, record.instruction_id)  # A comparison of judgements.
            if inner:
                return inner, found
            asked, _ = _of_response(run, responses, record.first_id)  # Of ranked answers, each two are a comparison.
            return asked or record.instruction_id, responses
        case Judgement():
            return _of_response(run, run.sources(label, "responses"), record.response_id)
        case ResponseScore() | ResponseKL():
            responses = [*run.sources(label, "responses"), *run.sources(label, "answers")]
            return _of_response(run, responses, record.id)
    return "", []


def _of_response(run: RunRecords, responses: Sequence[Label], name: str) -> tuple[str, list[Label]]:
    """Return the id of the instruction of a response, and the artifact that has the response."""
    for label in responses:
        file = run.records(label, Response)
        if file is not None and (response := file.with_id(name)) is not None:
            return response.instruction_id, [label]
    return "", []


def _measured(run: RunRecords, label: Label, record: PairReference | PairMargin) -> tuple[Label, TrainingRecord] | None:
    """Return the training record whose log-probabilities these are, and its artifact."""
    name = record.id.removesuffix("/chosen").removesuffix("/rejected")
    for pairs in run.sources(label, "pairs"):
        for kind in TRAINING:
            file = run.records(pairs, kind)
            if file is not None and (found := file.with_id(name)) is not None:
                return pairs, found
    return None


def _part_with(run: RunRecords, label: Label, record: TrainingRecord) -> Label:
    """Return the artifact that made a record: of gathered ones the part that the record came from."""
    for part in run.sources(label, "parts"):
        file = run.records(part, type(record))
        if file is not None and file.rows_with_id(record.id):
            return _part_with(run, part, record)
    return label


def _training_records(run: RunRecords, responses: Label, instruction: str) -> list[tuple[Label, TrainingRecord]]:
    """Return the training data made of the responses to one instruction."""
    found: list[tuple[Label, TrainingRecord]] = []
    for label in run.pairs_of(responses):
        for kind in (PreferencePair, LabelledResponse):
            if (file := run.records(label, kind)) is not None:
                found += [(label, one) for one in file.of(instruction)]
        positives, answers = run.records(label, Demonstration), run.records(responses, Response)
        if positives is not None and answers is not None:
            kept = [positives.with_id(one.id) for one in answers.of(instruction)]
            found += [(label, one) for one in kept if one is not None]
    return found


def candidates_of(searcher: Searcher, label: Label, instruction: str) -> Candidates:
    """Return the responses of an artifact to one instruction, with what judges say of them."""
    run, lines, answers = searcher.run, list[CandidateLine](), searcher.run.records(label, Response)
    assert answers is not None, "responses have a file"
    columns, judges = searcher.columns(label, answers.path.name), run.judges_of(label)
    for row, response in answers.rows_of(instruction):
        judged = [_judged(run, one, response.id) for one in judges]
        lines.append(CandidateLine(response, judged, columns.status.at(row), columns.reason.at(row)))
    compared: list[tuple[Label, Comparison]] = []
    for one in run.comparisons_of(label):
        file = run.records(one, Comparison)
        compared += [(one, record) for record in file.of(instruction)] if file else []
    return Candidates(label, lines, compared)


def _judged(run: RunRecords, label: Label, response: str) -> JudgedBy:
    scores, judgements = run.records(label, ResponseScore), run.records(label, Judgement)
    score = scores.with_id(response) if scores else None
    return JudgedBy(label, run.model_of(label), score, judgements.of(response) if judgements else [])


def _trained(run: RunRecords, label: Label, record: TrainingRecord) -> Trained:
    """Return a training record with its log-probabilities under the models of the run, in the order of the models."""
    logps: list[LogProbability] = []
    margins: list[tuple[Label, PairMargin]] = []
    for holder in run.holding(label):
        for one in run.made_from(holder, "pairs", "reference_logprobs"):
            model, file = run.model_of(one), run.records(one, PairReference)
            for name in (record.id, f"{record.id}/chosen", f"{record.id}/rejected"):
                found = file.with_id(name) if file else None
                if found is not None:
                    logps.append(LogProbability(one, model, _when(label, model), found))
        for one in run.made_from(holder, "pairs", "preference_accuracy"):
            file = run.records(one, PairMargin)
            measured = file.with_id(record.id) if file else None
            margins += [(one, measured)] if measured is not None else []
    # A reference of one model is the policy of others.
    same = {(one.model, one.record): one for one in reversed(logps)}
    ordered = sorted(same.values(), key=lambda one: Label.parse(one.model or "M0").model_number)
    return Trained(label, record, ordered, margins)


def _when(label: Label, model: str) -> str:
    """Return whether a model comes before or after the training on an iteration's data."""
    if label.kind is not Kind.ITERATION or not model:
        return ""
    trained = Label.model(model_after(label.iteration_number)).model_number
    return "after" if Label.parse(model).model_number >= trained else "before"
