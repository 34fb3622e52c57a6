"""What a sweep saves: the same jobs once as a sweep and once as separate runs with nothing to share, in seconds.

`python experiments/sweep_sharing/measure.py FOLDER experiment=demo iterations=1 …` prints the table; an override with
commas is what is swept, `loss.lam=0.1,0.3,0.5,1` if there is none.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from selfalign.core.files import read_json
from selfalign.runs.summary import table

SWEPT = "loss.lam=0.1,0.3,0.5,1"


def main() -> None:
    """Runs everything one after another in an empty folder."""
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    swept = next((override for override in overrides if "," in override), SWEPT)
    common = [override for override in overrides if override != swept]
    key, _, values = swept.partition("=")
    alone = {f"{key}={v}": seconds(folder / f"alone_{v}", *common, f"{key}={v}") for v in values.split(",")}
    sums = [sum(column) for column in zip(*alone.values(), strict=True)]
    together = seconds(folder / "sweep", "-m", *common, swept)
    rows = [[f"{name}, alone", *map(shown, taken)] for name, taken in alone.items()]
    rows += [["all of them, alone", *map(shown, sums)], [f"selfalign -m {swept}", *map(shown, together)]]
    rows += [["ratio", *(f"{part / whole:.2f}" for part, whole in zip(together, sums, strict=True))]]
    print(*table(["what", "wall seconds", "CPU seconds"], rows), sep="\n", end="\n\n")
    print(*table(["stage", "seconds alone", "made in the sweep"], stages(folder)), sep="\n")


def seconds(output: Path, *arguments: str) -> tuple[float, float]:
    """Wall and CPU time of one command, start of the interpreter included."""
    if output.exists():
        sys.exit(f"{output} is there already: choose an empty folder")
    started, before = time.monotonic(), os.times()
    command = [sys.executable, "-m", "selfalign", *arguments, "tracker=none", f"output_dir={output}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - started, spent


def shown(value: float) -> str:
    """Whole seconds."""
    return f"{value:.0f}"


def stages(folder: Path) -> list[list[str]]:
    """Each stage, the seconds it took in the first separate run, and how often the sweep made it."""
    alone = read_json(next(folder.glob("alone_*/*/summary.json")))["stages"]
    jobs = [path.parent for path in folder.glob("sweep/*/summary.json")]
    made = [len({(job / "artifacts" / stage["label"]).resolve() for job in jobs}) for stage in alone]
    return [[s["label"], f"{s['seconds']:.1f}", str(times)] for s, times in zip(alone, made, strict=True)]


if __name__ == "__main__":
    main()
