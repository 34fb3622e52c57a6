"""Sentences of the report: what was run, and warnings. They are HTML, escaped here."""

import math
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from selfalign.metrics import catalog
from selfalign.report.html import compact, strong
from selfalign.report.instruments import blind_judges
from selfalign.runs.labels import JUDGE_PAIRS, Kind, Label
from selfalign.runs.progress import Progress
from selfalign.runs.reader import Finished

SCORES = {
    "Pairwise": "wins of comparisons",
    "ImplicitReward": "implicit reward",
    "ContrastiveReward": "log-ratio of contrastive prompts",
    "Panel": "scores of a panel",
    "ExpectedScore": "expected score",
    "Verifier": "share of what was to be checked",
    "RewardModel": "reward",
    "RubricScore": "share of an instruction's own criteria that are met",
}
RULES = {
    "BestWorst": "the best candidate was paired with the worst",
    "RandomPair": "two random candidates were paired, and the one with the higher score was chosen",
    "AllOrdered": "every two candidates of different scores were paired",
    "BestVsK": "the best candidate was paired with each of the k worst",
}
WRITERS = {
    "self": "the current model",
    "previous": "the model before it",
    "sft": "M1",
    "base": "M0",
    "next": "a model aligned once ahead",
    "demonstration": "the demonstrations",
}
WHO = {"self": "the current model itself", "previous": "the previous model", "sft": "M1", "base": "M0"}


def what_was_run(run: Finished) -> str:
    """Return the experiment in a paragraph: model, data, judge, pair rule, loss, evaluation and seed."""
    if evaluated := run.summary.get("evaluated"):
        sentences = [f"Models of {strong(', '.join(evaluated))} were evaluated; nothing was trained.", *_stand_in(run)]
    else:
        sentences = [_model_sentence(run), _data_sentence(run), _loss_sentence(run)]
    if questions := run.counts.get(Label.input("questions"), {}).get(catalog.INSTRUCTIONS.name):
        judged = "".join(f", {method} by {escape(judge)}" for method, judge in judges_of_answers(run))
        sentences.append(f"Every model answered {questions} held-out instructions{judged}.")
    return " ".join([*sentences, f"The seed was {strong(run.summary['seed'])}."])


def _stand_in(run: Finished) -> list[str]:
    """Return which model takes the place of M1, and of M0, where models were evaluated and the first one is not M1."""
    first, *others = (row["model"] for row in run.models)
    if first == "M1":
        return []
    if not first.endswith(".M1") and any(name.rpartition(".")[2] == "M1" for name in others):
        return [f"Comparisons with M1 are comparisons with {strong(first)}, the first model."]
    both = "M1 stands" if first.endswith(".M1") else "M0 and M1 stand"  # Where no run is evaluated, there is neither.
    return [f"{both} for {strong(first)}, the first model."]


def progress_sentence(progress: Progress, *, running: bool) -> str:
    """Return where an unfinished run is, or where and why it stopped."""
    if running:
        left = f" {escape(progress.left[0].upper() + progress.left[1:])}." if progress.left else ""
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        said = f"<b>Running: {escape(progress.stage)}.</b>{left} Written {now}; this page reloads itself."
    else:
        why = progress.error or "its process has ended without a message"
        said = f"<b>Stopped in {escape(progress.stage)}</b>: {escape(why)}. The same command continues the run."
    return f'<p class="verdict">{said}</p>\n'


def judge_name(judge: dict[str, Any], kind: str = "") -> str:
    """Return the name of a judge as text: a server's model, a model of the run, a function, or the judge's class."""
    name: str = judge.get("model") or judge.get("function") or kind
    return judge.get("endpoint", {}).get("model") or WHO.get(name, name)


def judges_of_answers(run: Finished) -> list[tuple[str, str]]:
    """Return (how the evaluation answers were judged, by which judge) as texts."""
    judge, settings = run.config["judge"], run.config["evaluate"]
    found: list[tuple[str, str]] = []
    if settings["instructions"] and (comparator := settings.get("head_to_head")):
        found.append(("compared head to head", judge_name(comparator)))
    if any(label.kind is Kind.EVALUATION and label.part == "scores" for label in run.stages):
        named = {**judge, "model": settings["judge"]} if "model" in judge else judge
        found.append(("scored", judge_name(named, run.judge)))
    return found


