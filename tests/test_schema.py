"""The JSON schemas of configuration files: what Hydra takes they take, and what it refuses they refuse."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
from builders import ROOT, Said, composed
from omegaconf import OmegaConf

from selfalign.cli.environment import conf_folder
from selfalign.config.options import Options
from selfalign.config.schema import GLOBAL, WHOLE, schemas

EXAMPLES = ROOT / "docs/examples/selfalign_example/conf"
FILES = sorted(file for file in conf_folder().rglob("*.yaml") if file.parent != conf_folder())
TEXTS = ("judge/texts", "benchmark/texts")
"""Groups of texts, which name no class."""
OWN = sorted(EXAMPLES.rglob("*.yaml"))

Check = Callable[[Any], Any]


@cache
def written(*more: Path) -> dict[str, Any]:
    """{name: schema}."""
    found = schemas(Options([conf_folder(), *more]))
    assert json.loads(json.dumps(found)) == found
    return found


@cache
def check(name: str, *more: Path) -> Check:
    """The check of a schema."""
    return fastjsonschema.compile(written(*more)[name], use_default=False)


def schema_of(file: Path, folder: Path) -> str:
    """The name of the schema of an option's file."""
    group = file.relative_to(folder).parent.as_posix()
    return WHOLE if group in GLOBAL else group


def read(text: str | Path) -> Any:
    """A YAML file or text as OmegaConf reads it: 1e-6 is a number."""
    loaded = OmegaConf.load(text) if isinstance(text, Path) else OmegaConf.create(text)
    return OmegaConf.to_container(loaded, enum_to_str=True)


def refuses(checked: Check, value: Any) -> str:
    """What a check says of a value; empty if it takes it."""
    try:
        checked(value)
    except fastjsonschema.JsonSchemaException as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return ""


def path_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def test_every_group_has_a_schema_but_those_of_mere_texts() -> None:
    groups = {file.relative_to(conf_folder()).parent.as_posix() for file in FILES}
    assert groups - set(written()) == {*GLOBAL, *TEXTS}
    assert len(FILES) >= 110


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name != "texts" and read(file)], ids=path_of)
def test_option_validates_and_a_misspelt_key_in_it_does_not(file: Path) -> None:
    checked, content = check(schema_of(file, conf_folder())), read(file)
    assert refuses(checked, content) == ""
    assert "learning_ratte" in refuses(checked, {**content, "learning_ratte": 1})


@pytest.mark.parametrize("file", OWN, ids=path_of)
def test_options_and_classes_of_a_users_folder_validate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs/examples")
    checked = check(schema_of(file, EXAMPLES), EXAMPLES)
    assert refuses(checked, read(file)) == ""
    assert "betta" in refuses(checked, {**read(file), "betta": 1})


RUNS = (
    "experiment=smoke",
    "experiment=demo loss=sr_dpo loss.lam=[0.1,0.5] loss.refinement.source=naive",
    "experiment=self_rewarding train.checkpoint_selection.instructions=v.jsonl "
    "benchmark.alpaca_eval.reference_outputs=r",
    "experiment=meta_rewarding_small",
    "experiment=quality_aware_hh loss=sr_ipo benchmark.vicuna_bench.questions=q.jsonl",
    "experiment=temporal +judge@at.2.judge=external at.2.judge.endpoint.base_url=http://h/v1 "
    "at.2.judge.endpoint.model=m",
    "experiment=smoke data.seed_data.eft_source=none judge=panel +judge@judge.members.a=expected_score "
    "+judge@judge.members.b=implicit",
    "experiment=smoke benchmark=[arena_hard,lm_eval] benchmark.arena_hard.questions=q "
    "benchmark.lm_eval.tasks=[{name:a,metric:acc}]",
    "experiment=smoke model.lora.rank=8 train=adapter engine=vllm tracker=wandb",
)


@pytest.mark.parametrize("run", RUNS)
def test_composed_configuration_validates(run: str) -> None:
    _, text, _ = composed(*run.split())
    assert refuses(check(WHOLE), read(text)) == ""


