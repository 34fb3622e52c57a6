"""Pairs whose tails have several turns: how they are read, their log-probabilities, and where their texts count."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import loaded, optimization, policy_artifact, records_artifact, run, weights, wider_policy, workspace
from test_prompt_boundary import CHATML, COLON_AND_SPACE
from thinking_families import thinking_tokenizer

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, Instruction, PairReference, PreferencePair, Response
from selfalign.data.sources import read_pairs
from selfalign.losses.preference import DPO, SrDPO
from selfalign.losses.refinement import Refinement
from selfalign.models.batches import PairExample, SharedPrompt, encode_pairs, pack, pad
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import make_scoring
from selfalign.runs.reader import pair_candidates
from selfalign.stages.align import align
from selfalign.stages.pair import given_pairs
from selfalign.stages.preference_accuracy import preference_accuracy, preference_test
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.training.config import LogProbSettings
from selfalign.training.splits import KnownTexts, split_pairs, texts_of, texts_of_pair

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def say(text: str) -> Row:
    return {"role": "assistant", "content": text}


ASKED = [user("Name a bird.")]
CHOSEN = [say("A wren."), user("And a fish?"), say("An old cod.")]
REJECTED = [say("No."), user("Please!"), say("Why?"), user("Because."), say("A cow.")]
ROW = {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}
TAILED = PreferencePair(
    id="p",
    prompt=ASKED,
    chosen="An old cod.",
    rejected="A cow.",
    chosen_turns=CHOSEN[:-1],
    rejected_turns=REJECTED[:-1],
)


def write(folder: Path, *rows: Row) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- reading -----------------------------------------------------------------------------------------------------

FORMS: dict[str, Row] = {
    "prompt": ROW,
    "conversations": {"chosen": [*ASKED, *CHOSEN], "rejected": [*ASKED, *REJECTED]},
    "prompt_and_conversations": {"prompt": ASKED, "chosen": [*ASKED, *CHOSEN], "rejected": [*ASKED, *REJECTED]},
    "openai": {"input": {"messages": ASKED}, "preferred_output": CHOSEN, "non_preferred_output": REJECTED},
    "instruction": {"instruction": "Name a bird.", "chosen": CHOSEN, "rejected": REJECTED},
    "messages": {"messages": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_tails_of_several_turns_are_read_in_every_format(tmp_path: Path, row: Row) -> None:
    [made], drops = read_pairs(write(tmp_path, row | {"id": "p"}))
    assert made == TAILED
    assert not +drops


def test_one_tail_may_be_longer_and_begin_like_the_other(tmp_path: Path) -> None:
    [made], _ = read_pairs(write(tmp_path, ROW | {"rejected": CHOSEN[:1]}))
    assert (made.chosen, made.chosen_turns, made.rejected) == ("An old cod.", CHOSEN[:-1], "A wren.")
    assert not made.rejected_turns


@pytest.mark.parametrize("whole", [True, False], ids=["conversations", "behind_a_prompt"])
def test_turns_that_both_tails_begin_with_belong_to_the_prompt(tmp_path: Path, whole: bool) -> None:
    sides = {"chosen": CHOSEN, "rejected": [*CHOSEN[:2], say("A cow.")]}
    row = {name: [*ASKED, *turns] for name, turns in sides.items()} if whole else {"prompt": ASKED, **sides}
    [made], _ = read_pairs(write(tmp_path, row))
    assert (made.prompt, made.chosen, made.rejected) == ([*ASKED, *CHOSEN[:2]], "An old cod.", "A cow.")
    assert not made.chosen_turns
    assert not made.rejected_turns


def test_given_tails_that_part_at_the_users_turn_stay_whole(tmp_path: Path) -> None:
    rejected = [CHOSEN[0], user("And a cow?"), say("Moo.")]
    [made], _ = read_pairs(write(tmp_path, ROW | {"rejected": rejected}))
    assert (made.prompt, made.chosen_turns, made.rejected_turns) == (ASKED, CHOSEN[:-1], rejected[:-1])


REFUSED: dict[str, tuple[Row, str]] = {
    "parted_at_the_user": (
        {"chosen": [*ASKED, *CHOSEN], "rejected": [*ASKED, CHOSEN[0], user("A cow?"), say("Moo.")]},
        "expected .* begin and end with a turn of the assistant's.*; found chosen of user, assistant",
    ),
    "ends_with_the_user": (ROW | {"chosen": CHOSEN[:2]}, "expected .*; found chosen of assistant, user"),
    "two_answers": (ROW | {"chosen": [say("A"), say("B")]}, "expected .*; found chosen of assistant, assistant"),
    "two_questions": (
        ROW | {"chosen": [say("A"), user("b"), user("c"), say("D")]},
        "two user turns follow each other",
    ),
    "empty_turn": (ROW | {"chosen": [say("A"), user(" "), say("D")]}, "the prompt is not a conversation: turn 3 is em"),
    "begun_answer": (
        {"prompt": [*ASKED, say("A")], "chosen": CHOSEN, "rejected": REJECTED},
        "two assistant turns follow each other",
    ),
    "text_prompt": (ROW | {"prompt": "Name a bird."}, "prompt is a text that is not a user turn of chosen and rej"),
    "text_prompt_of_no_turns": (
        {"prompt": "Name a bird.", "chosen_turns": CHOSEN[:2], "chosen": "A", "rejected": "B"},
        "expected|prompt is a text",
    ),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_tail_that_is_no_conversation_is_refused(tmp_path: Path, row: Row, message: str) -> None:
    with pytest.raises(SelfalignError, match=rf"a\.jsonl:1: .*({message})"):
        read_pairs(write(tmp_path, row))


def test_tails_of_equal_last_answers_are_a_preference_and_equal_tails_are_none(tmp_path: Path) -> None:
    other = [say("Go away."), *CHOSEN[1:]]
    rows = [ROW | {"rejected": other}, ROW | {"rejected": CHOSEN}, ROW | {"chosen": [*CHOSEN[:2], say(" ")]}]
    [made], drops = read_pairs(write(tmp_path, *rows))
    assert made.chosen == made.rejected == "An old cod."
    assert +drops == Counter(identical=1, empty_response=1)


def test_rows_that_prefer_the_same_tails_the_other_way_round_are_dropped(tmp_path: Path) -> None:
    other = [say("Go away."), *CHOSEN[1:]]
    one, two = ROW | {"rejected": other}, ROW | {"chosen": other, "rejected": CHOSEN}
    made, drops = read_pairs(write(tmp_path, one, two))
    assert not made
    assert drops["order_contradicts"] == 2


def test_transcripts_that_part_early_are_pairs_of_several_turns(tmp_path: Path) -> None:
    def transcript(turns: list[Row]) -> str:
        names = {"user": "Human", "assistant": "Assistant"}
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)

    row = {"chosen": transcript([*ASKED, *CHOSEN]), "rejected": transcript([*ASKED, *REJECTED])}
    asked = {"chosen": transcript([*ASKED, *CHOSEN]), "rejected": transcript([user("A cow?"), say("Moo.")])}
    [made], drops = read_pairs(write(tmp_path, row, asked))
    assert (made.prompt, made.chosen_turns, made.rejected_turns) == (ASKED, CHOSEN[:-1], REJECTED[:-1])
    assert +drops == Counter(different_prompts=1)


def test_rated_conversations_that_part_early_are_pairs_of_several_turns(tmp_path: Path) -> None:
    row = {
        "prompt": "Name a bird.",
        "chosen": [*ASKED, *CHOSEN],
        "rejected": [*ASKED, *REJECTED],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    }
    [made], _ = read_pairs(write(tmp_path, row))
    assert (made.chosen_turns, made.rejected_turns, made.chosen_score) == (CHOSEN[:-1], REJECTED[:-1], 8.0)


def test_written_pairs_are_read_again_as_they_are(tmp_path: Path) -> None:
    plain = PreferencePair(id="q", prompt=ASKED, chosen="A wren.", rejected="No.")
    write_records(tmp_path / "pairs.jsonl", [TAILED, plain])
    made, _ = read_pairs(str(tmp_path / "pairs.jsonl"))
    assert made == [TAILED, plain]
    assert read_records(tmp_path / "pairs.jsonl", PreferencePair) == [TAILED, plain]


def test_line_of_a_pair_of_single_answers_has_no_field_for_more_turns(tmp_path: Path) -> None:
    plain = PreferencePair(id="q", prompt=ASKED, chosen="A wren.", rejected="No.")
    write_records(tmp_path / "pairs.jsonl", [plain, Demonstration(id="d", prompt=ASKED, response="x", source="ift")])
    assert not any(name in (tmp_path / "pairs.jsonl").read_text() for name in ("_turns", "_calls"))


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, tiny_policy: PolicyCheckpoint) -> PolicyCheckpoint:
    return wider_policy(tiny_policy, tmp_path_factory.mktemp("wider"))


def with_template(policy: PolicyCheckpoint, template: str) -> Any:
    tokenizer = policy.load_tokenizer()
    if "{" not in template:
        return thinking_tokenizer(tokenizer, template)
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer: Any, *pairs: PreferencePair, p: Refinement | None = None, limit: int = 10_000) -> list[Any]:
    return list(encode_pairs(tokenizer, pairs, p, limit, Counter()))


def rendered(tokenizer: Any, turns: list[Row]) -> tuple[str, list[int], list[tuple[int, int]]]:
    """A conversation's text, ids and places of tokens in the text."""
    arguments = tokenizer.init_kwargs.get("chat_template_arguments", {})
    text = tokenizer.apply_chat_template(turns, tokenize=False, **arguments)
    read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return text, read["input_ids"], read["offset_mapping"]


