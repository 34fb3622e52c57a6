"""A finished run, read back from its folder: its numbers, and candidates with what the judge said of them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import join_sorted, stream_records
from selfalign.core.records import (
    Comparison,
    Demonstration,
    Instruction,
    Judgement,
    PreferencePair,
    RankedAnswers,
    Response,
    ResponseScore,
)
from selfalign.data.turns import as_text
from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_mean, wilson
from selfalign.runs.labels import Kind, Label

R = TypeVar(
    "R", Comparison, Demonstration, Instruction, Judgement, PreferencePair, RankedAnswers, Response, ResponseScore
)
S = TypeVar("S", Judgement, ResponseScore)
Row = dict[str, Any]

FILES = {
    Comparison: "comparisons.jsonl",
    Demonstration: "demonstrations.jsonl",
    Instruction: "instructions.jsonl",
    Judgement: "judgements.jsonl",
    PreferencePair: "pairs.jsonl",
    RankedAnswers: "ranked.jsonl",
    Response: "responses.jsonl",
    ResponseScore: "scores.jsonl",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response to show; `role` is "chosen", "rejected", "positive", "winner" or empty."""

    text: str
    score: float | None
    role: str
    finished: bool
    judgements: Sequence[Judgement]


@dataclass(frozen=True, slots=True)
class Sample:
    """An instruction with its candidates."""

    instruction: str
    candidates: list[Candidate]


