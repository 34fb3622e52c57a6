"""Write the report of a run: its folder's files → one self-contained HTML page.

Texts of models and users are escaped. A section without data is left out.
"""

import math
from pathlib import Path
from typing import Any

from selfalign.core.files import write_atomically
from selfalign.core.formatting import duration, plural
from selfalign.metrics import catalog
from selfalign.metrics.catalog import Metric
from selfalign.report.charts import SMOOTHED, Series, draw_curves, smoothing
from selfalign.report.delta_map import delta_map
from selfalign.report.html import (
    CHART_FORMS,
    NOTHING,
    Column,
    bars,
    card,
    compact,
    decimals,
    document,
    explained,
    facts,
    figure,
    fold,
    grid,
    is_number,
    note,
    percent,
    preformatted,
    table,
)
from selfalign.report.instruments import headline_metric, instruments_table, verdict
from selfalign.report.model_charts import charts_over_models, of_models
from selfalign.report.sentences import progress_sentence, warnings, what_was_run
from selfalign.report.tables import (
    answers_table,
    benchmark_tables,
    comparisons_table,
    drift_table,
    histograms,
    judging_table,
    matrix,
    preferences_table,
    ranked_histograms,
)
from selfalign.report.timing import times_table
from selfalign.report.truth import truth_section
from selfalign.runs.labels import BASELINE, JUDGE_PAIRS, Kind, Label
from selfalign.runs.progress import PROGRESS, is_running
from selfalign.runs.reader import Finished, read_head_to_head, read_samples

Row = dict[str, Any]

RELOAD_SECONDS = 10
"""After which a browser reads the page of a running run again."""

SHOWN = 3
"""Number of instructions of an iteration that are shown with their candidates, and of head-to-head comparisons."""

PURPOSES = {
    "load_model": "preparing M0",
    "sft": "fine-tuning",
    "align": "alignment",
    "eft/questions": "evaluation fine-tuning: questions",
    "eft/judgements": "evaluation fine-tuning: judging by the SFT baseline",
    "eft/demonstrations": "evaluation fine-tuning: choosing examples",
    "instructions": "writing instructions",
    "responses": "writing candidates",
    "judge": "preparing the judge",
    "comparator": "preparing the judge of comparisons",
    "checkpoint_judge": "preparing the judge of checkpoints",
    "judgements": "judging candidates",
    "pairs": "pairing",
    "judge_pairs": "judging judgements",
    "reference": "reference log-probabilities",
    "start": "log-probabilities before alignment",
    "preferences/pairs": "evaluation: held-out pairs",
    "preferences/judge": "preparing the judge of the held-out pairs",
    "preferences/scores": "evaluation: judging held-out pairs",
    "logps": "evaluation: log-probabilities of held-out pairs",
    "reference_logprobs": "evaluation: log-probabilities of held-out pairs",
    "preferences": "evaluation: rewards on held-out pairs",
    "answers": "evaluation: answers",
    "scores": "evaluation: judging answers",
    "head_to_head": "evaluation: head to head",
    "divergence": "evaluation: distance from M1",
    "ranked_scores": "evaluation: judging ranked answers",
    "ranked_comparisons": "evaluation: comparing ranked answers",
    "second_ranked_scores": "evaluation: judging ranked answers",
    "instruments": "evaluation: measuring judges",
    "truth": "evaluation: what is right",
    "numbers": "evaluation: numbers",
}
"""Purpose of a stage, by its label, by a part of its label, or by its name."""


def write_report(folder: Path) -> None:
    """Write report.html from the other files of a run's folder: of a finished run, or what an unfinished one has."""
    write_page(Finished.load(folder))


def write_page(run: Finished) -> None:
    """Write report.html of a run that has been read."""
    folder = run.folder
    running = run.progress is not None and is_running(folder, run.progress)
    html = page(run, running=running).encode()
    if not running or (folder / PROGRESS).exists():  # If the run has finished meanwhile, its own last page stays.
        write_atomically(folder / "report.html", [html])


