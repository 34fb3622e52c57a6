import logging

import pytest

from selfalign.drift import Limits
from selfalign.errors import SelfalignError
from selfalign.metrics import METRICS

BOUNDS = {name: metric for name, metric, _, _ in Limits().bounds()}


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [
        ("length_growth", 1.5, 1.6),
        ("repeated_4", 1.5, 1.6),
        ("kl_to_m1", 1.5, 1.6),
        ("finished_share", 1.5, 1.4),
        ("distinct_2", 1.5, 1.4),
    ],
)
def test_a_bound_itself_is_allowed_and_what_is_beyond_is_told(
    caplog: pytest.LogCaptureFixture, name: str, within: float, beyond: float
) -> None:
    limits, metric = Limits(**{name: 1.5}), BOUNDS[name]
    assert limits.check("M2", {metric: within}) == {}
    assert not caplog.records
    assert limits.check("M2", {metric: beyond}) == {name: beyond}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"M2: {metric} is {beyond}" in caplog.text


def test_no_bound_and_no_number_cross_nothing() -> None:
    none = Limits(**dict.fromkeys(BOUNDS))
    assert none.check("M2", dict.fromkeys(BOUNDS.values(), 1e9)) == {}
    assert Limits().check("M2", {}) == {}


def test_bounds_are_of_documented_metrics() -> None:
    assert set(BOUNDS.values()) <= METRICS.keys()


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("bound", [-0.1, float("nan")])
def test_impossible_bound_is_refused_with_its_key(name: str, bound: float) -> None:
    with pytest.raises(SelfalignError, match=rf"evaluate\.limits\.{name} must be 0 or more"):
        Limits(**{name: bound})
