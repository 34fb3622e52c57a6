import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from builders import records_artifact

from selfalign.core.files import read_json, write_json
from selfalign.core.jsonl import HasId
from selfalign.core.records import (
    Demonstration,
    FinishReason,
    Instruction,
    Judgement,
    JudgementStatus,
    PreferencePair,
    RankedAnswers,
    Response,
)
from selfalign.metrics.catalog import METRICS
from selfalign.metrics.power import detectable_difference
from selfalign.report import write_report
from selfalign.report.charts import Series, draw_curves, draw_histogram, draw_models, moving_mean, spread, tick_labels
from selfalign.report.html import decimals, percent, telling_apart
from selfalign.report.instruments import verdict
from selfalign.report.sentences import warnings, what_was_run
from selfalign.report.truth import truth_section
from selfalign.runs.reader import Candidate, Finished, best_first, read_samples, with_winner

HOSTILE = "</p><script>alert('x')</script><img src=http://evil.example/x.png> & \"quoted\""
SCORES = {1: 2.0, 2: 5.0, 3: None, 4: 1.0}
"""What the judge gives the candidates of every instruction; None stands for a judgement without a score."""


# --- a fabricated run --------------------------------------------------------------------------------------------


def instruction(name: str, source: str = "self", text: str = "") -> Instruction:
    return Instruction(id=name, text=text or f"Do {name}", source=source)


def response(name: str, asked: str, text: str = "", reason: FinishReason = FinishReason.EOS) -> Response:
    return Response(
        id=name, instruction_id=asked, text=text or f"Answer {name}", finish_reason=reason, tokens=3, model="m"
    )


def judgement(name: str, score: float | None, text: str = "Because.") -> Judgement:
    status = JudgementStatus.NO_SCORE if score is None else JudgementStatus.OK
    return Judgement(id=f"{name}-1", response_id=name, status=status, score=score, text=text, model="m")


class Fabricated:
    """A run folder made file by file, as run_experiment leaves it."""

    def __init__(self, folder: Path, iterations: int = 2, **config: Any) -> None:
        self.folder = folder
        self.models: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.drops: dict[str, dict[str, int]] = {}
        self.config: dict[str, Any] = {
            "name": "made-up",
            "iterations": iterations,
            "model": {"path": "some/model", "lora": {"rank": 8}},
            "data": {"instruct": {"count": 4, "model": "self"}, "respond": {"candidates": 4}},
            "judge": {"prompt": HOSTILE, "model": "self", "min_score": 0, "max_score": 5, "num_samples": 3},
            "pair": {"minimum_margin": 0.0},
            "loss": {"beta": 0.1, "lam": 0.5},
            "train": {"reference_policy": "previous"},
            "evaluate": {"judge": "sft", "instructions": [{"path": "made/up.jsonl"}]},
            **config,
            "choices": {"loss": "SrDPO", **config.get("choices", {})},
        }

    def stage(self, label: str, stage: str, counts: dict[str, Any], **files: Sequence[HasId]) -> None:
        place = self.folder / "artifacts" / label
        place.mkdir(parents=True)
        records_artifact(place, **files)
        inputs = {"loss": {"class": "SrDPO", **self.config["loss"]}} if stage == "align" else {}
        inputs = {"judge": self.config["judge"]} if stage == "judge" else inputs
        write_json(place / "manifest.json", {"inputs": inputs})
        self.stages.append({"label": label, "stage": stage, "seconds": 2.5, "counts": counts, "key": label})
        self.drops |= {label: counts["dropped"]} if counts.get("dropped") else {}

    def model(self, label: str, stage: str, **numbers: Any) -> None:
        self.stage(label, stage, {})
        row = {"model": label, "iteration": int(label[1:]) - 1, "seconds": 70.0, **numbers}
        self.models.append(row)
        for step in range(1, 26):
            loss = {"loss": 1 / step, "loss_per_token": 1 / step} if stage == "sft" else {"loss": 1 / step}
            rewards = (
                {"rewards/margins": step * 0.1, "rewards/accuracies": 1.0} if stage == "align" and step > 1 else {}
            )
            self.rows.append({"label": label, "stage": stage, f"{stage}/step": step, **loss, **rewards})
        self.rows.append({"label": label, "stage": stage, "pairs": 3, f"{stage}/seconds": 2.5})

    def evaluation(self, label: str, scores: Sequence[float]) -> None:
        place, names = f"evaluation_{label}", [f"e{n}" for n in range(1, len(scores) + 1)]
        answers = [response(f"{name}-1", name, f"{label} says {name}") for name in names]
        judged = [judgement(answer.id, score) for answer, score in zip(answers, scores, strict=True)]
        self.stage(f"{place}/answers", "respond", {}, responses=answers)
        self.stage(f"{place}/scores", "judge", {}, judgements=judged)
        ranked = [judgement(f"q{q}-{n}", score) for q in (1, 2, 3) for n, score in ((1, 5.0), (2, 1.0 + 2 * q))]
        self.stage(f"{place}/ranked_scores", "judge", {}, judgements=ranked)

    def iteration(self, number: int, *, positives: bool = False, hostile: str = "") -> None:
        place = f"iteration_{number}"
        asked = [instruction(f"i{number}{letter}", text=hostile) for letter in "abcdef"]
        answers = [response(f"{i.id}-{n}", i.id, hostile if n == 2 else "") for i in asked for n in SCORES]
        judged = [judgement(answer.id, SCORES[int(answer.id[-1])], hostile or "Because.") for answer in answers]
        kept: dict[str, Sequence[HasId]] = {"pairs": [pair(i.id) for i in asked]}
        if positives:
            made = [Demonstration(id=f"{i.id}-2", prompt=i.text, response="r", source="positive") for i in asked]
            kept = {"demonstrations": made}
        self.stage(f"{place}/instructions", "instruct", {"kept": 6, "dropped": {"too_short": 7}}, instructions=asked)
        self.stage(f"{place}/responses", "respond", {"responses": 24, "mean_characters": 11.0}, responses=answers)
        numbers = {"judge/mean_score": 2.6, "judge/std_score": 1.7, "dropped": {"no_score": 6}}
        self.stage(f"{place}/judgements", "judge", numbers, judgements=judged)
        self.stage(f"{place}/pairs", "pair", {"positives" if positives else "pairs": 6}, **kept)

    def finish(self) -> Path:
        loss = {"title": "Sr-DPO", "formula": "−log σ(β h − λ ⊥Δ)"}
        summary = {"name": self.config["name"], "seed": 3, "loss": loss, "config": self.config, "models": self.models}
        write_json(self.folder / "summary.json", {**summary, "drops": self.drops, "stages": self.stages})
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        (self.folder / "config.yaml").write_text(f"name: made-up\nprompt: {HOSTILE}\n")
        provenance = {
            "commit": "abc123",
            "diff": "--- a\n+++ b\n-old\n+new\n",
            "packages": {"torch": "2.11"},
            "python": "3.11",
            "machine": {"system": "Linux", "processor": "", "cores": 2},
            "command": ["selfalign", HOSTILE],
            "seed": 3,
            "weights": {"M1": "d1gest"},
        }
        write_json(self.folder / "provenance.json", provenance)
        return self.folder


