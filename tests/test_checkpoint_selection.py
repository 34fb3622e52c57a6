"""Checkpoints compared two by two: the last that did not lose is taken, also when the run is killed in between."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    TINY_RUN,
    Killed,
    composed,
    instruction,
    nudged_policy,
    planned,
    policy_artifact,
    records_artifact,
    workspace,
    write_tiny_data,
)
from builders import run as run_experiment
from chat_server import chat, chat_server
from mutation import mutated
from scipy import stats

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Response
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import Transformers
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.training import checkpoint_selection as module
from selfalign.training.checkpoint_selection import (
    CheckpointComparator,
    CheckpointSelection,
    CheckpointSelector,
    is_worse,
)
from selfalign.training.config import CheckpointSelectionConfig

PROMPT = "{instruction}\n<first>\n{first}\n</first>\n<second>\n{second}\n</second>"
ASKED = [instruction(name) for name in "abcdefghij"]
COUNT = 253
"""Validation instructions of arXiv 2401.10020."""


def selection_of(policy: PolicyCheckpoint, folder: Path, **comparator: Any) -> CheckpointSelection:
    """Compares every second step, by a policy or, where an endpoint is given, by a server."""
    judge = CheckpointComparator(prompt=PROMPT, **comparator)
    return CheckpointSelection(
        interval_steps=2,
        level=CheckpointSelectionConfig().level,
        instructions=records_artifact(folder / "asked", instructions=ASKED),
        comparator=judge,
        compared_by=None if judge.endpoint.base_url else policy_artifact(policy),
        engine=Transformers(dtype="float32"),
        sampling=Sampling(temperature=0, max_new_tokens=6),
        seed=0,
    )


@dataclass
class Outcomes:
    """Stands in for answers and their comparison: (wins, losses) of 253 against the checkpoint before, by step."""

    by_step: dict[int, tuple[int, int]]
    asked: list[int] = field(default_factory=list)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Outcomes:
    outcomes = Outcomes({})

    def compare(selector: CheckpointSelector, policy: Any, step: int) -> None:
        outcomes.asked.append(step)
        path = selector._result(step)
        path.parent.mkdir(parents=True)
        if selector.chosen is None:
            write_json(path, {})
            return
        wins, losses = outcomes.by_step[step]
        rate = (wins + (COUNT - wins - losses) / 2) / COUNT
        write_json(path, {"wins": wins, "losses": losses, "win_rate": rate})

    monkeypatch.setattr(CheckpointSelector, "_compare", compare)
    return outcomes


def run(selector: CheckpointSelector, start: int = 0, end: int = 7) -> list[int]:
    """Where a training of seven steps stops early, between these two."""
    nobody: Any = None
    for step in range(start + 1, end + 1):
        if selector.on_checkpoint(nobody, step, last=step == 7):
            return [step]
    return []


BETTER, EQUAL, A_LITTLE_WORSE, WORSE = (90, 60), (76, 77), (70, 84), (50, 104)
"""A win rate of 44 % (70 against 84) is below one half and no sign of anything: p = .15."""


@pytest.mark.parametrize(
    ("by_step", "stopped", "chosen", "asked"),
    [
        ({4: BETTER, 6: BETTER, 7: BETTER}, [], 7, [2, 4, 6, 7]),
        ({4: BETTER, 6: WORSE, 7: BETTER}, [6], 4, [2, 4, 6]),
        ({4: EQUAL, 6: EQUAL, 7: EQUAL}, [], 7, [2, 4, 6, 7]),
        ({4: A_LITTLE_WORSE, 6: A_LITTLE_WORSE, 7: A_LITTLE_WORSE}, [], 7, [2, 4, 6, 7]),
        ({4: WORSE, 6: WORSE, 7: WORSE}, [4], 2, [2, 4]),
        ({4: BETTER, 6: BETTER, 7: WORSE}, [7], 6, [2, 4, 6, 7]),
    ],
    ids=["always_better", "worse_once", "equals_go_on", "chance_goes_on", "worse_at_once", "only_the_last_is_worse"],
)
def test_training_stops_when_a_checkpoint_loses_and_the_last_that_did_not_is_taken(
    tiny_policy: PolicyCheckpoint,
    tmp_path: Path,
    scripted: Outcomes,
    by_step: dict[int, tuple[int, int]],
    stopped: list[int],
    chosen: int,
    asked: list[int],
) -> None:
    scripted.by_step = by_step
    selector = CheckpointSelector(workspace(tmp_path / "M2"), selection_of(tiny_policy, tmp_path), tiny_policy)
    assert run(selector) == stopped
    assert selector.chosen == chosen
    assert scripted.asked == asked


@pytest.mark.parametrize("done", [1, 3, 4, 6])
def test_killed_selection_continues_to_the_same_choice(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, scripted: Outcomes, done: int
) -> None:
    scripted.by_step = {4: BETTER, 6: WORSE, 7: BETTER}
    out = workspace(tmp_path / "M2")
    run(CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy), end=done)
    again = CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy)
    if again.resume(done):
        assert done == 6
    else:
        assert run(again, start=done) == [6]
    rates = {step: (wins + (COUNT - wins - losses) / 2) / COUNT for step, (wins, losses) in ((4, BETTER), (6, WORSE))}
    assert again.counts() == {
        "chosen_step": 4,
        "checkpoint_win_rate/4": rates[4], "checkpoint_wins/4": 90, "checkpoint_losses/4": 60,
        "checkpoint_win_rate/6": rates[6], "checkpoint_wins/6": 50, "checkpoint_losses/6": 104,
    }  # fmt: skip
    assert scripted.asked == [2, 4, 6], "a checkpoint was compared twice"


@pytest.mark.parametrize(("last", "chosen"), [(BETTER, 7), (WORSE, 6)])
def test_selection_killed_behind_the_last_step_keeps_its_comparison(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, scripted: Outcomes, last: tuple[int, int], chosen: int
) -> None:
    scripted.by_step = {4: BETTER, 6: BETTER, 7: last}
    out = workspace(tmp_path / "M2")
    first = CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy)
    run(first)
    again = CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy)
    assert again.resume(7) == (last == WORSE)
    assert again.chosen == chosen
    assert again.counts() == first.counts()


# --- the stopping rule -------------------------------------------------------------------------------------------


def check_sign_test(rule: Any) -> None:
    # Seven losses in a row have probability 2⁻⁷ = .0078, eight 2⁻⁸ = .0039.
    assert [rule(0, losses, 0.005) for losses in (7, 8)] == [False, True]
    # 1 of 10: (1 + 10) / 2¹⁰ = .0107; 1 of 12: 13 / 2¹² = .0032.
    assert [rule(1, losses, 0.005) for losses in (9, 11)] == [False, True]
    assert not rule(0, 0, 0.005), "only ties"
    assert not rule(8, 0, 0.005)


def test_checkpoint_loses_by_a_one_sided_sign_test() -> None:
    check_sign_test(is_worse)
    for wins, losses in ((70, 84), (50, 104), (60, 95)):
        found = stats.binomtest(wins, wins + losses, alternative="less").pvalue
        assert is_worse(wins, losses, 0.005) == (found < 0.005)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sign_test(wins, losses) < level", "wins < losses"),
        ("sign_test(wins, losses) < level", "sign_test(losses, wins) < level"),
        ("sign_test(wins, losses) < level", "sign_test(wins, losses) > 1 - level"),
    ],
    ids=["first_win_rate_below_one_half", "winner_stopped", "other_side"],
)
def test_other_stopping_rules_are_caught(old: str, new: str) -> None:
    with mutated(module, old, new) as copy, pytest.raises(AssertionError):
        check_sign_test(copy.is_worse)


def share_stopped(draw: np.random.Generator, noise: float, threshold: float, worse: float = 0.0) -> tuple[float, float]:
    """The share of 2,000 runs of eight checkpoints that stop early, and the share of ties.

    A checkpoint's answers have a quality each, drawn for every instruction; the judge sees differences with noise of
    its own in each order, calls small ones a tie, and orders that disagree are one. Each checkpoint is `worse` than
    the one before by so many standard deviations.
    """
    runs, checkpoints = 2000, 8
    quality = draw.normal(size=(runs, checkpoints, COUNT)) - worse * np.arange(checkpoints)[:, None]
    gaps = np.diff(quality, axis=1)
    orders = [gaps + noise * draw.normal(size=gaps.shape) for _ in range(2)]
    signs = [np.where(np.abs(seen) < threshold, 0, np.sign(seen)) for seen in orders]
    outcomes = np.where(signs[0] == signs[1], signs[0], 0)
    wins, losses = (outcomes > 0).sum(2), (outcomes < 0).sum(2)
    level = CheckpointSelectionConfig().level
    stopped = [any(is_worse(w, x, level) for w, x in zip(*row, strict=True)) for row in zip(wins, losses, strict=True)]
    return sum(stopped) / runs, float((outcomes == 0).mean())


@pytest.mark.parametrize(
    ("noise", "threshold", "ties"), [(0.0, 0.0, 0.0), (2.0, 0.0, 0.39), (1.0, 0.5, 0.48), (0.0, 1.6, 0.74)]
)
def test_equally_good_checkpoints_rarely_stop_a_run(noise: float, threshold: float, ties: float) -> None:
    """2 to 3 % of runs of eight, whatever the share of ties; at the first win rate below one half, 99.9 % would."""
    share, tied = share_stopped(np.random.default_rng(0), noise, threshold)
    assert tied == pytest.approx(ties, abs=0.01)
    assert 0.01 < share < 0.04


def test_clearly_worse_checkpoints_stop_a_run() -> None:
    """One that wins 20 % and loses 41 % is seen in 95 of 100 comparisons, 12 % against 56 % (M1 and M2) always."""
    draw = np.random.default_rng(1)
    for shares, least in (([0.20, 0.39, 0.41], 0.94), ([0.117, 0.328, 0.555], 1.0)):
        outcomes = draw.multinomial(COUNT, shares, size=2000)
        assert (
            np.mean([is_worse(wins, losses, CheckpointSelectionConfig().level) for wins, _, losses in outcomes])
            >= least
        )
    # Half a standard deviation worse each time: 23 % won, 39 % lost; a run of eight goes on to its end hardly ever.
    assert share_stopped(np.random.default_rng(0), 2.0, 0.0, worse=0.5)[0] > 0.999


# --- real answers, really compared ---------------------------------------------------------------------------------


def test_equal_checkpoints_answer_alike_and_tie(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    out = workspace(tmp_path / "M2")
    selector = CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy)
    policy: Policy = tiny_policy.load("float32", trainable=True)
    assert not selector.on_checkpoint(policy, 1, last=False)
    assert not selector.on_checkpoint(policy, 2, last=False)
    assert not selector.on_checkpoint(policy, 4, last=False)
    answers = [answers_of(out, step) for step in (2, 4)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == len(ASKED)
    assert selector.counts() == {
        "chosen_step": 4, "checkpoint_win_rate/4": 0.5, "checkpoint_wins/4": 0, "checkpoint_losses/4": 0,
    }  # fmt: skip
    assert selector.files(4).digest == selector.files(2).digest


def answers_of(out: Any, step: int) -> list[str]:
    """What a checkpoint answered."""
    return [r.text for r in read_records(out.scratch / f"selection/{step}/answers/responses.jsonl", Response)]


def test_checkpoints_are_compared_pairwise_in_both_orders_and_the_loser_is_not_taken(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server prefers the first checkpoint's answers wherever they stand; killed as it compares, the run goes on."""
    out, asked = workspace(tmp_path / "M2"), []
    other = nudged_policy(tiny_policy, tmp_path / "other", 0.3).load("float32", trainable=True)

    def reply(body: dict[str, Any]) -> bytes:
        shown = body["messages"][0]["content"]
        first = re.search(r"<first>\n(.*?)\n</first>", shown, re.DOTALL)
        assert first is not None
        asked.append(first[1])
        return chat("[[A]]" if first[1] in answers_of(out, 2) else "[[B]]")

    with chat_server(reply) as server:
        endpoint = Endpoint(base_url=server.url, model="m", api_key_env="", concurrency=2)
        selection = selection_of(tiny_policy, tmp_path, endpoint=endpoint)
        selector = CheckpointSelector(out, selection, tiny_policy)
        assert not selector.on_checkpoint(tiny_policy.load("float32", trainable=True), 2, last=False)
        assert asked == [], "the first checkpoint has nothing to be compared with"

        def killed(*_: Any, **__: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, "compare_answers", killed)
            with pytest.raises(Killed):
                selector.on_checkpoint(other, 4, last=False)
        again = CheckpointSelector(out, selection, tiny_policy)
        assert not again.resume(3)
        assert again.on_checkpoint(other, 4, last=False)
        assert not set(answers_of(out, 2)) & set(answers_of(out, 4))
    assert len(asked) == 2 * len(ASKED)
    assert again.counts() == {
        "chosen_step": 2, "checkpoint_win_rate/4": 0.0, "checkpoint_wins/4": 0, "checkpoint_losses/4": len(ASKED),
    }  # fmt: skip


