"""One progress bar for every stage: label, count, rate, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from selfalign.core import distributed


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar forward by so many units. Only the main process shows the bar."""
    bar_format = "{desc} {bar:24} {n_fmt}/{total_fmt} {unit} · {elapsed} · {remaining} left"
    shown = {"bar_format": bar_format, "mininterval": 0.5, "disable": not distributed.is_main()}
    with tqdm(total=total, desc=f"{label:<24}", unit=unit, **shown) as bar:

        def advance(amount: int) -> None:
            bar.update(amount)

        yield advance