def page(run: Finished, *, running: bool = False) -> str:
    """Return the whole page."""
    parts = {
        "Models": models_table(run),
        "From model to model": model_charts(run),
        "Answers": answers_table(run),
        "Truth": truth_section(run),
        "Win rates": grid([matrix(run, "Win rates")]) + comparisons_table(run),
        "Instruments": instruments_table(run),
        "Held-out pairs": preferences_table(run),
        "Δ by word": delta_map(run),
        "Drift": drift_table(run),
        "Judging": judging_table(run) + ranked_histograms(run),
        "Benchmarks": benchmark_tables(run),
        "Training": training_charts(run),
        "Preference data": data_table(run) + histograms(run),
        "Candidates": samples(run),
        "Head to head": head_to_head(run),
        "Dropped": drops(run),
        "Training time": times_table(run),
        "Time": times(run),
        "Provenance": provenance(run),
    }
    if run.progress:
        opening = progress_sentence(run.progress, running=running) + warnings(run)
    else:
        opening = f'<p class="lead">{what_was_run(run)}</p>\n{verdict(run)}{warnings(run)}'
    kind = f"report of run {run.folder.name}"
    return document(run.summary["name"], kind, opening, parts, reload_seconds=RELOAD_SECONDS if running else 0)


ANY = decimals(0)
MODELS = (
    Column(
        "model",
        "M1 is fine-tuned from M0, M2 is aligned from M1, and so on; SFT is the baseline without judging examples",
        "model",
        ANY,
    ),
    Column("trained on", "preference pairs, or demonstrations for fine-tuning", "trained_on", ANY),
    *map(
        Column.of,
        (
            catalog.REWARDS_MARGINS,
            catalog.REWARDS_ACCURACIES,
            catalog.EVAL_WIN_RATE,
            catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY,
            catalog.JUDGE_QUALITY_SPEARMAN,
            catalog.EVAL_MEAN_CHARACTERS,
            catalog.EVAL_FINISHED_SHARE,
            catalog.SECONDS,
        ),
    ),
)
"""The headline table."""

ITERATIONS = (
    Column("iteration", "in which the data was made", "iteration", ANY),
    *(
        Column.of(metric, stage)
        for stage, metrics in (
            ("instructions", (catalog.KEPT, catalog.WRITTEN, catalog.NOVELTY, catalog.DISTINCT_2)),
            ("responses", (catalog.RESPONSES, catalog.FINISHED_SHARE)),
            ("judgements", (catalog.JUDGE_MEAN_SCORE, catalog.JUDGE_TIED_SHARE, catalog.JUDGE_STD_SCORE)),
            (
                "pairs",
                (
                    catalog.LABELLED,
                    catalog.DESIRABLE,
                    catalog.POSITIVES,
                    catalog.MEAN_SCORE_MARGIN,
                    catalog.MEAN_LENGTH_DIFFERENCE,
                ),
            ),
        )
        for metric in metrics
    ),
    Column("pairs", "preference pairs of the iteration's responses, or given ones", "pairs/pairs", ANY),
    Column("pairs of judgements", "preference pairs of its judgements", f"{JUDGE_PAIRS}/pairs", ANY),
    Column.of(catalog.REPLAYED_PAIRS, "replayed_pairs"),
    Column(
        "pairs trained on",
        "all preference pairs that its model was trained on; those held out or too long are not among them",
        "model/pairs",
        ANY,
    ),
)
"""The data that each iteration made."""


def models_table(run: Finished) -> str:
    """Return the headline table with a row for each model, and the meanings of its columns."""
    if not run.models:
        return ""
    rows = [{**row, "trained_on": trained_on(row)} for row in run.models]
    known = any(key.endswith("_low") for row in rows for key in row)
    intervals = "Brackets show 95 % intervals: Wilson's for shares of answers, bootstrap for all others."
    rate = Column.of(headline_metric(run))
    columns = [rate if column.key == catalog.EVAL_WIN_RATE.name else column for column in MODELS]
    return explained("models", columns, rows, note(intervals) if known else "")


def trained_on(row: Row) -> str:
    """Return the number of pairs, labelled responses or demonstrations that a model was trained on."""
    nouns = {catalog.PAIRS: "pair", catalog.LABELLED: "labelled response", catalog.DEMONSTRATIONS: "demonstration"}
    for metric, noun in nouns.items():
        if metric.name in row:
            return plural(row[metric.name], noun)
    return NOTHING


