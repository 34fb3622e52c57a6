"""Labelled responses as tokens: each beside the response to another prompt."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import preference, records_artifact

from selfalign.core.errors import SelfalignError
from selfalign.core.records import LabelledResponse
from selfalign.data.labelled import stream_labelled
from selfalign.models.batches import PairExample
from selfalign.models.labelled import encode_labelled
from selfalign.training.unpaired import examples_in


def record(name: str, prompt: str, response: str, *, desirable: bool = True) -> LabelledResponse:
    return LabelledResponse(
        id=name, prompt=[{"role": "user", "content": prompt}], response=response, desirable=desirable
    )


RECORDS = [
    record("a1", "Name a bird.", "A wren."),
    record("a2", "Name a bird.", "No, a stone.", desirable=False),
    record("a3", "Name a bird.", "An owl."),
    record("b1", "How is tea made?", "Pour hot water.", desirable=False),
    record("b2", "How is tea made?", "Tea tea."),
    record("c1", "Why?", "Because.", desirable=False),
]


def encoded(tokenizer: Any, records: Sequence[LabelledResponse], limit: int = 512) -> tuple[list[PairExample], Counter]:
    tally = Counter[str]()
    return list(encode_labelled(tokenizer, records, limit, tally)), tally


def said(tokenizer: Any, example: PairExample) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in example.plain.responses]


def test_each_response_stands_beside_one_to_the_next_prompt(tiny_tokenizer: Any) -> None:
    """The third to a prompt beside the first of two, and the last prompt's beside the first prompt's."""
    examples, tally = encoded(tiny_tokenizer, RECORDS)
    beside = {example.id: said(tiny_tokenizer, example) for example in examples}
    assert beside == {
        "a1": ["A wren.", "Pour hot water."],
        "a2": ["No, a stone.", "Tea tea."],
        "a3": ["An owl.", "Pour hot water."],
        "b1": ["Pour hot water.", "Because."],
        "b2": ["Tea tea.", "Because."],
        "c1": ["Because.", "A wren."],
    }
    assert [example.desirable for example in examples] == [one.desirable for one in RECORDS]
    assert all("bird" in tiny_tokenizer.decode(example.plain.prompt) for example in examples[:3])
    assert tally == {"labelled": 6, "desirable": 3, "cut": 0}
    assert encoded(tiny_tokenizer, RECORDS)[0] == examples


def test_last_prompt_that_is_the_first_one_again_takes_the_responses_of_the_second(tiny_tokenizer: Any) -> None:
    examples, _ = encoded(tiny_tokenizer, [*RECORDS, record("d", "Name a bird.", "A gull.")])
    assert said(tiny_tokenizer, examples[-1]) == ["A gull.", "Pour hot water."]


def test_response_to_another_prompt_is_cut_to_fit_and_the_labelled_one_never(tiny_tokenizer: Any) -> None:
    asked = record(
        "asked", "Name a bird that lives near water, sings at night in spring, and is rarely seen.", "A wren."
    )
    long = record(
        "long", "Why?", "Because of this and that and all the rest of it, as everybody knows by now, it seems."
    )
    [whole, other] = encoded(tiny_tokenizer, [asked, long])[0]
    limit = max(len(one.plain.prompt) + len(one.plain.responses[0]) for one in (whole, other))
    examples, tally = encoded(tiny_tokenizer, [asked, long], limit)
    short = examples[0].plain
    assert short.prompt == whole.plain.prompt
    assert short.responses[0] == whole.plain.responses[0]
    assert short.responses[1] == whole.plain.responses[1][: limit - len(short.prompt)]
    assert len(short.responses[1]) < len(whole.plain.responses[1])
    assert short.longest() == limit
    assert (tally["labelled"], tally["cut"]) == (2, 0)


def test_response_that_does_not_fit_is_dropped_and_stands_beside_none(tiny_tokenizer: Any) -> None:
    long = record("long", "Why?", "Because of this and that and all the rest of it, as everybody knows by now. " * 4)
    examples, tally = encoded(tiny_tokenizer, [RECORDS[0], long, RECORDS[3]], 40)
    assert [example.id for example in examples] == ["a1", "b1"]
    assert said(tiny_tokenizer, examples[0]) == ["A wren.", "Pour hot water."]
    assert tally["too_long"] == 1
    with pytest.raises(SelfalignError, match=r"none of 1 labelled responses fits into train\.align\.max_length=40"):
        encoded(tiny_tokenizer, [long], 40)


def test_prompt_whose_beginning_is_cut_for_one_response_is_no_other_prompt(tiny_tokenizer: Any) -> None:
    """z₀ would be estimated from responses that answer the prompt they stand behind."""
    long = "Name a bird that lives near water, sings at night in spring, and is rarely seen. " * 3
    records = [
        record("a1", long, "A wren."),
        record("a2", long, "No, it is a stone that lies in the water and sings."),
        record("b1", "Why?", "Because."),
    ]
    whole = encoded(tiny_tokenizer, records)[0][0].plain
    examples, tally = encoded(tiny_tokenizer, records, len(whole.prompt))
    assert examples[0].plain.prompt != examples[1].plain.prompt
    assert tally["cut"] == 2
    assert [said(tiny_tokenizer, example)[1] for example in examples] == ["Because.", "Because.", "A wren."]
    with pytest.raises(SelfalignError, match="all 2 labelled responses have the same prompt"):
        encoded(tiny_tokenizer, records[:2], len(whole.prompt))


def test_responses_to_one_prompt_alone_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(SelfalignError, match="all 3 labelled responses have the same prompt"):
        encoded(tiny_tokenizer, RECORDS[:3])


def test_sides_of_pairs_are_labelled_responses(tmp_path: Path) -> None:
    given = records_artifact(tmp_path, pairs=[preference("p", "Name a bird.", "A wren.", "A stone.")])
    chosen, rejected = stream_labelled(given.path)
    assert (chosen.id, chosen.response, chosen.desirable) == ("p/chosen", "A wren.", True)
    assert (rejected.id, rejected.response, rejected.desirable) == ("p/rejected", "A stone.", False)
    assert chosen.prompt == rejected.prompt
    assert (examples_in(given, unpaired=True), examples_in(given, unpaired=False)) == (2, 1)
