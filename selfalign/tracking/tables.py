"""Tables of a run's records for the tracker. Each is sent when its artifact is finished."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from selfalign.core.jsonl import join_sorted
from selfalign.core.records import Demonstration, Instruction, LabelledResponse, PreferencePair, Response
from selfalign.data.tails import tails_of
from selfalign.data.turns import as_text, said
from selfalign.runs.labels import Kind, Label
from selfalign.runs.ledger import Ledger
from selfalign.runs.reader import read_head_to_head, stream_artifact, stream_judged

T = TypeVar("T")
Rows = Iterator[tuple[Any, ...]]


class Table(NamedTuple):
    """A table: its name, its columns, and a function from run folder and label to its rows."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Path, Label], Rows]


def log_tables(ledger: Ledger, label: Label) -> None:
    """Send an artifact's records to the tracker: those of an iteration, or a model's responses beside M1's."""
    has_table = label.kind is Kind.ITERATION or (label.kind is Kind.EVALUATION and label.model_number)
    if has_table and label.part in TABLES:
        name, columns, rows = TABLES[label.part]
        ledger.tracker.table(f"tables/{name}", columns, rows(ledger.folder, label))


def instructions(folder: Path, label: Label) -> Rows:
    """Yield the new instructions."""
    for instruction in stream_artifact(folder, label.sibling("instructions"), Instruction):
        yield instruction.text, instruction.source, instruction.category


def candidates(folder: Path, label: Label) -> Rows:
    """Yield the responses to new instructions."""
    responses = stream_artifact(folder, label.sibling("responses"), Response)
    for instruction, group in by_instruction(folder, label, responses, lambda response: response.instruction_id):
        for response in group:
            yield instruction.text, response.text, response.tokens, response.finish_reason.value


def scores(folder: Path, label: Label) -> Rows:
    """Yield the scores of the responses, with the text of the first judgement."""
    judged = stream_judged(folder, label)
    for instruction, group in by_instruction(folder, label, judged, lambda one: one.response.instruction_id):
        for one in group:
            valid = [judgement for judgement in one.judgements if judgement.score is not None]
            text = one.judgements[0].text if one.judgements else ""
            yield instruction.text, one.response.text, one.score, len(valid), text


def pairs(folder: Path, label: Label) -> Rows:
    """Yield the preference pairs; labelled responses and positives stand alone, on the side that they are on."""
    for pair in stream_artifact(folder, label.sibling("pairs"), PreferencePair):
        chosen, rejected = (tail.as_text() for tail in tails_of(pair))
        yield as_text(pair.prompt), chosen, rejected, pair.chosen_score, pair.rejected_score
    for one in stream_artifact(folder, label.sibling("pairs"), LabelledResponse):
        [text], nothing = (tail.as_text() for tail in tails_of(one)), None
        sides = (text, nothing, one.score, nothing) if one.desirable else (nothing, text, nothing, one.score)
        yield as_text(one.prompt), *sides
    for positive in stream_artifact(folder, label.sibling("pairs"), Demonstration):
        yield as_text(positive.prompt), said(positive.response, positive.response_calls), None, None, None


def head_to_head(folder: Path, label: Label) -> Rows:
    """Yield a model's responses beside M1's."""
    model = label.model_name
    for sample in read_head_to_head(folder, "M1", model) if model != "M1" else []:
        first, second = sample.candidates
        winner = next((name for name, one in (("M1", first), (model, second)) if one.role == "winner"), "")
        yield model, sample.instruction, first.text, second.text, first.score, second.score, winner


def by_instruction(
    folder: Path, label: Label, responses: Iterator[T], owner: Callable[[T], str]
) -> Iterator[tuple[Instruction, list[T]]]:
    """Yield an iteration's instructions, each with its responses."""
    instructions = stream_artifact(folder, label.sibling("instructions"), Instruction)
    return join_sorted(instructions, responses, owner, label.sibling("responses").link_in(folder))


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
"""{part of an artifact's label: its table}."""
