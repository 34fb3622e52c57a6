"""One progress bar for every stage: label, count, rate, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(label: str, total: int, unit: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar forward by so many units. Nothing is seen of one that is not shown."""
    bar_format = "{desc} {bar:24} {n_fmt}/{total_fmt} {unit} · {elapsed} · {remaining} left"
    how = {"bar_format": bar_format, "mininterval": 0.5, "disable": not shown}
    with tqdm(total=total, desc=f"{label:<24}", unit=unit, **how) as bar:

        def advance(amount: int) -> None:
            bar.update(amount)

        yield advance
