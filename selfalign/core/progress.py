"""One progress bar for every stage: label, count, rate, time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO

from tqdm import tqdm

EVERY_SECONDS = 300.0
"""How often a long stage says how far it is where there is no terminal."""


@contextmanager
def progress_bar(label: str, total: int, unit: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar forward by so many units. Nothing is seen of one that is not shown.

    Where there is no terminal, in a log file, the bar is a line every five minutes.
    """
    terminal = sys.stderr.isatty()
    bar_format = f"{{desc}} {'{bar:24} ' * terminal}{{n_fmt}}/{{total_fmt}} {{unit}} · {{elapsed}} · {{remaining}} left"
    how = {"bar_format": bar_format, "mininterval": 0.5, "disable": not shown}
    said = time.monotonic()
    with tqdm(total=total, desc=f"{label:<24}", unit=unit, file=sys.stderr if terminal else StringIO(), **how) as bar:

        def advance(amount: int) -> None:
            nonlocal said
            bar.update(amount)
            if shown and not terminal and time.monotonic() - said >= EVERY_SECONDS:
                said = time.monotonic()
                print(bar, file=sys.stderr, flush=True)

        yield advance
