import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mutation import assert_caught

from selfalign.core.files import write_json
from selfalign.report import timing
from selfalign.report.timing import training_times


def finished(folder: Path, loss: str) -> None:
    """A run's summary, as far as it tells the loss."""
    folder.mkdir(exist_ok=True)
    chosen = {"choices": {"loss": loss.replace("-", "")}}
    write_json(folder / "summary.json", {"loss": {"title": loss}, "config": chosen})


def trained(folder: Path, label: str, stage: str, rows: list[dict[str, Any]], **manifest: Any) -> None:
    """An artifact of a run with what its stage logged."""
    place = folder / "artifacts" / label
    place.mkdir(parents=True)
    write_json(place / "manifest.json", {"stage": stage, "inputs": {}, "counts": {}, "seconds": 99.0, **manifest})
    (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step(number: int, seconds: float, speed: float, memory: float) -> dict[str, Any]:
    return {"step": number, "step_seconds": seconds, "tokens_per_second": speed, "peak_memory_gb": memory}


STEPS = [step(1, 1.0, 100.0, 0.5), step(2, 3.0, 20.0, 0.75)]
LOSS = {"class": "SrDPO", "beta": 0.1, "lam": 0.3, "refinement": {"class": "Refinement"}}


def test_times_are_worked_by_hand(tmp_path: Path) -> None:
    finished(tmp_path / "one", "Sr-DPO")
    finished(tmp_path / "two", "IPO")
    trained(tmp_path / "one", "M1", "sft", STEPS[:1], counts={"demonstrations": 4})
    trained(tmp_path / "one", "iteration_1/reference", "reference_logprobs", [], seconds=7.5)
    trained(tmp_path / "one", "M2", "align", STEPS, inputs={"loss": LOSS}, counts={"pairs": 6})
    trained(
        tmp_path / "two", "M10", "align", STEPS, inputs={"loss": {"class": "IPO", "beta": 0.2}}, counts={"pairs": 2}
    )
    trained(tmp_path / "two", "M2", "align", STEPS, inputs={"loss": {"class": "IPO", "beta": 0.2}}, counts={"pairs": 2})
    first, second, *others = training_times([tmp_path / "one", tmp_path / "two"])
    assert first == {
        "run": "one", "model": "M1", "loss": "fine-tuning", "steps": 1, "seconds": 1.0, "seconds_per_step": 1.0,
        "tokens_per_second": 100.0, "peak_memory_gb": 0.5,
    }  # fmt: skip
    assert second == {
        "run": "one", "model": "M2", "loss": "Sr-DPO", "lam": 0.3, "beta": 0.1, "pairs": 6, "steps": 2, "seconds": 4.0,
        "seconds_per_step": 2.0,
        # 100 tokens in the first second, 60 in the next three; not the mean of 100 and 20.
        "tokens_per_second": 40.0,
        "peak_memory_gb": 0.75, "reference_seconds": 7.5,
    }  # fmt: skip
    assert [(row["run"], row["model"], row["loss"]) for row in others] == [("two", "M2", "IPO"), ("two", "M10", "IPO")]
    assert not any("lam" in row or "reference_seconds" in row for row in others)


def test_models_of_another_run_have_their_own_loss(tmp_path: Path) -> None:
    """Beside one another in an evaluation, whose own loss is that of the first run."""
    finished(tmp_path, "Sr-DPO")
    trained(tmp_path, "first.M2", "align", STEPS, inputs={"loss": LOSS})
    trained(tmp_path, "second.M2", "align", STEPS, inputs={"loss": {"class": "ODPO", "beta": 0.1}})
    assert {row["model"]: row["loss"] for row in training_times([tmp_path])} == {
        "first.M2": "Sr-DPO",
        "second.M2": "ODPO",
    }


def test_training_whose_log_has_no_times_has_no_row(tmp_path: Path) -> None:
    finished(tmp_path, "Sr-DPO")
    trained(tmp_path, "M0", "load_model", [])
    trained(tmp_path, "M1", "sft", [])
    trained(tmp_path, "M2", "align", [STEPS[0], {"step": 2, "tokens_per_second": 5.0}], inputs={"loss": LOSS})
    assert training_times([tmp_path]) == []
    assert training_times([]) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("math.fsum(rate * time for", "math.fsum(rate for"),
        ("seconds = math.fsum(times)", 'seconds = manifest["seconds"]'),
        ("max(row[catalog.PEAK_MEMORY_GB.name] for row in steps)", "steps[0][catalog.PEAK_MEMORY_GB.name]"),
        ("(label.iteration_number, label.owner", "(str(label), label.owner"),
    ],
    ids=["tokens not weighed", "whole stage as training", "memory of the first step", "M10 before M2"],
)
def test_mutant_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    assert_caught(timing, sys.modules[__name__], old, new, test_times_are_worked_by_hand, given)
