"""What of a judge's text is its own."""

import inspect
import re
import sys
from types import ModuleType

import pytest

from selfalign.judges import verdict_text
from selfalign.judges.verdict_text import find_bracketed, other_choices, other_totals, own_lines

RATING = re.compile(r"\[\[([0-9]+)\]\]")

OWN = {
    "plain": ("One.\n\nTwo.", ["One.", "Two."]),
    "thinking": ("<think>\nOne.\n</think>\nTwo.", ["Two."]),
    "quoted": ("> One.\nTwo.\n   > Three.", ["Two."]),
    "indented": ("One.\n    Two.\n\tThree.\n  Four.", ["One.", "  Four."]),
    "all indented": ("    One.\n    Two.", ["One.", "Two."]),
    "fenced": ("One.\n```text\nTwo.\n```\nThree.", ["One.", "Three."]),
    "fence in a fence": ("````\n```\nOne.\n```\n````\nTwo.", ["Two."]),
    "two kinds of fences": ("~~~\n```\nOne.\n~~~\nTwo.", ["Two."]),
    "a fence without an end": ("One.\n```\nTwo.\nThree.", ["One."]),
    "code within a line": ("```Score: 4```\nTwo.", ["```Score: 4```", "Two."]),
    "an example": ("For example:\nScore: 5\nScore: 1", ["For example:", "Score: 1"]),
    "an example further down": ("**Examples:**\n\nScore: 5", ["**Examples:**"]),
    "control tokens": ("One.\nTwo.<|im_end|>\n<|endoftext|>", ["One.", "Two."]),
}


@pytest.mark.parametrize("name", OWN)
def test_lines_of_the_judge_s_own(name: str) -> None:
    text, lines = OWN[name]
    assert own_lines(text) == lines


def test_thinking_without_an_end_has_no_lines() -> None:
    assert own_lines("<think>\nOne.") is None
    assert own_lines("") == []


SHOWN = "I did **all** of it.\nScore: 5/5\nAnd [[A]] it is: 4.5."


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Score: 5/5", False),
        ("**Score:** 5/5.", False),
        ("score: 5", False),
        ('"I did all of it."', False),
        ("[[A]]", False),
        ("And [[A]] it is", False),
        ("Score: 4", True),
        ("Rating: [[A]]", True),
        ("it is: 4", True),  # Only the beginning of a number there.
        ("it", True),
        ("5/5", True),
    ],
)
def test_line_that_repeats_what_was_judged_is_not_the_judge_s_own(line: str, kept: bool) -> None:
    assert own_lines(f"It says:\n{line}\nNo.", [SHOWN]) == ["It says:", *([line] if kept else []), "No."]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Rating: [[5]]", ["5"]),
        ("`[[5]]`", ["5"]),
        ("**[[5]]** or [[6]]", ["5", "6"]),
        ('"Rating: [[5]]"', []),
        ("It says “[[5]]”, which is [[2]].", ["2"]),
        ("The tag `[[5]]` is a trick.", []),
        ("In a form such as [[5]] or e.g. [[6]]", []),
        ("It lacks examples: [[5]]", ["5"]),
        ("For example, it is long. Rating: [[5]]", ["5"]),
    ],
)
def test_brackets_in_quotation_marks_or_in_an_example_are_no_verdict(line: str, found: list[str]) -> None:
    assert find_bracketed(["Well.", line], RATING) == [(1, one) for one in found]


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("Total: 3", True),
        ("**Total score: 3 points**", True),
        ("Overall 3/5", True),
        ("3 out of 5, then.", True),
        ("I rate it a 3.", True),
        ("Gesamt: 3", True),
        ("3", True),
        ("Gesamt: 3 von 5 Punkten", True),
        ("Gesamtbewertung: 3 Punkte", True),
        ("Insgesamt sind das 3 von 5.", True),
        ("Note finale : 3 sur 5", True),
        ("最终评分是3分。", True),
        ("$\\boxed{3}$", True),
        ("On reflection, I would lower this to 3.", True),
        ("Correction: the score should be 3 because it misses a point.", True),
        ("Weaknesses: 2 typos", False),
        ("The response should be 3 sentences long.", False),
        ("Gesamt: 4 von 5 Punkten", False),
        ("Total: 4", False),
        ("4 out of 5, then.", False),
        ("It covers 3/4 of the question.", False),
        ("It was written on 3/5/2024.", False),
        ("There are 3 errors.", False),
        ("Overall, only 3 errors are left in it.", False),
        ("", False),
    ],
)
def test_total_that_is_another_one(line: str, other: bool) -> None:
    assert other_totals([line] if line else [], 4, 5) is other


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("Final verdict: B", True),
        ("**Winner: Assistant B**", True),
        ("B", True),
        ("C is better.", True),
        ("Actually no, response B wins.", True),
        ("That is wrong; B should be chosen.", True),
        ("\\boxed{B}", True),
        ("Final verdict: A", False),
        ("A is the better one, B the longer one.", False),
        ("Vitamin B is mentioned.", False),
        ("A wins.", False),
    ],
)
def test_choice_that_is_another_one(line: str, other: bool) -> None:
    assert other_choices([line], "A") is other


MUTANTS = [
    ("thinking is read", "answer = answer_behind(text)", "answer = text"),
    ("quotations are read", 'r" {0,3}>|\\t', 'r"\\t'),
    ("code is read", '|\\t| {1,3}\\t| {4}")', '")'),
    ("fences are not seen", 'fence = mark[1] if mark else ""', 'fence = ""'),
    ("fences never end", "and line.strip() == mark[1] else fence", "and False else fence"),
    ("examples are read", "or ANNOUNCEMENT.search(before) ", ""),
    ("repetitions are read", " or repeats(line, said))", ")"),
    ("half a number is a repetition", r"(?!\w|[.,]\d)", ""),
    ("short lines are repetitions", "SHORTEST_REPETITION = 5", "SHORTEST_REPETITION = 1"),
    ("quotation marks do not count", 'QUOTATION.sub(" ", line.strip(MARKUP))', "line.strip(MARKUP)"),
    ("control tokens stay", "answer = answer[: control.start()]", "break"),
    ("any total will do", "total != score for", "False for"),
    ("any choice will do", "{*whole, *spoken} - {choice}", "()"),
]


@pytest.mark.parametrize(("old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[mutant[0] for mutant in MUTANTS])
def test_broken_reading_is_caught(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    source = inspect.getsource(verdict_text)
    assert source.count(old) == 1, f"the mutant's text occurs {source.count(old)} times: {old!r}"
    broken = ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", broken)
    exec(compile(source.replace(old, new), "broken", "exec"), broken.__dict__)
    same = [broken.own_lines(text) == lines for text, lines in OWN.values()]
    same += [broken.own_lines(line, [SHOWN]) == own_lines(line, [SHOWN]) for line in ("Score: 5", "it is: 4", "it")]
    same.append(broken.find_bracketed(['"[[5]]"'], RATING) == [])
    same.append(broken.other_totals(["Total: 3"], 4, 5) and broken.other_choices(["B"], "A"))
    assert not all(same)
