"""The stages of a run and their sizes, known before anything is made."""

from typing import Any

from selfalign.benchmarks.protocol import judges_to_load
from selfalign.config.data import Pairs, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.data.pair_rules import PairRule
from selfalign.judges.protocol import asks_a_server, wants_model
from selfalign.judges.written import WrittenScore
from selfalign.pipeline.inputs import makes_baseline
from selfalign.stages.evaluate import compares_on, opponents
from selfalign.stages.judge import Judge, Pairwise
from selfalign.stages.seeds import EvaluationFineTuning


def plan(config: ExperimentConfig) -> list[tuple[str, str]]:
    """(label, size) of every stage in the order the pipeline makes them."""
    data, sft = config.data, config.train.sft
    stages = _given(config)
    stages += _baseline(config) if makes_baseline(config) else []
    if config.trains_m1:
        stages.append(("M1", f"SFT, epochs {sft.epochs}, batch {sft.batch_size}"))
    stages += _evaluation(config, "M1")
    for iteration in range(1, config.iterations + 1):
        if isinstance(data, SelfRewarding):
            stages += _own_pairs(config, f"iteration_{iteration}")
            if data.accumulate and iteration > 1:
                stages.append((f"iteration_{iteration}/all_pairs", f"those of iterations 1 to {iteration}"))
        stages += _alignment(config, iteration)
        stages += _evaluation(config, f"M{iteration + 1}")
    return stages


def _given(config: ExperimentConfig) -> list[tuple[str, str]]:
    """Data, and models that are not trained."""
    data, asked = config.data, config.evaluate
    stages = [("seeds", f"{data.seeds.demonstrations} {data.seeds.ranked}".strip())]
    if asked.instructions:
        stages.append(("questions", f"{asked.count or 'all'} instructions of {asked.instructions}"))
    if (choose := config.train.choose).every_steps:
        stages.append(("validation", f"{choose.count or 'all'} instructions of {choose.instructions}"))
    if asked.against:
        stages.append(("given_outputs", f"answers of {asked.against}"))
    if isinstance(data, Pairs):
        stages.append(("iteration_1/pairs", f"the first {data.count} of {data.path}" if data.count else data.path))
    elif data.instruct.source:
        stages.append(("instructions", f"all instructions of {data.instruct.source}"))
    if (test := asked.preferences).source:
        stages.append(("preferences/pairs", f"{test.count or 'all'} pairs of {test.source}"))
    stages.append(("M0", config.model.path))
    if isinstance(data, SelfRewarding) and data.instruct.fixed_writer:
        stages.append(("writer", data.instruct.writer))
    for label, judge in (("judge", config.judge), ("referee", asked.head_to_head), ("preferences/judge", test.judge)):
        if wants_model(judge):
            stages.append((label, judge.model))
    stages += [(f"judges/{name}", path) for name, path in judges_to_load(config.benchmark).items()]
    if choose.every_steps and wants_model(choose.head_to_head):
        stages.append(("checkpoint_judge", choose.head_to_head.model))
    return stages


def _baseline(config: ExperimentConfig) -> list[tuple[str, str]]:
    """The SFT baseline, what is measured of it, and what it writes."""
    sft = config.train.sft
    stages = [
        ("SFT", f"SFT on IFT only, epochs {sft.epochs}, batch {sft.batch_size}"),
        ("evaluation_SFT/ranked_scores", "held-out ranked answers"),
        ("evaluation_SFT/numbers", ""),
    ]
    if config.data.seeds.evaluation_fine_tuning == EvaluationFineTuning.human:
        return [("ift", "the demonstrations without EFT"), *stages]
    return [
        *stages,
        ("eft/questions", "ranked questions to teach judging with"),
        ("eft/judgements", "their answers, judged by the SFT baseline"),
        ("eft/demonstrations", "IFT + judgements in the humans' order"),
    ]


def _own_pairs(config: ExperimentConfig, place: str) -> list[tuple[str, str]]:
    data, asked = config.data, config.data.instruct
    written = f"the next of {asked.source}" if asked.source else f"written by {asked.writer}"
    if not asked.source:
        written += f" in at most {asked.most_batches} batches of {asked.prompts_per_batch} prompts"
    candidates = data.instruct.count * data.respond.candidates
    return [
        (f"{place}/instructions", f"{data.instruct.count} new, {written}"),
        (f"{place}/responses", f"{candidates} candidates, {data.respond.candidates} each"),
        (f"{place}/judgements", _judging(config.judge, data.instruct.count, data.respond.candidates)),
        (f"{place}/pairs", _most_pairs(config)),
    ]


