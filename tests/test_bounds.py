import logging
import sys

import pytest
from mutation import assert_caught

from selfalign.core.errors import SelfalignError
from selfalign.metrics import bounds
from selfalign.metrics.bounds import MetricBounds
from selfalign.metrics.catalog import METRICS

BOUNDS = {name: metric for name, metric, _, _ in MetricBounds().bounds()}


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [
        ("max_length_growth", 1.5, 1.6),
        ("max_repetition_4", 1.5, 1.6),
        ("max_kl_to_m1", 1.5, 1.6),
        ("min_finished_share", 1.5, 1.4),
        ("min_distinct_2", 1.5, 1.4),
        ("max_score_length_correlation", 1.5, 1.6),
        ("max_answer_score_length_correlation", 1.5, 1.6),
        ("max_reward_length_correlation", 1.5, 1.6),
    ],
)
def test_a_bound_itself_is_allowed_and_what_is_beyond_is_told(
    caplog: pytest.LogCaptureFixture, name: str, within: float, beyond: float
) -> None:
    limits, metric = MetricBounds(**{name: 1.5}), BOUNDS[name]
    assert limits.check("M2", {metric: within}) == {}
    assert not caplog.records
    assert limits.check("M2", {metric: beyond}) == {name: beyond}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"M2: {metric} is {beyond}" in caplog.text


@pytest.mark.parametrize("name", ["min_chosen_logp_change", "min_rejected_logp_change"])
def test_a_fall_beyond_its_bound_is_told_and_a_rise_is_not(caplog: pytest.LogCaptureFixture, name: str) -> None:
    limits, metric = MetricBounds(**{name: -0.5}), BOUNDS[name]
    assert [limits.check("M2", {metric: change}) for change in (-0.5, 0.0, 3.0)] == [{}, {}, {}]
    assert not caplog.records
    assert limits.check("M2", {metric: -0.75}) == {name: -0.75}
    assert f"M2: {metric} is -0.75, below evaluate.bounds.{name}=-0.5" in caplog.text
    with pytest.raises(SelfalignError, match=rf"{name}=-0\.5, and evaluate\.bounds\.stop=true"):
        MetricBounds(**{name: -0.5}, stop=True).check("M2", {metric: -0.75})


def test_what_bounds_are_set_for_is_picked_from_several_counts() -> None:
    counts = [{"logps/chosen_change_per_token": -0.1, "pairs": 3}, {"score_length_correlation": 0.5, "dropped": {}}]
    assert MetricBounds().among(*counts) == {"logps/chosen_change_per_token": -0.1, "score_length_correlation": 0.5}


def test_no_bound_and_no_number_cross_nothing() -> None:
    none = MetricBounds(**dict.fromkeys(BOUNDS))
    assert none.check("M2", dict.fromkeys(BOUNDS.values(), 1e9)) == {}
    assert MetricBounds().check("M2", {}) == {}


def test_bounds_are_of_documented_metrics() -> None:
    assert set(BOUNDS.values()) <= METRICS.keys()


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("bound", [-0.1, float("nan")])
def test_impossible_bound_is_refused_with_its_key(name: str, bound: float) -> None:
    side, bound = ("less", -bound) if name.endswith("_change") else ("more", bound)
    with pytest.raises(SelfalignError, match=rf"evaluate\.bounds\.{name} must be 0 or {side}"):
        MetricBounds(**{name: bound})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.min_chosen_logp_change, -1)", "self.min_chosen_logp_change, 1)"),
        ("side * value <= side * bound", "value <= bound"),
        ("side * value <= side * bound", "side * value < side * bound"),
        ("if self.stop:", "if False:"),
        ("LOGPS_CHOSEN_CHANGE_PER_TOKEN", "LOGPS_CHOSEN_CHANGE"),
    ],
    ids=["a rise crosses", "every bound is the highest", "the bound itself crosses", "never stops", "nats a pair"],
)
def test_mutant_is_caught(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, old: str, new: str
) -> None:
    given = {"monkeypatch": monkeypatch, "caplog": caplog, "name": "min_chosen_logp_change"}
    check = test_a_fall_beyond_its_bound_is_told_and_a_rise_is_not
    assert_caught(bounds, sys.modules[__name__], old, new, check, given)
