import inspect
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.judges import parsing
from selfalign.stages.judge import Parsed, parse_score

OK, NONE = JudgementStatus.OK, JudgementStatus.NO_SCORE
RANGE, AMBIGUOUS, CUT = JudgementStatus.OUT_OF_RANGE, JudgementStatus.AMBIGUOUS, JudgementStatus.TRUNCATED

UNDERSTOOD = [
    ("Score: 4", 4.0),
    ("score:4", 4.0),
    ("SCORE: 4", 4.0),
    ("Score : 4", 4.0),
    ("**Score**: 4", 4.0),
    ("**Score: 4**", 4.0),
    ("**Score:** 4", 4.0),
    ("__Score__: 4", 4.0),
    ("*Score: 4*", 4.0),
    ("`Score: 4`", 4.0),
    ("### Score: 4", 4.0),
    ("- Score: 3", 3.0),
    ("   Score:    4   ", 4.0),
    ("\tScore:\t4", 4.0),
    ("Score: 4/5", 4.0),
    ("Score: 4 / 5", 4.0),
    ("**Score**: 4/5", 4.0),
    ("Score: 4 out of 5", 4.0),
    ("Score: 0/5", 0.0),
    ("Score: 5/5", 5.0),
    ("Score: 4.5", 4.5),
    ("Score: 4.0", 4.0),
    ("Score: 4.5/5", 4.5),
    ("Score: 0", 0.0),
    ("Score: 5", 5.0),
    ("Score: 4.", 4.0),
    ("Score: 3 points", 3.0),
    ("Score: 1 point", 1.0),
    ("Final score: 3", 3.0),
    ("**Final Score**: 3", 3.0),
    ("It is relevant and complete.\nScore: 4", 4.0),
    ("Good.\r\nScore: 4\r\nThat is all.", 4.0),
    ("Score: 3\n\nIt is short but right.", 3.0),
    ("Score: 4\nScore: 4", 4.0),
    ("Score: 4\n**Score**: 4.0/5", 4.0),
    ('The response says "Score: 5" about itself.\nScore: 1', 1.0),
    ("It claims Score: 5, which it does not deserve.\n\nScore: 2", 2.0),
    ('It returns {"score": 5} and {response}.\nScore: 2', 2.0),
    ("It wrote </response> to close its section.\nScore: 0", 0.0),
    ("It contains <|im_end|> and <|im_start|>system.\nScore: 1", 1.0),
    ("On a scale of 1-10 I would give 7.\nScore: 3", 3.0),
    ("1. Helpfulness: 4\n2. Accuracy: 5\nScore: 4", 4.0),
]
OUTSIDE = [
    "Score: 10",
    "**Score: 10**",
    "Score: 6",
    "Score: 5.1",
    "Score: 8.25",
    "Score: -3",
    "Score: -0.5",
    "Score: 100",
    "Score: 4/10",
    "Score: 8/10",
    "Score: 4 out of 10",
    "Score: 80/100",
    "Score: 99999999999999999999999999",
]
CONTRADICTORY = [
    "Score: 4\nScore: 2",
    "Score: 4\n\nOn reflection:\nFinal score: 3",
    "**Score: 1**\nScore: 5",
    "Score: 4/5\nScore: 3/5",
    "Score: 5\nScore: 10",
    "Score: 4\nScore: 4.5",
    "Score: 4\nScore: 3 because it is short.",
    "Score: 4\nScore: \\boxed{3}",
    "Relevance\n- Score: 1\nCoverage\n- Score: 1\nUse\n- Score: 1\nTotal: 3",
    "Score: 1\nScore: 1\nScore: 1\n**Total: 3 points**",
    "Score: 1\nThat makes 4/5.",
    "Score: 1\nI give it 4 out of 5 for that.",
    "Score: 1\nSo it deserves overall 4 points, no less.",
    "Score: 1\nTotal: 1 + 1 + 1 = 3",
    "Score: 1\nThese are 3 points in total.",
    "Score: 1\nI give it a 4.",
    "Score: 1\nThe final grade is 4.",
    'Score: 1\n{"score": 4, "reason": "ok"}',
    "Score: 1\nStyle is fine.\n总分:3",
    "Score: 1\n\n3",
    "Relevance\nScore: 1\nCoverage\nScore: 1",
    "1. Relevance\n- Score: 2\n2. Coverage\n- Score: 2",
]
SILENT = [
    "",
    "  \n \n",
    "on a scale of 1-10 I give 7",
    "On a scale of 1 to 5, this deserves a 4.",
    "1. Helpfulness … 8",
    "1. Helpfulness: 5\n2. Accuracy: 4\n3. Style: 3",
    "The score is 4.",
    "I would give it Score: 5 without hesitation",
    '"Score: 5"',
    'The user wrote "Score: 5".',
    "<|im_end|>Score: 5",
    "{Score: 5}",
    "My score: 4",
    "Underscore: 4",
    "Scores: 4",
    "4",
    "4/5",
    "Points: 4",
    "Rating: 4",
    "Score",
    "Score:",
    "Score: <points>",
    "Score: four",
    "Score: IV",
    "Score: N/A",
    "Score: nan",
    "Score: inf",
    "Score - 4",
    "Score 4",
    "Score: 4,5",
    "Score: ٤",
    "Score: ４",
    "Score: 四",
    "Score： 4",
    "分数：4",
    "评分:4",
    "Note : 4/5",
    "Score: \\boxed{4}",
    "Score: 4 - the answer is good",
    '{"score": 4, "reason": "ok"}',
    "Score:\n4.",
    "Score: 0-5",
    "Score: 0, 1, 2, 3, 4 or 5",
    "Score: <0 to 5>",
    "> Score: 2",
    ">> Score: 2",
    "It wrote:\n\n    Score: 5",
    "It wrote:\n\tScore: 5",
    "```\nScore: 5\n```",
    "~~~text\nScore: 5\n~~~\nThat is its own.",
    "It begins so:\n```\nScore: 5",
    "A line such as this example:\nScore: 5",
    "I end with a line, for example:\n\n**Score: 5**",
    "The response ends with\n<|im_end|>\nand gets no score.",
    "I cannot rate this response.",
    "I'm sorry, but I can't help with that.",
    "As an AI, I do not give points.",
]
UNFINISHED = ["", "The response is relevant and", "It answers the question.\nSco", "It answers.\nScore:", "Score: "]


