"""Pieces of the report's HTML: numbers as text, tables, figures, candidates. Text of records is escaped here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self, TypeGuard

from selfalign.core.formatting import duration, plural
from selfalign.core.records import Judgement
from selfalign.metrics.catalog import Metric
from selfalign.runs.reader import Candidate, Sample

Row = Mapping[str, Any]
Format = Callable[[float], str]

NOTHING = "–"
"""Stands where there is no number."""

MARKS = {"chosen": "✓ chosen", "rejected": "✕ rejected", "positive": "✓ kept", "winner": "higher score"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: its title.
        meaning: what that means.
        key: of its values in a row.
        form: how a number is written.
        better: an arrow in the better direction, if there is one.
    """

    heading: str
    meaning: str
    key: str
    form: Format
    better: str = ""

    @classmethod
    def of(cls, metric: Metric, place: str = "") -> Self:
        """A metric's column.

        Args:
            metric: what is declared of it.
            place: stands before its name in the row, as "preferences" or, in what several stages counted, the stage.
        """
        key = f"{place}/{metric.name}" if place else metric.name
        return cls(metric.heading, metric.meaning, key, FORMS[metric.unit], metric.arrow)

    def head(self) -> str:
        """The heading, explained to those who point at it."""
        better = f' data-better="{self.better}"' if self.better else ""
        return f'<th scope="col" title="{escape(self.meaning)}"{better}><span>{escape(self.heading)}</span></th>'

    def cell(self, row: Row) -> str:
        """The value, and its interval in small letters."""
        value, interval = self.value(row)
        return f"<td{by_size(row.get(self.key))}>{value}{f' <small>{interval}</small>' if interval else ''}</td>"

    def value(self, row: Row) -> tuple[str, str]:
        """The value as text, and its interval where the row has `<key>_low` and `<key>_high`."""
        low, high = row.get(f"{self.key}_low"), row.get(f"{self.key}_high")
        interval = f"[{self.form(low)}, {self.form(high)}]" if is_number(low) and is_number(high) else ""
        return show(row.get(self.key), self.form), interval


def is_number(value: object) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return isinstance(value, int | float) and math.isfinite(value)


def by_size(value: object) -> str:
    """The attribute that a cell's number is sorted by, with all its digits."""
    return f' data-sort="{value!r}"' if is_number(value) else ""


def show(value: object, form: Format) -> str:
    """A number as text; a text as it is; a dash where there is neither."""
    if isinstance(value, str):
        return escape(value)
    return form(value) if is_number(value) else NOTHING


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.0f}\u00a0%".replace("-", "\u2212")


def decimals(digits: int) -> Format:
    """Numbers with so many digits behind the point."""
    return lambda value: f"{value:,.{digits}f}".replace("-", "\u2212").replace(",", "\u00a0")


def compact(value: float) -> str:
    """A number with the three digits that count."""
    return f"{value:.3g}".replace("-", "\u2212")


FORMS: Mapping[str, Format] = {
    "share": percent,
    **dict.fromkeys(("count", "flag", "tokens", "characters", "words", "tokens/s"), decimals(0)),
    **dict.fromkeys(("ratio", "correlation", "nats", "GiB", "currency"), decimals(2)),
    **dict.fromkeys(("reward", "score", "score²"), decimals(3)),
    **dict.fromkeys(("reward/token", "nats/token"), decimals(4)),
    "s": duration,
    "": compact,
}
"""How a number is written in a table, by its metric's unit."""

CHART_FORMS: Mapping[str, Format] = {**FORMS, **dict.fromkeys(("reward", "nats", "nats/token"), compact)}
"""The same at an axis, which may span little."""


def document(name: str, kind: str, opening: str, parts: Mapping[str, str], script: str = "") -> str:
    """A page that needs nothing else.

    Args:
        name: of what it tells; a text.
        kind: what it is, in small letters above the name; a text.
        opening: HTML before the sections.
        parts: {title: HTML} of the sections; one without any is left out.
        script: what makes it nicer to use where scripts run.
    """
    there = {title.lower().replace(" ", "-"): (title, body) for title, body in parts.items() if body}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in there.items())
    sections = "".join(
        f'<section id="{key}"><h2>{title}</h2>\n{body}</section>\n' for key, (title, body) in there.items()
    )
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} · selfalign</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="eyebrow">selfalign · {escape(kind)}</p>
<h1>{escape(name)}</h1>
{opening}<nav>{links}</nav>
</header>
<main>
{sections}</main>
{f"<script>{script}</script>" if script else ""}</body>
</html>
"""


def strong(text: object) -> str:
    """A text that stands out."""
    return f"<b>{escape(str(text))}</b>"


def note(text: str) -> str:
    """A remark in small letters; HTML."""
    return f'<p class="note">{text}</p>\n'


def fold(summary: str, body: str) -> str:
    """HTML that is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def preformatted(text: str) -> str:
    """A text with its line breaks."""
    return f"<pre>{escape(text)}</pre>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what there is to say of them, as a list; both are texts."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(said)}</dd>' for name, said in pairs)}</dl>\n"


