import math

import pytest
from builders import loaded

from selfalign.benchmarks.rating import HIGH, LOW, OPENING, RatingTokens, expected_rating, parse_rating
from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.data.turns import as_prompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt

SAID = {
    "Good.\nRating: [[7]]": 7.0,
    "[[10]]": 10.0,
    "Rating: [[4.5]], that is [[4.5]].": 4.5,
    "Rating: 7": "no_score",
    "Rating: [7]": "no_score",
    "": "no_score",
    "[[seven]]": "no_score",
    "[[٧]]": "no_score",
    "[[-3]]": "no_score",
    "Either [[3]] or [[8]].": "ambiguous",
    "[[11]]": "out_of_range",
    "[[0]]": "out_of_range",
    "[[100]] out of [[100]]": "out_of_range",
    "<think>[[3]]</think>\nRating: [[7]]": 7.0,
    "<think>[[3]]</think>\nI give it 7/10.": "no_score",
    "<think>\nMaybe [[3]], but": "truncated",
    "> Rating: [[10]]\n\nNo. [[2]]": 2.0,
    'I rate in the form "Rating: [[5]]".\nRating: [[7]]': 7.0,
    'I rate in the form "Rating: [[5]]".': "no_score",
    "For example: [[5]]": "no_score",
    "`[[7]]`": 7.0,
    "Help: [[1]]\nDepth: [[1]]\nTotal: 2": "ambiguous",
    "Rating: [[7]]\nOverall it is an 8/10.": "ambiguous",
    "Rating: [[7]]\nThat is 7/10, with 2 errors.": 7.0,
}


@pytest.mark.parametrize("text", SAID)
def test_rating_is_read_strictly_and_a_failure_is_no_number(text: str) -> None:
    grade = parse_rating(text)
    expected = SAID[text]
    assert (grade.score if isinstance(expected, float) else grade.status.value) == expected
    assert (grade.score is None) == (grade.status is not JudgementStatus.OK)
    assert grade.text == text


def test_missing_rating_has_the_reason_why_the_text_ended() -> None:
    assert parse_rating("It is", FinishReason.LENGTH).status is JudgementStatus.TRUNCATED
    assert parse_rating("", FinishReason.PROMPT_TOO_LONG).status is JudgementStatus.PROMPT_TOO_LONG
    assert parse_rating("[[6]] because", FinishReason.LENGTH).score == 6
    assert parse_rating("It may be a [[6]], but", FinishReason.LENGTH).status is JudgementStatus.TRUNCATED
    assert parse_rating("status 400: [[6]]", FinishReason.REFUSED).status is JudgementStatus.REFUSED


def test_rating_that_an_answer_gives_itself_is_none() -> None:
    assert parse_rating("It ends so:\nRating: [[10]]", shown=["Fine.\nRating: [[10]]"]).score is None
    assert parse_rating("It ends so:\nRating: [[10]]\nRating: [[2]]", shown=["Rating: [[10]]"]).score == 2


def logs(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


def test_share_of_what_begins_with_one_is_divided_between_one_and_ten() -> None:
    tokens = RatingTokens(alternatives=[*range(9), 20, 21], one=[0])
    # 1… has 0.5 of the digits' mass 0.8; behind a 1, 0 is three times as likely as the end.
    digits = [0.4, 0.0875, *[0.0375] * 6, 0.0875]
    assert sum(digits) == pytest.approx(0.8)
    shares = tokens.shares([logs(*digits, 0.01, 0.01), logs(*[0.001] * 9, 0.6, 0.2)])
    assert len(shares) == HIGH - LOW + 1
    assert sum(shares) == pytest.approx(1)
    assert (shares[0], shares[-1]) == (pytest.approx(0.125), pytest.approx(0.375))
    assert shares[1] == pytest.approx(0.0875 / 0.8)
    # 1·0.125 + 10·0.375 + (2 + 9)·0.109375 + (3 + … + 8)·0.046875
    grade = expected_rating(shares)
    assert grade.score == pytest.approx(0.125 + 3.75 + 11 * 0.109375 + 33 * 0.046875)
    assert grade.text == f"Rating: [[{grade.score:.2f}]]"


def test_ten_as_one_token_needs_no_second_look() -> None:
    shares = RatingTokens(alternatives=list(range(10)), one=[]).shares([logs(*[0.02] * 9, 0.06)])
    assert shares == pytest.approx([1 / 12] * 9 + [1 / 4])
    assert expected_rating([0.0] * 9 + [1.0]).score == 10


def test_tokens_are_those_a_judge_would_write(tiny_policy: PolicyCheckpoint) -> None:
    policy = loaded(tiny_policy.path)
    tokens = RatingTokens.of(policy.tokenizer)
    start = encode_prompt(policy.tokenizer, as_prompt("x"), OPENING)
    for number in range(LOW, HIGH):
        written = encode_prompt(policy.tokenizer, as_prompt("x"), f"{OPENING}{number}]]")
        assert written[: len(start) + 1] == [*start, tokens.alternatives[number - 1]]
    ten, one = (encode_prompt(policy.tokenizer, as_prompt("x"), f"{OPENING}{n}]]") for n in (10, 1))
    assert ten[len(start) : len(start) + 2] == [tokens.one[0], tokens.alternatives[-2]]
    assert one[len(start) : len(start) + 2] == [tokens.one[0], tokens.alternatives[-1]]
