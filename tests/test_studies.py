"""conf/experiment holds the papers' studies at their published figures, and a small version of each."""

import re
import shlex
from functools import cache
from operator import attrgetter
from typing import Any

import pytest
from builders import ROOT, composed
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from selfalign.__main__ import conf_folder
from selfalign.config import ExperimentConfig, register
from selfalign.losses import DPO, IPO, Positives, SrDPO, SrIPO
from selfalign.pairing import BestWorst
from selfalign.plan import plan
from selfalign.serving import Server
from selfalign.stages.judge import ExpectedScore, SampledScore
from selfalign.stages.pair import PositivesOnly
from selfalign.stages.seeds import EvaluationFineTuning

STUDIES = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
SMALL = [name for name in STUDIES if name.endswith("_small")]
PAPERS = [name.removesuffix("_small") for name in SMALL]

GIVEN = ["evaluate.instructions=asked.jsonl", "train.choose.instructions=validation.jsonl"]
"""What studies of Llama 2 need besides: instructions that the paper did not publish."""

SELF_REWARDING = {
    "model.path": "meta-llama/Llama-2-70b-hf",
    "iterations": 2,
    "data.seeds.demonstrations": "OpenAssistant/oasst1",
    "data.seeds.ranked": "OpenAssistant/oasst1",
    "data.seeds.max_demonstrations": 3200,
    "data.seeds.held_out_share": 0.25,
    "data.instruct.writer": "meta-llama/Llama-2-70b-chat-hf",
    "data.instruct.source": "",
    "data.instruct.seed_demonstrations": 6,
    "data.instruct.own_demonstrations": 2,
    "data.instruct.max_rouge": 0.7,
    "data.instruct.sampling.temperature": 0.6,
    "data.instruct.sampling.top_p": 0.9,
    "data.respond.candidates": 4,
    "data.respond.sampling.temperature": 0.7,
    "data.respond.sampling.top_p": 0.9,
    "data.accumulate": False,
    "judge.__class__": SampledScore,
    "judge.model": "self",
    "judge.samples": 3,
    "judge.low": 0,
    "judge.high": 5,
    "judge.sampling.temperature": 0.7,
    "judge.sampling.top_p": 0.9,
    "model.lora.rank": 0,
    "train.reference": "previous",
    "train.sft.learning_rate": 5.5e-6,
    "train.sft.final_learning_rate": 1.1e-6,
    "train.sft.schedule": "cosine",
    "train.sft.batch_size": 16,
    "train.sft.dropout": 0.1,
    "train.sft.average": "tokens",
    "train.align.learning_rate": 1e-6,
    "train.align.final_learning_rate": 1e-7,
    "train.align.schedule": "cosine",
    "train.align.batch_size": 16,
    "train.align.dropout": 0.1,
    "train.choose.every_steps": 200,
    "train.choose.count": 253,
    "evaluate.count": 256,
}
"""METHOD, arXiv 2401.10020, sections 2 and 3.1."""

BY_DPO = {"loss.__class__": DPO, "loss.beta": 0.1, "pair.__class__": BestWorst, "pair.length_control": None}
BY_BASELINE = {"data.seeds.evaluation_fine_tuning": EvaluationFineTuning.baseline}

QUALITY_AWARE = {
    "iterations": 1,
    "loss.beta": 0.1,
    "loss.refinement.source": "prompted",
    "loss.refinement.scale": 100,
    "model.lora.rank": 0,
    "train.reference": "previous",
    "train.align.learning_rate": 5e-7,
    "train.align.optimizer": "rmsprop",
    "train.align.batch_size": 64,
    "train.align.max_length": 512,
    "train.align.epochs": 1,
    "train.align.dropout": 0,
    "train.choose.every_steps": 0,
}
"""arXiv 2405.21040, its set-up."""

HH = QUALITY_AWARE | {
    "model.path": "EleutherAI/pythia-2.8b",
    "data.path": "Anthropic/hh-rlhf",
    "data.seeds.demonstrations": "Anthropic/hh-rlhf",
    "data.seeds.ranked": "",
    "evaluate.preferences.source": "Anthropic/hh-rlhf:test",
    "evaluate.preferences.count": 50,
    "train.held_out_pairs": 0,
    "sweep_metric": "preferences/rewards/accuracies",
}
ULTRAFEEDBACK = QUALITY_AWARE | {
    "train.held_out_pairs": 50,
    "sweep_metric": "held_out/rewards/accuracies",
    "model.path": "alignment-handbook/zephyr-7b-sft-full",
    "data.path": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
    "data.seeds.demonstrations": "",
}

