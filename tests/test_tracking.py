import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from html import unescape
from operator import itemgetter
from pathlib import Path
from typing import Any

import markdown
import pytest
import wandb
from builders import TINY_RUN, metrics, run, write_tiny_data
from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Instruction, PreferencePair, Response, ResponseScore
from selfalign.metrics.catalog import METRICS
from selfalign.runs.labels import Label
from selfalign.runs.tracker import NoTracker, Trackers, forget_tracked, open_trackers, tracked_id
from selfalign.tracking.rows import by_iteration
from selfalign.tracking.tensorboard import TensorBoard
from selfalign.tracking.wandb import MOST_ROWS, Wandb, WandbTracker, has_key


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


def test_key_of_another_server_counts_where_that_is_the_server(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password kkk\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"
    no_key.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "online"


def test_id_is_the_same_in_one_folder_and_another_elsewhere_or_for_other_data(tmp_path: Path) -> None:
    here, there = tmp_path / "a" / "demo-12345678", tmp_path / "b" / "demo-12345678"
    for folder in (here, there):
        folder.mkdir(parents=True)
    name = tracked_id(here)
    assert name == tracked_id(here) != tracked_id(there)
    assert name.startswith("demo-12345678-")
    forget_tracked(here)
    assert len({name, tracked_id(here), tracked_id(there)}) == 3
    assert tracked_id(here) == tracked_id(here)


def test_unreadable_netrc_is_no_key(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("what is this\n")
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"


@pytest.mark.parametrize("said", ["offline", "dryrun"])
def test_environment_that_says_offline_wins_over_a_key(no_key: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    no_key.setenv("WANDB_API_KEY", "k" * 40)
    no_key.setenv("WANDB_MODE", said)
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"


@pytest.mark.parametrize("said", ["online", "run", "shared"])
def test_environment_that_says_online_takes_the_key(no_key: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    no_key.setenv("WANDB_MODE", said)
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"
    no_key.setenv("WANDB_API_KEY", "k" * 40)
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "online"


@pytest.mark.parametrize("mode", ["auto", "online", "offline"])
@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true"), ("WANDB_DISABLED", "1")]
)
def test_environment_that_says_disabled_tracks_nothing(
    no_key: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, mode: str
) -> None:
    no_key.setenv("WANDB_API_KEY", "k" * 40)
    no_key.setenv(name, value)
    no_key.setitem(sys.modules, "wandb", None)  # It is not even imported.
    with Wandb(mode=mode).open(tmp_path, {"loss": {"lam": 0.5}}) as tracker:
        tracker.log({"step": 1, "label": "M1", "iteration": 0})
        tracker.table("t", ["a"], iter([[1]]))
        tracker.attach([tmp_path])
        assert tracker.place == "none (switched off by WANDB_MODE or WANDB_DISABLED)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["false", "0", ""])
def test_disabled_false_switches_nothing_off(no_key: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    no_key.setenv("WANDB_DISABLED", value)
    assert mode_of(Wandb(), no_key, tmp_path)["mode"] == "offline"


@pytest.mark.parametrize("value", ["OFFLINE", "off", "", "offline "])
def test_unknown_mode_of_the_environment_is_refused_in_one_line(
    no_key: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    """wandb itself stumbles over it, whatever it is asked for."""
    no_key.setenv("WANDB_MODE", value)
    allowed = "online, run, shared, offline, dryrun, disabled"
    for mode in ("auto", "offline"):
        with pytest.raises(SelfalignError, match=f"^WANDB_MODE must be one of {allowed}, .*; got '{value}'$"):
            mode_of(Wandb(mode=mode), no_key, tmp_path)


def test_run_that_wandb_does_not_open_is_one_line(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb.teardown()  # It reads the environment once, and another test may have made it do so.
    no_key.setenv("WANDB_INIT_TIMEOUT", "soon")
    with pytest.raises(SelfalignError) as caught, Wandb(mode="offline").open(tmp_path, {}):
        pass
    said = str(caught.value)
    assert said.startswith("tracker: Weights & Biases cannot open a run (")
    assert "init_timeout" in said
    assert "\n" not in said


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_configured_mode_is_taken_as_it_is(no_key: pytest.MonkeyPatch, tmp_path: Path, mode: str) -> None:
    assert mode_of(Wandb(mode=mode), no_key, tmp_path)["mode"] == mode


def test_run_is_named_like_its_folder_and_carries_the_configuration(no_key: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = mode_of(Wandb(project="p", tags=["t"]), no_key, tmp_path)
    assert (asked["group"], asked["job_type"]) == (None, None)
    folder = tmp_path / "demo-12345678"
    assert (asked["name"], asked["id"], asked["dir"]) == ("demo-12345678", tracked_id(folder), folder)
    assert (asked["project"], asked["entity"], asked["tags"]) == ("p", None, ["t"])
    assert asked["config"] == {"loss": {"lam": 0.5}}


def test_unknown_mode_is_refused_with_its_key() -> None:
    with pytest.raises(SelfalignError, match=r"tracker\.wandb\.mode must be one of auto, online, offline; got 'maybe'"):
        Wandb(mode="maybe")


def test_no_tracking_takes_everything_and_says_so(tmp_path: Path) -> None:
    with open_trackers({}, tmp_path, {}) as tracker:
        tracker.log({"step": 1})
        tracker.table("t", ["a"], iter([[1]]))
        tracker.summarise({"a": 1})
        tracker.attach([tmp_path])
        assert tracker.place == "none (tracker=none)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("label", "prefix"),
    [
        ("M1", ""),
        ("iteration_2/judgements", ""),
        ("evaluation_M2/numbers", ""),
        ("evaluation_M2/mt_bench", ""),
        ("evaluation_M2/scores", "evaluation/scores/"),
        ("iteration_1/judge_pairs", "judge_pairs/"),
        ("iteration_1/ahead_judge_pairs", "ahead_judge_pairs/"),
        ("preferences/scores", "preferences/scores/"),
        ("preferences/pairs", "preferences/pairs/"),
        ("evaluation_M2/ranked_scores", "evaluation/ranked_scores/"),
        ("evaluation_M2/against_M1", "evaluation/against_M1/"),
        ("evaluation_SFT/numbers", "SFT/"),
        ("SFT", "SFT/"),
    ],
)
def test_parts_of_one_iteration_are_told_apart(label: str, prefix: str) -> None:
    assert Label.parse(label).metric_prefix == prefix


# --- what W&B's own reader finds -----------------------------------------------------------------------------------

KEY = "0123456789abcdef" * 3
GROUP = "quality_aware_lambda-1a2b3c4d"


@dataclass(frozen=True)
class Read:
    """An offline run as `wandb leet` reads it."""

    place: Path
    records: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Read":
        """The newest W&B run of a run folder."""
        place = sorted((folder / "wandb").glob("offline-run-*"))[-1]
        lines, whole = (
            subprocess.run(
                [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(place)],
                capture_output=True, text=True, check=True, timeout=60,
            ).stdout
            for flags in ([], ["--summary"])
        )  # fmt: skip
        return cls(place, [json.loads(line) for line in lines.splitlines()], json.loads(whole))

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def history(self) -> dict[int, dict[str, Any]]:
        """{step: values}."""
        return {item["step"]["num"]: item["item"] for item in self.of_type("history")}

    def tables(self, name: str) -> dict[int, dict[str, Any]]:
        """{iteration: a table as it was logged}."""
        paths = {v["iteration"]: v[f"{name}.path"] for v in self.history.values() if f"{name}.path" in v}
        return {iteration: read_json(self.place / "files" / path) for iteration, path in paths.items()}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small whole run that three trackers have followed, twice: W&B offline, with a key at hand."""
    base = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_API_KEY": KEY, "WANDB_RUN_GROUP": GROUP, "WANDB_DATA_DIR": str(base)}.items():
            patch.setenv(name, value)
        patch.setenv("TRACKIO_DIR", str(base / "trackio"))  # Read when it is first imported, by the run.
        settings = [
            *TINY_RUN,
            *write_tiny_data(base / "data"),
            "tracker=[wandb,tensorboard,trackio]",
            "tracker.wandb.mode=offline",
            "tracker.wandb.tags=[mine]",
            "tracker.trackio.project=tests",
        ]
        run(base / "out", *settings, "evaluate.sft_baseline=true")
        return run(base / "out", *settings, "evaluate.sft_baseline=true")


@pytest.fixture(scope="module")
def read(tracked: Path) -> Read:
    return Read.of(tracked)


def without_empty(config: dict[str, Any]) -> dict[str, Any]:
    """As W&B keeps it, which has no empty groups."""
    return {
        name: without_empty(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != {}
    }


def test_run_tells_what_it_is_and_what_it_is_one_of(tracked: Path, read: Read) -> None:
    (told,) = read.of_type("run")
    assert (told["run_id"], told["display_name"]) == (tracked_id(tracked), tracked.name)
    assert (told["project"], told["run_group"], told["job_type"]) == ("selfalign", GROUP, "SelfRewarding")
    assert told["tags"] == ["mine", "SrDPO", "ExpectedScore"]
    config = read.summary["config"]
    assert "seed=" not in config.pop("setting")
    assert config == without_empty(read_json(tracked / "summary.json")["config"])
    assert read.summary["config"]["train"]["align"]["batch_size"] == 1


def test_second_run_of_a_folder_continues_the_first_and_is_as_whole(tracked: Path, read: Read) -> None:
    first, second = sorted((tracked / "wandb").glob("offline-run-*"))
    assert first.name.endswith(f"-{tracked_id(tracked)}")
    assert second.name.endswith(f"-{tracked_id(tracked)}")
    assert min(read.history) == 1
    assert max(read.history) == metrics(tracked)[-1]["step"]


def test_iterations_are_an_axis_of_their_own(read: Read) -> None:
    axes = {m.get("glob_name") or m["name"]: m["step_metric"] for m in read.of_type("metric") if "step_metric" in m}
    assert axes == dict.fromkeys(by_iteration([]), "iteration")


def test_axes_are_those_of_the_declarations() -> None:
    patterns = by_iteration(["mt_bench"])
    for name, metric in METRICS.items():
        if not name.startswith("{"):
            matched = any(fnmatchcase(name, pattern) for pattern in patterns)
            assert matched == (metric.axis == "iteration"), name
    assert {"eval/*", "held_out/*", "preferences/*", "mt_bench/*", "novelty", "logps/chosen_change"} <= set(patterns)


def test_every_number_of_the_run_is_in_the_history_at_its_step(tracked: Path, read: Read) -> None:
    rows = metrics(tracked)
    assert len(rows) > 40
    for row in rows:
        values, prefix = read.history[row["step"]], Label.parse(row["label"]).metric_prefix
        for name, value in row.items():
            if not isinstance(value, str):
                key = name if name in ("step", "iteration") else prefix + name
                assert values[key] == pytest.approx(value), (row["label"], name)


@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        ("rewards/margins_high", []),
        ("judge/mean_score", [1, 2]),
        ("eval/win_rate", [1, 2]),
        ("eval/mean_characters", [0, 1, 2]),
        ("judge_quality/pairwise_accuracy", [0, 1, 2]),
        ("SFT/judge_quality/pairwise_accuracy", [0]),
    ],
)
def test_a_model_has_one_value_of_a_metric(read: Read, name: str, iterations: list[int]) -> None:
    """Neither the SFT baseline nor what evaluation judged gets mixed up with it."""
    assert [values["iteration"] for values in read.history.values() if name in values] == iterations


def test_margins_and_accuracy_are_curves(read: Read) -> None:
    for name in ("rewards/margins", "rewards/accuracies_augmented", "loss"):
        assert len([values for values in read.history.values() if name in values]) > 3


def test_records_are_tables_once_in_each_iteration(tracked: Path, read: Read) -> None:
    counted = Counter(key for values in read.history.values() for key in values if key.endswith("._type"))
    names = ("instructions", "candidates", "scores", "pairs", "head_to_head")
    assert counted == {f"tables/{name}._type": 2 for name in names}
    for iteration in (1, 2):
        place = tracked / "artifacts" / f"iteration_{iteration}"
        asked = {i.id: i.text for i in read_records(place / "instructions/instructions.jsonl", Instruction)}
        responses = read_records(place / "responses/responses.jsonl", Response)
        scores = {s.id: s.score for s in read_records(place / "judgements/scores.jsonl", ResponseScore)}
        pairs = read_records(place / "pairs/pairs.jsonl", PreferencePair)

        def rows(name: str, iteration: int = iteration) -> list[list[Any]]:
            return read.tables(f"tables/{name}")[iteration]["data"]

        assert [row[0] for row in rows("instructions")] == list(asked.values())
        assert [row[:2] for row in rows("candidates")] == [[asked[r.instruction_id], r.text] for r in responses]
        assert {(r[0], r[1], r[2]) for r in rows("scores")} == {
            (asked[r.instruction_id], r.text, scores[r.id]) for r in responses
        }
        assert [row[1:] for row in rows("pairs")] == [
            [p.chosen, p.rejected, p.chosen_score, p.rejected_score] for p in pairs
        ]
        assert {row[0] for row in rows("head_to_head")} == {f"M{iteration + 1}"}
        assert {row[6] for row in rows("head_to_head")} <= {"M1", f"M{iteration + 1}", ""}


def test_last_model_s_numbers_are_the_summary(tracked: Path, read: Read) -> None:
    last = read_json(tracked / "summary.json")["models"][-1]
    numbers = {name: value for name, value in last.items() if not isinstance(value, str)}
    assert {"rewards/margins", "rewards/accuracies", "eval/win_rate", "judge_quality/spearman"} <= numbers.keys()
    assert {name: read.summary["summary"][name] for name in numbers} == pytest.approx(numbers)


def test_report_is_an_artifact(tracked: Path, read: Read) -> None:
    reports = [a for a in read.of_type("artifact") if a["type"] == "report"]
    assert [a["name"] for a in reports] == [f"report-{tracked_id(tracked)}"]
    (file,) = reports[0]["manifest"]["contents"]
    assert file["path"] == "report.html"
    assert Path(file["local_path"]).read_bytes() == (tracked / "report.html").read_bytes()


def test_finished_run_is_marked_so(read: Read) -> None:
    assert (read.summary["state"], read.summary["exit_code"]) == ("finished", 0)


def test_key_is_in_no_file(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_three_offline_jobs_have_three_runs_though_the_middle_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B keeps one run a process unless each is finished: the next job must not go on inside the failed one."""
    for number in (1, 2, 3):
        folder = tmp_path / f"job-{number}"
        folder.mkdir()
        try:
            with Wandb(mode="offline", group="sweep").open(folder, {"number": number}) as tracker:
                assert isinstance(tracker, WandbTracker)
                tracker.log({"step": 1, "iteration": 0, "label": "M1", "loss": number})
                tracker.summarise({"eval/win_rate": number / 4})
                assert f"wandb sync {folder}" in tracker.place
                if number == 2:
                    raise RuntimeError("the middle one fails")
        except RuntimeError:
            assert number == 2
        found = Read.of(folder)
        assert len(list(folder.rglob("*.wandb"))) == 1
        assert found.summary["config"] == {"number": number}
        assert (found.summary["run_id"], found.of_type("run")[0]["run_group"]) == (tracked_id(folder), "sweep")
        assert found.history[1]["loss"] == number
        assert found.summary["summary"]["eval/win_rate"] == number / 4
        failed = number == 2
        assert (found.summary["state"], found.summary["exit_code"]) == ("failed" if failed else "finished", int(failed))
    assert wandb.run is None
    assert "Traceback" not in capsys.readouterr().err


def test_run_that_is_interrupted_is_finished_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Wandb(mode="offline").open(tmp_path, {}):
        raise KeyboardInterrupt
    assert wandb.run is None
    assert Read.of(tmp_path).summary["exit_code"] == 1


def test_long_table_is_cut_and_an_empty_one_is_none(tmp_path: Path) -> None:
    with Wandb(mode="offline").open(tmp_path, {}) as tracker:
        tracker.log({"step": 1, "iteration": 3, "label": "M4"})
        tracker.table("long", ["n"], ([n] for n in range(MOST_ROWS + 1)))
        tracker.table("empty", ["n"], iter([]))
    found = Read.of(tmp_path)
    assert len(found.tables("long")[3]["data"]) == MOST_ROWS
    assert not [name for name in found.history[1] if name.startswith("empty")]


def test_only_files_that_are_there_are_attached(tmp_path: Path) -> None:
    card, folder = tmp_path / "model_card.md", tmp_path / "größe-12345678"
    card.write_text("# A model")
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path))
        with Wandb(mode="offline").open(folder, {}) as tracker:
            tracker.attach([tmp_path / "report.html", card])
    assert [(a["type"], a["name"]) for a in Read.of(folder).of_type("artifact")] == [
        ("model_card", f"model_card-{tracked_id(folder)}".replace("ö", "_").replace("ß", "_"))
    ]


# --- other trackers ------------------------------------------------------------------------------------------------


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """{name in a tracker: number} of a row of metrics.jsonl, but for its axes."""
    prefix = Label.parse(row["label"]).metric_prefix
    return {prefix + k: v for k, v in row.items() if k not in ("step", "iteration") and not isinstance(v, str)}


def test_tensorboard_has_every_number_once_and_on_its_axis(tracked: Path) -> None:
    events = EventAccumulator(str(tracked / "tensorboard"), size_guidance={SCALARS: 0, TENSORS: 0})
    events.Reload()
    patterns, wanted = by_iteration([]), list[tuple[str, int, float]]()
    for row in metrics(tracked):
        for name, value in numbers(row).items():
            axis = "iteration" if any(fnmatchcase(name, pattern) for pattern in patterns) else "step"
            wanted.append((name, row[axis], pytest.approx(float(value), rel=1e-6)))
    found = [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    assert len(wanted) > 500
    assert sorted(found, key=itemgetter(0, 1)) == sorted(wanted, key=itemgetter(0, 1))
    assert {"config/text_summary", "summary/text_summary", "tables/pairs/text_summary"} <= set(events.Tags()["tensors"])


def as_tensorboard_shows(text: Any) -> str:
    return markdown.markdown(text.tensor_proto.string_val[0].decode(), extensions=["markdown.extensions.tables"])


def test_tensorboard_shows_records_as_they_are_and_as_no_markup(tmp_path: Path) -> None:
    hostile = "<b>&amp; a|b *c* _d_ `e` [f](g)\r\nsecond"
    with TensorBoard().open(tmp_path, {"beta": 0.1}) as tracker:
        tracker.log({"step": 4, "iteration": 3, "label": "M4", "loss": 0.5})
        tracker.table("hostile", ["text", "score"], iter([(hostile, None)]))
        tracker.table("long", ["n"], iter((n,) for n in range(99)))
        tracker.table("empty", ["n"], iter([]))
        assert tracker.place == f"{tmp_path / 'tensorboard'} (see it with: tensorboard --logdir {tmp_path})"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["tensors"]) == [f"{name}/text_summary" for name in ("config", "hostile", "long")]
    (table,) = events.Tensors("hostile/text_summary")
    assert table.step == 3
    html = as_tensorboard_shows(table)
    cells = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)
    assert [unescape(cell.replace("<br>", "\n")) for cell in cells] == [hostile.replace("\r", ""), ""]
    (long,) = events.Tensors("long/text_summary")
    assert as_tensorboard_shows(long).count("<td>") == 50


def test_trackio_has_every_number_once_and_the_tables(tracked: Path) -> None:
    import trackio

    (run,) = trackio.Api().runs("tests")
    assert (run.name, run.config["seed"], run.config["_Group"]) == (tracked_id(tracked), 0, GROUP)
    logged = trackio.SQLiteStorage.get_logs("tests", run.name)
    rows = [{k: v for k, v in row.items() if not isinstance(v, dict) and k != "timestamp"} for row in logged]
    wanted = [{"step": row["step"], "iteration": row["iteration"]} | numbers(row) for row in metrics(tracked)]
    assert [row for row in rows if len(row) > 1] == wanted
    tables = {name: v["_value"] for row in logged for name, v in row.items() if isinstance(v, dict)}
    assert {"tables/instructions", "tables/scores", "tables/pairs"} <= tables.keys()
    assert tables["tables/pairs"]


def test_several_trackers_are_given_all_and_none_is_none(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Keeps(NoTracker):
        kept: list[Any] = field(default_factory=list)

        def log(self, row: dict[str, Any]) -> None:
            self.kept.append(row)

        def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
            self.kept.append((name, columns, list(rows)))

        def summarise(self, values: dict[str, Any]) -> None:
            self.kept.append(values)

        def attach(self, files: Sequence[Path]) -> None:
            self.kept.append(files)

    one, other = Keeps(), Keeps()
    both = Trackers((one, other))
    both.log({"step": 1})
    both.table("t", ["a"], iter([[1], [2]]))
    both.summarise({"a": 1})
    both.attach([tmp_path])
    assert one.kept == other.kept == [{"step": 1}, ("t", ["a"], [[1], [2]]), {"a": 1}, [tmp_path]]
    assert both.place == "none (tracker=none), none (tracker=none)"