def _most_pairs(config: ExperimentConfig) -> str:
    """How many pairs, or positives, an iteration makes at most."""
    rule, written = config.pair, config.data.respond.candidates
    return f"up to {config.data.instruct.count * (rule.wanted(written) if isinstance(rule, PairRule) else written)}"


def _judging(judge: Judge, instructions: int, candidates: int) -> str:
    """How many judgements a judge makes of so many candidates of each instruction, and who it is."""
    size = str(instructions * candidates)
    if isinstance(judge, WrittenScore):
        size += f" × {judge.samples}"
    if isinstance(judge, Pairwise):
        size = f"{instructions * judge.pairs_of(candidates)} comparisons × 2 orders"
    return f"{size} by {type(judge).__name__}, model {_name_of(judge)}"


def _name_of(judge: Any) -> str:
    """Who judges."""
    return judge.endpoint.model if asks_a_server(judge) else judge.model


def _alignment(config: ExperimentConfig, iteration: int) -> list[tuple[str, str]]:
    label, train = f"M{iteration + 1}", config.train
    if not config.loss.pairwise:
        fine_tuning = (label, f"SFT on positives, epochs {train.sft.epochs}")
        if config.loss.start == "newest":
            return [fine_tuning]
        return [(f"iteration_{iteration}/demonstrations", "M1's demonstrations + positives"), fine_tuning]
    name = type(config.loss).__name__
    size = f"{name}, epochs {train.align.epochs}, batch {train.align.batch_size}"
    stages: list[tuple[str, str]] = []
    if train.reference_logps == "stored":
        stages.append((f"iteration_{iteration}/reference", f"log-probabilities of {train.reference}"))
        at_first = iteration == 1 and (train.reference == "sft" or not config.trains_m1)
        if train.reference != "previous" and not at_first:
            stages.append((f"iteration_{iteration}/start", f"log-probabilities of M{iteration}, to tell its change"))
    return [*stages, (label, size)]


def _evaluation(config: ExperimentConfig, name: str) -> list[tuple[str, str]]:
    place, settings = f"evaluation_{name}", config.evaluate
    stages: list[tuple[str, str]] = []
    before = [f"M{number}" for number in range(1, int(name[1:]))]
    if settings.instructions:
        count = str(settings.count or "all")
        stages.append((f"{place}/answers", f"{count} instructions"))
        if not isinstance(config.judge, Pairwise):
            stages.append((f"{place}/scores", f"judged by {settings.judge}"))
        referee = settings.head_to_head
        stages += [
            (f"{place}/against_{other}", f"both orders, judged by {_name_of(referee)}")
            for other in [*opponents(settings, before), *(["given"] if settings.against else [])]
        ]
        if name != "M1":
            stages.append((f"{place}/divergence", "log-probabilities of the answers under M1"))
    stages += _held_out_pairs(config, name)
    if config.data.seeds.ranked:
        stages.append((f"{place}/ranked_scores", "held-out ranked answers"))
    return [*stages, (f"{place}/numbers", ""), *_benchmarks(config, name, before)]


def _benchmarks(config: ExperimentConfig, name: str, before: list[str]) -> list[tuple[str, str]]:
    """Every benchmark, and behind it the comparisons on its questions."""
    place, settings = f"evaluation_{name}", config.evaluate
    stages: list[tuple[str, str]] = []
    for label, benchmark in config.benchmark.items():
        stages.append((f"{place}/{label}", benchmark.size))
        others = opponents(settings, before) if compares_on(settings, benchmark) else []
        judged = f"every turn in both orders, judged by {_name_of(settings.head_to_head)}" if others else ""
        stages += [(f"{place}/{label}_against_{other}", judged) for other in others]
    return stages


def _held_out_pairs(config: ExperimentConfig, name: str) -> list[tuple[str, str]]:
    """What measuring a model's rewards takes; every policy scores the pairs once."""
    place, test = f"evaluation_{name}", config.evaluate.preferences
    if not test.source:
        return []
    first, scored = name == "M1", [(f"{place}/logps", "held-out pairs")]
    if first:
        trained = scored if config.trains_m1 else []
        scored = [(f"{place}/reference_logps", "held-out pairs, by M0"), *trained]
    if first and test.judge is not None:
        scored.append(("preferences/scores", _judging(test.judge, test.count, 2) if test.count else "all pairs"))
    return [*scored, (f"{place}/preferences", "margin, accuracy and Δ")]
