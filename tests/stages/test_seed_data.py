import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from builders import RUBRIC, composed, workspace
from mutation import mutated

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Demonstration, Instruction, RankedAnswers, Response
from selfalign.data.rouge import rouge_l
from selfalign.data.sources import read_demonstrations, read_instructions, read_ranked
from selfalign.data.text_filters import words_of
from selfalign.stages import seed_data as seeds_module
from selfalign.stages.judge import ExpectedScore, SampledScore, parse_score
from selfalign.stages.seed_data import (
    EFTSource,
    SeedDataConfig,
    TeachableJudge,
    demonstrate_judging,
    scores_from_ranks,
    seed_data,
    taught_questions,
)

SCORE = ExpectedScore(prompt=RUBRIC)
RATIONALE = SampledScore(prompt=RUBRIC)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ranked_rows(count: int = 10, answers: int = 3, **score: object) -> list[dict]:
    return [
        {
            "id": f"q{n}",
            "instruction": f"Question number {n}?",
            "responses": [{"text": f"Answer {n}.{rank}", "rank": rank, **score} for rank in range(1, answers + 1)],
        }
        for n in range(count)
    ]


def ift_rows(count: int = 4) -> list[dict]:
    return [{"id": f"i{n}", "instruction": f"Task {n}.", "response": f"Done {n}."} for n in range(count)]


def built(
    folder: Path, ranked: list[dict], judge: TeachableJudge = SCORE, stage: Any = seeds_module, **settings: object
) -> tuple[dict[str, Any], Path]:
    """Runs the stage; returns its counts and the folder it wrote."""
    config = stage.SeedDataConfig(
        demonstrations=write_jsonl(folder / "ift.jsonl", ift_rows()),
        ranked=write_jsonl(folder / "ranked.jsonl", ranked) if ranked else "",
        **settings,
    )
    counts = stage.seed_data(workspace(folder / "out"), config=config, judge=judge, contents=["a", "b"])
    return counts, folder / "out"


def test_questions_are_taught_or_held_out_but_never_both(tmp_path: Path) -> None:
    counts, out = built(tmp_path, ranked_rows())
    taught = {d.question for d in read_records(out / "demonstrations.jsonl", Demonstration) if d.source == "eft"}
    held_out = {q.id for q in read_records(out / "ranked.jsonl", RankedAnswers)}
    assert taught | held_out == {f"q{n}" for n in range(10)}
    assert not taught & held_out
    assert len(held_out) == 3
    assert counts == {"ift": 4, "eft": 21, "questions_taught": 7, "questions_held_out": 3, "dropped": {}}


def test_split_does_not_depend_on_the_order_of_the_file_or_the_ids(tmp_path: Path) -> None:
    rows = ranked_rows()
    renamed = [{**row, "id": f"other-{row['id']}"} for row in rows]
    folders = {"given": rows, "turned": rows[::-1], "renamed": renamed}
    held_out = {}
    for name, variant in folders.items():
        _, out = built(tmp_path / name, variant)
        held_out[name] = {q.instruction for q in read_records(out / "ranked.jsonl", RankedAnswers)}
    assert held_out["given"] == held_out["turned"] == held_out["renamed"]


def test_more_questions_do_not_move_a_held_out_one_into_training_at_random(tmp_path: Path) -> None:
    """The order is by digest, so a question's place is its own; only the cut moves with the number of questions."""
    _, few = built(tmp_path / "few", ranked_rows(10))
    _, all_but_one = built(tmp_path / "less", ranked_rows(9))
    sets = [{q.id for q in read_records(out / "ranked.jsonl", RankedAnswers)} for out in (few, all_but_one)]
    assert len(sets[0] - sets[1]) <= 1


def test_share_that_leaves_no_question_to_teach_judging_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"held_out_share=0\.9 holds out all 2 questions .* set .*eft_source=none"):
        built(tmp_path, ranked_rows(2), held_out_share=0.9)
    counts, _ = built(tmp_path, ranked_rows(2), held_out_share=0.9, eft_source=EFTSource.none)
    assert counts["questions_held_out"] == 2


