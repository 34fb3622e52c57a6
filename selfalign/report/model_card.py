"""Write the model card of a run's last policy, from the files of the finished run.

The card is Markdown with the metadata that hubs read.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.core.files import write_atomically
from selfalign.data.mixtures import parts_of
from selfalign.metrics import catalog
from selfalign.report.html import Column, is_number, plural, present, show
from selfalign.report.instruments import INSTRUMENTS, WORDS, Standing, comparisons, verdict
from selfalign.report.markdown import bullets, code, fenced, folded, table
from selfalign.report.run_page import ITERATIONS, MODELS, code_state, trained_on
from selfalign.report.sentences import WHO, judge_name, judges_of_answers, warnings, what_was_run
from selfalign.report.tables import ANSWERS, JUDGING, OTHERS
from selfalign.runs.labels import Kind, Label, model_after
from selfalign.runs.reader import Finished
from selfalign.runs.summary import drops_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

RESULTS = (
    catalog.EVAL_WIN_RATE,
    catalog.EVAL_WIN_RATE_LENGTH_CONTROLLED,
    catalog.EVAL_SCORE_WIN_RATE,
    catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY,
    catalog.JUDGE_QUALITY_SPEARMAN,
    catalog.JUDGE_QUALITY_KENDALL,
)
"""Metrics that also appear in the metadata."""

SOURCES = {
    Label.iteration(1, "pairs"): "preference pairs",
    Label.input("replay", "pairs"): "replayed preference pairs",
    Label.input("instructions"): "new instructions",
    Label.input("questions"): "evaluation instructions",
    Label.input("given_outputs"): "answers to compare with",
    Label.input("validation"): "validation instructions",
    Label.input("preferences", "pairs"): "evaluation pairs",
}
"""Artifacts that are read from one data source."""

MEASURED = tuple(
    replace(Column.of(metric.of(instrument=name)), heading=f"{words}: {metric.heading}")
    for name, words in WORDS.items()
    for metric in catalog.INSTRUMENT
)
"""How the judges of win rates, and each model's own judging, were measured."""

TRAINING = ("learning_rate", "final_learning_rate", "schedule", "optimizer", "epochs", "batch_size", "dtype")
"""Training settings in the section on the method. The configuration at the end of the card holds all settings."""

LONG = 80
"""Maximum length of a text in the section on the method, in characters. Prompts are longer."""


@dataclass(frozen=True, slots=True)
class Source:
    """Given data: what for, the setting's value, and what it was keyed by: a file's digest, or a hub id at a commit."""

    purpose: str
    name: str
    content: str

    @property
    def hub_id(self) -> str:
        """The data set's name on the hub; empty for a file."""
        name, at, _ = self.content.partition("@")
        return name if at else ""


def write_card(folder: Path) -> None:
    """Write model_card.md from the other files of a finished run's folder."""
    write_atomically(folder / "model_card.md", [model_card(Finished.load(folder)).encode()])


