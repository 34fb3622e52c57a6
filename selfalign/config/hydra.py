"""Hydra's side of the configuration: components registered, a composed configuration made into live objects."""

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from selfalign.config.checks import check_experiment
from selfalign.config.components import COMPONENTS
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.overrides import no_such
from selfalign.core.errors import SelfalignError


def register() -> None:
    """Makes the components known to Hydra, so that it checks every key and type."""
    store = ConfigStore.instance()
    store.store(name="experiment_schema", node=ExperimentConfig)
    for group, components in COMPONENTS.items():
        for name, component in components.items():
            store.store(group=f"schema/{group}", name=name, node=component)


def to_experiment(config: DictConfig) -> ExperimentConfig:
    """The composed configuration as live objects.

    Raises:
        SelfalignError: a key is unknown, a value out of range, or one that must be given is not.
    """
    check_keys(config, "")
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise SelfalignError("\n".join(f"set {key}=…; it has no default" for key in missing))
    experiment = OmegaConf.to_object(config)
    assert isinstance(experiment, ExperimentConfig)
    check_experiment(experiment)
    check_finite(OmegaConf.to_container(config, resolve=True), "")
    return experiment


def describe(config: DictConfig) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """A composed configuration as live objects, as YAML, and plain with the class of each component.

    Raises:
        SelfalignError: a key is unknown, or a value out of range.
    """
    experiment = to_experiment(config)
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(plain, dict)
    described = {**{str(key): value for key, value in plain.items()}, "choices": choices(experiment)}
    return experiment, OmegaConf.to_yaml(config, resolve=True), described


def compose_experiment(folder: Path, overrides: Sequence[str]) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """What the command line makes of these overrides, described; `folder` is `conf/`."""
    register()
    with initialize_config_dir(str(folder), version_base="1.3"):
        return describe(compose("config", overrides=list(overrides)))


def choices(experiment: ExperimentConfig) -> dict[str, str]:
    """{group: class} of the components whose class is a choice, so that runs can be told apart by it."""
    groups = [group for group, components in COMPONENTS.items() if len(components) > 1 and group != "benchmark"]
    return {group: type(getattr(experiment, group)).__name__ for group in groups}


def check_finite(value: Any, path: str) -> None:
    """Refuses infinite numbers and NaN, with which every comparison is false, wherever they stand.

    Raises:
        SelfalignError: such a number, with its path.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise SelfalignError(f"{path.strip('.')} must be a finite number, got {value}")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        check_finite(item, f"{path}{name}.")


def check_keys(node: DictConfig, path: str) -> None:
    """Refuses keys that were added with `+` and that no component knows.

    Raises:
        SelfalignError: such a key, with its path.
    """
    kind = OmegaConf.get_type(node) or dict
    known = {f.name for f in fields(kind)} if is_dataclass(kind) else {str(name) for name in node}
    for name in node:
        if str(name) not in known:
            raise SelfalignError(no_such(f"{path}{name}", known))
        if isinstance(node._get_node(name), DictConfig):
            check_keys(node[name], f"{path}{name}.")
