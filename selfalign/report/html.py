"""Pieces of the report's HTML: numbers, tables, figures and candidates. Text of records is escaped here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self, TypeGuard

from selfalign.core.formatting import duration, plural
from selfalign.core.records import Judgement
from selfalign.metrics.catalog import Metric, declared
from selfalign.runs.reader import Candidate, Sample

Row = Mapping[str, Any]
Format = Callable[[float], str]

NOTHING = "–"
"""Text of a missing number."""

MARKS = {
    "chosen": "✓ chosen",
    "rejected": "✕ rejected",
    "desirable": "✓ desirable",
    "undesirable": "✕ undesirable",
    "positive": "✓ kept",
    "winner": "higher score",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: its title.
        meaning: what the title means.
        key: of its values in a row.
        form: formats a number.
        better: an arrow in the better direction; empty for none.
    """

    heading: str
    meaning: str
    key: str
    form: Format
    better: str = ""

    @classmethod
    def of(cls, metric: Metric, place: str = "") -> Self:
        """Return the column of a metric.

        Args:
            metric: the declared metric.
            place: prefix of its name in the row, such as "preferences" or the stage that counted it; empty for none.
        """
        key = f"{place}/{metric.name}" if place else metric.name
        return cls(metric.heading, metric.meaning, key, FORMS[metric.unit], metric.arrow)

    def head(self) -> str:
        """Return the heading cell, with the meaning as its tooltip."""
        better = f' data-better="{self.better}"' if self.better else ""
        return f'<th scope="col" title="{escape(self.meaning)}"{better}><span>{escape(self.heading)}</span></th>'

    def cell(self, row: Row) -> str:
        """Return the cell of a row: the value, and its interval in small text."""
        value, interval = self.value(row)
        return f"<td{by_size(row.get(self.key))}>{value}{f' <small>{interval}</small>' if interval else ''}</td>"

    def value(self, row: Row) -> tuple[str, str]:
        """Return the value as text, and its interval if the row has `<key>_low` and `<key>_high`."""
        low, high = row.get(f"{self.key}_low"), row.get(f"{self.key}_high")
        interval = f"[{self.form(low)}, {self.form(high)}]" if is_number(low) and is_number(high) else ""
        return show(row.get(self.key), self.form), interval


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def by_size(value: object) -> str:
    """Return the attribute with all digits of a number, by which the page sorts a column."""
    return f' data-sort="{value!r}"' if is_number(value) else ""


def show(value: object, form: Format) -> str:
    """Return a number as text, a text as it is, and a dash for anything else."""
    if isinstance(value, str):
        return escape(value)
    return form(value) if is_number(value) else NOTHING


def percent(value: float) -> str:
    """Format a share in per cent."""
    return f"{100 * value:.0f}\u00a0%".replace("-", "\u2212")


def decimals(digits: int) -> Format:
    """Return a format with `digits` digits after the decimal point."""
    return lambda value: f"{value:,.{digits}f}".replace("-", "\u2212").replace(",", "\u00a0")


def compact(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:.3g}".replace("-", "\u2212")


FORMS: Mapping[str, Format] = {
    **dict.fromkeys(("share", "share difference"), percent),
    **dict.fromkeys(("count", "flag", "tokens", "characters", "words", "tokens/s"), decimals(0)),
    **dict.fromkeys(("ratio", "correlation", "nats", "GiB", "currency"), decimals(2)),
    **dict.fromkeys(("reward", "score", "score²"), decimals(3)),
    **dict.fromkeys(("reward/token", "nats/token"), decimals(4)),
    "s": duration,
    "": compact,
}
"""{unit of a metric: format of its numbers in tables}."""

CHART_FORMS: Mapping[str, Format] = {**FORMS, **dict.fromkeys(("reward", "nats", "nats/token"), compact)}
"""{unit of a metric: format of its numbers at an axis, which may span a small range}."""


def form_of(metric: str) -> Format:
    """Return the format of a metric's numbers, by its unit where it is declared."""
    known = declared(metric)
    return FORMS[known.unit] if known else compact


def document(
    name: str, kind: str, opening: str, parts: Mapping[str, str], script: str = "", reload_seconds: int = 0
) -> str:
    """Return a self-contained page.

    Args:
        name: title of the page, as text.
        kind: line above the title, as text.
        opening: HTML before the sections.
        parts: {title: HTML} of the sections; an empty one is left out.
        script: JavaScript; the page also works without it.
        reload_seconds: after which a browser reads the page again; 0 for never.
    """
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}">\n' if reload_seconds else ""
    shown = {title.lower().replace(" ", "-"): (title, body) for title, body in parts.items() if body}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in shown.items())
    sections = "".join(
        f'<section id="{key}"><h2>{title}</h2>\n{body}</section>\n' for key, (title, body) in shown.items()
    )
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{reload}<meta name="viewport" content="width=device-width, initial-scale=1">
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
    """Return a text in bold."""
    return f"<b>{escape(str(text))}</b>"