def pair(name: str) -> PreferencePair:
    """The best against the worst of SCORES."""
    return PreferencePair(
        id=f"p-{name}",
        prompt=f"Do {name}",
        chosen="c",
        rejected="r",
        chosen_score=5.0,
        rejected_score=1.0,
        instruction_id=name,
        chosen_id=f"{name}-2",
        rejected_id=f"{name}-4",
    )


def begin(folder: Path, **config: Any) -> Fabricated:
    """M0, seeds with ranked answers, M1."""
    run = Fabricated(folder, **config)
    ranked = [
        RankedAnswers(id=f"q{n}", instruction="?", texts=["a", "b"], ranks=[1, 2], scores=[], justifications=[])
        for n in (1, 2, 3)
    ]
    run.stage("M0", "load_model", {"parameters": 135_000_000})
    run.stage("seeds", "seed_data", {"ift": 84, "eft": 56}, ranked=ranked)
    quality = {"judge_quality/pairwise_accuracy": 1 / 3, "judge_quality/spearman": 0.0}
    run.model("M1", "sft", demonstrations=140, **quality)
    return run


def whole(folder: Path, hostile: str = "") -> Path:
    """A run with everything: two iterations, evaluated."""
    run = begin(folder)
    asked = [instruction(f"e{n}", "evaluation") for n in range(1, 5)]
    run.stage("questions", "eval_instructions", {"instructions": 4}, instructions=asked)
    run.evaluation("M1", [3, 3, 3, 3])
    for number in (1, 2):
        run.iteration(number, hostile=hostile)
        win = {"eval/win_rate": 0.625, "eval/win_rate_low": 0.2, "eval/win_rate_high": 0.9}
        counts = {"eval/wins": 2, "eval/ties": 1, "eval/losses": 1, "eval/mean_characters": 10.5}
        rewards = {"rewards/margins": -0.25, "rewards/accuracies": 0.75}
        run.model(f"M{number + 1}", "align", pairs=6, **rewards, **win, **counts)
        run.evaluation(f"M{number + 1}", [4, 3, 2, 5])
    return run.finish()


def report(folder: Path) -> str:
    write_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would make of the page: tags, texts by section, cells, and candidates with their marks."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.candidates: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "div" and (classes := dict(attrs).get("class") or "").startswith("candidate "):
            self.candidates.append((classes.removeprefix("candidate ").strip(), ""))

    def handle_data(self, data: str) -> None:
        if "style" in self._open[-1:]:
            return
        self.text += data
        if self.candidates:
            role, text = self.candidates[-1]
            self.candidates[-1] = (role, text + data)

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] or "" for tag, attributes in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(whole(tmp_path_factory.mktemp("hostile") / "made-up-12345678", HOSTILE))


@pytest.fixture(scope="module")
def friendly_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(whole(tmp_path_factory.mktemp("friendly") / "made-up-12345678"))


# --- the page ----------------------------------------------------------------------------------------------------