FROZEN: dict[str, dict[str, Any]] = {
    "self_rewarding": SELF_REWARDING | BY_DPO | BY_BASELINE,
    "self_rewarding_judge_prompt": SELF_REWARDING | BY_DPO | BY_BASELINE | {"evaluate.baseline": True},
    "self_rewarding_no_eft": SELF_REWARDING | BY_DPO | {"data.seeds.evaluation_fine_tuning": EvaluationFineTuning.none},
    "self_rewarding_positives": SELF_REWARDING
    | BY_BASELINE
    | {"loss.__class__": Positives, "loss.start": "base", "pair.__class__": PositivesOnly, "pair.minimum_score": 5},
    "quality_aware_hh": HH,
    "quality_aware_ultrafeedback": ULTRAFEEDBACK,
    "quality_aware_lambda": HH,
    "quality_aware_tuples": HH,
    "quality_aware_scale": HH,
    "quality_aware_controls": HH,
    "quality_aware_beta": HH,
}
"""Study → key → what METHOD.md says of it, of the configuration before its sweep."""

FOUR_LOSSES = {"loss": "dpo,ipo,sr_dpo,sr_ipo"}
REFINED = {"loss": "sr_dpo,sr_ipo"}
SOURCES = ["prompted", "naive", "shuffled", "random_prompt", "constant"]
SWEEPS: dict[str, tuple[dict[str, str], int]] = {
    "self_rewarding": ({}, 1),
    "self_rewarding_judge_prompt": ({"judge": "additive,multiple_choice"}, 2),
    "self_rewarding_no_eft": ({}, 1),
    "self_rewarding_positives": ({}, 1),
    "quality_aware_hh": (FOUR_LOSSES, 4),
    "quality_aware_ultrafeedback": (FOUR_LOSSES, 4),
    "quality_aware_lambda": (REFINED | {"loss.lam": "0.1,0.3,0.5,1"}, 8),
    "quality_aware_tuples": (FOUR_LOSSES | {"data.count": "10000,20000,40000,80000,160000"}, 20),
    "quality_aware_scale": (REFINED | {"loss.refinement.scale": "100,10"}, 4),
    "quality_aware_controls": (REFINED, 10),
    "quality_aware_beta": ({"loss": "dpo", "loss.beta": "0.1,0.09,0.07,0.05"}, 4),
}
"""Study → (what it sweeps over, number of its jobs)."""


@cache
def space_of(name: str) -> dict[str, str]:
    """What a study sweeps over; nothing where it is a single run."""
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    params = config.hydra.sweeper.params or {}
    assert (config.hydra.mode is RunMode.MULTIRUN) == bool(params)
    return {str(key): str(values) for key, values in params.items()}


def jobs_of(name: str) -> list[list[str]]:
    """The overrides of every job, as Hydra's own sweeper makes them."""
    overrides = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in space_of(name).items()])
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def covering(jobs: list[list[str]]) -> list[list[str]]:
    """The first jobs of a grid that together have every value of it."""
    seen: set[str] = set()
    return [job for job in jobs if not seen.issuperset(job) and not seen.update(job)]


@cache
def study(name: str, *overrides: str) -> ExperimentConfig:
    """A study, or one of its jobs, as live objects."""
    given = GIVEN if name.startswith("self_rewarding") and name not in SMALL else []
    return composed(f"experiment={name}", *given, *overrides)[0]


def test_every_study_of_the_papers_is_frozen_here_and_has_a_small_version() -> None:
    assert set(PAPERS) == FROZEN.keys() == SWEEPS.keys()
    assert set(STUDIES) == {"smoke", "demo", *PAPERS, *SMALL}


@pytest.mark.parametrize("name", FROZEN)
def test_study_has_the_published_figures(name: str) -> None:
    config = study(name)
    assert {key: attrgetter(key)(config) for key in FROZEN[name]} == FROZEN[name]


@pytest.mark.parametrize("name", SWEEPS)
def test_study_sweeps_over_what_its_paper_does(name: str) -> None:
    expected, jobs = SWEEPS[name]
    space = space_of(name)
    assert expected.items() <= space.items()
    assert len(jobs_of(name)) == jobs
    if name != "quality_aware_controls":
        assert space == expected


@pytest.mark.parametrize("name", PAPERS)
def test_jobs_with_every_value_compose_to_live_objects(name: str) -> None:
    jobs = covering(jobs_of(name))
    configs = [study(name, *job) for job in jobs]
    for job, config in zip(jobs, configs, strict=True):
        told = dict(override.split("=", 1) for override in job)
        losses = {"dpo": DPO, "ipo": IPO, "sr_dpo": SrDPO, "sr_ipo": SrIPO}
        assert type(config.loss) is losses.get(told.get("loss", ""), type(study(name).loss))
        for key in ("loss.lam", "loss.beta"):
            assert key not in told or attrgetter(key)(config) == float(told[key])
    assert len({str(config) for config in configs}) == len(jobs)


