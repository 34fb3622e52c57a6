"""Check a configuration before anything is made: settings without effect, and values that exclude each other.

Each error is one line that says what to change. Only the configuration is known here. `pipeline/inputs.py` checks what
depends on the data, and `pipeline/requirements.py` what depends on M0.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from selfalign.benchmarks.grading import Grader
from selfalign.benchmarks.judge_test import JudgeTest
from selfalign.benchmarks.rating import HIGH, LOW
from selfalign.config.components import check_components, fault_of
from selfalign.config.data import Pairs, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.judges import PAIR_JUDGE, all_judges_of, judges_of
from selfalign.core.errors import SelfalignError
from selfalign.data.pair_rules import BestVsK, BestWorst, ByWriter, PairRule
from selfalign.judges.comparator import ComparatorSettings
from selfalign.judges.criteria import CriteriaSource, criteria_of
from selfalign.judges.panel import Panel, judges_in
from selfalign.judges.protocol import (
    OWN_MODELS,
    Rubric,
    asks_a_policy,
    asks_a_server,
    head_of,
    only_compares,
    other_scale,
    verifies,
)
from selfalign.losses.protocol import Offset, ScheduledLoss, SmoothedLoss, aligns, is_unpaired, refinement_of
from selfalign.models.quantization import check_engine
from selfalign.runs.folder import check_name
from selfalign.stages.evaluate import compares_on
from selfalign.stages.instruct import DEMONSTRATIONS
from selfalign.stages.judge import ExpectedScore, ImplicitReward, Pairwise, SampledScore, WrittenScore
from selfalign.stages.pair import Labels, PositivesOnly, file_of
from selfalign.stages.respond import DEMONSTRATION, NEXT
from selfalign.stages.seed_data import AssistantTurns, EFTSource, TeachableJudge
from selfalign.training.config import TrainConfig

CHANGES = ("judge", "pair", "loss", "writers")
"""What may change from an iteration on."""


def check_experiment(config: ExperimentConfig) -> None:
    """Check settings that depend on one another.

    Raises:
        SelfalignError: settings cannot be used together, have no effect, or are out of range; the message names the
            keys.
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
            "train.parallelism.strategy=fsdp2 cannot shard weights in 4 bits: set model.quantization=none"
        )
    check_engine(config.model.quantization, type(config.engine).__name__.lower())
    if isinstance(config.data, Pairs) and config.iterations != 1:
        raise SelfalignError(f"iterations={config.iterations}, but data=pairs gives one set of pairs: set iterations=1")
    _check_loss_and_rule(config)
    _check_evaluation_fine_tuning(config)
    _check_judge(config)
    _check_iterations(config)
    _check_meta_judge(config)
    _check_chosen("tracker", config.tracker, "open")
    _check_chosen("benchmark", config.benchmark, "check")
    _check_benchmarks(config)
    check_effects(config)
    check_counts(config)


def _check_evaluation_fine_tuning(config: ExperimentConfig) -> None:
    """Check that EFT and the SFT baseline have the data and the judge that they need."""
    seeds = config.data.seed_data
    if config.evaluate.sft_baseline and not seeds.fine_tune:
        raise SelfalignError("evaluate.sft_baseline=true trains the SFT baseline: set data.seed_data.fine_tune=true")
    if config.evaluate.sft_baseline and not (seeds.demonstrations and seeds.ranked):
        raise SelfalignError(
            "evaluate.sft_baseline=true needs data.seed_data.demonstrations to train the SFT baseline, and "
            "data.seed_data.ranked to measure it"
        )
    if seeds.eft_source.by_baseline and not isinstance(config.judge, SampledScore):
        raise SelfalignError(
            f"data.seed_data.eft_source={seeds.eft_source} needs a judge that writes justifications: choose "
            "judge=additive or judge=multiple_choice"
        )


