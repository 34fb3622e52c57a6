"""Several runs side by side: real tiny ones over one store, a failed one among them, and made-up numbers."""

import csv
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import TINY_RUN, composed, run, write_tiny_data
from mutation import assert_caught
from test_report import HOSTILE, Page, begin

from selfalign.cli import report
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.report import comparison_charts, comparison_sentences, jobs, write_comparison
from selfalign.report.charts import draw_heatmap
from selfalign.report.comparison_charts import _lines, axes_of, over_settings
from selfalign.report.comparison_page import job_rows
from selfalign.report.comparison_sentences import best, caveats, changed_sources, listed, opponents
from selfalign.report.html import percent
from selfalign.report.instruction_values import READERS, instruction_values
from selfalign.report.jobs import (
    JobComparison,
    JobResult,
    as_text,
    costs,
    differing,
    find_jobs,
    flat,
    metric_of,
    seconds_own,
    told_apart,
)
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished

COLUMNS = {
    "reward margin": "rewards/margins",
    "reward accuracy": "rewards/accuracies",
    "win rate vs\u00a0M1": "eval/win_rate",
    "win rate at equal length": "eval/win_rate_length_controlled",
    "judge accuracy": "judge_quality/pairwise_accuracy",
    "judge\u00a0ρ": "judge_quality/spearman",
    "answer characters": "eval/mean_characters",
    "answers finished": "eval/finished_share",
}
"""Headings of the table of jobs, and the keys in summary.json."""

VOID = {"meta", "br", "img", "input", "link", "hr"}


# --- real runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Three jobs over λ that finished, one that failed on the way, one that was refused; beside them a longer run."""

    folder: Path
    output: Path
    finished: list[Path]
    failed: Path
    longer: Path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    root = tmp_path_factory.mktemp("sweep")
    output, shared = root / "outputs", (*TINY_RUN, "tracker=none", *write_tiny_data(root / "data"))
    lams = (1, 0.1, 0.5)
    finished = [run(output, *shared, "iterations=1", f"loss.lam={lam}") for lam in lams]
    with pytest.raises(SelfalignError):
        run(output, *shared, "iterations=1", "loss.lam=0.3", "pair.minimum_margin=4.9")
    failed = next(path for path in output.glob("tiny-*") if path not in finished)
    longer = run(output, *shared, "iterations=2", "loss.lam=0.5", "name=longer")
    folder = output / "sweeps" / "tiny-1"
    folder.mkdir(parents=True)
    entries = [
        *(entry(n, f"loss.lam={lams[n - 1]}", f"../../{path.name}") for n, path in enumerate(finished, start=1)),
        entry(4, "loss.lam=0.3", f"../../{failed.name}", state="failed", error="too few pairs: 3 of 999"),
        entry(5, "loss.lam=-1", None, state="failed", error="loss.lam must be 0 or more"),
    ]
    write_json(folder / "jobs.json", entries)
    return Sweep(folder, output, finished, failed, longer)


def entry(number: int, override: str, folder: str | None, state: str = "finished", error: str = "") -> dict[str, Any]:
    """A line of jobs.json, as a sweep writes it."""
    told = ["experiment=smoke", override]
    return {"number": number, "overrides": told, "state": state, "folder": folder, "error": error, "seconds": 1.0}


def altered(folder: Path, copied_as: str, **numbers: Any) -> Path:
    """A copy of a run beside it, with other settings (keys with dots) or numbers of its last model (with slashes)."""
    copy = shutil.copytree(folder, folder.with_name(copied_as), symlinks=True)
    summary = read_json(copy / "summary.json")
    for key, value in numbers.items():
        if "/" in key:
            summary["models"][-1][key] = value
        else:
            *path, last = key.split(".")
            node = summary["config"]
            for part in path:
                node = node[part]
            node[last] = value
    (copy / "summary.json").write_text(json.dumps(summary))
    return copy


