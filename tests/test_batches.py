"""Records to tokens, and the rows of a batch worked by hand."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.records import PreferencePair
from selfalign.losses.refinement import Refinement
from selfalign.models.batches import (
    PairExample,
    SharedPrompt,
    encode_group,
    encode_pairs,
    pack,
    pad,
    share_prompt,
    split_by_tokens,
)
from selfalign.models.prefix_tree import DistinctTokens, PrefixTree
from selfalign.models.tokenizer import Answer, encode_prompt, plain_ids


@pytest.mark.parametrize(
    ("prompts", "shared", "given"),
    [
        ([[1, 2, 3]], [1, 2, 3], [0]),
        ([[1, 2, 3], [1, 2, 3]], [1, 2, 3], [0, 0]),
        ([[1, 2], [1, 2, 3]], [1, 2], [0, 1]),
        ([[1, 2, 9, 4], [1, 2, 3, 4]], [1, 2], [2, 2]),
    ],
)
def test_the_longest_common_beginning_is_shared(prompts: list[list[int]], shared: list[int], given: list[int]) -> None:
    group = share_prompt("q", prompts, [[40 + i] for i in range(len(prompts))])
    assert (group.prompt, group.num_context_tokens) == (shared, given)


def test_packed_row_worked_by_hand() -> None:
    some = [
        SharedPrompt(id="a", prompt=[1, 2], responses=[[3, 4], [5]], num_context_tokens=[0, 0]),
        SharedPrompt(id="b", prompt=[6], responses=[[7, 8, 9]], num_context_tokens=[1]),
    ]
    batch = pack(some)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3]]
    layout = batch.inputs["layout"]
    # Branches: the first prompt with its first response, the second response, the last prompt with its response.
    assert (layout.lengths, layout.parts, layout.seen) == ([4, 1, 4], [2, 2, 1, 4], [[0, 1], [0, 2], [3]])
    first, second, last = layout.masks(None)
    assert first is None
    assert second.int().tolist() == [[1, 1, 1]]
    assert last is None
    # Tokens 4 and 5 stand one behind the other in the row, but two and one position behind the prompt's first token.
    first, second, last = layout.masks(2)
    band = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert first.int().tolist() == band
    assert second.int().tolist() == [[0, 1, 1]]
    assert last.int().tolist() == band
    indices = torch.arange(9)
    assert layout.sees(indices[:, None], indices[None], None)[4].int().tolist() == [1, 1, 0, 0, 1, 0, 0, 0, 0]
    # Token 3 is predicted by 2, 4 by 3, 5 again by 2; 7 is given; 8 is predicted by 7 and 9 by 8.
    assert batch.logit_positions.tolist() == [1, 2, 1, 6, 7]
    assert batch.targets.tolist() == [3, 4, 5, 8, 9]
    assert batch.owner.tolist() == [0, 0, 1, 2, 2]
    assert batch.tokens.tolist() == [2.0, 1.0, 2.0]
    assert batch.sum_by_response(torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])).tolist() == [-3.0, -4.0, -24.0]


def test_prefixes_that_groups_share_stand_once_and_so_does_a_response_in_two_pairs() -> None:
    rubric = [1, 2]
    some = [
        SharedPrompt(id="a", prompt=[*rubric, 3], responses=[[8], [9, 7]], num_context_tokens=[0, 0]),
        SharedPrompt(id="b", prompt=[*rubric, 5], responses=[[8, 6]], num_context_tokens=[1]),
        SharedPrompt(id="c", prompt=[*rubric, 3], responses=[[9, 7], [4]], num_context_tokens=[0, 0]),
        SharedPrompt(id="whole", prompt=[1], responses=[[2, 3, 9]], num_context_tokens=[2]),
    ]
    batch = pack(some)
    #                                           rubric, 3, then 4, 8 and 9 7;  rubric, 5 8 6.
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 8, 9, 7, 5, 8, 6]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3, 3, 4, 2, 3, 4]]
    layout = batch.inputs["layout"]
    # The text that ends in 9 begins another one, so 7 is a branch behind it.
    assert (layout.lengths, layout.parts) == ([4, 1, 1, 1, 3], [2, 1, 1, 1, 1, 1, 3])
    assert layout.seen == [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 4, 5], [0, 6]]
    assert layout.masks(None)[4].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    indices = torch.arange(10)
    seen = layout.sees(indices[:, None], indices[None], None).int().tolist()
    assert seen[6] == [1, 1, 1, 0, 0, 1, 1, 0, 0, 0]
    assert seen[9] == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1]
    # 8 behind 3; 9 behind 3 and 7 behind 9, scored in two pairs and a text; 6 behind 8; 4 behind 3.
    assert batch.targets.tolist() == [8, 9, 7, 6, 4]
    assert batch.logit_positions.tolist() == [2, 2, 5, 8, 2]
    assert batch.occurrences.tolist() == [0, 1, 2, 3, 1, 2, 4, 1]
    assert batch.owner.tolist() == [0, 1, 1, 2, 3, 3, 4, 5]
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    assert batch.sum_by_response(values).tolist() == [-1.0, -6.0, -8.0, -6.0, -16.0, -2.0]


def drawn_sequences(seed: int) -> list[list[int]]:
    """Texts over three tokens, so that many begin alike, are equal or begin others."""
    draw = random.Random(seed)
    return [[draw.randrange(3) for _ in range(draw.randrange(8))] for _ in range(12)]


@pytest.mark.parametrize("seed", range(20))
def test_tree_has_every_distinct_prefix_once_and_every_sequence(seed: int) -> None:
    sequences = drawn_sequences(seed)
    tree = PrefixTree(sequences)
    prefixes = {tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))}
    assert len(tree.ids) == len(prefixes)
    known = DistinctTokens()
    assert known.add(sequences[:5]) + known.add(sequences[5:]) == len(prefixes)
    for index, sequence in enumerate(sequences):
        row = tree.row(index)
        assert [tree.ids[at] for at in row] == sequence
        assert [tree.positions[at] for at in row] == list(range(len(sequence)))
        assert [tree.before[at] for at in row] == [-1, *row][:-1]
        for at in row:
            # It sees its own text up to itself, and nothing else.
            assert [k for k in range(at + 1) if at < tree.ends[k]] == row[: row.index(at) + 1]


def test_a_shared_prefix_counts_once_in_a_packed_run() -> None:
    some = [SharedPrompt(id=str(i), prompt=[1] * 6, responses=[[i, i]], num_context_tokens=[0]) for i in range(2, 6)]
    assert [len(run) for run in split_by_tokens(some, 12, packed=True)] == [4 - 1, 1]
    assert [len(run) for run in split_by_tokens(some, 12)] == [1] * 4


def test_padded_rows_worked_by_hand() -> None:
    some = [
        SharedPrompt(id="a", prompt=[1, 2], responses=[[3, 4], [5]], num_context_tokens=[0, 0]),
        SharedPrompt(id="b", prompt=[6], responses=[[7, 8, 9]], num_context_tokens=[1]),
    ]
    batch = pad(some)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 5, 0], [6, 7, 8, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.logit_positions.tolist() == [1, 2, 5, 9, 10]
    assert batch.targets.tolist() == [3, 4, 5, 8, 9]
    assert batch.owner.tolist() == [0, 0, 1, 2, 2]
    assert batch.tokens.tolist() == [2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("sizes", "budget", "runs"),
    [
        ([4, 4, 4], 8, [[4, 4], [4]]),
        ([4, 4, 4], 12, [[4, 4, 4]]),
        ([20, 4, 4], 8, [[20], [4, 4]]),
        ([4, 20, 4], 8, [[4], [20], [4]]),
        ([3, 3, 3], 1, [[3], [3], [3]]),
        ([], 8, []),
    ],
)
def test_groups_are_cut_into_runs_within_the_budget(sizes: list[int], budget: int, runs: list[list[int]]) -> None:
    some = [
        SharedPrompt(id=str(i), prompt=[1], responses=[[2] * (n - 1)], num_context_tokens=[0])
        for i, n in enumerate(sizes)
    ]
    cut = list(split_by_tokens(some, budget))
    assert [[len(group) for group in run] for run in cut] == runs
    assert [group for run in cut for group in run] == some


def encoded(*given: Any) -> tuple[list[PairExample], Counter[str]]:
    """What `encode_pairs` makes of these, and what it counts."""
    tally: Counter[str] = Counter()
    return list(encode_pairs(*given, tally)), tally


def pair(name: str, chosen: str, rejected: str, **options: Any) -> PreferencePair:
    prompt = [{"role": "user", "content": "Name a colour."}]
    return PreferencePair(id=name, **{"prompt": prompt, "chosen": chosen, "rejected": rejected, **options})


def test_both_passes_score_the_same_response_tokens_behind_x_and_behind_p_with_x(tiny_tokenizer: Any) -> None:
    pairs = [
        pair("a", "Red, of course.", "I cannot say."),
        pair("b", "Blue", "Green!", rejected_finished=False),
    ]
    refinement = Refinement(prompt="Do well: ")
    examples, tally = encoded(tiny_tokenizer, pairs, refinement, 10_000)
    assert tally == {"pairs": len(pairs)}
    assert [example.id for example in examples] == ["a", "b"]
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for example, record in zip(examples, pairs, strict=True):
        assert example.augmented is not None
        assert example.augmented.responses == example.plain.responses
        assert example.plain.prompt == encode_prompt(tiny_tokenizer, record.prompt)
        assert example.augmented.prompt == encode_prompt(
            tiny_tokenizer, [{"role": "user", "content": "Do well: Name a colour."}]
        )
        assert example.plain.num_context_tokens == example.augmented.num_context_tokens == [0, 0]
        assert len(example) == len(example.plain) + len(example.augmented)
    texts = [tiny_tokenizer.decode(ids) for example in examples for ids in example.plain.responses]
    assert texts == ["Red, of course.<|im_end|>", "I cannot say.<|im_end|>", "Blue<|im_end|>", "Green!"]
    assert examples[0].plain.responses[0][-1] == end


def test_pairs_without_refinement_have_one_pass(tiny_tokenizer: Any) -> None:
    examples = encoded(tiny_tokenizer, [pair("a", "Red", "Blue")], None, 10_000)[0]
    assert examples[0].augmented is None
    assert len(examples[0]) == len(examples[0].plain)


def test_pairs_whose_response_is_too_long_are_dropped_and_counted_and_responses_are_never_cut(
    tiny_tokenizer: Any,
) -> None:
    short, long = pair("short", "Red", "Blue"), pair("long", "Red " * 80, "Blue")
    whole = encoded(tiny_tokenizer, [short, long], None, 10_000)[0]
    limit = whole[0].longest()
    assert encoded(tiny_tokenizer, [long, short, long], None, limit) == (whole[:1], {"pairs": 1, "too_long": 2})
    with pytest.raises(SelfalignError, match=r"none of 1 pairs fits into train\.align\.max_length=80 tokens"):
        encoded(tiny_tokenizer, [long], None, 80)


@pytest.mark.parametrize("refinement", [None, Refinement(prompt="Do well: ")], ids=["plain", "augmented"])
@pytest.mark.parametrize("plain", [True, False], ids=["text", "messages"])
def test_long_prompt_loses_its_beginning_alike_in_both_passes(
    tiny_tokenizer: Any, refinement: Refinement | None, plain: bool
) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    one = pair("a", "Red", "Blue", prompt=words if plain else [{"role": "user", "content": words}])
    whole = encoded(tiny_tokenizer, [one], refinement, 10_000)[0][0]
    (example,), tally = encoded(tiny_tokenizer, [one], refinement, 60)
    assert tally == {"pairs": 1, "cut": 1}
    assert example.plain.responses == whole.plain.responses
    assert 57 <= example.plain.longest() <= 60
    kept = tiny_tokenizer.decode(example.plain.prompt)
    assert "word59" in kept
    assert "word0 " not in kept
    tail = kept.split("user\n")[-1]
    assert words.endswith(tail.split("<|im_end|>")[0].lstrip())
    if refinement:
        assert example.augmented is not None
        augmented = tiny_tokenizer.decode(example.augmented.prompt)
        assert augmented == kept.replace(tail, f"Do well: {tail}")
        assert example.augmented.responses == whole.plain.responses


def test_long_conversation_loses_its_oldest_turns_before_its_last_one(tiny_tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "old " * 30},
        {"role": "assistant", "content": "older answer"},
        {"role": "user", "content": "And now, which colour?"},
    ]
    one = pair("a", "Red", "Blue", prompt=turns)
    (example,) = encoded(tiny_tokenizer, [one], None, 60)[0]
    assert example.plain.prompt == encode_prompt(tiny_tokenizer, [turns[0], turns[3]])


def test_prompt_that_fits_is_left_alone_to_the_token(tiny_tokenizer: Any) -> None:
    one = pair("a", "Red", "Blue")
    whole = encoded(tiny_tokenizer, [one], None, 10_000)[0]
    assert encoded(tiny_tokenizer, [one], None, whole[0].longest())[0] == whole
    (shorter,), tally = encoded(tiny_tokenizer, [one], None, whole[0].longest() - 1)
    assert tally["cut"] == 1
    assert shorter.longest() < whole[0].longest()


def test_losses_with_and_without_refinement_train_on_the_same_prompts_and_responses(tiny_tokenizer: Any) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    some = [pair("a", "Red", "Blue"), pair("b", "Red", "Blue", prompt=words), pair("c", "Red " * 80, "Blue")]
    plain, counted = encoded(tiny_tokenizer, some, None, 60)
    refined, counted_too = encoded(tiny_tokenizer, some, Refinement(), 60)
    assert [example.plain for example in refined] == [example.plain for example in plain]
    assert counted == counted_too == {"pairs": 2, "cut": 1, "too_long": 1}
    longer = [len(example.augmented.prompt) - len(example.plain.prompt) for example in refined if example.augmented]
    assert longer == [len(plain_ids(tiny_tokenizer, Refinement().text(tiny_tokenizer).text))] * 2


def test_examples_have_the_scores_and_the_label_smoothing_of_their_pairs(tiny_tokenizer: Any) -> None:
    scored, plain = pair("a", "Red", "Blue", chosen_score=4.5, rejected_score=1.0), pair("b", "Red", "Blue")
    smoothed = pair("c", "Red", "Blue", label_smoothing=0.0, chosen_score=1.0)
    examples = encoded(tiny_tokenizer, [scored, plain, smoothed], None, 10_000)[0]
    assert [example.scores for example in examples] == [[4.5, 1.0], [], []]
    assert [example.label_smoothing for example in examples] == [None, None, 0.0]


def test_empty_prompt_is_refused_instead_of_being_read_off_the_neighbour(tiny_tokenizer: Any) -> None:
    """Without BOS an empty text has no token that could predict the response's first one."""
    with pytest.raises(SelfalignError):
        encode_group(tiny_tokenizer, "a", "", [Answer(text="Red")])