def test_question_that_stands_twice_is_on_one_side_both_times(tmp_path: Path) -> None:
    check_split(tmp_path)


def check_split(folder: Path, stage: Any = seeds_module) -> None:
    """Each question stands twice, under two ids and with other answers: the split is by its text."""
    for count in range(2, 12):
        rows = ranked_rows(count)
        again = [{**row, "id": f"again-{row['id']}", "responses": row["responses"][:2]} for row in rows]
        _, out = built(folder / str(count), [*rows, *again], stage=stage)
        taught = {d.question.split("-")[-1] for d in eft_of(out)}
        held_out = {q.id.split("-")[-1] for q in read_records(out / "ranked.jsonl", RankedAnswers)}
        assert not taught & held_out
        assert len(taught | held_out) == count
        assert len(held_out) == round(0.3 * count)


def eft_of(out: Path) -> list[Demonstration]:
    return [d for d in read_records(out / "demonstrations.jsonl", Demonstration) if d.source == "eft"]


def check_overlap(folder: Path, stage: Any = seeds_module) -> None:
    """A question that is an IFT prompt teaches no judging and measures none; it is counted."""
    rows = [
        *ranked_rows(),
        *({**row, "id": f"t{n}", "instruction": f"Task {n}."} for n, row in enumerate(ranked_rows(3))),
    ]
    counts, out = built(folder, rows, stage=stage)
    used = {d.question for d in eft_of(out)} | {q.id for q in read_records(out / "ranked.jsonl", RankedAnswers)}
    assert used == {f"q{n}" for n in range(10)}
    assert counts["dropped"] == {"questions_in_demonstrations": 3}
    assert counts["questions_taught"] + counts["questions_held_out"] == 10


def test_question_that_is_an_ift_prompt_as_a_text_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = ranked_rows(4)
    ranked = write_jsonl(tmp_path / "ranked.jsonl", rows)
    taught = write_jsonl(tmp_path / "ift.jsonl", [{"prompt": rows[1]["instruction"], "completion": "Yes."}])
    counts = seed_data(
        workspace(tmp_path / "out"),
        config=SeedDataConfig(demonstrations=taught, ranked=ranked),
        judge=SCORE,
        contents=[],
    )
    assert counts["dropped"] == {"questions_in_demonstrations": 1}
    assert counts["questions_taught"] + counts["questions_held_out"] == 3


@pytest.mark.parametrize("key", ["demonstrations", "ranked"])
def test_source_of_which_no_row_is_of_use_names_the_setting_and_the_reasons(tmp_path: Path, key: str) -> None:
    rows = [{"instruction": "Hi", "response": " "}]
    if key == "ranked":
        answers = [{"text": "a", "rank": 1, "score": 1}, {"text": "b", "rank": 2, "score": 4}]
        rows = [{"instruction": "Hi", "responses": answers}]
    config = SeedDataConfig(**{"demonstrations": "", "ranked": "", key: write_jsonl(tmp_path / "a.jsonl", rows)})
    reasons = {"demonstrations": r"\{'empty_response': 1\}", "ranked": r"\{'scores_contradict': 2\}"}[key]
    with pytest.raises(SelfalignError, match=rf"data\.seed_data\.{key}=.*: no usable row \(dropped: {reasons}\)"):
        seed_data(workspace(tmp_path / "out"), config=config, judge=SCORE, contents=[])


def test_question_that_is_an_ift_prompt_is_dropped_and_counted(tmp_path: Path) -> None:
    check_overlap(tmp_path)


def test_questions_that_are_all_ift_prompts_are_refused_with_what_to_set(tmp_path: Path) -> None:
    rows = [{**row, "instruction": f"Task {n}."} for n, row in enumerate(ranked_rows(3))]
    with pytest.raises(
        SelfalignError, match=r"all 3 questions of data\.seed_data\.ranked .*data\.seed_data\.max_demonstrations"
    ):
        built(tmp_path, rows)


