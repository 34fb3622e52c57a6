from pathlib import Path
from typing import Any

import pytest
from builders import RUBRIC, demonstration, policy_artifact, records_artifact, workspace
from mutation import mutated

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Demonstration, Judgement, JudgementStatus, RankedAnswers
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages import evaluation_fine_tuning as module
from selfalign.stages.judge import SampledScore, parse_score

JUDGE = SampledScore(prompt=RUBRIC)
Texts = dict[str, list[str]]
"""{response id: what the baseline wrote of it}."""


def question(name: str, *ranks: int) -> RankedAnswers:
    texts = [f"Answer {name}-{n}" for n in range(1, len(ranks) + 1)]
    return RankedAnswers(
        id=name, instruction=f"{name}?", texts=texts, ranks=list(ranks), scores=[], justifications=[""] * len(ranks)
    )


def said(score: object) -> str:
    return f"For a reason.\nScore: {score}"


def judged(texts: Texts, model: str) -> list[Judgement]:
    """Judgements as the judge stage parses them."""
    found = []
    for name, written in texts.items():
        for n, text in enumerate(written, start=1):
            parsed = parse_score(text, 0, 5)
            found.append(
                Judgement(
                    id=f"{name}-{n}", response_id=name, status=parsed.status, score=parsed.score, text=text, model=model
                )
            )
    return found


def taught(
    folder: Path,
    policy: PolicyCheckpoint,
    questions: list[RankedAnswers],
    texts: Texts,
    *,
    ratio: float = 1.0,
    stage: Any = module,
    model: str = "",
) -> tuple[dict[str, Any], list[Demonstration]]:
    """Runs the stage; returns its counts and the EFT examples."""
    ift = [demonstration("i", "Name a bird.")]
    counts = stage.evaluation_fine_tuning(
        workspace(folder / "out"),
        judge=JUDGE,
        policy=policy_artifact(policy),
        seeds=records_artifact(folder / "seeds", demonstrations=ift),
        questions=records_artifact(folder / "questions", ranked=questions),
        judgements=records_artifact(folder / "judged", judgements=judged(texts, model or policy.digest)),
        max_score_imbalance=ratio,
    )
    first, *examples = read_records(folder / "out/demonstrations.jsonl", Demonstration)
    assert first == ift[0]
    assert (counts["ift"], counts["eft"]) == (1, len(examples))
    return counts, examples


QUESTIONS = [question("a", 1, 2, 3), question("b", 2, 1), question("c", 1, 2), question("d", 1, 2), question("e", 1, 2)]
WRITTEN = {
    # In order at once; in order in the second draw; the wrong way round; a tie; one answer without any score.
    "a-1": [said(5)], "a-2": [said(3)], "a-3": [said(0)],
    "b-1": [said(4), said(1)], "b-2": [said(4), said(2)],
    "c-1": [said(1)], "c-2": [said(5)],
    "d-1": [said(4)], "d-2": [said(4)],
    "e-1": ["I like it.", "Very good."], "e-2": [said(2), said(3)],
}  # fmt: skip


def check_order(folder: Path, policy: PolicyCheckpoint, stage: Any = module) -> None:
    """Only questions in the humans' order are taught, each with one judgement an answer, as it was written."""
    counts, examples = taught(folder, policy, QUESTIONS, WRITTEN, stage=stage)
    assert [(d.question, d.response) for d in examples] == [
        ("a", said(5)), ("a", said(3)), ("a", said(0)), ("b", said(1)), ("b", said(2)),
    ]  # fmt: skip
    assert [d.prompt for d in examples[:2]] == [JUDGE.ask("a?", "Answer a-1"), JUDGE.ask("a?", "Answer a-2")]
    assert {(d.source, d.prefill) for d in examples} == {("eft", "")}
    assert counts["dropped"] == {"questions_in_other_order": 2, "questions_without_scores": 1}
    assert (counts["questions"], counts["questions_agreeing"]) == (5, 2)
    assert (counts["judgements"], counts["judgements_scored"]) == (15, 13)


FOURS = {
    "a-1": [said(5)], "a-2": [said(4)], "a-3": [said(3)], "b-1": [said(1)], "b-2": [said(4)],
    "c-1": [said(4)], "c-2": [said(3)], "d-1": [said(4)], "d-2": [said(2)], "e-1": [said(4)], "e-2": [said(0)],
}  # fmt: skip


