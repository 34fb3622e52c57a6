"""Settings without effect, and counts and lengths out of their limits' reach: refused before anything is made.

Each in one line, with what would do. Here the configuration alone is known. What only the data tell is checked where
they are read (given.py), and what M0 bounds once it is there (requirements.py).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields

from selfalign.config.components import check_components, fault_of
from selfalign.config.data import Pairs, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.errors import SelfalignError
from selfalign.data.pair_rules import BestVsK, BestWorst, PairRule
from selfalign.judges.protocol import asks_a_server
from selfalign.losses.protocol import refinement_of
from selfalign.models.quantization import check_engine
from selfalign.runs.folder import check_name
from selfalign.stages.judge import ImplicitReward, Pairwise, SampledScore
from selfalign.stages.pair import PositivesOnly
from selfalign.stages.seed_data import EFTSource, TeachableJudge
from selfalign.training.config import TrainConfig


def check_experiment(config: ExperimentConfig) -> None:
    """Checks what settings mean beside one another.

    Raises:
    SelfalignError: some cannot be used together, have no effect, or are out of reach; the keys are named.
    """
    check_components(config)
    check_name(config.name)
    if config.hub.push or config.hub.repo_id:
        check_repository(config.hub.repo_id)
    if config.price_per_hour < 0:
        raise SelfalignError(f"price_per_hour must be 0 or more, got {config.price_per_hour}")
    if config.iterations < 1:
        raise SelfalignError(f"iterations must be 1 or more, got {config.iterations}")
    if config.model.quantization != "none" and config.train.parallelism.sharded:
        raise SelfalignError(
            "train.parallelism.strategy=fsdp2 cannot share out weights in 4 bits: set model.quantization=none"
        )
    check_engine(config.model.quantization, type(config.engine).__name__.lower())
    if isinstance(config.data, Pairs) and config.iterations != 1:
        raise SelfalignError(f"iterations={config.iterations}, but data=pairs gives one set of pairs: set iterations=1")
    if isinstance(config.pair, PairRule):
        config.pair.check_iterations(config.iterations)
    if isinstance(config.data, SelfRewarding) and config.loss.pairwise == isinstance(config.pair, PositivesOnly):
        raise SelfalignError("loss=positives and pair=positives go together: one of them alone has no meaning")
    _check_evaluation_fine_tuning(config)
    _check_judge(config)
    _check_benchmarks(config)
    check_effects(config)
    check_counts(config)


def _check_evaluation_fine_tuning(config: ExperimentConfig) -> None:
    """What its examples need is there."""
    seeds = config.data.seed_data
    if config.evaluate.sft_baseline and not (seeds.demonstrations and seeds.ranked):
        raise SelfalignError(
            "evaluate.sft_baseline=true needs data.seed_data.demonstrations to train the SFT baseline, and "
            "data.seed_data.ranked to measure it"
        )
    if seeds.eft_source == EFTSource.baseline and not isinstance(config.judge, SampledScore):
        raise SelfalignError(
            "data.seed_data.eft_source=baseline needs a judge that writes justifications: choose "
            "judge=additive or judge=multiple_choice"
        )


def _check_benchmarks(config: ExperimentConfig) -> None:
    """Every one is chosen as an option, with a name that can be part of a label, and has settings that make sense."""
    for name, benchmark in config.benchmark.items():
        if not hasattr(benchmark, "check"):
            raise SelfalignError(f"unknown key benchmark.{name}: choose benchmarks with benchmark=[NAME,...]")
        check_name(name)
        benchmark.check(f"benchmark.{name}")


def _check_judge(config: ExperimentConfig) -> None:
    """What a judge cannot do is refused before anything is made."""
    seeds, judge = config.data.seed_data, config.judge
    teaches = seeds.ranked and seeds.eft_source == EFTSource.human
    if teaches and not isinstance(judge, Pairwise) and fault_of(judge, TeachableJudge):
        raise SelfalignError(
            f"the judge {type(judge).__name__} writes no judgements that could be taught: set "
            "data.seed_data.eft_source=none"
        )
    if isinstance(judge, ImplicitReward) and config.evaluate.instructions and config.evaluate.judge == "base":
        raise SelfalignError(
            "evaluate.judge=base cannot be used with judge=implicit: M0 has no reference policy. Set "
            "evaluate.judge=sft."
        )
    for end in ("min_score", "max_score"):
        if not isinstance(value := getattr(judge, end, 0), int):
            raise SelfalignError(f"judge.{end} must be a whole number, got {value!r}")


def check_counts(config: ExperimentConfig) -> None:
    """Checks what is known before any data are read.

    Raises:
        SelfalignError: a count is out of its limits' reach; both keys are named.
    """
    data, held_out = config.data, config.train.validation_pairs
    if isinstance(data, Pairs):
        if data.count and held_out >= data.count:
            raise SelfalignError(
                f"train.validation_pairs={held_out} of data.count={data.count} pairs leaves none to train on: lower it "
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
                f"train.validation_pairs={held_out}, but {_sizes(data)} gives {most} pairs an iteration at most, which "
                "leaves none to train on: lower it or raise data.instruct.count"
            )
        _check_checkpoints(config.train, most * (config.iterations if data.accumulate_pairs else 1) - held_out)
    elif rule.minimum_examples > (most := data.instruct.count * data.respond.candidates):
        raise SelfalignError(f"pair.minimum_examples={rule.minimum_examples}, but {_sizes(data)} gives {most} at most")


def check_effects(config: ExperimentConfig) -> None:
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
    if train.align.loss_reduction != "tokens":
        raise SelfalignError(
            f"train.align.loss_reduction={train.align.loss_reduction} would have no effect: an alignment's loss is "
            f"averaged over its "
            "pairs; set train.sft.loss_reduction, or leave it out"
        )
    if not config.loss.pairwise:
        unused = {
            "train.validation_pairs": (train.validation_pairs, 0),
            "train.checkpoint_selection.interval_steps": (train.checkpoint_selection.interval_steps, 0),
            "train.reference_policy": (train.reference_policy, "previous"),
        }
        for key, (value, default) in unused.items():
            if value != default:
                raise SelfalignError(
                    f"{key}={value} would have no effect: loss=positives fine-tunes by train.sft and aligns nothing; "
                    f"set {key}={default}"
                )


def without_effect(config: ExperimentConfig, overrides: Sequence[str]) -> list[str]:
    """A line for each setting of the command line that does nothing beside the others.

    What the files of an experiment set is none of it, and nothing is refused: a sweep over `loss` gives every job the
    settings that one of them needs.
    """
    given = {match[1]: override for override in overrides if (match := re.match(r"\+*([\w.]+)=", override))}
    idle = [(re.compile(rf"({key})(\..+)?"), why) for key, why in _idle(config)]
    reasons = ((override, [why for key, why in idle if key.fullmatch(name)]) for name, override in given.items())
    return [f"{override} has no effect: {whys[0]}" for override, whys in reasons if whys]


def _idle(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """(keys, as a regular expression; why what is set there or below has no effect)."""
    data, train, asked = config.data, config.train, config.evaluate
    if not config.loss.pairwise:
        read = "dtype|max_length|microbatch_tokens"  # For log-probabilities of held-out pairs.
        unread = rf"train\.align(?!\.({read})$)" if asked.preference_pairs.source else r"train\.align"
        yield rf"{unread}|train\.reference_logprobs", "loss=positives fine-tunes by train.sft and aligns nothing"
    elif not config.trains_m1:
        yield r"train\.sft", "there are no demonstrations, so M1 is M0"
    if not train.checkpoint_selection.interval_steps:
        yield (
            r"train\.checkpoint_selection(?!\.(interval_steps|instructions)$)",
            "train.checkpoint_selection.interval_steps=0 compares no checkpoints",
        )
    if not asked.instructions:
        answered = "count|sampling|judge" + "|head_to_head" * (asked.head_to_head is None)
        yield rf"evaluate\.({answered})", "evaluate.instructions names none, so no model answers any"
    if not asked.preference_pairs.source:
        yield r"evaluate\.preference_pairs\.count", "evaluate.preference_pairs.source names no pairs"
    yield from _idle_data(config)
    yield from _idle_beside(config)
    if not config.hub.push:
        yield r"hub\.(repo_id|private)", "hub.push=false sends nothing to a hub"
    if not config.dry_run:
        yield "price_per_hour", "only dry_run=true estimates what a run costs"
    if isinstance(data, Pairs) and not (data.seed_data.ranked or asked.instructions):
        yield "judge", "pairs are given, and there are no answers or ranked questions to score"


def _idle_data(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """The same of what is given and written."""
    data, seeds = config.data, config.data.seed_data
    if isinstance(data, SelfRewarding) and data.instruct.source:
        writing = "prompt|sampling|seed_examples|generated_examples|prompts_per_batch|max_batches"
        yield rf"data\.instruct\.({writing})", "data.instruct.source gives the instructions, so none are written"
    if not seeds.demonstrations:
        yield r"data\.seed_data\.max_demonstrations", "data.seed_data.demonstrations names none"
    if not seeds.ranked:
        ranked = "max_ranked|held_out_share|eft_source|max_score_imbalance"
        yield rf"data\.seed_data\.({ranked})", "data.seed_data.ranked names no questions"
    elif seeds.eft_source != EFTSource.baseline:
        why = "only data.seed_data.eft_source=baseline balances the scores of EFT examples"
        yield r"data\.seed_data\.max_score_imbalance", why


def _idle_beside(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """The same of what a choice of its own group leaves unread."""
    refinement, train, asked = refinement_of(config.loss), config.train, config.evaluate
    comparators = {
        "evaluate": asked.head_to_head,
        "train.checkpoint_selection": train.checkpoint_selection.head_to_head,
    }
    if refinement is not None and refinement.augmentation() is None:
        why = f"loss.refinement.source={refinement.source} puts no prompt before x"
        yield r"loss\.refinement\.(prompt|place|scale)", why
    for key, comparator in comparators.items():
        if comparator is not None:
            served = asks_a_server(comparator)
            unread = "model|max_batch_tokens|debias_position" if served else "verdict_tokens"
            why = "a server compares" if served else "a policy's verdict is one token"
            yield rf"{re.escape(key)}\.head_to_head\.({unread})", why


def _sizes(data: SelfRewarding) -> str:
    return f"data.instruct.count={data.instruct.count} with data.respond.candidates={data.respond.candidates}"


def _check_checkpoints(train: TrainConfig, pairs: int) -> None:
    """Of an alignment on so many pairs at most (0 if that is not known) two checkpoints are compared at least."""
    steps = train.align.epochs * math.ceil(pairs / train.align.batch_size)
    if train.checkpoint_selection.interval_steps and 0 < steps <= train.checkpoint_selection.interval_steps:
        raise SelfalignError(
            f"train.checkpoint_selection.interval_steps={train.checkpoint_selection.interval_steps}, but an "
            f"alignment takes {steps} steps at most, so no "
            "two checkpoints would be compared: lower it, or set it to 0"
        )


def _check_seeds(data: SelfRewarding) -> None:
    """New instructions are written after examples, which seeds give."""
    asked, given = data.instruct, data.seed_data
    if asked.source:
        return
    if not given.demonstrations:
        raise SelfalignError(
            "data.instruct shows its writer seeds, and data.seed_data.demonstrations names none: give some, or the "
            "instructions themselves with data.instruct.source"
        )
    if 0 < given.max_demonstrations < asked.seed_examples:
        raise SelfalignError(
            f"data.instruct.seed_examples={asked.seed_examples}, but "
            f"data.seed_data.max_demonstrations={given.max_demonstrations} leaves fewer: lower the one or raise the "
            f"other"
        )


def _check_candidates(config: ExperimentConfig, data: SelfRewarding) -> None:
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


def _check_scores(config: ExperimentConfig) -> None:
    """A judge's scale bounds what its scores can reach and by how much they can differ."""
    rule, judge = config.pair, config.judge
    low, high = getattr(judge, "min_score", None), getattr(judge, "max_score", None)
    if low is None or high is None:
        return
    if isinstance(rule, PositivesOnly) and rule.minimum_score > high:
        raise SelfalignError(f"pair.minimum_score={rule.minimum_score} is above judge.max_score={high}: lower it")
    if isinstance(rule, PairRule) and rule.minimum_margin >= high - low:
        raise SelfalignError(
            f"pair.minimum_margin={rule.minimum_margin}, but scores from judge.min_score={low} to "
            f"judge.max_score={high} differ "
            f"by {high - low} at most: lower it"
        )


def _check_training_lengths(config: ExperimentConfig, data: SelfRewarding) -> None:
    """What is written to be trained on, a prompt before it, must fit into the longest sequence."""
    pairwise = config.loss.pairwise
    stage = "train.align" if pairwise else "train.sft"
    limit = (config.train.align if pairwise else config.train.sft).max_length
    written = {"data.respond.sampling": (data.respond.sampling.max_new_tokens, stage, limit)}
    if data.seed_data.eft_source == EFTSource.baseline and isinstance(config.judge, SampledScore):
        written["judge.sampling"] = (config.judge.sampling.max_new_tokens, "train.sft", config.train.sft.max_length)
    for key, (tokens, of, longest) in written.items():
        if tokens >= longest:
            raise SelfalignError(
                f"{key}.max_new_tokens={tokens} leaves no token of {of}.max_length={longest} for a prompt, so the "
                "longest texts are never trained on: lower the one or raise the other"
            )


def check_repository(name: str) -> None:
    """A repository has an owner and a name.

    Raises:
        SelfalignError: this is not one.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise SelfalignError(
            f"hub.push=true needs hub.repo_id=owner/name, the repository on the hub; got hub.repo_id={name!r}"
        )
