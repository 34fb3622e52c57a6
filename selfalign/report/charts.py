"""Draw the charts of the report as inline SVG.

Colours are CSS variables, so that one drawing serves light and dark pages. Text stays text. The same numbers give the
same bytes. Values that are not finite are left out.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from selfalign.report.html import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Format = Callable[[float], str]

VARIABLES = {
    "#fe0001": "var(--ink)",
    "#fe0002": "var(--muted)",
    "#fe0003": "var(--rule)",
    "#fe0004": "var(--paper)",
    **{f"#fe001{n}": f"var(--series-{n})" for n in range(1, 7)},
}
"""{colour in the drawing: CSS variable in the page}."""

INK, MUTED, RULE, PAPER, *COLOURS = VARIABLES

WIDTH = 340
"""Width of a chart in pixels. The page scales charts little, so that text keeps its size."""

SMOOTHED = 20
"""Minimum number of steps of a training curve that is drawn with its moving mean."""

TICKS = 12
"""Number of names that fit under a chart."""

BESIDE = 0.06
"""Distance of a faint point from its series' bar, in places along the x axis."""

TINT = 0.5
"""Opacity of the strongest tint of a heat map. Text on a stronger one is hard to read on a light or dark page."""

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        name: of the series; at the end of a curve it is written.
        points: (x, y).
        intervals: (low, high) of each y, drawn as a bar; empty for none.
        colour: index of the page's series colours, from 0.
        joined: whether a line connects the points.
        faint: further (x, y), such as the replicates of which the points are means.
    """

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    colour: int = 0
    joined: bool = True
    faint: Sequence[tuple[float, float]] = ()

    def finite(self) -> "Series":
        """Return the series without points whose y is not finite."""
        kept = [i for i, (_, y) in enumerate(self.points) if math.isfinite(y)]
        intervals = [self.intervals[i] for i in kept] if self.intervals else []
        points, colour = [self.points[i] for i in kept], self.colour % len(COLOURS)
        return replace(self, points=points, intervals=intervals, colour=colour)


def series_of(
    rows: Iterable[tuple[int, dict[str, Any]]], key: str, name: str = "", colour: int = 0, *, joined: bool = True
) -> Series:
    """Return the series of a metric over several models, with intervals where the rows have them.

    Args:
        rows: (x, row of a model); rows without the metric are left out.
        key: of the metric; `key_low` and `key_high` are the ends of its interval.
        name: as in `Series`, like `colour` and `joined`.
        colour: index of the series colour.
        joined: whether a line connects the points.
    """
    known = [(x, row) for x, row in rows if is_number(row.get(key))]
    return Series(
        name=name,
        points=[(x, row[key]) for x, row in known],
        intervals=[(row.get(f"{key}_low", row[key]), row.get(f"{key}_high", row[key])) for _, row in known],
        colour=colour,
        joined=joined,
    )


def draw_models(
    models: Sequence[str],
    series: Sequence[Series],
    title: str,
    form: Format,
    *,
    reference: float | None = None,
) -> str:
    """Draw the values of each model with their intervals; x is the model's index in `models`.

    Args:
        models: names along the x axis.
        series: the series; one or two have their values written beside the points.
        title: for screen readers.
        form: formats a value.
        reference: y of a dashed line, if there is one.
    """
    drawn = [one.finite() for one in series]
    with _Drawing(title, 210) as drawing:
        axes = drawing.axes(right=0.94)
        for place, one in enumerate(drawn):
            apart = min(0.16, 0.6 / len(drawn)) * (place - (len(drawn) - 1) / 2)
            _draw_points(axes, one, form if len(drawn) <= 2 else None, aside=apart, above=place == 0)
        axes.set_xlim(-0.35, len(models) - 1 + 0.65)
        shown = range(0, len(models), -(-len(models) // TICKS))
        axes.set_xticks(shown, [models[place] for place in shown])
        _finish(axes, form, reference)
    return drawing.svg


def draw_curves(series: Sequence[Series], title: str, form: Format, *, reference: float | None = None) -> str:
    """Draw training curves over optimizer steps, with the name at the end of each and a moving mean for long ones.

    Args:
        series: one for each model.
        title: for screen readers.
        form: formats a value of the y axis.
        reference: y of a dashed line, if there is one.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = [one for one in map(Series.finite, series) if one.points]
    with _Drawing(title, 220) as drawing:
        axes = drawing.axes(right=0.88, bottom=0.19)
        ends = [_draw_curve(axes, one, alpha=max(0.12, 0.36 / len(drawn))) for one in drawn]
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlabel("optimiser step")
        _finish(axes, form, reference)
        for one, place in zip(drawn, spread(_fractions(axes, ends), 0.09), strict=True):
            _write(axes, one.name, (1.0, place), "axes fraction", (7, 0), COLOURS[one.colour])
    return drawing.svg


