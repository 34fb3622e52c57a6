"""The comparison of several runs: one HTML page that needs nothing else, and a CSV."""

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
from selfalign.report.comparison_sentences import caveats, named, opponents, verdict, what_differs
from selfalign.report.html import (
    Column,
    bars,
    card,
    compact,
    decimals,
    document,
    explained,
    facts,
    grid,
    is_number,
    note,
)
from selfalign.report.jobs import (
    FEW,
    JobComparison,
    JobResult,
    as_text,
    costs,
    find_jobs,
    metric_of,
    seconds_alone,
    seconds_own,
    shortened,
)
from selfalign.report.run_page import MODELS, SHOWN, purpose, trained_on
from selfalign.report.tables import matrix
from selfalign.runs.labels import Label
from selfalign.runs.reader import Candidate, Sample, read_responses, stream_artifact

Row = dict[str, Any]

"""What the best job has the highest value of, unless asked for another."""

ANY = decimals(0)
JOB = Column("job", "its number on this page", "job", ANY)
STATE = Column("state", "finished, or what else became of the job", "state", ANY)
FOLDER = Column("folder", "the run's folder, or the overrides of a job that never had one", "name", ANY)
LAST = Column("last model", "whose numbers stand in this row", "model", ANY)
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
"""What is shown of each job's last model, by key."""

OF_JOB = (
    Column("time alone", "what the job would have taken by itself", "alone", duration),
    Column("its own time", "of what none of the other jobs here needed too", "own", duration),
)


def write_comparison(folders: Sequence[Path], target: Path, metric: str = "") -> Path:
    """Writes comparison.html and comparison.csv into the folder `target`, and returns the page's path.

    Args:
        folders: run folders, sweep folders with their jobs.json, or folders that hold several runs.
        target: made if it is not there.
        metric: a number of the models' rows in summary.json, such as "eval/win_rate"; the job whose last model has
            the highest is the best, or the lowest with a "-" before the name. Empty takes the jobs' `sweep_metric`.

    Raises:
        SelfalignError: a folder holds no run, or no finished job has the metric that was asked for.
    """
    return compare_jobs(find_jobs(folders), target, metric)


def compare_jobs(jobs: Sequence[JobResult], target: Path, metric: str = "") -> Path:
    """As `write_comparison`, of jobs that have been found."""
    comparison = JobComparison.of(jobs, metric or metric_of(jobs))
    if comparison.finished and not comparison.ranked and metric:
        known = sorted({key for job in comparison.finished for key, value in job.last.items() if is_number(value)})
        raise SelfalignError(f"metric {comparison.metric!r}: no finished job has it; there are {', '.join(known)}")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "comparison.csv", [csv_text(comparison).encode()])
    write_atomically(target / "comparison.html", [page(comparison).encode()])
    return target / "comparison.html"


def csv_text(comparison: JobComparison) -> str:
    """A row a job and model with the differing settings and every number of summary.json; a row an unfinished job."""
    rows: list[Row] = []
    for job in comparison.jobs:
        of_job: Row = {"job": job.number, "folder": job.name, "state": job.state, "error": job.error}
        of_job |= {key: as_text(job.settings[key]) if key in job.settings else "" for key in comparison.keys}
        models = job.run.summary["models"] if job.run else [{}]
        numbers = [{k: v for k, v in model.items() if k == "model" or is_number(v)} for model in models]
        rows += [of_job | {f"model/{key}" if key in of_job else key: v for key, v in row.items()} for row in numbers]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def page(comparison: JobComparison) -> str:
    """The whole page."""
    names = {run.summary["name"] for run in comparison.runs}
    parts = {
        "Jobs": jobs_table(comparison),
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
        f'<p class="lead">{what_differs(comparison)}</p>\n{verdict(comparison)}{caveats(comparison)}',
        parts,
        Path(__file__).with_name("sort.js").read_text(encoding="utf-8"),
    )


