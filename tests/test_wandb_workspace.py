import json
import re
import sys

import pytest

from selfalign.cli.workspace import main
from selfalign.tracking import wandb_workspace
from selfalign.tracking.wandb_workspace import as_sent, build


@pytest.fixture(scope="module")
def sent() -> dict:
    """The workspace as W&B gets it, through JSON as on the wire."""
    return json.loads(json.dumps(as_sent(build("team", "runs"))))


def panels(sent: dict, section: str) -> dict[str, dict]:
    """{title: settings of a panel}."""
    sections = {s["name"]: s for s in sent["spec"]["section"]["panelBankConfig"]["sections"]}
    return {panel["config"]["chartTitle"]: panel["config"] for panel in sections[section]["panels"]}


def test_workspace_is_of_its_project(sent: dict) -> None:
    assert (sent["entity"], sent["project"], sent["displayName"]) == ("team", "runs", wandb_workspace.NAME)


def test_numbers_of_the_last_model_stand_over_lambda(sent: dict) -> None:
    found = panels(sent, "Over λ")
    assert {(p["xAxis"], p["yAxis"]) for p in found.values()} == {
        ("config:loss.value.lam", f"summary:{metric.name}") for metric in wandb_workspace.OVER_LAMBDA
    }
    assert found["Win rate vs M1 over λ"]["yAxis"] == "summary:eval/win_rate"


def test_replicates_are_one_setting_with_mean_and_standard_error(sent: dict) -> None:
    bars, lines = panels(sent, "By setting"), panels(sent, "By iteration")
    assert [panel["metrics"] for panel in bars.values()] == [[m.name] for m in wandb_workspace.OVER_LAMBDA]
    for panel in (*bars.values(), *lines.values()):
        assert (panel["groupBy"], panel["groupAgg"], panel["groupArea"]) == ("setting.value", "mean", "stderr")


def test_margin_and_accuracy_are_curves_over_steps_by_lambda(sent: dict) -> None:
    found = panels(sent, "Training by λ")
    assert {p["groupBy"] for p in found.values()} == {"loss.value.lam"}
    assert {p["xAxis"] for p in found.values()} == {"_step"}
    assert found["Reward margin by λ"]["metrics"] == ["rewards/margins"]
    assert found["Reward accuracy by λ"]["metrics"] == ["rewards/accuracies"]


def test_judge_quality_and_win_rate_stand_over_iterations(sent: dict) -> None:
    found = panels(sent, "By iteration")
    assert {p["xAxis"] for p in found.values()} == {"iteration"}
    assert [p["metrics"] for p in found.values()] == [[metric.name] for metric in wandb_workspace.BY_ITERATION]


def test_curves_are_logged_at_every_step_and_what_stands_over_iterations_once_in_each() -> None:
    assert {metric.axis for metric in wandb_workspace.CURVES} == {"step"}
    assert {metric.axis for metric in wandb_workspace.BY_ITERATION} == {"iteration"}


def test_panels_of_one_section_have_titles_of_their_own(sent: dict) -> None:
    assert [len(panels(sent, name)) for name in ("Over λ", "Training by λ", "By iteration")] == [6, 5, 7]
    assert "Held-out reward accuracy over λ" in panels(sent, "Over λ")


def test_without_a_key_it_is_built_and_not_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["selfalign-workspace", "team/runs"])
    main()
    assert capsys.readouterr().out == (
        "25 panels for team/runs, built and valid, but not sent: set WANDB_API_KEY and repeat the command\n"
    )


def test_environment_that_keeps_it_from_being_sent_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["selfalign-workspace", "team/runs"])
    main()
    assert capsys.readouterr().out.endswith(
        ", but not sent: unset WANDB_MODE and WANDB_DISABLED and repeat the command\n"
    )


@pytest.mark.parametrize("place", ["runs", "team/", "/runs", "a/b/c"])
def test_project_without_its_entity_is_refused(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfalign-workspace", place])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"expected ENTITY/PROJECT, got {place!r}" in capsys.readouterr().err


def test_missing_extra_is_said_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.setattr(sys, "argv", ["selfalign-workspace", "team/runs"])
    with pytest.raises(SystemExit):
        main()
    assert re.fullmatch(
        r"error: .*wandb_workspaces.*Install the extra: pip install 'selfalign\[workspace\]'\n", capsys.readouterr().err
    )
