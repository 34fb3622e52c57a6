"""The augmented prompt p⊕x and the refinement function Δ (arXiv 2405.21040, eq. 11)."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.records import PreferencePair
from selfalign.losses.logps import PairLogps
from selfalign.losses.preference import SrDPO
from selfalign.losses.protocol import augmentation_of, reference_augmentation_of
from selfalign.losses.refinement import (
    AUGMENTATION_PROMPT,
    NEGATIVE_PROMPT,
    SMALLEST_SPREAD,
    Augmentation,
    Normalisation,
    Refinement,
    augment,
    refinement,
)
from selfalign.models.batches import encode_pairs
from selfalign.store.key import to_key_json


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    """Leaves of a graph."""
    return PairLogps(
        chosen=torch.tensor(chosen, requires_grad=True), rejected=torch.tensor(rejected, requires_grad=True)
    )


def test_refinement_is_beta_times_the_log_ratio_difference() -> None:
    # (-5 + 6) - (-7 + 4) = 4 and (-1 + 1) - (-2 + 8) = -6; times β = 0.5.
    delta = refinement(logps([-5.0, -1.0], [-7.0, -2.0]), logps([-6.0, -1.0], [-4.0, -8.0]), 0.5)
    assert delta.tolist() == [2.0, -3.0]


def test_refinement_has_no_gradient_towards_policy_or_reference() -> None:
    policy, reference = logps([-5.0], [-7.0]), logps([-6.0], [-4.0])
    delta = refinement(policy, reference, 0.5)
    assert not delta.requires_grad
    # Even inside an expression that has a gradient of its own, none flows through Δ: d(w·Δ)/dw = Δ is all there is.
    weight = torch.ones(1, requires_grad=True)
    (weight * delta).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0]
    assert policy.chosen.grad is policy.rejected.grad is reference.chosen.grad is reference.rejected.grad is None


def test_swapping_the_responses_negates_the_refinement() -> None:
    policy, reference = logps([-5.0, -1.0], [-7.0, -2.0]), logps([-6.0, -1.0], [-4.0, -8.0])
    swapped = refinement(
        PairLogps(chosen=policy.rejected, rejected=policy.chosen),
        PairLogps(chosen=reference.rejected, rejected=reference.chosen),
        0.5,
    )
    assert torch.equal(swapped, -refinement(policy, reference, 0.5))


def test_refinement_of_a_policy_that_is_its_reference_is_zero() -> None:
    same = logps([-5.5, -300.25], [-7.0, -2.0])
    assert refinement(same, same, 0.1).tolist() == [0.0, 0.0]


def test_p_stands_before_a_plain_text() -> None:
    for place in ("dialogue", "last_turn"):
        p = Augmentation("Do well.\n\n", place)
        assert augment(p, "Human: Why?\n\nAssistant:") == "Do well.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("place", "expected"),
    [("dialogue", ["Be brief.", "Do well. First", "Yes", "Second"]),
     ("last_turn", ["Be brief.", "First", "Yes", "Do well. Second"]),
     ("after", ["Be brief.", "First", "Yes", "Second\n\nDo well."]),
     ("system", ["Do well. Be brief.", "First", "Yes", "Second"])],
)  # fmt: skip
def test_p_stands_before_the_whole_dialogue_or_where_else_it_is_asked_for(place: str, expected: list[str]) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Second"},
    ]
    before = [dict(turn) for turn in conversation]
    augmented = augment(Augmentation("Do well. ", place), conversation)
    assert [turn["content"] for turn in augmented if isinstance(turn, dict)] == expected
    assert conversation == before, "the given prompt was changed in place"


def test_p_is_the_system_turn_where_there_is_none_or_an_empty_one() -> None:
    asked, tools = {"role": "user", "content": "Why?"}, [{"type": "function"}]
    p = Augmentation("Do well.\n\n", "system")
    assert augment(p, [asked]) == [{"role": "system", "content": "Do well."}, asked]
    place_of_tools = {"role": "system", "content": "", "tools": tools}
    assert augment(p, [place_of_tools, asked]) == [{"role": "system", "content": "Do well.", "tools": tools}, asked]


@pytest.mark.parametrize("place", ["system", "after"])
def test_text_without_turns_is_refused_where_p_needs_them(tiny_tokenizer: Any, place: str) -> None:
    pair = PreferencePair(id="t", prompt="Human: Why?\n\nAssistant:", chosen="So.", rejected="No.")
    with pytest.raises(SelfalignError, match=rf"record t: loss.refinement.place={place} needs a prompt of turns"):
        list(encode_pairs(tiny_tokenizer, [pair], Refinement(place=place), 500, Counter()))


def test_p_before_the_whole_dialogue_is_the_default() -> None:
    """The paper's p⊕x: p in front of x, which for HH-RLHF is the dialogue so far."""
    assert Refinement().place == "dialogue"
    assert Refinement(place="last_turn").augmentation() != Refinement().augmentation(), "one key for two second passes"