def check_thinning(folder: Path, policy: PolicyCheckpoint, stage: Any = module) -> None:
    """Five fours and two threes: the fours are thinned to the ratio, nothing else is touched."""
    for ratio, fours in ((1.0, 2), (1.5, 3), (2.5, 5), (100.0, 5)):
        counts, examples = taught(folder / str(ratio), policy, QUESTIONS, FOURS, ratio=ratio, stage=stage)
        scores = sorted(int(d.response[-1]) for d in examples)
        assert scores == [0, 1, 2, 3, 3, *[4] * fours, 5]
        assert counts["dropped"] == ({"examples_of_most_common_score": 5 - fours} if fours < 5 else {})
        assert counts["questions_agreeing"] == 5


def check_form(folder: Path, policy: PolicyCheckpoint, stage: Any = module) -> None:
    """A judgement that does not end with its score as the rubric asks is not taught, though it can be read."""
    texts = {
        "a-1": ["Score: 5\nand then he went on", "Good.\nScore: 4/5", said(4)],
        "a-2": [said("3.5"), "**Score: 3**", said(3)],
        "a-3": [said(1)],
    }
    counts, examples = taught(folder, policy, [question("a", 1, 2, 3)], texts, stage=stage)
    assert [d.response for d in examples] == [said(4), said(3), said(1)]
    assert counts["dropped"] == {"judgements_in_other_form": 4}
    assert counts["judgements_scored"] == 7


def check_model(folder: Path, policy: PolicyCheckpoint, stage: Any = module) -> None:
    """Judgements of another model than the baseline are refused."""
    with pytest.raises(SelfalignError, match=r"judgements by \['M1'\]; the SFT baseline must have written"):
        taught(folder, policy, QUESTIONS, WRITTEN, stage=stage, model="M1")


CHECKS = (check_order, check_thinning, check_form, check_model)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_eft_by_the_baseline(tmp_path: Path, tiny_policy: PolicyCheckpoint, check: Any) -> None:
    check(tmp_path, tiny_policy)


def test_order_of_the_file_does_not_decide_what_is_thinned(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, given = taught(tmp_path / "given", tiny_policy, QUESTIONS, FOURS)
    _, turned = taught(tmp_path / "turned", tiny_policy, QUESTIONS[::-1], FOURS)
    assert {d.id for d in given} == {d.id for d in turned}


def test_every_example_is_understood_by_the_judges_own_parser(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, examples = taught(tmp_path, tiny_policy, QUESTIONS, WRITTEN)
    assert {parse_score(d.response, 0, 5).status for d in examples} == {JudgementStatus.OK}


def test_baseline_that_agrees_on_nothing_stops_with_the_counts(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with pytest.raises(
        SelfalignError,
        match=r"judged none of 2 questions in the humans' order .*'questions_in_other_order': 2.*judge\.num_samples",
    ):
        taught(tmp_path, tiny_policy, QUESTIONS[2:4], {n: WRITTEN[n] for n in ("c-1", "c-2", "d-1", "d-2")})


MUTANTS = [
    ("order not checked", "if in_order(question.ranks, [score for score, _ in draw]):", "if True:"),
    ("ties agree", "better > worse", "better >= worse"),
    ("order the wrong way round", "better > worse", "better < worse"),
    ("only neighbours in the file compared", "sorted(zip(ranks, scores, strict=True))", "zip(ranks, scores)"),
    ("first draw alone", "for draw in draws:", "for draw in draws[:1]:"),
    ("nothing thinned", "kept = thin(targets, max_score_imbalance)", "kept = targets"),
    ("thinned without the ratio", "int(ratio * second_count)", "second_count"),
    (
        "the second most common thinned",
        "(most_common, count), (_, second_count) = counts",
        "(_, second_count), (most_common, count) = counts",
    ),
    ("any form taught", 'judgement.text.splitlines()[-1].strip() != judge.answer(int(judgement.score), "")', "False"),
    ("model not checked", "if others := {judgement.model for", "if others := set() and {judgement.model for"),
    ("prompts of the wrong answer", "question.texts[number - 1]", "question.texts[-number]"),
]


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(tmp_path: Path, tiny_policy: PolicyCheckpoint, old: str, new: str) -> None:
    failures = []
    with mutated(module, old, new) as copy:
        for check in CHECKS:
            try:
                check(tmp_path / check.__name__, tiny_policy, copy)
            except (AssertionError, SelfalignError, pytest.fail.Exception):
                failures.append(check.__name__)
    assert failures