def places_of(tokenizer: Any, prompt: list[Row], tail: list[Row]) -> tuple[list[int], list[int]]:
    """The ids of a conversation and the indices of the tokens of the tail's assistant turns, read off its text."""
    text, ids, offsets = rendered(tokenizer, [*prompt, *tail])
    at, places = 0, []
    for turn in [*prompt, *tail]:
        at = text.index(turn["content"], at)
        end = at + len(turn["content"])
        if turn["role"] == "assistant" and turn in tail:
            inside = [n for n, (low, high) in enumerate(offsets) if high > at and high <= end]
            places += [*inside, inside[-1] + 1]
        at = end
    return ids, places


@torch.no_grad()
def plain_sum(policy: PolicyCheckpoint, ids: list[int], places: list[int]) -> float:
    logps = loaded(policy.path).model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logps[at - 1, ids[at]]) for at in places)


TEMPLATES = {"chatml": CHATML, "colon_and_space": COLON_AND_SPACE, "gemma4": "gemma4", "smollm3": "smollm3"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_prompt_and_tail_are_the_template_over_the_whole_conversation_and_answers_alone_are_scored(
    policy: PolicyCheckpoint, template: str
) -> None:
    tokenizer = with_template(policy, template)
    [example] = encoded(tokenizer, TAILED)
    for index, tail in enumerate((CHOSEN, REJECTED)):
        ids, places = places_of(tokenizer, ASKED, tail)
        own = [*example.plain.prompt, *example.plain.responses[index]]
        assert own == ids[: len(own)]
        assert [len(example.plain.prompt) + at for at in example.plain.scored_places(index)] == places
    assert example.plain.scored() == [len(example.plain.scored_places(index)) for index in (0, 1)]


def test_template_with_an_empty_thought_before_the_last_answer_alone_is_followed(policy: PolicyCheckpoint) -> None:
    tokenizer = with_template(policy, "qwen3")
    [example] = encoded(tokenizer, TAILED)
    own = [*example.plain.prompt, *example.plain.responses[0]]
    assert own == rendered(tokenizer, [*ASKED, *CHOSEN])[1][: len(own)]
    said = [tokenizer.convert_ids_to_tokens(example.plain.responses[0][at]) for at in example.plain.scored_places(0)]
    assert said.count("<think>") == said.count("</think>") == 1
    assert said.count("<|im_end|>") == 2


@pytest.mark.parametrize("template", ["chatml", "colon_and_space", "qwen3"])
def test_packed_and_padded_values_and_gradients_are_those_of_plain_passes(
    policy: PolicyCheckpoint, template: str
) -> None:
    tokenizer = with_template(policy, {"chatml": CHATML, "colon_and_space": COLON_AND_SPACE}.get(template, template))
    [example] = encoded(tokenizer, TAILED)
    group = example.plain
    means: list[list[float]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    for way in (plain_means, packed_means, padded_means):
        fresh = policy.load("float32", device="cpu", trainable=True)
        fresh.model.eval()
        found = way(fresh, group)
        (found[0] - found[1]).backward()
        means.append(found.tolist())
        gradients.append({name: p.grad for name, p in fresh.model.named_parameters() if p.grad is not None})
    for values, slopes in zip(means[1:], gradients[1:], strict=True):
        assert values == pytest.approx(means[0], abs=1e-5)
        assert all(torch.allclose(slopes[name], gradients[0][name], atol=1e-5) for name in gradients[0])


def plain_means(policy: Any, group: SharedPrompt) -> torch.Tensor:
    """The mean log-probability of each response's scored tokens, in a pass of its own, from full logits."""
    means = []
    for index, response in enumerate(group.responses):
        ids = torch.tensor([*group.prompt, *response])
        places = torch.tensor(group.scored_places(index)) + len(group.prompt)
        logps = policy.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        means.append(logps[places - 1, ids[places]].mean())
    return torch.stack(means)


def packed_means(policy: Any, group: SharedPrompt) -> torch.Tensor:
    make_scoring(policy)
    batch = pack([group])
    values = policy.model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs)
    return batch.sum_by_response(values) / batch.tokens


def padded_means(policy: Any, group: SharedPrompt) -> torch.Tensor:
    batch = pad([group])
    logits = policy.model(**batch.inputs).logits.flatten(0, 1)[batch.logit_positions]
    return batch.sum_by_response(logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)) / batch.tokens


