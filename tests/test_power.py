"""The smallest detectable difference against an enumeration of all outcomes, and against a simulation."""

import math

import numpy as np
import pytest
from builders import ROOT
from mutation import mutated

from selfalign.metrics import power
from selfalign.metrics.intervals import wilson
from selfalign.metrics.power import POWER, detectable_difference, detection_power, what_a_plan_can_see, what_can_be_seen


def enumerated(difference: float, comparisons: int, tie_rate: float) -> float:
    """Sum the probabilities of all (wins, ties, losses) whose interval in the reports lies above one half."""
    win, loss = (1 - tie_rate) / 2 + difference, (1 - tie_rate) / 2 - difference
    seen = 0.0
    for wins in range(comparisons + 1):
        for losses in range(comparisons - wins + 1):
            ties = comparisons - wins - losses
            if wilson(wins + ties / 2, comparisons).low > 0.5:
                ways = math.comb(comparisons, wins) * math.comb(comparisons - wins, losses)
                seen += ways * win**wins * loss**losses * tie_rate**ties
    return seen


CASES = [(n, tie) for n in (1, 5, 10, 24, 37) for tie in (0.0, 1 / 3, 0.6, 0.85, 0.95)]


@pytest.mark.parametrize(("comparisons", "tie_rate"), CASES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_power_is_that_of_the_interval_in_the_reports(comparisons: int, tie_rate: float, share: float) -> None:
    difference = share * (1 - tie_rate) / 2
    expected = enumerated(difference, comparisons, tie_rate)
    assert detection_power(difference, comparisons, tie_rate) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("comparisons", "tie_rate"), [case for case in CASES if case[0] >= 10])
def test_smallest_difference_has_the_power_and_a_smaller_one_has_not(comparisons: int, tie_rate: float) -> None:
    found = detectable_difference(comparisons, tie_rate)
    if found is None:
        assert enumerated((1 - tie_rate) / 2, comparisons, tie_rate) < POWER
        return
    assert enumerated(found, comparisons, tie_rate) >= POWER
    assert enumerated(found - 0.001, comparisons, tie_rate) < POWER


def test_test_has_its_level_and_less_with_ties() -> None:
    """Under no difference, the probability of either side is at most 5 %; ties make the test more careful."""
    assert 2 * detection_power(0.0, 100, 0.0) < 0.06
    assert 2 * detection_power(0.0, 100, 0.5) < 0.01


@pytest.mark.parametrize(("comparisons", "tie_rate"), [(24, 0.0), (200, 1 / 3), (805, 0.1)])
def test_simulated_studies_see_the_difference_four_times_of_five(comparisons: int, tie_rate: float) -> None:
    found = detectable_difference(comparisons, tie_rate)
    assert found is not None
    chances = [(1 - tie_rate) / 2 + found, tie_rate, (1 - tie_rate) / 2 - found]
    drawn = np.random.default_rng(0).multinomial(comparisons, chances, size=4000)
    seen = [wilson(wins + ties / 2, comparisons).low > 0.5 for wins, ties, _ in drawn]
    assert np.mean(seen) == pytest.approx(POWER, abs=0.025)


def test_large_studies_follow_the_normal_approximation() -> None:
    """(z_{.975} + z_{.8}) / 2√n without ties (textbook formula); exact values lie near it, and fall with √n."""
    for comparisons in (400, 10_000):
        found = detectable_difference(comparisons, 0.0)
        assert found == pytest.approx((1.959964 + 0.841621) / (2 * math.sqrt(comparisons)), rel=0.03)


def test_table_of_the_docs_is_computed() -> None:
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").split("## What can be seen")[1]
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    ties = {"without ties, points from 50 %": 0.0, "a third tied": 1 / 3, "60 % tied": 0.6, "85 % tied": 0.85}
    assert [row[0] for row in rows[:4]] == list(ties)
    for name, *cells in rows[:4]:
        found = [detectable_difference(int(count), ties[name]) for count in head[1:]]
        assert cells == ["none" if one is None else str(math.ceil(100 * one)) for one in found]


def test_mostly_tied_comparisons_see_nothing() -> None:
    assert detectable_difference(24, 0.85) is None
    assert detectable_difference(24, 1.0) is None
    assert what_can_be_seen(24, 0.85).startswith("24 instructions with 85\u00a0% ties can see no difference")


def test_plan_assumes_its_ties_and_says_so_or_gives_a_choice() -> None:
    known = what_a_plan_can_see(24)
    assert known.startswith(what_can_be_seen(24, 1 / 3))
    assert "ties assumed" in known
    for seeds in (1, 3):
        gain = detectable_difference(400 * seeds, 1 / 3)
        assert gain is not None
        assert f"400 can see {math.ceil(100 * gain)}" in what_a_plan_can_see(0, seeds)


def test_sentence_rounds_up_and_counts_seeds() -> None:
    for seeds, asked in ((1, "24 instructions"), (3, "24 instructions × 3 seeds")):
        found = detectable_difference(24 * seeds, 0.0)
        assert found is not None
        said = what_can_be_seen(24, 0.0, seeds)
        assert said.startswith(f"{asked} with 0\u00a0% ties")
        assert f"a win rate {math.ceil(100 * found)} points or more" in said


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1 - LEVEL / 2", "1 - LEVEL"),
        ("(ahead + decided) / 2", "ahead / 2"),
        ("0.5 + difference / (1 - tie_rate)", "0.5 + difference"),
        ("comparisons, 1 - tie_rate)", "comparisons, tie_rate)"),
    ],
)
def test_broken_formula_is_seen(old: str, new: str) -> None:
    expected = enumerated(0.1, 24, 0.4)
    with mutated(power, old, new) as broken:
        assert broken.detection_power(0.1, 24, 0.4) != pytest.approx(expected, abs=1e-3)
