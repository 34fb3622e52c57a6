"""A run, read back from its folder: its metrics, and its responses with their judgements."""

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
    LabelledResponse,
    PairMargin,
    PairReference,
    PairTokens,
    PreferencePair,
    RankedAnswers,
    Response,
    ResponseKL,
    ResponseScore,
)
from selfalign.data.labelled import LABELLED
from selfalign.data.tails import tails_of
from selfalign.data.turns import as_text
from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_mean, wilson
from selfalign.runs.labels import JUDGE_PAIRS, Kind, Label, model_after
from selfalign.runs.progress import Progress, read_progress

R = TypeVar(
    "R",
    Comparison,
    Demonstration,
    Instruction,
    Judgement,
    LabelledResponse,
    PairMargin,
    PairTokens,
    PreferencePair,
    RankedAnswers,
    Response,
    ResponseScore,
)
S = TypeVar("S", Judgement, ResponseScore)
Row = dict[str, Any]

FILES = {
    Comparison: "comparisons.jsonl",
    Demonstration: "demonstrations.jsonl",
    Instruction: "instructions.jsonl",
    LabelledResponse: f"{LABELLED}.jsonl",
    Judgement: "judgements.jsonl",
    PairMargin: "preferences.jsonl",
    PairReference: "references.jsonl",
    PairTokens: "tokens.jsonl",
    PreferencePair: "pairs.jsonl",
    RankedAnswers: "ranked.jsonl",
    Response: "responses.jsonl",
    ResponseKL: "moved.jsonl",
    ResponseScore: "scores.jsonl",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response to display.

    `role` is "chosen", "rejected", "desirable", "undesirable", "positive", "winner" or empty.
    """

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


def read_summary(folder: Path) -> Row:
    """Return a run's summary, or that so far."""
    progress = read_progress(folder)
    return progress.summary if progress else read_json(folder / "summary.json")


def last_row(folder: Path) -> Row:
    """Return the last row of metrics.jsonl that is written to its end; empty without any."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    return json.loads(lines[-1]) if lines else {}


def check_artifacts(folder: Path, labels: Iterable[Label]) -> None:
    """Check that the links of a run lead to its artifacts.

    Raises:
        SelfalignError: an artifact is missing, because the folder was copied without its store, for example.
    """
    missing = [label for label in labels if not (label.link_in(folder) / "manifest.json").is_file()]
    if missing:
        raise SelfalignError(
            f"{folder}: {len(missing)} of its artifacts are missing, such as {missing[0]}. Copy or move a run folder "
            "together with the store beside it"
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run, or what is finished of a run.

    Attributes:
        folder: the run folder.
        summary: its summary.json, or that so far.
        loss: title and formula of the loss that it begins with.
        provenance: its provenance.json; empty until it is written.
        config: its resolved configuration.
        stages: {label: stage}.
        counts: {label: counts of the stage}.
        rows: the rows of metrics.jsonl.
        models: the models of the summary, with intervals computed from the records.
        progress: the progress of a run that is not finished; None of a finished one.
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
    progress: Progress | None = None

    @classmethod
    def load(cls, folder: Path) -> "Finished":
        """Read a run folder.

        Raises:
            SelfalignError: its files are damaged, or another version of selfalign wrote them.
        """
        try:
            return cls._read(folder)
        except (ValueError, KeyError) as error:
            raise SelfalignError(
                f"{folder}: its files are damaged, or another version of selfalign wrote them ({error!r})"
            ) from error

    @classmethod
    def _read(cls, folder: Path) -> "Finished":
        progress, origin = read_progress(folder), folder / "provenance.json"
        summary = progress.summary if progress else read_json(folder / "summary.json")
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = (text.rpartition("\n")[0] if progress else text).splitlines()  # The last line may be half written.
        return cls(
            folder=folder,
            summary=summary,
            loss=summary["loss"],
            provenance=read_json(origin) if origin.exists() or not progress else {},
            config=summary["config"],
            stages={Label.parse(stage["label"]): stage["stage"] for stage in summary["stages"]},
            counts={Label.parse(stage["label"]): stage["counts"] for stage in summary["stages"]},
            rows=[json.loads(line) for line in lines],
            models=[{**intervals(folder, row["model"]), **row} for row in summary["models"]],
            progress=progress,
        )

    @property
    def judging(self) -> Row:
        """The settings of the run's judge, with its class; empty if it judged nothing."""
        judged = (label for label, stage in self.stages.items() if stage == "judge" and label.is_judged)
        first = next((label for label in judged if not label.of_several), None)
        return self.inputs(first).get("judge", {}) if first else {}

    @property
    def judge(self) -> str:
        """The class of the judge; empty if it judged nothing."""
        return self.judging.get("class", "")

    @property
    def losses(self) -> dict[int, Row]:
        """{iteration: title and formula of the loss that aligns from it on}, in order."""
        later = self.summary.get("later_losses", {})
        return {1: self.loss, **{start: later[str(start)] for start in sorted(map(int, later))}}

    @property
    def iterations(self) -> list[int]:
        """The iterations that generated training data."""
        return iterations_of(self.counts)

    def records(self, label: Label, kind: type[R]) -> Iterator[R]:
        """Yield the records of an artifact; none if it has no such file."""
        return stream_artifact(self.folder, label, kind)

    def manifest(self, label: Label) -> Row:
        """Return an artifact's manifest; empty if there is none."""
        path = label.link_in(self.folder) / "manifest.json"
        return read_json(path) if path.is_file() else {}

    def inputs(self, label: Label) -> Row:
        """Return an artifact's inputs: settings, seeds, and digests of other artifacts."""
        return self.manifest(label).get("inputs", {})

    def iteration_rows(self) -> list[Row]:
        """Return the counts of each iteration, named `<part>/<name>`, and those of its model, named `model/<name>`."""
        parts = ("instructions", "responses", "judgements", "pairs", JUDGE_PAIRS, "replayed_pairs", "truth")
        labels = {n: {part: Label.iteration(n, part) for part in parts} for n in self.iterations}
        return [
            {"iteration": n}
            | {
                f"{part}/{name}": value
                for part, label in {**labels[n], "model": Label.model(model_after(n))}.items()
                for name, value in self.counts.get(label, {}).items()
            }
            for n in self.iterations
        ]

    def curves(self, stage: str, key: str) -> dict[str, list[tuple[float, float]]]:
        """Return {model: [(optimiser step, value)]} of a logged training metric, without values that are not finite."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if row["stage"] == stage and f"{stage}/step" in row and math.isfinite(row.get(key, math.nan)):
                curves.setdefault(row["label"], []).append((row[f"{stage}/step"], row[key]))
        return curves


def iterations_of(labels: Iterable[Label]) -> list[int]:
    """Return the iterations that made pairs or positives, in order."""
    return sorted(label.iteration_number for label in labels if label.kind is Kind.ITERATION and label.part == "pairs")


def stream_artifact(folder: Path, label: Label, kind: type[R]) -> Iterator[R]:
    """Yield the records of one kind in an artifact of a run; none if the file is missing or empty.

    The file is read only as far as records are taken.
    """
    path = label.link_in(folder) / FILES[kind]
    return stream_records(path, kind) if path.is_file() and path.stat().st_size else iter(())


def read_samples(folder: Path, iteration: int, count: int) -> list[Sample]:
    """Return the first instructions of an iteration with their candidates, the best first; or the first given pairs.

    Files are read only as far as the records of these instructions, which come first in every file.
    """
    label = Label.iteration(iteration, "pairs")
    pairs = stream_artifact(folder, label, PreferencePair)
    instructions = list(islice(stream_artifact(folder, label.sibling("instructions"), Instruction), count))
    if not instructions:
        return [Sample(as_text(pair.prompt), pair_candidates(pair)) for pair in islice(pairs, count)]
    ids = {instruction.id for instruction in instructions}
    judged = list(takewhile(lambda one: one.response.instruction_id in ids, stream_judged(folder, label)))
    role = roles(folder, label, takewhile(lambda pair: pair.instruction_id in ids, pairs), judged)
    candidates: dict[str, list[Candidate]] = {instruction.id: [] for instruction in instructions}
    for one in judged:
        candidates[one.response.instruction_id].append(one.candidate(role.get(one.response.id, "")))
    return [Sample(instruction.text, best_first(candidates[instruction.id])) for instruction in instructions]


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """A response, its mean score or None, and its judgements."""

    response: Response
    score: float | None
    judgements: list[Judgement]

    def candidate(self, role: str = "") -> Candidate:
        """Return the response for display, with its role."""
        finished = self.response.finished
        return Candidate(self.response.text, self.score, role, finished, self.judgements)


def stream_judged(
    folder: Path, label: Label, responses: str = "responses", judgements: str = "judgements"
) -> Iterator[JudgedResponse]:
    """Yield the responses of the label's owner with their scores and judgements."""
    responses_label, judgements_label = label.sibling(responses), label.sibling(judgements)

    def joined(kind: type[S], owner: Callable[[S], str]) -> Iterator[tuple[Response, list[S]]]:
        file, records = judgements_label.link_in(folder) / FILES[kind], stream_artifact(folder, judgements_label, kind)
        return join_sorted(stream_artifact(folder, responses_label, Response), records, owner, file)

    both = zip(joined(Judgement, lambda one: one.response_id), joined(ResponseScore, lambda one: one.id), strict=True)
    return (
        JudgedResponse(response, scores[0].score if scores else None, judgements)
        for (response, judgements), (_, scores) in both
    )


def read_head_to_head(folder: Path, first: str, last: str) -> list[Sample]:
    """Return evaluation instructions with the responses of two models, in that order. The winner has that role."""
    responses = [read_responses(folder, name) for name in (first, last)]
    compared = stream_artifact(folder, Label.comparison(last, first), Comparison)
    outcomes = {one.instruction_id: one.outcome for one in compared} or None
    return [
        Sample(prompt.text, with_winner([by_id[prompt.id] for by_id in responses], prompt.id, outcomes))
        for prompt in stream_artifact(folder, Label.input("questions"), Instruction)
        if all(prompt.id in by_id for by_id in responses)
    ]


def read_responses(folder: Path, model: str) -> dict[str, Candidate]:
    """Return {instruction id: a model's first response} of its evaluation."""
    judged = list(stream_judged(folder, Label.evaluation(model, "answers"), "answers", "scores"))
    return {one.response.instruction_id: one.candidate() for one in reversed(judged)}


def roles(
    folder: Path, label: Label, pairs: Iterable[PreferencePair], judged: Sequence[JudgedResponse]
) -> dict[str, str]:
    """Return {response id: role} of an iteration's first responses, from its pairs, labels or positives."""
    ids = {one.response.id for one in judged}
    positives = takewhile(lambda one: one.id in ids, stream_artifact(folder, label, Demonstration))
    kept = {positive.id: "positive" for positive in positives}
    labelled = takewhile(lambda one: one.id in ids, stream_artifact(folder, label, LabelledResponse))
    kept |= {one.id: "desirable" if one.desirable else "undesirable" for one in labelled}
    return kept | {name: role for p in pairs for name, role in ((p.chosen_id, "chosen"), (p.rejected_id, "rejected"))}


def pair_candidates(pair: PreferencePair) -> list[Candidate]:
    """Return both responses of a given pair."""
    chosen, rejected = (tail.as_text() for tail in tails_of(pair))
    return [
        Candidate(chosen, pair.chosen_score, "chosen", pair.chosen_finished, []),
        Candidate(rejected, pair.rejected_score, "rejected", pair.rejected_finished, []),
    ]


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort by falling score, unscored ones last. Among equal scores, chosen come first and rejected last."""
    rank = {"chosen": 0, "positive": 0, "desirable": 0, "": 1, "rejected": 2, "undesirable": 2}
    return sorted(candidates, key=lambda c: (-math.inf if c.score is None else c.score, -rank[c.role]), reverse=True)


def with_winner(
    responses: Sequence[Candidate], instruction: str, outcomes: dict[str, float | None] | None
) -> list[Candidate]:
    """Give the better of two responses the role "winner".

    Args:
        responses: two responses to one instruction.
        instruction: the instruction's id.
        outcomes: {instruction id: outcome of the second response}; None decides by score.
    """
    first, second = responses
    if outcomes is not None:
        outcome = outcomes.get(instruction)
        winner = second if outcome == 1 else first if outcome == 0 else None
    elif first.score is None or second.score is None or first.score == second.score:
        winner = None
    else:
        winner = first if first.score > second.score else second
    return [replace(response, role="winner") if response is winner else response for response in responses]


def intervals(folder: Path, model: str) -> dict[str, float]:
    """Return 95 % intervals of the mean length of a model's responses and of their finished share."""
    responses = list(stream_artifact(folder, Label.evaluation(model, "answers"), Response))
    if not responses:
        return {}
    finished = wilson(sum(response.finished for response in responses), len(responses))
    length = bootstrap_mean([float(len(response.text)) for response in responses])
    return length.named(catalog.EVAL_MEAN_CHARACTERS.name) | finished.named(catalog.EVAL_FINISHED_SHARE.name)
