"""The time of every training of a run, from the log of its stage."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfalign.core.files import read_json, read_lines
from selfalign.core.formatting import duration
from selfalign.metrics import catalog
from selfalign.report.html import Column, decimals, explained, note
from selfalign.runs.labels import AHEAD, BASELINE, Label
from selfalign.runs.reader import Finished, read_summary
from selfalign.store.artifacts import LOG, MANIFEST

Row = dict[str, Any]
ANY = decimals(0)

TIMES = (
    Column("model", "the trained model; SFT is the baseline without judging examples", "model", ANY),
    Column("loss", "fine-tuning is SFT on demonstrations, or on positives", "loss", ANY),
    Column("λ", "weight of the refinement", "lam", decimals(2)),
    Column.of(catalog.PAIRS),
    Column.of(catalog.LABELLED),
    Column("steps", "optimiser steps", "steps", ANY),
    Column("training", "time of the steps, without loading, saving, reference or evaluation", "seconds", duration),
    Column("a step", "mean wall time of a step", "seconds_per_step", duration),
    Column.of(catalog.TOKENS_PER_SECOND),
    Column("reference", "storing the reference's log-probabilities before training", "reference_seconds", duration),
    Column.of(catalog.PEAK_MEMORY_GB),
)


def training_times(folders: Sequence[Path]) -> list[Row]:
    """Return a row for every training of these runs, run by run.

    A row has `run` (the folder's name), `model`, `loss` (its title; its class, where that is another than the run's),
    `lam` and `beta` (if the loss has them), `pairs` or `labelled` (of an alignment), `steps`, `seconds` (of the steps),
    `seconds_per_step`, `tokens_per_second`, `peak_memory_gb` and `reference_seconds` (if the reference's
    log-probabilities were stored). A training whose log has no step times has no row.
    """
    return [row for folder in folders for row in _of_run(folder)]


def _of_run(folder: Path) -> list[Row]:
    artifacts = folder / "artifacts"
    made = [*artifacts.glob(f"*/{MANIFEST}"), *artifacts.glob(f"*/{AHEAD}model/{MANIFEST}")]
    labels = [Label.parse(path.parent.relative_to(artifacts).as_posix()) for path in made]
    labels.sort(key=lambda label: (label.iteration_number, not label.part, label.owner != BASELINE))
    summary = read_summary(folder)
    titles = {summary["config"]["choices"]["loss"]: summary["loss"]["title"]}
    return [row for label in labels if (row := _of_model(folder, label, titles))]


def _of_model(folder: Path, label: Label, titles: dict[str, str]) -> Row:
    """Return the row of one training; empty if the artifact is none, or its log has no step times.

    `titles` is {class: title} of the run's alignment loss. An evaluation has models of other losses beside it.
    """
    path = label.link_in(folder)
    manifest, log = read_json(path / MANIFEST), path / LOG
    steps = [json.loads(line) for _, line in read_lines(log)] if log.is_file() else []
    times = [row.get(catalog.STEP_SECONDS.name) for row in steps]
    if manifest.get("stage") not in ("align", "sft") or not steps or None in times:
        return {}
    loss = manifest["inputs"].get("loss", {})
    part = f"{AHEAD}reference" if label.part else "reference"
    stored = Label.iteration(label.iteration_number, part).link_in(folder) / MANIFEST
    rates = [row[catalog.TOKENS_PER_SECOND.name] for row in steps]
    seconds = math.fsum(times)
    tokens = math.fsum(rate * time for rate, time in zip(rates, times, strict=True))
    row = {
        "run": folder.name,
        "model": str(label),
        "loss": titles.get(loss["class"], loss["class"]) if loss else "fine-tuning",
        "lam": loss.get("lam"),
        "beta": loss.get("beta"),
        **{metric.name: manifest["counts"].get(metric.name) for metric in (catalog.PAIRS, catalog.LABELLED)},
        "steps": len(steps),
        "seconds": seconds,
        "seconds_per_step": seconds / len(steps),
        catalog.TOKENS_PER_SECOND.name: tokens / seconds,
        catalog.PEAK_MEMORY_GB.name: max(row[catalog.PEAK_MEMORY_GB.name] for row in steps),
        "reference_seconds": read_json(stored)["seconds"] if loss and stored.is_file() else None,
    }
    return {name: value for name, value in row.items() if value is not None}


def times_table(run: Finished) -> str:
    """Return the trainings of a run side by side."""
    rows = training_times([run.folder])
    remark = note("Times of different losses are comparable if machine, model and pairs are the same.")
    return explained("training time", TIMES, rows, remark) if rows else ""