PLACED = {
    "dialogue": ("<|im_start|>user\n", "<|im_start|>user\nDo your best. "),
    "last_turn": ("<|im_start|>user\n", "<|im_start|>user\nDo your best. "),
    "system": ("<|im_start|>user\n", "<|im_start|>system\nDo your best.<|im_end|>\n<|im_start|>user\n"),
    "after": ("<|im_end|>\n<|im_start|>assistant", "\n\nDo your best.<|im_end|>\n<|im_start|>assistant"),
}


@pytest.mark.parametrize("place", PLACED)
def test_p_survives_when_a_dialogue_is_cut_from_the_left(tiny_tokenizer: Any, place: str) -> None:
    """x loses its oldest turns, then the beginning of its last one; p stands before what is left."""
    turns = [("user", "Tell me of bees. " * 20), ("assistant", "Bees hum."), ("user", "And of wasps? " * 20)]
    pair = PreferencePair(
        id="a", prompt=[{"role": r, "content": c} for r, c in turns], chosen="Wasps sting.", rejected="No."
    )
    p = Refinement(prompt="Do your best. ", place=place)
    for limit in (200, 120):
        tally: Counter[str] = Counter()
        (example,) = encode_pairs(tiny_tokenizer, [pair], p, limit, tally)
        plain, behind_p = example.plain, example.augmented
        assert behind_p is not None
        assert tally["cut"] == 1
        texts = [tiny_tokenizer.decode(group.prompt) for group in (plain, behind_p)]
        assert "bees" not in texts[0]
        assert texts[1] == texts[0].replace(*PLACED[place])
        assert plain.responses == behind_p.responses
        assert plain.longest() <= limit


@pytest.mark.parametrize("scale", [100, 10])
def test_scale_is_written_wherever_p_speaks_of_it(tiny_tokenizer: Any, scale: int) -> None:
    p = Refinement(scale=scale).text(tiny_tokenizer).text
    assert p == AUGMENTATION_PROMPT.replace("{scale}", str(scale))
    assert p.count(str(scale)) == AUGMENTATION_PROMPT.count("{scale}") >= 1
    assert "{" not in p


def test_scale_of_the_paper_is_the_default() -> None:
    assert Refinement().scale == 100


def test_braces_in_the_query_and_in_p_stay_as_they_are(tiny_tokenizer: Any) -> None:
    p = Refinement(prompt="Use { x } up to {scale}: ", scale=7).text(tiny_tokenizer)
    assert augment(p, "a {scale} {y} {}") == "Use { x } up to 7: a {scale} {y} {}"


def test_p_can_stand_in_a_file(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Aim at {scale}.\n")
    assert Refinement(prompt=f"file:{tmp_path}/p.txt", scale=9).text(tiny_tokenizer).text == "Aim at 9.\n"
    with pytest.raises(SelfalignError, match=r"loss\.refinement\.prompt: .*q\.txt: no such file"):
        Refinement(prompt=f"file:{tmp_path}/q.txt")


def test_random_prompt_is_of_the_same_length_and_says_something_else(tiny_tokenizer: Any) -> None:
    prompted, other = Refinement(), Refinement(source="random_prompt")
    p, words = prompted.text(tiny_tokenizer).text, other.text(tiny_tokenizer).text
    count = [len(tiny_tokenizer(text)["input_ids"]) for text in (p, words)]
    assert 0 <= count[1] - count[0] <= 2
    assert words.endswith("\n\n")
    assert len(set(words.split())) > 20
    assert len(set(words.split()) & set(p.split())) < 5
    assert words == Refinement(source="random_prompt").text(tiny_tokenizer).text, "another draw the second time"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source": "prompt"},
            "source must be one of prompted, naive, shuffled, constant, random_prompt, contrastive; got 'prompt'",
        ),
        ({"place": "first_turn"}, "place must be one of dialogue, last_turn, system, after; got 'first_turn'"),
        ({"source": "constant"}, "only if loss.refinement.source=constant (got constant=0, source=constant)"),
        ({"constant": 0.5}, "only if loss.refinement.source=constant (got constant=0.5, source=prompted)"),
        ({"negative_prompt": "Do badly."}, "negative_prompt has no effect with loss.refinement.source=prompted"),
        (
            {"source": "contrastive", "negative_prompt": " "},
            "loss.refinement.negative_prompt is empty: give the text p⁻",
        ),
        ({"normalise": "std"}, "normalise must be one of none, rms, zscore; got 'std'"),
        ({"source": "constant", "constant": 0.5, "normalise": "rms"}, "normalise=rms has no use with"),
        ({"prompt": "Do well.", "scale": 10}, "has no effect, because loss.refinement.prompt has no {scale}"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=re.escape(message)):
        Refinement(**options)


