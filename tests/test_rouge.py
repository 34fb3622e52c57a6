import random
from fractions import Fraction

import pytest

from selfalign.data.rouge import RougeIndex, rouge_l
from selfalign.data.text_filters import words_of


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """By the textbook's table."""
    row = [0] * (len(b) + 1)
    for word in a:
        above = row
        row = [0]
        for place, other in enumerate(b):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[-1]))
    return row[-1]


def plain(a: list[str], b: list[str]) -> Fraction:
    """The definition: F1 of LCS / length and LCS / length."""
    common = longest_common_subsequence(a, b)
    if not common:
        return Fraction(0)
    precision, recall = Fraction(common, len(a)), Fraction(common, len(b))
    return 2 * precision * recall / (precision + recall)


def drawn(draw: random.Random, alphabet: str, longest: int) -> list[str]:
    return [draw.choice(alphabet) for _ in range(draw.randint(1, longest))]


def test_case_worked_by_hand() -> None:
    a, b = words_of("The cat sat on the mat."), words_of("The mat the cat was on")
    assert longest_common_subsequence(a, b) == 3  # the cat … on; 2·3 / (6 + 6)
    assert rouge_l(a, b) == rouge_l(b, a) == 0.5


def test_rouge_is_the_plain_definition_on_random_texts() -> None:
    draw = random.Random(0)
    values = set()
    for _ in range(2000):
        a, b = drawn(draw, "abcdefgh", 12), drawn(draw, "abcdefgh", 12)
        assert rouge_l(a, b) == float(plain(a, b))
        values.add(plain(a, b))
    assert len(values) > 50


@pytest.mark.parametrize("alphabet", ["ab", "abcdefgh", "".join(map(chr, range(0x4E00, 0x4E00 + 300)))])
def test_highest_is_the_plain_maximum_over_all_known(alphabet: str) -> None:
    draw = random.Random(1)
    texts = [drawn(draw, alphabet, 30) for _ in range(150)]
    known = RougeIndex()
    for words in texts:
        known.add(words)
    for _ in range(40):
        words = drawn(draw, alphabet + "xyz", 30)
        assert known.highest(words) == float(max(plain(words, other) for other in texts))
        assert (words in known) == (words in texts)


def test_highest_reaches_a_threshold_exactly_where_the_fraction_does() -> None:
    for threshold in ("0.7", "0.55", "0.9", "0.35"):
        for total in range(2, 60):
            for common in range(1, total // 2 + 1):
                a = [f"w{n}" for n in range(common)]
                b = a + ["x"] * (total - 2 * common)
                known = RougeIndex.of([" ".join(b)])
                assert (known.highest(a) >= float(threshold)) == (Fraction(2 * common, total) >= Fraction(threshold))


def test_words_that_no_known_text_has_match_nothing() -> None:
    known = RougeIndex.of(["one two three"])
    assert known.highest(["four", "five"]) == 0
    assert known.highest(["four", "two", "five"]) == pytest.approx(1 / 3)
    assert ["four", "five"] not in known
    known.add(["four", "five"])
    assert known.highest(["five", "six"]) == 0.5
    assert known.highest(["six", "six"]) == 0


def test_nothing_known_is_no_overlap() -> None:
    assert RougeIndex().highest(["one"]) == 0
    assert ["one"] not in RougeIndex()


def test_more_words_than_a_small_alphabet_has_stay_apart() -> None:
    words = [f"w{n}" for n in range(70_000)]
    known = RougeIndex()
    known.add(words)
    for start in (0, 0xD7F0, 0xFFF0, 69_990):
        assert known.highest(words[start : start + 10]) == rouge_l(words[start : start + 10], words)
    assert known.highest(["w70000"]) == 0