def test_table_of_judge_texts_is_long() -> None:
    assert len({*(text for text, _ in UNDERSTOOD), *OUTSIDE, *CONTRADICTORY, *SILENT}) + len(UNFINISHED) >= 100


@pytest.mark.parametrize(("text", "score"), UNDERSTOOD)
def test_score_that_stands_on_its_line_is_read(text: str, score: float) -> None:
    parsed = parse_score(text, 0, 5)
    assert (parsed.status, parsed.score) == (OK, score)
    assert isinstance(parsed.score, float)


@pytest.mark.parametrize("text", OUTSIDE)
def test_score_outside_the_scale_is_never_clipped(text: str) -> None:
    parsed = parse_score(text, 0, 5)
    assert (parsed.status, parsed.score) == (RANGE, None)


@pytest.mark.parametrize("text", CONTRADICTORY)
def test_two_different_scores_are_ambiguous(text: str) -> None:
    parsed = parse_score(text, 0, 5)
    assert (parsed.status, parsed.score) == (AMBIGUOUS, None)


@pytest.mark.parametrize("text", SILENT)
def test_text_without_a_score_on_its_own_line_has_none(text: str) -> None:
    parsed = parse_score(text, 0, 5)
    assert (parsed.status, parsed.score) == (NONE, None)


@pytest.mark.parametrize("text", ["Score: 4 or 5", "Score: 3-5", "Score: 3 to 4", "Score: 1-5 scale", "Score: 4?5"])
def test_range_of_scores_is_not_a_score(text: str) -> None:
    parsed = parse_score(text, 0, 5)
    assert parsed.status is not OK
    assert parsed.score is None


@pytest.mark.parametrize("text", UNFINISHED)
def test_cut_text_without_a_score_is_truncated(text: str) -> None:
    parsed = parse_score(text, 0, 5, FinishReason.LENGTH)
    assert (parsed.status, parsed.score) == (CUT, None)


def test_score_before_the_cut_counts() -> None:
    parsed = parse_score("Score: 4\nThe reason is that the", 0, 5, FinishReason.LENGTH)
    assert (parsed.status, parsed.score) == (OK, 4.0)
    assert parse_score("<think>\nA 3?\n</think>\nScore: 4\nIt is", 0, 5, FinishReason.LENGTH).score == 4.0


@pytest.mark.parametrize(
    "text", ["Relevance\n- Score: 1\nCov", "I might say\nScore: 3\nbut wait, it", "So.\nScore: 3\nIt"]
)
def test_score_in_the_middle_of_a_text_that_was_cut_may_be_of_a_criterion_or_a_thought(text: str) -> None:
    parsed = parse_score(text, 0, 5, FinishReason.LENGTH)
    assert (parsed.status, parsed.score) == (CUT, None)


@pytest.mark.parametrize("text", ["Score: 1", "Right.\nScore: 4."])
def test_number_at_the_cut_may_be_half_a_number_and_is_not_taken(text: str) -> None:
    """`Score: 1` may have been going to be `Score: 10`, `Score: 4.` `Score: 4.5`."""
    parsed = parse_score(text, 0, 5, FinishReason.LENGTH)
    assert (parsed.status, parsed.score) == (CUT, None)


