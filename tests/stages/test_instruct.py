import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import (
    Killed,
    Script,
    ScriptedWriter,
    artifact,
    completion,
    demonstration,
    instruction,
    loaded,
    policy_artifact,
    records_artifact,
    small_context_policy,
    taught_policy,
    workspace,
)

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Demonstration, Instruction, Prompt
from selfalign.data.turns import as_prompt, as_text
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.engines.transformers import Transformers
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages.instruct import InstructConfig, Pool, given_instructions, instruct, split_tasks
from selfalign.store.artifacts import Artifact

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
    settings = {"count": 3, "seed_examples": 2, "generated_examples": 1, "prompts_per_batch": 2, "max_batches": 6}
    return InstructConfig(**{**settings, "sampling": Sampling(max_new_tokens=8), **changes})


def seeds_in(folder: Path, texts: list[str] = SEEDS) -> Artifact:
    given = [demonstration(f"d{number}", text) for number, text in enumerate(texts)]
    return records_artifact(folder / "seeds", demonstrations=given)


def write(folder: Path, tiny: PolicyCheckpoint, settings: InstructConfig, engine: object, **changes: object):
    """Runs the stage; returns its counts and the instructions it kept."""
    inputs = {"policy": policy_artifact(tiny), "seeds": seeds_in(folder), "earlier": [], "held_out": [], "seed": 3}
    counts = instruct(workspace(folder / "out"), config=settings, engine=engine, **{**inputs, **changes})
    return counts, read_records(folder / "out/instructions.jsonl", Instruction)


def scripted(tiny: PolicyCheckpoint, *texts: str, **settings: int) -> Script:
    return Script(loaded(tiny.path), [completion(text) for text in texts], **settings)


def test_tasks_shown_are_what_users_ask_and_neither_system_turns_nor_answers(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "By the sun."}
    prompts: list[Prompt] = [
        [system, *as_prompt(SEEDS[0])],
        [*as_prompt(SEEDS[1]), answer, *as_prompt("And at night?")],
        SEEDS[2],
    ]
    given = [Demonstration(id=f"d{n}", prompt=prompt, response="x", source="ift") for n, prompt in enumerate(prompts)]
    script = scripted(tiny_policy)
    seeds = records_artifact(tmp_path / "given", demonstrations=given)
    settings = config(seed_examples=3, generated_examples=0, max_batches=2)
    with pytest.raises(SelfalignError, match=r"Raise data\.instruct\.max_batches"):
        write(tmp_path, tiny_policy, settings, ScriptedWriter(script), seeds=seeds)
    for request in script.requests:
        shown = script.tokenizer.decode(request.prompt)
        assert all(f": {text}" in shown for text in SEEDS[:3])
        assert not any(text in shown for text in ("Be brief", "By the sun", "And at night"))
    assert script.requests


# --- filters -----------------------------------------------------------------------------------------------------

TEN = "one two three four five six seven eight nine ten"


def reason_of(pool: Pool, text: str, shown: list[str] | None = None) -> str | None:
    """Why the pool does not take a text, or None where it does."""
    before = Counter(pool.dropped)
    taken = pool.offer(text, shown or [])
    (reason,) = [None] if taken else (pool.dropped - before).elements()
    return reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" … !? ", "empty"),
        ("12 30 45 60 75", "fragment"),
        ("- Describe the way to town", "fragment"),
        ("Describe the way to town:", "fragment"),
        ("Describe the way to town\nTask 12", "fragment"),
        ("Explain the moon", "too_short"),
        ("Explain the moon now", None),
        ("Say what happened in the long year twelve of that very old calendar", "too_long"),
        ("What happened in the long year twelve of that very old calendar", None),
        ("Please describe this image to me", "keyword"),
        ("Please describe this IMAGE: to me", "keyword"),
        ("Объясни мне пожалуйста фазы луны", "language"),
        ("When did the old canal open here?", "held_out"),
        ("When, roughly, did the old canal open here?", "held_out"),
        ("Explain how bees find their way home.", "copy_of_seed"),
        ("explain HOW bees - find their way home", "copy_of_seed"),
        ("Write a short poem about old clocks", "copy_of_demonstration"),
        ("Say why the sea is salty", "copy_of_kept"),
        ("one two three four five six seven", "similar"),
        ("Say why the deep sea is salty", "similar"),
        ("Tell me what imagery means in poems", None),
    ],
)
def test_filter_gives_its_reason(text: str, reason: str | None) -> None:
    settings, asked = config(min_words=4, max_words=12), "When did the old canal open here?"
    pool = Pool(settings, [SEEDS[0], SEEDS[1], TEN], ["Say why the sea is salty"], [asked])
    assert reason_of(pool, text, [SEEDS[1]]) == reason
    assert pool.kept == ([] if reason else [text])