def test_page_asks_for_nothing_from_outside(hostile_page: str) -> None:
    page = Page(hostile_page)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert links
    assert all(value is not None and value.startswith("#") for value in links)
    assert not [name for _, attributes in page.tags for name in attributes if name == "src" or name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", hostile_page)


def test_what_a_model_or_user_wrote_stays_text(hostile_page: str) -> None:
    assert "<script" not in hostile_page
    assert "&lt;script&gt;" in hostile_page
    # Two samples in each of two iterations and more: responses, judgements, the command, the configuration.
    assert Page(hostile_page).text.count(HOSTILE) > 10


def test_chosen_and_rejected_are_the_pair_s(friendly_page: str) -> None:
    candidates = Page(friendly_page).candidates
    by_role = {role: [text for found, text in candidates if found == role] for role in ("chosen", "rejected", "")}
    assert len(by_role["chosen"]) == len(by_role["rejected"]) == 6
    for role, number in (("chosen", 2), ("rejected", 4)):
        assert all(f"{role} {SCORES[number]:.2f}" in text for text in by_role[role])
        assert all(re.search(rf"Answer i\d[a-c]-{number}1 judgement", text) for text in by_role[role])
    assert not [text for text in by_role[""] if "✓" in text or "✕" in text]


def test_candidate_without_score_comes_last_and_shows_no_number(friendly_page: str) -> None:
    first = Page(friendly_page).candidates[:4]
    assert [re.findall(r"Answer \S+-(\d)", text)[0] for _, text in first] == ["2", "1", "4", "3"]
    assert "–" in first[3][1]
    assert "no score" in first[3][1]
    assert not re.search(r"\d\.\d\d", first[3][1])


def test_head_to_head_marks_the_higher_score(friendly_page: str) -> None:
    shown = [(role, text) for role, text in Page(friendly_page).candidates if "says" in text]
    assert [role for role, _ in shown] == ["", "winner", "", "", "winner", ""]
    assert "M1 says e1" in shown[0][1]
    assert "M3 says e1" in shown[1][1]


def test_every_model_has_its_row(friendly_page: str) -> None:
    table = friendly_page.split("</table>")[0]
    rows = re.findall(r'<tr><th scope="row">(M\d)</th>(.*?)</tr>', table)
    assert [name for name, _ in rows] == ["M1", "M2", "M3"]
    assert "140 demonstrations" in rows[0][1]
    assert "6 pairs" in rows[1][1]
    assert "−0.250" in rows[1][1]
    assert "62\u00a0% <small>[20\u00a0%, 90\u00a0%]</small>" in rows[2][1]
    assert "1\u00a0min 10\u00a0s" in rows[0][1]


def test_headings_are_explained(friendly_page: str) -> None:
    headings = [attributes for tag, attributes in Page(friendly_page).tags if tag == "th" and "title" in attributes]
    meanings = [attributes["title"] for attributes in headings]
    assert all(meanings)
    assert len(headings) == friendly_page.count('<th scope="col"')
    for key in ("eval/win_rate", "rewards/margins", "judge_quality/pairwise_accuracy"):
        assert METRICS[key].meaning in meanings


def test_whole_run_has_every_section(friendly_page: str) -> None:
    assert Page(friendly_page).sections == [
        "models",
        "from-model-to-model",
        "instruments",
        "judging",
        "training",
        "preference-data",
        "candidates",
        "head-to-head",
        "dropped",
        "time",
        "provenance",
    ]


def test_drops_are_counted_by_reason_and_model(friendly_page: str) -> None:
    table = friendly_page.split('<section id="dropped">')[1].split("</table>")[0]
    assert re.findall(r"<span>(.*?)</span></th>", table) == ["dropped", "M2", "M3"]
    cells = re.sub(r' data-sort="\d"', "", table)
    assert "writing instructions: too short</th><td>7</td><td>7</td>" in cells
    assert "judging candidates: no score</th><td>6</td><td>6</td>" in cells


def test_drops_of_an_evaluation_are_those_of_its_models(tmp_path: Path) -> None:
    """Named after their runs, so that no number tells them apart; what all share counts for the first."""
    run = Fabricated(tmp_path / "evaluation")
    run.stage("questions", "eval_instructions", {"dropped": {"trained_on": 1}})
    for name, lost in (("a.M1", 2), ("b.M2", 3), ("SFT", 4)):
        run.stage(f"evaluation_{name}/scores", "judge", {"dropped": {"no_score": lost}})
        run.models.append({"model": name, "iteration": 0, "seconds": 1.0})
    folder = run.finish()
    write_json(folder / "summary.json", {**read_json(folder / "summary.json"), "evaluated": ["a", "b"]})
    table = report(folder).split('<section id="dropped">')[1].split("</table>")[0]
    assert re.findall(r"<span>(.*?)</span></th>", table) == ["dropped", "a.M1", "b.M2", "SFT"]
    table = re.sub(r' (data-sort|class)=".*?"', "", table)
    assert "judging answers: no score</th><td>2</td><td>3</td><td>4</td>" in table
    assert "trained on</th><td>1</td><td>–</td><td>–</td>" in table


def test_provenance_tells_commit_and_changes(friendly_page: str) -> None:
    text = Page(friendly_page).text
    assert "abc123, plus 2 changed lines (see provenance.json)" in text
    assert "d1gest" in text


def test_same_run_gives_same_bytes(tmp_path: Path) -> None:
    folders = [whole(tmp_path / name / "made-up-12345678") for name in ("a", "b")]
    for folder in folders:
        write_report(folder)
    first, second = ((folder / "report.html").read_bytes() for folder in folders)
    assert first == second


def test_number_that_is_none_is_never_shown(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.stage("M2", "align", {})
    broken = {"rewards/margins": math.nan, "rewards/accuracies": None, "eval/win_rate": math.inf}
    run.models.append({"model": "M2", "iteration": 1, "pairs": 0, "seconds": 1.0})
    run.rows += [{"label": "M2", "stage": "align", "align/step": n, "loss": math.nan} for n in (1, 2)]
    folder = run.finish()
    summary = json.loads((folder / "summary.json").read_text())
    summary["models"][1] |= broken
    (folder / "summary.json").write_text(json.dumps(summary))
    page = report(folder)
    assert not re.search(r"\b(nan|inf|infinity|none|null)\b", Page(page).text, re.IGNORECASE)
    assert "Alignment loss" not in page
    assert "reward margin" not in page.split("</table>")[0]


def test_run_on_given_pairs_shows_them(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", data={"path": "my_pairs.jsonl"})
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    given = [
        PreferencePair(id="1", prompt="Say hello", chosen="Hello.", rejected="No."),
        PreferencePair(id="2", prompt=turns, chosen="Hi.", rejected="Good day to you."),
    ]
    run.stage("iteration_1/pairs", "given_pairs", {"pairs": 2}, pairs=given)
    run.model("M2", "align", pairs=2)
    page = Page(report(run.finish()))
    assert "my_pairs.jsonl" in page.text
    assert [role for role, _ in page.candidates] == ["chosen", "rejected"] * 2
    assert "system: Be brief.\n\nuser: Hi?" in page.text
    assert not {"head-to-head", "dropped"} & set(page.sections)
    assert "Scores, iteration" not in page.text


def test_run_on_positives_marks_what_was_kept(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", pair={"minimum_score": 5.0}, loss={}, iterations=1)
    run.iteration(1, positives=True)
    run.model("M2", "sft", demonstrations=6)
    page = Page(report(run.finish()))
    assert [role for role, _ in page.candidates if role] == ["positive"] * 3
    assert all("Answer i1" in text and "-2" in text for role, text in page.candidates if role)
    assert "positives" in page.text
    assert "Alignment loss" not in page.text
    assert "In one iteration" in page.text


def test_run_without_evaluation_has_no_win_rate(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.iteration(1)
    run.model("M2", "align", pairs=6, **{"rewards/margins": 0.1})
    page = report(run.finish())
    assert "win rate" not in page.lower()
    assert "verdict" not in page.split("</style>")[1]
    assert "head-to-head" not in page


def test_links_that_lead_nowhere_leave_their_sections_out(tmp_path: Path) -> None:
    folder = whole(tmp_path / "run")
    for path in (folder / "artifacts").rglob("*.json*"):
        path.unlink()
    page = Page(report(folder))
    assert page.sections == [
        "models",
        "from-model-to-model",
        "instruments",
        "training",
        "preference-data",
        "dropped",
        "time",
        "provenance",
    ]
    assert "Scores, iteration" not in page.text


# --- sentences ---------------------------------------------------------------------------------------------------


def test_paragraph_names_model_data_judge_rule_loss_and_seed(tmp_path: Path) -> None:
    said = re.sub(r"<.*?>", "", what_was_run(Finished.load(whole(tmp_path / "run"))))
    for part in (
        "some/model (135 M parameters, LoRA of rank 8)",
        "84 demonstrations of following instructions and 56 of judging",
        "each of 2 iterations",
        "4 candidates",
        "mean of 3 written judgements",
        "the best candidate was paired with the worst",
        "Sr-DPO (β = 0.1, λ = 0.5; reference: the previous model) made M2, M3",
        "The seed was 3",
    ):
        assert part in said


def test_paragraph_says_how_the_loss_weighs_and_sums(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", loss={"beta": 0.1, "lam": 0.3, "reduction": "mean", "lambda_scale": "derived"})
    run.model("M2", "align")
    said = re.sub(r"<.*?>", "", what_was_run(Finished.load(run.finish())))
    assert "(β = 0.1, λ = 0.3, reduction mean, lambda_scale derived; reference" in said
    run = begin(tmp_path / "list", loss={"beta": 0.1, "lam": [0.0, 0.5]})
    run.model("M2", "align")
    assert "(β = 0.1, λ = 0, 0.5; reference" in re.sub(r"<.*?>", "", what_was_run(Finished.load(run.finish())))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "self"}, "the current model wrote 4 instructions and, for each, 4 candidates"),
        ({"model": "sft"}, "M1 wrote 4 instructions and the current model, for each, 4 candidates"),
        ({"model": "./<chat>"}, "./&lt;chat&gt; wrote 4 instructions and the current model, for each, 4 candidates"),
        (
            {"model": "self", "source": "a.jsonl"},
            "the current model took 4 instructions from a.jsonl and wrote, for each, 4 candidates",
        ),
    ],
)
def test_paragraph_says_where_new_instructions_come_from(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    data = {"instruct": {"count": 4, **settings}, "respond": {"candidates": 4}}
    run = Finished.load(begin(tmp_path / "run", data=data).finish())
    assert f"In each of 2 iterations {said}" in re.sub(r"</?b>", "", what_was_run(run))


def test_paragraph_names_other_writers_their_pairs_and_what_changes(tmp_path: Path) -> None:
    data = {"instruct": {"count": 4, "model": "self", "source": "demonstrations"}}
    data["respond"] = {"candidates": 1, "writers": ["demonstration", "self"]}
    pair = {"chosen_from": "demonstration", "rejected_from": "self", "by_score": False}
    run = Finished.load(begin(tmp_path / "run", data=data, pair=pair, at={"2": {"loss": {}, "judge": {}}}).finish())
    assert (
        "In each of 2 iterations 4 instructions were taken from demonstrations, to which the demonstrations and the "
        "current model gave answers (1 by a model), which nobody judged; the first by the demonstrations was paired "
        "with the first by the current model. From iteration 2 on, other settings held for loss, judge."
    ) in re.sub(r"</?b>", "", what_was_run(run))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.4, 0.7, "does not tell the two models apart"), (0.51, 0.9, "prefers the last"), (0.1, 0.49, "prefers M1")],
)
def test_verdict_follows_the_interval(tmp_path: Path, low: float, high: float, said: str) -> None:
    run = begin(tmp_path / "run")
    rate = {"eval/win_rate": (low + high) / 2, "eval/win_rate_low": low, "eval/win_rate_high": high}
    run.model("M2", "align", pairs=1, **rate, **instrument("head_to_head"), **COMPARED)
    text = verdict(Finished.load(run.finish()))
    assert said in text
    assert "8 instructions, a tie counting half" in text