def test_demonstrations_that_are_left_away_do_not_cost_their_questions(tmp_path: Path) -> None:
    """One file may give both: the first questions to IFT, the others to the judge."""
    rows = [{**row, "instruction": f"Task {n}."} for n, row in enumerate(ranked_rows(4))]
    counts, _ = built(tmp_path, rows, max_demonstrations=1)
    assert counts["questions_taught"] + counts["questions_held_out"] == 3


def test_what_a_published_data_set_gives_no_use_for_is_counted_by_source(tmp_path: Path) -> None:
    rows = []
    for n in range(6):
        asked = {"message_id": f"q{n}", "parent_id": None, "role": "prompter", "text": f"Question {n}?", "lang": "en"}
        answers = [
            {"message_id": f"q{n}a{rank}", "parent_id": f"q{n}", "role": "assistant", "text": f"Answer {rank}",
             "lang": "en" if n < 5 else "de", "rank": rank}
            for rank in range(3)
        ]  # fmt: skip
        rows += [asked, *answers]
    source = write_jsonl(tmp_path / "trees.jsonl", rows)
    config = SeedDataConfig(demonstrations=source, ranked=source, max_demonstrations=2, held_out_share=0.34)
    counts = seed_data(workspace(tmp_path / "out"), config=config, judge=SCORE, contents=[])
    assert counts == {
        "ift": 2,
        "eft": 6,
        "questions_taught": 2,
        "questions_held_out": 1,
        "dropped": {
            "demonstrations_lower_rank": 10,
            "demonstrations_other_language": 3,
            "questions_in_demonstrations": 2,
            "ranked_other_language": 3,
        },
    }


def test_first_so_many_questions_are_taken(tmp_path: Path) -> None:
    counts, out = built(tmp_path, ranked_rows(), max_ranked=5)
    used = {d.question for d in eft_of(out)} | {q.id for q in read_records(out / "ranked.jsonl", RankedAnswers)}
    assert used == {f"q{n}" for n in range(5)}
    assert (counts["questions_taught"], counts["questions_held_out"]) == (3, 2)


def test_taught_questions_are_there_for_the_baseline_to_judge(tmp_path: Path) -> None:
    counts, out = built(tmp_path, ranked_rows(), eft_source="baseline")
    assert (counts["ift"], counts["eft"], counts["questions_taught"]) == (4, 0, 7)
    config = SeedDataConfig(
        demonstrations=str(tmp_path / "ift.jsonl"),
        ranked=str(tmp_path / "ranked.jsonl"),
        eft_source=EFTSource.baseline,
    )
    asked = tmp_path / "asked"
    assert taught_questions(workspace(asked), config=config, contents=[]) == {"questions": 7, "responses": 21}
    taught, held_out = ({q.id for q in read_records(folder / "ranked.jsonl", RankedAnswers)} for folder in (asked, out))
    assert taught | held_out == {f"q{n}" for n in range(10)}
    assert not taught & held_out
    assert [i.id for i in read_records(asked / "instructions.jsonl", Instruction)] == sorted(taught)
    assert len(read_records(asked / "responses.jsonl", Response)) == 21


MUTANTS = [
    ("split by id", "digest_text(compared_prompt(question.prompt)) for", "digest_text(question.id) for"),
    ("split by answers", "digest_text(compared_prompt(question.prompt)) for", "digest_text(str(question.texts)) for"),
    ("held-out questions taught", "for question in usable if question.id not in held_out]", "for question in usable]"),
    ("overlap kept", "if compared_prompt(question.prompt) not in prompts]", "]"),
    ("overlap not counted", 'drops["questions_in_demonstrations"] = len(questions) - len(usable)', "pass"),
]


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(tmp_path: Path, old: str, new: str) -> None:
    failures = []
    with mutated(seeds_module, old, new) as copy:
        for check in (check_split, check_overlap):
            try:
                check(tmp_path / check.__name__, copy)
            except AssertionError:
                failures.append(check.__name__)
    assert failures


