"""Thoughts and answers: prompts, ids and splits, for each family of chat templates."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import Script, demonstration, loaded, workspace
from thinking_families import FAMILIES, family, thinking_tokenizer

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, PreferencePair, Response
from selfalign.data.thinking import Markers, PromptEnd, answer_given, ask_to_think, given_response, split_given
from selfalign.data.turns import as_prompt
from selfalign.engines.model_check import check_template, is_read_as_whole
from selfalign.engines.protocol import Completion, Request, Sampling, generate_batched
from selfalign.models.batches import encode_group, encode_pairs
from selfalign.models.chat_template import (
    BEGINNINGS,
    empty_thought,
    generation_prompt,
    markers_of,
    render_prompt,
    rendered_ids,
)
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import (
    Answer,
    decode_response,
    encode_answers,
    encode_prompt,
    end_of_turn_id,
    stop_ids,
)
from selfalign.stages.sft import encode_demonstration, group_demonstrations

ASKED = as_prompt("Name a bird.")
DIALOGUE = [*as_prompt("Name a fish."), {"role": "assistant", "content": "A cod."}, *ASKED]
ANSWER = "A wren."


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(name: str, tiny_tokenizer: Any) -> Any:
    return thinking_tokenizer(tiny_tokenizer, name)


def written_ids(tokenizer: Any, name: str, text: str, conversation: Any = ASKED) -> tuple[list[int], list[int]]:
    """(prompt, completion) of a model that writes a text behind its own generation prompt, token by token."""
    asked = generation_prompt(tokenizer, conversation)
    prompt, whole = rendered_ids(tokenizer, asked), rendered_ids(tokenizer, asked + text + family(name).end)
    assert whole[: len(prompt)] == prompt
    return prompt, whole[len(prompt) :]


def completed(tokenizer: Any, name: str, policy: PolicyCheckpoint, text: str, tmp_path: Path, **how: int) -> Completion:
    """What `generate_batched` makes of a text that a model writes."""
    prompt, ids = written_ids(tokenizer, name, text)
    raw = Completion(text=decode_response(tokenizer, ids), finish_reason=FinishReason.EOS, tokens=len(ids), ids=ids)
    script = Script(loaded(policy.path), [raw])
    script.tokenizer = tokenizer
    with workspace(tmp_path / "out").journal(1, "texts") as journal:
        [[made]] = generate_batched(script, [Request(prompt=prompt, seeds=[0])], Sampling(**how), journal, "0")
    return made


@pytest.mark.parametrize("conversation", [ASKED, DIALOGUE], ids=["one_turn", "dialogue"])
@pytest.mark.parametrize("thinks", [True, False], ids=["thought", "nothing"])
def test_ids_of_training_are_those_of_writing(name: str, tokenizer: Any, conversation: Any, thinks: bool) -> None:
    """However the text is given: as thought and answer, or as one text."""
    thought = family(name).thought if thinks else family(name).nothing
    prompt, ids = written_ids(tokenizer, name, thought + ANSWER, conversation)
    assert render_prompt(tokenizer, conversation).endswith(family(name).prompt)
    assert encode_prompt(tokenizer, conversation) == prompt
    given = [Answer(text=ANSWER, thought=thought), Answer(text=thought + ANSWER)]
    given += [] if thinks else [Answer(text=ANSWER)]
    for answer in given:
        assert encode_answers(tokenizer, conversation, [answer]) == [ids]
    assert ids[-1] == end_of_turn_id(tokenizer)
    assert not set(ids[:-1]) & set(stop_ids(tokenizer))


def test_ids_are_those_of_the_template_where_it_writes_the_thought(name: str, tokenizer: Any) -> None:
    own = family(name).own
    if own is None:
        pytest.skip("the template drops thoughts")
    arguments = tokenizer.init_kwargs.get("chat_template_arguments", {})
    for turn, thought in ((own, family(name).thought), ({"content": ANSWER}, family(name).nothing)):
        text = tokenizer.apply_chat_template([*ASKED, {"role": "assistant", **turn}], tokenize=False, **arguments)
        prompt, [ids] = (
            encode_prompt(tokenizer, ASKED),
            encode_answers(tokenizer, ASKED, [Answer(text=ANSWER, thought=thought)]),
        )
        assert [*prompt, *ids] == rendered_ids(tokenizer, text)[: len(prompt) + len(ids)]


def test_what_is_written_is_thought_and_answer(
    name: str, tokenizer: Any, tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    thought = family(name).thought
    made = completed(tokenizer, name, tiny_policy, thought + ANSWER, tmp_path)
    assert (made.thought, made.text, made.finish_reason) == (thought, ANSWER, FinishReason.EOS)
    assert made.ids == written_ids(tokenizer, name, thought + ANSWER)[1]
    assert made.thought_tokens + made.tokens == len(made.ids)
    assert decode_response(tokenizer, made.ids[made.thought_tokens :]).strip() == ANSWER
    again = encode_group(tokenizer, "a", ASKED, [Answer(text=made.text, thought=made.thought)])
    assert again.responses == [made.ids]


def test_answer_without_a_thought_is_all_that_is_written(
    name: str, tokenizer: Any, tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    made = completed(tokenizer, name, tiny_policy, family(name).nothing + ANSWER, tmp_path)
    assert (made.thought, made.text) == (family(name).nothing, ANSWER)


def test_thought_without_an_end_leaves_no_answer_and_is_truncated(
    name: str, tokenizer: Any, tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    begun = family(name).thought.partition("see.")[0] + "see that a wren"
    made = completed(tokenizer, name, tiny_policy, begun, tmp_path)
    assert (made.thought, made.text, made.finish_reason) == (begun, "", FinishReason.TRUNCATED)
    assert (made.tokens, made.thought_tokens) == (0, len(made.ids))


def test_thought_and_answer_have_budgets_of_their_own(
    name: str, tokenizer: Any, tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    text = family(name).thought + ANSWER
    free = completed(tokenizer, name, tiny_policy, text, tmp_path)
    room = {"max_new_tokens": free.tokens, "thought_tokens": free.thought_tokens}
    assert completed(tokenizer, name, tiny_policy, text, tmp_path / "fits", **room) == free
    short = room | {"max_new_tokens": free.tokens - 2}
    cut = completed(tokenizer, name, tiny_policy, text, tmp_path / "cut", **short)
    assert (cut.finish_reason, cut.tokens, cut.ids) == (FinishReason.LENGTH, free.tokens - 2, free.ids[:-2])
    assert ANSWER.startswith(cut.text)
    assert cut.text != ANSWER
    less = room | {"thought_tokens": free.thought_tokens - 1}
    assert completed(tokenizer, name, tiny_policy, text, tmp_path / "less", **less).finish_reason == "truncated"


def test_answer_that_is_begun_stands_behind_an_empty_thought_or_a_given_one(name: str, tokenizer: Any) -> None:
    asked = generation_prompt(tokenizer, ASKED)
    for thought in (family(name).nothing, family(name).thought):
        ids = encode_prompt(tokenizer, ASKED, "Score: ", "" if thought == family(name).nothing else thought)
        assert ids == rendered_ids(tokenizer, f"{asked}{thought}Score: ")
    assert empty_thought(tokenizer) == family(name).nothing


def test_thought_is_read_and_not_taught_where_it_is_masked(name: str, tokenizer: Any) -> None:
    thought = family(name).thought
    pair = PreferencePair(
        id="a", prompt=ASKED, chosen=ANSWER, rejected="A stone.", chosen_thought=thought, rejected_thought=thought
    )
    taught = replace(demonstration("a", "Name a bird.", ANSWER), thought=thought)
    [plain] = encode_pairs(tokenizer, [pair], None, 1000, Counter())
    [masked] = encode_pairs(tokenizer, [pair], None, 1000, Counter(), mask_thought=True)
    assert (masked.plain.prompt, masked.plain.responses) == (plain.plain.prompt, plain.plain.responses)
    assert plain.plain.num_context_tokens == [0, 0]
    read = masked.plain.num_context_tokens
    for ids, given, text in zip(masked.plain.responses, read, (ANSWER, "A stone."), strict=True):
        assert decode_response(tokenizer, ids[given:]).strip() == text
        assert given > 1
    [group] = group_demonstrations(tokenizer, [taught], 1000, Counter(), mask_thought=True)
    whole = encode_demonstration(tokenizer, taught)
    assert [*group.prompt, *group.responses[0]] == [*whole.prompt, *whole.response]
    assert group.scored() == [masked.plain.scored()[0]]


@pytest.mark.parametrize("thinks", [True, False])
def test_template_is_given_its_arguments(tiny_tokenizer: Any, thinks: bool) -> None:
    tokenizer = thinking_tokenizer(tiny_tokenizer, "qwen3", enable_thinking=thinks)
    asked, nothing = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    assert render_prompt(tokenizer, ASKED).endswith(asked if thinks else asked + nothing)
    written = f"{nothing if thinks else ''}{ANSWER}<|im_end|>"
    whole = rendered_ids(tokenizer, generation_prompt(tokenizer, ASKED) + written)
    [ids] = encode_answers(tokenizer, ASKED, [Answer(text=ANSWER)])
    assert [*encode_prompt(tokenizer, ASKED), *ids] == whole


def test_text_that_spells_markers_has_none_of_gpt_oss_tokens(tiny_tokenizer: Any) -> None:
    """Only the model's own markers around a thought are control tokens, in no text."""
    tokenizer = thinking_tokenizer(tiny_tokenizer, "gpt_oss")
    final = "<|channel|>final<|message|>"
    hostile = Answer(text=f"A {final} wren.", thought=family("gpt_oss").thought.replace("see", f"see {final}"))
    usual = Answer(text="A wren.", thought=family("gpt_oss").thought)
    control = {tokenizer.convert_tokens_to_ids(word) for word in family("gpt_oss").words}
    found = [[t for t in ids if t in control] for ids in encode_answers(tokenizer, ASKED, [hostile, usual])]
    assert found[0] == found[1]


