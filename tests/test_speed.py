"""The speed of preference steps against TRL's: stored baselines, and ratios that are no worse than theirs.

Only ratios of one run are compared. Seconds differ between machines, and between hours of one machine.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.files import read_json

SPEED = Path(__file__).parents[1] / "experiments/speed"
BASELINES = sorted((SPEED / "baselines").glob("*.json"))
OWN = "against our own"
"""In the name of a ratio of two of our own steps, which is better when it is smaller."""
WORSE = 0.6
"""The share of a baseline's ratio that is still no regression: one short round on shared cores."""


def by_name(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_there_are_baselines() -> None:
    assert BASELINES


@by_name(BASELINES)
def test_baseline_says_where_and_how_it_was_measured(path: Path) -> None:
    baseline = read_json(path)
    assert baseline["command"].startswith("python experiments/speed/preference_step.py ")
    assert {"name", "threads", "torch", "transformers", "trl"} <= baseline["machine"].keys()
    assert baseline["ratios"]
    for row in baseline["variants"].values():
        assert min(row["seconds"], row["peak_gb"], row["pair_tokens_per_second"]) > 0


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@by_name(BASELINES)
def test_ratios_are_no_worse_than_the_baseline(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install 'selfalign[bench]'")
    baseline, out = read_json(path), tmp_path / "now.json"
    settings = {name: str(baseline["settings"][name]) for name in ("shape", "dtype", "pairs")}
    command = [sys.executable, str(SPEED / "preference_step.py"), "--rounds", "2", "--steps", "2", "--out", str(out)]
    command += [text for name, value in settings.items() for text in (f"--{name}", value)]
    subprocess.run([*command, "--variants", *baseline["variants"]], check=True, cwd=tmp_path)
    now = read_json(out)["ratios"]
    worse = {
        name: (before, now[name])
        for name, before in baseline["ratios"].items()
        if (before / now[name] if OWN in name else now[name] / before) < WORSE
    }
    assert not worse, "ratios (baseline, now)"