def draw_histogram(counts: Sequence[int], low: int, peak: int, title: str, parts: int = 1) -> str:
    """Draw how often each score was given.

    Args:
        counts: of each bar, from `low` upwards.
        low: the lowest score.
        peak: the highest count over several histograms, so that their heights are comparable.
        title: for screen readers.
        parts: bars for each point of the scale; with one, each bar has its count above it.
    """
    with _Drawing(title, 150) as drawing:
        axes = drawing.axes(left=0.04, right=0.96, bottom=0.16, top=0.97)
        scores = [low + place / parts for place in range(len(counts))]
        axes.bar(scores, counts, width=0.82 / parts, color=COLOURS[0])
        for score, count in zip(scores, counts, strict=True):
            if parts == 1:
                _write(axes, str(count or ""), (score, count), "data", (0, 8), INK, centre=True)
        axes.set_xticks(scores[::parts], [f"{score:.0f}" for score in scores[::parts]])
        axes.set_ylim(0, max(peak, 1) * 1.2)
        axes.set_yticks([])
        _hide_frame(axes)
        axes.spines["bottom"].set_visible(True)
    return drawing.svg


def draw_heatmap(names: Sequence[str], values: Sequence[Sequence[float | None]], title: str, form: Format) -> str:
    """Draw a matrix of win rates; a cell is tinted towards 1 or towards 0, and has no tint at ½.

    The tints are transparent, so that text in the page's ink stays readable on all of them.

    Args:
        names: of the rows, and of the columns.
        values: a row of shares for each name; None or NaN for a missing one.
        title: for screen readers.
        form: formats a share.
    """
    from matplotlib.patches import Rectangle

    longest, size = max(map(len, names), default=0), len(names)
    with _Drawing(title, 40 + max(size, 3) * 44, "heat") as drawing:
        axes = drawing.axes(left=min(0.4, 0.05 + 0.022 * longest), right=0.99, bottom=0.02, top=1 - 30 / drawing.height)
        for row, column in product(range(size), repeat=2):
            given = values[row][column]
            share = math.nan if given is None else given
            known = math.isfinite(share)
            strength = min(1.0, abs(share - 0.5) * 2) if known else 0.0
            tint = COLOURS[0] if known and share > 0.5 else COLOURS[1]
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=tint, alpha=TINT * strength, linewidth=0))
            _write(axes, form(share) if known else "–", (column + 0.5, row + 0.5), "data", (0, 0), INK, centre=True)
        axes.set_xlim(0, size)
        axes.set_ylim(size, 0)
        middles = [place + 0.5 for place in range(size)]
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names)
        axes.xaxis.tick_top()
        axes.hlines(range(1, size), 0, size, color=PAPER, linewidth=2)
        axes.vlines(range(1, size), 0, size, color=PAPER, linewidth=2)
        _hide_frame(axes)
    return drawing.svg


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value with its neighbours, `width` values in all, and fewer at both ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return positions moved apart so that neighbours are at least `gap` apart; their order and mean stay."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    raised = math.fsum(moved) - math.fsum(places)
    return [place - raised / len(places) for place in moved]


def tick_labels(ticks: Sequence[float], form: Format) -> list[str]:
    """Return ticks as text, with more digits than `form` gives if they would look the same."""
    forms: list[Format] = [form, *(lambda tick, n=n: f"{tick:.{n}f}".replace("-", "\u2212") for n in range(2, 7))]
    labels = ([written(tick) for tick in ticks] for written in forms)
    return next((texts for texts in labels if len({*texts}) == len(texts)), [str(tick) for tick in ticks])


