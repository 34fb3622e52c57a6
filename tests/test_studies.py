"""conf/experiment holds the papers' studies at their published figures, and a small version of each."""

import re
import shlex
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import ROOT, composed, planned
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from paper_values import OURS, PAPER, SIZES, TECHNICAL, WITHOUT_EFFECT, WRITTEN_OUT, YOURS

from selfalign.cli.environment import conf_folder
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.hydra import register
from selfalign.core.errors import SelfalignError
from selfalign.engines.server import Server
from selfalign.losses.preference import DPO, IPO, SrDPO, SrIPO
from selfalign.pipeline.inputs import RunInputs
from selfalign.runs.runner import Runner
from selfalign.stages.evaluate import compares_on, opponents
from selfalign.stages.judge import ExpectedScore, SampledScore
from selfalign.stages.seed_data import EFTSource
from selfalign.store.artifacts import Store

STUDIES = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
RECIPES = ["spin", "temporal", "cream", "meta_rewarding", "self_taught", "dice", "iterative_rpo", "rubric_self_reward"]
"""Loops that came after the two papers."""

CONTROLS = ["control_verifier", "control_random", "control_swapped"]
"""Runs whose outcome is known before: the test of the whole machine."""

GIVEN = ["piqa_lambda", "piqa_noise"]
"""Questions of both papers, asked of given pairs."""

TWINS = [name for name in RECIPES if name not in ("self_taught", "rubric_self_reward")]
"""Those that SmolLM2-135M can run; docs/recipes.md says why it cannot run the others."""

SMALL = [name for name in STUDIES if name.endswith("_small") and name.removesuffix("_small") not in RECIPES]
PAPERS = [name.removesuffix("_small") for name in SMALL]

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
    "quality_aware_tuples": (FOUR_LOSSES | {"data.count": "10000,20000,40000,80000,150000"}, 20),
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
def needed(name: str) -> tuple[str, ...]:
    """Overrides that name the files which only the user has, as far as a study reads them."""
    keys: list[str] = []
    if name in PAPER and name.startswith("self_rewarding"):
        keys = ["evaluate.instructions", "benchmark.alpaca_eval.reference_outputs"]
        keys += (
            ["train.checkpoint_selection.instructions"]
            if "train.checkpoint_selection.interval_steps" in PAPER[name]
            else []
        )
    elif name in PAPER and "evaluate.compare_benchmarks" in PAPER[name]:
        keys = ["benchmark.vicuna_bench.questions"]
    return tuple(f"{key}={YOURS[key]}" for key in keys)


@cache
def composed_study(name: str, *overrides: str) -> tuple[ExperimentConfig, dict[str, Any]]:
    """A study, or one of its jobs, as live objects and plain."""
    config, _, plain = composed(f"experiment={name}", *needed(name), *overrides)
    return config, plain


def study(name: str, *overrides: str) -> ExperimentConfig:
    """The same as live objects."""
    return composed_study(name, *overrides)[0]


def test_every_study_of_the_papers_is_frozen_here_and_has_a_small_version() -> None:
    assert set(PAPERS) == PAPER.keys() == SWEEPS.keys()
    assert set(STUDIES) == {
        "smoke",
        "demo",
        "thought_preference",
        *PAPERS,
        *SMALL,
        *RECIPES,
        *(f"{name}_small" for name in TWINS),
        *CONTROLS,
        *GIVEN,
    }


@pytest.mark.parametrize("name", [*RECIPES, *(f"{name}_small" for name in TWINS)])
def test_every_recipe_is_planned_at_both_sizes_and_has_a_line_in_the_docs(name: str) -> None:
    config = composed(f"experiment={name}")[0]
    assert config.name == name
    assert f"M{config.iterations + 1}" in planned(config)
    assert f"experiment={name.removesuffix('_small')}`" in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