def model_card(run: Finished, repository: str = "") -> str:
    """Return the card, which is a valid README.md of a model repository.

    Args:
        run: the finished run.
        repository: the repository of the model; empty for the run folder.
    """
    sections = {
        "Use": use(run, repository),
        "Method": method(run),
        "Data": data(run),
        "Results": results(run),
        "Limits": limits(run),
        "Lineage": lineage(run),
        "Reproduction": reproduction(run),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{metadata(run).to_yaml()}\n---\n\n# {code(title_of(run))}\n\n{body}\n"


def title_of(run: Finished) -> str:
    """Return the names of the run and the model."""
    return f"{run.summary['name']} {last_model(run)}"


def last_model(run: Finished) -> Label:
    """Return the label of the run's last policy, which the card describes."""
    return Label.parse(run.models[-1]["model"])


def base_on_hub(run: Finished) -> tuple[str, str]:
    """Return hub id and commit of M0 if its weights lie in the hub's cache, and empty texts otherwise."""
    snapshot = (run.folder / "artifacts/M0/weights").resolve()
    cached = snapshot.parents[1].name
    if snapshot.parent.name != "snapshots" or not cached.startswith("models--"):
        return "", ""
    return cached.removeprefix("models--").replace("--", "/"), snapshot.name


def stated_licence(run: Finished) -> dict[str, Any]:
    """Return the licence metadata of the README.md among M0's files, as far as it states them."""
    import yaml
    from huggingface_hub import metadata_load

    path = run.folder / "artifacts/M0/weights/README.md"
    try:
        stated = metadata_load(path) if path.is_file() else None
    except (ValueError, yaml.YAMLError):
        return {}
    known = {key: (stated or {}).get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in known.items() if isinstance(value, str)}


def metadata(run: Finished) -> "ModelCardData":
    """Return the front matter, all of it from the run's files."""
    from huggingface_hub import ModelCardData

    lora, measured = run.config["model"]["lora"]["rank"], eval_results(run)
    hub_data = [source.hub_id for source in sources(run) if source.hub_id and "evaluation" not in source.purpose]
    titles = dict.fromkeys(loss["title"].lower() for loss in run.losses.values())
    return ModelCardData(
        base_model=base_on_hub(run)[0] or None,
        datasets=list(dict.fromkeys(hub_data)) or None,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation",
        tags=["selfalign", *titles, *(["lora"] if lora else [])],
        model_name=title_of(run) if measured else None,
        eval_results=measured or None,
        **stated_licence(run),
    )


def eval_results(run: Finished) -> "list[EvalResult]":
    """Return the last model's metrics with their intervals, in the form of the hub's `model-index`."""
    from huggingface_hub import EvalResult

    row, places = run.models[-1], {source.purpose: source for source in sources(run)}
    found: list[EvalResult] = []
    blind = [one.win_rate.name for one in INSTRUMENTS if one.standing(run, row) is Standing.BLIND]
    for metric in RESULTS:
        key = metric.name
        if key in blind or key.removesuffix("_length_controlled") in blind:
            continue  # Numbers of the metadata are quoted without what stands beside them.
        place = places.get("evaluation instructions" if key.startswith("eval/") else "ranked answers")
        if place is None or not is_number(row.get(key)):
            continue
        ends = {end: row[f"{key}_{end}"] for end in ("low", "high") if is_number(row.get(f"{key}_{end}"))}
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=place.hub_id or Path(place.name).name,
                dataset_name=Path(place.name).name,
                dataset_config=place.purpose,  # Keeps two entries apart where one file serves both purposes.
                dataset_split="held out",
                metric_type=key,
                metric_name=metric.meaning,
                metric_value=row[key],
                metric_args={"confidence": 0.95, **ends} if ends else None,
            )
        )
    return found


def use(run: Finished, repository: str) -> str:
    """Return the section on loading the model."""
    artifacts, label = f"{run.folder.name}/artifacts", last_model(run)

    def place(part: str) -> str:
        return repr(repository or f"{artifacts}/{label}/{part}")

    kind = f"{label} is a transformers checkpoint."
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    loading = [f"model = AutoModelForCausalLM.from_pretrained({place('weights')})"]
    if run.config["model"]["lora"]["rank"]:
        kind, (base, _) = f"{label} is a peft adapter on M0.", base_on_hub(run)
        if repository and not base:
            kind += " M0 is not on the hub. Its weights are in the run folder, and repeating the run makes them again."
        imports.insert(0, "from peft import PeftModel")
        loading = [
            f"base = AutoModelForCausalLM.from_pretrained({base or f'{artifacts}/M0/weights'!r})",
            f"model = PeftModel.from_pretrained(base, {place('adapter')})",
        ]
    lines = [*imports, "", *loading, f"tokenizer = AutoTokenizer.from_pretrained({place('tokenizer')})"]
    if run.config["model"]["lora"]["rank"]:  # An adapter has no generation_config.json of its own.
        stops = run.counts[Label.model("M0")]["stops_at"]
        lines.append(f"model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids({stops!r})")
    return f"{kind}\n\n{fenced(chr(10).join(lines), 'python')}"


def html(text: str) -> str:
    """Return escaped HTML as one block. Without blank lines, nothing in it is read as Markdown."""
    return "\n".join(line for line in text.splitlines() if line.strip())