def present(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The first column, which names the rows, and those others that have a value anywhere."""
    first, *rest = columns
    return [first, *(c for c in rest if any(show(row.get(c.key), c.form) != NOTHING for row in rows))]


def table(label: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table that scrolls in its own box.

    Args:
        label: for screen readers.
        columns: the first names the rows; others without any value are left out.
        rows: one with a "class" looks as the style sheet says.
    """
    first, *there = present(columns, rows)
    head = "".join(column.head() for column in [first, *there])
    body = "".join(
        f'<tr{looks(row)}><th scope="row"{by_size(row[first.key])}>{show(row[first.key], first.form)}</th>'
        f"{''.join(column.cell(row) for column in there)}</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def looks(row: Row) -> str:
    """The class attribute of a row that has one."""
    return f' class="{row["class"]}"' if row.get("class") else ""


def bars(rows: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """Horizontal bars: (name, lengths of its parts, what is written beside it)."""
    longest = max((math.fsum(lengths) for _, lengths, _ in rows), default=0) or 1
    items = "".join(
        f"<li><span>{escape(name)}</span><div>"
        f'{"".join(f"""<i style="--share:{length / longest:.4f}"></i>""" for length in lengths)}'
        f"<b>{escape(said)}</b></div></li>\n"
        for name, lengths, said in rows
    )
    return f'<ol class="bars">{items}</ol>\n'


def figure(title: str, caption: str, svg: str, names: Sequence[str] = ()) -> str:
    """A chart with its title, what it shows, and the names of its series in their colours."""
    keys = "".join(f'<i style="color:var(--series-{n})">{escape(name)}</i> ' for n, name in enumerate(names, start=1))
    return f"<figure><figcaption><b>{escape(title)}</b> {keys}{escape(caption)}</figcaption>{svg}</figure>\n"


def grid(figures: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>\n' if inside else ""


def card(sample: Sample, names: Sequence[str] = ()) -> str:
    """An instruction with its candidates side by side; `names` says who wrote each."""
    heads = [*names, *[""] * (len(sample.candidates) - len(names))]
    form = telling_apart([c.score for c in sample.candidates if c.score is not None])
    shown = "".join(candidate_html(c, name, form) for c, name in zip(sample.candidates, heads, strict=True))
    return (
        f'<article><p class="instruction">{escape(sample.instruction)}</p>'
        f'<div class="candidates">{shown}</div></article>\n'
    )


def telling_apart(scores: Sequence[float]) -> Format:
    """Decimals enough that scores which differ look different: two to five."""
    return next((decimals(n) for n in (2, 3, 4) if len({round(s, n) for s in scores}) == len({*scores})), decimals(5))


def candidate_html(candidate: Candidate, name: str, form: Format) -> str:
    """A response with its mark, its mean score, and the judgements on demand."""
    said = [f"<b>{escape(name)}</b>"] if name else []
    if candidate.role:
        said.append(f'<mark class="{escape(candidate.role)}">{MARKS[candidate.role]}</mark>')
    if candidate.score is not None or candidate.judgements:
        said.append(f'<span class="score">{show(candidate.score, form)}</span>')
    if not candidate.finished:
        said.append('<span class="cut">cut at the token limit</span>')
    text = f'<p class="text">{escape(candidate.text)}</p>' if candidate.text else '<p class="text empty">(empty)</p>'
    judged = "".join(judgement_html(judgement) for judgement in candidate.judgements)
    folded = fold(plural(len(candidate.judgements), "judgement"), judged) if judged else ""
    return f'<div class="candidate {candidate.role}"><p class="head">{" ".join(said)}</p>{text}{folded}</div>\n'


def judgement_html(judgement: Judgement) -> str:
    """What the judge said, and what came of it."""
    came = show(judgement.score, decimals(2)) if judgement.score is not None else judgement.status.replace("_", " ")
    entropy = "" if judgement.entropy is None else f", entropy {judgement.entropy:.2f} nats"
    return f'<p class="note">{came}{entropy}</p>{preformatted(judgement.text)}'


def explained(label: str, columns: Sequence[Column], rows: Sequence[Row], remark: str = "") -> str:
    """A table, a remark of HTML on it, and on demand what its columns mean."""
    meanings = facts((column.heading, column.meaning) for column in present(columns, rows))
    return table(label, columns, rows) + remark + fold("What the columns mean", meanings)