def test_controls_replace_only_the_source_of_the_refinement() -> None:
    name = "quality_aware_controls"
    found = [study(name, *job).loss for job in covering(jobs_of(name))]
    assert {type(loss) for loss in found} == {SrDPO, SrIPO}
    sr_dpo = [loss for loss in found if isinstance(loss, SrDPO)]
    assert [loss.refinement.source for loss in sr_dpo] == SOURCES
    assert [bool(loss.refinement.constant) for loss in sr_dpo] == [source == "constant" for source in SOURCES]
    assert {loss.refinement.prompt for loss in sr_dpo} == {sr_dpo[0].refinement.prompt}


def test_losses_of_the_second_paper_are_summed_and_as_printed() -> None:
    for loss in ("ipo", "sr_ipo"):
        assert study("quality_aware_hh", f"loss={loss}").loss.reduction == "sum"
    assert study("quality_aware_hh", "loss=sr_ipo").loss.target == "printed"
    assert study("quality_aware_hh", "loss=sr_dpo").loss.lam == 0.5


@pytest.mark.parametrize("name", SMALL)
def test_small_version_is_its_study_on_smollm2(name: str) -> None:
    large, config = name.removesuffix("_small"), study(name)
    assert config.name == name
    assert config.model.path == "packaged:smollm2-135m-instruct"
    assert type(config.loss) is type(study(large).loss)
    assert type(config.pair) is type(study(large).pair)
    assert config.iterations == study(large).iterations
    swept = space_of(name)
    assert swept.keys() == space_of(large).keys()
    assert swept == space_of(large) or large == "quality_aware_tuples"
    labels = [label for label, _ in plan(study(name, *jobs_of(name)[0]))]
    assert labels[0] == "seeds"
    assert f"M{config.iterations + 1}" in labels


def test_small_ablations_keep_what_they_take_away() -> None:
    without = study("self_rewarding_no_eft_small")
    assert without.data.seeds.evaluation_fine_tuning == EvaluationFineTuning.none
    assert isinstance(without.judge, ExpectedScore)
    prompts = [study("self_rewarding_judge_prompt_small", *job).judge for job in jobs_of("self_rewarding_judge_prompt")]
    assert all(isinstance(judge, SampledScore) and judge.max_failed_share == 1 for judge in prompts)
    assert len({judge.prompt for judge in prompts}) == 2


@pytest.mark.parametrize("name", STUDIES)
def test_full_studies_are_measured_as_in_their_papers(name: str) -> None:
    config = study(name)
    full = {"meta-llama/Llama-2-70b-hf": "mt_bench", "EleutherAI/pythia-2.8b": "mt_bench"}
    full["alignment-handbook/zephyr-7b-sft-full"] = "open_llm_leaderboard"
    assert list(config.benchmark) == ([full[config.model.path]] if config.model.path in full else [])
    held_out = config.sweep_metric.removesuffix("/rewards/accuracies") in ("held_out", "preferences")
    assert held_out == (not config.evaluate.instructions)
    assert not (config.train.held_out_pairs and config.evaluate.preferences.source), (
        "one kind of held-out pairs a study"
    )


def commands_for_several_gpus() -> list[list[str]]:
    """The overrides of the commands in experiments/scale, but for those that say "…" and those of Hydra itself."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "experiments/scale/README.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "…" not in line]
    words = [shlex.split(line) for line in lines]
    return [
        [word for word in line[line.index("selfalign") + 1 :] if not word.startswith(("-", "hydra"))] for line in words
    ]


def test_commands_for_several_gpus_compose() -> None:
    commands = commands_for_several_gpus()
    assert len(commands) == 3
    for overrides in commands:
        assert composed(*overrides)[0].train.layout.sharded


def test_command_for_70b_leaves_nothing_that_loads_a_whole_model_but_the_server() -> None:
    (overrides,) = [command for command in commands_for_several_gpus() if "experiment=self_rewarding" in command]
    config, _, _ = composed(*overrides)
    assert config.model.path == "meta-llama/Llama-2-70b-hf"
    assert isinstance(config.generate, Server)
    assert isinstance(config.judge, SampledScore), "judges that read probabilities load the model"
    loading = ("reference", "start", "divergence", "logps", "mt_bench")
    assert not [label for label, _ in plan(config) if label.endswith(loading)]


def test_study_of_llama_says_which_instructions_it_needs() -> None:
    with pytest.raises(Exception, match=r"train\.choose\.instructions"):
        composed("experiment=self_rewarding")
    # Not those that are shipped, which are too few and not the paper's.
    config, *_ = composed("experiment=self_rewarding", "train.choose.instructions=validation.jsonl")
    assert config.evaluate.instructions == "evaluation_prompts.jsonl"


def test_every_study_is_in_the_index_with_its_paper() -> None:
    index = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", index, re.MULTILINE)
    assert sorted(listed) == sorted(FROZEN)