def check_artifacts(folder: Path, labels: Iterable[Label]) -> None:
    """What a finished run has made is where its links lead.

    Raises:
        SelfalignError: something is not, as in a folder that was copied without its store.
    """
    gone = [label for label in labels if not (label.link_in(folder) / "manifest.json").is_file()]
    if gone:
        raise SelfalignError(
            f"{folder}: {len(gone)} of its artifacts, {gone[0]} first, are not where its links lead; a run folder is "
            "copied and moved together with the store beside it"
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run.

    Attributes:
        folder: the run folder.
        summary: its summary.json.
        loss: title and formula of the loss it was configured with.
        provenance: its provenance.json.
        config: the resolved configuration.
        stages: {label: stage}.
        counts: {label: what the stage counted}.
        rows: of metrics.jsonl.
        models: the summary's rows, with the intervals that follow from the records.
    """

    folder: Path
    summary: Row
    loss: Row
    provenance: Row
    config: Row
    stages: dict[Label, str]
    counts: dict[Label, Row]
    rows: list[Row]
    models: list[Row]

    @classmethod
    def load(cls, folder: Path) -> "Finished":
        """Reads a run folder.

        Raises:
            SelfalignError: its files are damaged.
        """
        try:
            return cls._read(folder)
        except (ValueError, KeyError) as error:
            raise SelfalignError(f"{folder}: its files are damaged or of another selfalign ({error!r})") from error

    @classmethod
    def _read(cls, folder: Path) -> "Finished":
        summary = read_json(folder / "summary.json")
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return cls(
            folder=folder,
            summary=summary,
            loss=summary["loss"],
            provenance=read_json(folder / "provenance.json"),
            config=summary["config"],
            stages={Label.parse(stage["label"]): stage["stage"] for stage in summary["stages"]},
            counts={Label.parse(stage["label"]): stage["counts"] for stage in summary["stages"]},
            rows=[json.loads(line) for line in lines],
            models=[{**intervals(folder, row["model"]), **row} for row in summary["models"]],
        )

    @property
    def judge(self) -> str:
        """The class of the judge, empty where nothing was judged."""
        label = next((label for label, stage in self.stages.items() if stage == "judge"), None)
        return self.inputs(label).get("judge", {}).get("class", "") if label else ""

    @property
    def iterations(self) -> list[int]:
        """Iterations that made data to train on."""
        return iterations_of(self.counts)

    def records(self, label: Label, kind: type[R]) -> Iterator[R]:
        """The records of one artifact, one at a time; none where there is no such file."""
        return stream_there(self.folder, label, kind)

    def manifest(self, label: Label) -> Row:
        """What an artifact's manifest says; nothing where there is none."""
        path = label.link_in(self.folder) / "manifest.json"
        return read_json(path) if path.is_file() else {}

    def inputs(self, label: Label) -> Row:
        """What an artifact was made from: settings, seeds, and other artifacts by their digests."""
        return self.manifest(label).get("inputs", {})

    def iteration_rows(self) -> list[Row]:
        """What the stages of each iteration counted, as `<stage>/<name>`."""
        parts = ("instructions", "responses", "judgements", "pairs")
        return [
            {"iteration": n}
            | {f"{part}/{k}": v for part in parts for k, v in self.counts.get(Label.iteration(n, part), {}).items()}
            for n in self.iterations
        ]

    def curves(self, stage: str, key: str) -> dict[str, list[tuple[float, float]]]:
        """{model: (optimiser step, value)} of what a training stage logged; values that are not finite are left out."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if row["stage"] == stage and f"{stage}/step" in row and math.isfinite(row.get(key, math.nan)):
                curves.setdefault(row["label"], []).append((row[f"{stage}/step"], row[key]))
        return curves


def iterations_of(labels: Iterable[Label]) -> list[int]:
    """The iterations that made pairs or positives, in order."""
    return sorted(label.iteration_number for label in labels if label.kind is Kind.ITERATION and label.part == "pairs")


def stream_there(folder: Path, label: Label, kind: type[R]) -> Iterator[R]:
    """The records of one kind in an artifact of a run, one at a time; none where there is no such file or it is empty.

    Whoever needs only the first ones reads no further.
    """
    path = label.link_in(folder) / FILES[kind]
    return stream_records(path, kind) if path.is_file() and path.stat().st_size else iter(())


def read_samples(folder: Path, iteration: int, count: int) -> list[Sample]:
    """The first instructions of an iteration with their candidates, the best first; or the first given pairs.

    What belongs to the first instructions stands at the beginning of every file, which is not read to its end.
    """
    label = Label.iteration(iteration, "pairs")
    pairs = stream_there(folder, label, PreferencePair)
    asked = list(islice(stream_there(folder, label.sibling("instructions"), Instruction), count))
    if not asked:
        return [Sample(as_text(pair.prompt), given_candidates(pair)) for pair in islice(pairs, count)]
    ids = {one.id for one in asked}
    judged = list(takewhile(lambda one: one.response.instruction_id in ids, stream_judged(folder, label)))
    role = roles(folder, label, takewhile(lambda pair: pair.instruction_id in ids, pairs), judged)
    candidates: dict[str, list[Candidate]] = {one.id: [] for one in asked}
    for one in judged:
        candidates[one.response.instruction_id].append(one.candidate(role.get(one.response.id, "")))
    return [Sample(one.text, best_first(candidates[one.id])) for one in asked]


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """A response with its mean score, where it has one, and its judgements."""

    response: Response
    score: float | None
    judgements: list[Judgement]

    def candidate(self, role: str = "") -> Candidate:
        """As it is shown."""
        finished = self.response.finished
        return Candidate(self.response.text, self.score, role, finished, self.judgements)


def stream_judged(
    folder: Path, label: Label, responses: str = "responses", judgements: str = "judgements"
) -> Iterator[JudgedResponse]:
    """The responses beside an artifact, one at a time, with what a judge said of them."""
    answers, said = label.sibling(responses), label.sibling(judgements)

    def joined(kind: type[S], owner: Callable[[S], str]) -> Iterator[tuple[Response, list[S]]]:
        file = said.link_in(folder) / FILES[kind]
        return join_sorted(stream_there(folder, answers, Response), stream_there(folder, said, kind), owner, file)

    every = zip(joined(Judgement, lambda one: one.response_id), joined(ResponseScore, lambda one: one.id), strict=True)
    return (
        JudgedResponse(response, scores[0].score if scores else None, judgements)
        for (response, judgements), (_, scores) in every
    )


def read_head_to_head(folder: Path, first: str, last: str) -> list[Sample]:
    """Evaluation instructions with the answers of two models, in that order, and which won."""
    answers = [read_answers(folder, name) for name in (first, last)]
    compared = stream_there(folder, Label.comparison(last, first), Comparison)
    outcomes = {one.instruction_id: one.outcome for one in compared} or None
    return [
        Sample(asked.text, with_winner([of_model[asked.id] for of_model in answers], asked.id, outcomes))
        for asked in stream_there(folder, Label.input("questions"), Instruction)
        if all(asked.id in of_model for of_model in answers)
    ]


def read_answers(folder: Path, model: str) -> dict[str, Candidate]:
    """{instruction id: a model's first answer} of its evaluation."""
    judged = list(stream_judged(folder, Label.evaluation(model, "answers"), "answers", "scores"))
    return {one.response.instruction_id: one.candidate() for one in reversed(judged)}


def roles(
    folder: Path, label: Label, pairs: Iterable[PreferencePair], judged: Sequence[JudgedResponse]
) -> dict[str, str]:
    """{response id: what became of it}, of the first responses of an iteration, by its pairs or positives."""
    ids = {one.response.id for one in judged}
    positives = takewhile(lambda one: one.id in ids, stream_there(folder, label, Demonstration))
    kept = {positive.id: "positive" for positive in positives}
    return kept | {name: role for p in pairs for name, role in ((p.chosen_id, "chosen"), (p.rejected_id, "rejected"))}


def given_candidates(pair: PreferencePair) -> list[Candidate]:
    """Both responses of a given pair."""
    return [
        Candidate(pair.chosen, pair.chosen_score, "chosen", pair.chosen_finished, []),
        Candidate(pair.rejected, pair.rejected_score, "rejected", pair.rejected_finished, []),
    ]


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """By falling score, those without one last; chosen before and rejected behind their equals."""
    place = {"chosen": 0, "positive": 0, "": 1, "rejected": 2}
    return sorted(candidates, key=lambda c: (-math.inf if c.score is None else c.score, -place[c.role]), reverse=True)


def with_winner(
    answers: Sequence[Candidate], instruction: str, outcomes: dict[str, float | None] | None
) -> list[Candidate]:
    """Two answers, the winner with that role: by the outcome for the second, or where nothing is compared, by score."""
    one, other = answers
    if outcomes is not None:
        outcome = outcomes.get(instruction)
        won = other if outcome == 1 else one if outcome == 0 else None
    elif one.score is None or other.score is None or one.score == other.score:
        won = None
    else:
        won = one if one.score > other.score else other
    return [replace(answer, role="winner") if answer is won else answer for answer in answers]


def intervals(folder: Path, model: str) -> dict[str, float]:
    """95 % intervals of how long a model's answers are and how many end by themselves."""
    answers = list(stream_there(folder, Label.evaluation(model, "answers"), Response))
    if not answers:
        return {}
    finished = wilson(sum(answer.finished for answer in answers), len(answers))
    length = bootstrap_mean([float(len(answer.text)) for answer in answers])
    return length.named(catalog.EVAL_MEAN_CHARACTERS.name) | finished.named(catalog.EVAL_FINISHED_SHARE.name)
