"""The rules of the house that no linter knows: who imports whom, and that names on paper are names on disk."""

import ast
import importlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from graphlib import TopologicalSorter
from inspect import isabstract
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from builders import ROOT, components, composed, floors
from omegaconf.errors import OmegaConfBaseException

from selfalign.config.components import COMPONENTS as ASKED
from selfalign.config.components import fault_of
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.errors import SelfalignError
from selfalign.launch.worst_case import MaxLengthTransformers
from selfalign.losses.protocol import (
    FineTuningLoss,
    Loss,
    Offset,
    PreferenceLoss,
    RefinedLoss,
    aligns,
    is_unpaired,
)

PACKAGE = ROOT / "selfalign"
HYDRA = {"config.hydra", "config.overrides", "launch.hydra_sweep", "cli.main"}
"""Modules that may know of Hydra."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> dict[str, Path]:
    """{dotted name below selfalign: file}."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at its top, inside a function or for type checkers alone."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(path: Path) -> set[str]:
    """Those of selfalign's own modules, by their name below it."""
    names = {name.removeprefix("selfalign.") for name in imports_of(path) if name.startswith("selfalign.")}
    return names & modules().keys()


FLOORS = {package: floor for floor, packages in enumerate(floors()) for package in packages}
"""{package: its floor}, from the ground up."""


# --- imports -----------------------------------------------------------------------------------------------------


def test_every_module_lies_in_a_package_that_has_a_floor() -> None:
    flat = [name for name in modules() if "." not in name and name != "__main__"]
    assert flat == []
    assert {name.split(".")[0] for name in modules()} - {"__main__"} == FLOORS.keys()
    assert max(FLOORS.values()) < 11


@pytest.mark.parametrize("name", [name for name in modules() if name != "__main__"])
def test_module_imports_from_its_own_package_and_from_floors_below(name: str) -> None:
    package = name.split(".")[0]
    for other in own_imports(modules()[name]):
        below = other.split(".")[0]
        assert below == package or FLOORS[below] < FLOORS[package], f"{name} imports {other}"


def test_no_modules_import_one_another_in_a_circle() -> None:
    TopologicalSorter({name: own_imports(path) for name, path in modules().items()}).prepare()


def test_stages_meet_in_records_alone() -> None:
    stages = {name: path for name, path in modules().items() if name.startswith("stages.")}
    assert len(stages) >= 17
    for name, path in stages.items():
        known = {other.split(".")[0] for other in own_imports(path)}
        assert not known & {"stages", "runs", "tracking", "report"}, name


def test_a_module_that_only_type_checkers_see_is_none_of_ours() -> None:
    for name, path in modules().items():
        for block in ast.walk(tree_of(path)):
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                assert "selfalign" not in ast.unparse(block), name


def test_hydra_is_known_in_four_files_only() -> None:
    users = {
        name
        for name, path in modules().items()
        if any(re.match(r"(hydra|omegaconf)\b", imported) for imported in imports_of(path))
    }
    assert users == HYDRA


def test_stage_file_has_one_public_function_of_its_name() -> None:
    for name, path in modules().items():
        if name.startswith("stages."):
            functions = [node.name for node in tree_of(path).body if isinstance(node, ast.FunctionDef)]
            assert name.removeprefix("stages.") in functions, name
            assert (ast.get_docstring(tree_of(path)) or "").split("\n")[0].count("→") == 1, name