def model_charts(run: Finished) -> str:
    """Return charts with a point for each model. An iteration's candidates are at the model that wrote them."""
    bar = "bar: 95 % interval"
    answers = of_models(run, catalog.EVAL_MEAN_CHARACTERS, "evaluation answers")
    candidates = _of_candidates(run, "responses", catalog.MEAN_CHARACTERS, name="candidates")
    scores = _of_candidates(run, "judgements", catalog.JUDGE_MEAN_SCORE, catalog.JUDGE_STD_SCORE)
    charts = (
        (
            "Win rate against M1",
            f"{headline_metric(run).heading}; {bar}; dashed: as good as M1",
            [of_models(run, headline_metric(run))],
            percent,
            0.5,
        ),
        (
            "Judge: pairwise accuracy",
            f"answer pairs ordered as humans did; {bar}; dashed: chance",
            [of_models(run, catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY)],
            percent,
            0.5,
        ),
        (
            "Judge: Spearman's ρ",
            f"with the human order; {bar}; dashed: chance",
            [of_models(run, catalog.JUDGE_QUALITY_SPEARMAN)],
            decimals(2),
            0.0,
        ),
        (
            "Score of candidates",
            "mean, at the model that wrote them, by that iteration's judge; bar: ± one standard deviation",
            [scores],
            decimals(2),
            None,
        ),
        (
            "Answers finished",
            f"share that end by themselves; {bar}",
            [of_models(run, catalog.EVAL_FINISHED_SHARE)],
            percent,
            None,
        ),
        ("Length", f"mean characters; {bar} of answers", [answers, candidates], decimals(0), None),
        (
            "Held-out pairs: accuracy",
            f"share with the chosen response's reward above; {bar}; dashed: chance",
            [
                _of_held_out(run, catalog.REWARDS_ACCURACIES, "given x"),
                _of_held_out(run, catalog.REWARDS_ACCURACIES_AUGMENTED, "given p⊕x", colour=1),
            ],
            percent,
            0.5,
        ),
        (
            "Held-out pairs: margin",
            f"mean reward of chosen minus rejected; {bar}",
            [_of_held_out(run, catalog.REWARDS_MARGINS)],
            compact,
            0.0,
        ),
        (
            "Change of log π",
            "after alignment minus before, nats a token of the training pairs",
            [
                of_models(run, catalog.LOGPS_CHOSEN_CHANGE_PER_TOKEN, "chosen"),
                of_models(run, catalog.LOGPS_REJECTED_CHANGE_PER_TOKEN, "rejected", colour=1),
            ],
            compact,
            0.0,
        ),
    )
    return charts_over_models(run, charts)


def _of_held_out(run: Finished, metric: Metric, name: str = "", colour: int = 0) -> Series:
    return of_models(run, catalog.over(catalog.PREFERENCES, metric), name, colour)


def _of_candidates(run: Finished, part: str, metric: Metric, deviation: Metric | None = None, name: str = "") -> Series:
    counted = [run.counts.get(Label.iteration(row["iteration"] + 1, part), {}) for row in run.models]
    wrote = [row["model"] != BASELINE for row in run.models]
    known = [(x, counts) for x, counts in enumerate(counted) if wrote[x] and is_number(counts.get(metric.name))]
    points = [(x, counts[metric.name]) for x, counts in known]
    spreads = [counts.get(deviation.name, 0.0) if deviation else 0.0 for _, counts in known]
    intervals = [(y - spread, y + spread) for (_, y), spread in zip(points, spreads, strict=True)]
    return Series(name=name, points=points, intervals=intervals, colour=1 if name else 0)


def training_charts(run: Finished) -> str:
    """Return training curves with a line for each model."""
    curves = (
        ("SFT loss", "negative log-likelihood of a target token, nats", "sft", catalog.LOSS_PER_TOKEN, None),
        ("Alignment loss", "mean over the pairs of a step", "align", catalog.LOSS, None),
        (
            "Reward margin",
            "chosen minus rejected, mean over the pairs of a step",
            "align",
            catalog.REWARDS_MARGINS,
            0.0,
        ),
        ("Reward accuracy", "share of a step's pairs with a margin above 0", "align", catalog.REWARDS_ACCURACIES, 0.5),
        ("Refinement Δ", "mean over the pairs of a step", "align", catalog.REFINEMENT_MEAN, 0.0),
        ("KL to the reference", "estimate z₀ of KTO before it is raised to 0, nats", "align", catalog.KL, 0.0),
    )
    figures: list[str] = []
    for title, caption, stage, metric, reference in curves:
        series = [
            Series(name=name, points=points, colour=-1 if name == BASELINE else Label.model(name).iteration_number)
            for name, points in run.curves(stage, metric.name).items()
        ]
        if not series:
            continue
        longest = max(len(one.points) for one in series)
        mean = f"; strong line: moving mean over {smoothing(longest)} steps" if longest >= SMOOTHED else ""
        drawn = draw_curves(series, title, CHART_FORMS[metric.unit], reference=reference)
        figures.append(figure(title, caption + mean, drawn))
    return grid(figures)


def data_table(run: Finished) -> str:
    """Return the table of the preference data that each iteration made."""
    rows = run.iteration_rows()
    return table("preference data by iteration", ITERATIONS, rows) if rows else ""