def test_held_out_answers_are_there_to_be_judged(tmp_path: Path) -> None:
    _, out = built(tmp_path, ranked_rows())
    ranked = read_records(out / "ranked.jsonl", RankedAnswers)
    instructions = {i.id: i for i in read_records(out / "instructions.jsonl", Instruction)}
    responses = {r.id: r for r in read_records(out / "responses.jsonl", Response)}
    assert list(instructions) == [question.id for question in ranked]
    assert len(responses) == 9
    for question in ranked:
        assert instructions[question.id].text == question.instruction
        for number, text in enumerate(question.texts, start=1):
            assert responses[f"{question.id}-{number}"].text == text
            assert responses[f"{question.id}-{number}"].instruction_id == question.id
    assert {r.model for r in responses.values()} == {"human"}


def test_judge_is_taught_its_own_format(tmp_path: Path) -> None:
    question = RankedAnswers(
        id="q", instruction="Why?", texts=["Best.", "Worst."], ranks=[1, 2], scores=[5, 1],
        justifications=["It is right.", ""],
    )  # fmt: skip
    alone = demonstrate_judging(question, SCORE)
    justified = demonstrate_judging(question, RATIONALE)
    assert [(d.prefill, d.response) for d in alone] == [("Score: ", "5"), ("Score: ", "1")]
    assert {d.prefill for d in justified} == {""}
    assert [d.response for d in justified] == ["It is right.\nScore: 5", "Score: 1"]
    assert [d.prompt for d in alone] == [SCORE.ask("Why?", "Best."), SCORE.ask("Why?", "Worst.")]
    assert {(d.source, d.question) for d in alone} == {("eft", "q")}
    assert len({d.id for d in alone}) == 2


def scored_rows(*scores: tuple[int, int]) -> list[dict]:
    return [
        {
            "instruction": f"Question number {n}?",
            "responses": [{"text": "Good.", "rank": 1, "score": best}, {"text": "Bad.", "rank": 2, "score": worst}],
        }
        for n, (best, worst) in enumerate(scores)
    ]


def taught_scores(out: Path) -> set[tuple[str, ...]]:
    """The scores of each question that are taught."""
    by_question: dict[str, list[str]] = {}
    for shown in read_records(out / "demonstrations.jsonl", Demonstration):
        if shown.source == "eft":
            by_question.setdefault(shown.question, []).append(shown.response)
    return set(map(tuple, by_question.values()))


def test_scores_of_another_scale_are_no_scores_where_they_happen_to_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """4 of 10 is not 4 of 5: one score beyond the judge's scale tells the scale of all."""
    _, out = built(tmp_path, scored_rows((4, 2), (3, 1), (9, 6), (10, 2)), held_out_share=0.1)
    assert taught_scores(out) == {("5", "0")}
    assert "scores from 1 to 10, but the judge's scale is 0 to 5" in caplog.text


@pytest.mark.parametrize(("best", "taught", "told"), [(5, "10", "from 0 to 5, but"), (9, "9", "of at most 9, and")])
def test_scores_of_a_shorter_scale_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, best: int, taught: str, told: str
) -> None:
    """5 of 5 is not 5 of 10; 9 may be the best of 10."""
    judge = SampledScore(prompt=RUBRIC, max_score=10)
    _, out = built(tmp_path, scored_rows((best, 0), (best, 0), (best, 0), (best, 0)), judge=judge, held_out_share=0.1)
    assert taught_scores(out) == {(f"Score: {taught}", "Score: 0")}
    assert told in caplog.text


def test_scores_of_the_judges_scale_are_taught_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, out = built(tmp_path, scored_rows((4, 2), (3, 1), (5, 0), (4, 2)), held_out_share=0.1)
    assert taught_scores(out) == {("4", "2"), ("3", "1"), ("5", "0")}
    assert not caplog.text


