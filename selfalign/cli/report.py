"""`selfalign-report`: a run's page written anew, or several runs side by side.

A PATH is a run folder, a sweep folder with its jobs.json, or a folder that holds several runs. One run folder alone
has its report.html written again; anything else becomes comparison.html and comparison.csv.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from selfalign.cli.environment import set_streams
from selfalign.cli.errors import report_errors
from selfalign.core.errors import SelfalignError


def main() -> None:
    """Runs the command line; exit code 0, 1 for what the user can mend, 2 for a wrong option, 130 for Ctrl-C."""
    set_streams()
    options = parser().parse_args()
    with report_errors("interrupted; nothing was written"):
        print(f"report    {report(options.paths, options.out, options.metric)}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    about, _, more = (__doc__ or "").partition("\n\n")
    found = argparse.ArgumentParser(prog="selfalign-report", description=f"{about.partition(': ')[2]} {more}")
    found.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="run folder, sweep folder, folder of runs")
    metric = "number of a model's row in summary.json, of which the best job has the highest; else sweep_metric"
    found.add_argument("--metric", default="", help=f"{metric}; --metric=-NAME: the lowest")
    found.add_argument("--out", type=Path, help="folder for the comparison; else PATH, or this folder for several")
    return found


def report(paths: Sequence[Path], out: Path | None = None, metric: str = "") -> Path:
    """Writes what was asked for and returns the page's path.

    Raises:
        SelfalignError: a path holds no run, one run has not finished or lacks what it has made, or no job has the
            metric.
    """
    # They import torch, which --help should not wait for.
    from selfalign.report import write_report
    from selfalign.report.comparison_page import compare_jobs
    from selfalign.report.jobs import find_jobs, is_run
    from selfalign.runs.reader import Finished, check_artifacts

    if len(paths) > 1 or not is_run(paths[0]):
        jobs = find_jobs(paths)
        for run in (job.run for job in jobs if job.run):
            check_artifacts(run.folder, run.stages)
        return compare_jobs(jobs, out or (paths[0] if len(paths) == 1 else Path()), metric)
    if out or metric:
        raise SelfalignError(f"{paths[0]} is one run: --out and --metric are for a comparison")
    if not (paths[0] / "summary.json").is_file():
        raise SelfalignError(f"{paths[0]}: the run has not finished, so there is nothing to report")
    check_artifacts(paths[0], Finished.load(paths[0]).stages)
    write_report(paths[0])
    return paths[0] / "report.html"
