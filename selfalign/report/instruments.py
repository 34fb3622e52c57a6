"""The headline of a report: the win rate of an instrument that passed its measurement. HTML, escaped here.

An instrument is a judge that tells two models' answers apart. One that did not pass is blind, and is named with its
figures in the headline's place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from html import escape
from typing import Any

from selfalign.metrics import catalog
from selfalign.metrics.catalog import Metric
from selfalign.metrics.instruments import HEAD_TO_HEAD, JUDGE, SCORES
from selfalign.metrics.power import TEST, what_can_be_seen
from selfalign.metrics.summaries import outcomes_by_score
from selfalign.report.html import Column, decimals, explained, is_number, note, percent
from selfalign.runs.labels import BASELINE, Label
from selfalign.runs.reader import Finished, read_responses

Row = Mapping[str, Any]

OTHER_OWN = {"sft", "base", "previous"}
"""Names of a run's own models as judges, but for the model that is judged."""

EXACT = ("Verifier",)
"""Judges that check what is right, by their class: there is nothing to measure."""


class Standing(Enum):
    """What is known of an instrument."""

    PASSED = "passed"
    BLIND = "blind"
    UNMEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Instrument:
    """An instrument of win rates.

    Attributes:
        name: in the names of metrics.
        words: in sentences.
        win_rate: the metric it gives.
    """

    name: str
    words: str
    win_rate: Metric

    def standing(self, run: Finished, row: Row) -> Standing:
        """Return what is known of the instrument in a model's evaluation."""
        if self.name == SCORES and run.judge in EXACT:
            return Standing.PASSED
        passed = row.get(catalog.INSTRUMENT_PASSED.of(instrument=self.name).name)
        return Standing.UNMEASURED if passed is None else Standing.PASSED if passed else Standing.BLIND

    def comparisons(self, run: Finished, row: Row) -> tuple[int, float]:
        """Return the number of instructions that it judged for a model and for M1, and the share of ties."""
        if self.name == HEAD_TO_HEAD:
            count = comparisons(row)
            return count, row.get(catalog.EVAL_TIES.name, 0) / max(1, count)
        scores = [
            {name: one.score for name, one in read_responses(run.folder, model).items() if one.score is not None}
            for model in (row["model"], first_model(run))
        ]
        outcomes = list(outcomes_by_score(*scores).values())
        return len(outcomes), outcomes.count(0.5) / max(1, len(outcomes))


INSTRUMENTS = (
    Instrument(HEAD_TO_HEAD, "head to head", catalog.EVAL_WIN_RATE),
    Instrument(SCORES, "by score", catalog.EVAL_SCORE_WIN_RATE),
)
"""In the order in which the headline takes the first that passed: the order is set before anything is measured."""

WORDS = {**{one.name: one.words for one in INSTRUMENTS}, JUDGE: "own judging"}
TABLE = (
    Column("instrument", "what is measured, and in the evaluation of which models", "instrument", decimals(0)),
    *(Column.of(metric) for metric in catalog.INSTRUMENT),
)


def first_model(run: Finished) -> str:
    """Return the model that all others are compared with."""
    return run.models[0]["model"] if "evaluated" in run.summary else "M1"


def comparisons(row: Row) -> int:
    """Return the number of instructions on which a model was compared with M1 and the judge gave a verdict."""
    return sum(int(row.get(one.name, 0)) for one in (catalog.EVAL_WINS, catalog.EVAL_TIES, catalog.EVAL_LOSSES))


def available(run: Finished) -> list[Instrument]:
    """Return the instruments that have a win rate for the last model."""
    row = run.models[-1] if run.models else {}
    return [one for one in INSTRUMENTS if is_number(row.get(one.win_rate.name))]


def headline(run: Finished) -> Instrument | None:
    """Return the first instrument that passed; None if none did."""
    passed = (one for one in available(run) if one.standing(run, run.models[-1]) is Standing.PASSED)
    return next(passed, None)


def headline_metric(run: Finished) -> Metric:
    """Return the win rate of tables and charts: the headline's, or one whose title says why there is none."""
    if (found := headline(run)) is not None:
        return found.win_rate
    first = next(iter(available(run)), INSTRUMENTS[0])
    known = first.standing(run, run.models[-1]) if run.models else Standing.UNMEASURED
    return replace(first.win_rate, title=f"{first.win_rate.heading} ({known.value})")


def verdict(run: Finished) -> str:
    """Return what the win rate of the last model shows, and what it does not show."""
    if not (known := available(run)):
        return ""
    row, found = run.models[-1], headline(run)
    if found is None:
        return f'<p class="verdict">{_without_headline(run, known)}</p>\n'
    conclusion = "It includes 50\u00a0%, so this run does not tell the two models apart."
    low, high = (row[f"{found.win_rate.name}_{end}"] for end in ("low", "high"))
    if low > 0.5 or high < 0.5:
        side, preferred = ("above", "the last model's") if low > 0.5 else ("below", f"{escape(first_model(run))}'s")
        conclusion = f"It lies {side} 50\u00a0%: this judge prefers {preferred} answers."
    blind = [one for one in known if one.standing(run, row) is Standing.BLIND]
    others = "".join(
        f" {one.words.capitalize()} the judge is blind and left out: {figures(row, one.name)}." for one in blind
    )
    return (
        f'<p class="verdict"><b>{_rate(run, found)}</b> {found.words}{_interval(run, found)}. {conclusion} The '
        "interval covers the sampling of instructions, but neither the seed nor the judge's errors. "
        f"{_measured(run, found)}{others}{_power(run, found)}</p>\n"
    )


