"""Held-out pairs share no instruction and no response with what is trained on, whatever the pairs are like."""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import artifact, demonstration, preference, records_artifact
from mutation import assert_caught

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import stream_records, write_records
from selfalign.core.records import FinishReason, PreferencePair, Prompt, RankedAnswers, Response
from selfalign.data.pair_rules import AllOrdered, BestVsK, PairRule, pick_pairs
from selfalign.data.turns import as_prompt
from selfalign.models.batches import PairExample, SharedPrompt
from selfalign.store.artifacts import Artifact
from selfalign.training import splits as module
from selfalign.training.dataset import StoredExamples, store_examples
from selfalign.training.splits import KnownTexts, Split, hold_out, split_pairs, texts_of


def pair(name: str, prompt: Prompt, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(id=name, prompt=prompt, chosen=chosen, rejected=rejected)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
UNIQUE = [preference(f"u{n}", f"Ask {n}.", f"Good {n}.", f"Bad {n}.") for n in range(30)]


def names(pairs: Sequence[PreferencePair], rows: Any) -> list[str]:
    return [pairs[row].id for row in rows]


def split(pairs: Sequence[PreferencePair], count: int, *trained_on: Artifact) -> Split:
    return split_pairs(pairs, count, KnownTexts.of(trained_on))


def said(one: PreferencePair) -> set[tuple[str, str]]:
    """Every text of a pair and what it is there, read off its words."""
    if isinstance(one.prompt, str):
        asked = {("asked", one.prompt.strip())}
        answered: set[tuple[str, str]] = set()
    else:
        turns = [turn for turn in one.prompt if turn["role"] != "system"]
        dialogues = [turns[: n + 1] for n, turn in enumerate(turns) if turn["role"] == "user" or n + 1 == len(turns)]
        asked = {
            ("asked", d[0]["content"].strip() if len(d) == 1 else str([(t["role"], t["content"]) for t in d]))
            for d in dialogues
        }
        answered = {("answered", turn["content"].strip()) for turn in turns if turn["role"] == "assistant"}
    return asked | answered | {("answered", text.strip()) for text in (one.chosen, one.rejected)}


def own(one: PreferencePair) -> set[tuple[str, str]]:
    """Its whole prompt and its responses."""
    whole = PreferencePair(id="", prompt=one.prompt, chosen=one.chosen, rejected=one.rejected)
    if isinstance(one.prompt, list) and len(one.prompt) > 1:
        shorter = said(pair("", one.prompt[:-1], one.chosen, one.rejected))
        last = {("answered", turn["content"].strip()) for turn in one.prompt if turn["role"] == "assistant"}
        both = {("answered", text.strip()) for text in (one.chosen, one.rejected)}
        return (said(whole) - shorter - last) | both
    return said(whole)


def share(one: PreferencePair, other: PreferencePair) -> bool:
    return bool(own(one) & said(other) or said(one) & own(other))


# --- the rule ----------------------------------------------------------------------------------------------------


def test_pairs_that_share_nothing_are_all_trained_on_or_held_out() -> None:
    made = split(UNIQUE, 7)
    assert (len(made.training), len(made.held_out), made.beside, made.passed_over) == (23, 7, 0, 0)
    assert sorted([*made.training, *made.held_out]) == list(range(30))
    assert list(made.training) == sorted(made.training)
    assert list(made.held_out) == sorted(made.held_out)


NEIGHBOURS: dict[str, PreferencePair] = {
    "prompt": preference("x", "Ask 0.", "Other.", "Another."),
    "prompt_as_a_text": pair("x", "Ask 0.", "Other.", "Another."),
    "prompt_behind_a_system_turn": pair("x", [SYSTEM, user("Ask 0.")], "Other.", "Another."),
    "prompt_with_spaces_around": pair("x", "\n Ask 0. ", "Other.", "Another."),
    "chosen": preference("x", "Ask x.", "Good 0.", "Another."),
    "rejected": preference("x", "Ask x.", "Other.", "Bad 0."),
    "chosen_as_rejected": preference("x", "Ask x.", "Other.", "Good 0.\n"),
    "rejected_as_chosen": preference("x", "Ask x.", "Bad 0.", "Another."),
    "dialogue_that_goes_on": pair("x", [user("Ask 0."), say("Hm."), user("And?")], "Other.", "Another."),
    "response_inside_a_dialogue": pair("x", [user("Why?"), say("Good 0."), user("And?")], "Other.", "Another."),
    "answer_that_is_continued": pair("x", [user("Ask 0."), say("One,")], "Other.", "Another."),
}
FAR: dict[str, PreferencePair] = {
    "response_as_prompt": preference("x", "Good 0.", "Other.", "Another."),
    "prompt_as_response": preference("x", "Ask x.", "Ask 0.", "Another."),
    "later_turn_of_a_dialogue": pair("x", [user("Why?"), say("Hm."), user("Ask 0.")], "Other.", "Another."),
    "another_case": preference("x", "ask 0.", "good 0.", "bad 0."),
    "the_same_system_turn": pair("x", [{"role": "system", "content": "Ask 0."}, user("Ask x.")], "Other.", "Another."),
}


def test_pairs_that_continue_different_beginnings_of_an_answer_ask_the_same_question() -> None:
    """As step by step preferences do: one of a question's pairs is measured, and none of the others trained on."""
    steps = [
        pair(f"{name}{n}", [user(f"Solve {name}."), say(f"{name}, step {n}.")], f"Good {name}{n}.", f"Bad {name}{n}.")
        for name in "abc"
        for n in range(3)
    ]
    made = split(steps, 2)
    held, trained = ({name[0] for name in names(steps, rows)} for rows in (made.held_out, made.training))
    assert (len(held), held & trained, len(made.training), made.beside) == (2, set(), 3, 4)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_pair_that_shares_a_text_is_not_trained_on_beside_it(name: str) -> None:
    """Whichever of the two is held out, since another response of the other one was taught before."""
    pairs = [
        UNIQUE[0],
        NEIGHBOURS[name],
        *(preference(f"o{n}", "Ask 1.", f"Left {n}.", f"Right {n}.") for n in range(2)),
    ]
    assert share(*pairs[:2])
    for free, other in ((0, 1), (1, 0)):
        mine = next(text for kind, text in sorted(own(pairs[other]) - said(pairs[free])) if kind == "answered")
        known = known_of(texts_of("Ask 1.", mine).own)
        made = split_pairs(pairs, 1, known)
        assert names(pairs, made.held_out) == [pairs[free].id]
        assert (names(pairs, made.training), made.beside, made.passed_over) == (["o0", "o1"], 1, 3)


@pytest.mark.parametrize("name", FAR)
def test_text_in_another_part_is_not_shared(name: str) -> None:
    pairs = [UNIQUE[0], FAR[name]]
    made = split(pairs, 1)
    assert (len(made.training), len(made.held_out), made.beside) == (1, 1, 0)
    assert not share(*pairs)


def known_of(digests: Sequence[int]) -> KnownTexts:
    import numpy

    ordered = numpy.array(sorted(digests), dtype=numpy.uint64)
    return KnownTexts(ordered, ordered, ordered[:0])


# --- data of every kind ------------------------------------------------------------------------------------------


def by_rule(rule: PairRule, instructions: int, draw: random.Random) -> list[PreferencePair]:
    """What a rule makes of four candidates an instruction, some of which recur."""
    made: list[PreferencePair] = []
    for number in range(instructions):
        texts = [f"Answer {number} {n} in its own words" for n in range(3)]
        texts.append("I do not know." if draw.random() < 0.3 else f"Last answer {number} of all")
        answers = [
            Response(
                id=f"{number}-{n}",
                instruction_id=str(number),
                text=text,
                finish_reason=FinishReason.EOS,
                tokens=3,
                model="m",
            )
            for n, text in enumerate(texts)
        ]
        picked, _ = pick_pairs(rule, answers, {a.id: float(n) for n, a in enumerate(answers)}, number)
        made += [
            preference(f"{c.response.id}>{r.response.id}", f"Ask {number}.", c.response.text, r.response.text)
            for c, r in picked
        ]
    return made


def recurring(draw: random.Random) -> list[PreferencePair]:
    """Short answers that stand everywhere, prompts that come again, dialogues that go on from each other."""
    made: list[PreferencePair] = []
    for number in range(60):
        asked = draw.randrange(40)
        prompt: Prompt = as_prompt(f"Ask {asked}.")
        if draw.random() < 0.3:
            prompt = [SYSTEM, *as_prompt(f"Ask {asked}."), say(draw.choice(["Yes.", f"Answer {asked}"])), user("And?")]
        if draw.random() < 0.1:
            prompt = f"Ask {asked}."
        chosen = draw.choice(["Yes.", "No.", f"Answer {asked}", f"Own {number}", f"Own {number}"])
        made.append(pair(f"p{number}", prompt, chosen, f"Bad {draw.randrange(80)}"))
    return made


KINDS = {
    "all_ordered": lambda draw: by_rule(AllOrdered(max_similarity=1.0), 20, draw),
    "best_vs_k": lambda draw: by_rule(BestVsK(k=2, max_similarity=1.0), 20, draw),
    "recurring": recurring,
    "rejected_is_the_next_one_s_chosen": lambda draw: [
        preference(f"p{n}", f"Ask {n}.", f"Answer {n}", f"Answer {(n + 1) % 40}") for n in range(40)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_held_out_pairs_share_nothing_with_training_pairs_nor_with_each_other(kind: str, seed: int) -> None:
    pairs = KINDS[kind](random.Random(seed))
    made = split(pairs, 6)
    held, training = [pairs[row] for row in made.held_out], [pairs[row] for row in made.training]
    assert len(held) == 6
    assert training
    assert not [(a.id, b.id) for a in held for b in training if share(a, b)]
    assert not [(a.id, b.id) for a in held for b in held if a is not b and share(a, b)]
    left = [one for one in pairs if one not in held and one not in training]
    assert len(left) == made.beside
    assert all(any(share(one, other) for other in held) for one in left), "set aside for nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_pairs_depend_on_neither_the_order_nor_the_count(kind: str) -> None:
    pairs = KINDS[kind](random.Random(1))
    turned = random.Random(2).sample(pairs, len(pairs))
    for count in range(1, 6):
        held = set(names(pairs, split(pairs, count).held_out))
        assert held == set(names(turned, split(turned, count).held_out))
        assert held < set(names(pairs, split(pairs, count + 1).held_out))


@pytest.mark.parametrize("rule", [AllOrdered(max_similarity=1.0), BestVsK(k=2, max_similarity=1.0)])
def test_one_pair_of_an_instruction_is_held_out_and_its_others_are_set_aside(rule: PairRule) -> None:
    pairs = by_rule(rule, 12, random.Random(0))
    each = len(pairs) // 12
    made = split(pairs, 4)
    asked = [str(pairs[row].prompt) for row in made.held_out]
    assert len(set(asked)) == 4
    assert made.beside == 4 * (each - 1), "a response that recurs costs no training pair while there are others"
    assert not {str(pairs[row].prompt) for row in made.training} & set(asked)


def test_response_that_stands_everywhere_ties_no_pairs_together() -> None:
    pairs = [
        preference(f"p{n}", f"Ask {n}.", f"Answer {n}", "I do not know." if n % 2 else f"Bad {n}") for n in range(40)
    ]
    made = split(pairs, 20)
    assert all(row % 2 == 0 for row in made.held_out)
    assert (len(made.training), made.beside) == (20, 0)
    with pytest.raises(
        SelfalignError, match=r"train\.validation_pairs=21 of 40 pairs leaves none to train on, because all"
    ):
        split(pairs, 21)


# --- what was trained on before ----------------------------------------------------------------------------------


def trained(folder: Path, name: str) -> Artifact:
    """An artifact that teaches the first pair's texts, in one of the ways there are."""
    first = UNIQUE[0]
    if name == "taught_questions":
        texts = [first.chosen, "Something."]
        question = RankedAnswers(
            id="q", instruction="Why?", texts=texts, ranks=[1, 2], scores=[], justifications=["", ""]
        )
        folder.mkdir()
        write_records(folder / "taught.jsonl", [question])
        write_records(folder / "demonstrations.jsonl", [])
        return artifact(folder)
    records: dict[str, Any] = {
        "prompt": {"demonstrations": [demonstration("d", "Ask 0. ", "Something.")]},
        "response": {"demonstrations": [demonstration("d", "Why?", first.rejected)]},
        "earlier_pairs": {"pairs": [preference("e", "Why?", "Something.", first.chosen)]},
        "earlier_prompt": {"pairs": [pair("e", "Ask 0.", "Something.", "Nothing.")]},
    }
    return records_artifact(folder, **records[name])


TAUGHT = ["prompt", "response", "earlier_pairs", "earlier_prompt", "taught_questions"]


@pytest.mark.parametrize("name", TAUGHT)
def test_pair_that_was_taught_before_is_never_held_out_and_is_counted(tmp_path: Path, name: str) -> None:
    made = split(UNIQUE, 29, trained(tmp_path / "earlier", name))
    assert (list(made.training), len(made.held_out), made.beside, made.passed_over) == ([0], 29, 0, 1)


def test_answers_that_are_only_judged_are_not_taught_but_their_questions_are(tmp_path: Path) -> None:
    """A model that learnt to judge an answer to one question was not taught to give it to another."""
    known = KnownTexts.of([trained(tmp_path / "seeds", "taught_questions")])
    assert not known.shares(texts_of("Ask 0.", UNIQUE[0].chosen, "Something."))
    assert known.shares(texts_of([SYSTEM, user("Why? ")], "New.", "Other."))


def test_nothing_that_was_taught_passes_nothing_over(tmp_path: Path) -> None:
    empty = records_artifact(tmp_path / "seeds", demonstrations=[])
    assert split(UNIQUE, 29, empty).passed_over == split(UNIQUE, 29).passed_over == 0


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (30, r"train\.validation_pairs=30 of 30 pairs leaves none to train on: lower it$"),
        (40, r"train\.validation_pairs=40 of 30 pairs leaves none to train on: lower it$"),
        (
            5,
            r"train\.validation_pairs=5, but only 3 of 30 pairs share no prompt .* \(27 share one with the latter",
        ),
    ],
)
def test_too_few_independent_pairs_are_said_to_be_how_many(tmp_path: Path, count: int, message: str) -> None:
    taught = records_artifact(tmp_path / "seeds", pairs=UNIQUE[3:])
    with pytest.raises(SelfalignError, match=message):
        split(UNIQUE, count, taught)


def test_pairs_that_all_share_a_response_cannot_be_held_out() -> None:
    pairs = [preference(f"p{n}", f"Ask {n}.", f"Answer {n}", "No.") for n in range(10)]
    with pytest.raises(SelfalignError, match=r"=2, but only 1 of 10 pairs share no prompt and no response with one an"):
        split(pairs, 2)
    with pytest.raises(SelfalignError, match=r"=1 of 10 pairs leaves none to train on, because all other"):
        split(pairs, 1)


# --- examples ----------------------------------------------------------------------------------------------------


def stored(folder: Path, pairs: Sequence[PreferencePair]) -> StoredExamples[PairExample]:
    made = [
        PairExample(plain=SharedPrompt(id=one.id, prompt=[1], responses=[[1], [2]], num_context_tokens=[0, 0]))
        for one in pairs
    ]
    return store_examples(folder, PairExample, made, Counter())


def test_examples_are_split_by_the_texts_of_their_pairs_and_long_ones_do_not_count(tmp_path: Path) -> None:
    pairs = by_rule(AllOrdered(max_similarity=1.0), 8, random.Random(0))
    fitting = [one for number, one in enumerate(pairs) if number % 5]
    given = records_artifact(tmp_path / "pairs", pairs=pairs)
    examples = stored(tmp_path / "examples", fitting)
    training, held, made = hold_out(examples, stream_records(given.path / "pairs.jsonl", PreferencePair), 3, [])
    expected = split(fitting, 3)
    assert list(training.ids()) == names(fitting, expected.training)
    assert list(held.ids()) == names(fitting, expected.held_out)
    assert made is not None
    assert (made.beside, made.passed_over) == (expected.beside, 0)


def test_without_held_out_pairs_all_are_trained_on_and_no_text_is_read(tmp_path: Path) -> None:
    examples = stored(tmp_path / "examples", UNIQUE)
    training, held, made = hold_out(examples, iter([]), 0, [])
    assert (list(training.ids()), len(held), made) == ([one.id for one in UNIQUE], 0, None)


def test_digests_and_no_texts_are_kept() -> None:
    """A text of any length takes eight bytes, so memory does not grow with what the pairs say."""
    import tracemalloc

    def peak(size: int) -> int:
        made = (preference(f"p{n}", f"Ask {n}. " + "x" * size, f"Good {n}.", f"Bad {n}.") for n in range(2000))
        tracemalloc.start()
        try:
            split_pairs(made, 10, KnownTexts.of([]))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short, long = peak(0), peak(20_000)
    assert long < short + 500_000, "a share of 40 million characters"
    assert short < 2000 * 500


# --- broken on purpose -------------------------------------------------------------------------------------------

SHARE = test_held_out_pairs_share_nothing_with_training_pairs_nor_with_each_other
BEFORE = test_pair_that_was_taught_before_is_never_held_out_and_is_counted
APART = test_text_in_another_part_is_not_shared
BESIDE = test_pair_that_shares_a_text_is_not_trained_on_beside_it
ORDER = test_held_out_pairs_depend_on_neither_the_order_nor_the_count
MUTANTS = [
    ("neighbours trained on", "training = np.flatnonzero(~excluded)",
     "training = np.setdiff1d(np.arange(size), held_out)", SHARE, {"kind": "all_ordered", "seed": 0}),
    ("dialogues trained on", " | table.context_is_among(own)\n", "\n", BESIDE, {"name": "response_inside_a_dialogue"}),
    ("held out beside each other", "if pair_own.isdisjoint(every) and pair_every.isdisjoint(own):", "if True:",
     test_pairs_that_all_share_a_response_cannot_be_held_out, {}),
    ("SFT data not looked at", "for row in order[~unusable[order]]:", "for row in order:", BEFORE, {"name": "prompt"}),
    ("earlier pairs not looked at", 'for pair in _stream(folder / "pairs.jsonl", PreferencePair):', "for pair in []:",
     BEFORE, {"name": "earlier_pairs"}),
    ("judged answers not looked at", "np.union1d(known.every, known.judged)", "known.every",
     BEFORE, {"name": "taught_questions"}),
    ("responses not looked at",
     "(demonstration.prompt, said(demonstration.response, demonstration.response_calls))", "(demonstration.prompt)",
     BEFORE, {"name": "response"}),
    ("by the place in the file", "np.lexsort((table.order, table.neighbours()))", "np.arange(len(table.order))", ORDER,
     {"kind": "recurring"}),
    ("recurring ones first", "table.order, table.neighbours()", "table.order, -table.neighbours()",
     test_response_that_stands_everywhere_ties_no_pairs_together, {}),
    ("spaces told apart", "{compared(text)}", "{text}", BESIDE, {"name": "prompt_with_spaces_around"}),
    ("system turns told apart", 'turns = [turn for turn in prompt if turn["role"] != "system"]', "turns = prompt",
     BESIDE, {"name": "prompt_behind_a_system_turn"}),
    ("prompts taken for responses", '{kind}\\0', "", APART, {"name": "response_as_prompt"}),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check", "given"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, check: Any, given: dict[str, Any]
) -> None:
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, **given}
    assert_caught(module, sys.modules[__name__], old, new, check, fixtures)