@pytest.fixture(scope="module")
def written(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison([sweep.folder], tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def last_model(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())["models"][-1]


class Table(HTMLParser):
    """The first table of a page: headings, and each row's cells as (text, what it is sorted by)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.classes: list[str] = []
        self.feed(html[html.index("<table") : html.index("</table>")])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
            self.classes.append(dict(attrs).get("class") or "")
        if tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs).get("data-sort")))

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            text, sort = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, sort)

    @property
    def cells(self) -> list[dict[str, tuple[str, str | None]]]:
        """{heading: cell} of every row."""
        headings = [text for text, _ in self.rows[0]]
        return [dict(zip(headings, row, strict=True)) for row in self.rows[1:] if row]


class Open(HTMLParser):
    """Tags that are open, and those that were closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_every_number_of_the_table_is_that_of_summary_json(page: str, sweep: Sweep) -> None:
    table = Table(page)
    assert [cells["job"][1] for cells in table.cells] == ["1", "2", "3", "4", "5"]
    for cells, folder in zip(table.cells[:3], sweep.finished, strict=True):
        model = last_model(folder)
        found = {key: cells[heading][1] for heading, key in COLUMNS.items() if heading in cells}
        numbers = {key: float(sort) for key, sort in found.items() if sort is not None}
        assert len(numbers) >= 5
        assert numbers == {key: model[key] for key in COLUMNS.values() if key in model}
        assert cells["loss.lam"][1] == json.dumps(read_json(folder / "summary.json")["config"]["loss"]["lam"])


def test_values_of_instructions_have_the_metric_as_their_mean(sweep: Sweep) -> None:
    found: Counter[str] = Counter()
    for folder in sweep.finished:
        run = Finished.load(folder)
        for row, metric in product(run.models, READERS):
            values = instruction_values(run, row["model"], metric).values()
            assert bool(values) == (metric in row), metric
            if values:
                assert math.fsum(values) / len(values) == pytest.approx(row[metric], abs=1e-12), metric
                found[metric] += 1
    assert {metric for metric in READERS if not metric.startswith(("preferences/", "eval/true_"))} == found.keys()


def test_only_settings_that_differ_are_columns(page: str) -> None:
    headings = list(Table(page).cells[0])
    assert [heading for heading in headings if "." in heading] == ["loss.lam", "pair.minimum_margin"]


def test_job_without_numbers_keeps_its_row_and_tells_why(page: str) -> None:
    table = Table(page)
    for cells, lam in zip(table.cells[3:], ("0.3", "-1"), strict=True):
        assert cells["loss.lam"][0] == lam
        assert cells["state"][0] == "failed"
        assert {heading for heading, (_, sort) in cells.items() if sort} <= {"job", "loss.lam", "pair.minimum_margin"}
        assert all(cells[heading][0] == "–" for heading in COLUMNS if heading in cells)
    assert table.classes[4:] == ["without", "without"]
    told = Page(page).text.split("Not finished")[-1]
    assert "too few pairs: 3 of 999" in told
    assert "loss.lam must be 0 or more" in told


def test_failed_run_tells_its_error_without_a_sweep(sweep: Sweep) -> None:
    found = {job.name: job for job in find_jobs([sweep.output])}
    assert found.keys() == {path.name for path in (*sweep.finished, sweep.failed, sweep.longer)}
    job = found[sweep.failed.name]
    assert (job.state, job.run) == ("failed", None)
    assert "0 pairs from 3 instructions" in job.error
    assert "Traceback" not in job.error
    assert "\n" not in job.error


def test_only_what_the_sweep_calls_finished_has_numbers(sweep: Sweep, tmp_path: Path) -> None:
    states = ["finished", "running", "waiting", "interrupted", "failed"]
    there = os.path.relpath(sweep.finished[0], tmp_path)
    for state in states:
        write_json(tmp_path / "jobs.json", [entry(1, "loss.lam=1", there, state=state)])
        (found,) = find_jobs([tmp_path])
        assert (found.state, found.run is not None) == (state, state == "finished")
    write_json(tmp_path / "jobs.json", [entry(1, "loss.lam=1", "gone")])
    (found,) = find_jobs([tmp_path])
    assert (found.state, found.run) == ("gone", None)


def test_damaged_run_is_named_in_one_line(sweep: Sweep, tmp_path: Path) -> None:
    for name, text in (("config.yaml", "seed: 1\n"), ("metrics.jsonl", ""), ("summary.json", '{"config"')):
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SelfalignError, match=f"{tmp_path}: its files are damaged"):
        find_jobs([sweep.finished[0], tmp_path])


def test_killed_run_is_unfinished_without_an_error(sweep: Sweep, tmp_path: Path) -> None:
    shutil.copy(sweep.failed / "config.yaml", tmp_path)
    (tmp_path / "run.log").write_text("2026-01-01 10:00:00,123 INFO M1: sft\n", encoding="utf-8")
    (found,) = find_jobs([tmp_path])
    assert (found.state, found.error, found.settings["loss.lam"]) == ("unfinished", "", 0.3)


def test_page_is_whole_and_asks_for_nothing_from_outside(page: str) -> None:
    checked = Open(page)
    assert (checked.open, checked.wrong) == ([], [])
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "base", "form"}
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}]
    names = [(name, value or "") for _, attributes in tags for name, value in attributes.items()]
    assert all(value.startswith("#") for name, value in names if name.endswith("href"))
    assert not [name for name, _ in names if name == "src" or name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)


def test_whole_comparison_has_every_section(page: str) -> None:
    assert Page(page).sections == [
        "jobs",
        "comparisons",
        "by-setting",
        "from-model-to-model",
        "training",
        "win-rates",
        "answers",
        "time",
        "not-finished",
    ]


def test_same_runs_give_the_same_bytes(sweep: Sweep, written: Path, tmp_path: Path) -> None:
    again = write_comparison([sweep.folder], tmp_path)
    for name in ("comparison.html", "comparison.csv"):
        assert again.with_name(name).read_bytes() == written.with_name(name).read_bytes()


def test_csv_has_a_row_a_job_and_model_with_every_number(written: Path, sweep: Sweep) -> None:
    with written.with_name("comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["model"]) for row in rows] == [
        *((f"{n}", model) for n in (1, 2, 3) for model in ("M1", "M2")),
        ("4", ""),
        ("5", ""),
    ]
    for number, folder in enumerate(sweep.finished):
        for row, model in zip(rows[2 * number :], read_json(folder / "summary.json")["models"], strict=False):
            assert float(row["loss.lam"]) == read_json(folder / "summary.json")["config"]["loss"]["lam"]
            for key, value in model.items():
                assert row[key] == str(value)
    assert {row["error"] for row in rows[6:]} == {"too few pairs: 3 of 999", "loss.lam must be 0 or more"}
    assert not any(value for row in rows[6:] for key, value in row.items() if "/" in key or key == "seconds")


