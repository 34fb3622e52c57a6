"""docs/migration.md: what it says of TRL is so in the installed one, and what it says of selfalign in this one."""

import ast
import re
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from builders import ROOT, composed
from trl import DPOConfig, LogCompletionsCallback
from trl.experimental.online_dpo import OnlineDPOConfig

from selfalign.cli.environment import conf_folder
from selfalign.config.explain import explain
from selfalign.config.hydra import compose_experiment
from selfalign.config.options import Options

PAGE = (ROOT / "docs/migration.md").read_text("utf-8")
CONFIGS: dict[str, type] = {"DPOConfig": DPOConfig, "OnlineDPOConfig": OnlineDPOConfig}


def rows(heading: str) -> list[list[str]]:
    """The cells of each row of the table whose first heading this is."""
    [table] = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    return [re.split(r" *\| *", line.strip())[1:-1] for line in table.splitlines()]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def cases() -> list[tuple[str, list[str]]]:
    return [(name, row) for name in CONFIGS for row in rows(f"`{name}`")]


def default_of(config: type, name: str) -> Any:
    [found] = [one for one in fields(config) if one.name == name]
    return found.default if found.default is not MISSING else found.default_factory()  # pyright: ignore[reportCallIssue]


def value_at(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = getattr(node, name)
    return node


@cache
def ours() -> Any:
    return composed("model=tiny", "loss=dpo")[0]


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case[0]}: {case[1][0]}")
def test_settings_of_trl_and_ours_exist_with_the_defaults_that_the_page_gives(case: tuple[str, list[str]]) -> None:
    config, (theirs, their_default, keys_of_ours, our_default, *_) = CONFIGS[case[0]], case[1]
    known = {one.name for one in fields(config)}
    assert codes(theirs)
    assert set(codes(theirs)) <= known
    if default := codes(their_default):
        assert [str(default_of(config, codes(theirs)[0]))] == default
    options = Options([conf_folder()])
    keys = [key for key in codes(keys_of_ours) if "=" not in key]
    assert all("source" in explain(key, options) for key in keys)
    assert {key.partition("=")[0] for key in codes(keys_of_ours)} - set(keys) <= set(options.groups)
    if default := codes(our_default):
        assert [str(value_at(ours(), keys[0]))] == default


def test_tables_are_read() -> None:
    assert len(rows("`DPOConfig`")) >= 20
    assert len(rows("`OnlineDPOConfig`")) >= 10
    assert {"max_prompt_length", "max_completion_length"}.isdisjoint(one.name for one in fields(DPOConfig))
    assert trl.__version__.startswith("1.16"), "the page names the version that it is about"


def test_python_on_the_page_gives_arguments_that_trl_has() -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    calls = {
        node.func.id: {word.arg for word in node.keywords}
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert calls["DPOConfig"] <= {one.name for one in fields(DPOConfig)}
    assert calls["DPOTrainer"] == {"model", "args", "train_dataset"}


def test_what_the_page_calls_removed_is_not_in_trl() -> None:
    section = PAGE.partition("## From TRL: judges")[2].partition("\n## ")[0]
    names = set(re.findall(r"`(\w+(?:Judge|Callback))\b", section)) - {LogCompletionsCallback.__name__}
    assert names == {"WinRateCallback", "OpenAIPairwiseJudge", "HfPairwiseJudge", "PairRMJudge"}
    source = "".join(file.read_text("utf-8") for file in Path(str(trl.__file__)).parent.rglob("*.py"))
    assert not any(name in source for name in names)


def test_losses_are_those_that_trl_has() -> None:
    told = {name for row in rows("`loss_type`") for name in codes(row[0])} - {"loss_weights"}
    documented = re.search(r"loss_type \(`list\[str\]`.*?loss_weights", str(DPOConfig.__doc__), flags=re.DOTALL)
    assert documented
    assert told <= set(re.findall(r"`'(\w+)'`", documented[0]))


def test_every_key_on_the_page_is_one_of_ours() -> None:
    options = Options([conf_folder()])
    groups = "model|data|engine|judge|pair|loss|train|evaluate|hub"
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    keys = {key for code in codes(prose) for key in re.findall(rf"^(?:{groups})(?:\.\w+)+$", code)}
    assert len(keys) >= 40
    for key in keys:
        assert explain(key, options), key


def test_recipe_as_a_file_is_the_recipe_as_a_command(tmp_path: Path) -> None:
    [preset] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/zephyr.yaml").write_text(preset)
    [command] = re.findall(r"^torchrun .*-m selfalign (.*)$", PAGE, flags=re.MULTILINE)
    _, from_file, _ = compose_experiment(conf_folder(), ["experiment=zephyr"], tmp_path)
    _, from_command, _ = composed(*command.split(), "name=zephyr")
    assert from_file == from_command