def samples(run: Finished) -> str:
    """Return the first instructions of each iteration with all their candidates."""
    made = [label for label in run.counts if label.kind is Kind.ITERATION and label.part in ("responses", "pairs")]
    iterations = sorted({label.iteration_number for label in made})
    shown = {iteration: read_samples(run.folder, iteration, SHOWN) for iteration in iterations}
    blocks = [f"<h3>Iteration {n}</h3>\n{''.join(map(card, found))}" for n, found in shown.items() if found]
    remark = note(f"The first {SHOWN} instructions of each iteration, not selected.")
    return remark + "".join(blocks) if blocks else ""


def head_to_head(run: Finished) -> str:
    """Return evaluation answers of M1 and of the last model, and which of them won."""
    last = run.models[-1]["model"] if run.models else "M1"
    shown = read_head_to_head(run.folder, "M1", last)[:SHOWN] if last != "M1" else []
    remark = note(
        f"The first {SHOWN} evaluation instructions, not selected. The answer that is preferred in both orders wins; "
        "without a comparison, the answer with the higher score wins."
    )
    return remark + "".join(card(sample, ("M1", last)) for sample in shown) if shown else ""


def drops(run: Finished) -> str:
    """Return the table of dropped records, with a row for each reason and a column for each model.

    What all models share counts for the first one: M1, or in an evaluation of other runs' models the one in its place.
    """
    models = [row["model"] for row in run.models]
    first = models[0] if models and "evaluated" in run.summary else "M1"

    def model_of(label: Label) -> str:
        return label.serves if label.kind is Kind.ITERATION or label.serves in models else first

    rows: dict[str, Row] = {}
    for text, reasons in run.summary["drops"].items():
        label = Label.parse(text)
        for reason, count in reasons.items():
            name = f"{purpose(label)}: {reason.replace('_', ' ')}"
            row = rows.setdefault(name, {"reason": name})
            model = model_of(label)
            row[model] = row.get(model, 0) + count
    names = dict.fromkeys(map(model_of, run.counts))
    columns = [Column(name, f"dropped in making and evaluating {name}", name, ANY) for name in names]
    shown = [row for row in rows.values() if any(row.get(name) for name in names)]
    return table("dropped", [Column("dropped", "stage and reason", "reason", ANY), *columns], shown) if shown else ""


def times(run: Finished) -> str:
    """Return bars of the time spent, by purpose."""
    seconds: dict[str, float] = {}
    for stage in {(stage["stage"], stage["key"]): stage for stage in run.summary["stages"]}.values():
        name = purpose(Label.parse(stage["label"]), stage["stage"])
        seconds[name] = seconds.get(name, 0.0) + stage["seconds"]
    total = duration(math.fsum(seconds.values()))
    remark = note(f"{total} in all. A reused artifact counts with the time that it took when it was made.")
    return remark + bars([(name, [value], duration(value)) for name, value in seconds.items() if value >= 0.05])


def purpose(label: Label, stage: str = "training") -> str:
    """Return the purpose of a stage from its label, or from its name where the label is a model's."""
    name = label.part or (stage if label.kind is Kind.MODEL else label.owner)
    return PURPOSES.get(str(label)) or PURPOSES.get(name) or PURPOSES.get(stage, name)


def provenance(run: Finished) -> str:
    """Return commit, command, seed, machine, packages, weights and configuration of the run."""
    config = fold("Resolved configuration", preformatted((run.folder / "config.yaml").read_text(encoding="utf-8")))
    if not run.provenance:
        return config
    origin, machine = run.provenance, run.provenance["machine"]
    known = [
        ("commit", code_state(origin["commit"], origin["diff"])),
        ("command", " ".join(origin["command"])),
        ("seed", str(origin["seed"])),
        ("machine", f"{machine['system']} {machine['processor']}".strip() + f", {plural(machine['cores'], 'core')}"),
        ("python", origin["python"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in origin["packages"].items())),
    ]
    weights = [(f"weights of {model}", digest) for model, digest in origin["weights"].items()]
    return facts(known + weights) + config


def code_state(commit: str, diff: str) -> str:
    """Return the commit, and how many lines of the code differ from it."""
    if not commit:
        return "unknown (an installed package)"
    lines = diff.splitlines()
    changed = sum(line.startswith(("+", "-")) and not line.startswith(("+++", "---")) for line in lines)
    return f"{commit}, plus {plural(changed, 'changed line')} (see provenance.json)" if diff else f"{commit}, clean"