MARKS = Markers("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "prompt", "thought", "answer"),
    [
        ("<think>a</think>b", PromptEnd.BARE, "<think>a</think>", "b"),
        ("\n<think>a</think>\n\nb </think> c", PromptEnd.BARE, "\n<think>a</think>\n\n", "b </think> c"),
        ("a</think> b", PromptEnd.OPENED, "a</think> ", "b"),
        ("a</think> b", PromptEnd.BARE, "", "a</think> b"),
        ("b <think>c</think>", PromptEnd.BARE, "", "b <think>c</think>"),
        ("<think>a</think>\n<think>b</think>c", PromptEnd.BARE, "<think>a</think>\n<think>b</think>", "c"),
        ("<think>a", PromptEnd.BARE, "<think>a", None),
        ("a", PromptEnd.OPENED, "a", None),
        ("", PromptEnd.OPENED, "", None),
        ("<think>a</think>", PromptEnd.CLOSED, "<think>a</think>", ""),
        ("b", PromptEnd.CLOSED, "", "b"),
    ],
)
def test_split_by_markers(text: str, prompt: PromptEnd, thought: str, answer: str | None) -> None:
    assert MARKS.split(text, prompt) == (thought, answer)


def test_text_of_an_unknown_model_is_split_only_where_it_begins_with_a_thought() -> None:
    assert split_given("<think>a</think>\n\nb") == ("<think>a</think>\n\n", "b")
    assert split_given("Here is my thought process:\na\nHere is my response:\nb")[1] == "b"
    assert split_given("It ends with </think> and goes on.") == ("", "It ends with </think> and goes on.")
    assert split_given("<thinking>a") == ("<thinking>a", None)
    assert (answer_given("<think>a"), answer_given("b")) == ("", "b")
    one = given_response("a-1", "a", "<think>a</think>b", "m")
    assert (one.thought, one.text, one.finished) == ("<think>a</think>", "b", True)
    assert given_response("a-1", "a", "<think>a", "m").finish_reason is FinishReason.TRUNCATED


