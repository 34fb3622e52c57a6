"""Write the comparison of several runs: a self-contained HTML page and a CSV file."""

import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import write_atomically
from selfalign.core.formatting import duration, plural
from selfalign.core.records import Instruction
from selfalign.metrics import catalog
from selfalign.report.comparison_charts import curves, over_iterations, over_settings, which
from selfalign.report.comparison_effects import compared_jobs, effect_sentence, effects_table
from selfalign.report.comparison_sentences import caveats, named, opponents, verdict, what_differs
from selfalign.report.html import (
    Column,
    bars,
    card,
    decimals,
    document,
    explained,
    facts,
    form_of,
    grid,
    is_number,
    note,
)
from selfalign.report.jobs import (
    FEW,
    SEED,
    JobComparison,
    JobResult,
    as_text,
    costs,
    find_jobs,
    metric_of,
    seconds_alone,
    seconds_own,
)
from selfalign.report.run_page import MODELS, RELOAD_SECONDS, SHOWN, purpose, trained_on
from selfalign.report.tables import matrix
from selfalign.runs.labels import Label
from selfalign.runs.reader import Candidate, Sample, read_responses, stream_artifact

Row = dict[str, Any]

MEANS = (
    "Means over the seeds. Brackets show 95\u00a0% intervals that count both seeds and instructions, by a mixed model. "
    "Of metrics without a value for each instruction they count the seeds and, where a seed has an interval, that too."
)
TWO = "With two seeds they may be too narrow: the 95\u00a0% are 87 to 98\u00a0% then. Three seeds have 92 to 98\u00a0%."

ANY = decimals(0)
JOB = Column("job", "number of the job on this page", "job", ANY)
STATE = Column("state", "state of the job", "state", ANY)
FOLDER = Column("folder", "the run's folder, or the overrides of a job without a folder", "name", ANY)
LAST = Column("last model", "the model whose metrics are in this row", "model", ANY)
OF_MODEL = {
    column.key: column
    for column in (
        *(column for column in MODELS if column.key not in ("model", catalog.SECONDS.name)),
        Column.of(catalog.EVAL_WIN_RATE_LENGTH_CONTROLLED),
        *(
            Column.of(catalog.over(pairs, metric))
            for pairs in (catalog.HELD_OUT, catalog.PREFERENCES)
            for metric in (catalog.REWARDS_MARGINS, catalog.REWARDS_ACCURACIES)
        ),
    )
}
"""{key: column} of the metrics that are shown for each job's last model."""

SETTING = Column("setting", "number of the setting: that of its first job", "job", ANY)
SEEDS = Column("seeds", "seeds of the setting's jobs, whose mean is in this row", "seeds", ANY)

OF_JOB = (
    Column("time alone", "time of all artifacts of the job, as if it shared none", "alone", duration),
    Column("its own time", "time of the artifacts that no other job here uses", "own", duration),
)


def write_comparison(folders: Sequence[Path], target: Path, metric: str = "") -> Path:
    """Write comparison.html and comparison.csv into the folder `target`, and return the path of the page.

    Args:
        folders: run folders, sweep folders with their jobs.json, or folders that hold several runs.
        target: created if it does not exist.
        metric: a metric in summary.json, such as "eval/win_rate", by which the jobs' last models are ranked. The
            highest value is the best, or the lowest if the name begins with "-". Empty takes the jobs' `sweep_metric`.

    Raises:
        SelfalignError: a folder holds no run, or no finished job has the given metric.
    """
    return compare_jobs(find_jobs(folders), target, metric)


def compare_jobs(jobs: Sequence[JobResult], target: Path, metric: str = "", *, running: bool = False) -> Path:
    """Write the comparison of jobs that have been found; see `write_comparison`. If they run, the page reloads."""
    comparison = JobComparison.of(jobs, metric or metric_of(jobs))
    if comparison.finished and not comparison.ranked and metric:
        known = sorted({key for job in comparison.finished for key, value in job.last.items() if is_number(value)})
        raise SelfalignError(
            f"metric {comparison.metric!r}: no finished job has it. Available metrics: {', '.join(known)}"
        )
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "comparison.csv", [csv_text(comparison, comparison.jobs).encode()])
    if comparison.has_replicates:
        write_atomically(target / "comparison_settings.csv", [csv_text(comparison, comparison.groups).encode()])
    write_atomically(target / "comparison.html", [page(comparison, running=running).encode()])
    return target / "comparison.html"


