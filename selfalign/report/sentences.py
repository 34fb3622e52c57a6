"""The report's sentences: what was run, and what its last win rate says. They are HTML, escaped here."""

from html import escape
from typing import Any

from selfalign.metrics import catalog
from selfalign.report.html import compact, is_number, percent, strong
from selfalign.runs.labels import Kind, Label
from selfalign.runs.reader import Finished

SCORES = {"Pairwise": "wins of comparisons", "ImplicitReward": "implicit reward", "ExpectedScore": "expected score"}
RULES = {
    "BestWorst": "the best was paired with the worst",
    "RandomPair": "two drawn at random were paired, the higher score chosen",
    "AllOrdered": "every two of different score were paired",
    "BestVsK": "the best was paired with each of the k worst",
}
WHO = {"self": "the newest model itself", "previous": "the model before it", "sft": "M1", "base": "M0"}


def what_was_run(run: Finished) -> str:
    """The experiment in a paragraph: model, data, judge, pair rule, loss, evaluation, seed."""
    said = [_model_sentence(run), _data_sentence(run), _loss_sentence(run)]
    if evaluated := run.summary.get("evaluated"):
        said = [f"Models of {strong(', '.join(evaluated))} were measured; nothing was trained.", *_stand_in(run)]
    if questions := run.counts.get(Label.input("questions"), {}).get(catalog.INSTRUCTIONS.name):
        judged = "".join(f", {how} by {escape(who)}" for how, who in judges_of_answers(run))
        said.append(f"Every model answered {questions} held-out instructions{judged}.")
    return " ".join([*said, f"Seed {strong(run.summary['seed'])}."])


def _stand_in(run: Finished) -> list[str]:
    """What is called M1 where models were measured of which the first is another; the judge may be a later run's M1."""
    first, *others = (row["model"] for row in run.models)
    if first == "M1":
        return []
    if not first.endswith(".M1") and any(name.rpartition(".")[2] == "M1" for name in others):
        return [f"What is compared with M1 is compared with {strong(first)}, the first of them."]
    return [f"M1 stands for {strong(first)}, the first of them."]


def judge_name(judge: dict[str, Any], kind: str = "") -> str:
    """Who judges, a server's model before one of the run, and where no setting names one, its class; a text."""
    who: str = judge.get("endpoint", {}).get("model") or judge.get("model") or kind
    return WHO.get(who, who)


def judges_of_answers(run: Finished) -> list[tuple[str, str]]:
    """How the evaluation answers were judged, and by whom; texts."""
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
    judging = f" and {taught} of judging" if (taught := seeds.get(catalog.EFT.name)) else ""
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
    rule = run.config.get("choices", {}).get("pair", "BestWorst")
    kept = RULES.get(rule, f"{rule} made the pairs")
    kept += f" (k = {pair['k']})" if "k" in pair else ""
    if "minimum_score" in pair:
        kept = f"responses with {pair['minimum_score']:g} or more were kept"
    instruct, times = data["instruct"], run.config["iterations"]
    who = judge_name(judge, run.judge)
    judged = "it judged itself" if who == WHO["self"] else f"{escape(who)} judged"
    asked, answered = f"{instruct['count']} instructions", f"{data['respond']['candidates']} candidates"
    wrote = f"the newest model wrote {asked} and"
    if source := instruct.get("source"):
        wrote = f"the newest model took {asked} from {strong(source)} and wrote"
    elif (writer := instruct["model"]) != "self":
        wrote = f"{WHO.get(writer) or strong(writer)} wrote {asked} and the newest model"
    often = "one iteration" if times == 1 else f"each of {times} iterations"
    return f"In {strong(often)} {wrote}, for each, {answered}, which {judged} ({strong(score)}{scale}); {strong(kept)}."


def _loss_sentence(run: Finished) -> str:
    labels = [Label.model(row["model"]) for row in run.models if row["iteration"]]
    if not labels:
        return ""
    models, loss = strong(", ".join(map(str, labels))), run.config["loss"]
    if run.stages[labels[0]] == "sft":
        return f"Fine-tuning on the good responses alone ({strong('positives')}) made {models}."
    settings = [f"{sign} = {loss[key]:g}" for key, sign in (("beta", "β"), ("lam", "λ")) if key in loss]
    settings += [f"{key} {escape(str(loss[key]))}" for key in ("reduction", "lambda_scale") if key in loss]
    against = WHO[run.config["train"]["reference_policy"]]
    return f"{strong(run.loss['title'])} ({', '.join(settings)}; reference: {against}) made {models}."


def warnings(run: Finished) -> str:
    """Judges whose scores hardly tell responses apart, and models that crossed a bound."""
    constant = [str(label) for label, counts in run.counts.items() if counts.get(catalog.JUDGE_CONSTANT.name)]
    crossed = [
        f"{row['model']}: {key.rpartition('/')[2].replace('_', ' ')} {compact(value)}"
        for row in run.models
        for key, value in row.items()
        if catalog.CROSSED.matches(key)
    ]
    said = ""
    if constant:
        said += (
            '<p class="verdict"><b>Warning: a judge said nearly the same of everything</b> in '
            f"{escape(', '.join(constant))}; what was learnt from it, or measured with it, is noise.</p>\n"
        )
    if crossed:
        said += (
            '<p class="verdict"><b>Warning: numbers beyond their bounds</b> (<code>evaluate.bounds</code>): '
            f"{escape('; '.join(crossed))}.</p>\n"
        )
    return said


def verdict(run: Finished) -> str:
    """What the last win rate says, and what it does not say."""
    row = run.models[-1] if run.models else {}
    if not is_number(row.get(catalog.EVAL_WIN_RATE.name)):
        return ""
    rate, low, high = (row[f"{catalog.EVAL_WIN_RATE.name}{end}"] for end in ("", "_low", "_high"))
    first = escape(run.models[0]["model"]) if "evaluated" in run.summary else "M1"
    compared = sum(int(row[outcome.name]) for outcome in (catalog.EVAL_WINS, catalog.EVAL_TIES, catalog.EVAL_LOSSES))
    said = "It includes 50\u00a0%, so this run does not tell the two apart."
    if low > 0.5 or high < 0.5:
        side, preferred = ("above", "the last model's") if low > 0.5 else ("below", f"{first}'s")
        said = f"It lies {side} 50\u00a0%: this judge prefers {preferred} answers."
    return (
        f'<p class="verdict"><b>{escape(row["model"])} wins {percent(rate)} against {first}</b> on {compared} '
        f"instructions, a tie counting half; 95\u00a0% interval {percent(low)} to {percent(high)}. {said} The interval "
        "covers the draw of instructions only, not another seed nor the judge's own errors.</p>\n"
    )