def test_default_keywords_are_found_in_the_plural_too() -> None:
    plurals = ["images", "pictures", "photos", "graphs", "diagrams", "videos", "plots", "files", "maps"]
    texts = [f"Describe the {word} that you can see here" for word in plurals]
    assert {reason_of(Pool(config(), []), text) for text in texts} == {"keyword"}


def test_keywords_may_be_phrases_in_any_case() -> None:
    settings = config(keywords=["Python", "social media", "e-mail", "U\u0308bung", "图片", "Tip sheet"])
    with_one = [
        "Write a python function that adds numbers",
        "Explain why Social Media is so popular",
        "Write a short E-mail to your boss",
        "Describe one \u00dcbung that helps my back",
        "请描述这张图片里的东西",
        "Compare the two tip sheets you know",
    ]
    assert {reason_of(Pool(settings, []), text) for text in with_one} == {"keyword"}
    for text in ("Name three social rules of old media", "Name three antisocial media of our time"):
        assert reason_of(Pool(settings, []), text) is None
    with pytest.raises(SelfalignError, match=re.escape("data.instruct.keywords: '?!' has no word")):
        config(keywords=["image", "?!"])


def test_similar_begins_exactly_at_seven_tenths() -> None:
    at = "one two three four five six seven x y z"  # LCS 7: 2·7 / (10 + 10) = 0.7
    below = "one two three four five six seven w x y z"  # 2·7 / (10 + 11) = 0.667
    assert reason_of(Pool(config(), [TEN]), at) == "similar"
    assert reason_of(Pool(config(), [TEN]), below) is None
    assert reason_of(Pool(config(max_rouge_l=0.71), [TEN]), at) is None
    assert reason_of(Pool(config(), [], [], [TEN]), at) == "held_out"
    assert reason_of(Pool(config(), [], [], [TEN]), below) is None


def test_word_order_counts_for_similarity() -> None:
    assert reason_of(Pool(config(), [TEN]), "ten nine eight seven six five four three two one") is None


def test_taken_text_is_one_that_later_ones_must_differ_from() -> None:
    pool = Pool(config(), [])
    assert [reason_of(pool, text) for text in (TEN, TEN, TEN + " eleven")] == [None, "copy_of_kept", "similar"]
    assert pool.kept == [TEN]


def test_full_pool_takes_nothing_more() -> None:
    pool = Pool(config(count=1), [])
    assert [reason_of(pool, text) for text in (TEN, "Say why the sea is salty", "")] == [None, "surplus", "surplus"]


def test_novelty_and_diversity_are_worked_by_hand() -> None:
    pool = Pool(config(), ["one two three four"], ["five six seven eight"], [])
    texts = ["one two nine ten", "five six nine ten", "a b c d e one"]
    assert all(pool.offer(text) for text in texts)
    # LCS 2 of 4 + 4; 2 of 4 + 4, against the earlier one and the first new one alike; 1 of 6 + 4.
    assert pool.highest == [0.5, 0.5, 0.2]
    assert pool.counts() == {
        "kept": 3,
        "dropped": {},
        "novelty": pytest.approx(1 - 1.2 / 3),
        "distinct_1": 11 / 14,  # one, nine and ten stand twice
        "distinct_2": 10 / 11,  # nine ten stands twice
        "mean_words": 14 / 3,
    }


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