def test_unscored_tokens_worked_by_hand() -> None:
    group = SharedPrompt(
        id="a",
        prompt=[1, 2],
        responses=[[3, 4, 5, 6], [7]],
        num_context_tokens=[0, 0],
        unscored=[[[1, 3]], []],
    )
    assert (group.scored_places(0), group.scored()) == ([0, 3], [2, 1])
    packed, padded = pack([group]), pad([group])
    assert packed.logit_positions.tolist() == [1, 4, 1]
    assert padded.logit_positions.tolist() == [1, 4, 7]
    assert packed.targets.tolist() == padded.targets.tolist() == [3, 6, 7]
    assert packed.tokens.tolist() == padded.tokens.tolist() == [2.0, 1.0]


def test_same_tail_stands_behind_x_and_behind_p_with_x(policy: PolicyCheckpoint) -> None:
    tokenizer = with_template(policy, CHATML)
    [example] = encoded(tokenizer, TAILED, p=Refinement(prompt="Do well: "))
    assert example.augmented.responses == example.plain.responses
    assert example.augmented.unscored == example.plain.unscored != []
    own = [*example.augmented.prompt, *example.augmented.responses[0]]
    assert own == rendered(tokenizer, [user("Do well: Name a bird."), *CHOSEN])[1][: len(own)]