TAKEN = {
    "reference": "seed: ${oc.env:SEED}\ntrain:\n  align:\n    epochs: ${seed}\n",
    "missing value": "model:\n  path: ???\niterations: ???\n",
    "sweep": "hydra:\n  sweeper:\n    params:\n      loss.lam: 0.1,0.3\n",
    "user's option": "defaults:\n  - smoke\n  - override /judge: my_rubric\n  - override /benchmark: [mine]\n",
    "value for each iteration": "loss:\n  lam: [0.1, 0.2]\n",
    "changes from an iteration on": "at:\n  2:\n    judge: {model: sft}\n    writers: [self, sft]\n",
    "whole number for a number": "loss:\n  beta: 1\n",
    "null": "train:\n  sft:\n    router_loss_coefficient: null\n",
    "mixture": "data:\n  path: [{source: a.jsonl, weight: 2}, {source: b.jsonl}]\n",
    "panel in a panel": "judge:\n  members:\n    a:\n      members:\n        b: {rationale_tokens: 8}\n",
    "own task": "benchmark:\n  mine:\n    tasks: [{name: a, metric: acc}]\n",
}

REFUSED = {
    "unknown key": ("iteration: 2\n", "iteration"),
    "unknown key in depth": ("train:\n  align:\n    learning_ratte: 1\n", "train.align"),
    "unknown key in a change": ("at:\n  2:\n    judge: {modell: sft}\n", "modell"),
    "unknown change": ("at:\n  2:\n    train: {}\n", "train"),
    "unknown key of a benchmark": ("benchmark:\n  mt_bench: {tasks: []}\n", "tasks"),
    "unknown key in a panel": ("judge:\n  members:\n    a: {lam: 1}\n", "lam"),
    "no such word": ("train:\n  reference_policy: last\n", "reference_policy"),
    "no such member": ("data:\n  seed_data: {eft_source: humans}\n", "eft_source"),
    "text for a number": ("iterations: two\n", "iterations"),
    "half a whole number": ("iterations: 1.5\n", "iterations"),
    "out of range": ("train:\n  align: {warmup_ratio: 1}\n", "warmup_ratio"),
    "below the range": ("iterations: 0\n", "iterations"),
    "setting of another loss": ("defaults:\n  - override /loss: ipo\nloss:\n  lam: 1\n", "lam"),
    "setting of the other kind of data": ("defaults:\n  - override /data: pairs\ndata:\n  respond: {}\n", "respond"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_hydra_takes_is_taken(case: str) -> None:
    assert refuses(check(WHOLE), read(TAKEN[case])) == ""


@pytest.mark.parametrize("case", REFUSED)
def test_mistake_in_a_preset_is_found_at_its_place(case: str) -> None:
    text, part = REFUSED[case]
    assert part in refuses(check(WHOLE), read(text))


def test_option_of_an_unknown_class_may_have_any_key() -> None:
    text = "defaults:\n  - /schema/mine.losses.Mine@_here_\nanything: 1\n"
    assert refuses(check("loss"), read(text)) == ""


def test_setting_explains_itself_in_the_schema() -> None:
    lam = written()[WHOLE]["definitions"]["SrDPO"]["properties"]["lam"]
    assert lam["default"] == 0.5
    assert lam["description"].startswith("λ, the weight of the refinement; 0 is DPO.")
    assert "selfalign/losses/preference.py:" in lam["description"]


def test_command_writes_the_schemas_and_prints_the_settings_of_the_editor(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/loss").mkdir(parents=True)
    (tmp_path / "mine/loss/soft.yaml").write_text("defaults:\n  - dpo\n  - _self_\nbeta: 0.01\n")
    said = call("--config-dir", "mine", "--schema", ".vscode/selfalign")
    assert said.code == 0, said.err
    patterns = json.loads(said.out)["yaml.schemas"]
    assert patterns[".vscode/selfalign/loss.json"] == ["mine/loss/*.yaml"]
    assert patterns[".vscode/selfalign/selfalign.json"] == [
        "mine/preset/*.yaml", "mine/experiment/*.yaml", "outputs/*/config.yaml",
    ]  # fmt: skip
    assert sorted(patterns) == sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.json"))
    checked = fastjsonschema.compile(
        json.loads((tmp_path / ".vscode/selfalign/loss.json").read_text("utf-8")), use_default=False
    )
    assert refuses(checked, read("defaults:\n  - soft\nbeta: 0.02\n")) == ""
    assert "betta" in refuses(checked, read("defaults:\n  - soft\nbetta: 0.02\n"))


def test_folder_that_cannot_be_written_is_one_line(call: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    said = call("--schema", str(tmp_path / "taken"))
    assert said.code == 1
    assert said.err == f"error: cannot write the schemas to {tmp_path / 'taken'}: File exists\n"