def _check_loss_and_rule(config: ExperimentConfig) -> None:
    """Check that loss and pair rule have settings for every iteration, and that the one takes what the other gives."""
    if isinstance(config.pair, PairRule):
        config.pair.check_iterations(config.iterations)
    if isinstance(config.loss, ScheduledLoss):
        config.loss.check_iterations(config.iterations)
    if isinstance(config.data, SelfRewarding) and aligns(config.loss) == isinstance(config.pair, PositivesOnly):
        raise SelfalignError("loss=positives and pair=positives need each other: set both, or neither")
    if isinstance(config.data, SelfRewarding) and isinstance(config.pair, Labels):
        _check_labels(config)
    if isinstance(config.data, SelfRewarding):
        config.data.replay.check_iterations(config.iterations)
    if isinstance(config.pair, PairRule) and config.pair.consistency != "none":
        if not isinstance(config.loss, SmoothedLoss):
            raise SelfalignError(
                f"pair.consistency={config.pair.consistency} gives pairs a label smoothing, which {config.loss.title} "
                "has no use for: choose loss=dpo or loss=sr_dpo"
            )
        if not asks_a_policy(config.judge) or config.judge.model not in OWN_MODELS:
            raise SelfalignError(
                f"pair.consistency={config.pair.consistency} compares the judging of two models of the run: choose a "
                "judge that is one, such as judge=expected_score judge.model=self"
            )
        if isinstance(config.judge, ImplicitReward):
            raise SelfalignError(
                "pair.consistency cannot be used with judge=implicit: M0 has no reference policy. Choose another judge"
            )
        if config.judge.model == config.pair.consistent_with:
            raise SelfalignError(
                f"pair.consistent_with={config.pair.consistent_with} and judge.model are the same judge: choose another"
            )


def _check_labels(config: ExperimentConfig) -> None:
    """Check that labelled responses are made for a loss that takes them, and joined with no pairs."""
    if not is_unpaired(config.loss):
        raise SelfalignError(
            f"pair=labels labels single responses, but {config.loss.title} compares the two of a pair: choose loss=kto"
        )
    joined = {"data.replay.share": config.data.replay.largest_share, "data.meta_judge": config.meta_judge is not None}
    for key, is_used in joined.items():
        if is_used:
            raise SelfalignError(
                f"{key} puts pairs beside an iteration's own, and pair=labels makes none: leave it out, or choose "
                "another rule, such as pair=best_worst, whose pairs loss=kto takes as well"
            )


def _check_meta_judge(config: ExperimentConfig) -> None:
    """Check that each iteration with pairs of judgements has a judge that writes several of each response."""
    meta = config.meta_judge
    if meta is None:
        return
    for iteration in meta.chosen_iterations(config.iterations):
        own = config.in_iteration(iteration)
        judge, key = own.judge, own.judge_setting(iteration)
        if not isinstance(judge, SampledScore) or judge.model != "self":
            named = f" with {key}.model={judge.model}" if isinstance(judge, SampledScore) else ""
            raise SelfalignError(
                f"data.meta_judge pairs judgements that M_t itself writes, but {key} is {type(judge).__name__}{named}: "
                f"choose judge=additive or judge=multiple_choice with {key}.model=self, or set data/meta_judge=null"
            )
        if judge.num_samples < 3 or judge.num_samples < meta.judgements:
            raise SelfalignError(
                f"{key}.num_samples={judge.num_samples}, but data.meta_judge compares "
                f"{max(3, meta.judgements)} judgements of a response or more: raise it"
            )
        if not aligns(own.loss) or own.loss.offset in (Offset.score_gap, Offset.win_shares):
            raise SelfalignError(
                f"data.meta_judge: the loss {own.loss.title} cannot be trained on pairs of judgements, which have no "
                "scores: choose loss=dpo, for example"
            )
        if not own.pair.needs_scores:
            raise SelfalignError("data.meta_judge needs judgements, and pair.by_score=false asks for none: set it true")


def _check_chosen(group: str, chosen: dict[str, Any], member: str) -> None:
    """Check that each member of a group that takes several is chosen as an option."""
    for name, one in chosen.items():
        if not hasattr(one, member):
            raise SelfalignError(f"unknown key {group}.{name}: choose {group}s with {group}=[NAME,...]")


def _check_benchmarks(config: ExperimentConfig) -> None:
    """Check each benchmark: its name can be part of a label, and its settings are valid."""
    for name, benchmark in config.benchmark.items():
        check_name(name)
        benchmark.check(f"benchmark.{name}")
        if isinstance(benchmark, JudgeTest):
            _check_tested_judge(f"benchmark.{name}.judge", benchmark.judge or config.judge)


