"""`selfalign-report`: write the report of a run, follow a run that goes, or compare several runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selfalign.cli.commands import command_parser
from selfalign.cli.environment import set_streams
from selfalign.cli.errors import report_errors
from selfalign.core.errors import SelfalignError

ABOUT = """A PATH is a run folder, a sweep folder with its jobs.json, or a folder that holds several runs. For one run
folder its report.html is written again, as far as the run has come; for anything else comparison.html
and comparison.csv are written."""

EXAMPLES = {
    "selfalign-report outputs/demo-1a2b3c4d": "write report.html of a run again",
    "selfalign-report --watch outputs/demo-1a2b3c4d": "say where a run is, and keep its page up to date, until it ends",
    "selfalign-report outputs/sweeps/demo-9c0d1e2f --metric rewards/margins": "compare the jobs of a sweep",
    "selfalign-report outputs/demo-1a2b3c4d outputs/demo-5e6f7a8b --out compared": "compare any runs",
}


def main() -> None:
    """Run the command line.

    Exit codes: 0; 1 for an error that the user can correct, or a bug; 2 for a wrong option; 130 for Ctrl-C.
    """
    set_streams()
    options = parser().parse_args()
    interrupted = "interrupted; what runs goes on" if options.watch else "interrupted; nothing was written"
    with report_errors(interrupted):
        if options.watch:
            page = follow(options.paths, options.out, options.metric)
        else:
            page = report(options.paths, options.out, options.metric)
        print(f"report    {page}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = command_parser("selfalign-report", ABOUT, EXAMPLES)
    found.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="run folder, sweep folder, folder of runs")
    metric = "metric in summary.json whose highest value makes a job the best (default: sweep_metric)"
    found.add_argument("--metric", default="", help=f"{metric}; --metric=-NAME takes the lowest value")
    out = "folder for the comparison (default: PATH, or the current folder for several)"
    found.add_argument("--out", type=Path, help=out)
    watch = "until the run or sweep ends, say where it is and write its page every few seconds; the page reloads itself"
    found.add_argument("--watch", action="store_true", help=watch)
    return found


def report(paths: Sequence[Path], out: Path | None = None, metric: str = "") -> Path:
    """Write the report or the comparison, and return the path of its page.

    Raises:
        SelfalignError: a path holds no run, a single run has nothing to show or lacks an artifact, or no job has the
            metric.
    """
    # These import torch, which --help should not wait for.
    from selfalign.report.comparison_page import compare_jobs
    from selfalign.report.jobs import find_jobs, is_run
    from selfalign.report.watch import write_run
    from selfalign.runs.reader import check_artifacts

    if len(paths) > 1 or not is_run(paths[0]):
        jobs = find_jobs(paths)
        for run in (job.run for job in jobs if job.run):
            check_artifacts(run.folder, run.stages)
        return compare_jobs(jobs, out or (paths[0] if len(paths) == 1 else Path()), metric)
    if out or metric:
        raise SelfalignError(f"{paths[0]} is a single run: --out and --metric are only for comparisons")
    write_run(paths[0])
    return paths[0] / "report.html"


def follow(paths: Sequence[Path], out: Path | None = None, metric: str = "") -> Path:
    """Follow a run or a sweep until it ends, and return the path of its page.

    Raises:
        SelfalignError: there are several paths or there is an --out, or as `report`.
    """
    from selfalign.report.watch import watch

    if len(paths) > 1 or out:
        raise SelfalignError("--watch follows one run or sweep, and writes into its folder: give one PATH and no --out")
    line = ""

    def say(text: str) -> None:
        nonlocal line
        if sys.stdout.isatty():
            print(f"\r{text:<{len(line)}}", end="", flush=True)
            line = text
        elif text.partition(" · ")[0] != line.partition(" · ")[0]:  # In a file one line for each stage.
            print(text, flush=True)
            line = text

    try:
        return watch(paths[0], say, metric)
    finally:
        if sys.stdout.isatty() and line:
            print()
