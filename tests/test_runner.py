import importlib.metadata
import json
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT, composed, policy_artifact

from selfalign.core.errors import SelfalignError
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.runs.folder import check_name, open_folder, run_folder
from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger, flat_numbers
from selfalign.runs.provenance import code_state, write_provenance
from selfalign.runs.runner import CacheLookup, NotMadeYet, Runner, StageFunction
from selfalign.store.artifacts import Artifact, Counts, StageOutput, Store


@dataclass
class Rows:
    """A tracker that keeps what it is sent."""

    place: str = "here"
    logged: list[dict[str, Any]] = field(default_factory=list)

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)

    def table(self, name: str, columns: Any, rows: Any) -> None: ...

    def summarise(self, values: dict[str, Any]) -> None: ...

    def attach(self, files: Any) -> None: ...


def write(out: StageOutput, *, text: str) -> Counts:
    (out.path / "text.txt").write_text(text)
    return {"length": len(text), "dropped": {"short": 1, "long": 0}, "note": "words", "list": [1]}


def teach(out: StageOutput, *, steps: int) -> Counts:
    for step in range(1, steps + 1):
        out.log({"step": step, "loss": 1 / step})
    (out.path / "weights.txt").write_text(str(steps))
    return {"examples": steps}


def refusing(name: str) -> StageFunction:
    """A stage of this name that must not be called."""

    def stage(out: StageOutput, **inputs: Any) -> Counts:
        raise AssertionError(f"{name} was made again")

    stage.__name__ = name
    return stage


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    open_folder(tmp_path / "run", "name: x\n")
    return Runner(Store(tmp_path / "store"), ledger=Ledger(tmp_path / "run", tracker=Rows()))


def account(run: Runner) -> Ledger:
    assert run.ledger is not None
    return run.ledger


def once_more(run: Runner, namespace: str = "") -> Runner:
    return Runner(run.store, namespace, Ledger(account(run).folder, tracker=Rows()))


def rows_of(run: Runner) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (account(run).folder / "metrics.jsonl").read_text().splitlines()]


def test_stage_is_made_once_and_found_again(run: Runner, tmp_path: Path) -> None:
    made = run.make(Label.parse("seeds"), write, text="four")
    assert (made.stage, made.counts["length"], account(run).reused) == ("write", 4, set())
    again = once_more(run)
    found = again.make(Label.parse("seeds"), refusing("write"), text="four")
    assert (found, account(again).reused) == (made, {Label.input("seeds")})
    assert again.make(Label.parse("other"), write, text="five!").key != made.key


def test_artifact_is_linked_under_its_label(run: Runner) -> None:
    made = run.make(Label.parse("iteration_1/pairs"), write, text="four")
    link = account(run).folder / "artifacts/iteration_1/pairs"
    assert link.is_symlink()
    assert link.resolve() == made.path.resolve()
    assert (link / "text.txt").read_text() == "four"
    assert not link.readlink().is_absolute()
    other = run.make(Label.parse("iteration_1/pairs"), write, text="another")
    assert link.resolve() == other.path.resolve()


