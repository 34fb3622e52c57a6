"""Tokenised examples in a memory-mapped table."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import ROOT, Killed

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import write_records
from selfalign.core.records import PairReference
from selfalign.models.batches import PairExample, SharedPrompt
from selfalign.training.dataset import StoredExamples, store_examples
from selfalign.training.reference import join_references, with_reference
from selfalign.training.trainer import StepDataset


def group(name: str) -> SharedPrompt:
    return SharedPrompt(id=name, prompt=[5, 400_000_0], responses=[[7], [8, 9, 10]], num_context_tokens=[0, 1])


def pair(name: str, *, refined: bool = True, gap: float | None = None) -> PairExample:
    return PairExample(plain=group(name), augmented=group(name) if refined else None, scores=[gap, 0.0] if gap else [])


def reference(name: str, value: float = -1.0) -> PairReference:
    return PairReference(
        id=name, chosen=value, rejected=value - 1, augmented_chosen=value - 2, augmented_rejected=value - 3
    )


def test_examples_come_back_as_they_were(tmp_path: Path) -> None:
    third = -1 / 3
    examples = [
        pair("bare", refined=False),
        pair("gap", gap=0.1),
        with_reference(with_reference(pair("both"), reference("both", third), "reference"), reference("both"), "start"),
    ]
    stored = store_examples(tmp_path, PairExample, examples, Counter())
    assert list(stored) == examples
    assert (stored[2], stored[-3], list(stored[1:])) == (examples[2], examples[0], examples[1:])
    assert stored[2].reference == [third, third - 1]
    assert stored[2].augmented_reference == [third - 2, third - 3]
    assert stored[2].start == [-1.0, -2.0]
    with pytest.raises(IndexError):
        stored[3]
    groups = [group("a"), replace(group("b"), prompt=[])]
    assert list(store_examples(tmp_path / "sft", SharedPrompt, groups, Counter())) == groups


def counting(tally: Counter[str]) -> Iterator[PairExample]:
    for number in range(600):
        tally["pairs"] += 1
        yield pair(f"p{number}")
    tally["too_long"] += 3


def counted(folder: Path) -> StoredExamples[PairExample]:
    tally = Counter[str]()
    return store_examples(folder, PairExample, counting(tally), tally)


def test_what_was_written_is_found_again_with_its_counts(tmp_path: Path) -> None:
    def unwanted() -> Iterator[PairExample]:
        raise AssertionError("made a second time")
        yield

    first = counted(tmp_path)
    again = store_examples(tmp_path, PairExample, unwanted(), Counter())
    assert first.counts == again.counts == {"pairs": 600, "too_long": 3}
    assert len(again) == 600
    assert again[599] == first[599] == pair("p599")


def test_table_of_a_killed_writing_is_written_again(tmp_path: Path) -> None:
    def dying() -> Iterator[PairExample]:
        for number, example in enumerate(counting(Counter())):
            if number == 400:
                raise Killed
            yield example

    with pytest.raises(Killed):
        store_examples(tmp_path, PairExample, dying(), Counter())
    assert (tmp_path / "examples.arrow").stat().st_size > 0
    stored = counted(tmp_path)
    assert (len(stored), stored.counts["pairs"]) == (600, 600)


def test_some_examples_are_taken_by_their_places(tmp_path: Path) -> None:
    stored = counted(tmp_path)
    assert list(stored.ids()) == [f"p{number}" for number in range(600)]
    some = stored.take(range(7, 600, 10))
    assert [example.id for example in some] == list(some.ids()) == [f"p{n}" for n in range(600) if n % 10 == 7]
    again = some.take([59, 0])
    assert [example.id for example in again] == list(again.ids()) == ["p597", "p7"]
    assert list(stored.take([])) == list(stored.take([]).ids()) == []


def test_steps_take_stored_examples_as_they_take_a_list(tmp_path: Path) -> None:
    stored = counted(tmp_path)
    mapped, listed = (StepDataset(examples, 7, 3, 5) for examples in (stored, list(stored)))
    assert len(mapped) == len(listed) == 3 * 86
    assert [mapped[step] for step in (0, 85, 86, 257)] == [listed[step] for step in (0, 85, 86, 257)]
    assert [len(step) for step in listed] == [*[7] * 85, 5] * 3
    epochs = [[e.id for step in range(86 * n, 86 * (n + 1)) for e in listed[step]] for n in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_references_are_joined_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    """The file may have pairs that did not fit behind p⊕x."""
    file = tmp_path / "references.jsonl"
    write_records(file, [reference("a", -1.0), reference("long", -9.0), reference("b", -2.0)])
    joined = list(join_references([pair("a"), pair("b", refined=False)], file, "reference"))
    assert [example.reference for example in joined] == [[-1.0, -2.0], [-2.0, -3.0]]
    assert joined[0].augmented_reference == [-3.0, -4.0]
    assert joined[1].augmented is None
    for names in (("b", "a"), ("a", "c")):
        with pytest.raises(
            SelfalignError, match=rf"references\.jsonl: log-probabilities of pair {names[1]} are missing or not"
        ):
            list(join_references(map(pair, names), file, "reference"))


def test_nothing_is_written_outside_of_the_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "from pathlib import Path\n"
        "from collections import Counter\n"
        "from selfalign.models.batches import SharedPrompt\n"
        "from selfalign.training.dataset import store_examples\n"
        "some = [SharedPrompt(id='a', prompt=[1], responses=[[2]], num_context_tokens=[0])]\n"
        f"assert list(store_examples(Path({str(tmp_path / 'there')!r}), SharedPrompt, some, Counter())) == some"
    )
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=given | {"HOME": str(home)}, check=True)
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["counts.json", "examples.arrow"]