def _check_tested_judge(key: str, judge: Any) -> None:
    """Check that the judge of a benchmark of judges needs nothing but an instruction and its responses."""
    needed = "the judgements of its members" if isinstance(judge, Panel) else ""
    if criteria_of(judge) is not None:
        needed = "criteria of every instruction"
    if verifies(judge):
        needed = "instructions that say what is right"
    if needed:
        raise SelfalignError(
            f"{key}: the judge {type(judge).__name__} needs {needed}, which a benchmark of judges has not: measure "
            f"another one with judge@{key}=OPTION, or leave the benchmark out"
        )


def _check_judge(config: ExperimentConfig) -> None:
    """Check that the judge can do what the settings require of it."""
    seeds, judge = config.data.seed_data, config.judge
    _check_judged_instructions(config)
    if seeds.ranked and any(map(verifies, judges_in("judge", judge).values())):
        raise SelfalignError(
            f"the judge {type(judge).__name__} cannot judge ranked answers, whose questions do not say what is right: "
            "set data.seed_data.ranked=''"
        )
    _check_judge_of_pairs(config.evaluate.preference_pairs.judge)
    teaches = seeds.ranked and seeds.eft_source == EFTSource.human
    if teaches and not isinstance(judge, Pairwise) and fault_of(judge, TeachableJudge):
        raise SelfalignError(
            f"the judge {type(judge).__name__} writes no judgements to fine-tune on: set data.seed_data.eft_source=none"
        )
    _check_given_criteria(config)
    if isinstance(judge, ImplicitReward) and config.evaluate.instructions and config.evaluate.judge == "base":
        raise SelfalignError(
            "evaluate.judge=base cannot be used with judge=implicit: M0 has no reference policy. Set "
            "evaluate.judge=sft."
        )
    _check_ends("judge", judge)


def _check_judge_of_pairs(judge: Any) -> None:
    """Check that the judge of held-out pairs, or each judge of a panel, can judge them, and is one for all models."""
    _check_ends(PAIR_JUDGE, judge)
    for place, member in judges_in(PAIR_JUDGE, judge).items():
        if verifies(member):
            raise SelfalignError(f"{place} cannot be verifier: pairs do not say what is right. Choose another judge")
        if member is not None and asks_a_policy(member) and member.model in ("self", "previous"):
            raise SelfalignError(
                f"{place}.model must be the same judge for all models: sft, base, a folder, a hub id or a packaged "
                f"model; got {member.model}"
            )


def _check_ends(key: str, judge: Any) -> None:
    """Check a panel, and that scales end in whole numbers."""
    if isinstance(judge, Panel):
        judge.check(key)
    for place, member in judges_in(key, judge).items():
        for end in ("min_score", "max_score"):
            if not isinstance(value := getattr(member, end, 0), int):
                raise SelfalignError(f"{place}.{end} must be a whole number, got {value!r}")


def _check_iterations(config: ExperimentConfig) -> None:
    """Check what changes from an iteration on, and the settings of each such iteration."""
    for start, changes in config.at.items():
        key = f"at.{start}"
        if not start.isdecimal() or not 2 <= int(start) <= config.iterations:
            raise SelfalignError(
                f"{key}: what changes from an iteration on is for iterations 2 to iterations={config.iterations}"
            )
        if not isinstance(changes, dict) or not changes or set(changes) - set(CHANGES):
            found = f"{key}.{', '.join(sorted(set(changes) - set(CHANGES)))}" if isinstance(changes, dict) else key
            raise SelfalignError(f"{found}: from an iteration on, {', '.join(CHANGES)} can change, and nothing else")
        if isinstance(config.data, Pairs):
            raise SelfalignError(f"{key} has no effect: data=pairs has one iteration")
        try:
            own = config.in_iteration(int(start))
            check_components(own)
            _check_ends(own.judge_setting(int(start)), own.judge)
            _check_judged_instructions(own)
            _check_loss_and_rule(own)
            check_effects(own)
            check_counts(own)
        except SelfalignError as error:
            raise SelfalignError(f"{key}: {error}") from error
        if isinstance(config.data, SelfRewarding) and config.data.accumulate_pairs:
            first, made = file_of(config.pair), file_of(own.pair)
            if made != first:
                raise SelfalignError(
                    f"data.accumulate_pairs=true trains on what all iterations made, but pair makes {first} and "
                    f"{key}.pair {made}: set data.accumulate_pairs=false, or choose rules that make the same"
                )


