"""Published data sets: rows of exactly their schemas, what becomes of them, and why the others are left out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mutation import mutated

from selfalign.core.errors import SelfalignError
from selfalign.core.records import PreferencePair
from selfalign.data import schemas
from selfalign.data.schemas import (
    RatedCompletion,
    RatedCompletions,
    TreeMessage,
    rank_completions,
    transcript,
)
from selfalign.data.sources import read_demonstrations, read_instructions, read_pairs, read_ranked

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    """The rows as a JSONL or parquet file."""
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def message(name: str, parent: str | None, text: str, **more: Any) -> dict[str, Any]:
    """A row with all fields of OpenAssistant/oasst1."""
    row = {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text, "role": "assistant" if parent and "p" not in name else "prompter", "lang": "en",
        "review_count": 3, "review_result": True, "deleted": False, "rank": None, "synthetic": False,
        "model_name": None, "detoxify": {"toxicity": 0.0004, "insult": 0.0002}, "message_tree_id": name[0],
        "tree_state": "ready_for_export", "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam", "quality"], "value": [0.0, 0.8], "count": [3, 3]},
    }  # fmt: skip
    return {**row, **more}


TREES = [
    # Three ranked answers, in no order; one of them is answered again.
    message("a", None, "Why is the sky blue?"),
    message("a1", "a", "Blue paint.", rank=2),
    message("a2", "a", "Sunlight scatters.", rank=0),
    message("a3", "a", "Because of light.", rank=1),
    message("ap", "a2", "And at sunset?"),
    message("a4", "ap", "Then it is red.", rank=0),
    message("a5", "ap", "It is not.", rank=1),
    # One answer alone: it has no rank.
    message("b", None, "Name a bird."),
    message("b1", "b", "A wren."),
    # Another language; a deleted answer; one that failed its review; a blank one; a question that is not there.
    message("c", None, "¿Qué hora es?", lang="es"),
    message("c1", "c", "Las dos.", lang="es", rank=0),
    message("d", None, "Name a fish."),
    message("d1", "d", "A cod.", rank=1),
    message("d2", "d", "Gone.", rank=0, deleted=True),
    message("d3", "d", "Spam.", rank=2, review_result=False),
    message("d4", "d", " ", rank=3),
    message("e1", "nowhere", "Yes.", rank=0),
    # No review was made, which is no failure; two of one rank.
    message("f", None, "Name a tree.", review_result=None),
    message("f1", "f", "An oak.", rank=0, review_result=None),
    message("f2", "f", "A stone.", rank=1),
    message("f3", "f", "A shoe.", rank=1),
]
ANSWERS = 15
UNUSED = {"later_turn": 2, "no_rank": 1, "other_language": 1, "deleted": 1, "failed_review": 1, "empty_response": 1,
          "no_question": 1}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_best_ranked_english_first_turns_are_demonstrations(tmp_path: Path, kind: str) -> None:
    taught, drops = read_demonstrations(write(tmp_path / f"a.{kind}", TREES))
    asked = [(d.prompt[0]["content"], d.response) for d in taught]
    assert asked == [("Why is the sky blue?", "Sunlight scatters."), ("Name a tree.", "An oak.")]
    assert [d.id for d in taught] == ["a2", "f1"]
    assert {(d.source, len(d.prompt)) for d in taught} == {("ift", 1)}
    assert +drops == Counter(UNUSED | {"lower_rank": 5})
    assert len(taught) + drops.total() == ANSWERS


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ranked_siblings_are_ranked_answers(tmp_path: Path, kind: str) -> None:
    (sky, tree), drops = read_ranked(write(tmp_path / f"a.{kind}", TREES))
    assert (sky.id, sky.instruction) == ("a", "Why is the sky blue?")
    assert dict(zip(sky.texts, sky.ranks, strict=True)) == {
        "Sunlight scatters.": 1,
        "Because of light.": 2,
        "Blue paint.": 3,
    }
    assert (tree.texts, tree.ranks, tree.scores) == (["An oak.", "A stone."], [1, 2], [])
    assert +drops == Counter(UNUSED | {"only_answer": 1, "tie": 1})
    assert len(sky.texts) + len(tree.texts) + drops.total() == ANSWERS


def test_message_that_occurs_twice_is_taken_once_and_counted(tmp_path: Path) -> None:
    taught, drops = read_demonstrations(write(tmp_path / "a.jsonl", TREES + TREES[:3]))
    assert [d.id for d in taught] == ["a2", "f1"]
    assert drops["duplicate"] == 2
    assert len(taught) + drops.total() == ANSWERS + 2


HH = "\n\nHuman: Name a colour.\n\nAssistant: Which one do you like?\n\nHuman: A warm one.\n\nAssistant: "


def test_transcripts_become_pairs_behind_the_dialogue_so_far(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"{HH}Red.", "rejected": f"{HH}Dog.\n\nIt barks."},
        {"chosen": f"{HH}Red.", "rejected": f"{HH}Dog.\n\nIt barks."},
        {"chosen": f"{HH}Red.", "rejected": f"{HH}Red."},
        {"chosen": f"{HH}Red.", "rejected": HH},
        {"chosen": f"{HH}Red.", "rejected": f"{HH.replace('warm', 'cold')}Blue."},
        {"chosen": f"{HH}Red.\n\nHuman: Thanks", "rejected": f"{HH}Dog."},
        {"chosen": "\n\nHuman: Hi\n\nHuman: Hello\n\nAssistant: Yes?", "rejected": f"{HH}Dog."},
    ]
    (pair,), drops = read_pairs(write(tmp_path / "a.jsonl", rows))
    assert pair.prompt == [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Which one do you like?"},
        {"role": "user", "content": "A warm one."},
    ]
    assert (pair.chosen, pair.rejected) == ("Red.", "Dog.\n\nIt barks.")
    assert (pair.chosen_score, pair.rejected_score) == (None, None)
    assert +drops == Counter(duplicate=1, identical=1, empty_response=1, different_prompts=1, no_dialogue=2)
    assert 1 + drops.total() == len(rows)


def test_chosen_responses_of_transcripts_are_demonstrations(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"{HH}Red.", "rejected": f"{HH}Dog."},
        {"chosen": f"{HH}Red.", "rejected": f"{HH}Cat."},
        {"chosen": HH, "rejected": f"{HH}Cat."},
        {"chosen": "\n\nAssistant: Hello.", "rejected": f"{HH}Cat."},
    ]
    (taught,), drops = read_demonstrations(write(tmp_path / "a.jsonl", rows))
    assert [turn["role"] for turn in taught.prompt] == ["user", "assistant", "user"]
    assert (taught.response, taught.source) == ("Red.", "ift")
    assert +drops == Counter(duplicate=1, empty_response=1, no_dialogue=1)


@pytest.mark.parametrize(
    "text",
    ["", "Hello", "\n\nHuman: Hi", "\n\nAssistant: Hi", "Hi\n\nHuman: a\n\nAssistant: b",
     "\n\nHuman: \n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c"],
)  # fmt: skip
def test_text_in_which_the_speakers_do_not_take_turns_is_no_dialogue(text: str) -> None:
    assert transcript(text) is None


def test_a_speakers_name_inside_a_line_does_not_begin_a_turn() -> None:
    told = transcript("\n\nHuman: Who is Human: 5?\n\nAssistant: A robot.\nAssistant: is my name.")
    assert told == [
        {"role": "user", "content": "Who is Human: 5?"},
        {"role": "assistant", "content": "A robot.\nAssistant: is my name."},
    ]


def rated(chosen: str, rejected: str, better: float, worse: float, asked: str = "Name a colour.") -> dict[str, Any]:
    """A row with all fields of HuggingFaceH4/ultrafeedback_binarized."""
    turn = {"content": asked, "role": "user"}
    conversations = [[turn, {"content": text, "role": "assistant"}] for text in (chosen, rejected)]
    return {
        "prompt": asked, "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
        "chosen": conversations[0], "rejected": conversations[1], "messages": conversations[0],
        "score_chosen": better, "score_rejected": worse,
    }  # fmt: skip


RATED = [
    rated("Red.", "Dog.", 8.5, 5.0),
    rated("Red.", "Blue.", 8.0, 8.0),
    rated("Red.", "Green.", 6.0, 8.0),
    rated("", "Dog.", 8.0, 5.0),
    rated("Red.", "Red.", 8.0, 5.0),
    rated("Red.", "Dog.", 8.5, 5.0),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_binarized_rows_become_pairs_with_their_scores(tmp_path: Path, kind: str) -> None:
    (pair,), drops = read_pairs(write(tmp_path / f"a.{kind}", RATED))
    assert pair == PreferencePair(
        id=pair.id,
        prompt=[{"role": "user", "content": "Name a colour."}],
        chosen="Red.",
        rejected="Dog.",
        chosen_score=8.5,
        rejected_score=5.0,
    )
    assert +drops == Counter(tie=1, scores_contradict=1, empty_response=1, identical=1, duplicate=1)
    assert 1 + drops.total() == len(RATED)


def test_binarized_row_whose_prompt_is_not_in_its_conversations_is_dropped(tmp_path: Path) -> None:
    """As where the prompt holds a text that the question is about: what is trained on would not say it."""
    rows = [RATED[0], {**RATED[0], "prompt": "Name a colour of the text.\n\nA red house."}]
    pairs, drops = read_pairs(write(tmp_path / "a.jsonl", rows))
    assert (len(pairs), +drops) == (1, Counter(different_prompts=1))
    taught, drops = read_demonstrations(write(tmp_path / "a.jsonl", rows))
    assert (len(taught), +drops) == (1, Counter(different_prompts=1))


def test_chosen_responses_of_binarized_rows_are_demonstrations(tmp_path: Path) -> None:
    (taught,), drops = read_demonstrations(write(tmp_path / "a.jsonl", RATED))
    assert (taught.prompt, taught.response) == ([{"role": "user", "content": "Name a colour."}], "Red.")
    assert +drops == Counter(empty_response=1, duplicate=4)


def completed(instruction: str, *answers: tuple[str, float | None, float | None]) -> dict[str, Any]:
    """A row with all fields of openbmb/UltraFeedback."""
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "source": "sharegpt", "instruction": instruction, "models": ["m"] * len(answers),
        "completions": [
            {
                "annotations": {name: {"Rating": "4", "Rationale": "It is fair."} for name in aspects},
                "custom_system_prompt": "Be honest.", "model": "m", "principle": "honesty", "response": text,
                "critique": "Good.", "overall_score": overall, "fine-grained_score": fine,
            }
            for text, overall, fine in answers
        ],
        "correct_answers": ["None"], "incorrect_answers": ["None"],
    }  # fmt: skip


RATED_COMPLETIONS = [
    # 7.5 twice: the aspects decide between Red and Blue, and cannot between Blue and Green.
    completed("Name a colour.", ("Dog.", 2.0, 1.5), ("Blue.", 7.5, 4.0), ("Red.", 7.5, 4.75), ("Green.", 7.5, 4.0)),
    # All alike; one scored answer alone; the same answer of two models.
    completed("Name a bird.", ("A wren.", 8.0, 4.5), ("A crow.", 8.0, 4.5)),
    completed("Name a fish.", ("A cod.", 8.0, 4.5), ("A pike.", None, None), ("", 3.0, 2.0)),
    completed("Name a tree.", ("An oak.", 9.0, 5.0), ("An oak.", 6.0, 3.0), ("A shoe.", 1.0, 1.0)),
    completed("Name a tree.", ("An oak.", 9.0, 5.0), ("A shoe.", 1.0, 1.0)),
]
COMPLETIONS = 14


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_completions_are_ranked_by_overall_score_and_then_by_aspects(tmp_path: Path, kind: str) -> None:
    (colour, tree), drops = read_ranked(write(tmp_path / f"a.{kind}", RATED_COMPLETIONS))
    assert dict(zip(colour.texts, colour.ranks, strict=True)) == {"Dog.": 3, "Blue.": 2, "Red.": 1}
    assert (tree.instruction, tree.texts, tree.ranks) == ("Name a tree.", ["An oak.", "A shoe."], [1, 2])
    assert +drops == Counter(tie=2, only_answer=2, no_score=1, empty_response=1, duplicate=3)
    assert len(colour.texts) + len(tree.texts) + drops.total() == COMPLETIONS


def test_best_completions_are_demonstrations(tmp_path: Path) -> None:
    taught, drops = read_demonstrations(write(tmp_path / "a.jsonl", RATED_COMPLETIONS))
    assert [(d.prompt[0]["content"], d.response) for d in taught] == [
        ("Name a colour.", "Red."),
        ("Name a tree.", "An oak."),
    ]
    assert len(taught) + drops.total() == COMPLETIONS


def test_a_score_that_is_no_number_is_no_score() -> None:
    nan = float("nan")
    row = RatedCompletions(
        instruction="Name a colour.",
        completions=[
            RatedCompletion(response="Red.", overall_score=8.0, fine_grained_score=4.0),
            RatedCompletion(response="Blue.", overall_score=nan, fine_grained_score=4.0),
            RatedCompletion(response="Dog.", overall_score=2.0, fine_grained_score=nan),
            RatedCompletion(response="Cat.", overall_score=1.0, fine_grained_score=1.0),
        ],
    )
    (ranked,), drops = rank_completions([row])
    assert (ranked.texts, ranked.ranks) == (["Red.", "Cat."], [1, 2])
    assert +drops == Counter(no_score=2)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("absent", [None, float("nan")])
def test_binarized_row_without_a_score_is_a_pair_without_scores(tmp_path: Path, kind: str, absent: Any) -> None:
    rows = [
        rated("Red.", "Dog.", 8.5, 5.0),
        rated("Blue.", "Cat.", absent, 5.0),
        rated("Pink.", "Owl.", absent, absent),
    ]
    pairs, drops = read_pairs(write(tmp_path / f"a.{kind}", rows))
    scores = [(pair.chosen_score, pair.rejected_score) for pair in pairs]
    assert scores == [(8.5, 5.0), (None, 5.0), (None, None)]
    assert not +drops
    assert read_pairs(write(tmp_path / "b.jsonl", rows[1:]))[0] == pairs[1:], "also where the first row has none"


def test_binarized_turns_are_read_as_in_our_own_formats(tmp_path: Path) -> None:
    row = rated("Red.", "Dog.", 8.5, 5.0)
    parts = [{"type": "text", "text": "Red."}]
    row["chosen"] = [{**row["chosen"][0], "tool_calls": None}, {"role": "assistant", "content": parts}]
    other = rated("Red.", "Cat.", 8.5, 5.0)
    other["rejected"] = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Cat."}]
    pairs, drops = read_pairs(write(tmp_path / "a.jsonl", [row, other]))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("Red.", "Dog."), ("Red.", "Cat.")]
    assert not +drops


ASKED_TWICE = [{"role": "user", "content": "Name a colour."}, *rated("Red.", "Dog.", 8.5, 5.0)["chosen"]]


def test_binarized_turns_that_are_no_conversation_are_counted(tmp_path: Path) -> None:
    row = rated("Red.", "Dog.", 8.5, 5.0)
    rows = [row | {"chosen": ASKED_TWICE}, row | {"rejected": row["rejected"][1:]}, row | {"rejected": []}]
    pairs, drops = read_pairs(write(tmp_path / "a.jsonl", rows))
    assert (pairs, +drops) == ([], Counter(no_dialogue=3))


@pytest.mark.parametrize(
    ("row", "read", "message"),
    [
        (rated("Red.", "Dog.", 8.5, 5.0) | {"system": "Be brief."}, read_pairs, "system is filled .*schema RatedPair"),
        (rated("Red.", "Dog.", 8.5, 5.0) | {"tools": [{"name": "f"}]}, read_demonstrations, "tools is filled"),
        (completed("Hi", ("a", 2.0, 1.0), ("b", 3.0, 1.0)) | {"input": "Bonjour"}, read_ranked, "input is filled"),
        ({"chosen": f"{HH}a", "rejected": f"{HH}b", "images": ["a.png"]}, read_pairs, "images is filled"),
        (message("a", None, "Hi", context="A passage"), read_demonstrations, "context is filled"),
    ],
    ids=["system", "tools", "input", "images", "context"],
)  # fmt: skip
def test_field_that_carries_a_task_beside_a_published_schema_is_refused(
    tmp_path: Path, row: dict[str, Any], read: Any, message: str
) -> None:
    with pytest.raises(SelfalignError, match=rf"a\.jsonl:1: the field {message}"):
        read(write(tmp_path / "a.jsonl", [row]))


EXPLICIT: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "Name a colour."}],
    "chosen": [{"role": "assistant", "content": "Red."}],
    "rejected": [{"role": "assistant", "content": "Dog."}],
    "score_chosen": 8.5,
    "score_rejected": 5.0,
}


def test_scored_answers_behind_a_prompt_of_their_own_are_no_binarized_row(tmp_path: Path) -> None:
    (made,), drops = read_pairs(write(tmp_path / "a.jsonl", [EXPLICIT]))
    assert (made.prompt, made.chosen, made.chosen_score) == (EXPLICIT["prompt"], "Red.", 8.5)
    assert not +drops


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"chosen": f"{HH}a", "rejected": f"{HH}b"}, {"prompt": "Hi", "chosen": "a", "rejected": "b"}),
        ({"chosen": f"{HH}a", "rejected": f"{HH}b"}, {"question": "Hi", "chosen": "a", "rejected": "b"}),
        (rated("Red.", "Dog.", 8.5, 5.0), EXPLICIT),
    ],
    ids=["text behind a transcript", "question behind a transcript", "explicit prompt behind a conversation"],
)
def test_row_of_another_format_behind_published_ones_is_refused(
    tmp_path: Path, first: dict[str, Any], other: dict[str, Any]
) -> None:
    with pytest.raises(SelfalignError, match=r"a\.jsonl:2: the field (prompt|question) is filled"):
        read_pairs(write(tmp_path / "a.jsonl", [first, other]))


@pytest.mark.parametrize(
    ("rows", "read", "message"),
    [
        (
            TREES,
            read_pairs,
            r"a\.jsonl: rows in the schema TreeMessage can be read as demonstrations and ranked answers only",
        ),
        (RATED, read_ranked, r"a\.jsonl: rows in the schema RatedPair can be read as demonstrations and pairs only"),
        (RATED_COMPLETIONS, read_pairs, "RatedCompletions can be read as demonstrations and ranked answers only"),
        (
            [{"chosen": f"{HH}a", "rejected": f"{HH}b"}],
            read_ranked,
            "TranscriptPair can be read as demonstrations and pairs only",
        ),
    ],
)
def test_schema_that_is_of_other_use_is_refused_with_what_it_is_for(
    tmp_path: Path, rows: Rows, read: Any, message: str
) -> None:
    with pytest.raises(SelfalignError, match=message):
        read(write(tmp_path / "a.jsonl", rows))


def test_wrong_row_of_a_known_schema_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [TREES[0], {**TREES[1], "rank": "best"}])
    with pytest.raises(SelfalignError, match=r"a\.jsonl:2: Expected `float \| null`, got `str` - at `\$\.rank`"):
        read_ranked(source)


def test_our_own_formats_are_not_taken_for_published_ones(tmp_path: Path) -> None:
    own = {"instruction": "Hi", "response": "Hello", "completions_seen": 3, "lang": "de"}
    (taught,), drops = read_demonstrations(write(tmp_path / "a.jsonl", [own]))
    assert (taught.response, drops) == ("Hello", Counter())
    quoted = {"prompt": "Go on:", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    (pair,), _ = read_pairs(write(tmp_path / "b.jsonl", [quoted]))
    assert pair.prompt == "Go on:"
    assert read_instructions(write(tmp_path / "c.jsonl", [own]), "evaluation")[0][0].text == "Hi"


# --- broken on purpose -------------------------------------------------------------------------------------------


def check_tree(module: Any) -> None:
    rows = [module.TreeMessage(**{f: row[f] for f in TreeMessage.__dataclass_fields__}) for row in TREES]
    ranked, _ = module.rank_tree(rows)
    assert {q.id: dict(zip(q.texts, q.ranks, strict=True)) for q in ranked} == {
        "a": {"Blue paint.": 3, "Sunlight scatters.": 1, "Because of light.": 2},
        "f": {"An oak.": 1, "A stone.": 2},
    }
    taught, _ = module.best_of_tree(rows)
    assert [d.id for d in taught] == ["a2", "f1"]


def check_transcripts(module: Any) -> None:
    rows = [module.TranscriptPair(chosen=f"{HH}Red.", rejected=f"{HH}Dog.")]
    rows.append(module.TranscriptPair(chosen=f"{HH}Red.", rejected=f"{HH.replace('warm', 'cold')}Blue."))
    ((pair,), drops), ((taught,), _) = module.pairs_of_transcripts(rows), module.chosen_of_transcripts(rows)
    assert (pair.chosen, pair.rejected, len(pair.prompt)) == ("Red.", "Dog.", 3)
    assert pair.prompt[-1] == {"role": "user", "content": "A warm one."}
    assert +drops == Counter(different_prompts=1)
    assert (taught.response, taught.prompt) == ("Red.", pair.prompt)


def check_ratings(module: Any) -> None:
    turns = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}] for text in ("a", "b")]
    scores = [(8.0, 5.0), (5.0, 5.0)]
    rows = [module.RatedPair(chosen=turns[0], rejected=turns[1], score_chosen=s, score_rejected=t) for s, t in scores]
    (pair,), drops = module.rated_pairs(rows)
    assert (pair.chosen_score, pair.rejected_score, drops["tie"]) == (8.0, 5.0, 1)
    answers = [("x", 5.0, 2.0), ("y", 5.0, 3.0), ("z", 9.0, 1.0), ("w", 9.0, 1.0)]
    completions = [
        module.RatedCompletion(response=text, overall_score=score, fine_grained_score=fine)
        for text, score, fine in answers
    ]
    (ranked,), drops = module.rank_completions([module.RatedCompletions(instruction="Q", completions=completions)])
    assert (ranked.texts, ranked.ranks, drops["tie"]) == (["x", "y", "z"], [3, 2, 1], 1)


CHECKS = (check_tree, check_transcripts, check_ratings)

MUTANTS = [
    ("rank 0 taken as the worst", "(-(answer.rank or 0),)", "((answer.rank or 0),)"),
    ("any rank taught", "if answer.rank:", "if False:"),
    ("later turns taken", "question.parent_id is not None", "False"),
    ("any language", "message.lang != LANGUAGE", "False"),
    ("deleted answers taken", "any(message.deleted", "any(False"),
    ("failed reviews taken", "message.review_result is False", "False"),
    ("reviews that were not made taken as failed", "message.review_result is False", "not message.review_result"),
    ("ties kept", "if text in texts or quality in texts.values():", "if text in texts:"),
    ("worst quality first", "order = sorted(texts.values(), reverse=True)", "order = sorted(texts.values())"),
    ("chosen and rejected swapped", "preferred, other = Tail.of(chosen[size:]), Tail.of(rejected[size:])",
     "other, preferred = Tail.of(chosen[size:]), Tail.of(rejected[size:])"),
    ("prompts not compared", "size = common_turns(chosen, rejected)", "size = min(len(chosen), len(rejected)) - 1"),
    ("the response in the prompt", "pair_of(chosen[:size],", "pair_of(chosen,"),
    ("roles swapped", '"user" if speaker == "Human"', '"user" if speaker != "Human"'),
    ("tied scores kept", "and better <= worse:", "and better < worse:"),
    ("aspects decide before the whole", "scores = (completion.overall_score, completion.fine_grained_score)",
     "scores = (completion.fine_grained_score, completion.overall_score)"),
]  # fmt: skip


def test_unchanged_copy_passes_every_check() -> None:
    with mutated(schemas, MUTANTS[0][1], MUTANTS[0][1]) as copy:
        for check in CHECKS:
            check(copy)


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(old: str, new: str) -> None:
    failures = []
    with mutated(schemas, old, new) as copy:
        for check in CHECKS:
            try:
                check(copy)
            except (AssertionError, ValueError):
                failures.append(check.__name__)
    assert failures