def test_answers_of_all_policies_stand_side_by_side(page: str, sweep: Sweep) -> None:
    section = page.split('<section id="answers">')[1]
    names = re.findall(r'<p class="head"><b>(.*?)</b>', section.split("</article>")[0])
    told = "(loss.lam = {}, pair.minimum_margin = 0)"
    assert names == ["M1", *(f"M2 of job {n} {told.format(lam)}" for n, lam in ((1, 1), (2, 0.1), (3, 0.5)))]
    lines = (sweep.finished[0] / "artifacts/evaluation_M1/answers/responses.jsonl").read_text().splitlines()
    first = json.loads(lines[0])["text"]
    assert Page(page).candidates[0][1].count(first)


# --- sharing -----------------------------------------------------------------------------------------------------


def made_in(folders: list[Path]) -> dict[str, float]:
    """{where an artifact lies: seconds} of all the links of runs, by their manifests."""
    links = [link for folder in folders for link in (folder / "artifacts").rglob("*") if link.is_symlink()]
    return {os.path.realpath(link): read_json(link / "manifest.json")["seconds"] for link in links}


def test_shared_artifact_counts_once(sweep: Sweep) -> None:
    finished = find_jobs(sweep.finished)
    spent = costs(finished, lambda label, stage: stage)
    alone = [stage["seconds"] for folder in sweep.finished for stage in read_json(folder / "summary.json")["stages"]]
    made = math.fsum(cost.made for cost in spent.values())
    assert made == pytest.approx(math.fsum(made_in(sweep.finished).values()))
    assert made + math.fsum(cost.reused for cost in spent.values()) == pytest.approx(math.fsum(alone))
    assert spent["sft"].reused == pytest.approx(2 * spent["sft"].made)
    assert spent["align"].reused == 0


def test_own_time_is_of_what_no_other_job_needed(sweep: Sweep) -> None:
    finished = find_jobs(sweep.finished)
    for job, folder in zip(finished, sweep.finished, strict=True):
        others = made_in([other for other in sweep.finished if other != folder])
        own = [seconds for place, seconds in made_in([folder]).items() if place not in others]
        assert seconds_own(job, finished) == pytest.approx(math.fsum(own))


def test_same_artifact_in_two_stores_was_made_twice(sweep: Sweep, tmp_path: Path) -> None:
    other = shutil.copytree(sweep.output, tmp_path / "outputs", symlinks=True)
    found = find_jobs([sweep.finished[0], other / sweep.finished[1].name])
    assert len(JobComparison.of(found, "eval/win_rate").by_key(Label.model("M1"))) == 1
    assert costs(found, lambda label, stage: stage)["sft"].reused == 0


# --- other places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "ranked", "changed"),
    [
        (("pairs.jsonl", "a"), "r", []),
        (("pairs.jsonl", "b"), "r", ["data.path=pairs.jsonl"]),
        (("other.jsonl", "b"), "r", []),
        (("pairs.jsonl", "a"), "s", ["data.seed_data.ranked=ranked.jsonl"]),
    ],
    ids=["the same", "changed", "another file", "changed seeds"],
)
def test_data_that_changed_under_one_name_are_told(
    tmp_path: Path, pairs: tuple[str, str], ranked: str, changed: list[str]
) -> None:
    for name, (source, content), seeds in (("one", ("pairs.jsonl", "a"), "r"), ("two", pairs, ranked)):
        made = begin(tmp_path / name)
        made.stage("iteration_1/pairs", "given_pairs", {})
        place = made.folder / "artifacts"
        given = {"config": {"demonstrations": "", "ranked": "ranked.jsonl"}, "contents": [seeds]}
        write_json(place / "seeds/manifest.json", {"inputs": given})
        write_json(place / "iteration_1/pairs/manifest.json", {"inputs": {"source": source, "content": content}})
        made.finish()
    comparison = JobComparison.of(find_jobs([tmp_path]), "eval/win_rate")
    assert changed_sources(comparison) == changed
    assert ("The same setting named different data" in caveats(comparison)) == bool(changed)


def test_judge_template_and_benchmark_that_changed_under_one_name_are_told(tmp_path: Path) -> None:
    setting = {"mt_bench": {"questions": "q.jsonl", "judge": {"prompts": "p.jsonl"}}, "own": {"include_path": "tasks"}}
    for name, content in (("one", "a"), ("two", "b")):
        made = begin(tmp_path / name, benchmark=setting)
        made.stage("judge", "load_model", {})
        made.stage("judges/mt_bench", "load_model", {})
        made.stage("evaluation_M1/mt_bench", "benchmark", {})
        made.stage("evaluation_M1/own", "benchmark", {})
        given = {"model": {"path": "/models/m", "chat_template": "t.jinja"}, "source": content}
        inputs = {place: given for place in ("M0", "judge", "judges/mt_bench")} | {
            "evaluation_M1/mt_bench": {"contents": {"questions": content, "prompts": content}},
            "evaluation_M1/own": {"contents": {"quiz.yaml": content, "lm-eval": "1"}},
        }
        for place, told in inputs.items():
            write_json(made.folder / "artifacts" / place / "manifest.json", {"inputs": told})
        made.finish()
    assert changed_sources(JobComparison.of(find_jobs([tmp_path]), "eval/win_rate")) == [
        "model.chat_template=t.jinja",
        "judge.model=/models/m",
        "benchmark.mt_bench.judge.model=/models/m",
        "benchmark.mt_bench.questions=q.jsonl",
        "benchmark.mt_bench.prompts=p.jsonl",
        "benchmark.own=quiz.yaml",
    ]


