"""How many tokens a run computes when it trains, scores and judges: padded, with each group's prompt once, as a tree.

`python experiments/speed/distinct_tokens.py experiment=demo …` runs selfalign with these arguments and prints a table
of its stages. What the run finds in its store is not computed and not counted.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from selfalign.cli.main import main as selfalign
from selfalign.models import batches
from selfalign.models.batches import Batch, SharedPrompt
from selfalign.runs.runner import Runner
from selfalign.runs.summary import table

WAYS = ("padded", "each group's prompt once", "every prefix once")


def main() -> None:
    """Run the experiment and count in its packed batches."""
    counts: dict[str, Counter[str]] = {}
    running = [""]
    make, pack = Runner.make, batches.pack

    def labelled(self: Runner, label: Any, stage: Any, **inputs: Any) -> Any:
        running[0] = str(label)
        return make(self, label, stage, **inputs)

    def counted(groups: Sequence[SharedPrompt]) -> Batch:
        batch = pack(groups)
        padded = batches.pad(groups).inputs["input_ids"].numel()
        computed = (padded, sum(map(len, groups)), batch.inputs["input_ids"].numel())
        counts.setdefault(running[0], Counter()).update(dict(zip(WAYS, computed, strict=True)))
        return batch

    Runner.make, batches.pack = labelled, counted
    try:
        selfalign()
    finally:
        rows = [row(name, found) for name, found in [*counts.items(), ("together", sum(counts.values(), Counter()))]]
        print(*table(["stage", *WAYS, "tree / groups", "tree / padded"], rows), sep="\n")


def row(name: str, found: Counter[str]) -> list[str]:
    """A stage's tokens, and the share of them that a tree computes."""
    padded, grouped, tree = (found[way] for way in WAYS)
    return [name, *(f"{count:,}" for count in (padded, grouped, tree)), f"{tree / grouped:.2f}", f"{tree / padded:.2f}"]


if __name__ == "__main__":
    main()