def test_response_that_would_change_the_prompts_last_token_is_tokenised_apart(tiny_tokenizer: Any) -> None:
    """Jointly, text and answer would be other tokens, and the prompt would not be what the model continues."""
    group = encode_group(tiny_tokenizer, "a", "What is th", [Answer(text="e best", finished=False)])
    joint = tiny_tokenizer("What is the best")["input_ids"]
    assert [*group.prompt, *group.responses[0]] != joint
    assert group.prompt == tiny_tokenizer("What is th")["input_ids"]
    assert group.responses == [tiny_tokenizer("e best")["input_ids"]]


def test_prompt_behind_p_is_shortened_only_where_both_are_too_long_for_the_model(tiny_tokenizer: Any) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    one, refinement = pair("a", "Red", "Blue", prompt=words), Refinement(prompt="Do well: ")
    (plain,), _ = encoded(tiny_tokenizer, [one], None, 60)
    tally: Counter[str] = Counter()
    [example] = encode_pairs(tiny_tokenizer, [one], refinement, 60, tally, 62)
    assert example.plain == plain.plain
    assert tally == {"pairs": 1, "cut": 1, "cut_behind_p": 1}
    assert example.augmented is not None
    assert 59 <= example.augmented.longest() <= 62
    kept = tiny_tokenizer.decode(example.augmented.prompt)
    assert kept.startswith("Do well: ")
    assert tiny_tokenizer.decode(plain.plain.prompt).endswith(kept.removeprefix("Do well: ").lstrip())
    tally.clear()
    with pytest.raises(SelfalignError, match="none of 1 pairs fits"):
        list(encode_pairs(tiny_tokenizer, [one], refinement, 60, tally, 5))
