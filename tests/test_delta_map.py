"""The report's map of Δ: words, colours, and what they add up to."""

import re
from pathlib import Path
from typing import Any

import pytest
from builders import records_artifact

from selfalign.core.files import write_json
from selfalign.core.records import Instruction, PairTokens
from selfalign.report.delta_map import Word, delta_map, words_of
from selfalign.runs.reader import Finished

HOSTILE = "<script>alert(1)</script>"


def run_with(folder: Path, **tokens: list[PairTokens]) -> Finished:
    """A run whose models have these tokens."""
    asked = [Instruction(id="a", text=f"Ask {HOSTILE}", source="evaluation")]
    place = folder / "artifacts"
    records_artifact(place / "preferences/pairs", instructions=asked)
    for model, pairs in tokens.items():
        if pairs:
            records_artifact(place / f"evaluation_{model}/preferences", tokens=pairs)
    models = [{"model": name} for name in ("M1", *tokens)]
    summary = {"name": "made-up", "seed": 0, "loss": {}, "config": {}, "models": models, "drops": {}, "stages": []}
    write_json(folder / "summary.json", summary)
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.yaml").write_text("name: made-up\n")
    write_json(folder / "provenance.json", {})
    return Finished.load(folder)


def pair(**changed: Any) -> PairTokens:
    values: dict[str, Any] = {
        "id": "a",
        "chosen": ["A", " wr", "en", "."],
        "rejected": [HOSTILE, "!"],
        "chosen_values": [0.0, 0.1, 0.2, -0.05],
        "rejected_values": [-0.15, 0.0],
    }
    return PairTokens(**{**values, **changed})


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["A", " wr", "en", "."], [("A", 1), (" wren", 5), (".", 4)]),
        (["", "", "東", "京"], [("東", 6), ("京", 4)]),
        (["x", "", "", ""], [("x", 1), ("", 9)]),
        (["12", "34", "a", "b"], [("1234ab", 10)]),
        (["\n", "a", " ", "b"], [("\n", 1), ("a", 2), (" ", 3), ("b", 4)]),
    ],
)
def test_tokens_of_a_word_are_added_up(tokens: list[str], words: list[tuple[str, float]]) -> None:
    assert words_of(tokens, [1.0, 2.0, 3.0, 4.0]) == [Word(text, delta) for text, delta in words]


def test_words_have_the_share_of_the_largest_and_their_sums(tmp_path: Path) -> None:
    page = delta_map(run_with(tmp_path / "run", M2=[pair()]))
    coloured = re.findall(r'<span class="(raises|lowers)" style="--share: (\d+)%" title="([^"]*)">', page)
    assert coloured == [("raises", "100", "+0.3000"), ("lowers", "17", "−0.0500"), ("lowers", "50", "−0.1500")]
    assert "adds +0.250" in page
    assert "adds −0.150" in page
    assert "Δ = +0.100" in page
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;") == 2


def test_last_measured_model_is_shown(tmp_path: Path) -> None:
    other = pair(chosen_values=[1.0, 0.0, 0.0, 0.0])
    assert "Δ of M3" in delta_map(run_with(tmp_path / "both", M2=[pair()], M3=[other]))
    assert "Δ of M2" in delta_map(run_with(tmp_path / "one", M2=[pair()], M3=[]))
    assert delta_map(run_with(tmp_path / "none")) == ""


def test_policy_that_is_its_reference_has_no_colour(tmp_path: Path) -> None:
    page = delta_map(run_with(tmp_path / "run", M2=[pair(chosen_values=[0.0] * 4, rejected_values=[0.0] * 2)]))
    assert "A wren." in page
    assert "--share" not in page