COMPARED = {"eval/wins": 5, "eval/ties": 1, "eval/losses": 2}


def instrument(name: str, *, passed: bool = True) -> dict[str, float]:
    """What is measured of an instrument that passed, or of a blind one."""
    accuracy = {"accuracy": 0.75, "accuracy_low": 0.625, "accuracy_high": 0.875}
    blind = {"accuracy": 0.52, "accuracy_low": 0.46, "accuracy_high": 0.58}
    one_place = {"one_place": 0.125 if passed else 0.88, "first_place": 0.5}
    found = {"passed": float(passed), **(accuracy if passed else blind), "ties": 0.25, "comparisons": 96}
    return {f"instrument/{name}/{key}": value for key, value in (found | one_place).items()}


def win_rates(folder: Path, **measured: float) -> Finished:
    """M2 wins half head to head and three quarters by score, of four instructions each."""
    run = begin(folder)
    run.evaluation("M1", [3, 3, 3, 3])
    run.evaluation("M2", [4, 5, 3, 3])
    rates = {"eval/win_rate": 0.5, "eval/win_rate_low": 0.1, "eval/win_rate_high": 0.9}
    rates |= {"eval/score_win_rate": 0.75, "eval/score_win_rate_low": 0.55, "eval/score_win_rate_high": 0.95}
    run.model("M2", "align", pairs=1, **rates, **{"eval/wins": 1, "eval/ties": 2, "eval/losses": 1}, **measured)
    return Finished.load(run.finish())