def test_artifact_is_linked_before_it_is_looked_for(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding it and linking it, it could be cleaned away as unused."""
    link, original = account(run).folder / "artifacts/iteration_1/pairs", Store.find

    def find(store: Store, stage: str, inputs: dict[str, Any]) -> Artifact | None:
        assert link.is_symlink()
        assert link.resolve() == store.path_of(stage, inputs)
        return original(store, stage, inputs)

    monkeypatch.setattr(Store, "find", find)
    for text in ("four", "four", "another"):
        run.make(Label.parse("iteration_1/pairs"), write, text=text)


def test_link_that_is_right_is_never_gone(run: Runner) -> None:
    run.make(Label.parse("seeds"), write, text="four")
    before = (account(run).folder / "artifacts/seeds").lstat()
    run.make(Label.parse("seeds"), write, text="four")
    assert (account(run).folder / "artifacts/seeds").lstat() == before


def test_run_that_was_copied_with_its_links_followed_says_what_to_remove(run: Runner) -> None:
    run.make(Label.parse("M1"), write, text="a")
    link = account(run).folder / "artifacts" / "M1"
    kept = link.resolve()
    link.unlink()
    shutil.copytree(kept, link)
    with pytest.raises(SelfalignError, match=r"M1 is a folder where a run has a link.*Remove .*artifacts and repeat"):
        run.make(Label.parse("M1"), write, text="a")


def test_rows_say_what_they_belong_to(run: Runner) -> None:
    run.make(Label.parse("seeds"), write, text="four")
    run.make(Label.parse("M2"), teach, steps=2)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    seconds = [row.pop(key) for row, key in ((rows[0], "write/seconds"), (rows[3], "teach/seconds"))]
    assert all(value >= 0 for value in seconds)
    assert rows == [
        {
            "step": 1,
            "iteration": 0,
            "label": "seeds",
            "stage": "write",
            "length": 4,
            "dropped/short": 1,
            "dropped/long": 0,
        },
        {"step": 2, "iteration": 1, "label": "M2", "stage": "teach", "loss": 1.0, "teach/step": 1},
        {"step": 3, "iteration": 1, "label": "M2", "stage": "teach", "loss": 0.5, "teach/step": 2},
        {"step": 4, "iteration": 1, "label": "M2", "stage": "teach", "examples": 2},
    ]


def test_tracker_receives_every_row(run: Runner) -> None:
    run.make(Label.parse("M2"), teach, steps=2)
    assert isinstance(account(run).tracker, Rows)
    assert account(run).tracker.logged == rows_of(run)


def test_rows_of_a_found_artifact_are_those_of_the_making(run: Runner) -> None:
    run.make(Label.parse("M2"), teach, steps=3)
    first = rows_of(run)
    open_folder(account(run).folder, "name: x\n")
    again = once_more(run)
    again.make(Label.parse("M2"), teach, steps=3)
    assert rows_of(again) == first


def test_rows_logged_before_a_kill_are_in_the_metrics_once(run: Runner) -> None:
    def teach(out: StageOutput, *, steps: int) -> Counts:
        out.rewind_log(lambda row: row["step"] <= 1)
        done = len((out.path / "log.jsonl").read_text().splitlines())
        for step in range(done + 1, steps + 1):
            out.log({"step": step, "loss": float(step)})
            if step == 2 and not done:
                raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run.make(Label.parse("M2"), teach, steps=3)
    open_folder(account(run).folder, "name: x\n")
    once_more(run).make(Label.parse("M2"), teach, steps=3)
    assert [row["teach/step"] for row in rows_of(run) if "teach/step" in row] == [1, 2, 3]


def test_attempt_is_part_of_every_key(run: Runner) -> None:
    first = run.make(Label.parse("seeds"), write, text="four")
    fresh = once_more(run, "n-1")
    second = fresh.make(Label.parse("seeds"), write, text="four")
    assert first.key != second.key
    assert account(fresh).reused == set()
    assert first.digest == second.digest


def test_look_finds_what_is_there_and_makes_nothing(run: Runner) -> None:
    run.make(Label.parse("seeds"), write, text="four")
    look = CacheLookup(run.store)
    assert look.make(Label.parse("seeds"), refusing("write"), text="four").counts["length"] == 4
    with pytest.raises(NotMadeYet, match="M1"):
        look.make(Label.parse("M1"), refusing("sft"), text="x")
    assert list(look.found) == [Label.input("seeds")]
    assert not (run.store.root / "sft").exists()


def test_folder_is_a_function_of_the_configuration_not_of_the_clock(tmp_path: Path) -> None:
    def folder(*overrides: str) -> tuple[Path, object]:
        config, *_ = composed("experiment=smoke", *overrides)
        return run_folder(tmp_path, config.name, config, fresh=False)

    plain, attempt = folder()
    assert not attempt
    assert plain.name.startswith("smoke-")
    assert folder() == (plain, attempt)
    same = ["output_dir=elsewhere", "tracker=wandb", "train.sft.microbatch_tokens=99", "train.align.checkpoint_steps=3"]
    same += ["hub.repo_id=me/tiny", "hub.private=false"]
    assert all(folder(override) == (plain, attempt) for override in same)
    other = [
        "seed=1",
        "loss.lam=0.3",
        "loss=dpo",
        "iterations=3",
        "judge.min_score=1",
        "data.respond.candidates=5",
        "name=other",
    ]
    names = [folder(override)[0].name for override in other]
    assert len({plain.name, *names}) == 8


def test_fresh_takes_the_next_free_folder(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        folder, attempt = run_folder(tmp_path, "n", {"a": 1}, fresh=True)
        folder.mkdir()
        seen.append((folder.name, attempt))
    assert len({name for name, _ in seen}) == len({attempt for _, attempt in seen}) == 3
    assert not run_folder(tmp_path, "n", {"a": 1}, fresh=False)[1]


@pytest.mark.parametrize("name", ["demo", "a", "λ-sweep_1.5", "x" * 80])
def test_good_name(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "a b", "x" * 81, "a\n", "-dash", "a:b"])
def test_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(SelfalignError, match="name must be"):
        check_name(name)


@pytest.mark.parametrize(
    ("label", "iteration"),
    [("M0", 0), ("seeds", 0), ("M1", 0), ("questions", 0), ("evaluation_M1/answers", 0), ("iteration_1/pairs", 1),
     ("M2", 1), ("evaluation_M2/numbers", 1), ("iteration_12/responses", 12), ("M13", 12)],
)  # fmt: skip
def test_iteration_of_a_label(label: str, iteration: int) -> None:
    assert Label.parse(label).iteration_number == iteration


def test_numbers_of_counts_are_flat() -> None:
    counts = {"kept": 3, "share": 0.5, "dropped": {"tie": 2}, "note": "x", "list": [1, 2]}
    assert flat_numbers(counts) == {"kept": 3, "share": 0.5, "dropped/tie": 2}


def test_opening_a_folder_keeps_the_configuration_and_empties_the_metrics(tmp_path: Path) -> None:
    open_folder(tmp_path / "run", "name: λ\n")
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    open_folder(tmp_path / "run", "name: λ\n")
    assert (tmp_path / "run/config.yaml").read_text(encoding="utf-8") == "name: λ\n"
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""


def test_provenance_leads_back_to_code_versions_seed_and_weights(
    run: Runner, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.token_hex(16)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setattr("sys.argv", ["/somewhere/selfalign", "experiment=smoke", "seed=7"])
    pairs = run.make(Label.parse("iteration_1/pairs"), write, text="four")
    account(run).artifacts[Label.model("M1")] = policy_artifact(tiny_policy)
    write_provenance(account(run), 7, code_state())
    text = (account(run).folder / "provenance.json").read_text()
    content = json.loads(text)
    assert content["seed"] == 7
    assert content["command"] == ["selfalign", "experiment=smoke", "seed=7"]
    assert content["weights"] == {"M1": tiny_policy.digest}
    assert content["artifacts"]["iteration_1/pairs"] == f"write/{pairs.key}"
    assert {"torch", "transformers", "hydra-core", "peft", "selfalign"} <= content["packages"].keys()
    assert content["machine"]["cores"] >= 1
    assert secret not in text


def test_provenance_leaves_out_packages_that_are_not_installed(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As selfalign itself in a checkout that is only on the path."""

    def version(name: str) -> str:
        if name in ("selfalign", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("selfalign.runs.provenance.importlib.metadata.version", version)
    write_provenance(account(run), 7, code_state())
    packages = json.loads((account(run).folder / "provenance.json").read_text())["packages"]
    assert packages["torch"] == "1.0"
    assert not {"selfalign", "wandb"} & packages.keys()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_code_state_is_commit_and_uncommitted_changes() -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "diff", "HEAD", "--name-only"], capture_output=True, text=True, check=True
    )
    state = code_state()
    assert state["commit"] == head.stdout.strip()
    assert all(name in state["diff"] for name in changed.stdout.split() if name.isascii())