def test_prompt_before_a_tail_is_cut_and_the_tail_never_is(policy: PolicyCheckpoint) -> None:
    tokenizer = with_template(policy, CHATML)
    long = [user("old " * 60), say("Yes."), *ASKED]
    pair = PreferencePair(id="p", prompt=long, chosen="An old cod.", rejected="A wren.", chosen_turns=CHOSEN[:-1])
    [whole] = encoded(tokenizer, pair)
    [cut] = encoded(tokenizer, pair, limit=whole.longest() - 1)
    assert cut.plain.responses == whole.plain.responses
    assert cut.plain.unscored == whole.plain.unscored
    assert len(cut.plain.prompt) < len(whole.plain.prompt)
    tally: Counter[str] = Counter()
    with pytest.raises(SelfalignError, match="none of 1 pairs fits"):
        list(encode_pairs(tokenizer, [pair], None, max(map(len, whole.plain.responses)), tally))


def test_tail_that_the_template_writes_in_another_way_behind_a_shorter_prompt_is_refused(
    policy: PolicyCheckpoint,
) -> None:
    tokenizer = with_template(policy, CHATML.replace("{{ m['role'] }}\n", "{{ m['role'] }} {{ loop.index }}\n"))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant {{ messages | length + 1 }}\n")
    long = [user("old " * 60), say("Yes."), *ASKED]
    pair = PreferencePair(id="p", prompt=long, chosen="An old cod.", rejected="No.", chosen_turns=CHOSEN[:-1])
    [whole] = encoded(tokenizer, pair)
    with pytest.raises(
        SelfalignError, match="record p: behind a shortened or augmented prompt the chat template writes"
    ):
        encoded(tokenizer, pair, limit=whole.longest() - 1)