def plain(html: str) -> str:
    return re.sub("<[^>]+>", "", html).replace("\u00a0", " ")


def headings(run: Finished) -> str:
    return plain(report(run.folder).split('aria-label="models"')[1].split("</thead>")[0])


def test_headline_is_the_first_instrument_that_passed(tmp_path: Path) -> None:
    both = win_rates(tmp_path / "both", **instrument("head_to_head"), **instrument("scores"))
    assert "M2 wins 50 % against M1 head to head on 4 instructions" in plain(verdict(both))
    one = win_rates(tmp_path / "one", **instrument("head_to_head", passed=False), **instrument("scores"))
    said = plain(verdict(one))
    assert "M2 wins 75 % against M1 by score on 4 instructions, a tie counting half; 95 % interval 55 % to 95 %" in said
    assert "passed its measurement: it is right on 75 % [62 %, 88 %] of 96 pairs" in said
    assert "Head to head the judge is blind and left out: it is right on 52 % [46 %, 58 %] of 96 pairs" in said
    assert "names one place in 88 %" in said
    assert "win rate by score" in headings(one)
    assert "win rate vs M1" not in headings(one)


def test_blind_instruments_stand_in_the_headlines_place(tmp_path: Path) -> None:
    run = win_rates(tmp_path / "run", **instrument("head_to_head", passed=False), **instrument("scores", passed=False))
    said = plain(verdict(run))
    assert said.startswith(
        "Blind: no judge of this run passed its measurement, so it is not known whether M2 is better"
    )
    assert "Head to head: it is right on 52 %" in said
    assert "By score: it is right on 52 %" in said
    assert "wins" not in said.split("(power")[0].replace("can see a win rate", "")
    assert "win rate vs M1 (blind)" in headings(run)
    assert "prefers" not in said


def test_what_was_not_measured_is_no_claim(tmp_path: Path) -> None:
    run = win_rates(tmp_path / "run")
    said = plain(verdict(run))
    assert said.startswith("Not measured: no held-out ranked answers say what this judge sees, so it is not known")
    assert "M2 wins 50 % against M1 head to head on 4 instructions" in said
    assert "tell the two models apart" not in said
    assert "win rate vs M1 (not measured)" in headings(run)
    assert "Not measured: no ranked answers are held out" in plain(report(run.folder))


def test_judge_that_checks_what_is_right_needs_no_measurement(tmp_path: Path) -> None:
    run = win_rates(tmp_path / "run", **instrument("head_to_head", passed=False))
    for place in ("M1", "M2"):
        manifest = run.folder / f"artifacts/evaluation_{place}/scores/manifest.json"
        write_json(manifest, {"inputs": {"judge": {"class": "Verifier"}}})
    said = plain(verdict(run))
    assert "M2 wins 75 % against M1 by score on 4 instructions" in said
    assert "This judge checks what is right." in said