def _check_judged_instructions(config: ExperimentConfig) -> None:
    """Check that a judge that checks what instructions say is right gets only instructions that can say it."""
    data, judge = config.data, config.judge
    written = isinstance(data, SelfRewarding) and not data.instruct.source
    if written and any(map(verifies, judges_in("judge", judge).values())):
        raise SelfalignError(
            f"the judge {type(judge).__name__} checks what an instruction says is right, and written ones say nothing: "
            "set data=verifiable, or data.instruct.source to instructions that do"
        )


def _check_given_criteria(config: ExperimentConfig) -> None:
    """Check that a judge that takes the criteria of the data judges nothing but instructions from data."""
    lacking = {PAIR_JUDGE: "pairs have no criteria"}
    if isinstance(data := config.data, SelfRewarding) and not data.instruct.source:
        written = "instructions that a model writes have none: set data.instruct.source"
        lacking |= dict.fromkeys(["judge", *(f"at.{start}.judge" for start in config.at)], written)
    for key, judge in judges_of(config).items():
        criteria, why = criteria_of(judge), lacking.get(key.partition(".members.")[0])
        if why and criteria is not None and criteria.source == CriteriaSource.given:
            raise SelfalignError(
                f"{key}.criteria.source=given takes the criteria of the data, but {why}; or set "
                f"{key}.criteria.source=written"
            )


def check_counts(config: ExperimentConfig) -> None:
    """Check counts and lengths as far as they are known without the data.

    Raises:
        SelfalignError: a count is out of range; the message names both keys.
    """
    data, held_out = config.data, config.train.validation_pairs
    sides = 2 if is_unpaired(config.loss) else 1
    if isinstance(data, Pairs):
        if data.count and held_out >= data.count:
            raise SelfalignError(
                f"train.validation_pairs={held_out} of data.count={data.count} pairs leaves none to train on: lower it "
                f"below {data.count}, or raise data.count"
            )
        check_checkpoints(config.train, sides * data.count - held_out)
        return
    _check_seeds(data)
    _check_writers(config, data)
    _check_candidates(config, data)
    _check_scores(config)
    _check_training_lengths(config, data)
    if isinstance(rule := config.pair, PairRule):
        most = data.instruct.count * rule.wanted(data.respond.most_candidates)
        if rule.minimum_pairs > most:
            raise SelfalignError(f"pair.minimum_pairs={rule.minimum_pairs}, but {_sizes(data)} gives {most} at most")
        most = math.ceil(most / (1 - data.replay.largest_share))
        if held_out >= most:
            raise SelfalignError(
                f"train.validation_pairs={held_out}, but {_sizes(data)} gives {most} pairs an iteration at most, which "
                "leaves none to train on: lower it or raise data.instruct.count"
            )
        most += data.instruct.count if data.meta_judge is not None else 0
        most *= sides
    elif rule.minimum_examples > (most := data.instruct.count * data.respond.most_candidates):
        raise SelfalignError(f"pair.minimum_examples={rule.minimum_examples}, but {_sizes(data)} gives {most} at most")
    if aligns(config.loss):
        check_checkpoints(config.train, most * (config.iterations if data.accumulate_pairs else 1) - held_out)


