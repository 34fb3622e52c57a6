"""The stages of a run and their sizes, known before anything is made."""

from typing import TYPE_CHECKING

from selfalign.judges.bench import OWN_MODELS, asks_a_server
from selfalign.losses import Positives
from selfalign.pipeline import Pairs, SelfRewarding
from selfalign.stages.judge import ExternalScore, Judge, Pairwise, SampledScore

if TYPE_CHECKING:
    from selfalign.config import ExperimentConfig


def plan(config: "ExperimentConfig") -> list[tuple[str, str]]:
    """(label, size) of every stage in the order the pipeline makes them."""
    data, sft, asked = config.data, config.train.sft, config.evaluate
    stages = [("seeds", f"{data.seeds.demonstrations} {data.seeds.ranked}".strip())]
    if asked.instructions:
        stages.append(("questions", f"{asked.count or 'all'} instructions of {asked.instructions}"))
    if (choose := config.train.choose).every_steps:
        stages.append(("validation", f"{choose.count or 'all'} instructions of {choose.instructions}"))
    if isinstance(data, Pairs):
        stages.append(("iteration_1/pairs", data.path))
    stages.append(("M0", config.model.path))
    if not asks_a_server(config.judge) and config.judge.model not in OWN_MODELS:
        stages.append(("judge", config.judge.model))
    if data.seeds.demonstrations or (data.seeds.ranked and data.seeds.evaluation_fine_tuning):
        stages.append(("M1", f"SFT, epochs {sft.epochs}, batch {sft.batch_size}"))
    stages += _evaluation(config, "M1")
    for iteration in range(1, config.iterations + 1):
        stages += _own_pairs(config, f"iteration_{iteration}") if isinstance(data, SelfRewarding) else []
        stages += _alignment(config, iteration)
        stages += _evaluation(config, f"M{iteration + 1}")
    return stages


def _own_pairs(config: "ExperimentConfig", place: str) -> list[tuple[str, str]]:
    data = config.data
    candidates = data.instruct.count * data.respond.candidates
    return [
        (f"{place}/instructions", f"{data.instruct.count} new, written by {data.instruct.writer}"),
        (f"{place}/responses", f"{candidates} candidates, {data.respond.candidates} each"),
        (f"{place}/judgements", _judging(config.judge, data.instruct.count, data.respond.candidates)),
        (f"{place}/pairs", f"up to {data.instruct.count}"),
    ]


def _judging(judge: Judge, instructions: int, candidates: int) -> str:
    """How many judgements a judge makes of so many candidates of each instruction, and who it is."""
    size = str(instructions * candidates)
    if isinstance(judge, SampledScore | ExternalScore):
        size += f" × {judge.samples}"
    if isinstance(judge, Pairwise):
        size = f"{instructions * judge.pairs_of(candidates)} comparisons × 2 orders"
    who = judge.endpoint.model if isinstance(judge, ExternalScore | Pairwise) and asks_a_server(judge) else judge.model
    return f"{size} by {type(judge).__name__}, model {who}"


def _alignment(config: "ExperimentConfig", iteration: int) -> list[tuple[str, str]]:
    label, train = f"M{iteration + 1}", config.train
    if isinstance(config.loss, Positives):
        return [(label, f"SFT on positives, epochs {train.sft.epochs}")]
    name = type(config.loss).__name__
    size = f"{name}, epochs {train.align.epochs}, batch {train.align.batch_size}"
    stages: list[tuple[str, str]] = []
    if train.reference_logps == "stored":
        stages.append((f"iteration_{iteration}/reference", f"log-probabilities of {train.reference}"))
    return [*stages, (label, size)]


def _evaluation(config: "ExperimentConfig", name: str) -> list[tuple[str, str]]:
    place, settings = f"evaluation_{name}", config.evaluate
    stages: list[tuple[str, str]] = []
    if settings.instructions:
        count = str(settings.count or "all")
        stages += [
            (f"{place}/answers", f"{count} instructions"),
            (f"{place}/scores", f"judged by {settings.judge}"),
        ]
    if config.data.seeds.ranked:
        stages.append((f"{place}/ranked_scores", "held-out ranked answers"))
    return [*stages, (f"{place}/numbers", "")]