def test_text_of_a_file_is_what_a_setting_says(tmp_path: Path) -> None:
    """Two runs that name one file with another rubric in it did not have the same settings."""
    told: list[JobResult] = []
    for name, rubric in (("a", "Help of ${them}?"), ("b", "Wit of ${them}?")):
        (tmp_path / "rubric.txt").write_text(f"{rubric}\n{{instruction}}\n{{response}}", encoding="utf-8")
        _, text, plain = composed("experiment=smoke", f"judge.prompt=file:{tmp_path}/rubric.txt")
        assert (
            yaml.safe_load(text)["judge"]["prompt"] == plain["judge"]["prompt"] == (tmp_path / "rubric.txt").read_text()
        )
        told.append(replace(job(name, 0.1), settings=flat(plain)))
    assert JobComparison.of(told, METRIC).keys == ["judge.prompt"]


def test_runs_of_different_length_are_compared_by_their_last_models(sweep: Sweep, tmp_path: Path) -> None:
    page = write_comparison([sweep.finished[0], sweep.longer], tmp_path).read_text(encoding="utf-8")
    assert [cells["last model"][0] for cells in Table(page).cells] == ["M3", "M2"]
    assert "different numbers of models" in Page(page).text
    assert "Reward margin, M3" in page


def test_single_job_is_a_comparison_too(sweep: Sweep, tmp_path: Path) -> None:
    page = write_comparison([sweep.longer], tmp_path).read_text(encoding="utf-8")
    assert len(Table(page).cells) == 1
    assert "No other job has this metric" in Page(page).text
    assert (Open(page).open, Open(page).wrong) == ([], [])


def test_job_named_twice_counts_once(sweep: Sweep) -> None:
    assert len(find_jobs([sweep.finished[0], sweep.folder, sweep.finished[0]])) == 5


def test_metric_that_no_job_has_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"eval/winrate.*eval/win_rate"):
        write_comparison([sweep.folder], tmp_path / "out", "eval/winrate")
    assert not (tmp_path / "out").exists()


def test_what_users_and_models_wrote_stays_text(sweep: Sweep, tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    for number, folder in enumerate(sweep.finished[:2]):
        copy = altered(folder, f"hostile-{number}", **{"evaluate.instructions": f"{HOSTILE}{number}", "name": HOSTILE})
        shutil.move(copy, root / copy.name)
    sweep_folder = root / "sweeps" / "x"
    sweep_folder.mkdir(parents=True)
    told = [entry(1, HOSTILE, "../../hostile-0"), entry(2, HOSTILE, "../../hostile-1")]
    refused = entry(3, f"loss.lam={HOSTILE}", None, state=HOSTILE, error=HOSTILE)
    write_json(sweep_folder / "jobs.json", [*told, refused])
    page = write_comparison([sweep_folder], tmp_path).read_text(encoding="utf-8")
    assert page.count("<script") == 1
    assert "<img" not in page
    assert (Open(page).open, Open(page).wrong) == ([], [])
    assert Page(page).text.count(HOSTILE) > 3


def test_win_rates_are_drawn_where_models_were_compared(sweep: Sweep, tmp_path: Path, page: str) -> None:
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", page.split('<section id="win-rates">')[1].split("</svg>")[0])
    rates = read_json(sweep.finished[0] / "summary.json")["win_rate_matrix"]["rates"]
    assert drawn[4:] == [percent(rate) if rate is not None else "–" for row in rates for rate in row]
    assert any(rate is not None for row in rates for rate in row)
    copy = altered(sweep.finished[0], "not-compared")
    summary = read_json(copy / "summary.json")
    summary["win_rate_matrix"]["rates"] = [[None, None], [None, None]]
    write_json(copy / "summary.json", summary)
    shutil.move(copy, tmp_path / "outputs" / copy.name)
    again = write_comparison([tmp_path / "outputs"], tmp_path).read_text(encoding="utf-8")
    assert "win-rates" not in Page(again).sections


def test_what_only_measured_is_taken_where_it_is_named(sweep: Sweep, tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name, symlinks=True)) for folder in sweep.finished[:2]]
    write_json(copies[0] / "summary.json", {**read_json(copies[0] / "summary.json"), "evaluated": ["a", "b"]})
    assert [job.name for job in find_jobs([tmp_path])] == [copies[1].name]
    assert len(find_jobs(copies)) == 2


