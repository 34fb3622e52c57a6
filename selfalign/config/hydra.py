"""The Hydra side of the configuration: register components, and turn a composed configuration into live objects."""

import logging
import math
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfalign.config.checks import check_experiment
from selfalign.config.components import COMPONENTS
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.extensions import check_options, import_component, installed_folders, taken
from selfalign.config.overrides import as_list, no_such
from selfalign.core.errors import SelfalignError

logger = logging.getLogger(__name__)

ESCAPED = re.compile(r"(\\*)\$\{")
"""What OmegaConf would take for a reference to another setting."""

FILES = "file://"
"""Prefix of a folder in the search path."""

SCHEMA = "schema/"
"""Prefix of a class in an option's defaults."""


class Classes(ConfigSource):
    """Config source of the classes that options name as `/schema/MODULE.CLASS`.

    Hydra checks every key and type of an option by the fields of its dataclass.
    """

    @staticmethod
    def scheme() -> str:
        """Return the prefix of this source in the search path."""
        return "class"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the settings of a class, with their types and defaults.

        Raises:
            SelfalignError: the class does not exist, or a field has a type that no setting can have.
        """
        name = config_path.removeprefix(SCHEMA)
        try:
            config = OmegaConf.structured(import_component(name))
        except OmegaConfBaseException as error:
            raise SelfalignError(f"{name}: {str(error).splitlines()[0]}") from error
        return ConfigResult(self.provider, self.full_path(), config, {"package": None})

    def is_config(self, config_path: str) -> bool:
        """Return whether the path names a class."""
        return config_path.startswith(SCHEMA)

    def is_group(self, config_path: str) -> bool:
        """Return False: classes are no options to choose from."""
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return nothing: classes are not listed."""
        return []

    def available(self) -> bool:
        return True


class SearchPath(SearchPathPlugin):
    """Hydra plugin that also looks for options in installed packages."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folders of installed packages, and the source of classes."""
        before = [Path(place.path.removeprefix(FILES)) for place in search_path.get_path() if place.provider == "main"]
        for distribution, folder in installed_folders():
            if names := taken(folder, before):
                logger.warning(
                    "%s: its options %s are not used, because options of these names exist already",
                    *(distribution, ", ".join(names)),
                )
            search_path.append(distribution, f"{FILES}{folder}")
            before.append(folder)
        search_path.append("classes", f"{Classes.scheme()}://")


def register() -> None:
    """Register the settings, and the options and classes of others, with Hydra."""
    ConfigStore.instance().store(name="experiment_schema", node=ExperimentConfig)
    for plugin in (Classes, SearchPath):
        Plugins.instance().register(plugin)


def to_experiment(config: DictConfig) -> ExperimentConfig:
    """Return a composed configuration as live objects.

    Raises:
        SelfalignError: a key is unknown, a value is out of range, or a required value is missing.
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
    """Return a composed configuration as live objects, as YAML, and as plain dictionaries with the components' classes.

    Texts replace the names of the files that they were read from, because a file may change after the run.

    Raises:
        SelfalignError: a key is unknown, a value is out of range, or a required value is missing.
    """
    experiment = to_experiment(config)
    config = with_texts(config, experiment)
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(plain, dict)
    described = {**{str(key): value for key, value in plain.items()}, "choices": choices(experiment)}
    return experiment, OmegaConf.to_yaml(config, resolve=True), described


def with_texts(config: DictConfig, experiment: ExperimentConfig) -> DictConfig:
    """Return a copy of the configuration in which settings `file:PATH` have the texts of their files."""
    told = deepcopy(config)

    def read(node: DictConfig, live: Any) -> None:
        for name in node:
            value, own = (
                node._get_node(name),
                live.get(name) if isinstance(live, dict) else getattr(live, str(name), None),
            )
            if own is None:
                continue
            if isinstance(value, DictConfig):
                read(value, own)
            elif isinstance(own, str) and str(node[name]).startswith("file:"):
                node[name] = ESCAPED.sub(r"\1\1\\${", own)

    read(told, experiment)
    return told


def compose_experiment(
    folder: Path, overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """Compose a configuration from overrides, as the command line does, and describe it.

    Args:
        folder: `conf/`.
        overrides: as on the command line.
        config_dir: a folder with the user's own options.
    """
    register()
    more: list[str] = []
    if config_dir is not None:
        check_options(config_dir, folder)
        more = [f"hydra.searchpath={as_list([f'{FILES}{config_dir.absolute()}'])}"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        return describe(compose("config", overrides=[*overrides, *more]))


def choices(experiment: ExperimentConfig) -> dict[str, str]:
    """Return {group: class name} of the components."""
    return {group: type(getattr(experiment, group)).__name__ for group in COMPONENTS}


def check_finite(value: Any, path: str) -> None:
    """Check that no number is infinite or NaN, because every comparison with NaN is false.

    Raises:
        SelfalignError: such a number, with its path.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise SelfalignError(f"{path.strip('.')} must be a finite number, got {value}")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        check_finite(item, f"{path}{name}.")


def check_keys(node: DictConfig, path: str) -> None:
    """Check that no key was added with `+` that its component does not have.

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