def method(run: Finished) -> str:
    """Return the section on the method: a paragraph and the settings."""
    config = run.config
    own = config["data"].get("respond", {}).get("writers", ["self"]) == ["self"]
    made = "the model's own pairs (arXiv 2401.10020)" if own else "pairs of several writers' responses"
    given = "given pairs" if "path" in config["data"] else made
    given += " beside given ones" if Label.input("replay", "pairs") in run.stages else ""
    facts = [f"Method: {given}, {plural(config['iterations'], 'iteration')}"]
    formulas = [loss["formula"] for loss in run.losses.values()]
    for start, last, since in eras(run, "loss"):
        loss, own = run.losses[start], run.inputs(Label.model(model_after(last))).get("loss")
        said = settings(own or {"class": config["choices"]["loss"]})
        facts.append(f"Loss of a {loss.get('of', 'pair')}{since}: {loss['title']}, {code(loss['formula'])}; {said}")
    if any("h" in formula for formula in formulas):
        facts.append(
            "Here, h = [log π(y⁺|x) − log π_ref(y⁺|x)] − [log π(y⁻|x) − log π_ref(y⁻|x)], in nats over response "
            "tokens; ⊥ stops the gradient"
        )
    if any("h" in formula or "π_ref" in formula for formula in formulas):
        facts.append(f"Reference policy π_ref: {WHO[config['train']['reference_policy']]}")
    if system := config["model"].get("system_prompt"):
        facts.append(f"System prompt, before conversations without a system turn: {code(system)}")
    facts.append(f"Judge: {settings(run.judging)}" if run.judging else "Judge: none, nothing was judged")
    for start, _, since in eras(run, "judge")[1:]:
        if judge := run.inputs(Label.iteration(start, "judgements")).get("judge"):
            facts.append(f"Judge{since}: {settings(judge)}")
    if judge := run.inputs(Label.input("preferences", "scores")).get("judge"):
        facts.append(f"Judge of held-out pairs: {settings(judge)}")
    for _, last, since in eras(run, "pair"):
        if rule := run.inputs(Label.iteration(last, "pairs")).get("rule"):
            facts.append(f"Pair rule{since}: {settings(rule)}")
    for name, part in (("Fine-tuning (SFT)", "sft"), ("Alignment", "align")):
        if part in run.stages.values():
            facts.append(f"{name}: {settings({key: config['train'][part][key] for key in TRAINING})}")
    return f"{html(f'<p>{what_was_run(run)}</p>')}\n\n{bullets(facts)}"


def eras(run: Finished, key: str) -> list[tuple[int, int, str]]:
    """Return (first iteration, last iteration, words for the first) of each setting of a component, by `at`."""
    later = [int(start) for start, changes in run.config.get("at", {}).items() if key in changes]
    starts = [1, *sorted(later), run.config["iterations"] + 1]
    return [(start, end - 1, f", from iteration {start} on" if start > 1 else "") for start, end in pairwise(starts)]


def settings(component: Mapping[str, Any]) -> str:
    """Return a component's class and values; long texts are left out."""
    values = [f"{name} {code(value)}" for name, value in flat(component) if len(str(value)) <= LONG]
    return ", ".join(([code(component["class"])] if "class" in component else []) + values)