def test_controls_differ_in_their_judge_alone() -> None:
    plain = [dict(flat(composed_study(name)[1])) for name in CONTROLS]
    own = re.compile(r"judge\.|name$|choices\.")
    shared = [{key: value for key, value in one.items() if not own.match(key)} for one in plain]
    assert shared[0] == shared[1] == shared[2]
    assert [space_of(name) for name in CONTROLS] == [{"seed": "3,4,5"}] * 3
    functions = [one["judge.function"] for one in plain[1:]]
    assert functions == ["selfalign.judges.controls:random", "selfalign.judges.controls:swapped"]
    text = (ROOT / "experiments/controls/README.md").read_text(encoding="utf-8")
    assert all(f"selfalign experiment={name}\n" in text for name in CONTROLS)


@pytest.mark.parametrize("name", TWINS)
def test_small_recipe_is_on_smollm2_and_its_inputs_are_read(name: str, tmp_path: Path) -> None:
    config = study(f"{name}_small")
    assert config.model.path == "packaged:smollm2-135m-instruct"
    RunInputs(config, Runner(Store(tmp_path)))


def test_iterative_rpo_is_measured_on_tasks_that_the_verifier_can_check(tmp_path: Path) -> None:
    config = study("iterative_rpo", "data.instruct.source=shipped:verifiable:40", "data.instruct.count=10")
    RunInputs(config, Runner(Store(tmp_path)))


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every leaf; lists of tables are numbered."""
    if isinstance(node, list) and node and isinstance(node[0], dict):
        node = dict(enumerate(node))
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from flat(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, node


def ours(name: str) -> set[str]:
    """The keys of ours in a study whose paper does not give them."""
    return {f"{group}.{key}" for group, keys in OURS.items() for key in keys} - PAPER[name].keys()


def whose(name: str, key: str, keys: Iterable[str]) -> set[str]:
    """The tables that a key of a study is in."""
    unused = [pattern for has, patterns in WITHOUT_EFFECT.items() if has in keys for pattern in patterns]
    exact = {"paper": PAPER[name], "ours": ours(name), "yours": YOURS}
    found = {table for table, known in exact.items() if key in known}
    if found:  # A pattern is for keys that no table names.
        return found - ({"yours"} if len(found) > 1 else set())
    patterns = {"technical": TECHNICAL, "without effect": unused}
    return {table for table, several in patterns.items() if any(fnmatchcase(key, one) for one in several)}


@pytest.mark.parametrize("name", PAPER)
def test_every_value_of_a_study_is_its_paper_s_or_ours(name: str) -> None:
    values = dict(flat(composed_study(name)[1]))
    assert {key: values.get(key, "missing") for key in PAPER[name]} == PAPER[name]
    unknown = {key: found for key in values if not (found := whose(name, key, values.keys()))}
    assert unknown == {}, "say in paper_values.py whether the paper gives it"


def test_tables_hold_no_key_that_no_study_has() -> None:
    every = {key for name in PAPER for key, _ in flat(composed_study(name)[1])}
    assert sorted({f"{group}.{key}" for group, keys in OURS.items() for key in keys} - every) == []
    assert sorted(YOURS.keys() - every) == []
    assert [one for one in TECHNICAL if not any(fnmatchcase(key, one) for key in every)] == []


def lines_of(path: Path, prefix: str = "") -> dict[str, list[str]]:
    """{key: the line it stands in, and those of the groups around it}, of a file of conf/."""
    text = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}

    def walk(node: yaml.Node, key: str, around: list[str]) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for name, value in node.value:
                walk(value, f"{key}{name.value}.", [*around, text[name.start_mark.line]])
        else:
            found[key.removesuffix(".")] = [*around, text[node.start_mark.line]]

    root = yaml.compose("\n".join(text))
    assert isinstance(root, yaml.MappingNode)
    for name, value in root.value:
        if name.value not in ("defaults", "hydra"):
            walk(value, f"{prefix}{name.value}.", [text[name.start_mark.line]])
    return found


FILES = {
    "preset/llama2_70b": "", "preset/pythia_hh": "", "preset/zephyr_ultrafeedback": "",
    "train/quality_aware": "train.", "pair/best_worst": "pair.", "pair/positives": "pair.", "data/hh_rlhf": "data.",
    "data/ultrafeedback": "data.", "benchmark/mt_bench": "benchmark.", "benchmark/vicuna_bench": "benchmark.",
    "benchmark/alpaca_eval": "benchmark.", **{f"experiment/{name}": "" for name in PAPER},
}  # fmt: skip
"""The files a published study is made of, and what their keys begin with in the whole."""


@pytest.mark.parametrize("file", FILES)
def test_value_in_a_study_s_file_is_marked_as_ours_unless_it_is_the_paper_s(file: str) -> None:
    of_file = [name for name in PAPER if file in made_of(name)]
    assert of_file
    for key, lines in lines_of(ROOT / f"conf/{file}.yaml", FILES[file]).items():
        tables = {table for name in of_file for table in whose(name, key, PAPER[name].keys())}
        marked = any(re.search(r"# (ours|yours)", line) for line in lines)
        if "paper" in tables:
            assert not marked, f"conf/{file}.yaml: {key} is the paper's"
        elif tables & {"ours", "yours"}:
            assert marked, f"conf/{file}.yaml: {key} is not marked"


def test_defaults_that_a_study_rests_on_are_written_out_and_marked() -> None:
    written = {
        key: lines for file, prefix in FILES.items() if file in made_of("self_rewarding")
        for key, lines in lines_of(ROOT / f"conf/{file}.yaml", prefix).items()
    }  # fmt: skip
    assert sorted(set(WRITTEN_OUT) - written.keys()) == []
    assert [key for key in WRITTEN_OUT if not any("# ours" in line for line in written[key])] == []


@cache
def made_of(name: str) -> set[str]:
    """The files of conf/ that a study's values come from."""
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        chosen = compose("config", overrides=[f"experiment={name}", *needed(name)], return_hydra_config=True)
    groups = {group: value for group, value in chosen.hydra.runtime.choices.items() if isinstance(value, str)}
    files = {f"{group}/{value}" for group, value in groups.items()}
    parents = [f"experiment/{'quality_aware_hh' if name.startswith('quality') else 'self_rewarding'}"]
    return {*files, *parents, *(f"benchmark/{label}" for label in study(name).benchmark)}


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
    assert study("quality_aware_hh", "loss=sr_ipo").loss.lambda_scale == "paper"
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
    labels = planned(study(name, *jobs_of(name)[0]))
    assert labels[0] == "seeds"
    assert f"M{config.iterations + 1}" in labels


