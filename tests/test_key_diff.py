"""Why keys differ: the inputs at the root of it, and what only follows."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import SelfalignError
from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger
from selfalign.runs.runner import Runner
from selfalign.store.artifacts import Artifact, Counts, StageOutput, Store
from selfalign.store.key_diff import ABSENT, KeyDiff, differences, read_stages


def teach(out: StageOutput, **inputs: Any) -> Counts:
    """A stage whose result depends on all its inputs."""
    (out.path / "result").write_text(repr({k: v.digest if isinstance(v, Artifact) else v for k, v in inputs.items()}))
    return {}


def settle(out: StageOutput, **inputs: Any) -> Counts:
    """A stage whose result is always the same."""
    (out.path / "result").write_text("the same")
    return {}


def run_of(output: Path, name: str) -> Runner:
    (output / name).mkdir(parents=True, exist_ok=True)
    return Runner(Store(output / "store"), ledger=Ledger(output / name))


def account(run: Runner) -> Ledger:
    assert run.ledger is not None
    return run.ledger


def study(output: Path, name: str, rate: float = 0.1, lam: float = 0.5, reference: str = "M2") -> Runner:
    """M0 → M1 → M2 → M3 with a measurement of each of the last two."""
    run = run_of(output, name)
    made = {"M0": run.make(Label.parse("M0"), settle, model="m")}
    made["M1"] = run.make(
        Label.parse("M1"), teach, policy=made["M0"], settings={"class": "Settings", "rate": rate}, seed=1
    )
    for label, before in (("M2", "M1"), ("M3", "M2")):
        reference_of = {"reference": made[reference]} if label == "M3" else {}
        made[label] = run.make(
            Label.parse(label), teach, policy=made[before], loss={"class": "SrDPO", "lam": lam}, **reference_of
        )
        run.make(Label.parse(f"evaluation_{label}/numbers"), settle, policy=made[label])
    return run


def compared(one: Runner, other: Runner) -> KeyDiff:
    return KeyDiff(read_stages(account(one).folder), read_stages(account(other).folder))


def told(comparison: KeyDiff, label: str = "") -> dict[str, list[str]]:
    """What is said of every label that differs."""
    shown = comparison.behind(label) if label else {*comparison.first, *comparison.second}
    causes = comparison.causes(shown)
    return {label: [f"{d.path}: {comparison.value(d)}" for d in found] for label, found in causes.items()}


def test_runs_of_the_same_settings_are_all_the_same(tmp_path: Path) -> None:
    comparison = compared(study(tmp_path, "a"), study(tmp_path, "b"))
    assert comparison.same == ["M0", "M1", "M2", "evaluation_M2/numbers", "M3", "evaluation_M3/numbers"]
    assert told(comparison) == {}


def test_setting_is_told_once_and_where_it_first_matters(tmp_path: Path) -> None:
    comparison = compared(study(tmp_path, "a"), study(tmp_path, "b", lam=0.3))
    assert comparison.same == ["M0", "M1"]
    assert told(comparison) == {
        "M2": ["loss.lam: 0.5 → 0.3"], "evaluation_M2/numbers": [], "M3": [], "evaluation_M3/numbers": [],
    }  # fmt: skip
    assert comparison.followed["M3"] == {"M2"}


def test_two_causes_are_both_told(tmp_path: Path) -> None:
    comparison = compared(study(tmp_path, "a"), study(tmp_path, "b", rate=0.2, lam=0.3))
    causes = {label: said for label, said in told(comparison).items() if said}
    assert causes == {"M1": ["settings.rate: 0.1 → 0.2"], "M2": ["loss.lam: 0.5 → 0.3"]}


def test_label_is_explained_by_what_it_depends_on(tmp_path: Path) -> None:
    comparison = compared(study(tmp_path, "a"), study(tmp_path, "b", rate=0.2, lam=0.3))
    assert told(comparison, "M1") == {"M1": ["settings.rate: 0.1 → 0.2"]}
    assert told(comparison, "evaluation_M2/numbers") == {
        "M1": ["settings.rate: 0.1 → 0.2"], "M2": ["loss.lam: 0.5 → 0.3"], "evaluation_M2/numbers": [],
    }  # fmt: skip
    assert told(comparison, "M0") == {}


def test_setting_told_of_another_stage_is_told_again_where_only_a_later_one_is_asked_for(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, name) for name in "ab"]
    for run, count in zip(runs, (3, 4), strict=True):
        run.make(Label.parse("evaluation_M1/answers"), settle, count=count, model=1)
        run.make(Label.parse("evaluation_M2/answers"), settle, count=count, model=2)
    comparison = compared(*runs)
    assert told(comparison) == {"evaluation_M1/answers": ["count: 3 → 4"], "evaluation_M2/answers": []}
    assert told(comparison, "evaluation_M2/answers") == {"evaluation_M2/answers": ["count: 3 → 4"]}


def test_input_from_another_stage_of_the_run_is_a_cause(tmp_path: Path) -> None:
    """A reference that is another model, though both runs have both."""
    comparison = compared(study(tmp_path, "a"), study(tmp_path, "b", reference="M1"))
    assert told(comparison) == {"M3": ["reference: M2 → M1"], "evaluation_M3/numbers": []}


def test_other_settings_with_the_same_result_have_no_consequences(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, name) for name in "ab"]
    for run, model in zip(runs, "mn", strict=True):
        run.make(Label.parse("M1"), teach, policy=run.make(Label.parse("M0"), settle, model=model))
    comparison = compared(*runs)
    assert (told(comparison), comparison.same) == ({"M0": ['model: "m" → "n"']}, ["M1"])


def test_seeds_have_one_cause(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, name) for name in "ab"]
    for run, seed in zip(runs, (10, 20), strict=True):
        run.make(Label.parse("M1"), teach, weights={"class": "Weights", "seed": seed + 1})
        run.make(Label.parse("M2"), teach, weights={"class": "Weights", "seed": seed + 2})
    assert told(compared(*runs)) == {"M1": ["weights.seed: 11 → 21"], "M2": []}


def test_other_stage_and_inputs_that_one_run_lacks_are_named(tmp_path: Path) -> None:
    one, other = (run_of(tmp_path, name) for name in "ab")
    one.make(Label.parse("M2"), teach, lam=0.5)
    other.make(Label.parse("M2"), settle, selection={"class": "CheckpointSelection", "judge": "self"})
    assert told(compared(one, other)) == {
        "M2": [
            'stage: "teach" → "settle"',
            "lam: 0.5 → nothing",
            'selection: nothing → CheckpointSelection(judge="self")',
        ],
    }


def test_labels_of_one_run_only_and_unfinished_ones(tmp_path: Path) -> None:
    one, other = study(tmp_path, "a"), study(tmp_path, "b", lam=0.3)
    (account(other).folder / "artifacts" / "M3" / "manifest.json").unlink()
    (account(other).folder / "artifacts" / "evaluation_M3" / "numbers").unlink()
    (account(other).folder / "artifacts" / "gone").symlink_to("../../store/teach/gone")
    comparison = compared(one, other)
    assert comparison.unknown == ["M3"]
    assert comparison.first.keys() - comparison.second.keys() == {"evaluation_M3/numbers"}
    assert comparison.second.keys() - comparison.first.keys() == {"gone"}


def test_labels_come_in_the_order_they_were_made_in_a_killed_run_too(tmp_path: Path) -> None:
    run = study(tmp_path, "a")
    order = ["M0", "M1", "M2", "evaluation_M2/numbers", "M3", "evaluation_M3/numbers"]
    assert list(read_stages(account(run).folder)) == order
    log = account(run).folder / "metrics.jsonl"
    log.write_text(log.read_text()[:-90])
    assert list(read_stages(account(run).folder)) == order
    log.unlink()
    assert list(read_stages(account(run).folder)) == sorted(order)


def test_what_is_no_run_and_damage_are_errors_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match="not a run folder"):
        read_stages(tmp_path)
    run = study(tmp_path, "a")
    manifest = account(run).folder / "artifacts" / "M1" / "manifest.json"
    for content in ("{", "[]", "{}", '{"stage": 1, "format": 1, "digest": "x", "inputs": 3}'):
        manifest.write_text(content)
        with pytest.raises(SelfalignError, match=r"manifest\.json: damaged; delete .*teach/\w{20} to have"):
            read_stages(account(run).folder)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 1.0}, [("a", 1, 1.0)]),
        ({"a": 1}, {"a": True}, [("a", 1, True)]),
        ({"a": None}, {}, [("a", None, ABSENT)]),
        ({}, {"a": None}, [("a", ABSENT, None)]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, [("a.b", [1, 2], [1, 3])]),
        ({"a": [{"b": 1}, 2]}, {"a": [{"b": 2}]}, [("a[0].b", 1, 2), ("a[1]", 2, ABSENT)]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}, []),
        ({"a": {"class": "X", "b": 1}}, {"a": {"class": "Y", "b": 1}}, [("a.class", "X", "Y")]),
        ({"a": {"class": "X"}}, {"a": None}, [("a", {"class": "X"}, None)]),
        ({"a": ["x"]}, {"a": []}, [("a", ["x"], [])]),
    ],
)
def test_differences_of_canonical_json(first: Any, second: Any, found: list[tuple[str, Any, Any]]) -> None:
    assert [(d.path, d.first, d.second) for d in differences(first, second)] == found


def test_every_difference_of_the_key_is_found(tmp_path: Path) -> None:
    """Whatever makes another key must be something to tell."""
    values = [0, 0.0, -0.0, False, None, "", "0", [], {}, [0], [0.0], [{}], {"a": 0}, [None], "\u2028", [[0]], [[0.0]]]
    runs = [run_of(tmp_path, str(n)) for n in range(len(values))]
    for run, value in zip(runs, values, strict=True):
        run.make(Label.parse("M1"), settle, value=value)
    stages = [read_stages(account(run).folder) for run in runs]
    for one in stages:
        for other in stages:
            causes = told(KeyDiff(one, other))
            assert causes != {"M1": []}
            assert (causes == {}) is (one["M1"].key == other["M1"].key)


def test_long_texts_are_cut_around_the_first_difference() -> None:
    text = "Grade the response. " * 50
    comparison = KeyDiff({}, {})
    for place in (0, 500, len(text) - 1):
        other = text[:place] + "#" + text[place + 1 :]
        (difference,) = differences({"prompt": text}, {"prompt": other})
        one, _, two = comparison.value(difference).partition(" → ")
        assert "#" in two
        assert "#" not in one
        assert max(len(one), len(two)) <= 62
        assert one.strip("…").strip('"') in text
    (difference,) = differences({"prompt": text}, {"prompt": text + "more"})
    assert comparison.value(difference).endswith('more"')
    (difference,) = differences({"prompt": "a\nb"}, {"prompt": "\x1b[2J\u202e"})
    assert comparison.value(difference).isprintable()
    assert json.dumps("a\nb") in comparison.value(difference)