def test_names_in_a_chart_stay_text() -> None:
    svg = draw_heatmap(["$\\frac$", HOSTILE], [[None, 0.25], [0.75, None]], "H", percent)
    assert "$\\frac$" in svg
    assert "<script" not in svg


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """selfalign-report in this process: exit code, what it prints, what it complains of."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selfalign-report", *map(str, arguments)])
        code = 0
        try:
            report.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return called


def test_one_run_gets_its_report_again_and_nothing_else(call: Callable[..., Any], sweep: Sweep) -> None:
    report = sweep.longer / "report.html"
    before, there = report.read_bytes(), sorted(sweep.longer.iterdir())
    report.unlink()
    assert call(sweep.longer) == (0, f"report    {report}\n", "")
    assert report.read_bytes() == before
    assert sorted(sweep.longer.iterdir()) == there


def test_run_without_its_artifacts_keeps_its_report(call: Callable[..., Any], sweep: Sweep, tmp_path: Path) -> None:
    """Intervals and samples come from the records; without them a page would be written that tells less."""
    alone = shutil.copytree(sweep.longer, tmp_path / "elsewhere" / sweep.longer.name, symlinks=True)
    before = (alone / "report.html").read_bytes()
    for paths in ([alone], [alone, sweep.longer]):
        code, out, err = call(*paths, *(["--out", tmp_path / "compared"] if len(paths) > 1 else []))
        assert (code, out) == (1, "")
        assert re.search(rf"error: {alone}: \d+ of its artifacts are missing, such as seeds", err)
    assert (alone / "report.html").read_bytes() == before
    assert not (tmp_path / "compared").exists()


def test_comparison_lies_in_the_folder_or_where_it_is_wanted(
    call: Callable[..., Any], sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(sweep.folder)[:2] == (0, f"report    {sweep.folder / 'comparison.html'}\n")
    assert call(*sweep.finished)[:2] == (0, "report    comparison.html\n")
    assert call(sweep.output, "--out", "there", "--metric", "rewards/margins")[0] == 0
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("comparison.*")}
    assert written == {f"{place}comparison.{kind}" for place in ("", "there/") for kind in ("csv", "html")}
    assert "highest reward margin" in Page((tmp_path / "there/comparison.html").read_text()).text


def test_wrong_place_or_metric_is_one_line(call: Callable[..., Any], sweep: Sweep, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("name: begun\n")
    for arguments, said in (
        ([tmp_path / "nowhere"], "nowhere is not a run folder, a sweep folder or a folder of runs"),
        ([begun], "this run is not finished, and has nothing to report"),
        ([sweep.longer, "--metric", "rewards/margins"], "--out and --metric are only for comparisons"),
        ([sweep.folder, "--metric", "margin"], "metric 'margin': no finished job has it"),
    ):
        code, out, err = call(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("error: ")
        assert said in err


# --- made-up numbers ---------------------------------------------------------------------------------------------

METRIC = "eval/win_rate"


def job(
    name: str, rate: float | None, low: float | None = None, high: float | None = None, **settings: Any
) -> JobResult:
    """A finished job whose last model has this win rate."""
    row = {"model": "M2", METRIC: rate, f"{METRIC}_low": low, f"{METRIC}_high": high}
    models = [{"model": "M1"}, {key: value for key, value in row.items() if value is not None}]
    finished = Finished(
        folder=Path("/nowhere") / name,
        summary={"models": models, "stages": []},
        loss={},
        provenance={"commit": "", "diff": ""},
        config={},
        stages={},
        counts={},
        rows=[],
        models=models,
    )
    return JobResult(name=name, folder=finished.folder, settings=settings, run=finished)


def said_of(*made_up: JobResult) -> str:
    """What the page says of the best of these jobs, as text."""
    return re.sub(r"<.*?>", "", best(JobComparison.of(made_up, METRIC)))


def test_jobs_say_themselves_what_the_best_has_the_highest_of() -> None:
    named, unnamed = job("a", 0.4, sweep_metric="rewards/margins"), job("b", 0.5)
    assert metric_of([unnamed, named]) == "rewards/margins"
    assert metric_of([unnamed]) == METRIC


def test_best_is_sure_only_without_overlap() -> None:
    a, b = job("a", 0.4, 0.3, 0.5, lam=1), job("b", 0.7, 0.55, 0.8, lam=2)
    assert said_of(a, b).startswith("Job 2 (lam = 2) has the highest win rate vs\u00a0M1, 70\u00a0%")
    assert "No other job's interval reaches it" in said_of(a, b)
    wide, touching = job("a", 0.4, 0.3, 0.6, lam=1), job("a", 0.4, 0.3, 0.55, lam=1)
    for rival in (wide, touching):
        assert "This is not certain: it cannot be told apart from job 1 (lam = 1), whose interval overlaps" in said_of(
            rival, b
        )
        assert "No other job" not in said_of(rival, b)
    assert "from jobs 1, 2, whose intervals overlap" in said_of(wide, b, touching, job("c", 0.1, 0.05, 0.2, lam=3))


def test_blind_judge_of_a_win_rate_is_named_before_the_best_job() -> None:
    def measured(name: str, passed: int) -> JobResult:
        made = job(name, 0.5, 0.4, 0.6, lam=passed)
        figures = {"passed": passed, "accuracy": 0.5, "one_place": 0.875}
        made.last.update({f"instrument/head_to_head/{name}": value for name, value in figures.items()})
        return made

    def said(*made: JobResult, metric: str = METRIC) -> str:
        return comparison_sentences.blind(JobComparison.of(made, metric))

    assert re.match(
        r"<b>Blind in job 1:</b> .* In job 1 .*right on 50.%.*one place in 88.%",
        said(measured("a", 0), measured("b", 1)),
    )
    assert said(measured("a", 0)).startswith("<b>Blind in all jobs:</b>")
    assert said(measured("b", 1)) == said(job("c", 0.5)) == said(measured("a", 0), metric="rewards/margins") == ""


def test_jobs_with_the_same_highest_value_are_all_named() -> None:
    a, b, c = job("a", 0.7, 0.6, 0.8, lam=1), job("b", 0.7, 0.5, 0.8, lam=2), job("c", 0.2, 0.1, 0.3, lam=3)
    assert said_of(a, b).startswith("All have the same highest win rate vs\u00a0M1, 70")
    assert said_of(a, b, c).startswith("Jobs 1, 2 have the same highest")
    of = JobComparison.of([a, b, c], METRIC)
    assert [row["class"] for row in job_rows(of, of.jobs)] == ["best", "best", ""]


def test_lowest_is_the_best_where_it_is_asked_for() -> None:
    given = [job("a", 0.5, 0.45, 0.55), job("b", 0.3, 0.2, 0.4), job("c", 0.35, 0.3, 0.42)]
    comparison = JobComparison.of(given, "-eval/win_rate")
    assert [one.name for one in comparison.ranked] == ["b", "c", "a"]
    assert [one.name for one in comparison.rivals()] == ["c"]
    assert "has the lowest win rate" in best(comparison)


def test_what_is_no_number_never_wins() -> None:
    rest = (
        job("none", None, lam=1),
        job("nan", math.nan, 0.9, 1.0, lam=2),
        JobResult(name="failed", settings={"lam": 3}),
    )
    assert said_of(*rest, job("low", 0.1, 0.0, 0.2, lam=4)).startswith("Job 4 (lam = 4)")
    assert "No other job has this metric" in said_of(*rest, job("low", 0.1, 0.0, 0.2, lam=4))
    assert "so no job is the best" in said_of(*rest)
    infinite = job("infinite", math.inf, lam=5)
    assert said_of(infinite, job("low", 0.1, 0.0, 0.2, lam=4)).startswith("Job 1 (lam = 4)")


def test_value_without_interval_claims_nothing() -> None:
    assert "not known how certain" in said_of(job("a", 0.9, lam=1), job("b", 0.1, 0.05, 0.2, lam=2))
    assert "not certain" in said_of(job("a", 0.9, 0.8, 0.95, lam=1), job("b", 0.1, lam=2))


def test_jobs_of_a_sweep_keep_their_numbers_when_one_is_another_again() -> None:
    kept = [replace(job("a", 0.5), number=1), replace(job("c", 0.3), number=3)]
    assert [one.number for one in JobComparison.of(kept, "eval/win_rate").jobs] == [1, 3]
    of_two_sweeps = [replace(job("a", 0.5), number=1), replace(job("c", 0.3), number=1)]
    assert [one.number for one in JobComparison.of(of_two_sweeps, "eval/win_rate").jobs] == [1, 2]


def test_jobs_with_one_setting_alike_are_marked_by_number() -> None:
    lams = [job(f"{n}", 0.5, **{"loss.lam": lam}) for n, lam in enumerate((0.1, 0.1, 0.3))]
    alike = JobComparison.of(lams, "eval/win_rate")
    assert [alike.mark(one) for one in alike.jobs] == ["1", "2", "3"]
    apart = JobComparison.of(lams[1:], "eval/win_rate")
    assert [apart.mark(one) for one in apart.jobs] == ["0.1", "0.3"]


@pytest.mark.parametrize("text", ["[1", "[1]", "{}x", '[{"number": 1}]'])
def test_damaged_list_of_jobs_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "jobs.json").write_text(text)
    with pytest.raises(SelfalignError, match=r"jobs.json: not the jobs of a sweep"):
        find_jobs([tmp_path])


def test_jobs_are_ordered_by_number_of_the_sweep_or_by_settings() -> None:
    loose = [job("c", 0.1, lam=10), job("b", 0.1, lam=2.0), job("a", 0.1, lam="auto"), job("d", 0.1)]
    assert [j.name for j in JobComparison.of(loose, METRIC).jobs] == ["b", "c", "a", "d"]
    assert [j.number for j in JobComparison.of(loose, METRIC).jobs] == [1, 2, 3, 4]
    swept = [replace(one, number=number) for one, number in zip(loose[:3], (2, 3, 1), strict=True)]
    assert [(j.name, j.number) for j in JobComparison.of(swept, METRIC).jobs] == [("a", 1), ("c", 2), ("b", 3)]


def test_keys_differ_by_value_and_not_by_spelling() -> None:
    same = [job("a", 0.1, lam=1, seed=0, only=5), job("b", 0.1, lam=1.0, seed=1)]
    assert differing(same) == ["seed"]
    assert differing([job("a", 0.1, on=True), job("b", 0.1, on=1)]) == ["on"]
    assert [as_text(value) for value in (1.0, 0.123456789, 5e-05, True, None, [0.2, 1], "", "x y")] == [
        *("1", "0.123456789", "5e-05", "true", "null", "[0.2, 1]", '""', "x y"),
    ]


def test_setting_that_only_some_jobs_have_tells_them_apart() -> None:
    """As parameters of a server, a benchmark, and who compares; but not what another class of component has."""
    configs: list[dict[str, Any]] = [
        {"judge": {"parameters": {}}, "benchmark": {}, "compare": None, "loss": {"lam": 1}, "choices": {"loss": "Sr"}},
        {
            "judge": {"parameters": {"effort": "low", "top_k": 5}},
            "benchmark": {"quiz": {"count": 3}},
            "compare": {"model": "m"},
            "loss": {"beta": 0.1},
            "choices": {"loss": "DPO"},
        },
        {
            "judge": {"parameters": {"effort": "low"}},
            "benchmark": {"quiz": {"count": 3}},
            "compare": {"model": "m"},
            "loss": {"beta": 0.1},
            "choices": {"loss": "DPO"},
        },
    ]
    jobs_made = [job(name, 0.1, **flat(config)) for name, config in zip("abc", configs, strict=True)]
    comparison = JobComparison.of(jobs_made, METRIC)
    told = {key: [as_text(job.settings.get(key)) for job in comparison.jobs] for key in comparison.keys}
    assert {key: sorted(texts) for key, texts in told.items()} == {
        "loss": ["DPO", "DPO", "Sr"],
        "compare": ["null", '{"model": "m"}', '{"model": "m"}'],
        "benchmark": ['{"quiz.count": 3}', '{"quiz.count": 3}', "{}"],
        "judge.parameters": ['{"effort": "low", "top_k": 5}', '{"effort": "low"}', "{}"],
        "judge.parameters.top_k": ["5", "null", "null"],
    }
    refused = JobResult(name="r", state="failed", settings={"loss.lam": -1})
    assert JobComparison.of([jobs_made[1], refused], METRIC).keys == []


def test_settings_that_a_job_lacks_keep_their_order() -> None:
    more = [f"k{n}" for n in (5, 3, 8, 1, 9, 2, 7, 4)]
    some, others = job("a", 0.1), job("b", 0.2, **dict.fromkeys(more, 1))
    assert JobComparison.of([some, others], METRIC).keys == more


def test_class_of_a_group_is_a_setting_of_its_name() -> None:
    config: dict[str, Any] = {
        "loss": {"beta": 0.1, "deep": {"x": [1]}},
        "seed": 3,
        "choices": {"loss": "DPO"},
        "empty": {},
    }
    config["overrides"] = ["seed=3"]
    assert flat(config) == {"loss": "DPO", "loss.beta": 0.1, "loss.deep.x": [1], "seed": 3, "empty": {}}


def test_charts_are_over_what_varies_alone() -> None:
    assert axes_of(JobComparison.of([job("a", 0.1, lam=1, seed=0), job("b", 0.1, lam=2, seed=1)], METRIC)) == ["lam"]
    assert axes_of(JobComparison.of([job("a", 0.1, seed=0), job("b", 0.1, seed=1)], METRIC)) == []
    assert axes_of(JobComparison.of([job("a", 0.1, loss="DPO"), job("b", 0.1, loss="IPO")], METRIC)) == []
    assert axes_of(JobComparison.of([job("a", 0.1, on=True), job("b", 0.1, on=False)], METRIC)) == []
    failed = JobResult(name="c", state="failed", settings={"lam": 3, "size": 9})
    one = [job("a", 0.1, lam=1, size=8), job("b", 0.1, lam=2, size=8), failed]
    assert axes_of(JobComparison.of(one, METRIC)) == ["lam"]
    unlike = [job(name, 0.1, **dict.fromkeys("uvwxyz", n)) for n, name in enumerate("abc")]
    assert axes_of(JobComparison.of(unlike, METRIC)) == []
    drawn = over_settings(JobComparison.of([job("a", 0.25, 0.1, 0.4, lam=10), job("b", 0.5, 0.4, 0.6, lam=9)], METRIC))
    assert re.findall(r">(9|10|25\u00a0%|50\u00a0%)</text>", drawn)[:2] == ["9", "10"]


def test_values_that_begin_alike_are_told_apart() -> None:
    folder = "/data/somebody/projects/alignment/data/preferences/2026"
    made_up = [job(f"{v}{lam}", 0.1, lam=lam, data=f"{folder}/{v}.jsonl") for lam in (1, 2) for v in ("v1", "v2")]
    comparison = JobComparison.of(made_up, METRIC)
    assert [[job.name for job in line] for line in _lines(comparison, "lam").values()] == [
        ["v11", "v12"],
        ["v21", "v22"],
    ]
    assert listed(comparison, "data") == "/data/somebody/p…v1.jsonl, /data/somebody/p…v2.jsonl"
    assert comparison.description(comparison.jobs[-1]) == "lam = 2, data = /data/somebody/p…v2.jsonl"
    assert [row["setting data"][-8:] for row in job_rows(comparison, comparison.jobs)] == ["v1.jsonl", "v2.jsonl"] * 2


def test_different_texts_stay_different_when_they_are_shortened() -> None:
    rubric = "Grade the response to the instruction with points from 0 to 5, and be strict."
    texts = [f"{rubric} {end}" for end in ("Long is good.", "Long is bad.", "Long is  good.")]
    texts += [f"/{root}/{'deep/' * 12}{end}" for root in ("a", "b") for end in ("v1", "v2")]
    told = told_apart([*texts, "short", "short", f"{'1' * 60}", f"{'1' * 61}"])
    assert len(told) == len(set(told.values())) == 10
    assert [told[text] for text in texts[:2]] == ["Grade the respon…good.", "Grade the respon…bad."]
    assert told["short"] == "short"
    assert told_apart(["x" * 99]) == {"x" * 99: "x" * 47 + "…"}


def test_opponents_are_common_or_said_not_to_be() -> None:
    made_up = [job("a", 0.1, lam=1), job("b", 0.2, lam=2)]
    for number, one in enumerate(made_up):
        assert one.run is not None
        one.run.summary["stages"] = [
            {"label": "evaluation_M1/answers", "key": "same", "stage": "judge", "seconds": 1.0}
        ]
        if number:
            assert "All jobs share this M1 and its answers" in opponents(JobComparison.of(made_up, METRIC))
            one.run.summary["stages"][0]["key"] = "other"
    assert "different opponents" in opponents(JobComparison.of(made_up, METRIC))


def test_jobs_that_different_judges_judged_are_told(sweep: Sweep, tmp_path: Path) -> None:
    def said(*judges: dict[str, Any]) -> str:
        """The caveats of two jobs whose last models were judged by these: weights and settings."""
        copies = [
            shutil.copytree(folder, tmp_path / f"{len([*tmp_path.iterdir()])}", symlinks=True)
            for folder in sweep.finished[:2]
        ]
        for folder, (weights, settings) in zip(copies, map(dict.values, judges), strict=True):
            policy, grader = weights and {"digest": weights}, {"class": "Grader", **settings}
            for part, inputs in (
                ("scores", {"policy": policy, "judge": settings}),
                ("against_M1", {"policy": policy, "judge": settings}),
                ("quiz", {"judge": policy, "benchmark": {"class": "Quiz", "judge": grader}}),
            ):
                place = folder / "artifacts" / "evaluation_M2" / part
                place.unlink(missing_ok=True)
                place.mkdir()
                write_json(place / "manifest.json", {"inputs": inputs})
            summary = read_json(folder / "summary.json")
            summary["config"]["benchmark"] = {"quiz": {}}
            write_json(folder / "summary.json", summary)
        return caveats(JobComparison.of(find_jobs(copies), METRIC))

    def judge(weights: str | None, **settings: Any) -> dict[str, Any]:
        return {"weights": weights, "settings": settings}

    everything = "these do not compare: eval/win_rate, eval/mean_score, quiz."
    assert "Judges of different weights" not in caveats(JobComparison.of(find_jobs(sweep.finished[:2]), METRIC))
    assert "Judges of different weights" not in said(judge("a", model="self"), judge("a", model="sft"))
    assert everything in said(judge("a", max_score=5), judge("b", max_score=5))
    assert everything in said(judge(None, max_score=5), judge(None, max_score=10))


def test_heat_map_writes_every_share_and_nothing_that_is_none() -> None:
    svg = draw_heatmap(["a", "b"], [[None, 0.25], [1.0, math.nan]], "H", percent)
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg)[4:] == ["–", "25\u00a0%", "100\u00a0%", "–"]
    assert "nan" not in svg
    opacities = [float(found) for found in re.findall(r"opacity: ([\d.]+)", svg)]
    assert max(opacities) <= 0.5


# --- broken on purpose -------------------------------------------------------------------------------------------

BY_PLACE = "return label.link_in(job.run.folder).resolve()"
BY_KEY = 'return Path(next(stage["key"] for stage in _stages(job) if stage["label"] == str(label)))'
OF_THOSE = "for job in jobs if is_known(job, key)}"
OF_ALL = 'for job in jobs for _ in [job.settings.setdefault(key, "")]}'
REACHES = "not self._ends(job)[1] < low"
NO_SWITCH = " and not isinstance(v, bool)"

MUTANTS: dict[Callable[..., None], list[tuple[Any, str, str]]] = {
    test_best_is_sure_only_without_overlap: [
        (jobs, "job.last[self.metric], reverse=not self.lowest", "job.last[self.metric]"),
        (jobs, REACHES, "False"),
        (jobs, REACHES, "True"),
        (jobs, REACHES, "self._ends(job)[1] > low"),
        (comparison_sentences, "if rivals := comparison.rivals():", "if rivals := []:"),
    ],
    test_lowest_is_the_best_where_it_is_asked_for: [
        (jobs, "reverse=not self.lowest", "reverse=True"),
        (jobs, "(-high, -low) if self.lowest", "(low, high) if self.lowest"),
    ],
    test_what_is_no_number_never_wins: [(jobs, "if is_number(job.last.get(self", "if (job.last.get(self")],
    test_value_without_interval_claims_nothing: [(jobs, "else (-math.inf, math.inf)", "else (0.0, 0.0)")],
    test_opponents_are_common_or_said_not_to_be: [(comparison_sentences, "if len(answered) > 1:", "if not answered:")],
    test_jobs_are_ordered_by_number_of_the_sweep_or_by_settings: [
        (jobs, 'return 0, value, ""', "return 0, 0.0, str(value)"),
        (jobs, "key=lambda job: (job.number, [", "key=lambda job: (0, ["),
    ],
    test_keys_differ_by_value_and_not_by_spelling: [(jobs, '.removesuffix(".0")', ""), (jobs, OF_THOSE, OF_ALL)],
    test_charts_are_over_what_varies_alone: [
        (comparison_charts, "if key != SEED and len", "if len"),
        (comparison_charts, NO_SWITCH, ""),
        (comparison_charts, "if len(comparison.keys) > FEW:", "if False:"),
        (comparison_charts, "_sizes(comparison.measured, key)) > 1", "_sizes(comparison.jobs, key)) > 1"),
    ],
    test_only_what_the_sweep_calls_finished_has_numbers: [
        (jobs, "if done and _has_finished(folder) else", "if _has_finished(folder) else"),
        (jobs, 'state = "gone" if', 'state = "finished" if'),
    ],
    test_killed_run_is_unfinished_without_an_error: [(jobs, 'return "" if is_message else', "return")],
    test_shared_artifact_counts_once: [(jobs, "            seen.add(path)\n", "")],
    test_same_artifact_in_two_stores_was_made_twice: [(jobs, BY_PLACE, BY_KEY)],
    test_own_time_is_of_what_no_other_job_needed: [(jobs, "if other is not job for s", "if other is None for s")],
}
CASES = [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize(("check", "module", "old", "new"), CASES, ids=[f"{old} -> {new}" for _, _, old, new in CASES])
def test_mutant_is_caught(
    check: Callable[..., None], module: Any, old: str, new: str, sweep: Sweep, given: dict[str, Any]
) -> None:
    assert_caught(module, sys.modules[__name__], old, new, check, {**given, "sweep": sweep})