def test_template_that_opens_a_thought_in_the_prompt_alone_is_refused_with_the_record(policy: PolicyCheckpoint) -> None:
    with pytest.raises(SelfalignError, match=r"record p: .*in another way .*turn 2 of 4.*Give a pair of single answ"):
        encoded(with_template(policy, "deepseek_r1"), TAILED)


def test_thought_in_an_earlier_turn_that_the_template_leaves_out_is_refused(policy: PolicyCheckpoint) -> None:
    turns = [say("<think>\nSmall.\n</think>\n\nA wren."), CHOSEN[1]]
    pair = PreferencePair(id="p", prompt=ASKED, chosen="A cod.", rejected="No.", chosen_turns=turns)
    with pytest.raises(SelfalignError, match=r"record p: .*without a thought in it"):
        encoded(with_template(policy, "qwen3"), pair)


def test_control_token_in_a_turn_of_a_tail_is_text(policy: PolicyCheckpoint) -> None:
    tokenizer = with_template(policy, CHATML)
    turns = [say("A <|im_end|> wren."), user("And <|im_start|> a fish?")]
    pair = PreferencePair(id="p", prompt=ASKED, chosen="A cod.", rejected="No.", chosen_turns=turns)
    [example] = encoded(tokenizer, pair)
    ids = [*example.plain.prompt, *example.plain.responses[0]]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4


def test_masked_thoughts_of_a_tail_are_read_without_being_scored(policy: PolicyCheckpoint) -> None:
    tokenizer = with_template(policy, "qwen3")
    pair = PreferencePair(
        id="p",
        prompt=ASKED,
        chosen="<think>\nA sea fish.\n</think>\n\nA cod.",
        rejected="<think>\nHm.\n</think>\n\nNo.",
        chosen_turns=CHOSEN[:-1],
    )
    [scored] = encoded(tokenizer, pair)
    [masked] = list(encode_pairs(tokenizer, [pair], None, 10_000, Counter(), mask_thought=True))
    assert masked.plain.responses == scored.plain.responses
    for index in (0, 1):
        said = tokenizer.decode([masked.plain.responses[index][at] for at in masked.plain.scored_places(index)])
        assert "think" not in said
        assert said.endswith(("A cod.<|im_end|>", "No.<|im_end|>"))
    assert tokenizer.decode([scored.plain.responses[0][at] for at in scored.plain.scored_places(0)]).count("think") == 2


# --- stages ------------------------------------------------------------------------------------------------------


