"""`selfalign-report`: write the report of a run again, or compare several runs.

A PATH is a run folder, a sweep folder with its jobs.json, or a folder that holds several runs. For one run folder its
report.html is written again; for anything else comparison.html and comparison.csv are written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from selfalign.cli.environment import set_streams
from selfalign.cli.errors import report_errors
from selfalign.core.errors import SelfalignError


def main() -> None:
    """Run the command line.

    Exit codes: 0; 1 for an error that the user can correct, or a bug; 2 for a wrong option; 130 for Ctrl-C.
    """
    set_streams()
    options = parser().parse_args()
    with report_errors("interrupted; nothing was written"):
        print(f"report    {report(options.paths, options.out, options.metric)}")


def parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    found = argparse.ArgumentParser(prog="selfalign-report", description=f"{about.partition(': ')[2]} {more}")
    found.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="run folder, sweep folder, folder of runs")
    metric = "metric in summary.json whose highest value makes a job the best (default: sweep_metric)"
    found.add_argument("--metric", default="", help=f"{metric}; --metric=-NAME takes the lowest value")
    out = "folder for the comparison (default: PATH, or the current folder for several)"
    found.add_argument("--out", type=Path, help=out)
    return found


def report(paths: Sequence[Path], out: Path | None = None, metric: str = "") -> Path:
    """Write the report or the comparison, and return the path of its page.

    Raises:
        SelfalignError: a path holds no run, a single run is not finished or lacks an artifact, or no job has the
            metric.
    """
    # These import torch, which --help should not wait for.
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
        raise SelfalignError(f"{paths[0]} is a single run: --out and --metric are only for comparisons")
    if not (paths[0] / "summary.json").is_file():
        raise SelfalignError(f"{paths[0]}: this run is not finished, so there is nothing to report")
    check_artifacts(paths[0], Finished.load(paths[0]).stages)
    write_report(paths[0])
    return paths[0] / "report.html"