def test_normalised_refinement_has_the_scale_of_its_step() -> None:
    """Δ = 1 and 7: the root mean square is √25 = 5, the mean 4, the standard deviation 3."""
    delta = torch.tensor([1.0, 7.0])
    assert Normalisation.of("rms", 4.0, 25.0, 0.1)(delta).tolist() == pytest.approx([0.2, 1.4])
    assert Normalisation.of("zscore", 4.0, 25.0, 0.1)(delta).tolist() == pytest.approx([-1.0, 1.0])
    # A single pair, and no Δ at all, stay finite.
    assert Normalisation.of("zscore", 7.0, 49.0, 0.1)(torch.tensor([7.0])).tolist() == [0.0]
    assert Normalisation.of("rms", 0.0, 0.0, 0.1) == Normalisation(0.0, 0.1 * SMALLEST_SPREAD)
    assert Normalisation()(delta).tolist() == [1.0, 7.0]


def test_sources_with_the_same_second_pass_share_its_reference_values() -> None:
    assert Refinement(source="shuffled").augmentation() == Refinement().augmentation() == Refinement()
    assert Refinement(normalise="rms").augmentation() == Refinement()
    assert Refinement(source="random_prompt").augmentation() == Refinement(source="random_prompt")
    assert Refinement(source="naive").augmentation() is None
    assert Refinement(source="constant", constant=0.5).augmentation() is None


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_p_is_refused_by_name(prompt: str) -> None:
    with pytest.raises(SelfalignError, match=r"loss\.refinement\.prompt is empty"):
        Refinement(prompt=prompt)


@pytest.mark.parametrize("scale", [0, -10])
def test_scale_below_one_is_refused_by_name(scale: int) -> None:
    with pytest.raises(SelfalignError, match=rf"loss\.refinement\.scale must be 1 or more, got {scale}"):
        Refinement(scale=scale)


def test_contrastive_pairs_have_the_same_responses_behind_both_prompts(tiny_tokenizer: Any) -> None:
    pair = PreferencePair(id="a", prompt=[{"role": "user", "content": "Why?"}], chosen="So.", rejected="No.")
    contrast = Refinement(source="contrastive", prompt="Do well. ", negative_prompt="Do badly. ")
    (example,) = encode_pairs(tiny_tokenizer, [pair], contrast, 500, Counter())
    assert example.augmented is not None
    assert example.negative is not None
    texts = [tiny_tokenizer.decode(group.prompt) for group in example.passes]
    assert [text.count("Do well. Why?") for text in texts] == [0, 1, 0]
    assert [text.count("Do badly. Why?") for text in texts] == [0, 0, 1]
    assert example.plain.responses == example.augmented.responses == example.negative.responses
    assert len(example) == sum(map(len, example.passes))
    assert len(example.sequences()) == 6


def test_contrast_has_no_pass_of_the_reference() -> None:
    loss = SrDPO(refinement=Refinement(source="contrastive", prompt="Do well. ", normalise="rms"))
    assert to_key_json(loss)["refinement"]["negative_prompt"] == NEGATIVE_PROMPT, "in the key once it is used"
    assert reference_augmentation_of(loss) is None
    assert augmentation_of(loss) == Refinement(source="contrastive", prompt="Do well. ")
    assert Refinement(source="contrastive", prompt="Do well. ").given_p() == Refinement(prompt="Do well. ")
    for source in ("prompted", "random_prompt"):
        loss = SrDPO(refinement=Refinement(source=source))
        assert reference_augmentation_of(loss) == augmentation_of(loss) == Refinement(source=source)
