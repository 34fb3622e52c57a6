"""Effects between the settings of a comparison: instruction by instruction, with Holm's correction for all of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations

from selfalign.core.formatting import plural
from selfalign.metrics.catalog import declared
from selfalign.metrics.replicates import Effect, Units, effect, holm
from selfalign.report.comparison_sentences import named
from selfalign.report.html import Column, Format, compact, decimals, explained, form_of, note
from selfalign.report.instruction_values import instruction_values
from selfalign.report.jobs import SEED, JobComparison, JobResult

MOST = 15
"""Most comparisons that a table lists; if there are more, it lists those with the best setting."""

LEVEL = 0.05
"""A comparison survives if its corrected p-value is below."""


@dataclass(frozen=True, slots=True)
class ComparedJobs:
    """Two settings and the effect between them.

    Attributes:
        first: the one with the better mean, or of equal ones the first.
        second: the other.
        effect: of the first minus the second.
        corrected: the effect's p-value after Holm's correction for all comparisons of the page.
    """

    first: JobResult
    second: JobResult
    effect: Effect
    corrected: float

    @property
    def survives(self) -> bool:
        """Whether the difference is clear after the correction."""
        return self.corrected < LEVEL


def compared_jobs(comparison: JobComparison) -> list[ComparedJobs]:
    """Compare the last models of every two settings by the metric of the ranking, the best setting first.

    All pairs are compared and corrected for, because the best setting is only known from the same numbers. The list is
    empty if the records of a setting do not have the metric instruction by instruction.
    """
    values = [(job, _seeds(job, comparison.metric)) for job in comparison.ranked]
    known = [(job, seeds) for job, seeds in values if all(seeds.values())]
    if len(known) < len(values):
        return []
    effects = [(a, b, effect(first, second)) for (a, first), (b, second) in combinations(known, 2)]
    corrected = holm([found.p for _, _, found in effects])
    return [ComparedJobs(a, b, found, p) for (a, b, found), p in zip(effects, corrected, strict=True)]


def _seeds(job: JobResult, metric: str) -> dict[int, Units]:
    """Return {seed: {instruction: value}} of a group's last models."""
    return {
        one.settings.get(SEED, 0): instruction_values(one.run, job.last["model"], metric) for one in job.each if one.run
    }


def effects_table(comparison: JobComparison, found: Sequence[ComparedJobs]) -> str:
    """Return the table of comparisons, and how they were made."""
    if not found:
        return ""
    listed = found if len(found) <= MOST else [one for one in found if one.first is comparison.ranked[0]]
    form, p_value = difference_form(comparison.metric), _p_value
    columns = [
        Column("setting", "the one with the better value", "first", compact),
        Column("compared with", "the other one", "second", compact),
        Column("difference", f"of {comparison.metric}, the first minus the second, with its 95 % interval", "d", form),
        Column("p", "two-sided p-value of no difference", "p", p_value),
        Column("p by Holm", f"the same, corrected for all {len(found)} comparisons", "corrected", p_value),
        Column("survives", f"whether the corrected p-value is below {LEVEL}", "survives", compact),
        Column("higher", "instructions on which the first has the higher value, as its mean over seeds", "higher", _n),
        Column("lower", "instructions on which it has the lower value", "lower", _n),
        Column("sign test p", "two-sided p-value of the exact sign test of these", "sign_p", p_value),
        Column("instructions", "instructions that both answered; of the one with fewer if unpaired", "units", _n),
        Column("seeds", "seeds compared", "seeds", _n),
        Column("pairs", "whether both answered the same instructions", "paired", compact),
    ]
    rows = [
        {
            "first": named(comparison, one.first),
            "second": named(comparison, one.second),
            "d": one.effect.difference.value,
            "d_low": one.effect.difference.low,
            "d_high": one.effect.difference.high,
            "p": one.effect.p,
            "corrected": one.corrected,
            "survives": "yes" if one.survives else "no",
            "higher": one.effect.higher if one.effect.paired else None,
            "lower": one.effect.lower if one.effect.paired else None,
            "sign_p": one.effect.sign_p,
            "units": one.effect.units,
            "seeds": one.effect.seeds,
            "paired": "paired" if one.effect.paired else "unpaired",
        }
        for one in listed
    ]
    return explained("comparisons", columns, rows, note(escape(" ".join(_remarks(listed, found)))))


def _remarks(listed: Sequence[ComparedJobs], found: Sequence[ComparedJobs]) -> list[str]:
    remarks: list[str] = []
    if any(one.effect.paired and one.effect.seeds == 1 for one in listed):
        remarks.append("With one seed: paired bootstrap interval over instructions, p by the exact sign test.")
    if any(one.effect.paired and one.effect.seeds > 1 for one in listed):
        remarks.append(
            "With several seeds: interval and p by a mixed model of seeds and instructions; the sign test is about "
            "these seeds alone."
        )
    if any(not one.effect.paired for one in listed):
        remarks.append("Unpaired: these did not answer the same instructions, so p is Welch's t-test's.")
    rest = f"; the others, without the best setting, are not listed. All {len(found)} are" if listed != found else ""
    remarks.append(f"{plural(len(listed), 'comparison')}{rest} corrected together.")
    return remarks


def difference_form(metric: str) -> Format:
    """Return the format of a metric's differences: points for shares, else as the metric, with a sign."""
    known, form = declared(metric), form_of(metric)
    of_shares = known is not None and known.unit in ("share", "share difference")
    shown: Callable[[float], str] = (lambda d: f"{decimals(0)(100 * d)} points") if of_shares else form
    return lambda difference: f"+{shown(difference)}" if difference > 0 else shown(difference)


def effect_sentence(comparison: JobComparison, found: Sequence[ComparedJobs]) -> str:
    """Return how the best setting compares with the next: effect, interval, p, and how many comparisons it survives.

    Args:
        comparison: the jobs.
        found: `compared_jobs`; those of the best setting come first.
    """
    if not found:
        return ""
    best = comparison.ranked[0]
    own = [one for one in found if one.first is best]
    first, survived = own[0], sum(one.survives for one in own)
    form, value = difference_form(comparison.metric), own[0].effect.difference
    between = f", 95\u00a0% interval {form(value.low)} to {form(value.high)}" if math.isfinite(value.low) else ""
    seeds = f" and {plural(first.effect.seeds, 'seed')}" if first.effect.seeds > 1 else ""
    how = (
        f"on the {plural(first.effect.units, 'instruction')}{seeds} that both have"
        if first.effect.paired
        else "unpaired, because they did not answer the same instructions"
    )
    against = f"Against the next, {escape(named(comparison, first.second))}, {how}: {form(value.value)}{between}"
    open_ones = [str(one.second.number) for one in own if not one.survives]
    kept = f"It survives {survived} of {plural(len(own), 'comparison')} with others"
    corrected = f"Holm's correction for {plural(len(found), 'comparison')}"
    unsure = f" <b>This is not certain:</b> it cannot be told apart from {', '.join(open_ones)}." if open_ones else ""
    return f"{against}, p\u00a0{_equals(first.effect.p)}. {kept} after {corrected}.{unsure}"


def _p_value(p: float) -> str:
    return "&lt;\u00a00.001" if p < 0.001 else f"{p:.3f}"


def _equals(p: float) -> str:
    return "&lt;\u00a00.001" if p < 0.001 else f"=\u00a0{p:.2g}" if math.isfinite(p) else "unknown"


_n = decimals(0)