def test_headline_says_what_its_comparisons_can_see(tmp_path: Path) -> None:
    """Four instructions see nothing. By score two of four are tied, as head to head; each by its own count."""
    run = win_rates(tmp_path / "run", **instrument("head_to_head", passed=False), **instrument("scores"))
    assert "4 instructions with 50 % ties can see no difference" in plain(verdict(run))
    more = begin(tmp_path / "more")
    rate = {"eval/win_rate": 0.5, "eval/win_rate_low": 0.3, "eval/win_rate_high": 0.7}
    counts = {"eval/wins": 9, "eval/ties": 6, "eval/losses": 9}
    more.model("M2", "align", pairs=1, **rate, **counts, **instrument("head_to_head"))
    found = detectable_difference(24, 0.25)
    assert found is not None
    said = f"24 instructions with 25 % ties can see a win rate {math.ceil(100 * found)} points or more from 50 %"
    assert said in plain(verdict(Finished.load(more.finish())))


def test_instruments_have_a_table_with_a_row_for_each_and_the_models_it_served(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    shared, own = instrument("head_to_head", passed=False), instrument("judge")
    run.models[0] |= shared | own
    run.model("M2", "align", pairs=1, **shared, **own, **{"eval/win_rate": 0.5})
    run.models[1]["instrument/judge/accuracy"] = 0.5
    page = plain(report(run.finish()).split('aria-label="instruments"')[1].split("</table>")[0])
    for row in ("head to head (M1, M2)", "own judging (M1)", "own judging (M2)"):
        assert row in page
    assert (page.count("blind"), page.count("passed")) == (1, 3)  # The heading and two rows.


def test_model_that_judged_its_own_training_data_blindly_is_a_warning(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.models[0] |= instrument("judge", passed=False)
    run.evaluation("M1", [3])
    run.iteration(1)
    run.model("M2", "align", pairs=1, **instrument("judge", passed=False))
    said = plain(warnings(Finished.load(run.finish())))
    assert "a model that judged its own training data is blind" in said
    assert "M1: it is right on 52 %" in said
    assert "M2" not in said


SERVED = {"model": "self", "endpoint": {"base_url": "http://h/v1", "model": "m"}}


@pytest.mark.parametrize(
    ("run_judge", "of_iteration", "warned"),
    [
        ({"model": "self"}, {"model": "self"}, True),
        ({"model": "self"}, {"model": "self", "max_score": 9}, False),  # At.1 has another rubric than is measured.
        ({"model": "self"}, None, False),  # The pairs needed no scores.
        ({"model": "sft"}, {"model": "sft"}, False),
        (SERVED, SERVED, False),
        *(
            (panel, panel, warned)
            for panel, warned in (
                ({"members": {"a": {"model": "self"}, "b": {"model": "a/model"}}}, True),
                ({"members": {"a": {"model": "self"}, "b": {"model": "sft"}}}, False),
                ({"members": {"a": {"class": "Verifier"}, "b": {"model": "a/model"}}}, False),
            )
        ),
    ],
)
def test_model_is_blind_to_its_training_data_only_where_it_judged_them_as_it_was_measured(
    tmp_path: Path, run_judge: dict[str, Any], of_iteration: dict[str, Any] | None, *, warned: bool
) -> None:
    run = begin(tmp_path / "run", judge=run_judge)
    run.models[0] |= instrument("judge", passed=False)
    run.evaluation("M1", [3])
    run.config["judge"] = of_iteration
    if of_iteration is not None:
        run.iteration(1)
    run.model("M2", "align", pairs=1)
    run.config["judge"] = run_judge
    assert ("blind" in warnings(Finished.load(run.finish()))) == warned


@pytest.mark.parametrize(
    ("judge", "drawn"),
    [
        ({"class": "ExpectedScore", "min_score": 0, "max_score": 5}, True),
        ({"class": "RubricScore"}, True),
        ({"class": "Verifier"}, True),
        ({"class": "RewardModel"}, False),
        ({"class": "FunctionScore"}, False),
        ({"class": "Panel", "members": {name: {"min_score": 0, "max_score": 5} for name in "ab"}}, True),
    ],
    ids=lambda value: value["class"] if isinstance(value, dict) else str(value),
)
def test_score_is_drawn_as_a_share_of_the_scale_only_where_there_is_one(
    tmp_path: Path, judge: dict[str, Any], *, drawn: bool
) -> None:
    """A reward of 0.5 is half of nothing."""
    run = begin(tmp_path / "run", judge=judge)
    run.models[0] |= {"eval/true_rate": 0.25, "eval/mean_score": 0.5}
    run.evaluation("M1", [3])
    page = truth_section(Finished.load(run.finish()))
    [names] = re.findall(r"<b>Truth and judge&#x27;s score</b>(.*?)evaluation answers", page)
    assert (">judge</i>" in names, ">truth</i>" in names) == (drawn, True)


def test_rewards_on_held_out_pairs_and_drift_have_their_tables(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    interval = {"preferences/rewards/accuracies_low": 0.4, "preferences/rewards/accuracies_high": 0.9}
    held_out = {
        "preferences/pairs": 12,
        "preferences/rewards/accuracies": 0.75,
        "preferences/margin_score_pearson": -0.5,
    }
    drift = {"logps/chosen_change": -1.25, "logps/chosen_change_per_token": -0.125, "score_length_correlation": 0.5}
    run.model(
        "M2", "align", pairs=6, **held_out, **interval, **drift, **{"bound_violated/min_chosen_logp_change": -0.125}
    )
    page = report(run.finish())
    tables = {
        name: re.sub(' data-sort="[^"]*"', "", page.split(f'<section id="{name}">')[1].split("</table>")[0])
        for name in ("held-out-pairs", "drift")
    }
    for cell in ("<td>12</td>", "75\u00a0% <small>[40\u00a0%, 90\u00a0%]</small>", "<td>−0.50</td>"):
        assert cell in tables["held-out-pairs"]
    for cell in ("<td>−1.25</td>", "<td>−0.1250</td>", "<td>0.50</td>"):
        assert cell in tables["drift"]
    assert "Held-out pairs: accuracy" in page
    assert "Change of log π" in page
    assert "M2: min chosen logp change −0.125" in page.split("outside their bounds")[1].split("</p>")[0]
    assert not {"held-out-pairs", "drift", "training-time"} & {*Page(report(whole(tmp_path / "quiet"))).sections}


def test_constant_judge_is_a_warning_at_the_top(tmp_path: Path) -> None:
    run = whole(tmp_path / "quiet")
    assert warnings(Finished.load(run)) == ""
    begun = begin(tmp_path / "run")
    begun.stage("iteration_1/judgements", "judge", {"judge/constant": 1.0})
    begun.stage("evaluation_M2/scores", "judge", {"judge/constant": 0.0})
    folder = begun.finish()
    said = warnings(Finished.load(folder))
    assert "a judge gave nearly the same score to all responses" in said
    assert "iteration_1/judgements" in said
    assert "evaluation_M2" not in said
    write_report(folder)
    assert said in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("judge", "kind", "said"),
    [
        (
            {"model": "sft", "min_score": 0, "max_score": 5, "pairs": 0},
            "Pairwise",
            "M1 judged (wins of comparisons, 0 to 5)",
        ),
        (
            {"model": "sft", "min_score": 0, "max_score": 5, "scores": "elo"},
            "Pairwise",
            "M1 judged (Elo by comparisons, 0 to 5)",
        ),
        ({"model": "self", "beta": 0.1}, "ImplicitReward", "which it judged itself (implicit reward)"),
        (
            {"endpoint": {"model": "big<model>"}, "min_score": 0, "max_score": 5, "num_samples": 3},
            "ExternalScore",
            "which big&lt;model&gt; judged (mean of 3 written judgements, 0 to 5)",
        ),
        (
            {"endpoint": {"model": "base"}, "model": "self", "min_score": 0, "max_score": 5, "pairs": 0},
            "Pairwise",
            "which base judged (wins of comparisons, 0 to 5)",
        ),
        (
            {"model": "/models/x", "min_score": 0, "max_score": 5},
            "ExpectedScore",
            "which /models/x judged (expected score, 0 to 5)",
        ),
    ],
)
def test_paragraph_says_who_judged_and_how(tmp_path: Path, judge: dict[str, Any], kind: str, said: str) -> None:
    run = begin(tmp_path / "run", judge=judge)
    run.stage("iteration_1/judgements", "judge", {})
    place = tmp_path / "run/artifacts/iteration_1/judgements/manifest.json"
    write_json(place, {"inputs": {"judge": {"class": kind}}})
    folder = run.finish()
    assert said in re.sub(r"<.*?>", "", what_was_run(Finished.load(folder)))
    write_report(folder)


@pytest.mark.parametrize(
    ("pair", "kind", "said"),
    [
        ({}, "BestWorst", "the best candidate was paired with the worst"),
        ({}, "RandomPair", "two random candidates were paired, and the one with the higher score was chosen"),
        ({}, "AllOrdered", "every two candidates of different scores were paired"),
        ({"k": 3}, "BestVsK", "the best candidate was paired with each of the k worst (k = 3)"),
        (
            {"threshold": 3.0},
            "Labels",
            "responses with a score of 3 or more were labelled desirable, all others undesirable",
        ),
        (
            {"threshold": None},
            "Labels",
            "responses above the mean of their instruction were labelled desirable, and those below it undesirable",
        ),
    ],
)
def test_paragraph_says_which_responses_were_paired(tmp_path: Path, pair: dict[str, Any], kind: str, said: str) -> None:
    run = begin(tmp_path / "run", pair=pair, choices={"pair": kind})
    run.stage("iteration_1/pairs", "pair", {})
    assert f"{said}. " in re.sub(r"<.*?>", "", what_was_run(Finished.load(run.finish())))


@pytest.mark.parametrize(("first", "second"), [("align", "sft"), ("sft", "align"), ("sft", "sft")])
def test_paragraph_says_of_each_loss_which_models_it_made(tmp_path: Path, first: str, second: str) -> None:
    run = begin(tmp_path / "run", at={"2": {"loss": {"beta": 0.3}}})
    run.model("M2", first)
    run.model("M3", second)
    summary = read_json(run.finish() / "summary.json")
    write_json(run.folder / "summary.json", {**summary, "later_losses": {"2": {"title": "IPO", "formula": ""}}})
    said = re.sub(r"<.*?>", "", what_was_run(Finished.load(run.folder)))
    aligned = {"M2": "Sr-DPO (β = 0.1, λ = 0.5; reference: the previous model)", "M3": "IPO (β = 0.3; reference"}
    for model, stage in (("M2", first), ("M3", second)):
        tuned = f"Fine-tuning on the good responses only (positives) made {model}."
        assert (tuned in said, aligned[model] in said) == (stage == "sft", stage == "align")


# --- what the numbers come from ----------------------------------------------------------------------------------


def test_samples_keep_instructions_and_roles_together(tmp_path: Path) -> None:
    samples = read_samples(whole(tmp_path / "run"), 2, 4)
    assert [sample.instruction for sample in samples] == [f"Do i2{letter}" for letter in "abcd"]
    assert [(c.score, c.role) for c in samples[0].candidates] == [
        (5.0, "chosen"),
        (2.0, ""),
        (1.0, "rejected"),
        (None, ""),
    ]


def candidate(score: float | None, role: str = "") -> Candidate:
    return Candidate("text", score, role, True, [])


def test_equal_scores_keep_chosen_before_rejected() -> None:
    given = [candidate(None), candidate(0, "rejected"), candidate(0), candidate(3), candidate(3, "chosen")]
    ordered = [(c.score, c.role) for c in best_first(given)]
    assert ordered == [(3, "chosen"), (3, ""), (0, ""), (0, "rejected"), (None, "")]


@pytest.mark.parametrize(
    ("scores", "winner"), [([1, 2], 1), ([2.5, 2], 0), ([2, 2], None), ([None, 2], None), ([None, None], None)]
)
def test_winner_has_the_only_highest_score(scores: list[float | None], winner: int | None) -> None:
    found = with_winner([candidate(score) for score in scores], "q", None)
    assert [place for place, one in enumerate(found) if one.role] == ([] if winner is None else [winner])


@pytest.mark.parametrize(
    ("outcome", "winner"), [({"q": 1.0}, 1), ({"q": 0.0}, 0), ({"q": 0.5}, None), ({"q": None}, None), ({}, None)]
)
def test_winner_of_a_comparison_is_not_who_scores_higher(outcome: dict, winner: int | None) -> None:
    found = with_winner([candidate(1), candidate(1)], "q", outcome)
    assert [place for place, one in enumerate(found) if one.role] == ([] if winner is None else [winner])


# --- drawing -----------------------------------------------------------------------------------------------------

POINTS = [(0.0, 0.25), (1.0, math.nan), (2.0, 0.75)]


@pytest.mark.parametrize(
    "svg",
    [
        draw_models(["M1", "M2", "M3"], [Series(name="", points=POINTS)], "A", percent, reference=0.5),
        draw_curves([Series(name="M2", points=POINTS, colour=7)], "B", percent),
        draw_histogram([0, 3, 1], 1, 3, "C"),
    ],
    ids=["models", "curves", "histogram"],
)
def test_drawing_has_the_page_s_colours_and_no_traces_of_its_making(svg: str) -> None:
    assert svg.startswith("<svg viewBox=")
    assert "var(--series-" in svg
    assert "#fe00" not in svg
    assert not re.search(r"nan|<style|<metadata|http|Date|DOCTYPE", svg)


def test_points_that_are_not_numbers_are_left_out_with_their_intervals() -> None:
    series = Series(name="s", points=POINTS, intervals=[(0, 1), (0, 2), (0, 3)]).finite()
    assert series.points == [(0.0, 0.25), (2.0, 0.75)]
    assert series.intervals == [(0, 1), (0, 3)]


def test_values_stand_beside_their_points() -> None:
    svg = draw_models(["M1", "M2"], [Series(name="", points=[(0, 0.125), (1, 2.5)])], "A", decimals(3))
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"M1", "M2", "0.125", "2.500"} <= set(texts)


def test_moving_mean_shrinks_at_the_ends() -> None:
    assert moving_mean([1, 2, 6, 3], 3) == [1.5, 3, pytest.approx(11 / 3), 4.5]
    assert moving_mean([4, 5], 1) == [4, 5]


def test_labels_are_moved_apart_in_their_order() -> None:
    moved = spread([0.5, 0.9, 0.52], 0.1)
    assert moved == pytest.approx([0.473333, 0.873333, 0.573333], abs=1e-6)
    assert sum(moved) == pytest.approx(0.5 + 0.9 + 0.52)
    assert spread([], 0.1) == []


def test_ticks_that_would_look_alike_get_more_digits() -> None:
    assert tick_labels([0.5, 0.55, 0.6], percent) == ["50\u00a0%", "55\u00a0%", "60\u00a0%"]
    assert tick_labels([0.6931, 0.6932, -0.6933], decimals(2)) == ["0.6931", "0.6932", "−0.6933"]


# --- numbers as text ---------------------------------------------------------------------------------------------


def test_numbers_as_text() -> None:
    assert percent(0.425) == "42\u00a0%"
    assert decimals(2)(-1234.5) == "−1\u00a0234.50"


def test_scores_that_differ_look_different() -> None:
    assert telling_apart([2.0, 3.0])(2) == "2.00"
    assert telling_apart([2.471, 2.472])(2.471) == "2.471"
    assert telling_apart([])(1) == "1.00"