def test_small_ablations_keep_what_they_take_away() -> None:
    without = study("self_rewarding_no_eft_small")
    assert without.data.seed_data.eft_source == EFTSource.none
    assert isinstance(without.judge, ExpectedScore)
    prompts = [study("self_rewarding_judge_prompt_small", *job).judge for job in jobs_of("self_rewarding_judge_prompt")]
    assert all(isinstance(judge, SampledScore) and judge.max_failure_rate == 1 for judge in prompts)
    assert len({judge.prompt for judge in prompts}) == 2


def test_meta_rewarding_has_pairs_of_judgements_in_its_first_two_iterations() -> None:
    config = study("meta_rewarding")
    assert (config.data.respond.candidates, config.judge.num_samples, config.iterations) == (7, 11, 4)
    assert config.pair.length_control == [0, 0.32, 0.32, 0.4]
    labels = planned(config)
    assert [label for label in labels if "judge_pairs" in label] == [f"iteration_{n}/judge_pairs" for n in (1, 2)]
    small = study("meta_rewarding_small")
    assert [label for label in planned(small) if "judge_pairs" in label] == ["iteration_1/judge_pairs"]


@pytest.mark.parametrize("name", [name for name in STUDIES if name.removesuffix("_small") not in RECIPES])
def test_full_studies_are_measured_as_in_their_papers(name: str) -> None:
    config = study(name)
    full = {
        "meta-llama/Llama-2-70b-hf": ["mt_bench", "alpaca_eval", "nlp_sets"],
        "EleutherAI/pythia-2.8b": ["mt_bench", "vicuna_bench"],
        "alignment-handbook/zephyr-7b-sft-full": ["open_llm_leaderboard"],
    }
    assert list(config.benchmark) == full.get(config.model.path, [])
    held_out = config.sweep_metric.removesuffix("/rewards/accuracies") in ("held_out", "preferences")
    assert held_out == (not config.evaluate.instructions)
    assert not (config.train.validation_pairs and config.evaluate.preference_pairs.source), (
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
        assert composed(*overrides)[0].train.parallelism.sharded


def test_command_for_70b_leaves_nothing_that_loads_a_whole_model_but_the_server() -> None:
    (overrides,) = [command for command in commands_for_several_gpus() if "experiment=self_rewarding" in command]
    config, _, _ = composed(*overrides)
    assert config.model.path == "meta-llama/Llama-2-70b-hf"
    assert isinstance(config.engine, Server)
    assert isinstance(config.judge, SampledScore), "judges that read probabilities load the model"
    loading = ("reference", "start", "divergence", "logps", "mt_bench")
    assert not [label for label in planned(config) if label.endswith(loading)]


def test_study_says_which_files_it_needs_before_anything_is_made() -> None:
    for name in PAPER:
        told = list(needed(name))
        for override in told:
            key = override.partition("=")[0]
            if key != "evaluate.instructions":  # It names a file of its own, which is then found missing.
                with pytest.raises((OmegaConfBaseException, SelfalignError), match=re.escape(key)):
                    composed(f"experiment={name}", *(one for one in told if one != override))
    # Not those that are shipped, which are too few and not the paper's.
    rest = [one for one in needed("self_rewarding") if not one.startswith("evaluate.")]
    assert composed("experiment=self_rewarding", *rest)[0].evaluate.instructions == "evaluation_prompts.jsonl"


@pytest.mark.parametrize("name", SMALL)
def test_small_version_changes_model_data_sizes_and_judges_alone(name: str) -> None:
    large, small = (dict(flat(composed_study(one)[1])) for one in (name.removesuffix("_small"), name))
    differing = {key for key in large.keys() | small.keys() if large.get(key) != small.get(key)}
    assert sorted(key for key in differing if not any(fnmatchcase(key, one) for one in SIZES)) == []
    assert {key: value for key, value in large.items() if key.startswith("loss.")} == {
        key: value for key, value in small.items() if key.startswith("loss.")
    }


def test_table_2_of_the_second_paper_is_made_by_one_sweep_and_one_evaluation() -> None:
    """Every two of the four losses' models, on both question files, every turn in both orders."""
    config = study("quality_aware_hh", "evaluate.round_robin=true")
    assert jobs_of("quality_aware_hh") == [["loss=dpo"], ["loss=ipo"], ["loss=sr_dpo"], ["loss=sr_ipo"]]
    models = ["M1", "dpo.M2", "ipo.M2", "sr_dpo.M2", "sr_ipo.M2"]
    assert [compares_on(config.evaluate, one) for one in config.benchmark.values()] == [True, True]
    opponents_of = {name: opponents(config.evaluate, models[:place]) for place, name in enumerate(models)}
    assert {"dpo.M2", "ipo.M2"} <= {*opponents_of["sr_dpo.M2"]} & {*opponents_of["sr_ipo.M2"]}
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    assert f"selfalign experiment=quality_aware_hh {needed('quality_aware_hh')[0].partition('=')[0]}=" in text
    assert "selfalign-evaluate outputs/sweeps/quality_aware_hh-… evaluate.round_robin=true" in text


def test_every_study_is_in_the_index_with_its_paper() -> None:
    index = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", index, re.MULTILINE)
    assert sorted(listed) == sorted(PAPER)