def flat(component: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every setting."""
    for name, value in component.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}.")
        elif name != "class" and value is not None and value != "":
            yield f"{path}{name}", value


def sources(run: Finished) -> list[Source]:
    """Return the run's given data with its identity."""
    seeds = run.inputs(Label.input("seeds"))
    purposes = {"demonstrations": "demonstrations", "ranked": "ranked answers"}
    named = [(said, seeds["config"][key]) for key, said in purposes.items() if seeds.get("config", {}).get(key)]
    given = [(*one, content) for one, content in zip(named, seeds.get("contents", []), strict=True)]
    inputs = [(purpose, run.inputs(label)) for label, purpose in SOURCES.items()]
    given += [(purpose, made["source"], made["content"]) for purpose, made in inputs if made.get("content")]
    return [Source(purpose, *part) for purpose, source, content in given for part in parts_of(source, content)]


def data(run: Finished) -> str:
    """Return the section on data: what was given, generated and dropped."""
    model, (base, commit) = run.config["model"], base_on_hub(run)
    start = f"M0: {code(model['path'])}" + (f", on the hub {code(base)} at commit {code(commit)}" if base else "")
    licence = stated_licence(run).get("license")
    lines = [start, f"Licence stated by M0's files: {code(licence) if licence else 'none'}"]
    for source in sources(run):
        what = f"hub data set {code(source.content)}" if source.hub_id else f"SHA-256 {code(source.content)}"
        lines.append(f"{source.purpose.capitalize()}: {code(source.name)}, {what}")
    if held_out := run.counts.get(Label.input("seeds"), {}).get(catalog.QUESTIONS_HELD_OUT.name):
        lines.append(f"Held out to measure judging: {plural(held_out, 'ranked question')}")
    lines += [f"Dropped in {label}: {drops_text(reasons)}" for label, reasons in run.summary["drops"].items()]
    made = by_column(ITERATIONS, run.iteration_rows())
    return bullets(lines) + (f"\n\nWhat each iteration made:\n\n{made}" if made else "")


def by_column(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for every column that has a value, and its meaning."""
    if not rows:
        return ""
    first, *others = present(columns, rows)
    head = [first.heading, *(show(row[first.key], first.form) for row in rows), "meaning"]
    return table([head, *([c.heading, *(" ".join(c.value(row)).strip() for row in rows), c.meaning] for c in others)])


def results(run: Finished) -> str:
    """Return the section on results: the metrics of every model with intervals."""
    columns = {column.key: column for column in (*MODELS, *ANSWERS[1:], *OTHERS[1:], *JUDGING[1:], *MEASURED)}
    rows = [{**row, "trained_on": trained_on(row)} for row in run.models]
    remark = "Brackets show 95 % intervals over instructions, questions or pairs, not over seeds."
    return f"{html(verdict(run))}\n\n{by_column(list(columns.values()), rows)}\n\n{remark}".strip()


def limits(run: Finished) -> str:
    """Return the section on the limits of the results."""
    row = run.models[-1]
    lines = [f"This is one run with one seed ({code(run.summary['seed'])}). Another seed may give other results."]
    if judged := judges_of_answers(run):
        answers = comparisons(row) or row[catalog.EVAL_ANSWERS.name]
        own = any(judge in WHO.values() for _, judge in judged)
        judging = " and ".join(
            f"{method} by {judge if judge in WHO.values() else code(judge)}" for method, judge in judged
        )
        lines.append(
            f"Answers were {judging}, not by people{'; this judge is a model of the run' if own else ''}. A share of "
            f"{plural(answers, 'instruction')} is uncertain by up to "
            f"±{math.ceil(98 / math.sqrt(answers))} percentage points."
        )
    else:
        lines.append("No answers were compared, so the results do not show whether the last model is better than M1.")
    if judges_itself(run):
        lines.append("Each model judged its own training data, so training strengthens what its judge overrates.")
    if questions := row.get(catalog.JUDGE_QUALITY_QUESTIONS.name):
        lines.append(f"Judge quality was measured on {plural(questions, 'question')} with ranked answers.")
    lines.append("Safety was not evaluated.")
    return f"{bullets(lines)}\n\n{html(warnings(run))}".strip()


def judges_itself(run: Finished) -> bool:
    """Whether a model of the run gave the scores that its own training data were chosen by."""
    judged = [label for label in run.stages if label.kind is Kind.ITERATION and label.is_judged]
    return any(judge_name(run.inputs(label).get("judge", {})) == WHO["self"] for label in judged)


def lineage(run: Finished) -> str:
    """Return the section on lineage: from which weights each model was made, by digest."""
    made = {run.manifest(label).get("digest"): label for label in reversed(run.stages)}

    def label_of(artifact: Mapping[str, Any] | None) -> Label | None:
        return made.get(artifact["digest"]) if artifact else None

    rows = [["model", "weights, SHA-256", "made by", "from", "reference", "trained on", "its content, SHA-256"]]
    for name, digest in run.provenance["weights"].items():
        inputs = run.inputs(Label.parse(name))
        training_data = inputs.get("pairs") or inputs.get("demonstrations")
        reference = label_of(inputs.get("reference"))
        if reference and run.stages.get(reference) == "reference_logprobs":  # Its log-probabilities were stored.
            reference = label_of(run.inputs(reference).get("policy"))
        stage = code(run.provenance["artifacts"][name])
        content = code(training_data["digest"]) if training_data else "–"
        origins = (label_of(inputs.get("policy")), reference, label_of(training_data))
        rows.append([name, code(digest), stage, *(str(label or "–") for label in origins), content])
    remark = (
        "The digest of a model is that of its weight files' digests. `made by` is a stage and its key in the store."
    )
    return f"{table(rows)}\n\n{remark}"


def reproduction(run: Finished) -> str:
    """Return the section with command, packages and configuration of the run."""
    origin = run.provenance
    packages = ", ".join(f"{name} {version}" for name, version in origin["packages"].items())
    commit = code_state(origin["commit"], origin["diff"])
    facts = [f"Commit of selfalign: {commit}", f"Python {origin['python']}, {packages}"]
    config = (run.folder / "config.yaml").read_text(encoding="utf-8")
    return "\n\n".join(
        [
            fenced(" ".join(origin["command"]), "sh"),
            bullets(facts),
            folded("Resolved configuration", fenced(config, "yaml")),
        ]
    )