class _Drawing:
    """A figure: draw inside the `with` block, then read `svg`."""

    def __init__(self, title: str, height: int, kind: str = "plot") -> None:
        self.title = title
        self.height = height
        self.kind = kind
        self.svg = ""

    def __enter__(self) -> "_Drawing":
        # Importing matplotlib takes a second, which would delay the start of every run.
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self._context = rc_context({**SETTINGS, "svg.hashsalt": self.title})
        self._context.__enter__()
        self._figure = Figure(figsize=(WIDTH / 72, self.height / 72))
        return self

    def axes(self, *, left: float = 0.135, right: float, bottom: float = 0.12, top: float = 0.95) -> "Axes":
        """Add axes between these shares of the figure."""
        return self._figure.add_axes((left, bottom, right - left, top - bottom), facecolor="none")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                file = io.StringIO()
                self._figure.savefig(file, format="svg", transparent=True)
                self.svg = _inline(file.getvalue(), self.title, self.height, self.kind)
        finally:
            self._context.__exit__(None, None, None)


def _inline(svg: str, title: str, height: int, kind: str) -> str:
    """Return the SVG without prologue, date, styles and unused ids, which a page of several charts does not need."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    opening = f'<svg viewBox="0 0 {WIDTH} {height}" class="{kind}" role="img" aria-label="{escape(title)}">'
    return f"{opening}{body.strip()}</svg>"


def _draw_points(axes: "Axes", series: Series, form: Format | None, *, aside: float, above: bool) -> None:
    colour = COLOURS[series.colour]
    xs, ys = [x + aside for x, _ in series.points], [y for _, y in series.points]
    if series.joined:
        axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.5, zorder=2)
    for x, y, (low, high) in zip(xs, ys, series.intervals, strict=False):
        axes.plot([x, x], [min(low, y), max(high, y)], color=colour, linewidth=2.2, solid_capstyle="round", zorder=3)
    for x, y in series.faint:
        axes.plot(x + aside - BESIDE, y, "o", color=colour, markersize=4.5, alpha=0.45, markeredgewidth=0, zorder=3)
    axes.plot(xs, ys, "o", color=colour, markersize=7, markeredgecolor=PAPER, markeredgewidth=1.5, zorder=4)
    if form is None:
        return
    for i in range(len(xs)) if len(xs) <= 6 else (0, len(xs) - 1):
        _write(axes, form(ys[i]), (xs[i], ys[i]), "data", (7, 7 if above else -8), INK)


def _draw_curve(axes: "Axes", series: Series, alpha: float) -> float:
    """Draw a curve and return the height of its end. A smoothed curve shows its single steps at opacity `alpha`."""
    colour = COLOURS[series.colour]
    xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
    if len(ys) < SMOOTHED:
        axes.plot(xs, ys, color=colour, linewidth=1.8, marker="o", markersize=3.5)
        return ys[-1]
    smooth = moving_mean(ys, smoothing(len(ys)))
    axes.plot(xs, ys, color=colour, linewidth=1, alpha=alpha)
    axes.plot(xs, smooth, color=colour, linewidth=2)
    return smooth[-1]


def smoothing(steps: int) -> int:
    """Return the window of the moving mean for a curve of this length: a tenth of it, odd."""
    return steps // 10 | 1


def _finish(axes: "Axes", form: Format, reference: float | None) -> None:
    """Add a few ticks, horizontal rules and the reference line, and hide the frame."""
    from matplotlib.ticker import MaxNLocator

    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=1, dashes=(4, 3), zorder=1)
    low, high = axes.get_ylim()
    room = 0.12 * (high - low)
    axes.set_ylim(low - room, high + room)
    low, high = axes.get_ylim()
    ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high]
    axes.set_yticks(ticks, tick_labels(ticks, form))
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    _hide_frame(axes)


def _hide_frame(axes: "Axes") -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


def _fractions(axes: "Axes", heights: Sequence[float]) -> list[float]:
    low, high = axes.get_ylim()
    return [(height - low) / (high - low) for height in heights]


def _write(
    axes: "Axes",
    text: str,
    at: tuple[float, float],
    coordinates: str,
    offset: tuple[float, float],
    colour: str,
    *,
    centre: bool = False,
) -> None:
    axes.annotate(
        text,
        at,
        xycoords=coordinates,
        xytext=offset,
        textcoords="offset points",
        color=colour,
        ha="center" if centre else "left",
        va="center",
        annotation_clip=False,
    )