def _model_sentence(run: Finished) -> str:
    model, seeds = run.config["model"], run.counts.get(Label.input("seeds"), {})
    rank = model["lora"]["rank"]
    parameters = run.counts.get(Label.model("M0"), {}).get(catalog.PARAMETERS.name)
    size = f"{parameters / 1e6:.3g} M parameters, " if parameters else ""
    trained = f"LoRA of rank {rank}" if rank else "all weights trained"
    start = f"M0 is {strong(model['path'])} ({size}{trained})"
    if Label.model("M1") not in run.counts:
        return f"{start}, which serves as M1."
    judging = f" and {examples} of judging" if (examples := seeds.get(catalog.EFT.name)) else ""
    if written := run.counts.get(Label.input("eft", "demonstrations"), {}).get(catalog.EFT.name):
        judging = f" and {written} of judging that the SFT baseline wrote"
    following = f"{seeds.get(catalog.IFT.name, 0)} demonstrations of following instructions"
    return f"{start}; fine-tuning on {following}{judging} made M1."


def _data_sentence(run: Finished) -> str:
    data, judge, pair = run.config["data"], run.config["judge"], run.config["pair"]
    if "path" in data:
        return f"Preference pairs were given: {strong(data['path'])}."
    samples, scale = (
        judge.get("num_samples"),
        f", {judge['min_score']} to {judge['max_score']}" if "min_score" in judge else "",
    )
    score = f"mean of {samples} written judgements" if samples else SCORES.get(run.judge, "score")
    score = "Elo by comparisons" if judge.get("scores") == "elo" else score
    name = judge_name(judge, run.judge)
    judged = f"which {'it judged itself' if name == WHO['self'] else f'{escape(name)} judged'} ({strong(score)}{scale})"
    if pair.get("by_score") is False:
        judged = "which nobody judged"
    times = run.config["iterations"]
    often = "one iteration" if times == 1 else f"each of {times} iterations"
    made = f"In {strong(often)} {_written(run)}, {judged}; {strong(_rule(run))}."
    return " ".join([made, *_smoothed(run), *_beside(run), *_changes(run)])


def _written(run: Finished) -> str:
    """Return who wrote or gave the instructions and the candidates."""
    instruct, respond = run.config["data"]["instruct"], run.config["data"]["respond"]
    instructions, candidates = f"{instruct['count']} instructions", f"{respond['candidates']} candidates"
    source, model, own = instruct.get("source"), instruct["model"], WRITERS["self"]
    writers = [WRITERS[writer] for writer in respond.get("writers", ["self"])]
    if writers != [own]:
        taken = (
            f"{instructions} were taken from {strong(source)}" if source else f"{_named(model)} wrote {instructions}"
        )
        return f"{taken}, to which {strong(' and '.join(writers))} gave answers ({respond['candidates']} by a model)"
    if source:
        return f"{own} took {instructions} from {strong(source)} and wrote, for each, {candidates}"
    if model != "self":
        return f"{_named(model)} wrote {instructions} and {own}, for each, {candidates}"
    return f"{own} wrote {instructions} and, for each, {candidates}"


def _named(model: str) -> str:
    return WRITERS["self"] if model == "self" else WHO.get(model) or strong(model)


def _rule(run: Finished) -> str:
    """Return how pairs or positives were made."""
    pair, rule = run.config["pair"], run.config.get("choices", {}).get("pair", "BestWorst")
    if "threshold" in pair:
        if pair["threshold"] is None:
            return (
                "responses above the mean of their instruction were labelled desirable, and those below it undesirable"
            )
        return (
            f"responses with a score of {pair['threshold']:g} or more were labelled desirable, all others undesirable"
        )
    if "minimum_score" in pair:
        return f"responses with a score of {pair['minimum_score']:g} or more were kept"
    if "chosen_from" in pair:
        best, worst = ("the first", "the first") if pair["by_score"] is False else ("the best", "the worst")
        chosen, rejected = (WRITERS[pair[side]] for side in ("chosen_from", "rejected_from"))
        return f"{best} by {chosen} was paired with {worst} by {rejected}"
    return RULES.get(rule, f"{rule} made the pairs") + (f" (k = {pair['k']})" if "k" in pair else "")


