"""SFT on every turn of the assistant's: what is taught, what is counted, and the loss against plain forward passes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import loaded, optimization, policy_artifact, records_artifact, weights, wider_policy, workspace
from test_prompt_boundary import CHATML, COLON_AND_SPACE
from thinking_families import thinking_tokenizer

from selfalign.core.jsonl import read_records
from selfalign.core.records import Demonstration
from selfalign.models.batches import make_batch
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import make_scoring
from selfalign.stages.instruct import InstructConfig, _pool
from selfalign.stages.judge import ExpectedScore
from selfalign.stages.seed_data import AssistantTurns, SeedDataConfig, seed_data
from selfalign.stages.sft import group_demonstrations, sft
from selfalign.store.key import to_key_json
from selfalign.training.objective import Likelihood

Row = dict[str, Any]

JUDGE = ExpectedScore(prompt="Grade.\n{instruction}\n{response}\nReply: Score: <points>")


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def say(text: str, **marks: Any) -> Row:
    return {"role": "assistant", "content": text, **marks}


BIRDS = [user("Name a bird."), say("A wren."), user("And another?"), say("An old owl."), user("Why?"), say("It hoots.")]
FISH = [system("Be brief."), user("Name a fish."), say("A cod.")]


def seeds(folder: Path, *rows: Row, turns: str = "all", **settings: Any) -> tuple[Row, list[Demonstration]]:
    """The counts and the demonstrations that the stage makes of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "given.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = SeedDataConfig(demonstrations=str(file), ranked="", assistant_turns=AssistantTurns(turns), **settings)
    counts = seed_data(workspace(folder / "out"), config=config, judge=JUDGE, contents=["a"])
    return counts, read_records(folder / "out/demonstrations.jsonl", Demonstration)


def taught(demonstrations: list[Demonstration]) -> list[str]:
    return [one.response for one in demonstrations]


def test_each_turn_of_the_assistants_is_taught_behind_the_turns_before_it(tmp_path: Path) -> None:
    counts, made = seeds(tmp_path, {"id": "b", "messages": BIRDS}, {"id": "f", "messages": FISH})
    assert [(one.id, one.question, one.prompt, one.response) for one in made] == [
        ("b/turn-1", "b", BIRDS[:1], "A wren."),
        ("b/turn-2", "b", BIRDS[:3], "An old owl."),
        ("b/turn-3", "b", BIRDS[:5], "It hoots."),
        ("f", "", FISH[:2], "A cod."),
    ]
    assert (counts["ift"], counts["ift_turns"], counts["dropped"]) == (2, 4, {})


def test_last_turn_alone_is_taught_unless_said_and_its_key_is_that_of_before(tmp_path: Path) -> None:
    counts, made = seeds(tmp_path, {"id": "b", "messages": BIRDS}, turns="last")
    assert [(one.id, one.question, one.prompt) for one in made] == [("b", "", BIRDS[:5])]
    assert "ift_turns" not in counts
    assert "assistant_turns" not in to_key_json(SeedDataConfig())
    assert to_key_json(SeedDataConfig(assistant_turns=AssistantTurns.all))["assistant_turns"] == "all"


def test_greeting_of_the_assistants_before_any_question_is_not_taught(tmp_path: Path) -> None:
    _, made = seeds(tmp_path, {"id": "g", "messages": [say("Hello!"), *BIRDS[:4]]})
    assert taught(made) == ["A wren.", "An old owl."]
    assert made[0].prompt == [say("Hello!"), BIRDS[0]]


def test_answer_that_continues_a_given_beginning_is_one_turn(tmp_path: Path) -> None:
    row = {"id": "p", "prompt": [*BIRDS[:3], say("An old")], "completion": [say(" owl.")]}
    _, made = seeds(tmp_path, row)
    assert taught(made) == ["A wren.", " owl."]
    assert made[1].prompt == row["prompt"]


def test_most_demonstrations_are_conversations(tmp_path: Path) -> None:
    rows = [{"id": "b", "messages": BIRDS}, {"id": "f", "messages": FISH}]
    counts, made = seeds(tmp_path, *rows, max_demonstrations=1)
    assert taught(made) == ["A wren.", "An old owl.", "It hoots."]
    assert (counts["ift"], counts["ift_turns"]) == (1, 3)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": "0"}, {"train": "False"}]
)
def test_turns_that_the_data_mark_are_read_but_not_taught_and_counted(tmp_path: Path, mark: Row) -> None:
    def marked(*places: int) -> list[Row]:
        return [turn | mark if at in places else turn for at, turn in enumerate(BIRDS)]

    rows = [
        {"id": "first", "messages": [system(" "), *marked(1)], "system": "First."},
        {"id": "last", "messages": marked(5), "system": "Last."},
        {"id": "none", "messages": marked(1, 3, 5), "system": "None."},
    ]
    counts, made = seeds(tmp_path, *rows)
    assert [(one.id, one.response) for one in made] == [
        ("first/turn-1", "An old owl."),
        ("first/turn-2", "It hoots."),
        ("last/turn-1", "A wren."),
        ("last/turn-2", "An old owl."),
    ]
    assert made[1].prompt == [system("First."), *BIRDS[:5]]
    assert counts["dropped"] == {"demonstrations_not_to_train_on": 1, "demonstrations_turns_not_to_train_on": 2}