def test_every_written_text_is_kept_or_counted_as_dropped(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    long = " ".join(f"w{n}" for n in range(40))
    replies = [
        completion("Describe how glass is blown by hand."),  # kept
        completion("Explain how bees find their way home."),  # copy of a seed the prompt shows
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
        "copy_of_demonstration": 1,
        "copy_of_kept": 1,
        "empty": 1,
        "keyword": 1,
        "similar": 2,
        "surplus": 2,
        "too_long": 1,
        "too_short": 1,
        "truncated": 1,
    }
    assert (counts["kept"], counts["batches"]) == (3, 2)
    assert counts["written"] == counts["kept"] + sum(counts["dropped"].values()) == 14


def test_new_instruction_differs_from_those_of_earlier_iterations(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    before = records_artifact(
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
    assert counts["dropped"]["copy_of_demonstration"] == counts["dropped"]["similar"] == 1


def test_copy_of_what_the_prompt_shows_is_told_from_a_copy_of_another_seed(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    parrot = " ".join(f"\nTask {n}: {text}" for n, text in enumerate(SEEDS))
    script = scripted(tiny_policy, "Say why the sea is salty." + parrot)
    counts, kept = write(tmp_path, tiny_policy, config(count=1, prompts_per_batch=1), script)
    assert [record.text for record in kept] == ["Say why the sea is salty."]
    assert counts["dropped"] == {"surplus": 6}
    (tmp_path / "again").mkdir()
    script = scripted(tiny_policy, parrot, "Say why the sea is salty.")
    counts, _ = write(tmp_path / "again", tiny_policy, config(count=1, prompts_per_batch=1), script)
    assert counts["dropped"] == {"copy_of_demonstration": 3, "copy_of_seed": 3, "empty": 1}


def test_copy_of_a_held_out_instruction_is_dropped(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    asked = records_artifact(tmp_path / "asked", instructions=[instruction("q", "When did the old canal open here?")])
    ranked = records_artifact(tmp_path / "ranked", instructions=[instruction("r", "Which bread keeps longest at sea?")])
    texts = ["When did the old canal open here?", "Say why the sea is salty.", "Which dark bread keeps longest at sea?"]
    script = scripted(tiny_policy, *texts, TEN)
    counts, kept = write(tmp_path, tiny_policy, config(count=2), script, held_out=[asked, ranked])
    assert [record.text for record in kept] == [texts[1], TEN]
    assert counts["dropped"] == {"held_out": 2}


def examples_in(request: Request, tiny: PolicyCheckpoint) -> tuple[list[str], str]:
    """The demonstrations a prompt shows, and how its answer is begun."""
    text = loaded(tiny.path).tokenizer.decode(request.prompt)
    asked, _, answer = text.partition("<|im_end|>")
    return re.findall(r"^Task \d+: (.*)$", asked, re.MULTILINE), answer.rsplit("\n", 1)[-1]


def test_prompts_show_the_configured_numbers_of_seeds_and_own_instructions(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    texts = [
        "Describe how glass is blown by hand.",
        "Say why the sea is salty.",
        "Give two reasons to learn chess.",
        "",
        "Compare cider with sweet lemon juice.",
    ]
    script = scripted(tiny_policy, *texts)
    settings = config(count=4, seed_examples=3, generated_examples=2)
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


def test_paper_s_prompt_shows_six_seeds_and_two_own_instructions_drawn_by_seed(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    own = [f"Name thing number {word} of this town." for word in ("one", "two", "three", "four")]
    earlier = records_artifact(tmp_path / "earlier", instructions=[instruction(text, text) for text in own])
    seeds = seeds_in(tmp_path, [*SEEDS, "Add two numbers for me.", "Say who built the old bridge.", "Define a verb."])
    shown = {}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        script = scripted(tiny_policy, *[f"Text number {n} is this {n} {n} {n}." for n in range(32)])
        write(tmp_path / name, tiny_policy, InstructConfig(count=4), script, earlier=[earlier], seeds=seeds, seed=seed)
        shown[name] = [examples_in(request, tiny_policy)[0] for request in script.requests]
    assert len(shown["one"]) == 32
    for examples in shown["one"]:
        assert len(examples) == 8
        assert len(set(examples) & set(own)) == 2
    assert shown["one"] == shown["again"] != shown["other"]
    assert any(examples[:6] != shown["one"][0][:6] for examples in shown["one"])


def test_prompt_is_in_the_writer_s_own_chat_template(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    other = small_context_policy(tiny_policy, tmp_path / "other", 2048)
    tokenizer = other.load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    tokenizer.save_pretrained(other.path / "tokenizer")
    for policy, opening, closing in (
        (tiny_policy, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\nTask 4:"),
        (other, "[user] ", "<|endoftext|>[assistant] Task 4:"),
    ):
        generator = Transformers(dtype="float32").load(policy)
        script = scripted(policy, "Say why the sea is salty.")
        write(tmp_path / opening[0], policy, config(count=1), script)
        prompt = generator.tokenizer.decode(script.requests[0].prompt)
        assert prompt.startswith(opening + config().prompt)
        assert prompt.endswith(closing)
        # It stops where its own template ends a turn.
        assert generator.tokenizer.convert_tokens_to_ids(closing.split(">")[0] + ">") in generator.stops.tolist()


def test_failure_of_the_generator_is_no_empty_instruction(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = scripted(tiny_policy, "Say why the sea is salty.")
    answer = script.generate

    def fail_later(requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        if script.requests:
            raise RuntimeError("out of memory")
        return answer(requests, sampling)

    monkeypatch.setattr(script, "generate", fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        write(tmp_path, tiny_policy, config(), script)
    assert len((tmp_path / "out/scratch/journal-0.jsonl").read_text().splitlines()) == 1


def test_prompts_do_not_grow_from_batch_to_batch(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    script = scripted(tiny_policy)
    with pytest.raises(SelfalignError):
        write(tmp_path, tiny_policy, config(), script)
    assert len(script.requests) == 12
    assert {len(examples_in(request, tiny_policy)[0]) for request in script.requests} == {3}
    assert len({seed for request in script.requests for seed in request.seeds}) == 12


def test_too_few_batches_stop_the_run_with_counts(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    script = scripted(tiny_policy, "Say why the sea is salty.", "Too short.", "Explain how bees find their way home.")
    with pytest.raises(SelfalignError) as stop:
        write(tmp_path, tiny_policy, config(max_batches=2), script)
    message = str(stop.value)
    assert message.startswith("stage: 1 of 3 instructions after 2 batches")
    assert all(part in message for part in ("'too_short': 1", "'copy_of_", "'empty': 1", "data.instruct.max_batches"))
    assert not (tmp_path / "out/instructions.jsonl").exists()
    assert len((tmp_path / "out/scratch/journal-0.jsonl").read_text().splitlines()) == 2


def test_too_few_seeds_for_the_prompt_are_an_error(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with pytest.raises(SelfalignError, match=r"data\.instruct\.seed_examples=7, but there are 6 IFT seeds"):
        write(tmp_path, tiny_policy, config(seed_examples=7), scripted(tiny_policy))


def test_prompt_longer_than_the_context_is_an_error_with_a_remedy(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    settings = config(sampling=Sampling(max_new_tokens=2040))
    with pytest.raises(SelfalignError, match=r"data\.instruct\.seed_examples"):
        write(tmp_path, tiny_policy, settings, scripted(tiny_policy))


def test_same_seed_writes_the_same_instructions(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory
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


def test_interrupted_writing_goes_on_where_it_stopped(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
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


def test_instructions_carry_who_wrote_them_in_their_id(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
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
        ({"model": "gpt"}, "model"),
        ({"model": "./model", "source": "tasks.jsonl"}, "model"),
        ({"seed_examples": 0}, "seed_examples"),
        ({"generated_examples": -1}, "generated_examples"),
        ({"min_words": 9, "max_words": 8}, "max_words"),
        ({"max_rouge_l": 0.0}, "max_rouge_l"),
        ({"max_batches": -1}, "max_batches"),
        (
            {"max_batches": 2, "prompts_per_batch": 30, "count": 61},
            "count=61, but .*max_batches=2 of .*ask for 60 tasks",
        ),
    ],
)
def test_value_out_of_range_is_refused_with_its_key(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=rf"data\.instruct\.{named}"):
        InstructConfig(**settings)


def test_writer_is_one_of_the_run_s_models_or_a_path() -> None:
    own = [InstructConfig(model=name) for name in ("self", "sft", "base")]
    fixed = [InstructConfig(model=name) for name in ("./model", "/models/chat", "owner/name", "random:tiny")]
    assert [settings.fixed_writer for settings in own + fixed] == [False] * 3 + [True] * 4


# --- given instructions ------------------------------------------------------------------------------------------

GIVEN = [
    "Describe how glass is blown by hand.",
    "Explain how bees find their way home.",  # a seed
    "Say why the sea is salty.",
    "Too short.",
    "Describe how red glass is blown by hand.",  # similar
    "Give two reasons to learn chess.",
    "When did the old canal open here?",  # held out
    "Compare cider with sweet lemon juice.",
    "Name a good old song to sing.",
]


def take(folder: Path, count: int, earlier: list[Artifact], texts: list[str] = GIVEN, **changes: Any):
    """Runs the stage; returns its counts and what it made, as an artifact."""
    given = records_artifact(folder / "given", instructions=[instruction(f"g{n}", t) for n, t in enumerate(texts)])
    asked = records_artifact(folder / "asked", instructions=[instruction("q", "When did the old canal open here?")])
    inputs = {"given": given, "seeds": seeds_in(folder), "held_out": [asked], **changes}
    settings = config(count=count, source="tasks.jsonl")
    out = workspace(folder / f"out{len(earlier)}")
    counts = given_instructions(out, config=settings, earlier=earlier, **inputs)
    shutil.rmtree(out.scratch)
    return counts, artifact(out.path)


def texts_in(made: Artifact) -> list[str]:
    return [record.text for record in read_records(made.path / "instructions.jsonl", Instruction)]


def test_given_instructions_are_taken_in_their_order_and_once(tmp_path: Path) -> None:
    counts, first = take(tmp_path, 2, [])
    assert texts_in(first) == [GIVEN[0], GIVEN[2]]
    assert counts["dropped"] == {"copy_of_seed": 1}
    assert counts["written"] == counts["kept"] + sum(counts["dropped"].values()) == 3
    counts, second = take(tmp_path, 2, [first])
    assert texts_in(second) == [GIVEN[5], GIVEN[7]]
    assert counts["dropped"] == {"too_short": 1, "similar": 1, "held_out": 1}
    assert counts["written"] == counts["kept"] + sum(counts["dropped"].values()) == 5
    assert counts["novelty"] == 1
    assert counts["mean_words"] == 6
    records = read_records(second.path / "instructions.jsonl", Instruction)
    assert [(record.id, record.source) for record in records] == [("g5", "given"), ("g7", "given")]


def test_too_few_given_instructions_are_an_error_with_counts(tmp_path: Path) -> None:
    _, first = take(tmp_path, 3, [])
    with pytest.raises(SelfalignError) as stop:
        take(tmp_path, 3, [first])
    message = str(stop.value)
    assert message.startswith(
        "stage: only 2 of 3 instructions passed the filters, of the 3 that are left of the 9 in "
        "data.instruct.source=tasks.jsonl"
    )
    assert "'held_out': 1" in message
    assert "data.instruct.count" in message


def test_given_instructions_need_no_seeds(tmp_path: Path) -> None:
    empty = replace(records_artifact(tmp_path / "none", demonstrations=[]), counts={"ift": 0, "eft": 0})
    _, made = take(tmp_path, 2, [], seeds=empty)
    assert texts_in(made) == GIVEN[:2]


RULES = (
    "You work at the desk of a small museum at the sea. Answer every guest politely and in a few words, say nothing "
    "about prices, and name the room in which a thing can be seen."
)


def under_rules(name: str, *turns: str) -> Instruction:
    """An instruction under a long system turn, whose turns are the user's and the assistant's by turns."""
    roles = ("user", "assistant") * len(turns)
    spoken = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    listed = [{"role": "system", "content": RULES}, *spoken]
    return Instruction(id=name, text=as_text(listed), source="given", turns=listed)


def test_system_turn_neither_hides_a_held_out_question_nor_makes_questions_alike(tmp_path: Path) -> None:
    held_out = "When did the old canal open here?"
    given = [
        under_rules("asked", held_out),
        under_rules("gone-on", held_out, "In spring.", "And which boat was the first one on it?"),
        under_rules("salt", GIVEN[2]),
        under_rules("seed", GIVEN[1]),
        under_rules("chess", GIVEN[5]),
        instruction("again", GIVEN[5]),
        under_rules("cider", GIVEN[7]),
    ]
    asked_for = records_artifact(tmp_path / "tasks", instructions=given)
    counts, made = take(tmp_path, 3, [], given=asked_for)
    kept = read_records(made.path / "instructions.jsonl", Instruction)
    assert [record.id for record in kept] == ["salt", "chess", "cider"]
    assert [record.turns[0]["content"] for record in kept] == [RULES] * 3
    assert counts["dropped"] == {"copy_of_kept": 1, "copy_of_seed": 1, "held_out": 2}


def test_held_out_question_under_a_system_turn_is_not_asked_without_it(tmp_path: Path) -> None:
    measured = records_artifact(
        tmp_path / "measured", instructions=[under_rules("q", GIVEN[0], "By breath.", GIVEN[7])]
    )
    counts, made = take(tmp_path, 2, [], held_out=[measured])
    assert texts_in(made) == [GIVEN[2], GIVEN[5]]
    assert counts["dropped"]["held_out"] == 2
