import random
import re
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from builders import (
    Killed,
    Script,
    completion,
    demonstration,
    instruction,
    loaded,
    policy_artefact,
    records_artefact,
    taught_policy,
    workspace,
)

from selfalign.errors import SelfalignError
from selfalign.generation import Request, Sampling, Transformers
from selfalign.models import PolicyFiles
from selfalign.records import Instruction, read_records
from selfalign.stages.instruct import InstructConfig, Pool, instruct, rouge_l, split_tasks, words_of
from selfalign.store import Artefact

SEEDS = [
    "Explain how bees find their way home.",
    "Write a short poem about old clocks.",
    "List three uses of dry bread.",
    "Why do rivers bend on flat ground?",
    "Translate good morning into Spanish please.",
    "Name the largest planets in order.",
]
"""No two share enough words to be similar."""


def config(**changes: object) -> InstructConfig:
    settings = {"count": 3, "seed_demonstrations": 2, "own_demonstrations": 1, "prompts_per_batch": 2, "max_batches": 6}
    return InstructConfig(**{**settings, "sampling": Sampling(max_new_tokens=8), **changes})


def seeds_in(folder: Path, texts: list[str] = SEEDS) -> Artefact:
    given = [demonstration(f"d{number}", text) for number, text in enumerate(texts)]
    return records_artefact(folder / "seeds", demonstrations=given)


def write(folder: Path, tiny: PolicyFiles, settings: InstructConfig, generate: object, **changes: object):
    """Runs the stage; returns its counts and the instructions it kept."""
    inputs = {"policy": policy_artefact(tiny), "seeds": seeds_in(folder), "earlier": [], "seed": 3, **changes}
    counts = instruct(workspace(folder / "out"), config=settings, generate=generate, **inputs)
    return counts, read_records(folder / "out/instructions.jsonl", Instruction)


def scripted(tiny: PolicyFiles, *texts: str, **settings: int) -> Script:
    return Script(loaded(tiny.path), [completion(text) for text in texts], **settings)


# --- filters -----------------------------------------------------------------------------------------------------

TEN = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" … !? ", "empty"),
        ("Explain the moon", "too_short"),
        ("Explain the moon now", None),
        ("Say what happened in the long year twelve of that very old calendar", "too_long"),
        ("What happened in the long year twelve of that very old calendar", None),
        ("Please describe this image to me", "keyword"),
        ("Please describe this IMAGE: to me", "keyword"),
        ("Explain how bees find their way home.", "copy"),
        ("explain HOW bees - find their way home", "copy"),
        ("one two three four five six seven", "similar"),
        ("Tell me what imagery means in poems", None),
    ],
)
def test_filter_gives_its_reason(text: str, reason: str | None) -> None:
    pool = Pool(config(min_words=4, max_words=12), [SEEDS[0], TEN], [])
    assert pool.reason_against(text) == reason


def test_default_keywords_are_found_in_the_plural_too() -> None:
    plurals = ["images", "pictures", "photos", "graphs", "diagrams", "videos", "plots", "files", "maps"]
    pool = Pool(config(), [], [])
    missed = [word for word in plurals if pool.reason_against(f"Describe the {word} that you can see here") is None]
    assert missed == []


def test_similar_begins_exactly_at_seven_tenths() -> None:
    pool = Pool(config(), [TEN], [])
    at = "one two three four five six seven x y z"  # LCS 7: 2·7 / (10 + 10) = 0.7
    below = "one two three four five six seven w x y z"  # 2·7 / (10 + 11) = 0.667
    assert pool.reason_against(at) == "similar"
    assert pool.reason_against(below) is None
    assert Pool(config(max_rouge=0.71), [TEN], []).reason_against(at) is None


def test_word_order_counts_for_similarity() -> None:
    pool = Pool(config(), [TEN], [])
    assert pool.reason_against("ten nine eight seven six five four three two one") is None