def jobs_table(comparison: JobComparison) -> str:
    """A row a job: the settings that differ, the numbers of its last model, and its time."""
    settings = [Column(key, "a setting", f"setting {key}", as_text) for key in comparison.keys]
    state = [STATE] if len(comparison.finished) < len(comparison.jobs) else []
    front, back = ([*settings, *state], [FOLDER]) if len(settings) <= FEW else ([FOLDER, *state], settings)
    metric = OF_MODEL.get(comparison.metric) or Column(comparison.metric, "as asked for", comparison.metric, compact)
    others = [column for column in OF_MODEL.values() if column is not metric]
    columns = [JOB, *front, metric, LAST, *others, *OF_JOB, *back]
    return explained("jobs", columns, job_rows(comparison), note(opponents(comparison)))


def job_rows(comparison: JobComparison) -> list[Row]:
    """The table of jobs; an unfinished one has no numbers."""
    rows: list[Row] = []
    for job in comparison.jobs:
        settings = {f"setting {key}": setting(job.settings.get(key)) for key in comparison.keys}
        row = {**job.last, **settings, "job": job.number, "state": job.state, "name": job.name}
        row["class"] = "" if job.run else "without"
        if job in comparison.even:
            row["class"] = "best"
        if job.run:
            own = seconds_own(job, comparison.finished)
            row |= {"trained_on": trained_on(job.last), "alone": seconds_alone(job), "own": own}
        rows.append(row)
    return rows


def setting(value: object) -> object:
    """A setting as a cell: a number, or a text that fits."""
    return value if value is None or (is_number(value) and not isinstance(value, bool)) else shortened(as_text(value))


def matrices(comparison: JobComparison) -> str:
    """Every model of a run against every other, for the runs that compared them."""
    return grid(matrix(job.run, f"Job {named(comparison, job)}") for job in comparison.leading if job.run)


def answers(comparison: JobComparison) -> str:
    """What M1 and the last models of the leading jobs answered to the same instructions."""
    writers: dict[str, tuple[JobResult, str]] = {}
    groups = comparison.by_key(Label.evaluation("M1", "answers")).values()
    for jobs in groups:
        if {job.number for job in jobs} & {job.number for job in comparison.leading}:
            of = f" of job {', '.join(str(job.number) for job in jobs)}" if len(groups) > 1 else ""
            writers[f"M1{of}"] = jobs[0], "M1"
    for job in comparison.leading:
        writers[f"{job.last['model']} of job {named(comparison, job)}"] = job, job.last["model"]
    written = {name: found for name, (job, model) in writers.items() if (found := answers_of(job, model))}
    asked = [text for text in next(iter(written.values()), {}) if all(text in found for found in written.values())]
    cards = [card(Sample(text, [found[text] for found in written.values()]), list(written)) for text in asked[:SHOWN]]
    said = f"The first {SHOWN} evaluation instructions that all were asked, not selected. {which(comparison)}"
    return note(escape(said)) + "".join(cards) if len(written) > 1 and cards else ""


def answers_of(job: JobResult, model: str) -> dict[str, Candidate]:
    """{evaluation instruction: a model's answer}."""
    assert job.run is not None
    folder = job.run.folder
    found = read_responses(folder, model)
    asked = stream_artifact(folder, Label.input("questions"), Instruction)
    return {instruction.text: found[instruction.id] for instruction in asked if instruction.id in found}


def times(comparison: JobComparison) -> str:
    """Where the time went, and what was found instead of made again."""
    spent = costs(comparison.finished, purpose)
    rows = [
        (name, [cost.made, cost.reused], f"{duration(cost.made)} + {duration(cost.reused)}")
        if cost.reused >= 0.05
        else (name, [cost.made], duration(cost.made))
        for name, cost in spent.items()
        if cost.made + cost.reused >= 0.05
    ]
    said = "Seconds that were spent, and in pale the seconds that were not, because a job found what another had made."
    return note(said) + bars(rows) if rows else ""


def failures(comparison: JobComparison) -> str:
    """The jobs without numbers, each with the line it stopped with."""
    missing = [job for job in comparison.jobs if not job.run]
    said = [
        (f"Job {named(comparison, job)}", f"{job.state}: {job.error}" if job.error else job.state) for job in missing
    ]
    return facts(said) if said else ""