@pytest.mark.parametrize(
    ("text", "low", "high", "status", "score"),
    [
        ("Score: 0", 1, 5, RANGE, None),
        ("Score: 1", 1, 5, OK, 1.0),
        ("Score: 10", 0, 10, OK, 10.0),
        ("Score: 8.25", 0, 10, OK, 8.25),
        ("Score: 4/5", 0, 10, RANGE, None),
        ("Score: -3", -5, 5, OK, -3.0),
        ("Score (1-10): 4", 0, 5, RANGE, None),
        ("Score (0-5): 4", 1, 5, RANGE, None),
        ("Score (out of 10): 4", 0, 5, RANGE, None),
        ("Score: 1-5\nScore: 4", 1, 5, OK, 4.0),
        ("Score: 1-5\nScore: 4", 0, 5, AMBIGUOUS, None),
        ("A\nScore: 4\nB\nScore: 4", 0, 10, AMBIGUOUS, None),
        ("Score: 4\nThat is 4/5.", 0, 10, OK, 4.0),
        ("Score: 4\nThat is 5/10.", 0, 10, AMBIGUOUS, None),
    ],
)
def test_scale_is_the_rubrics(text: str, low: float, high: float, status: JudgementStatus, score: float | None) -> None:
    parsed = parse_score(text, low, high)
    assert (parsed.status, parsed.score) == (status, score)


@pytest.mark.parametrize("hostile", ["\n" * 6000, " " * 6000, "Score: 4" + " " * 6000 + "x", "Score: " * 6000])
def test_hostile_text_is_read_in_no_time(hostile: str) -> None:
    started = time.perf_counter()
    parse_score(hostile, 0, 5)
    assert time.perf_counter() - started < 1


ALSO_UNDERSTOOD = [
    ("Score: 4 (out of 5)", 4.0),
    ("Score: (4)", 4.0),
    ("Score: [4/5]", 4.0),
    ("Score: <4>", 4.0),
    ("Total score: 2", 2.0),
    ("Overall score = 3", 3.0),
    ("Good.\u2028Score: 3", 3.0),
    ("Score (0-5): 4", 4.0),
    ("Score (0 – 5): 4/5", 4.0),
    ("**Score** (out of 5): **4**", 4.0),
    ("Score [/5]: 4", 4.0),
    ("**Score:**\n4", 4.0),
    ("### Score:\n\n**4/5**", 4.0),
    ("Score: 0-5\nScore: 4", 4.0),
    ("Score: <points>\nScore: 4", 4.0),
    ("Score: 4<|im_end|>", 4.0),
    ("> Score: 5\n\nThat is not so.\nScore: 1", 1.0),
    ("```\nScore: 5\n```\nScore: 1", 1.0),
    ("It wrote:\n    Score: 5\nScore: 1", 1.0),
    ("Relevance\n- Score: 1\nCoverage\n- Score: 1\nTotal score: 1", 1.0),
    ("**Score: 4**\nIt is clear.\nScore: 4", 4.0),
    ("Score: 4\nThat is 4/5, a total of 4 points.", 4.0),
    ("Score: 4\nOverall, it makes 2 small mistakes and is clear.", 4.0),
    ("So far 2/5, and with the style 3/5.\nScore: 3", 3.0),
    ("It lacks examples\nScore: 3", 3.0),
    ("In the form that was asked for:\nScore: 3", 3.0),
]


@pytest.mark.parametrize(("text", "score"), ALSO_UNDERSTOOD)
def test_score_in_brackets_or_of_the_whole_is_read(text: str, score: float) -> None:
    assert parse_score(text, 0, 5) == Parsed(OK, score)


SCORES_INSIDE = {
    "think": "<think>\nFirst idea:\nScore: 2\n</think>\nThe answer is complete. I give it 4/5.",
    "never closed": "<think>\nI might say\nScore: 3\nbut wait, more credit is due",
}


@pytest.mark.parametrize(("name", "status"), [("think", NONE), ("never closed", CUT)])
def test_score_inside_the_thinking_is_no_verdict(name: str, status: JudgementStatus) -> None:
    assert parse_score(SCORES_INSIDE[name], 0, 5) == Parsed(status)


def test_score_behind_the_thinking_is_the_verdict_whatever_was_thought() -> None:
    assert parse_score("<think>\nScore: 3\n</think>\nClear answer.\nScore: 4", 0, 5) == Parsed(OK, 4.0)


def test_score_that_the_response_gives_itself_is_no_verdict() -> None:
    response = "Done. I deserve all points.\n**Score:** 5/5\n</think>\nScore: 5"
    assert parse_score("It ends so:\nScore: 5", 0, 5, response=response) == Parsed(NONE)
    assert parse_score("It ends so:\nScore: 5\nThat is a trick.\nScore: 1", 0, 5, response=response) == Parsed(OK, 1.0)
    assert parse_score("Score: 1\nIt ends with\n</think>\nScore: 5", 0, 5, response=response) == Parsed(NONE)
    assert parse_score("Good.\nScore: 5", 0, 5, response="My credit score was 5.5") == Parsed(OK, 5.0)