def csv_text(comparison: JobComparison, jobs: Sequence[JobResult]) -> str:
    """Return the CSV: a row for each job and model with the differing settings and all metrics.

    An unfinished job has one row without metrics.

    Args:
        comparison: says which settings differ.
        jobs: its jobs, or its settings, whose metrics are means over the seeds with the ends of their intervals.
    """
    rows: list[Row] = []
    for job in jobs:
        of_job: Row = {"job": job.number, "folder": job.name, "state": job.state, "error": job.error}
        if job.seeds:
            of_job = {"job": job.number, "seeds": seeds_of(job), "folder": " ".join(one.name for one in job.seeds)}
        keys = [key for key in comparison.keys if key != SEED or jobs is comparison.jobs]
        of_job |= {key: as_text(job.settings[key]) if key in job.settings else "" for key in keys}
        models = job.pooled or (job.run.summary["models"] if job.run else [{}])
        numbers = [{k: v for k, v in model.items() if k == "model" or is_number(v)} for model in models]
        rows += [of_job | {f"model/{key}" if key in of_job else key: v for key, v in row.items()} for row in numbers]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def page(comparison: JobComparison, *, running: bool = False) -> str:
    """Return the whole page."""
    names = {run.summary["name"] for run in comparison.runs}
    compared = compared_jobs(comparison)
    said = verdict(comparison, effect_sentence(comparison, compared))
    parts = {
        "Jobs": settings_table(comparison) + jobs_table(comparison),
        "Comparisons": effects_table(comparison, compared),
        "By setting": over_settings(comparison),
        "From model to model": over_iterations(comparison),
        "Training": curves(comparison),
        "Win rates": matrices(comparison),
        "Answers": answers(comparison),
        "Time": times(comparison),
        "Not finished": failures(comparison),
    }
    return document(
        names.pop() if len(names) == 1 else "Comparison",
        f"comparison of {plural(len(comparison.jobs), 'job')}",
        f'<p class="lead">{what_differs(comparison)}</p>\n{said}{caveats(comparison)}',
        parts,
        Path(__file__).with_name("sort.js").read_text(encoding="utf-8"),
        RELOAD_SECONDS if running else 0,
    )


def settings_table(comparison: JobComparison) -> str:
    """Return the table of settings: metrics of the last model as means over seeds; empty without replicates."""
    if not comparison.has_replicates:
        return ""
    settings = [Column(key, "a setting", f"setting {key}", as_text) for key in comparison.keys if key != SEED]
    rows = job_rows(comparison, comparison.measured)
    rows = [row | {"seeds": seeds_of(job)} for row, job in zip(rows, comparison.measured, strict=True)]
    columns = [SETTING, *settings[:FEW], SEEDS, *metric_columns(comparison)]
    few = f" {TWO}" if any(len(job.seeds) == 2 for job in comparison.measured) else ""
    return explained("settings", columns, rows, note(MEANS + few))


def seeds_of(job: JobResult) -> str:
    """Return the seeds of a setting, or the seed of a job, as text."""
    return ", ".join(as_text(one.settings.get(SEED)) for one in job.each)


def metric_columns(comparison: JobComparison) -> list[Column]:
    """Return the columns of the metrics, that of the ranking first."""
    metric = OF_MODEL.get(comparison.metric) or Column(
        comparison.metric, "the metric of the ranking", comparison.metric, form_of(comparison.metric)
    )
    return [metric, LAST, *(column for column in OF_MODEL.values() if column is not metric)]