def test_turns_of_a_prompt_that_the_data_mark_are_not_taught(tmp_path: Path) -> None:
    prompt = [turn | {"weight": 0} if at == 1 else turn for at, turn in enumerate(BIRDS[:5])]
    counts, made = seeds(tmp_path, {"id": "p", "system": "Be brief.", "prompt": prompt, "completion": BIRDS[5:]})
    assert taught(made) == ["An old owl.", "It hoots."]
    assert made[1].prompt == [system("Be brief."), *BIRDS[:5]]
    assert counts["dropped"] == {"demonstrations_turns_not_to_train_on": 1}


def test_turn_that_two_conversations_begin_with_is_taught_once(tmp_path: Path) -> None:
    other = [*BIRDS[:2], user("And a fish?"), say("A cod.")]
    counts, made = seeds(tmp_path, {"id": "b", "messages": BIRDS}, {"id": "o", "messages": other})
    assert [one.id for one in made] == ["b/turn-1", "b/turn-2", "b/turn-3", "o/turn-2"]
    assert counts["dropped"] == {"demonstrations_turns_repeated": 1}
    assert counts["ift"] == 2


def test_turns_of_one_conversation_are_one_example_of_an_instruction(tmp_path: Path) -> None:
    counts, made = seeds(tmp_path, {"id": "b", "messages": BIRDS}, {"id": "f", "messages": FISH})
    given = records_artifact(tmp_path / "seeds", demonstrations=made)
    pool = _pool(InstructConfig(count=1), given, [], [])
    assert sorted(pool.seeds) == ["Name a bird.", "Name a fish."]
    assert counts["ift"] == 2


# --- training ----------------------------------------------------------------------------------------------------


def turns_of(messages: list[Row]) -> list[Demonstration]:
    places = [at for at, turn in enumerate(messages) if turn["role"] == "assistant"]
    return [
        Demonstration(
            id=f"c/turn-{n}", prompt=messages[:at], response=messages[at]["content"], source="ift", question="c"
        )
        for n, at in enumerate(places, start=1)
    ]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, tiny_policy: PolicyCheckpoint) -> PolicyCheckpoint:
    """One whose tokens differ in their loss, as fresh weights find all alike."""
    return wider_policy(tiny_policy, tmp_path_factory.mktemp("wider"))


def with_template(policy: PolicyCheckpoint, template: str) -> Any:
    tokenizer = policy.load_tokenizer()
    if template in ("qwen3", "gemma4"):
        return thinking_tokenizer(tokenizer, template)
    tokenizer.chat_template = template
    return tokenizer


