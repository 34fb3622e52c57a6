"""From a name as a run writes it back to the declaration."""

import re
from pathlib import Path

from selfalign.metrics import catalog


def declaration(name: str) -> str:
    """The declared name that a name in metrics.jsonl or summary.json goes back to, a benchmark's left aside.

    Raises:
        LookupError: nothing is declared of it.
    """
    bare = re.sub("_(low|high)$", "", name)
    families = [metric for metric in catalog.METRICS.values() if not metric.name.startswith(catalog.BENCHMARK)]
    found = [metric.name for metric in families if metric.matches(bare)]
    compared = {catalog.against(opponent, m).name: m.name for opponent in catalog.OPPONENTS for m in catalog.COMPARED}
    if found or bare in compared:
        return (found or [compared[bare]])[0]
    pairs, _, rest = bare.partition("/")
    if f"{pairs}/" in catalog.PAIRS_OF:
        return declaration(rest)
    raise LookupError(f"{name} is not declared in metrics/catalog.py")


PRODUCERS = ("benchmarks", "engines", "judges", "metrics", "stages", "training")
"""The packages that measure; the others show."""


def named_by_producers() -> set[str]:
    """The names of the declarations that a producer refers to."""
    root = Path(catalog.__file__).parents[1]
    files = [
        file
        for package in PRODUCERS
        for file in (root / package).rglob("*.py")
        if file.name not in ("catalog.py", "limits.py")
    ]
    constants = {found for file in files for found in re.findall(r"\bcatalog\.([A-Z]\w+)", file.read_text("utf-8"))}
    return {metric.name for name in constants if isinstance(metric := getattr(catalog, name), catalog.Metric)}