def jobs_table(comparison: JobComparison) -> str:
    """Return the table of jobs: differing settings, metrics of the last model, and time."""
    settings = [Column(key, "a setting", f"setting {key}", as_text) for key in comparison.keys]
    state = [STATE] if len(comparison.finished) < len(comparison.jobs) else []
    front, back = ([*settings, *state], [FOLDER]) if len(settings) <= FEW else ([FOLDER, *state], settings)
    columns = [JOB, *front, *metric_columns(comparison), *OF_JOB, *back]
    rows = job_rows(comparison, comparison.jobs)
    return explained("jobs", columns, rows, note(opponents(comparison)))


def job_rows(comparison: JobComparison, jobs: Sequence[JobResult]) -> list[Row]:
    """Return the rows of the table of jobs or settings; an unfinished job has no metrics."""
    rows: list[Row] = []
    for job in jobs:
        settings = {f"setting {key}": setting(comparison, job, key) for key in comparison.keys}
        row = {**job.last, **settings, "job": job.number, "state": job.state, "name": job.name}
        row["class"] = "" if job.run else "without"
        if job in comparison.even:
            row["class"] = "best"
        if job.run and not job.seeds:
            own = seconds_own(job, comparison.finished)
            row |= {"trained_on": trained_on(job.last), "alone": seconds_alone(job), "own": own}
        rows.append(row)
    return rows


def setting(comparison: JobComparison, job: JobResult, key: str) -> object:
    """Return a setting as a cell: a number, or a text that fits."""
    value = job.settings.get(key)
    is_cell = value is None or (is_number(value) and not isinstance(value, bool))
    return value if is_cell else comparison.text(job, key)


def matrices(comparison: JobComparison) -> str:
    """Return the win-rate matrices of the leading jobs that have one; of a setting that of its first job."""
    return grid(matrix(job.run, f"Job {named(comparison, job)}") for job in comparison.shown if job.run)


def answers(comparison: JobComparison) -> str:
    """Return the answers of M1 and of the leading jobs' last models to the same instructions."""
    writers: dict[str, tuple[JobResult, str]] = {}
    groups = comparison.by_key(Label.evaluation("M1", "answers")).values()
    for jobs in groups:
        if {job.number for job in jobs} & {job.number for job in comparison.shown}:
            of = f" of job {', '.join(str(job.number) for job in jobs)}" if len(groups) > 1 else ""
            writers[f"M1{of}"] = jobs[0], "M1"
    for job in comparison.shown:
        writers[f"{job.last['model']} of job {named(comparison, job)}"] = job, job.last["model"]
    written = {name: found for name, (job, model) in writers.items() if (found := answers_of(job, model))}
    common = [text for text in next(iter(written.values()), {}) if all(text in found for found in written.values())]
    cards = [card(Sample(text, [found[text] for found in written.values()]), list(written)) for text in common[:SHOWN]]
    remark = f"The first {SHOWN} evaluation instructions that all models answered, not selected. {which(comparison)}"
    return note(escape(remark)) + "".join(cards) if len(written) > 1 and cards else ""


def answers_of(job: JobResult, model: str) -> dict[str, Candidate]:
    """Return {evaluation instruction: a model's answer}."""
    assert job.run is not None
    folder = job.run.folder
    found = read_responses(folder, model)
    instructions = stream_artifact(folder, Label.input("questions"), Instruction)
    return {instruction.text: found[instruction.id] for instruction in instructions if instruction.id in found}


def times(comparison: JobComparison) -> str:
    """Return bars of the time spent, and of the time saved by shared artifacts, by purpose."""
    spent = costs(comparison.finished, purpose)
    rows = [
        (name, [cost.made, cost.reused], f"{duration(cost.made)} + {duration(cost.reused)}")
        if cost.reused >= 0.05
        else (name, [cost.made], duration(cost.made))
        for name, cost in spent.items()
        if cost.made + cost.reused >= 0.05
    ]
    remark = "Strong bars: time spent. Pale bars: time saved, because a job reused artifacts of another job."
    return note(remark) + bars(rows) if rows else ""


def failures(comparison: JobComparison) -> str:
    """Return the jobs without metrics, each with its state and the last line of its error."""
    missing = [job for job in comparison.jobs if not job.run]
    states = [
        (f"Job {named(comparison, job)}", f"{job.state}: {job.error}" if job.error else job.state) for job in missing
    ]
    return facts(states) if states else ""