def note(text: str) -> str:
    """Return HTML as a paragraph of small text."""
    return f'<p class="note">{text}</p>\n'


def fold(summary: str, body: str) -> str:
    """Return HTML that is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def preformatted(text: str) -> str:
    """Return a text with its line breaks."""
    return f"<pre>{escape(text)}</pre>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return (name, description) pairs as a list; both are texts."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in pairs)}</dl>\n"


def present(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Return the first column, which names the rows, and the others that have a value in any row."""
    first, *rest = columns
    return [first, *(c for c in rest if any(show(row.get(c.key), c.form) != NOTHING for row in rows))]


def table(label: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return a table that scrolls in its own box.

    Args:
        label: for screen readers.
        columns: the first names the rows; others without any value are left out.
        rows: a "class" in a row becomes its CSS class.
    """
    first, *others = present(columns, rows)
    head = "".join(column.head() for column in [first, *others])
    body = "".join(
        f'<tr{looks(row)}><th scope="row"{by_size(row[first.key])}>{show(row[first.key], first.form)}</th>'
        f"{''.join(column.cell(row) for column in others)}</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def looks(row: Row) -> str:
    """Return the class attribute of a row that has one."""
    return f' class="{row["class"]}"' if row.get("class") else ""


def bars(rows: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """Return horizontal bars from (name, lengths of the parts, text beside the bar)."""
    longest = max((math.fsum(lengths) for _, lengths, _ in rows), default=0) or 1
    items = "".join(
        f"<li><span>{escape(name)}</span><div>"
        f'{"".join(f"""<i style="--share:{length / longest:.4f}"></i>""" for length in lengths)}'
        f"<b>{escape(text)}</b></div></li>\n"
        for name, lengths, text in rows
    )
    return f'<ol class="bars">{items}</ol>\n'


def figure(title: str, caption: str, svg: str, names: Sequence[str] = ()) -> str:
    """Return a chart with title, caption, and the names of its series in their colours."""
    keys = "".join(f'<i style="color:var(--series-{n})">{escape(name)}</i> ' for n, name in enumerate(names, start=1))
    return f"<figure><figcaption><b>{escape(title)}</b> {keys}{escape(caption)}</figcaption>{svg}</figure>\n"


def grid(figures: Iterable[str]) -> str:
    """Return figures side by side, as many as fit."""
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>\n' if inside else ""


def card(sample: Sample, names: Sequence[str] = ()) -> str:
    """Return an instruction with its candidates side by side; `names` are the models that wrote them."""
    heads = [*names, *[""] * (len(sample.candidates) - len(names))]
    form = telling_apart([c.score for c in sample.candidates if c.score is not None])
    shown = "".join(candidate_html(c, name, form) for c, name in zip(sample.candidates, heads, strict=True))
    return (
        f'<article><p class="instruction">{escape(sample.instruction)}</p>'
        f'<div class="candidates">{shown}</div></article>\n'
    )


def telling_apart(scores: Sequence[float]) -> Format:
    """Return a format with enough decimals, two to five, that different scores look different."""
    return next((decimals(n) for n in (2, 3, 4) if len({round(s, n) for s in scores}) == len({*scores})), decimals(5))


def candidate_html(candidate: Candidate, name: str, form: Format) -> str:
    """Return a response with its role, its mean score, and its judgements on demand."""
    head = [f"<b>{escape(name)}</b>"] if name else []
    if candidate.role:
        head.append(f'<mark class="{escape(candidate.role)}">{MARKS[candidate.role]}</mark>')
    if candidate.score is not None or candidate.judgements:
        head.append(f'<span class="score">{show(candidate.score, form)}</span>')
    if not candidate.finished:
        head.append('<span class="cut">cut at the token limit</span>')
    text = f'<p class="text">{escape(candidate.text)}</p>' if candidate.text else '<p class="text empty">(empty)</p>'
    judged = "".join(judgement_html(judgement) for judgement in candidate.judgements)
    folded = fold(plural(len(candidate.judgements), "judgement"), judged) if judged else ""
    return f'<div class="candidate {candidate.role}"><p class="head">{" ".join(head)}</p>{text}{folded}</div>\n'


def judgement_html(judgement: Judgement) -> str:
    """Return a judgement: its score or status, the entropy, and the judge's text."""
    outcome = show(judgement.score, decimals(2)) if judgement.score is not None else judgement.status.replace("_", " ")
    entropy = "" if judgement.entropy is None else f", entropy {judgement.entropy:.2f} nats"
    return f'<p class="note">{outcome}{entropy}</p>{preformatted(judgement.text)}'


def explained(label: str, columns: Sequence[Column], rows: Sequence[Row], remark: str = "") -> str:
    """Return a table, an HTML remark on it, and the meanings of its columns on demand."""
    meanings = facts((column.heading, column.meaning) for column in present(columns, rows))
    return table(label, columns, rows) + remark + fold("What the columns mean", meanings)