def test_taken_text_is_one_that_later_ones_must_differ_from() -> None:
    pool = Pool(config(), [], [])
    assert pool.reason_against(TEN) is None
    pool.add(TEN)
    assert pool.reason_against(TEN) == "copy"
    assert pool.reason_against(TEN + " eleven") == "similar"
    assert pool.kept == [TEN]


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """By trying every subsequence of the shorter list, longest first."""
    short, long = sorted((a, b), key=len)

    def occurs(words: tuple[str, ...]) -> bool:
        rest = iter(long)
        return all(word in rest for word in words)

    sizes = range(len(short), 0, -1)
    return next((n for n in sizes if any(occurs(words) for words in combinations(short, n))), 0)


def test_rouge_agrees_with_a_case_worked_by_hand() -> None:
    a, b = ["the", "cat", "sat", "on", "the", "mat"], ["the", "mat", "the", "cat", "was", "on"]
    assert longest_common_subsequence(a, b) == 3  # the cat … on; 2·3 / (6 + 6) = 0.5
    assert rouge_l(a, b, 0.5)
    assert not rouge_l(a, b, 0.501)


def test_rouge_agrees_with_brute_force_on_random_texts() -> None:
    draw = random.Random(0)
    outcomes = set()
    for _ in range(400):
        a, b = ([draw.choice("abcd") for _ in range(draw.randint(1, 9))] for _ in range(2))
        exact = Fraction(2 * longest_common_subsequence(a, b), len(a) + len(b))
        for threshold in ("0.3", "0.5", "0.7", "1"):
            expected = exact >= Fraction(threshold)
            assert rouge_l(a, b, float(threshold)) == expected, (a, b, threshold)
            outcomes.add((threshold, expected))
    assert len(outcomes) == 8


def test_rouge_is_exact_wherever_the_score_is_exactly_seven_tenths() -> None:
    for scale in range(1, 9):
        common = [str(n) for n in range(7 * scale)]
        for extra in range(6 * scale + 1):
            a = common + ["a"] * extra
            b = common + ["b"] * (6 * scale - extra)
            assert rouge_l(a, b, 0.7)
            assert not rouge_l([*a, "a"], b, 0.7)


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words_of("Don't stop: “Ça va”, 3 times!") == ["don", "t", "stop", "ça", "va", "3", "times"]


# --- splitting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cut", "tasks", "dropped"),
    [
        (" Name a bird.", False, ["Name a bird."], 0),
        ("Name a bird.\n\nTask 10: Name a fish.\nTask 11: Name a tree.", False, ["a bird", "a fish", "a tree"], 0),
        ("Name a bird.\nTask 10: Name a fi", True, ["a bird"], 1),
        ("Name a bi", True, [], 1),
        ("Write two lines.\nThe second rhymes.", False, ["two lines.\nThe second"], 0),
        ("Name a bird.\n**Task 10**: no\n- Task 11: Name a fish.", False, ["a bird", "a fish"], 0),
        ("Say what Task 3: means.", False, ["Say what Task 3: means."], 0),
    ],
)
def test_completion_is_split_into_its_tasks(text: str, cut: bool, tasks: list[str], dropped: int) -> None:
    found, count = split_tasks(completion(text, cut=cut))
    assert count == dropped
    assert len(found) == len(tasks)
    assert all(part in task for part, task in zip(tasks, found, strict=True))
    assert all(task == task.strip() for task in found)


# --- the stage ---------------------------------------------------------------------------------------------------