def opens_text(called: str, node: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text, or talks with a program in it."""
    function = called.rpartition(".")[2]
    if function == "open" and called != "os.open":
        modes = [ast.unparse(argument).strip("'") for argument in node.args[int(called == "open") :][:1]]
        return not modes or bool(re.fullmatch("[rwax+t]+", modes[0]))
    talks = any(keyword.arg == "text" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
    return talks or called in ("os.fdopen", "LogHandler") or bool(re.search(r"\.(read|write)_text$", called))


@pytest.mark.parametrize("name", modules())
def test_text_is_utf_8_whatever_the_locale(name: str) -> None:
    for called, node in calls(modules()[name]):
        if opens_text(called, node):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("encoding") == "'utf-8'", f"{modules()[name]}:{node.lineno}"


# --- losses ------------------------------------------------------------------------------------------------------


LOSSES = sorted(components()["loss"], key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_declares_what_others_ask_of_it(kind: type) -> None:
    loss = kind()
    assert isinstance(loss, Loss)
    assert loss.title
    assert loss.formula
    assert isinstance(loss.offset, Offset)
    assert loss.pairwise == (isinstance(loss, PreferenceLoss) and not is_unpaired(loss))
    assert aligns(loss) == (not isinstance(loss, FineTuningLoss))
    assert (loss.offset is Offset.refinement) == isinstance(loss, RefinedLoss)


def test_titles_of_losses_differ() -> None:
    assert len({kind().title for kind in LOSSES}) == len(LOSSES)


def test_no_module_asks_for_the_class_of_a_loss() -> None:
    """Only losses know which there are; others ask what a loss declares."""
    kinds = {kind.__name__ for kind in LOSSES}
    for name, path in modules().items():
        if not name.startswith("losses."):
            nodes = list(ast.walk(tree_of(path)))
            assert not {node.id for node in nodes if isinstance(node, ast.Name)} & kinds, name
            assert not {node.value for node in nodes if isinstance(node, ast.Constant)} & kinds, name


def test_alignment_takes_its_objective_from_the_library() -> None:
    """The stage loads, encodes, trains and measures; what is minimised is `training.preference`'s."""
    stage = tree_of(modules()["stages.align"])
    assert [node.name for node in stage.body if isinstance(node, ast.FunctionDef | ast.ClassDef)] == ["size", "align"]
    assert "training.preference" in own_imports(modules()["stages.align"])


# --- safety ------------------------------------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file, by the source text of what is called."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("name", modules())
def test_module_runs_no_code_it_was_given(name: str) -> None:
    path = modules()[name]
    unsafe = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "yaml.load", "yaml.unsafe_load"}
    for called, node in calls(path):
        assert called not in unsafe, f"{path}:{node.lineno}"
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert settings.get("trust_remote_code") != "True", f"{path}:{node.lineno}"
        assert settings.get("shell") != "True", f"{path}:{node.lineno}"
    assert not {n.split(".")[0] for n in imports_of(path)} & {"pickle", "dill", "cloudpickle", "joblib", "marshal"}


def test_remote_code_is_off_unless_asked_for() -> None:
    assert composed("experiment=smoke")[0].model.trust_remote_code is False


# --- configuration -----------------------------------------------------------------------------------------------

