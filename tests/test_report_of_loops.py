"""Report and card of a run whose pairs are not the model's own alone, and whose judge and loss change."""

import re
from pathlib import Path

import pytest
from builders import TINY_RUN, run, write_tiny_data
from test_model_card import section, table, written
from test_pipeline import manifest, write_pairs

from selfalign.report.sentences import what_was_run
from selfalign.runs.reader import Finished

PANEL = ("judge=panel", *(f"+judge@judge.members.{name}=expected_score" for name in ("kind", "strict")))


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """M1 writes beside M_t, a panel judges at first, and given pairs are replayed."""
    root = tmp_path_factory.mktemp("loop")
    return run(
        root / "outputs",
        *(*TINY_RUN, *write_tiny_data(root / "data"), *PANEL, "data.seed_data.eft_source=none"),
        *("data.respond.writers=[self,sft]", "data.accumulate_pairs=true", "data.replay.share=[0.2,0.3]"),
        f"data.replay.source={write_pairs(root / 'given.jsonl')}",
        *("+loss@at.2.loss=ipo", "+judge@at.2.judge=expected_score", "at.2.judge.max_score=9"),
    )


def test_card_names_the_data_that_are_replayed(loop: Path) -> None:
    said = section(written(loop).text, "Data")
    assert re.search(r"Replayed preference pairs: `.*given.jsonl`, SHA-256 `[0-9a-f]{64}`", said)


def test_pairs_made_and_trained_on_are_told_apart(loop: Path) -> None:
    rows = {row[0]: row[1:3] for row in table(section(written(loop).text, "Data"))}
    of = {
        part: [manifest(loop, f"iteration_{n}/{part}")["counts"] for n in (1, 2)]
        for part in ("pairs", "replayed_pairs")
    }
    assert rows["pairs"] == [str(counts["pairs"]) for counts in of["pairs"]]
    assert rows["replayed pairs"] == [str(counts["replayed_pairs"]) for counts in of["replayed_pairs"]]
    assert rows["pairs trained on"] == [str(manifest(loop, name)["counts"]["pairs"]) for name in ("M2", "M3")]
    assert int(rows["pairs trained on"][1]) > int(rows["pairs"][0]) + int(rows["pairs"][1])


def test_judge_is_the_panel_and_not_its_first_member(loop: Path) -> None:
    assert Finished.load(loop).judge == "Panel"
    said = section(written(loop).text, "Method")
    assert "scores of a panel" in re.sub("<.*?>", "", said)
    assert "- Judge: `Panel`" in said
    assert re.search(r"- Judge, from iteration 2 on: `ExpectedScore`.*max_score `9`", said)


def test_each_loss_stands_with_its_own_formula_and_models(loop: Path) -> None:
    card = written(loop)
    said = section(card.text, "Method")
    assert re.search(r"- Loss of a pair: Sr-DPO, `−log σ\(β h − λ ⊥Δ\)`; `SrDPO`", said)
    assert re.search(r"- Loss of a pair, from iteration 2 on: IPO, `\(h − 1/\(2β\)\)²`; `IPO`", said)
    told = re.sub("<.*?>", "", what_was_run(Finished.load(loop)))
    assert re.search(r"Sr-DPO \(.*?\) made M2\. IPO \(β = 0.1.*?\) made M3\.", told)
    assert card.data.to_dict()["tags"] == ["selfalign", "sr-dpo", "ipo"]


def test_paragraph_says_what_was_trained_on_beside_the_pairs(loop: Path) -> None:
    told = re.sub("<.*?>", "", what_was_run(Finished.load(loop)))
    assert "Trained on beside these pairs: the pairs of earlier iterations; given pairs of" in told
    assert "(share of all: 0.2, 0.3)" in told
    assert "the model's own pairs" not in section(written(loop).text, "Method")


def test_limits_say_that_models_judged_themselves_if_they_did(loop: Path, tmp_path: Path) -> None:
    assert "ach model judged its own training data" in section(written(loop).text, "Limits")
    nobody = ("pair=by_writer", "pair.by_score=false", "data.respond.writers=[self,sft]", "iterations=1")
    folder = run(tmp_path / "outputs", *TINY_RUN, *write_tiny_data(tmp_path / "data"), *nobody)
    assert "ach model judged its own training data" not in section(written(folder).text, "Limits")


def test_histogram_of_a_later_judge_has_its_scale(loop: Path) -> None:
    page = (loop / "report.html").read_text()
    assert 'aria-label="Scores, iteration 1"' not in page, "a panel has no scale"
    drawn = page.split('aria-label="Scores, iteration 2"')[1].split("</svg>")[0]
    assert ">9<" in drawn