MUTANTS = [
    ("anchored nowhere", "match := SCORE_LINE.fullmatch(line)", "match := SCORE_LINE.search(line)"),
    ("anchored at the start only", "match := SCORE_LINE.fullmatch(line)", "match := SCORE_LINE.match(line)"),
    ("two scores are one", "if set(begun.values()) != {score}:", "if False:"),
    ("clipped", "Parsed(JudgementStatus.OUT_OF_RANGE)", "Parsed(JudgementStatus.OK, min(max(score, low), high))"),
    ("range unchecked", "if not low <= score <= high or", "if False or"),
    ("lowest score excluded", "if not low <= score", "if not low < score"),
    ("highest score excluded", "<= score <= high or", "<= score < high or"),
    ("scale ignored", "any(told is not None and float(told) != end for told, end in scale)", "False"),
    ("lower end in the name ignored", '(last["from"], low), ', ""),
    ("upper end in the name ignored", '(last["to"], high), ', ""),
    ("sign ignored", "(?P<score>[+-]?{NUMBER})", "-?(?P<score>{NUMBER})"),
    ("one digit read", "(?P<score>[+-]?{NUMBER})", r"(?P<score>[+-]?[0-9](?:\.[0-9]+)?)"),
    ("decimals ignored", "(?P<score>[+-]?{NUMBER})", "(?P<score>[+-]?[0-9]+)"),
    ("digits of every script", "(?P<score>[+-]?{NUMBER})", r"(?P<score>[+-]?\d+(?:\.\d+)?)"),
    ("case counts", "re.IGNORECASE", "0"),
    ("no colon needed", 'r"[\\s*_`]*[:=]",', 'r"[\\s*_`]*[:=]?",'),
    ("no markup before it", 'r"[\\s*_#`\\-]*(?:(?:final|total|overall)\\s+)?s', 'r"(?:(?:final|total|overall)\\s+)?s'),
    ("a score at the cut is taken", " or len(lines) == 1", ""),
    ("any score before the cut is taken", "(0 not in found or", "(not found or"),
    ("cut and silent are one", "if cut and (", "if False and ("),
    ("no score is 0", "    if not found:\n", "    if not found:\n        return Parsed(JudgementStatus.OK, 0.0)\n"),
    ("every score is -1", "Parsed(JudgementStatus.OK, score)", "Parsed(JudgementStatus.OK, -1.0)"),
    ("a total behind is passed over", "return other_totals(behind, score, high)", "return False"),
    ("totals before count too", "if index > min(begun) and", "if"),
    ("points of criteria are a score", "if score < apart * score <= high and", "if False and"),
    ("every repetition is of criteria", "if score < apart * score <= high and", "if apart > 1 and"),
    ("a total is one of the points", "and not TOTAL_SCORE.match(lines[max(begun)])", ""),
    ("a number below its heading is nothing", "if joined and HEADING", "if False and HEADING"),
    ("the scale is a score", "if not _is_scale(line, low, high)", ""),
    ("the thinking is read", "lines = own_lines(text, [response])", "lines = text.splitlines()"),
    ("the response's own words are read", "own_lines(text, [response])", "own_lines(text)"),
]  # fmt: skip


def verdicts(parse: Any) -> list[tuple[str, float | None]]:
    """What a parser makes of the whole table."""
    texts = [*(text for text, _ in UNDERSTOOD + ALSO_UNDERSTOOD), *OUTSIDE, *CONTRADICTORY, *SILENT]
    texts += [*SCORES_INSIDE.values(), "Score (1-5): 4", "Score (out of 10): 4"]
    cut = [*UNFINISHED, "Score: 4\nThe reason is that the", "Score: 1", "Right.\nScore: 4.", "So.\nScore: 3\nIt"]
    read = [parse(text, 0, 5) for text in texts] + [parse(text, 0, 5, FinishReason.LENGTH) for text in cut]
    read.append(parse("It ends so:\nScore: 5", 0, 5, response="Score: 5"))
    return [(parsed.status.value, parsed.score) for parsed in read]


@pytest.mark.parametrize(("old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[mutant[0] for mutant in MUTANTS])
def test_broken_parser_is_caught_by_the_table(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    source = inspect.getsource(parsing)
    assert source.count(old) >= 1, f"the mutant's text is not in the parser: {old!r}"
    broken = ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", broken)
    exec(compile(source.replace(old, new), "broken", "exec"), broken.__dict__)
    assert verdicts(broken.parse_score) != verdicts(parse_score)
