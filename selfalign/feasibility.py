"""Settings without effect, and counts and lengths out of their limits' reach: refused before anything is made.

Each in one line, with what would do. Here the configuration alone is known. What only the data tell is checked where
they are read (given.py), and what M0 bounds once it is there (requirements.py).
"""

import math
from dataclasses import fields
from typing import TYPE_CHECKING

from selfalign.errors import SelfalignError
from selfalign.given import Pairs, SelfRewarding
from selfalign.losses import Positives
from selfalign.pairing import BestVsK, BestWorst, PairRule
from selfalign.stages.judge import Pairwise, SampledScore
from selfalign.stages.pair import PositivesOnly
from selfalign.stages.seeds import EvaluationFineTuning
from selfalign.training import TrainConfig

if TYPE_CHECKING:
    from selfalign.config import ExperimentConfig


def check_counts(config: "ExperimentConfig") -> None:
    """Checks what is known before any data are read.

    Raises:
        SelfalignError: a count is out of its limits' reach; both keys are named.
    """
    data, held_out = config.data, config.train.held_out_pairs
    if isinstance(data, Pairs):
        if data.count and held_out >= data.count:
            raise SelfalignError(
                f"train.held_out_pairs={held_out} of data.count={data.count} pairs leaves none to train on: lower it "
                f"below {data.count}, or raise data.count"
            )
        _check_checkpoints(config.train, data.count - held_out)
        return
    _check_seeds(data)
    _check_candidates(config, data)
    _check_scores(config)
    _check_training_lengths(config, data)
    if isinstance(rule := config.pair, PairRule):
        most = data.instruct.count * rule.wanted(data.respond.candidates)
        if rule.minimum_pairs > most:
            raise SelfalignError(f"pair.minimum_pairs={rule.minimum_pairs}, but {_sizes(data)} gives {most} at most")
        if held_out >= most:
            raise SelfalignError(
                f"train.held_out_pairs={held_out}, but {_sizes(data)} gives {most} pairs an iteration at most, which "
                "leaves none to train on: lower it or raise data.instruct.count"
            )
        _check_checkpoints(config.train, most * (config.iterations if data.accumulate else 1) - held_out)
    elif rule.minimum_examples > (most := data.instruct.count * data.respond.candidates):
        raise SelfalignError(f"pair.minimum_examples={rule.minimum_examples}, but {_sizes(data)} gives {most} at most")


def check_effects(config: "ExperimentConfig") -> None:
    """Refuses what is set and would do nothing: a run would say that it had been done.

    Raises:
        SelfalignError: such a setting.
    """
    pair, train = config.pair, config.train
    if isinstance(config.data, Pairs) and pair != BestWorst():
        changed = [f.name for f in fields(pair) if getattr(pair, f.name) != f.default]
        setting = f"pair.{changed[0]}={getattr(pair, changed[0])}" if changed else f"pair ({type(pair).__name__})"
        raise SelfalignError(
            f"{setting} would have no effect: data=pairs takes the pairs of data.path as they are given, and rules "
            "choose among responses that were judged; leave it out, or keep the pairs that are wanted in data.path"
        )
    config.model.lora.check_use()
    if train.align.average != "tokens":
        raise SelfalignError(
            f"train.align.average={train.align.average} would have no effect: an alignment's loss is averaged over its "
            "pairs; set train.sft.average, or leave it out"
        )
    if isinstance(config.loss, Positives):
        unused = {
            "train.held_out_pairs": (train.held_out_pairs, 0),
            "train.choose.every_steps": (train.choose.every_steps, 0),
            "train.reference": (train.reference, "previous"),
        }
        for key, (value, default) in unused.items():
            if value != default:
                raise SelfalignError(
                    f"{key}={value} would have no effect: loss=positives fine-tunes by train.sft and aligns nothing; "
                    f"set {key}={default}"
                )


def _sizes(data: SelfRewarding) -> str:
    return f"data.instruct.count={data.instruct.count} with data.respond.candidates={data.respond.candidates}"


def _check_checkpoints(train: TrainConfig, pairs: int) -> None:
    """Of an alignment on so many pairs at most (0 if that is not known) two checkpoints are compared at least."""
    steps = train.align.epochs * math.ceil(pairs / train.align.batch_size)
    if train.choose.every_steps and 0 < steps <= train.choose.every_steps:
        raise SelfalignError(
            f"train.choose.every_steps={train.choose.every_steps}, but an alignment takes {steps} steps at most, so no "
            "two checkpoints would be compared: lower it, or set it to 0"
        )


def _check_seeds(data: SelfRewarding) -> None:
    """New instructions are written after examples, which seeds give."""
    asked, given = data.instruct, data.seeds
    if asked.source:
        return
    if not given.demonstrations:
        raise SelfalignError(
            "data.instruct shows its writer seeds, and data.seeds.demonstrations names none: give some, or the "
            "instructions themselves with data.instruct.source"
        )
    if 0 < given.max_demonstrations < asked.seed_demonstrations:
        raise SelfalignError(
            f"data.instruct.seed_demonstrations={asked.seed_demonstrations}, but "
            f"data.seeds.max_demonstrations={given.max_demonstrations} leaves fewer: lower the one or raise the other"
        )


def _check_candidates(config: "ExperimentConfig", data: SelfRewarding) -> None:
    """Pairs, and comparisons, are made of two responses to one instruction."""
    candidates, rule = data.respond.candidates, config.pair
    needed = rule.k + 1 if isinstance(rule, BestVsK) else 2 if isinstance(rule, PairRule) else 1
    why = f"pair.k={rule.k}" if isinstance(rule, BestVsK) else "a pair"
    if isinstance(config.judge, Pairwise) and needed < 2:
        needed, why = 2, "judge=pairwise"
    if candidates < needed:
        raise SelfalignError(
            f"data.respond.candidates={candidates}, but {why} needs {needed} responses to an instruction: raise it to "
            f"{needed} or more"
        )


def _check_scores(config: "ExperimentConfig") -> None:
    """A judge's scale bounds what its scores can reach and by how much they can differ."""
    rule, judge = config.pair, config.judge
    low, high = getattr(judge, "low", None), getattr(judge, "high", None)
    if low is None or high is None:
        return
    if isinstance(rule, PositivesOnly) and rule.minimum_score > high:
        raise SelfalignError(f"pair.minimum_score={rule.minimum_score} is above judge.high={high}: lower it")
    if isinstance(rule, PairRule) and rule.minimum_margin >= high - low:
        raise SelfalignError(
            f"pair.minimum_margin={rule.minimum_margin}, but scores from judge.low={low} to judge.high={high} differ "
            f"by {high - low} at most: lower it"
        )


def _check_training_lengths(config: "ExperimentConfig", data: SelfRewarding) -> None:
    """What is written to be trained on, a prompt before it, must fit into the longest sequence."""
    positives = isinstance(config.loss, Positives)
    stage = "train.sft" if positives else "train.align"
    limit = (config.train.sft if positives else config.train.align).max_length
    written = {"data.respond.sampling": (data.respond.sampling.max_new_tokens, stage, limit)}
    if data.seeds.evaluation_fine_tuning == EvaluationFineTuning.baseline and isinstance(config.judge, SampledScore):
        written["judge.sampling"] = (config.judge.sampling.max_new_tokens, "train.sft", config.train.sft.max_length)
    for key, (tokens, of, longest) in written.items():
        if tokens >= longest:
            raise SelfalignError(
                f"{key}.max_new_tokens={tokens} leaves no token of {of}.max_length={longest} for a prompt, so the "
                "longest texts are never trained on: lower the one or raise the other"
            )