COMPONENTS = components()
OPTIONS = sorted(
    path.relative_to(ROOT / "conf").with_suffix("").as_posix() for path in (ROOT / "conf").glob("*/*.yaml")
)
UNPUBLISHED = [
    "evaluate.instructions=a.jsonl",
    "train.checkpoint_selection.instructions=b.jsonl",
    "benchmark.alpaca_eval.reference_outputs=o.json",
]
VICUNA = ["benchmark.vicuna_bench.questions=q.jsonl"]
NEEDED = {
    "model/pretrained": ["model.path=/nowhere"],
    "data/pairs": ["data.path=/nowhere.jsonl", "iterations=1"],
    "data/hh_rlhf": ["iterations=1"],
    "data/ultrafeedback": ["iterations=1"],
    "preset/llama2_70b": UNPUBLISHED,
    "preset/pythia_hh": VICUNA,
    "train/quality_aware": ["data.respond.sampling.max_new_tokens=256"],
    "loss/positives": ["pair=positives"],
    "loss/sppo": ["judge=pairwise", "judge.max_score=1"],
    "pair/positives": ["loss=positives"],
    "pair/labels": ["loss=kto"],
    "judge/implicit": ["data.seed_data.eft_source=none"],
    "judge/reward_model": ["judge.model=owner/name", "data.seed_data.eft_source=none"],
    "judge/rubric": ["data.seed_data.eft_source=none"],
    "judge/contrastive": ["data.seed_data.eft_source=none"],
    "judge/panel": [
        "+judge@judge.members.a=expected_score",
        "+judge@judge.members.b=implicit",
        "data.seed_data.eft_source=none",
    ],
    "pair/by_writer": ["data.respond.writers=[self,sft]"],
    "judge/function": ["judge.function=mine.py:score", "data.seed_data.eft_source=none"],
    "judge/verifier": ["data=verifiable"],
    "benchmark/alpaca_eval": ["benchmark.alpaca_eval.reference_outputs=outputs.json"],
    "benchmark/vicuna_bench": ["benchmark.vicuna_bench.questions=question.jsonl"],
    "benchmark/arena_hard": ["benchmark.arena_hard.questions=question.jsonl"],
    "benchmark/reward_bench": ["benchmark.reward_bench.questions=rows.jsonl"],
    "benchmark/judge_bench": ["benchmark.judge_bench.questions=rows.jsonl"],
    "benchmark/lm_eval": ["benchmark.lm_eval.tasks=[{name: quiz, metric: acc}]"],
    "engine/server": ["engine.command='serve {weights} --port {port}'"],
    "judge/external": ["judge.endpoint.base_url=http://nowhere/v1", "judge.endpoint.model=m"],
}
NEEDED |= {
    option: NEEDED["preset/llama2_70b"]
    for option in OPTIONS
    if re.match(r"experiment/self_rewarding(?!.*small)", option)
}
NEEDED |= {option: VICUNA for option in OPTIONS if re.match(r"experiment/quality_(?!.*(small|ultrafeedback))", option)}
NEEDED["experiment/self_rewarding_positives"] = [one for one in UNPUBLISHED if "checkpoint_selection" not in one]
"""What an option cannot do without."""


def test_every_group_has_its_options() -> None:
    groups = {
        group: [o for o in OPTIONS if o.startswith(f"{group}/")] for group in (*COMPONENTS, "preset", "experiment")
    }
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(OPTIONS) >= 21
    assert {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} == groups.keys()
    assert {"experiment/smoke", "experiment/demo"} <= set(OPTIONS)


def chosen_of(config: ExperimentConfig, group: str) -> set[type]:
    """The classes of a group's components; of benchmarks and trackers there may be several, or none."""
    chosen = getattr(config, group)
    return {type(one) for one in (chosen.values() if group in ("benchmark", "tracker") else [chosen])}


@pytest.mark.parametrize("option", [o for o in OPTIONS if "???" in (ROOT / f"conf/{o}.yaml").read_text()])
def test_what_an_option_leaves_open_has_no_default_behind_it(option: str) -> None:
    """Merging a ??? does not take away a dataclass's default, which would be used unasked."""
    group, name = option.split("/")
    with pytest.raises((OmegaConfBaseException, SelfalignError), match=r"it has no default|must"):
        composed(f"{group}={name}")


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_to_live_objects(option: str) -> None:
    group, _, name = option.partition("/")
    config, text, plain = composed(f"{group}={name}", *NEEDED.get(option, []))
    assert isinstance(config, ExperimentConfig)
    for member, classes in COMPONENTS.items():
        assert chosen_of(config, member) <= classes
    assert plain.keys() - {"choices"} == {field.name for field in fields(ExperimentConfig)}
    assert "???" not in text
    if group in COMPONENTS:
        assert len(chosen_of(config, group)) == (option != "tracker/none")


def test_every_component_is_an_option() -> None:
    """No class lies there unchosen that is what a group asks for."""
    there: set[type] = set()
    for name in modules().keys() - {"__main__"}:
        with suppress(ModuleNotFoundError):  # of programs that are optional
            found = vars(importlib.import_module(f"selfalign.{name}")).values()
            there |= {kind for kind in found if isinstance(kind, type) and is_dataclass(kind) and not isabstract(kind)}
    for group, asked in ASKED.items():
        fitting = {kind for kind in there if any(not fault_of(object.__new__(kind), one) for one in asked)}
        assert fitting - {MaxLengthTransformers} == COMPONENTS[group], group


