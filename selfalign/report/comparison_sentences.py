"""Sentences of a comparison: what differs, which job is best and how certain that is. They are HTML, escaped here."""

import math
from collections import Counter
from collections.abc import Iterator
from html import escape
from typing import Any

from selfalign.core.files import digest_json
from selfalign.core.formatting import duration, plural
from selfalign.data.mixtures import parts_of
from selfalign.metrics import catalog
from selfalign.metrics.catalog import METRICS
from selfalign.report.html import fold, form_of, percent, strong
from selfalign.report.instruments import INSTRUMENTS, Standing, figures
from selfalign.report.jobs import FEW, JobComparison, JobResult, costs, seconds_alone
from selfalign.report.sentences import warnings
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished

LUCK = "The best of several jobs leads partly by chance; runs with other seeds show by how much."
SOURCES = {
    Label.input("questions"): "evaluate.instructions",
    Label.input("given_outputs"): "evaluate.reference_outputs",
    Label.input("validation"): "train.checkpoint_selection.instructions",
    Label.input("instructions"): "data.instruct.source",
    Label.iteration(1, "pairs"): "data.path",
    Label.input("preferences", "pairs"): "evaluate.preference_pairs.source",
}
"""{artifact that is read from data: the setting that names the data}."""

OUTSIDE = {
    Label.input("writer"): "data.instruct.model",
    Label.input("judge"): "judge.model",
    Label.input("comparator"): "evaluate.head_to_head.model",
    Label.input("preferences", "judge"): "evaluate.preference_pairs.judge.model",
    Label.input("checkpoint_judge"): "train.checkpoint_selection.head_to_head.model",
}
"""The settings that name the models which only write or judge."""

LISTED = 8
"""Maximum number of listed values of a setting."""


def what_differs(comparison: JobComparison) -> str:
    """Return the number of jobs, their states, and the settings in which they differ."""
    counted = Counter(job.state for job in comparison.jobs)
    states = ", ".join(f"{count} {escape(state)}" for state, count in counted.items())
    jobs = f"{strong(plural(len(comparison.jobs), 'job'))} ({states})"
    if not comparison.keys:
        return f"{jobs} with the same settings."
    settings = [f"{strong(key)} ({escape(listed(comparison, key))})" for key in comparison.keys]
    if len(settings) > FEW:
        settings = [f"{strong(len(settings))} settings, {', '.join(map(strong, comparison.keys[:FEW]))} among them"]
    return f"{jobs} that differ in {', '.join(settings)}.{replicated(comparison)}"


def replicated(comparison: JobComparison) -> str:
    """Return a sentence about the jobs that differ only in their seed; empty if there are none."""
    if not comparison.has_replicates:
        return ""
    return (
        f" Those that differ only in their seed are one setting: {strong(plural(len(comparison.groups), 'setting'))}."
    )


def listed(comparison: JobComparison, key: str) -> str:
    """Return the values of a setting, in the order of the table."""
    texts = list(comparison.texts[key].values())
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return ", ".join(texts[:LISTED]) + more


def verdict(comparison: JobComparison, compared: str = "") -> str:
    """Return the best job, whether it can be told apart from others, and the time of all jobs; see `best`."""
    if not comparison.finished:
        return '<p class="verdict"><b>No job has finished</b>, so there is nothing to compare yet.</p>\n'
    return f'<p class="verdict">{blind(comparison)}{best(comparison, compared)} {cost(comparison)}</p>\n'


def blind(comparison: JobComparison) -> str:
    """Return in which jobs the judge of a win rate did not pass its measurement; empty for other metrics."""
    judge = next((one for one in INSTRUMENTS if one.win_rate.name == comparison.metric), None)
    runs = [(job, job.run) for job in comparison.finished if job.run]
    unable = [job for job, run in runs if judge and judge.standing(run, job.last) is Standing.BLIND]
    if judge is None or not unable:
        return ""
    numbers = ", ".join(str(job.number) for job in unable)
    which = "in all jobs" if len(unable) == len(runs) else f"in {'jobs' if len(unable) > 1 else 'job'} {numbers}"
    first = f"In job {unable[0].number} {figures(unable[0].last, judge.name)}."
    return f"<b>Blind {which}:</b> the judge behind this metric did not pass its measurement. {first} "