def _without_headline(run: Finished, known: list[Instrument]) -> str:
    """Return why there is no headline: which instruments are blind, with their figures, or not measured."""
    row, first = run.models[-1], escape(first_model(run))
    unknown = f"so it is not known whether {escape(row['model'])} is better than {first}."
    blind = [one for one in known if one.standing(run, row) is Standing.BLIND]
    if blind:
        said = " ".join(f"{one.words.capitalize()}: {figures(row, one.name)}." for one in blind)
        rest = [one.words for one in known if one not in blind]
        more = f" Not measured: {', '.join(rest)}." if rest else ""
        return (
            f"<b>Blind: no judge of this run passed its measurement</b>, {unknown} {said}{more}{_power(run, blind[0])}"
        )
    return (
        f"<b>Not measured: no held-out ranked answers say what this judge sees</b>, {unknown} {_rate(run, known[0])} "
        f"{known[0].words}{_interval(run, known[0])}.{_power(run, known[0])}"
    )


def _rate(run: Finished, instrument: Instrument) -> str:
    row = run.models[-1]
    rate = percent(row[instrument.win_rate.name])
    return f"{escape(row['model'])} wins {rate} against {escape(first_model(run))}"


def _interval(run: Finished, instrument: Instrument) -> str:
    """Return on how many instructions a win rate is, and its interval."""
    row = run.models[-1]
    count, _ = instrument.comparisons(run, row)
    low, high = (percent(row[f"{instrument.win_rate.name}_{end}"]) for end in ("low", "high"))
    return f" on {count} instructions, a tie counting half; 95\u00a0% interval {low} to {high}"


def _measured(run: Finished, instrument: Instrument) -> str:
    """Return how the instrument passed."""
    if instrument.name == SCORES and run.judge in EXACT:
        return "This judge checks what is right."
    return f"This judge passed its measurement: {figures(run.models[-1], instrument.name)}."


def _power(run: Finished, instrument: Instrument) -> str:
    """Return the smallest win rate that these comparisons can see."""
    count, ties = instrument.comparisons(run, run.models[-1])
    return f" {what_can_be_seen(count, ties)} ({TEST})." if count else ""


def figures(row: Row, name: str) -> str:
    """Return accuracy, one-place share and ties of a measured instrument."""

    def value(metric: Metric, end: str = "") -> float:
        found = row.get(f"{metric.of(instrument=name).name}{end}")
        return found if is_number(found) else math.nan

    low, high = (value(catalog.INSTRUMENT_ACCURACY, end) for end in ("_low", "_high"))
    interval = f" [{percent(low)}, {percent(high)}]" if low <= high else ""
    place = value(catalog.INSTRUMENT_ONE_PLACE)
    pairs = f"{value(catalog.INSTRUMENT_COMPARISONS):.0f} pairs of held-out ranked answers"
    parts = [
        f"it is right on {percent(value(catalog.INSTRUMENT_ACCURACY))}{interval} of {pairs}, a tie counting half",
        *([f"names one place in {percent(place)}"] if is_number(place) else []),
        f"ties {percent(value(catalog.INSTRUMENT_TIES))}",
    ]
    return ", ".join(parts)


def blind_judges(run: Finished) -> list[str]:
    """Return the models that judged their own training data and did not pass, with their figures."""
    passed = catalog.INSTRUMENT_PASSED.of(instrument=JUDGE).name
    blind = [row for row in run.models[:-1] if row.get(passed) == 0 and _judged_itself(run, row)]
    return [f"{row['model']}: {figures(row, JUDGE)}" for row in blind]


def _judged_itself(run: Finished, row: Row) -> bool:
    """Whether a model judged its own responses, and as it was measured: `at` may have put another judge there."""
    if "evaluated" in run.summary or row["model"] == BASELINE:
        return False
    judge = run.inputs(Label.iteration(row["iteration"] + 1, "judgements")).get("judge", {})
    measured = run.inputs(Label.evaluation(row["model"], "ranked_scores")).get("judge")
    several = [*judge.get("members", {"": judge}).values()]
    models = {one.get("model") for one in several if not one.get("endpoint", {}).get("base_url")}
    return judge == measured and "self" in models and models.isdisjoint(OTHER_OWN)


def instruments_table(run: Finished) -> str:
    """Return how well each judge of win rates, and each model's own judging, did on held-out ranked answers."""
    models: dict[tuple[str, tuple[Any, ...]], list[str]] = {}
    found: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}
    for name in WORDS:
        for row in run.models:
            whole = {metric.of(instrument=name).name: metric.name for metric in catalog.INSTRUMENT}
            values = {f"{to}{end}": row[f"{key}{end}"] for key, to in whole.items() for end in ("", "_low", "_high")
                      if f"{key}{end}" in row}  # fmt: skip
            if values:
                same = name, tuple(values.items())
                models.setdefault(same, []).append(row["model"])
                found[same] = values
    passed = catalog.INSTRUMENT_PASSED.name
    rows = [
        {
            **values,
            "instrument": f"{WORDS[name]} ({', '.join(models[name, key])})",
            passed: (Standing.PASSED if values[passed] else Standing.BLIND).value,
        }
        for (name, key), values in found.items()
    ]
    if not rows:
        said = "Not measured: no ranked answers are held out (<code>data.seed_data.ranked</code>)."
        return note(said) if available(run) and run.progress is None else ""
    bar = run.config["evaluate"].get("instruments", {})
    remark = note(
        "An instrument passes if the lower end of its accuracy's 95\u00a0% interval (over questions) is above "
        f"{percent(bar.get('min_accuracy', 0.5))} and it names one place in at most "
        f"{percent(bar.get('max_one_place', 0.5))} of its comparisons. Ranked answers lie further apart than two "
        "models' answers may: to pass is necessary, not sufficient."
    )
    return explained("instruments", TABLE, rows, remark)
