"""Pair rules worked by hand, ledgers over random responses, and broken variants of the rules that must be noticed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from types import ModuleType
from typing import Any

import pytest
from builders import response
from mutation import mutated

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, Response
from selfalign.data import pair_rules
from selfalign.data.pair_rules import (
    AllOrdered,
    BestVsK,
    BestWorst,
    ByWriter,
    PairRule,
    RandomPair,
    agreement,
    pick_pairs,
)

RULES = ["BestWorst", "RandomPair", "AllOrdered", "BestVsK"]


def told(rule: Any, *given: tuple[float | None, int], cut: str = "", seed: int = 0, module: ModuleType = pair_rules):
    """What a rule makes of responses a, b, c … given as (score, tokens): its pairs as "b>a", and its drops."""
    names = [chr(ord("a") + n) for n in range(len(given))]
    responses = [
        replace(
            response(f"i-{name}", f"{name} has words of its own: {name * 3}"),
            tokens=tokens,
            finish_reason=FinishReason.LENGTH if name in cut else FinishReason.EOS,
        )
        for name, (_, tokens) in zip(names, given, strict=True)
    ]
    scores = {f"i-{name}": score for name, (score, _) in zip(names, given, strict=True) if score is not None}
    kept, drops = module.pick_pairs(rule, responses, scores, seed)
    return [f"{one.response.id[-1]}>{other.response.id[-1]}" for one, other in kept], dict(drops)


# --- worked by hand, on the module or on a broken copy of it -------------------------------------------------------


def check_length_control_takes_the_shortest_good_and_the_longest_bad(module: ModuleType) -> None:
    # Scores 0 to 10. At rho = 0.2 a chosen response has 8 or more, a rejected one 2 or less: both ends belong to it.
    given = ((10, 90), (8, 30), (7.9, 5), (5, 1), (5, 200), (2.1, 150), (2, 80), (0, 20))
    assert told(module.BestWorst(), *given, module=module) == (["a>h"], {})
    assert told(module.BestWorst(length_control=0.2), *given, module=module) == (["b>g"], {})
    assert told(module.BestWorst(length_control=0.25), *given, module=module) == (["c>f"], {})
    assert told(module.BestWorst(length_control=0.1), *given, module=module) == (["a>h"], {})


def check_length_control_is_relative_to_the_scores_of_the_instruction(module: ModuleType) -> None:
    # The same as above with scores from 3 to 4: only a rule that looks at their spread takes b and g.
    given = ((4.0, 90), (3.8, 30), (3.79, 5), (3.5, 1), (3.21, 150), (3.2, 80), (3.0, 20))
    assert told(module.BestWorst(length_control=0.2), *given, module=module) == (["b>f"], {})


def check_length_control_of_nothing_still_prefers_short_and_long_among_equals(module: ModuleType) -> None:
    given = ((5, 9), (5, 4), (1, 2), (1, 7))
    assert told(module.BestWorst(length_control=0), *given, module=module) == (["b>d"], {})
    assert told(module.BestWorst(), *given, module=module) == (["a>c"], {})
    assert told(module.BestWorst(length_control=0), (5, 4), (4, 4), (1, 4), module=module) == (["a>c"], {})


def check_length_control_that_picks_a_worse_one_makes_no_pair(module: ModuleType) -> None:
    # At rho = 0.9 the shortest "good" one is b with 1, the longest "bad" one c with 9.
    given = ((10, 50), (1, 1), (9, 90), (0, 50))
    assert told(module.BestWorst(length_control=0.9), *given, module=module) == ([], {"length_control": 1})


def check_best_against_the_k_that_score_lowest(module: ModuleType) -> None:
    given = ((2, 3), (5, 3), (1, 3), (4, 3))
    assert told(module.BestVsK(k=2), *given, module=module) == (["b>c", "b>a"], {})
    assert told(module.BestVsK(k=4), *given, module=module) == (["b>c", "b>a", "b>d"], {"too_few_judged": 1})
    rule = module.BestVsK(k=3, length_control=0.3)
    assert told(rule, *given, module=module) == (["b>c", "b>a"], {"length_control": 1})


def check_every_two_of_different_score(module: ModuleType) -> None:
    given = ((2, 3), (5, 3), (2, 3), (None, 3))
    # Six in all: three with the unjudged d, one tie, two kept.
    assert told(module.AllOrdered(), *given, module=module) == (["b>a", "b>c"], {"too_few_judged": 3, "tie": 1})


def check_random_pair_is_ordered_by_score_and_reaches_every_two(module: ModuleType) -> None:
    given = ((1, 3), (3, 3), (2, 3))
    seen = Counter(" ".join(told(module.RandomPair(), *given, seed=s, module=module)[0]) for s in range(300))
    assert set(seen) == {"b>a", "b>c", "c>a"}
    assert min(seen.values()) > 60


def check_failed_judgements_take_no_part(module: ModuleType) -> None:
    given = ((None, 3), (4, 3), (3, 3), (None, 3))
    for rule in (module.BestWorst(), module.RandomPair(), module.BestVsK(k=1)):
        assert told(rule, *given, module=module) == (["b>c"], {})
    assert told(module.BestWorst(), (None, 3), (4, 3), module=module) == ([], {"too_few_judged": 1})


def check_score_of_zero_is_a_score(module: ModuleType) -> None:
    assert told(module.BestWorst(), (0, 3), (1, 3), module=module) == (["b>a"], {})


def check_equal_scores_make_no_pair(module: ModuleType) -> None:
    for name in RULES:
        pairs, drops = told(getattr(module, name)(), (3, 3), (3, 5), (3, 1), module=module)
        assert pairs == []
        assert drops.keys() == {"tie"}
    assert told(module.BestWorst(length_control=0.5), (3, 3), (3, 5), module=module) == ([], {"tie": 1})


def check_margin_has_to_be_larger_than_the_minimum(module: ModuleType) -> None:
    rule = module.AllOrdered(minimum_margin=1)
    assert told(rule, (3, 3), (2, 3), (1, 3), module=module) == (["a>c"], {"small_margin": 2})


def check_finished_only_leaves_cut_ones_out(module: ModuleType) -> None:
    given = ((5, 3), (4, 3), (3, 3), (1, 3))
    assert told(module.BestWorst(), *given, cut="ad", module=module) == (["a>d"], {})
    rule = {"finished_only": True}
    assert told(module.BestWorst(**rule), *given, cut="ad", module=module) == (["b>c"], {})
    assert told(module.BestWorst(**rule), *given, cut="abd", module=module) == ([], {"unfinished": 1})
    assert told(module.AllOrdered(**rule), *given, cut="a", module=module)[1] == {"unfinished": 3}


def check_alike_texts_make_no_pair(module: ModuleType) -> None:
    words = [f"w{n}" for n in range(20)]

    def dropped(one: str, other: str, **options: float) -> dict[str, int]:
        responses = [response("i-a", one), response("i-b", other)]
        return dict(module.pick_pairs(module.BestWorst(**options), responses, {"i-a": 2, "i-b": 1}, 0)[1])

    whole = " ".join(words)
    assert dropped(whole, whole, max_similarity=1) == {"identical": 1}
    # One of twenty words differs: 2·19/40 = 0.95. Two differ: 0.9.
    assert dropped(whole, " ".join([*words[:-1], "x"])) == {"near_identical": 1}
    assert dropped(whole, " ".join([*words[:-2], "x", "y"])) == {}
    assert dropped(whole, " ".join([*words[:-2], "x", "y"]), max_similarity=0.9) == {"near_identical": 1}
    assert dropped(whole, whole.upper() + "  ") == {"near_identical": 1}
    assert dropped(whole, whole.upper() + "  ", max_similarity=0.999) == {"near_identical": 1}
    assert dropped(whole, whole.upper(), max_similarity=1) == dropped(whole, whole + " ", max_similarity=1) == {}
    characters = "".join(map(chr, range(0x4E00, 0x4E14)))
    assert dropped(characters, characters[:-1] + "x") == {"near_identical": 1}
    assert dropped("Yes.", "No.") == {}
    # The letters are nearly the same, the words are not.
    assert dropped("It is 1,234,567 metres.", "It is 1,234,568 metres.") == {}


CHECKS: list[Callable[[ModuleType], None]] = [value for name, value in list(globals().items()) if name[:6] == "check_"]


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__[6:] for check in CHECKS])
def test_rules(check: Callable[[ModuleType], None]) -> None:
    check(pair_rules)


MUTANTS = [
    (
        "best and worst swapped",
        "best = sorted(pool, key=lambda c: -c.score)",
        "best = sorted(pool, key=lambda c: c.score)",
    ),
    ("the best against itself", "for other in worst if other is not best[0]", "for other in worst"),
    ("the best of the others rejected", "for other in worst if other", "for other in reversed(worst) if other"),
    (
        "unjudged taken as zero",
        "scores[response.id]) for response in responses if response.id in scores]",
        "scores.get(response.id, 0.0)) for response in responses]",
    ),
    ("zero taken as unjudged", "if response.id in scores]", "if scores.get(response.id)]"),
    ("ties kept", 'return "tie" if margin == 0 else "small_margin"', 'return None if margin == 0 else "small_margin"'),
    ("margin equal to the minimum kept", "margin <= rule.minimum_margin", "margin < rule.minimum_margin"),
    ("worse response chosen", "if margin < 0:", "if False:"),
    ("longest chosen", "key=lambda c: c.response.tokens)", "key=lambda c: -c.response.tokens)"),
    ("shortest rejected", "key=lambda c: -c.response.tokens)", "key=lambda c: c.response.tokens)"),
    ("lengths in characters", "key=lambda c: c.response.tokens)", "key=lambda c: len(c.response.text))"),
    ("band not relative to the scores", "rho * (best[0].score - worst[0].score)", "rho * 5"),
    ("band without its ends", "+ ROUNDING\n", "- 1e-6\n"),
    ("length control always on", "if rho is None or not pool:", "rho = rho or 0.0\n    if not pool:"),
    ("cut ones kept", "if rule.finished_only else judged", "if False else judged"),
    ("identical kept", "if one == other:", "if False:"),
    ("letters compared instead of words", "pieces_of(one), pieces_of(other)", "one.casefold(), other.casefold()"),
    ("similarity has to be exceeded", "alike >= rule.max", "alike > rule.max"),
    ("case makes words differ", "pieces_of(one), pieces_of(other)", "one.split(), other.split()"),
    ("random pair unordered", "if one.score >= other.score else (other, one)", ""),
    ("always the same draw", "Random(seed)", "Random(0)"),
    ("ties of two counted twice", "rank[one.response.id] > rank", "rank[one.response.id][:1] >= rank"),
    ("drops of one round forgotten", "left = len(picked)", "pass"),
]


def test_unchanged_copy_passes_every_check() -> None:
    with mutated(pair_rules, "Random(seed)", "Random(seed)") as copy:
        for check in CHECKS:
            check(copy)


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_broken_rule_is_noticed(old: str, new: str) -> None:
    failed: list[str] = []
    with mutated(pair_rules, old, new) as copy:
        for check in CHECKS:
            try:
                check(copy)
            except AssertionError:
                failed.append(check.__name__)
    assert failed


# --- ledgers ---------------------------------------------------------------------------------------------------------


def any_responses(draw: Random) -> tuple[list[Response], dict[str, float]]:
    """Up to six responses with the troubles real ones have: alike, empty, cut, unjudged, of equal score."""
    responses = [
        replace(
            response(f"i-{n}", draw.choice(["", "Yes.", "No.", "A b c.", "a B c.", f"Text {n}."])),
            tokens=draw.randint(1, 5),
            finish_reason=draw.choice([FinishReason.EOS, FinishReason.LENGTH]),
        )
        for n in range(draw.randint(0, 6))
    ]
    # `response` fills empty texts in.
    responses = [replace(r, text="") if draw.random() < 0.1 else r for r in responses]
    return responses, {r.id: draw.choice([0.0, 1.0, 1.5, 4.0, 5.0]) for r in responses if draw.random() < 0.8}


@pytest.mark.parametrize("finished_only", [False, True])
@pytest.mark.parametrize("rho", [None, 0, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("name", RULES)
def test_kept_and_dropped_add_up_to_what_the_rule_was_to_give(
    name: str, rho: float | None, finished_only: bool
) -> None:
    reasons: set[str] = set()
    for seed in range(150):
        draw = Random(seed)
        options = {"minimum_margin": draw.choice([0, 0.5]), "length_control": rho, "finished_only": finished_only}
        rule: PairRule = getattr(pair_rules, name)(
            **options, **({"k": draw.randint(1, 5)} if name == "BestVsK" else {})
        )
        responses, scores = any_responses(draw)
        kept, drops = pick_pairs(rule, responses, scores, seed)
        assert len(kept) + sum(drops.values()) == rule.wanted(len(responses))
        assert all(count > 0 for count in drops.values())
        assert len({frozenset((a.response.id, b.response.id)) for a, b in kept}) == len(kept)
        for chosen, rejected in kept:
            assert chosen.score == scores[chosen.response.id]
            assert chosen.score - rejected.score > rule.minimum_margin
            assert chosen.response.text != rejected.response.text
            if finished_only:
                assert chosen.response.finish_reason is rejected.response.finish_reason is FinishReason.EOS
        reasons |= drops.keys()
    assert {"too_few_judged", "tie"} <= reasons
    assert ("unfinished" in reasons) == finished_only


# --- one value for each iteration ------------------------------------------------------------------------------------


def test_length_control_of_an_iteration() -> None:
    rule = BestVsK(length_control=[0, 0.1, 0.4], k=3)
    rule.check_iterations(3)
    assert [rule.at(n).length_control for n in (1, 2, 3)] == [0, 0.1, 0.4]
    assert rule.at(2) == BestVsK(length_control=0.1, k=3)
    for same in (RandomPair(), AllOrdered(length_control=0.3)):
        same.check_iterations(7)
        assert same.at(7) is same
    with pytest.raises(SelfalignError, match=r"pair\.length_control has 3 values for iterations=2"):
        rule.check_iterations(2)
    assert BestWorst().at(1) == BestWorst()


# --- by writer -----------------------------------------------------------------------------------------------------


def by_writers(rule: ByWriter, *given: tuple[str, float | None]) -> tuple[list[str], dict[str, int]]:
    """What a rule makes of responses a, b, c … given as (writer, score)."""
    names = [chr(ord("a") + n) for n in range(len(given))]
    responses = [
        replace(response(f"i-{name}", f"{name} has words of its own: {name * 3}"), writer=writer)
        for name, (writer, _) in zip(names, given, strict=True)
    ]
    known = {f"i-{name}": score for name, (_, score) in zip(names, given, strict=True) if score is not None}
    kept, drops = pick_pairs(rule, responses, known if rule.needs_scores else rule.assumed_scores(responses), 0)
    return [f"{one.response.id[-1]}>{other.response.id[-1]}" for one, other in kept], dict(drops)


def test_by_writer_takes_the_best_of_one_and_the_worst_of_the_other() -> None:
    given = (("self", 3), ("self", 4), ("sft", 1), ("sft", 0), ("sft", 5))
    assert by_writers(ByWriter(), *given) == (["b>d"], {})
    assert by_writers(ByWriter(chosen_from="sft", rejected_from="self"), *given) == (["e>a"], {})


def test_by_writer_drops_a_pair_whose_rejected_response_scores_higher_or_equal() -> None:
    assert by_writers(ByWriter(), ("self", 2), ("sft", 3)) == ([], {"rejected_is_better": 1})
    assert by_writers(ByWriter(), ("self", 2), ("sft", 2)) == ([], {"tie": 1})
    assert by_writers(ByWriter(minimum_margin=1.5), ("self", 2), ("sft", 1)) == ([], {"small_margin": 1})


def test_by_writer_needs_a_judged_response_of_each() -> None:
    assert by_writers(ByWriter(), ("self", 2), ("sft", None)) == ([], {"too_few_judged": 1})
    assert by_writers(ByWriter(), ("self", 2), ("self", 1)) == ([], {"too_few_judged": 1})


def test_by_writer_without_scores_takes_the_first_of_each() -> None:
    rule = ByWriter(chosen_from="demonstration", rejected_from="self", by_score=False)
    assert by_writers(rule, ("self", None), ("self", None), ("demonstration", None)) == (["c>a"], {})
    assert by_writers(rule, ("self", None), ("self", None)) == ([], {"too_few_judged": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rejected_from": "self"}, "pair.chosen_from and pair.rejected_from must differ, got self twice"),
        ({"length_control": 0.1}, "pair.length_control=0.1 has no effect with pair=by_writer"),
        ({"by_score": False, "minimum_margin": 1.0}, "pair.minimum_margin=1.0 has no effect with pair.by_score=false"),
    ],
)
def test_by_writer_refuses_settings_without_effect(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        ByWriter(**settings)


def test_agreement_is_the_share_of_response_pairs_that_two_judges_order_alike() -> None:
    # a>b alike, a>c opposite, b and c tied by one of them: (1 + 0 + ½) / 3. d has one judge only.
    assert agreement({"a": 3, "b": 1, "c": 1}, {"a": 5, "b": 4, "c": 6, "d": 9}) == pytest.approx(0.5)
    assert agreement({"a": 1, "b": 2}, {"a": 10, "b": 20}) == 1
    assert agreement({"a": 1, "b": 2}, {"a": 20, "b": 10}) == 0
    assert agreement({"a": 1, "b": 2}, {"a": 20}) is None