def test_every_written_text_is_kept_or_counted_as_dropped(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    long = " ".join(f"w{n}" for n in range(40))
    replies = [
        completion("Describe how glass is blown by hand."),  # kept
        completion("Explain how bees find their way home."),  # copy of a seed
        completion("Explain how tall bees find their way home today."),  # similar to a seed
        completion("Describe how glass is blown by hand."),  # copy of a kept one
        completion("Describe how red glass is blown by hand."),  # similar to a kept one
        completion("Too short."),
        completion(long),
        completion("Draw a nice picture of my house."),
        completion(""),
        completion(
            "Give two reasons to learn chess.\nTask 5: Compare cider with sweet lemon juice.\nTask 6: Sa", cut=True
        ),
        completion("What would a quiet town need most?"),  # there are three already
        completion("Anything after the batch is surplus too?"),
    ]
    script = Script(loaded(tiny_policy.path), replies)
    counts, kept = write(tmp_path, tiny_policy, config(prompts_per_batch=6, max_words=30), script)
    assert [record.text for record in kept] == [
        "Describe how glass is blown by hand.",
        "Give two reasons to learn chess.",
        "Compare cider with sweet lemon juice.",
    ]
    assert counts["dropped"] == {
        "copy": 2,
        "empty": 1,
        "keyword": 1,
        "similar": 2,
        "surplus": 2,
        "too_long": 1,
        "too_short": 1,
        "truncated": 1,
    }
    assert (counts["kept"], counts["batches"]) == (3, 2)
    dropped = sum(n for reason, n in counts["dropped"].items() if reason != "truncated")
    assert counts["written"] == counts["kept"] + dropped == 13


def test_new_instruction_differs_from_those_of_earlier_iterations(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    before = records_artefact(
        tmp_path / "before", instructions=[instruction("b", "Describe how glass is blown by hand.")]
    )
    texts = [
        "Describe how glass is blown by hand!",
        "Describe how red glass is blown by hand.",
        "Say why the sea is salty.",
    ]
    alone, kept_alone = write(tmp_path / "alone", tiny_policy, config(count=2), scripted(tiny_policy, *texts))
    counts, kept = write(
        tmp_path / "after", tiny_policy, config(count=1), scripted(tiny_policy, *texts), earlier=[before]
    )
    assert [record.text for record in kept_alone] == [texts[0], texts[2]]
    assert alone["dropped"] == {"similar": 1, "surplus": 1}
    assert [record.text for record in kept] == [texts[2]]
    assert counts["dropped"]["copy"] == counts["dropped"]["similar"] == 1


def examples_in(request: Request, tiny: PolicyFiles) -> tuple[list[str], str]:
    """The demonstrations a prompt shows, and how its answer is begun."""
    text = loaded(tiny.path).tokenizer.decode(request.prompt)
    asked, _, answer = text.partition("<|im_end|>")
    return re.findall(r"^Task \d+: (.*)$", asked, re.MULTILINE), answer.rsplit("\n", 1)[-1]


def test_prompts_show_the_configured_numbers_of_seeds_and_own_instructions(
    tmp_path: Path, tiny_policy: PolicyFiles
) -> None:
    texts = [
        "Describe how glass is blown by hand.",
        "Say why the sea is salty.",
        "Give two reasons to learn chess.",
        "",
        "Compare cider with sweet lemon juice.",
    ]
    script = scripted(tiny_policy, *texts)
    settings = config(count=4, seed_demonstrations=3, own_demonstrations=2)
    write(tmp_path, tiny_policy, settings, script)
    shown = [examples_in(request, tiny_policy) for request in script.requests]
    assert len(shown) == 6
    for number, (examples, begun) in enumerate(shown):
        own = [text for text in examples if text in texts]
        assert begun == "Task 6:"
        assert len(examples) == len(set(examples)) == 5
        assert len(own) == (0 if number < 2 else 2)
        assert set(examples) - set(own) <= set(SEEDS)
    # Prompts of one batch are drawn apart, and what one of them brought is not in its neighbour.
    assert shown[0] != shown[1]
    assert {text for examples, _ in shown[2:4] for text in examples if text in texts} == set(texts[:2])


def test_prompts_do_not_grow_from_batch_to_batch(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    script = scripted(tiny_policy)
    with pytest.raises(SelfalignError):
        write(tmp_path, tiny_policy, config(), script)
    assert len(script.requests) == 12
    assert {len(examples_in(request, tiny_policy)[0]) for request in script.requests} == {3}
    assert len({seed for request in script.requests for seed in request.seeds}) == 12


def test_too_few_batches_stop_the_run_with_counts(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    script = scripted(tiny_policy, "Say why the sea is salty.", "Too short.", "Explain how bees find their way home.")
    with pytest.raises(SelfalignError) as stop:
        write(tmp_path, tiny_policy, config(max_batches=2), script)
    message = str(stop.value)
    assert message.startswith("stage: 1 of 3 instructions after 2 batches")
    assert all(part in message for part in ("'too_short': 1", "'copy': 1", "'empty': 1", "data.instruct.max_batches"))
    assert not (tmp_path / "out/instructions.jsonl").exists()
    assert len((tmp_path / "out/scratch/journal.jsonl").read_text().splitlines()) == 2


def test_too_few_seeds_for_the_prompt_are_an_error(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    with pytest.raises(SelfalignError, match=r"data\.instruct\.seed_demonstrations=7, but there are 6 IFT seeds"):
        write(tmp_path, tiny_policy, config(seed_demonstrations=7), scripted(tiny_policy))


def test_prompt_longer_than_the_context_is_an_error_with_a_remedy(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    settings = config(sampling=Sampling(max_new_tokens=2040))
    with pytest.raises(SelfalignError, match=r"data\.instruct\.seed_demonstrations"):
        write(tmp_path, tiny_policy, settings, scripted(tiny_policy))


def test_same_seed_writes_the_same_instructions(
    tmp_path: Path, tiny_policy: PolicyFiles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = taught_policy(tiny_policy, tmp_path_factory.mktemp("fluent"))
    settings = config(
        count=2,
        min_words=1,
        prompts_per_batch=4,
        max_batches=40,
        sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12),
    )
    backend = Transformers(dtype="float32")
    texts = {}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        write(tmp_path / name, policy, settings, backend, seed=seed)
        texts[name] = (tmp_path / name / "out/instructions.jsonl").read_bytes()
    assert texts["one"] == texts["again"] != texts["other"]


def test_interrupted_writing_goes_on_where_it_stopped(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    texts = [
        "Say why the sea is salty.",
        "",
        "",
        "Give two reasons to learn chess.",
        "Name a good old song to sing.",
        "",
    ]
    whole, _ = write(tmp_path / "whole", tiny_policy, config(), scripted(tiny_policy, *texts))
    with pytest.raises(Killed):
        write(tmp_path / "cut", tiny_policy, config(), scripted(tiny_policy, *texts, dies_after=2))
    rest = scripted(tiny_policy, *texts[4:])
    counts, _ = write(tmp_path / "cut", tiny_policy, config(), rest)
    assert len(rest.requests) == 2
    assert counts == whole
    files = [tmp_path / name / "out/instructions.jsonl" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_instructions_carry_who_wrote_them_in_their_id(tmp_path: Path, tiny_policy: PolicyFiles) -> None:
    text = "Say why the sea is salty."
    _, (record,) = write(tmp_path / "a", tiny_policy, config(count=1), scripted(tiny_policy, text))
    _, (again,) = write(tmp_path / "b", tiny_policy, config(count=1), scripted(tiny_policy, text))
    assert record == again
    assert record.source == "self"
    assert len(record.id) == 16


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"count": 0}, "count"),
        ({"writer": "gpt"}, "writer"),
        ({"seed_demonstrations": 0}, "seed_demonstrations"),
        ({"own_demonstrations": -1}, "own_demonstrations"),
        ({"min_words": 9, "max_words": 8}, "max_words"),
        ({"max_rouge": 0.0}, "max_rouge"),
        ({"max_batches": 0}, "max_batches"),
    ],
)
def test_value_out_of_range_is_refused_with_its_key(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=rf"data\.instruct\.{named}"):
        InstructConfig(**settings)