def best(comparison: JobComparison, compared: str = "") -> str:
    """Return the job with the best value of the metric, and how certain that is.

    Args:
        comparison: the jobs; those that differ only in their seed are one, a setting.
        compared: how the best compares with others, instruction by instruction; empty compares intervals.
    """
    metric, ranked = comparison.metric, comparison.ranked
    name = METRICS[metric].heading if metric in METRICS else metric
    if not ranked:
        return f"No job has the metric {strong(name)}, so no job is the best."
    first, form = ranked[0], form_of(metric)
    low, high = comparison.interval(first)
    value, most = strong(form(first.last[metric])), f"{comparison.extreme} {escape(name)}"
    if len(even := comparison.even) > 1:
        all_of_them = "All" if len(even) == len(ranked) else f"Jobs {', '.join(str(job.number) for job in even)}"
        return f"<b>{all_of_them} have the same {most}</b>, {value}, so this metric does not tell them apart."
    one = "Setting" if first.seeds else "Job"
    found = f"<b>{one} {escape(named(comparison, first))}</b> has the {most}, {value}"
    if not math.isfinite(low):
        return f"{found}. It has no interval, so it is not known how certain this is."
    found = f"{found} (95\u00a0% interval {form(low)} to {form(high)})."
    if len(ranked) == 1:
        return f"{found} No other job has this metric."
    if compared:
        return f"{found} {compared}{'' if comparison.has_replicates else f' {LUCK}'}"
    if rivals := comparison.rivals():
        many = len(rivals) > 1
        which = (
            f"jobs {', '.join(str(job.number) for job in rivals)}" if many else f"job {named(comparison, rivals[0])}"
        )
        overlap = f"whose {'intervals overlap' if many else 'interval overlaps'} with its own"
        return f"{found} <b>This is not certain:</b> it cannot be told apart from {escape(which)}, {overlap}. {LUCK}"
    return f"{found} No other job's interval reaches it. {LUCK}"


def named(comparison: JobComparison, job: JobResult) -> str:
    """Return a job's number and description. A setting has the number of its first job."""
    mean = f"; mean of jobs {', '.join(str(one.number) for one in job.seeds)}" if job.seeds else ""
    return f"{job.number} ({comparison.description(job)}{mean})"


def cost(comparison: JobComparison) -> str:
    """Return the time of the finished jobs together, and the time that they would take without sharing artifacts."""
    made = math.fsum(cost.made for cost in costs(comparison.finished, lambda label, stage: stage).values())
    alone = math.fsum(map(seconds_alone, comparison.finished))
    if made == alone:
        return f"All jobs together took {strong(duration(made))}; they share no artifacts."
    share = percent(made / alone)
    each = f"the {duration(alone)} that they would take without sharing artifacts"
    return f"All jobs together took {strong(duration(made))}, {share} of {each}."


def opponents(comparison: JobComparison) -> str:
    """Return whose answers the win rates compare with, and whether these are the same for all jobs."""
    answered = comparison.by_key(Label.evaluation("M1", "answers"))
    if not answered:
        return "Metrics are those of each job's last model."
    win_rates = "Metrics are those of each job's last model. Win rates compare its answers with M1's"
    if not comparison.alike_by_seed(answered):
        return f"{win_rates}. The jobs do not share one M1, so win rates of different jobs have different opponents."
    if len(answered) > 1:
        return f"{win_rates}. All jobs of one seed share their M1 and its answers."
    if any(key.startswith("evaluate.") for key in comparison.keys):
        return f"{win_rates}. All jobs share this M1, but the evaluation settings differ (evaluate.*)."
    return f"{win_rates}. All jobs share this M1 and its answers."


def changed_sources(comparison: JobComparison) -> list[str]:
    """Return `setting=source` of data and models whose content differs between jobs."""
    found: dict[tuple[str, str], set[str]] = {}
    for run in comparison.runs:
        for setting, source, content in contents(run):
            found.setdefault((setting, source), set()).add(content)
    return [f"{setting}={source}" for (setting, source), several in found.items() if len(several) > 1]


def contents(run: Finished) -> Iterator[tuple[str, str, str]]:
    """Yield (setting, source, digest of its content) of the data and the models that a run was given."""
    yield from _contents_of_models(run)
    yield from _contents_of_benchmarks(run)
    seeds = run.inputs(Label.input("seeds"))
    sources = [(name, seeds["config"][name]) for name in ("demonstrations", "ranked")] if "config" in seeds else []
    named = [(f"data.seed_data.{name}", source) for name, source in sources if source]
    given = [(*one, content) for one, content in zip(named, seeds.get("contents", ()), strict=False)]
    inputs = [(setting, run.inputs(label)) for label, setting in SOURCES.items()]
    given += [(setting, made["source"], made["content"]) for setting, made in inputs if "content" in made]
    for setting, source, content in given:
        yield from ((setting, *part) for part in parts_of(source, content))