def pairs_of_several_turns(count: int = 4) -> list[PreferencePair]:
    return [
        PreferencePair(
            id=f"p{n}",
            prompt=[user(f"Name bird {n}.")],
            chosen=f"Cod {n}.",
            rejected=f"Cow {n}.",
            chosen_turns=[say(f"Wren {n}."), user(f"And fish {n}?")],
            rejected_turns=[say(f"No {n}."), user(f"Please {n}!"), say(f"Why {n}?"), user(f"So {n}.")],
        )
        for n in range(count)
    ]


def logps_by_hand(policy: PolicyCheckpoint, example: PairExample) -> list[float]:
    group = example.plain
    return [
        plain_sum(policy, [*group.prompt, *ids], [len(group.prompt) + at for at in group.scored_places(index)])
        for index, ids in enumerate(group.responses)
    ]


@pytest.fixture(scope="module")
def scored(policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The pairs, their stored log-probabilities, and the counts."""
    folder = tmp_path_factory.mktemp("scored")
    pairs = records_artifact(folder / "pairs", pairs=pairs_of_several_turns())
    out = workspace(folder / "references")
    settings = LogProbSettings(dtype="float32", autocast="", max_length=200, max_batch_tokens=512)
    given = {"pairs": pairs, "augmentation": Refinement(), "precision": settings}
    counts = reference_logprobs(out, policy=policy_artifact(policy), **given)
    references = read_records(out.path / "references.jsonl", PairReference)
    return pairs, records_artifact(out.path, references=references), counts


def test_stored_log_probabilities_are_those_of_plain_passes(policy: PolicyCheckpoint, scored: Any) -> None:
    tokenizer = policy.load_tokenizer()
    references = read_records(scored[1].path / "references.jsonl", PairReference)
    for record, example in zip(references, encoded(tokenizer, *pairs_of_several_turns()), strict=True):
        assert [record.chosen, record.rejected] == pytest.approx(logps_by_hand(policy, example), abs=1e-3)


@pytest.mark.parametrize("loss", [DPO(), SrDPO()], ids=["dpo", "sr_dpo"])
def test_alignment_on_tails_starts_at_its_known_loss_and_makes_chosen_tails_likelier(
    policy: PolicyCheckpoint, scored: Any, tmp_path: Path, loss: Any
) -> None:
    rows: list[Row] = []
    start = policy_artifact(policy)
    counts = align(
        workspace(tmp_path / "out", rows),
        policy=start,
        base=start,
        pairs=scored[0],
        reference=scored[1],
        loss=loss,
        start=None,
        held_out=0,
        trained_on=[],
        selection=None,
        optimization=optimization(learning_rate=2e-3, epochs=3, batch_size=4, max_length=200),
        weights=weights(),
    )
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert counts["rewards/accuracies"] == 1.0


def test_preference_accuracy_takes_tails_and_drops_those_whose_turns_were_trained_on(
    scored: Any, tmp_path: Path
) -> None:
    known = Demonstration(id="d", prompt=[user("Go on.")], response="Wren 2.", source="ift")
    trained = records_artifact(tmp_path / "trained", demonstrations=[known])
    given = {"pairs": scored[0], "policy": scored[1], "reference": scored[1], "scores": None, "beta": 0.1}
    scored[1].counts["prompts_cut"] = 0
    counts = preference_accuracy(workspace(tmp_path / "out"), trained_on=[trained], **given)
    assert counts["preferences/pairs"] == 3
    assert counts["dropped"] == {"trained_on": 1, "too_long": 0}


def test_held_out_pairs_share_no_turn_of_a_tail_with_the_others() -> None:
    pairs = pairs_of_several_turns()
    shared = PreferencePair(
        id="s", prompt=[user("Else?")], chosen="Yes.", rejected="So.", chosen_turns=[say("Why 1?"), user("Mm.")]
    )
    split = split_pairs([*pairs, shared], 3, KnownTexts.of([]))
    held = {["p0", "p1", "p2", "p3", "s"][row] for row in split.held_out}
    assert held == {"p0", "p2", "p3"}
    assert len(split.training) == 2


def test_texts_of_a_plain_pair_are_those_of_before() -> None:
    plain = PreferencePair(id="q", prompt=[*ASKED, say("A"), user("b")], chosen="x", rejected="y")
    assert texts_of_pair(plain) == texts_of(plain.prompt, "x", "y")
    assert len(texts_of_pair(TAILED).own) == 3 + 2 + 4


def test_given_pairs_that_ask_a_held_out_instruction_within_a_tail_are_dropped(tmp_path: Path) -> None:
    source = write(tmp_path, ROW, {"prompt": [user("Else?")], "chosen": [say("A")], "rejected": [say("B")]})
    instructions = [Instruction(id="i", text="Please!", source="evaluation")]
    held_out = records_artifact(tmp_path / "held", instructions=instructions)
    given = {"source": source, "count": 0, "content": "c", "set_aside": 0, "trained_on": []}
    counts = given_pairs(workspace(tmp_path / "out"), held_out=[held_out], **given)
    assert (counts["pairs"], counts["dropped"]["held_out"]) == (1, 1)


def test_positives_of_a_tail_teach_each_of_its_answers(tmp_path: Path) -> None:
    given = {"count": 0, "content": "c", "set_aside": 0, "trained_on": [], "held_out": []}
    given_pairs(workspace(tmp_path / "out"), source=write(tmp_path, ROW | {"id": "p"}), **given)
    made = read_records(tmp_path / "out/demonstrations.jsonl", Demonstration)
    assert [(one.id, one.question, one.prompt, one.response) for one in made] == [
        ("p/turn-1", "p", ASKED, "A wren."),
        ("p/turn-2", "p", [*ASKED, *CHOSEN[:2]], "An old cod."),
    ]


def test_test_pairs_of_several_turns_are_counted_and_are_no_responses_to_judge(tmp_path: Path) -> None:
    source = write(tmp_path, ROW, {"prompt": [user("Else?")], "chosen": [say("A")], "rejected": [say("B")]})
    out = workspace(tmp_path / "out")
    counts = preference_test(out, source=source, count=0, content="c", ranked=None, trained_on=[])
    assert (counts["pairs"], counts["longer_pairs"]) == (2, 1)
    assert [one.text for one in read_records(out.path / "responses.jsonl", Response)] == ["A", "B"]


def test_report_shows_all_turns_of_a_tail() -> None:
    chosen, rejected = pair_candidates(TAILED)
    assert chosen.text == "assistant: A wren.\n\nuser: And a fish?\n\nassistant: An old cod."
    assert rejected.text.startswith("assistant: No.\n\nuser: Please!")


def test_judge_of_test_pairs_of_several_turns_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    given = write(tmp_path / "train", {"instruction": "A", "chosen": "x", "rejected": "y"})
    source = write(tmp_path, ROW)
    overrides = [
        "experiment=smoke", "data=pairs", f"data.path={given}", "iterations=1", "judge@evaluate.preference_pairs.judge="
        "expected_score", "evaluate.preference_pairs.judge.model=sft", f"evaluate.preference_pairs.source={source}",
    ]  # fmt: skip
    with pytest.raises(SelfalignError, match=r"1 of 1 pairs of evaluate\.preference_pairs.* leave the judge out"):
        run(tmp_path / "out", *overrides)
    assert not list((tmp_path / "out/store").glob("sft/*"))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: A\n\nAssistant: y"}, "f05389e5045b5ffa"),
        ({"prompt": [user("A")], "chosen": [say("x")], "rejected": [say("y")]}, "b4ba892aefce7625"),
    ],
    ids=["transcripts", "turns"],
)
def test_pair_of_single_answers_has_the_id_that_it_always_had(tmp_path: Path, row: Row, name: str) -> None:
    [pair], _ = read_pairs(write(tmp_path, row))
    assert pair.id == name
