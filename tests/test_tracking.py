from pathlib import Path
from typing import Any

import pytest

from selfalign.errors import SelfalignError
from selfalign.tracking import NoTracking, Wandb, WandbTracker, has_key


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No key in the environment nor in a netrc file, and nothing said about the mode."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def mode_of(settings: Wandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What wandb.init is asked for."""
    asked: dict[str, Any] = {}

    class Opened(Exception):
        pass

    def init(**arguments: Any) -> None:
        asked.update(arguments)
        raise Opened

    monkeypatch.setattr("wandb.init", init)
    with pytest.raises(Opened), settings.open(tmp_path / "demo-12345678", {"loss": {"lam": 0.5}}):
        pass
    return asked


def test_without_a_key_runs_are_offline(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_key()
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"


def test_with_a_key_in_the_environment_runs_are_online(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_key.setenv("WANDB_API_KEY", "k" * 40)
    asked = mode_of(Wandb(), no_key, tmp_path)
    assert (asked["mode"], asked["resume"]) == ("online", "allow")


def test_with_a_key_in_netrc_runs_are_online(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password kkk\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "online"


def test_unreadable_netrc_is_no_key(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("what is this\n")
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"


@pytest.mark.parametrize("said", ["offline", "disabled", "dryrun"])
def test_environment_that_says_offline_wins_over_a_key(no_key: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    no_key.setenv("WANDB_API_KEY", "k" * 40)
    no_key.setenv("WANDB_MODE", said)
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_configured_mode_is_taken_as_it_is(no_key: pytest.MonkeyPatch, tmp_path: Path, mode: str) -> None:
    assert mode_of(Wandb(mode=mode), no_key, tmp_path)["mode"] == mode


def test_run_is_named_like_its_folder_and_carries_the_configuration(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = mode_of(Wandb(project="p", tags=["t"]), no_key, tmp_path)
    assert (asked["name"], asked["id"], asked["dir"]) == ("demo-12345678", "demo-12345678", tmp_path / "demo-12345678")
    assert (asked["project"], asked["entity"], asked["tags"]) == ("p", None, ["t"])
    assert asked["config"] == {"loss": {"lam": 0.5}}


def test_unknown_mode_is_refused_with_its_key() -> None:
    with pytest.raises(SelfalignError, match=r"track\.mode must be one of auto, online, offline; got 'maybe'"):
        Wandb(mode="maybe")


def test_no_tracking_takes_everything_and_says_so(tmp_path: Path) -> None:
    with NoTracking().open(tmp_path, {}) as tracker:
        tracker.log({"step": 1})
        tracker.table("t", ["a"], [[1]])
        tracker.summarise({"a": 1})
        assert tracker.place == "none (track=none)"
    assert list(tmp_path.iterdir()) == []


def test_three_offline_jobs_have_three_runs_though_the_middle_one_fails(tmp_path: Path) -> None:
    """W&B keeps one run a process unless each is finished: the next job must not go on inside the failed one."""
    seen = []
    for number in (1, 2, 3):
        folder = tmp_path / f"job-{number}"
        folder.mkdir()
        try:
            with Wandb(mode="offline").open(folder, {"number": number}) as tracker:
                assert isinstance(tracker, WandbTracker)
                tracker.log({"step": 1, "iteration": 0, "loss": 0.5})
                tracker.table("samples", ["text"], [["a"], ["b"]])
                tracker.summarise({"eval/win_rate": 0.5})
                seen.append((tracker.run.id, tracker.run.config["number"], tracker.run.name))
                assert f"wandb sync {folder}" in tracker.place
                if number == 2:
                    raise RuntimeError("the middle one fails")
        except RuntimeError:
            assert number == 2
        files = list(folder.rglob("*.wandb"))
        assert len(files) == 1
        assert files[0].stat().st_size > 0
    assert seen == [(f"job-{n}", n, f"job-{n}") for n in (1, 2, 3)]
    import wandb

    assert wandb.run is None
