"""Settings as they are read from the source, against the classes themselves; keys as `--explain` explains them."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT, Said

from selfalign.cli.environment import conf_folder
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.explain import explain, places_of
from selfalign.config.extensions import import_component
from selfalign.config.options import Options, Tree
from selfalign.config.schema import bounds_of
from selfalign.config.settings import REQUIRED, UNKNOWN, Component, Setting, component
from selfalign.core.errors import SelfalignError
from selfalign.core.files import PACKAGE
from selfalign.engines.openai_client import Endpoint

EXAMPLES = ROOT / "docs/examples/selfalign_example/conf"


@cache
def options() -> Options:
    return Options([conf_folder()])


@cache
def components() -> dict[str, tuple[Component, dict[str, Any]]]:
    """{class: (its settings, what an option sets)} of every class in the tree."""
    tree, found = Tree(options()), dict[str, tuple[Component, dict[str, Any]]]()

    def visit(variants: list[Any]) -> None:
        for one in variants:
            if one.component.name not in found:
                values = next((what for what in one.options.values() if isinstance(what, dict)), {})
                found[one.component.name] = one.component, values
                for name in one.component.settings:
                    known, others = tree.members(one, name)
                    visit([*tree.under(one, name), *others, *(each for what in known.values() for each in what)])

    visit([tree.root])
    return {name: what for name, what in found.items() if name != "at"}


def settings() -> list[tuple[str, Setting]]:
    return [(name, one) for name, (part, _) in components().items() for one in part.settings.values()]


def made(name: str) -> Any:
    """An instance of a class with its defaults; what must be given is as an option sets it."""
    kind, (part, values) = import_component(name), components()[name]
    given = {
        "command": "serve {weights} {port}",
        "prompt": "{instruction} {response} {criterion} {first} {second} [[A]] [[B]]",
    }
    given |= {
        "learning_rate": 1e-5,
        "function": "f.py:score",
        "path": "p",
        "model": "owner/name",
        "tasks": [],
        "questions": "q",
    }
    given |= {"reference_outputs": "r", "name": "n", "metric": "m"}
    given |= {"endpoint": Endpoint(base_url="http://127.0.0.1/v1", model="m")}
    needed = [one.name for one in part.settings.values() if one.default == REQUIRED]
    needed += ["prompt"] * ("prompt" in part.settings and "prompt" in values)
    needed += ["endpoint"] * name.endswith(".ExternalScore")
    return kind(**{key: values[key] if values.get(key, REQUIRED) != REQUIRED else given[key] for key in needed})


# --- read from the source ----------------------------------------------------------------------------------------


def test_the_tree_reaches_the_classes_of_all_options_and_what_they_hold() -> None:
    names = {name.rpartition(".")[2] for name in components()}
    assert {"ExperimentConfig", "SimPO", "Refinement", "Panel", "Endpoint", "MetaJudge", "LoRA", "LmEval"} <= names
    assert len(names) >= 60


@pytest.mark.parametrize("name", components())
def test_fields_types_and_defaults_are_those_of_the_class(name: str) -> None:
    kind, part = import_component(name), components()[name][0]
    live = {one.name: one for one in fields(kind) if one.init}
    assert list(part.settings) == list(live)
    for key, setting in part.settings.items():
        assert setting.meaning, f"{name}.{key} has no meaning in the docstring of its class"
        told = live[key].default if live[key].default is not MISSING else live[key].default_factory
        default = told() if callable(told) else REQUIRED if told is MISSING else told
        if setting.default is UNKNOWN:
            assert (name.rpartition(".")[2], key) == ("MTBench", "temperatures")
        elif is_dataclass(default):
            assert setting.component.rpartition(".")[2] == type(default).__name__
            assert {key: getattr(default, key) for key in setting.default} == setting.default
        else:
            assert setting.default == default
        assert not isinstance(live[key].type, type) or setting.kind == live[key].type.__name__


def checked(name: str, key: str, value: Any) -> str:
    """What the class says of a value; empty if it takes it."""
    given: Any = made(name)
    try:
        changed = replace(given, **{key: value})
        if hasattr(changed, "check"):
            changed.check("here")
    except SelfalignError as error:
        return str(error)
    return ""


CHECKED_ELSEWHERE = {"ExperimentConfig", "TrainConfig", "EvaluateConfig", "LmEvalTask"}
"""Classes that are made with others."""
CHECKABLE = [(name, one) for name, one in settings() if name.rpartition(".")[2] not in CHECKED_ELSEWHERE]
WORDS = [(name, one) for name, one in CHECKABLE if one.kind == "str"]
NUMBERS = [(name, one) for name, one in CHECKABLE if one.kind in ("int", "float") and bounds_of(one.limits)]


def named(case: tuple[str, Setting]) -> str:
    return f"{case[0].rpartition('.')[2]}.{case[1].name}"


@pytest.mark.parametrize("case", WORDS, ids=named)
def test_allowed_words_are_those_that_the_class_names_when_it_refuses_another(case: tuple[str, Setting]) -> None:
    name, setting = case
    said = checked(name, setting.name, "neither")
    if setting.choices:
        assert f"{setting.name} must be" in said
        assert all(word in said for word in setting.choices), said
    else:
        assert f"{setting.name} must be one of" not in said, "the allowed words were not read from this check"


@pytest.mark.parametrize("case", NUMBERS, ids=named)
def test_limits_of_a_number_are_those_of_the_class(case: tuple[str, Setting]) -> None:
    name, setting = case
    limits = bounds_of(setting.limits)
    outside = {
        "minimum": lambda limit: limit - 1,
        "exclusiveMinimum": lambda limit: limit,
        "maximum": lambda limit: limit + 1,
        "exclusiveMaximum": lambda limit: limit,
    }
    kinds: dict[str, type] = {"int": int, "float": float}
    for keyword, limit in limits.items():
        assert checked(name, setting.name, kinds[setting.kind](outside[keyword](limit))), keyword


def test_there_are_words_and_numbers_to_check() -> None:
    assert sum(bool(setting.choices) for _, setting in WORDS) >= 15
    assert len(NUMBERS) >= 45


UNITS = {
    "train.align.microbatch_tokens": "tokens",
    "train.align.max_length": "tokens",
    "train.align.batch_size": "examples",
    "train.align.warmup_ratio": "share",
    "data.respond.candidates": "responses",
    "data.instruct.max_words": "words",
    "evaluate.bounds.max_kl_to_m1": "nats",
}


@pytest.mark.parametrize("key", UNITS)
def test_unit_is_told_where_name_or_meaning_has_one(key: str) -> None:
    assert f"({UNITS[key]})" in explain(key, options())


@pytest.mark.parametrize("key", ["train.align.learning_rate", "loss.nll_weight", "seed", "data.respond.sampling.top_p"])
def test_no_unit_is_made_up(key: str) -> None:
    types = [line for line in explain(key, options()).splitlines() if line.startswith("  type ")]
    assert types
    assert not any("(" in line for line in types)


# --- explain -----------------------------------------------------------------------------------------------------


def sections(text: str) -> Iterator[dict[str, str]]:
    """The rows of each explanation."""
    for part in text.split("\n\n")[1:]:
        yield {line[2:11].strip(): line[11:].strip() for line in part.splitlines() if line.startswith("  ")}


def test_setting_is_explained_with_type_default_limits_and_source() -> None:
    text = explain("loss.lam", options())
    assert "λ, the weight of the refinement; 0 is DPO. A list has one λ for each iteration." in text
    dpo, ipo = sections(text)
    assert (dpo["in"], ipo["in"]) == ("loss=sr_dpo", "loss=sr_ipo")
    assert dpo["default"] == "0.5"
    assert dpo["allowed"] == "0 or more and finite"
    file, _, line = dpo["source"].partition(" ")[0].partition(":")
    assert "lam: Any = 0.5" in (PACKAGE.parent / file).read_text("utf-8").splitlines()[int(line) - 1]


def test_every_key_of_every_option_is_explained() -> None:
    keys = places_of(Tree(options()))
    assert len(keys) >= 300
    for key in keys:
        assert "source" in explain(key, options()), key


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("", ["iterations", "loss", "what the alignment minimises"]),
        ("loss", ["options:", "sr_ipo", "settings:", "lambda_scale", "[loss=sr_ipo]"]),
        ("loss=simpo", ["arXiv 2405.14734", "gamma", "(1.0)"]),
        ("loss.gamma", ["loss=simpo", "loss=alpha_dpo", "1.5"]),
        ("loss.refinement.source", ["prompted, naive, shuffled, constant, random_prompt, contrastive"]),
        ("loss.lam=0.3", ["the weight of the refinement"]),
        ("judge.min_score", ["0; judge=multiple_choice: 1"]),
        ("judge.members.short.rationale_tokens", ["judge=expected_score", "tokens"]),
        ("at", ["iteration", "writers"]),
        ("at.2.loss.beta", ["loss=dpo"]),
        ("benchmark", ["mt_bench"]),
        ("benchmark=mt_bench", ["MT-Bench", "temperatures"]),
        ("benchmark.mt_bench.judge.method", ["generate, logprobs"]),
        ("evaluate.head_to_head.model", ["sft"]),
        ("data.instruct.sampling.max_new_tokens", ["128", "data=self_rewarding_smoke: 24"]),
        ("data.seed_data.eft_source", ["none, human, baseline, synthetic"]),
        ("data/meta_judge", ["pairwise"]),
        ("experiment", ["smoke", "under a minute"]),
        ("experiment=smoke", ["under a minute", "smoke.yaml"]),
    ],
)
def test_groups_options_and_keys_below_names_are_explained(key: str, parts: list[str]) -> None:
    text = " ".join(explain(key, options()).split())
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("loss.lamm", "no loss.lamm; did you mean loss.lam?"),
        ("lam", "no lam; did you mean loss.lam?"),
        ("los", "no los; did you mean loss?"),
        ("loss=srdpo", "no loss=srdpo; did you mean loss=sr_dpo? There are: "),
        ("train.algin.epochs", "no train.algin; did you mean train.align?"),
        ("judge.members.short.modell", "no judge.members.short.modell; did you mean judge.members.short.model?"),
        ("loss.beta.x", "loss.beta has no settings below it: selfalign --explain loss.beta"),
        ("hub.zzz", "no hub.zzz; hub has data, private, push, repo_id"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(key: str, said: str) -> None:
    with pytest.raises(SelfalignError) as error:
        explain(key, options())
    assert str(error.value).startswith(said)


def test_settings_of_a_users_class_are_explained_without_importing_it(
    call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT / "docs/examples")
    monkeypatch.delitem(sys.modules, "selfalign_example.losses", raising=False)
    said = call("--config-dir", str(EXAMPLES), "--explain", "loss.epsilon", "data.schema.minimum_lead")
    assert said.code == 0, said.err
    assert "at least 0 and below 0.5" in said.out
    assert "losses.py:" in said.out
    assert "schemas.py:" in said.out
    assert "selfalign_example.losses" not in sys.modules


def test_command_explains_without_torch_and_ends_with_one_line_for_a_mistyped_key(tmp_path: Path) -> None:
    def run(key: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", "-m", "selfalign", "--explain", key]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    right, wrong = run("loss.lam"), run("loss.lamm")
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in right.stderr.splitlines()}
    assert "selfalign" in imported
    assert not imported & {"torch", "transformers", "hydra", "omegaconf", "numpy"}
    assert right.returncode == 0
    assert "the weight of the refinement" in right.stdout
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1] == "error: no loss.lamm; did you mean loss.lam?"


def test_root_of_the_tree_is_the_experiment() -> None:
    assert import_component(Tree(options()).root.component.name) is ExperimentConfig
    assert component(f"{ExperimentConfig.__module__}.ExperimentConfig").settings["iterations"].default == 2