def test_spaces_around_a_question_make_no_other_question(tmp_path: Path) -> None:
    rows = ranked_rows(6, 2)
    rows[0]["instruction"] = "Task 1. "
    rows[2]["instruction"] = rows[1]["instruction"] + "\n"
    counts, out = built(tmp_path, rows, held_out_share=0.5)
    assert counts["dropped"] == {"questions_in_demonstrations": 1}
    held_out = {question.id for question in read_records(out / "ranked.jsonl", RankedAnswers)}
    assert len(held_out & {"q1", "q2"}) in (0, 2)


@pytest.mark.parametrize(
    ("ranks", "low", "high", "scores"),
    [
        ([1, 2], 0, 5, [5, 0]),
        ([2, 1, 3], 0, 4, [2, 4, 0]),
        ([4, 1, 3, 2], 0, 3, [0, 3, 1, 2]),
        ([1, 2, 3, 4, 5, 6], 0, 5, [5, 4, 3, 2, 1, 0]),
        ([10, 7, 30], 1, 5, [3, 5, 1]),
        ([1, 2, 3, 4], 0, 5, [5, 3, 2, 0]),  # 5, 3.33, 1.67, 0
        ([1, 2, 3], 1, 5, [5, 3, 1]),
    ],
)
def test_scores_from_ranks(ranks: list[int], low: int, high: int, scores: list[int]) -> None:
    assert scores_from_ranks(ranks, low, high) == scores


@pytest.mark.parametrize("answers", range(2, 7))
def test_scores_from_ranks_keep_the_humans_order_strictly(answers: int) -> None:
    scores = scores_from_ranks(list(range(1, answers + 1)), 0, 5)
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == answers
    assert (scores[0], scores[-1]) == (5, 0)


@pytest.mark.parametrize("judge", ["expected_score", "expected_score_justified", "additive", "multiple_choice"])
def test_every_taught_score_lies_on_the_judges_own_scale(tmp_path: Path, judge: str) -> None:
    """A rubric of 1 to 5 must not be taught `Score: 0`, which its own parser calls out of range."""
    config, *_ = composed("experiment=smoke", f"judge={judge}")
    seed_data(workspace(tmp_path), config=config.data.seed_data, judge=config.judge, contents=[])
    taught = [d for d in read_records(tmp_path / "demonstrations.jsonl", Demonstration) if d.source == "eft"]
    assert len(taught) == 224
    texts = [d.prefill + d.response for d in taught]
    bad = [
        text[-10:] for text in texts if parse_score(text, config.judge.min_score, config.judge.max_score).score is None
    ]
    assert bad == []


def test_scores_for_some_answers_only_are_filled_in_or_refused_with_the_line(tmp_path: Path) -> None:
    rows = ranked_rows(4)
    for row in rows:
        row["responses"][0]["score"] = 5
    try:
        counts, _ = built(tmp_path, rows)
    except SelfalignError as error:
        assert "ranked.jsonl" in str(error)  # noqa: PT017
    else:
        assert counts["eft"] == 9


def test_without_evaluation_fine_tuning_only_the_given_answers_are_taught(tmp_path: Path) -> None:
    counts, out = built(tmp_path, ranked_rows(), eft_source="none")
    assert {d.source for d in read_records(out / "demonstrations.jsonl", Demonstration)} == {"ift"}
    assert (counts["eft"], counts["questions_taught"], counts["questions_held_out"]) == (0, 0, 3)