@torch.no_grad()
def plain_loss(policy: PolicyCheckpoint, tokenizer: Any, messages: list[Row], taught: list[str]) -> tuple[float, int]:
    """The summed loss over these answers and the ends of their turns, from full logits of one pass over a rendering.

    Which tokens these are is read off their places in the rendered text.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    logps = loaded(policy.path).model(input_ids=torch.tensor([read["input_ids"]])).logits[0].double().log_softmax(-1)
    places: set[int] = set()
    for answer in taught:
        start = text.index(answer)
        end = start + len(answer)
        places |= {at for at, (low, high) in enumerate(read["offset_mapping"]) if high > start and high <= end}
        places.add(max(places) + 1)
    return -sum(float(logps[at - 1, read["input_ids"][at]]) for at in places), len(places)


def trained_loss(policy: PolicyCheckpoint, groups: list[Any], reduction: str = "tokens") -> tuple[float, float, Any]:
    fresh = policy.load("float32", device="cpu")
    make_scoring(fresh)
    fresh.model.eval()
    objective = Likelihood(reduction)
    made = objective(fresh.model, groups)
    return float(made.loss.detach()), objective.weight(groups), fresh


@pytest.mark.parametrize("template", [CHATML, COLON_AND_SPACE], ids=["chatml", "colon_and_space"])
def test_loss_of_all_turns_is_that_of_one_plain_pass_over_the_conversation(
    policy: PolicyCheckpoint, template: str
) -> None:
    tokenizer = with_template(policy, template)
    messages = [system("Be brief."), *BIRDS]
    tally: Counter[str] = Counter()
    groups = list(group_demonstrations(tokenizer, turns_of(messages), 10_000, tally))
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    expected, tokens = plain_loss(policy, tokenizer, messages, answers)
    loss, weight, _ = trained_loss(policy, groups)
    assert weight == tokens
    assert loss / weight == pytest.approx(expected / tokens, abs=1e-5)
    [group] = groups
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert whole[: len(group)] == [*group.prompt, *group.responses[0]]
    assert tally["demonstrations"] == 3


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_template_that_strips_thoughts_from_earlier_turns_teaches_each_as_it_was_written(
    policy: PolicyCheckpoint, reduction: str
) -> None:
    tokenizer = with_template(policy, "qwen3")
    thoughts = ["Small ones.", "It sits.", "Hoots."]
    answers = ["A wren.", "An old owl.", "It calls."]
    said = [f"<think>\n{thought}\n</think>\n\n{answer}" for thought, answer in zip(thoughts, answers, strict=True)]
    messages = [user("Name a bird."), say(said[0]), user("And one?"), say(said[1]), user("Why?"), say(said[2])]
    groups = list(group_demonstrations(tokenizer, turns_of(messages), 10_000, Counter(), loss_reduction=reduction))
    shares = [plain_loss_of_last(policy, tokenizer, messages[: 2 * n], said[n - 1]) for n in (1, 2, 3)]
    loss, weight, _ = trained_loss(policy, groups, reduction)
    if reduction == "tokens":
        assert weight == sum(tokens for _, tokens in shares)
        assert loss / weight == pytest.approx(sum(one for one, _ in shares) / weight, abs=1e-5)
    else:
        assert weight == 3
        assert loss / weight == pytest.approx(sum(one / tokens for one, tokens in shares) / 3, abs=1e-5)


def plain_loss_of_last(policy: PolicyCheckpoint, tokenizer: Any, messages: list[Row], said: str) -> tuple[float, int]:
    """The loss of the last answer with its thought, in the rendering of the conversation up to it."""
    return plain_loss(policy, tokenizer, messages, [said])


def test_loss_over_examples_weighs_each_turn_alike(policy: PolicyCheckpoint) -> None:
    tokenizer = with_template(policy, CHATML)
    groups = list(group_demonstrations(tokenizer, turns_of(BIRDS), 10_000, Counter(), loss_reduction="examples"))
    shares = [plain_loss(policy, tokenizer, BIRDS, [turn["content"]]) for turn in BIRDS[1::2]]
    loss, weight, _ = trained_loss(policy, groups, "examples")
    assert weight == 3
    assert loss / weight == pytest.approx(sum(one / tokens for one, tokens in shares) / 3, abs=1e-5)


def test_conversation_is_as_long_as_its_last_turn_and_turns_too_long_are_dropped_one_by_one(
    policy: PolicyCheckpoint,
) -> None:
    tokenizer = with_template(policy, CHATML)
    turns = turns_of(BIRDS)
    [whole] = group_demonstrations(tokenizer, turns, 10_000, Counter())
    [last] = group_demonstrations(tokenizer, turns[2:], 10_000, Counter())
    [second] = group_demonstrations(tokenizer, turns[1:2], 10_000, Counter())
    assert len(whole) == len(last)
    tally: Counter[str] = Counter()
    [kept] = group_demonstrations(tokenizer, turns, len(last) - 1, tally)
    assert (tally["demonstrations"], tally["too_long"]) == (2, 1)
    assert len(kept) == len(second)


def test_packed_and_padded_turns_give_the_same_gradients(policy: PolicyCheckpoint) -> None:
    tokenizer = with_template(policy, CHATML)
    groups = list(group_demonstrations(tokenizer, turns_of(BIRDS), 10_000, Counter()))
    apart = [group for turn in turns_of(BIRDS) for group in group_demonstrations(tokenizer, [turn], 10_000, Counter())]
    gradients = []
    for some in (groups, apart):
        fresh = policy.load("float32", device="cpu", trainable=True)
        make_scoring(fresh)
        fresh.model.eval()
        Likelihood("tokens")(fresh.model, some).loss.backward()
        gradients.append({name: p.grad for name, p in fresh.model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-4) for name in gradients[1])
    assert make_batch(loaded(policy.path).model, groups).tokens.sum() == sum(sum(one.scored()) for one in apart)


def test_stage_trains_on_all_turns(tmp_path: Path, policy: PolicyCheckpoint) -> None:
    rows: list[Row] = []
    start = policy_artifact(policy)
    counts = sft(
        workspace(tmp_path / "out", rows),
        policy=start,
        base=start,
        demonstrations=records_artifact(tmp_path / "given", demonstrations=turns_of(BIRDS)),
        optimization=optimization(learning_rate=1e-3, epochs=1, batch_size=1),
        weights=weights(),
    )
    tokenizer = policy.load_tokenizer()
    expected, tokens = plain_loss(policy, tokenizer, BIRDS, [turn["content"] for turn in BIRDS[1::2]])
    assert rows[0]["loss"] == pytest.approx(expected / tokens, rel=1e-4)
    assert counts["demonstrations"] == 3