def _smoothed(run: Finished) -> list[str]:
    """Return whose judgements give the pairs their label smoothing."""
    pair = run.config["pair"]
    if pair.get("consistency", "none") == "none":
        return []
    second = "M1" if (name := pair["consistent_with"]) == "sft" else WRITERS[name]
    whose = "of all instructions" if pair["consistency"] == "mean" else "of each instruction"
    return [
        f"{second[0].upper()}{second[1:]} judged too, and how far both disagreed {whose} is a pair's label smoothing."
    ]


def _beside(run: Finished) -> list[str]:
    """Return what was trained on beside an iteration's own pairs of responses."""
    data, found = run.config["data"], list[str]()
    if meta := data.get("meta_judge"):
        made = [str(n) for n in run.iterations if Label.iteration(n, JUDGE_PAIRS) in run.stages]
        which = f"iteration{'s' * (len(made) > 1)} {', '.join(made)}"
        found.append(f"pairs of judgements, which {escape(judge_name(meta))} compared, in {which}")
    if data.get("accumulate_pairs"):
        found.append("the pairs of earlier iterations")
    replay = data.get("replay") or {}
    if replay.get("source") and any(label.part == "replayed_pairs" for label in run.stages):
        found.append(f"given pairs of {strong(replay['source'])} (share of all: {_numbers(replay['share'])})")
    return [f"Trained on beside these pairs: {'; '.join(found)}."] if found else []


def _changes(run: Finished) -> list[str]:
    """Return what changed from an iteration on."""
    return [
        f"From iteration {start} on, other settings held for {strong(', '.join(changes))}."
        for start, changes in sorted(run.config.get("at", {}).items())
    ]


def _loss_sentence(run: Finished) -> str:
    labels = [Label.model(row["model"]) for row in run.models if row["iteration"]]
    eras = [
        (start, [label for label in labels if start <= label.iteration_number < end])
        for start, end in zip(run.losses, [*[*run.losses][1:], math.inf], strict=True)
    ]
    return " ".join(_made_by(run, start, made) for start, made in eras if made)


def _made_by(run: Finished, start: int, labels: Sequence[Label]) -> str:
    """Return which models the loss made that holds from an iteration on."""
    if run.stages[labels[0]] == "sft":
        models = strong(", ".join(map(str, labels)))
        return f"Fine-tuning on the good responses only ({strong('positives')}) made {models}."
    loss = run.config["loss"] if start == 1 else run.config["at"][str(start)]["loss"]
    signs = {"beta": "β", "lam": "λ", "desirable_weight": "λ_D", "undesirable_weight": "λ_U"}
    settings = [f"{sign} = {_numbers(loss[key])}" for key, sign in signs.items() if key in loss]
    settings += [f"{key} {escape(str(loss[key]))}" for key in ("reduction", "lambda_scale") if key in loss]
    against, made = WHO[run.config["train"]["reference_policy"]], strong(", ".join(map(str, labels)))
    return f"{strong(run.losses[start]['title'])} ({', '.join(settings)}; reference: {against}) made {made}."


def _numbers(value: float | list[float]) -> str:
    """Return a number, or those of the iterations."""
    return ", ".join(f"{one:g}" for one in (value if isinstance(value, list) else [value]))


def warnings(run: Finished) -> str:
    """Return warnings of judges that saw nothing or whose scores hardly differ, and of models outside the bounds."""
    constant = [str(label) for label, counts in run.counts.items() if counts.get(catalog.JUDGE_CONSTANT.name)]
    crossed = [
        f"{row['model']}: {key.rpartition('/')[2].replace('_', ' ')} {compact(value)}"
        for row in run.models
        for key, value in row.items()
        if catalog.CROSSED.matches(key)
    ]
    html = ""
    if constant:
        html += (
            '<p class="verdict"><b>Warning: a judge gave nearly the same score to all responses</b> in '
            f"{escape(', '.join(constant))}. Training on these scores, or measuring with them, gives noise.</p>\n"
        )
    if blind := blind_judges(run):
        html += (
            '<p class="verdict"><b>Warning: a model that judged its own training data is blind</b> '
            f"(<code>evaluate.instruments</code>): {escape('; '.join(blind))}.</p>\n"
        )
    if crossed:
        html += (
            '<p class="verdict"><b>Warning: metrics outside their bounds</b> (<code>evaluate.bounds</code>): '
            f"{escape('; '.join(crossed))}.</p>\n"
        )
    return html