def test_first_so_many_demonstrations_are_taken(tmp_path: Path) -> None:
    counts, out = built(tmp_path, [], max_demonstrations=3)
    assert [d.id for d in read_records(out / "demonstrations.jsonl", Demonstration)] == ["i0", "i1", "i2"]
    assert counts == {"ift": 3, "eft": 0, "questions_taught": 0, "questions_held_out": 0, "dropped": {}}


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"held_out_share": 0.0}, "held_out_share"), ({"held_out_share": 1.0}, "held_out_share"),
     ({"max_demonstrations": -1}, "max_demonstrations"), ({"max_ranked": -1}, "max_ranked"),
     ({"max_score_imbalance": 0.9}, "max_score_imbalance"),
     ({"eft_source": "baseline", "demonstrations": ""}, "eft_source")],
)  # fmt: skip
def test_value_out_of_range_is_refused_with_its_key(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=rf"data\.seed_data\.{named}"):
        SeedDataConfig(**settings)


# --- the shipped seed data ---------------------------------------------------------------------------------------


def test_shipped_demonstrations_are_at_least_150_with_different_tasks() -> None:
    shipped, _ = read_demonstrations("shipped:ift")
    assert len(shipped) >= 150
    assert len({d.id for d in shipped}) == len(shipped)
    assert len({d.prompt[0]["content"] for d in shipped}) == len(shipped)
    assert len({d.response for d in shipped}) == len(shipped)
    assert all(len(d.response.split()) >= 1 and d.response == d.response.strip() for d in shipped)


def test_shipped_questions_are_at_least_60_with_3_or_4_strictly_ranked_answers() -> None:
    shipped, _ = read_ranked("shipped:ranked")
    assert len(shipped) >= 60
    assert len({q.id for q in shipped}) == len({q.instruction for q in shipped}) == len(shipped)
    for question in shipped:
        count = len(question.texts)
        assert count in (3, 4), question.id
        assert sorted(question.ranks) == list(range(1, count + 1)), question.id
        assert len(set(question.texts)) == count, question.id
        by_rank = [score for _, score in sorted(zip(question.ranks, question.scores, strict=True))]
        assert all(better > worse for better, worse in pairwise(by_rank)), question.id
        assert set(by_rank) <= set(range(6)), question.id
        assert all(question.justifications), question.id
        assert all(len(text.split()) <= 100 for text in question.justifications), question.id


def test_best_shipped_answer_is_not_known_by_its_place_or_length() -> None:
    shipped, _ = read_ranked("shipped:ranked")
    places = [question.ranks.index(1) for question in shipped]
    longest = [max(range(len(q.texts)), key=lambda i, q=q: len(q.texts[i])) == q.ranks.index(1) for q in shipped]
    assert max(places.count(place) for place in set(places)) < 0.6 * len(shipped)
    assert sum(longest) < 0.6 * len(shipped)


def test_shipped_evaluation_instructions_are_at_least_50_over_8_categories() -> None:
    shipped, _ = read_instructions("shipped:evaluation", "evaluation")
    assert len(shipped) >= 50
    assert len({i.id for i in shipped}) == len({i.text for i in shipped}) == len(shipped)
    assert len({i.category for i in shipped} - {""}) >= 8


def test_shipped_evaluation_instructions_are_not_among_what_is_taught() -> None:
    asked = [(i.id, words_of(i.text)) for i in read_instructions("shipped:evaluation", "evaluation")[0]]
    taught = [(d.id, words_of(d.prompt[0]["content"])) for d in read_demonstrations("shipped:ift")[0]]
    ranked = [(q.id, words_of(q.instruction)) for q in read_ranked("shipped:ranked")[0]]
    alike = [(a, b) for a, words in asked for b, other in [*taught, *ranked] if rouge_l(words, other) >= 0.7]
    assert alike == []
    assert not {name for name, _ in asked} & {name for name, _ in [*taught, *ranked]}


def test_shipped_questions_are_not_among_the_shipped_demonstrations() -> None:
    taught = [(d.id, words_of(d.prompt[0]["content"])) for d in read_demonstrations("shipped:ift")[0]]
    ranked = [(q.id, words_of(q.instruction)) for q in read_ranked("shipped:ranked")[0]]
    assert [(a, b) for a, words in ranked for b, other in taught if rouge_l(words, other) >= 0.7] == []