def on_given_pairs(folder: Path, interval: int) -> list[str]:
    """A run on three given pairs, one a step, that compares checkpoints."""
    of_others = ("data.instruct", "data.respond", "evaluate.")
    data = [one for one in [*TINY_RUN, *write_tiny_data(folder)] if not one.startswith(of_others)]
    return [
        *data, "data=pairs", f"data.path={folder}/ranked.jsonl", "iterations=1", "evaluate=none",
        f"train.checkpoint_selection.instructions={folder}/asked.jsonl",
        f"train.checkpoint_selection.interval_steps={interval}",
        "train.checkpoint_selection.sampling.max_new_tokens=4",
        "train.checkpoint_selection.head_to_head.model=random:tiny",
    ]  # fmt: skip


def test_given_pairs_with_too_few_steps_to_compare_checkpoints_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match="an alignment has 3 steps at most, so there are no two checkpoints"):
        run_experiment(tmp_path / "out", *on_given_pairs(tmp_path, 3))
    assert not list((tmp_path / "out").glob("store/sft"))


def test_model_that_only_compares_checkpoints_is_loaded_and_in_the_plan(tmp_path: Path) -> None:
    told = on_given_pairs(tmp_path, 1)
    folder = run_experiment(tmp_path / "out", *told)
    stages = {stage["label"]: stage["counts"] for stage in read_json(folder / "summary.json")["stages"]}
    assert planned(composed(*told)[0]) == list(stages)
    assert "checkpoint_judge" in stages
    steps = {int(name.rpartition("/")[2]) for name in stages["M2"] if name.startswith("checkpoint_win_rate/")}
    assert steps == {2, 3}, "three pairs, one a step: the first checkpoint has nothing to be compared with"
    assert stages["M2"]["chosen_step"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval_steps": 5}, "interval_steps and train.checkpoint_selection.instructions belong together"),
        ({"instructions": "a.jsonl"}, "interval_steps and train.checkpoint_selection.instructions belong together"),
        ({"interval_steps": -1, "instructions": "a.jsonl"}, "must be 0 or more"),
        (
            {"interval_steps": 5, "instructions": "a.jsonl"},
            "needs a judge: set train.checkpoint_selection.head_to_head",
        ),
        ({"level": 0.5}, "level must be above 0 and below 0.5, got 0.5"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        CheckpointSelectionConfig(**options)
