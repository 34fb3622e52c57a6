"""The stages of a run and their sizes, known before anything is made."""

from typing import TYPE_CHECKING

from selfalign.losses import Positives
from selfalign.pipeline import Pairs

if TYPE_CHECKING:
    from selfalign.config import ExperimentConfig


def plan(config: "ExperimentConfig") -> list[tuple[str, str]]:
    """(label, size) of every stage in the order the pipeline makes them."""
    data, sft = config.data, config.train.sft
    stages = [
        ("M0", config.model.path),
        ("seeds", f"{data.seeds.demonstrations} {data.seeds.ranked}".strip()),
    ]
    if data.seeds.demonstrations or (data.seeds.ranked and data.seeds.evaluation_fine_tuning):
        stages.append(("M1", f"SFT, {sft.epochs} epochs, batch {sft.batch_size}"))
    stages += _evaluation(config, "M1")
    for iteration in range(1, config.iterations + 1):
        stages += _pairs(config, f"iteration_{iteration}") + _alignment(config, iteration)
        stages += _evaluation(config, f"M{iteration + 1}")
    return stages


def _pairs(config: "ExperimentConfig", place: str) -> list[tuple[str, str]]:
    data = config.data
    if isinstance(data, Pairs):
        return [(f"{place}/pairs", data.path)]
    candidates = data.instruct.count * data.respond.candidates
    return [
        (f"{place}/instructions", f"{data.instruct.count} new, written by {data.instruct.writer}"),
        (f"{place}/responses", f"{candidates} candidates, {data.respond.candidates} each"),
        (f"{place}/judgements", f"{candidates} by {type(config.judge).__name__}, model {config.judge.model}"),
        (f"{place}/pairs", f"up to {data.instruct.count}"),
    ]


def _alignment(config: "ExperimentConfig", iteration: int) -> list[tuple[str, str]]:
    label, train = f"M{iteration + 1}", config.train
    if isinstance(config.loss, Positives):
        return [(label, f"SFT on positives, {train.sft.epochs} epochs")]
    name = type(config.loss).__name__
    size = f"{name}, {train.align.epochs} epochs, batch {train.align.batch_size}"
    return [(f"iteration_{iteration}/reference", f"log-probabilities of {train.reference}"), (label, size)]


def _evaluation(config: "ExperimentConfig", name: str) -> list[tuple[str, str]]:
    place, settings = f"evaluation_{name}", config.evaluate
    stages: list[tuple[str, str]] = []
    if settings.instructions:
        count = str(settings.count or "all")
        stages += [("questions", f"{count} instructions")] if name == "M1" else []
        stages += [
            (f"{place}/answers", f"{count} instructions"),
            (f"{place}/scores", f"judged by {settings.judge}"),
        ]
    if config.data.seeds.ranked:
        stages.append((f"{place}/ranked_scores", "held-out ranked answers"))
    return [*stages, (f"{place}/numbers", "")]