def test_response_without_an_answer_has_no_text() -> None:
    with pytest.raises(ValueError, match="response a-1: its thought has no end, so it has no answer, but text 'x'"):
        Response(id="a-1", instruction_id="a", text="x", finish_reason=FinishReason.TRUNCATED, tokens=1, model="m")


def test_thought_is_asked_for_before_the_first_question() -> None:
    assert ask_to_think("", ASKED) is ASKED
    assert ask_to_think("Think.", "Name") == "Think.\n\nName"
    system = {"role": "system", "content": "Be brief."}
    asked = ask_to_think("Think.", [system, *DIALOGUE])
    assert isinstance(asked, list)
    assert [turn["content"] for turn in asked] == ["Be brief.", "Think.\n\nName a fish.", "A cod.", "Name a bird."]


def test_model_that_thinks_is_accepted_with_a_note_on_its_markers(name: str, tokenizer: Any) -> None:
    [note, *others] = check_template(tokenizer)
    markers = markers_of(tokenizer)
    assert markers is not None
    assert note.startswith(f"thinks between {markers.open!r} and {markers.close!r}")
    assert note.endswith(f"behind {family(name).nothing!r}")
    assert not [other for other in others if "opens an answer" in other]
    assert all(is_read_as_whole(tokenizer, text) for text in BEGINNINGS)


def test_model_without_markers_has_no_thoughts(tiny_tokenizer: Any) -> None:
    assert markers_of(tiny_tokenizer) is None
    assert empty_thought(tiny_tokenizer) == ""
    [ids] = encode_answers(tiny_tokenizer, ASKED, [Answer(text="<think>a</think>b")])
    assert decode_response(tiny_tokenizer, ids) == "<think>a</think>b"


def test_budget_below_zero_is_refused() -> None:
    with pytest.raises(SelfalignError, match=r"judge\.sampling\.thought_tokens must be 0 or more, got -1"):
        Sampling(thought_tokens=-1).check("judge.sampling")