def check_effects(config: ExperimentConfig) -> None:
    """Check that no setting is without effect, because the configuration would claim what the run does not do.

    Raises:
        SelfalignError: such a setting.
    """
    pair, train = config.pair, config.train
    if isinstance(config.data, Pairs) and pair != BestWorst():
        changed = [f.name for f in fields(pair) if getattr(pair, f.name) != f.default]
        setting = f"pair.{changed[0]}={getattr(pair, changed[0])}" if changed else f"pair ({type(pair).__name__})"
        raise SelfalignError(
            f"{setting} would have no effect: data=pairs uses all pairs of data.path, and pair rules select among "
            "judged responses. Leave it out, or select the pairs in data.path"
        )
    config.model.lora.check_use()
    if train.align.loss_reduction != "tokens":
        raise SelfalignError(
            f"train.align.loss_reduction={train.align.loss_reduction} would have no effect: the loss of an alignment "
            "is averaged over its pairs. Set train.sft.loss_reduction, or leave it out"
        )
    refinement = refinement_of(config.loss)
    if refinement is not None and refinement.source == "shuffled" and train.align.batch_size == 1:
        raise SelfalignError(
            "loss.refinement.source=shuffled would have no effect with train.align.batch_size=1: pairs take the Δ of "
            "others of their step. Raise train.align.batch_size; train.align.microbatch_tokens limits memory"
        )
    if refinement is not None and refinement.normalise != "none" and train.align.batch_size == 1:
        raise SelfalignError(
            f"train.align.batch_size=1 leaves the loss {config.loss.title} nothing to normalise Δ with, which it does "
            "over the pairs of a step: raise train.align.batch_size; train.align.microbatch_tokens limits memory"
        )
    if not aligns(config.loss):
        unused = {
            "train.validation_pairs": (train.validation_pairs, 0),
            "train.checkpoint_selection.interval_steps": (train.checkpoint_selection.interval_steps, 0),
            "train.reference_policy": (train.reference_policy, "previous"),
        }
        if isinstance(config.data, SelfRewarding):
            unused["data.replay.source"] = (config.data.replay.source, "")
        for key, (value, default) in unused.items():
            if value != default:
                raise SelfalignError(
                    f"{key}={value} would have no effect: loss=positives fine-tunes with train.sft and aligns nothing; "
                    f"set {key}={default}"
                )


def without_effect(config: ExperimentConfig, overrides: Sequence[str]) -> list[str]:
    """Return a line for each override on the command line that has no effect beside the others.

    The settings of an experiment's files are not reported. Nothing is refused, because a sweep over `loss` gives every
    job the settings that only some of them use.
    """
    given = {match[1]: override for override in overrides if (match := re.match(r"\+*([\w.]+)=", override))}
    idle = [(re.compile(rf"({key})(\..+)?"), why) for key, why in _idle(config)]
    reasons = ((override, [why for key, why in idle if key.fullmatch(name)]) for name, override in given.items())
    return [f"{override} has no effect: {whys[0]}" for override, whys in reasons if whys]


def other_scales(config: ExperimentConfig) -> list[str]:
    """Return a line for each judge whose rubric names another scale than the one its scores are read on.

    A judge that writes is then often out of range. One whose probabilities are read looks as if nothing were wrong.
    """
    lines: list[str] = []
    for key, judge in all_judges_of(config).items():
        if isinstance(judge, Grader):
            ends, advice = (LOW, HIGH), f"Let {key}.prompt ask for such a rating"
        elif isinstance(judge, Rubric):
            ends = (judge.min_score, judge.max_score)
            advice = f"Set {key}.min_score and {key}.max_score to the scale of the rubric"
        else:
            continue
        if said := other_scale(judge.prompt, *ends):
            lines.append(f"{key}.prompt says {said!r}, but scores from {ends[0]} to {ends[1]} are read. {advice}")
    return lines


def other_forms(config: ExperimentConfig) -> list[str]:
    """Return a line for each judge whose prompt does not ask for the form in which its verdict is read.

    A judge that writes then mostly has no verdict. One whose probabilities are read looks as if nothing were wrong.
    """
    lines: list[str] = []
    for key, judge in all_judges_of(config).items():
        forms: list[str] = []
        if isinstance(judge, ComparatorSettings):
            forms = [*judge.forms]
        elif isinstance(judge, Grader) and not judge.prompts:
            forms = ["[["]
        elif isinstance(judge, WrittenScore | ExpectedScore):
            forms = ["Score:"]
        elif criteria_of(judge) is not None:
            forms = ["Answer: Yes", "Answer: No"]
        if absent := [form for form in forms if form.casefold() not in judge.prompt.casefold()]:
            lines.append(
                f"{key}.prompt does not ask for {' or '.join(absent)}, and nothing else is read as the verdict"
            )
    return lines