def config_classes() -> set[type]:
    """Every dataclass of the configuration's tree."""
    found: set[type] = set()
    waiting: list[Any] = [ExperimentConfig, *(kind for classes in COMPONENTS.values() for kind in classes)]
    while waiting:
        kind = waiting.pop()
        waiting += get_args(kind)
        if is_dataclass(kind) and kind not in found:
            found.add(kind)
            waiting += get_type_hints(kind).values()
    return found


@cache
def attributes_read() -> set[str]:
    """Names read as `something.name` anywhere in the package, checks of a dataclass's own values left out."""

    def names(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef) and child.name == "__post_init__":
                continue
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
                yield child.attr
            yield from names(child)

    return {name for path in modules().values() for name in names(tree_of(path))}


def test_every_key_of_the_configuration_is_read_by_some_code() -> None:
    keys = {(kind.__name__, field.name) for kind in config_classes() for field in fields(kind)}
    assert {("SrDPO", "lam"), ("LoRA", "rank"), ("Sampling", "top_p"), ("ExperimentConfig", "fresh")} <= keys
    assert len(keys) > 80
    assert sorted(f"{kind}.{name}" for kind, name in keys if name not in attributes_read()) == []


def test_every_key_of_the_configuration_is_explained_on_its_class() -> None:
    unexplained = [
        f"{kind.__name__}.{field.name}"
        for kind in config_classes()
        for field in fields(kind)
        if not any(re.search(rf"^ +{field.name}: ", c.__doc__ or "", re.MULTILINE) for c in kind.__mro__)
    ]
    assert sorted(unexplained) == []


