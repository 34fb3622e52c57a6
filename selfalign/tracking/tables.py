"""A run's records as tables for the tracker, each as soon as its artifact is there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from selfalign.core.jsonl import join_sorted
from selfalign.core.records import Demonstration, Instruction, PreferencePair, Response
from selfalign.runs.labels import Kind, Label
from selfalign.runs.ledger import Ledger
from selfalign.runs.reader import as_text, read_head_to_head, stream_judged, stream_artifact

T = TypeVar("T")
Rows = Iterator[tuple[Any, ...]]


class Table(NamedTuple):
    """A table: its name, its columns, and its rows, read from a run folder and the label they are read for."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Path, Label], Rows]


def log_tables(ledger: Ledger, label: Label) -> None:
    """Sends an artifact's records to the tracker: those of an iteration, or a model's answers beside M1's."""
    of_run = label.kind is Kind.ITERATION or (label.kind is Kind.EVALUATION and label.model_number)
    if of_run and label.part in TABLES:
        name, columns, rows = TABLES[label.part]
        ledger.tracker.table(f"tables/{name}", columns, rows(ledger.folder, label))


def instructions(folder: Path, label: Label) -> Rows:
    """New instructions."""
    for asked in stream_artifact(folder, label.sibling("instructions"), Instruction):
        yield asked.text, asked.source, asked.category


def candidates(folder: Path, label: Label) -> Rows:
    """Responses to them."""
    written = stream_artifact(folder, label.sibling("responses"), Response)
    for asked, family in families(folder, label, written, lambda response: response.instruction_id):
        for response in family:
            yield asked.text, response.text, response.tokens, response.finish_reason.value


def scores(folder: Path, label: Label) -> Rows:
    """What the judge said of the responses, with the first judgement's words."""
    judged = stream_judged(folder, label)
    for asked, family in families(folder, label, judged, lambda one: one.response.instruction_id):
        for one in family:
            valid = [judgement for judgement in one.judgements if judgement.score is not None]
            said = one.judgements[0].text if one.judgements else ""
            yield asked.text, one.response.text, one.score, len(valid), said


def pairs(folder: Path, label: Label) -> Rows:
    """Preference pairs; positives, where there are those instead, have no rejected response."""
    for pair in stream_artifact(folder, label.sibling("pairs"), PreferencePair):
        yield as_text(pair.prompt), pair.chosen, pair.rejected, pair.chosen_score, pair.rejected_score
    for positive in stream_artifact(folder, label.sibling("pairs"), Demonstration):
        yield as_text(positive.prompt), positive.response, None, None, None


def head_to_head(folder: Path, label: Label) -> Rows:
    """A model's answers beside M1's."""
    model = label.model_name
    for sample in read_head_to_head(folder, "M1", model) if model != "M1" else []:
        first, answer = sample.candidates
        winner = next((name for name, one in (("M1", first), (model, answer)) if one.role == "winner"), "")
        yield model, sample.instruction, first.text, answer.text, first.score, answer.score, winner


def families(
    folder: Path, label: Label, responses: Iterator[T], owner: Callable[[T], str]
) -> Iterator[tuple[Instruction, list[T]]]:
    """An iteration's instructions, one at a time, with their responses."""
    asked = stream_artifact(folder, label.sibling("instructions"), Instruction)
    return join_sorted(asked, responses, owner, label.sibling("responses").link_in(folder))


TABLES = {
    "instructions": Table("instructions", ("instruction", "source", "category"), instructions),
    "responses": Table("candidates", ("instruction", "response", "tokens", "end"), candidates),
    "judgements": Table("scores", ("instruction", "response", "mean score", "valid judgements", "judgement"), scores),
    "pairs": Table("pairs", ("prompt", "chosen", "rejected", "chosen score", "rejected score"), pairs),
    "numbers": Table(
        "head_to_head",
        ("model", "instruction", "answer of M1", "answer", "score of M1", "score", "winner"),
        head_to_head,
    ),
}
"""By the last part of an artifact's label."""
