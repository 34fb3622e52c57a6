"""One progress bar for every stage: label, count, rate, time left of the stage and of the run."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

from tqdm import tqdm

from selfalign.core.formatting import about

EVERY_SECONDS = 300.0
"""How often a long stage says how far it is where there is no terminal."""


class StageBar(tqdm):
    """A bar that also says how long the run takes, where the time of its later stages is known.

    Attributes:
        later_seconds: that time; None if it is not known.
    """

    later_seconds: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of the bar's format, with `run_left`."""
        fields = super().format_dict
        passed, done = fields["elapsed"], fields["n"] - fields["initial"]
        rate = fields["rate"] or (done / passed if passed else 0.0)
        known = self.later_seconds is not None and rate and fields["total"]
        left = (fields["total"] - fields["n"]) / rate + (self.later_seconds or 0.0) if known else 0.0
        return {**fields, "run_left": f" · run: {about(left)} left" if known else ""}


@contextmanager
def progress_bar(
    label: str, total: int, unit: str, *, shown: bool, later_seconds: float | None = None
) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar forward by so many units. Nothing is seen of one that is not shown.

    Where there is no terminal, in a log file, the bar is a line every five minutes.

    Args:
        label: what is made.
        total: number of units.
        unit: their name.
        shown: whether this process shows the bar.
        later_seconds: how long the later stages of the run take; None if that is not known.
    """
    terminal = sys.stderr.isatty()
    drawn = "{bar:24} " * terminal
    bar_format = f"{{desc}} {drawn}{{n_fmt}}/{{total_fmt}} {{unit}} · {{elapsed}} · {{remaining}} left{{run_left}}"
    how = {"bar_format": bar_format, "mininterval": 0.5, "disable": not shown}
    said, file = time.monotonic(), sys.stderr if terminal else StringIO()
    with StageBar(total=total, desc=f"{label:<24}", unit=unit, file=file, **how) as bar:
        bar.later_seconds = later_seconds

        def advance(amount: int) -> None:
            nonlocal said
            bar.update(amount)
            if shown and not terminal and time.monotonic() - said >= EVERY_SECONDS:
                said = time.monotonic()
                print(bar, file=sys.stderr, flush=True)

        yield advance