RANGES = [
    ("loss.beta=-1", "loss.beta"),
    ("loss.beta=0", "loss.beta"),
    ("loss.lam=-0.1", "loss.lam"),
    ("loss.lam=[0.1,0.2,0.3]", "loss.lam"),
    ("loss.lam_warmup=2", "loss.lam_warmup"),
    ("loss.refinement.normalise=std", "loss.refinement.normalise"),
    ("loss=sppo", "judge.max_score"),
    ("loss=sppo judge=implicit data.seed_data.eft_source=none", "judge"),
    ("loss=alpha_dpo train.align.batch_size=1", "train.align.batch_size"),
    ("loss.refinement.scale=0", "loss.refinement.scale"),
    ("loss=ipo loss.reduction=max", "loss.reduction"),
    ("loss=sr_ipo loss.lambda_scale=none", "loss.lambda_scale"),
    ("iterations=0", "iterations"),
    ("price_per_hour=-1", "price_per_hour"),
    ("name=a/b", "name"),
    ("model.dtype=float64", "model.dtype"),
    ("model.quantization=int8 model.lora.rank=4", "model.quantization"),
    ("model.quantization=nf4", "model.lora.rank"),
    ("model.quantization=nf4 model.lora.rank=4 train.parallelism.strategy=fsdp2", "model.quantization"),
    ("model.lora.rank=-1", "model.lora.rank"),
    ("model.lora.alpha=0", "model.lora.alpha"),
    ("data.seed_data.held_out_share=1", "data.seed_data.held_out_share"),
    ("data.seed_data.max_score_imbalance=0.5", "data.seed_data.max_score_imbalance"),
    ("data.seed_data.eft_source=baseline", "data.seed_data.eft_source"),
    ("judge=additive data.seed_data.eft_source=baseline data.seed_data.ranked=''", "data.seed_data.ranked"),
    ("evaluate.sft_baseline=true data.seed_data.ranked=''", "evaluate.sft_baseline"),
    ("data.instruct.count=0", "data.instruct.count"),
    ("data.instruct.model=gpt", "data.instruct.model"),
    ("data.instruct.model=sft data.instruct.source=shipped:ranked", "data.instruct.source"),
    ("data.instruct.sampling.top_p=2", "data.instruct.sampling.top_p"),
    ("data.respond.candidates=0", "data.respond.candidates"),
    ("data.respond.sampling.temperature=-1", "data.respond.sampling.temperature"),
    ("evaluate.sampling.max_new_tokens=0", "evaluate.sampling.max_new_tokens"),
    ("evaluate.judge=self", "evaluate.judge"),
    ("evaluate.bounds.min_chosen_logp_change=0.5", "evaluate.bounds.min_chosen_logp_change"),
    ("evaluate.preference_pairs.count=-1", "evaluate.preference_pairs.count"),
    ("judge@evaluate.preference_pairs.judge=expected_score", "evaluate.preference_pairs.judge"),
    (
        "judge@evaluate.preference_pairs.judge=expected_score evaluate.preference_pairs.source=a.jsonl",
        "evaluate.preference_pairs.judge.model",
    ),
    ("engine.max_batch_tokens=0", "engine.max_batch_tokens"),
    ("engine=vllm engine.dtype=float16", "engine.dtype"),
    ("engine=vllm engine.replicas=0", "engine.replicas"),
    ("engine=vllm engine.gpu_memory_utilization=2", "engine.gpu_memory_utilization"),
    ("engine=vllm engine.max_model_len=-1", "engine.max_model_len"),
    ("judge.max_score=10", "judge.max_score"),
    ("judge.max_batch_tokens=0", "judge.max_batch_tokens"),
    ("judge=additive judge.num_samples=0", "judge.num_samples"),
    ("judge=additive judge.min_valid_samples=4", "judge.min_valid_samples"),
    ("judge=additive judge.model=gpt", "judge.model"),
    ("judge.rationale_tokens=-1", "judge.rationale_tokens"),
    ("judge.degeneracy.max_tie_rate=2", "judge.degeneracy.max_tie_rate"),
    ("judge=pairwise judge.scores=points", "judge.scores"),
    ("evaluate.head_to_head.model=gpt", "evaluate.head_to_head.model"),
    ("evaluate.head_to_head.verdict_tokens=0", "evaluate.head_to_head.verdict_tokens"),
    ("evaluate=none evaluate.round_robin=true", "evaluate.round_robin"),
    ("train.checkpoint_selection.level=0.5", "train.checkpoint_selection.level"),
    ("train.checkpoint_selection.head_to_head.model=gpt", "train.checkpoint_selection.head_to_head.model"),
    ("train.parallelism.strategy=fsdp", "train.parallelism.strategy"),
    ("train.parallelism.reshard_after_forward=false", "train.parallelism.reshard_after_forward"),
    ("train.parallelism.strategy=fsdp2 train.align.optimizer=adamw_8bit", "train.parallelism.strategy"),
    (
        "train.parallelism.strategy=fsdp2 train.checkpoint_selection.interval_steps=2 "
        "train.checkpoint_selection.instructions=a.jsonl",
        "train.checkpoint_selection.interval_steps",
    ),
    ("judge=implicit", "data.seed_data.eft_source"),
    ("judge=function judge.function=mine.py", "judge.function"),
    ("judge=function judge.function=mine.py:score judge.instructions_per_call=0", "judge.instructions_per_call"),
    ("judge=verifier data=verifiable data.seed_data.ranked=shipped:ranked", "data.seed_data.ranked"),
    ("judge=implicit data.seed_data.eft_source=none judge.model=base", "judge.model"),
    ("judge=implicit data.seed_data.eft_source=none evaluate.judge=base", "evaluate.judge"),
    ("judge=external judge.endpoint.model=m judge.endpoint.base_url=nowhere", "judge.endpoint.base_url"),
    ("judge=additive judge.sampling.top_p=0", "judge.sampling.top_p"),
    ("pair.minimum_pairs=0", "pair.minimum_pairs"),
    ("pair=random pair.length_control=1", "pair.length_control"),
    ("pair=all_ordered pair.length_control=[0.1]", "pair.length_control"),
    ("pair=best_vs_k pair.k=0", "pair.k"),
    ("pair.max_similarity=0", "pair.max_similarity"),
    ("train.reference_policy=next", "train.reference_policy"),
    ("train.sft.epochs=0", "train.sft.epochs"),
    ("train.align.learning_rate=0", "train.align.learning_rate"),
    ("train.align.weight_decay=-1", "train.align.weight_decay"),
    ("benchmark=[mt_bench] benchmark.mt_bench.count=-1", "benchmark.mt_bench.count"),
    ("benchmark=[mt_bench] benchmark.mt_bench.max_new_tokens=0", "benchmark.mt_bench.max_new_tokens"),
    ("benchmark=[mt_bench] benchmark.mt_bench.temperatures.math=-1", "benchmark.mt_bench.temperatures.math"),
    ("benchmark=[mt_bench] benchmark.mt_bench.judge.method=aloud", "benchmark.mt_bench.judge.method"),
    ("benchmark=[mt_bench] benchmark.mt_bench.judge.model=gpt", "benchmark.mt_bench.judge.model"),
    ("benchmark=[mt_bench] benchmark.mt_bench.judge.prompt=x", "benchmark.mt_bench.judge.prompt"),
    ("benchmark=[mt_bench] benchmark.mt_bench.judge.max_failure_rate=2", "benchmark.mt_bench.judge.max_failure_rate"),
    ("benchmark=[mt_bench] benchmark.mt_bench.judge.endpoint.base_url=x", "benchmark.mt_bench.judge.endpoint.model"),
    (
        "benchmark=[alpaca_eval] benchmark.alpaca_eval.reference_outputs=o benchmark.alpaca_eval.sampling.top_p=2",
        "benchmark.alpaca_eval.sampling.top_p",
    ),
    (
        "benchmark=[alpaca_eval] benchmark.alpaca_eval.reference_outputs=o benchmark.alpaca_eval.judge.prompt=x",
        "benchmark.alpaca_eval.judge.prompt",
    ),
    (
        "benchmark=[arena_hard] benchmark.arena_hard.questions=q benchmark.arena_hard.judge.prompt=x",
        "benchmark.arena_hard.judge.prompt",
    ),
    (
        "benchmark=[arena_hard] benchmark.arena_hard.questions=q benchmark.arena_hard.sampling.top_p=2",
        "benchmark.arena_hard.sampling.top_p",
    ),
    (
        "benchmark=[reward_bench] benchmark.reward_bench.questions=q benchmark.reward_bench.count=-1",
        "benchmark.reward_bench.count",
    ),
    (
        "benchmark=[vicuna_bench] benchmark.vicuna_bench.questions=q benchmark.vicuna_bench.count=-1",
        "benchmark.vicuna_bench.count",
    ),
    ("benchmark=[vicuna_bench]", "benchmark.vicuna_bench.questions"),
    ("tracker=wandb tracker.wandb.mode=maybe", "tracker.wandb.mode"),
    ("hub.push=true", "hub.repo_id"),
]


@pytest.mark.parametrize(("overrides", "key"), RANGES)
def test_value_out_of_range_is_refused_with_the_whole_path_of_its_key(overrides: str, key: str) -> None:
    with pytest.raises(SelfalignError, match=rf"(?<![\w.]){re.escape(key)}(?![\w.])"):
        composed("experiment=smoke", *overrides.split())


# --- processes -----------------------------------------------------------------------------------------------------


def test_few_modules_decide_who_writes() -> None:
    """Whoever else has something done by one process says `distributed.on_main`, which has the others wait."""
    asking = {name for name, path in modules().items() if "is_main" in path.read_text(encoding="utf-8")}
    assert asking == {"core.distributed", "store.artifacts", "runs.ledger", "training.train", "cli.environment"}