def _idle(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Yield (regular expression of keys, why setting them or keys below has no effect)."""
    data, train, asked = config.data, config.train, config.evaluate
    if not aligns(config.loss):
        read = "dtype|max_length|microbatch_tokens"  # For log-probabilities of held-out pairs.
        unread = rf"train\.align(?!\.({read})$)" if asked.preference_pairs.source else r"train\.align"
        yield rf"{unread}|train\.reference_logprobs", "loss=positives fine-tunes with train.sft and aligns nothing"
    elif not config.trains_m1:
        why = "there are no demonstrations" if config.data.seed_data.fine_tune else "data.seed_data.fine_tune=false"
        yield r"train\.sft", f"{why}, so M1 is M0"
    if not train.checkpoint_selection.interval_steps:
        yield (
            r"train\.checkpoint_selection(?!\.(interval_steps|instructions)$)",
            "train.checkpoint_selection.interval_steps=0 compares no checkpoints",
        )
    if not asked.instructions:
        unused = "count|sampling|judge" + "|head_to_head" * (asked.head_to_head is None)
        yield rf"evaluate\.({unused})", "evaluate.instructions is empty, so no instructions are answered"
    if not asked.preference_pairs.source:
        yield r"evaluate\.preference_pairs\.count", "evaluate.preference_pairs.source is empty"
    yield from _idle_data(config)
    yield from _idle_beside(config)
    if not config.hub.push:
        yield r"hub\.(repo_id|private|data)", "hub.push=false pushes nothing to a hub"
    if not config.dry_run:
        yield "price_per_hour", "only dry_run=true estimates the cost of a run"
    tested = any(isinstance(one, JudgeTest) and one.judge is None for one in config.benchmark.values())
    if isinstance(data, Pairs) and not (data.seed_data.ranked or asked.instructions or tested):
        yield "judge", "pairs are given, and there are no responses or ranked questions to score"


def _idle_data(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Yield the same for settings of given and generated data."""
    data, seeds = config.data, config.data.seed_data
    if isinstance(data, SelfRewarding) and data.instruct.source:
        writing = "prompt|sampling|seed_examples|generated_examples|prompts_per_batch|max_batches"
        yield rf"data\.instruct\.({writing})", "data.instruct.source gives the instructions, so none are generated"
    if isinstance(data, SelfRewarding) and not data.replay.source:
        yield r"data\.replay\.share", "data.replay.source is empty"
    if not seeds.demonstrations:
        yield r"data\.seed_data\.(max_demonstrations|assistant_turns)", "data.seed_data.demonstrations is empty"
    synthetic = seeds.eft_source == EFTSource.synthetic
    if not synthetic:
        yield r"data\.distortion", "only data.seed_data.eft_source=synthetic distorts instructions"
    if not seeds.ranked:
        ranked = "max_ranked|held_out_share" + "|eft_source|max_score_imbalance" * (not synthetic)
        yield rf"data\.seed_data\.({ranked})", "data.seed_data.ranked is empty"
    elif not seeds.eft_source.by_baseline:
        why = "only data.seed_data.eft_source=baseline or synthetic balances the scores of EFT examples"
        yield r"data\.seed_data\.max_score_imbalance", why


def _idle_beside(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Yield the same for settings that another choice in their own group leaves unused."""
    refinement, asked = refinement_of(config.loss), config.evaluate
    if refinement is not None and refinement.augmentation() is None:
        why = f"loss.refinement.source={refinement.source} puts no prompt before x"
        yield r"loss\.refinement\.(prompt|place|scale)", why
    for key, comparator in all_judges_of(config).items():
        served = asks_a_server(comparator)
        if isinstance(comparator, ComparatorSettings):
            unread = "model|max_batch_tokens|debias_position" if served else "verdict_tokens"
            why = "a server compares" if served else "a policy's verdict is read from its probabilities"
            yield rf"{re.escape(key)}\.({unread})", why
        elif isinstance(comparator, Grader):
            yield from _idle_grading(key, comparator)
        criteria = criteria_of(comparator)
        if criteria is not None and criteria.source == CriteriaSource.given:
            writing = "model|count|prompt|retries|sampling"
            yield rf"{re.escape(key)}\.criteria\.({writing})", f"{key}.criteria.source=given writes none"
    why = _scores_of_one_judge(config.judge)
    if asked.instructions and why:
        yield r"evaluate\.judge", why
    if not any(compares_on(asked, benchmark) for benchmark in config.benchmark.values()):
        yield r"evaluate\.compare_benchmarks", "benchmark selects neither MT-Bench nor Vicuna-Bench"


def _scores_of_one_judge(judge: Any) -> str:
    """Return why no model of the run scores the evaluation answers; empty if one does."""
    if asks_a_server(judge):
        return "a server scores the answers"
    if only_compares(judge):
        return (
            f"{'votes of judge=panel score' if isinstance(judge, Panel) else 'judge=pairwise scores'} no single answer"
        )
    if head_of(judge) is not None:
        return "a reward model scores the answers"
    return "" if asks_a_policy(judge) or isinstance(judge, Panel) else "no model scores the answers"


def _idle_grading(key: str, grader: Grader) -> Iterator[tuple[str, str]]:
    """Yield the same for the settings of a benchmark's grader, whose setting is `key`."""
    if asks_a_server(grader):
        yield rf"{re.escape(key)}\.(model|max_batch_tokens|method)", "a server grades"
    elif grader.method == "logprobs":
        yield rf"{re.escape(key)}\.max_new_tokens", f"{key}.method=logprobs writes no grade"
    if grader.prompts:
        yield rf"{re.escape(key)}\.prompt", f"{key}.prompts takes its place"


def _sizes(data: SelfRewarding) -> str:
    return f"data.instruct.count={data.instruct.count} with data.respond.candidates={data.respond.candidates}"


def check_checkpoints(train: TrainConfig, pairs: int) -> None:
    """Check that an alignment on this many pairs has at least two checkpoints to compare; 0 pairs means unknown."""
    steps = train.align.epochs * math.ceil(pairs / train.align.batch_size)
    if train.checkpoint_selection.interval_steps and 0 < steps <= train.checkpoint_selection.interval_steps:
        raise SelfalignError(
            f"train.checkpoint_selection.interval_steps={train.checkpoint_selection.interval_steps}, but an "
            f"alignment has {steps} steps at most, so there are no two checkpoints to compare: lower it, or set it to 0"
        )


def _check_seeds(data: SelfRewarding) -> None:
    """Check that there are enough demonstrations to show as examples of instructions."""
    asked, given = data.instruct, data.seed_data
    if asked.source:
        return
    if not given.demonstrations:
        raise SelfalignError(
            "data.instruct needs demonstrations as examples, and data.seed_data.demonstrations is empty: set it, or "
            "give the instructions with data.instruct.source"
        )
    if 0 < given.max_demonstrations < asked.seed_examples:
        raise SelfalignError(
            f"data.instruct.seed_examples={asked.seed_examples}, but "
            f"data.seed_data.max_demonstrations={given.max_demonstrations} leaves fewer: lower the one or raise the "
            "other"
        )


def _check_writers(config: ExperimentConfig, data: SelfRewarding) -> None:
    """Check that every writer can write, and that the pair rule takes what it writes."""
    writers, rule = data.respond.writers, config.pair
    drawn = data.instruct.source == DEMONSTRATIONS
    if drawn and not data.seed_data.demonstrations:
        raise SelfalignError("data.instruct.source=demonstrations, but data.seed_data.demonstrations is empty: set it")
    if drawn and data.seed_data.assistant_turns != AssistantTurns.last:
        raise SelfalignError(
            "data.instruct.source=demonstrations answers last turns again, and "
            "data.seed_data.assistant_turns=all teaches others too: set one of them otherwise"
        )
    if DEMONSTRATION in writers and not drawn:
        raise SelfalignError(
            f"data.respond.writers={writers}: a demonstration answers its own prompt only. Set "
            "data.instruct.source=demonstrations"
        )
    if isinstance(rule, ByWriter):
        sides = [rule.chosen_from, rule.rejected_from]
        if sorted(sides) != sorted(writers):
            raise SelfalignError(
                f"pair=by_writer takes chosen responses from {sides[0]} and rejected ones from {sides[1]}, but "
                f"data.respond.writers={writers}: name these two"
            )
        if sorted(sides) == ["next", "self"]:
            raise SelfalignError(
                "data.respond.writers=[next,self]: the next model is made of pairs in which M_t writes in its place, "
                "so the other writer must be another one, such as sft"
            )
    if NEXT in writers and not isinstance(rule, PairRule):
        raise SelfalignError(
            "data.respond.writers: next needs a loss that aligns on pairs, and a rule that makes them; loss=positives "
            "and pair=labels do not"
        )


def _check_candidates(config: ExperimentConfig, data: SelfRewarding) -> None:
    """Check that there are enough candidates for pairs and comparisons."""
    candidates, rule = data.respond.most_candidates, config.pair
    of_mean = isinstance(rule, Labels) and rule.threshold is None
    needed = rule.k + 1 if isinstance(rule, BestVsK) else 2 if isinstance(rule, PairRule) or of_mean else 1
    why = f"pair.k={rule.k}" if isinstance(rule, BestVsK) else "pair.threshold=null" if of_mean else "a pair"
    if isinstance(config.judge, Pairwise) and needed < 2:
        needed, why = 2, "judge=pairwise"
    if candidates < needed:
        raise SelfalignError(
            f"data.respond.candidates={candidates}, but {why} needs {needed} responses to an instruction: raise it to "
            f"{needed} or more"
        )


def _check_scores(config: ExperimentConfig) -> None:
    """Check that the judge's scale can reach the scores and margins of the pair rule."""
    rule, judge = config.pair, config.judge
    low, high = getattr(judge, "min_score", None), getattr(judge, "max_score", None)
    if low is None or high is None:
        if config.loss.offset is Offset.win_shares:
            raise SelfalignError(
                f"judge: the loss {config.loss.title} needs shares of wins from 0 to 1, but the scores of "
                f"{type(judge).__name__} have no ends: choose judge=pairwise with judge.max_score=1"
            )
        return
    if isinstance(rule, PositivesOnly) and rule.minimum_score > high:
        raise SelfalignError(f"pair.minimum_score={rule.minimum_score} is above judge.max_score={high}: lower it")
    if isinstance(rule, Labels) and rule.threshold is not None and not low < rule.threshold <= high:
        raise SelfalignError(
            f"pair.threshold={rule.threshold} gives all responses the same label, because scores go from "
            f"judge.min_score={low} to judge.max_score={high}: set it above the one and at most the other, or null"
        )
    if config.loss.offset is Offset.win_shares and (low, high) != (0, 1):
        raise SelfalignError(
            f"the loss {config.loss.title} reads scores as shares of wins, from 0 to 1, but they go from "
            f"judge.min_score={low} to judge.max_score={high}: set judge.min_score=0 and judge.max_score=1, with "
            "judge=pairwise for example"
        )
    if isinstance(rule, PairRule) and rule.minimum_margin >= high - low:
        raise SelfalignError(
            f"pair.minimum_margin={rule.minimum_margin}, but scores from judge.min_score={low} to "
            f"judge.max_score={high} differ by {high - low} at most: lower it"
        )


def _check_training_lengths(config: ExperimentConfig, data: SelfRewarding) -> None:
    """Check that generated training texts leave room for a prompt in the longest training sequence."""
    stage, training = ("train.align", config.train.align) if aligns(config.loss) else ("train.sft", config.train.sft)
    limit = training.max_length
    written = [("data.respond.sampling", data.respond.sampling, stage, limit)]
    if isinstance(judge := config.judge, SampledScore):
        if data.seed_data.eft_source.by_baseline:
            written.append(("judge.sampling", judge.sampling, "train.sft", config.train.sft.max_length))
        if data.meta_judge is not None:
            written.append(("judge.sampling", judge.sampling, stage, limit))
    for key, sampling, of, longest in written:
        if sampling.longest >= longest:
            raise SelfalignError(
                f"{sampling.named(key)} leaves no token of {of}.max_length={longest} for a prompt, so the "
                "longest texts are never trained on: lower the one or raise the other"
            )


def check_repository(name: str) -> None:
    """Check that a repository has an owner and a name.

    Raises:
        SelfalignError: it has not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise SelfalignError(
            f"hub.push=true needs hub.repo_id=owner/name, the repository on the hub; got hub.repo_id={name!r}"
        )