def _contents_of_models(run: Finished) -> Iterator[tuple[str, str, str]]:
    """Yield those of M0, its chat template, and the models that only write or judge."""
    if weights := run.provenance.get("weights", {}).get("M0"):
        yield "model.path", run.config["model"]["path"], weights
    if (loaded := run.inputs(Label.model("M0"))) and (template := loaded["model"]["chat_template"]):
        yield "model.chat_template", template, loaded["source"]
    for label in run.stages:
        setting = f"benchmark.{label.part}.judge.model" if label.owner == "judges" else OUTSIDE.get(label)
        if setting and "source" in (loaded := run.inputs(label)):
            yield setting, loaded["model"]["path"], loaded["source"]


def _contents_of_benchmarks(run: Finished) -> Iterator[tuple[str, str, str]]:
    """Yield those of the files that benchmarks read: named by a setting, or in a folder of tasks."""
    for name, settings in run.config.get("benchmark", {}).items():
        measured = next((label for label in run.stages if label.model_name and label.part == name), None)
        named = {f"baselines.{category}": source for category, source in settings.get("baselines", {}).items()}
        known = {**(settings.get("judge") or {}), **settings, **named}
        for key, content in run.inputs(measured).get("contents", {}).items() if measured else ():
            yield (
                (f"benchmark.{name}.{key}", known[key], content)
                if key in known
                else (f"benchmark.{name}", key, content)
            )


def judged_apart(comparison: JobComparison) -> list[str]:
    """Return the metrics for which different judges judged the last models: each job's own M1, or other rubrics.

    Benchmarks of the runs' own judges are left out: there the judge is what is measured. Replicates of a setting may
    have a judge for each seed, if jobs of one seed have the same.
    """
    judges: dict[str, dict[str, list[JobResult]]] = {}
    for job in comparison.finished:
        if job.run is None:
            continue
        model = job.last["model"]
        places = {
            catalog.EVAL_WIN_RATE.name: Label.comparison(model, "M1"),
            catalog.EVAL_MEAN_SCORE.name: Label.evaluation(model, "scores"),
            **{
                name: Label.evaluation(model, name)
                for name, settings in job.run.config.get("benchmark", {}).items()
                if settings.get("judge", {}) is not None
            },
        }
        for metric, label in places.items():
            if inputs := job.run.inputs(label):
                judges.setdefault(metric, {}).setdefault(_judge_of(inputs), []).append(job)
    return [metric for metric, several in judges.items() if not comparison.alike_by_seed(several)]


def _judge_of(inputs: dict[str, Any]) -> str:
    """Return the digest of a judge's weights and settings, from the inputs of the stage that it judged in.

    The setting that names its model is left out: the weights tell more, and a server's name is in its endpoint.
    """
    weights, settings = inputs.get("policy"), inputs.get("judge")
    if "benchmark" in inputs:
        weights, settings = settings, inputs["benchmark"].get("judge")
    if isinstance(settings, dict):
        settings = {name: value for name, value in settings.items() if name != "model"}
    return digest_json([weights and weights["digest"], settings])


def caveats(comparison: JobComparison) -> str:
    """Return what makes the metrics of different jobs less comparable than they look."""
    notes: list[str] = []
    if not comparison.alike_by_seed(comparison.by_key(Label.evaluation("M1", "answers"))):
        notes.append(opponents(comparison))
    if apart := judged_apart(comparison):
        notes.append(
            f"Judges of different weights or settings judged the jobs, so these do not compare: {', '.join(apart)}."
        )
    if len({len(job.models) for job in comparison.finished}) > 1:
        notes.append("The jobs made different numbers of models; each job is represented by its last model.")
    if len({run.provenance["commit"] + run.provenance["diff"] for run in comparison.runs}) > 1:
        notes.append("The jobs ran on different states of the code.")
    if changed := changed_sources(comparison):
        notes.append(f"The same setting named different data or models in different jobs: {', '.join(changed)}.")
    html = "".join(f'<p class="note">{escape(text)}</p>\n' for text in notes)
    warned = {job.number: warnings(job.run) for job in comparison.finished if job.run}
    bodies = [f"<h3>Job {number}</h3>\n{body}" for number, body in warned.items() if body]
    return html + (fold(f"Warnings of {plural(len(bodies), 'job')}", "".join(bodies)) if bodies else "")
