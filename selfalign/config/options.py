"""Read the options of each group from their files, without Hydra: which classes stand where in the configuration."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from selfalign.config.settings import ROOT, Component, Module, Setting, component, has_class, value_of
from selfalign.core.errors import SelfalignError

SCHEMA = "/schema/"
"""Prefix of a class in an option's defaults."""

PANEL = "selfalign.judges.panel.Panel"
RESPOND = "selfalign.stages.respond.RespondConfig"

Places = Mapping[str, tuple[str, ...]]
"""{place: what stands there}, a class as `/schema/MODULE.CLASS`, or a group whose options are chosen from."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A file of `conf/`, or of a folder of a user's.

    Attributes:
        group: the folder, such as "judge" or "data/meta_judge".
        name: the file's name without ".yaml".
        file: the file.
        places: what stands where below the group's own place, which is "".
        values: what it sets, with what the options that it starts from set.
    """

    group: str
    name: str
    file: Path
    places: Places
    values: dict[str, Any]


class Options:
    """All options of some folders.

    Attributes:
        groups: {group: {name: option}}.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.groups: dict[str, dict[str, Option]] = {}
        self._files: dict[str, Path] = {}
        self.top: Places = {}
        for folder in folders:
            for file in sorted(folder.rglob("*.yaml")):
                self._files.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
        for path, file in self._files.items():
            group, _, name = path.rpartition("/")
            option = self._read(group, name, file, ())
            if group:
                self.groups.setdefault(group, {})[name] = option
            elif name == "config":
                self.top = option.places

    def _read(self, group: str, name: str, file: Path, started: tuple[str, ...]) -> Option:
        """Read an option after the options that it starts from.

        Raises:
            SelfalignError: a file is no YAML, or options start from one another.
        """
        if (path := f"{group}/{name}") in started:
            raise SelfalignError(f"{file}: starts from itself")
        places: dict[str, tuple[str, ...]] = {}
        values: dict[str, Any] = {}
        content = _load(file)
        for entry in content.pop("defaults", None) or ():
            for start, place in _starts(group, entry):
                if start.startswith(SCHEMA) or isinstance(entry, dict):
                    places[place] = (*places.get(place, ()), start)
                elif start in self._files:
                    above, _, last = start.rpartition("/")
                    other = self._read(above, last, self._files[start], (*started, path))
                    places |= {_below(place, key): what for key, what in other.places.items()}
                    values = _merged(values, _nested(place, other.values))
        return Option(group=group, name=name, file=file, places=places, values=_merged(values, content))


def _load(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SelfalignError(f"{file}: no YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _starts(group: str, entry: Any) -> Iterator[tuple[str, str]]:
    """Yield (class, option or group; place) of an entry in an option's defaults."""
    for key in entry if isinstance(entry, dict) else [entry]:
        path, _, place = str(key).removeprefix("optional ").partition("@")
        if path == "_self_" or path.startswith("override "):
            continue
        if not path.startswith(SCHEMA):
            path = path.removeprefix("/") if path.startswith("/") or not group else f"{group}/{path}"
        if isinstance(entry, dict) and not place:
            place = path.replace("/", ".")
        yield path, "" if place == "_here_" else place


def _below(place: str, key: str) -> str:
    return ".".join(filter(None, (place, key)))


def _nested(place: str, values: dict[str, Any]) -> dict[str, Any]:
    for name in reversed(place.split(".") if place else []):
        values = {name: values}
    return values


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return nested values, those of the second over those of the first."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


# --- what may stand at a place -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A class that may stand at a place of the configuration.

    Attributes:
        component: its settings.
        options: {group=option that brings it: what that option sets there}.
        given: what a default that contains it sets.
        places: what stands below it, beside what its settings say.
    """

    component: Component
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    places: Places = field(default_factory=dict)


class Tree:
    """The configuration as a tree of places, each with the classes that may stand there."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.root = Variant(component=component(ROOT), places=options.top)

    def of_group(self, group: str, below: Places | None = None) -> list[Variant]:
        """Return the classes that the options of a group bring; those whose source cannot be read are left out."""
        return _joined(
            Variant(
                component=component(kind),
                options={f"{group}={name}": option.values},
                places={**{place: what for place, what in option.places.items() if place}, **(below or {})},
            )
            for name, option in self.options.groups.get(group, {}).items()
            for kind in _classes(option.places.get("", ()))
        )

    def under(self, variant: Variant, name: str) -> list[Variant]:
        """Return the classes that may stand in a setting; none for a plain value or a mapping of names."""
        setting = variant.component.settings.get(name)
        below = {key.partition(".")[2]: what for key, what in variant.places.items() if key.startswith(f"{name}.")}
        told = variant.places.get(name, ())
        found: list[Variant] = []
        for group in (what for what in told if not what.startswith(SCHEMA)):
            found += self.of_group(group, below)
        kinds = list(_classes(told)) or ([setting.component] if setting and setting.component and not found else [])
        given = variant.given.get(name, setting.default if setting else None)
        for kind in filter(has_class, kinds):
            found.append(
                Variant(
                    component=component(kind),
                    options={option: _at(values, name) for option, values in variant.options.items()},
                    given=given if isinstance(given, dict) else {},
                    places=below,
                )
            )
        return _joined(found)

    def members(self, variant: Variant, name: str) -> tuple[dict[str, list[Variant]], list[Variant]]:
        """Return ({known name: classes}, classes under any other name) of a setting that maps names to components."""
        if (variant.component.name, name) == (PANEL, "members"):
            return {}, self.of_group("judge")
        if variant.component.name == ROOT and name == "at":
            return {}, [self._changes()]
        if variant.component.name == ROOT and name == "benchmark":
            known: dict[str, list[Variant]] = {}
            for option in self.options.groups.get("benchmark", {}).values():
                for key in (place for place in option.places if "." not in place):
                    alone = Variant(
                        component=variant.component,
                        options={f"benchmark={option.name}": option.values},
                        places=option.places,
                    )
                    known[key] = self.under(alone, key)
            return known, _joined(one for variants in known.values() for one in variants)
        return {}, []

    def _changes(self) -> Variant:
        """Return what `at.N` may hold."""
        names = value_of(Module.at("selfalign.config.checks"), Module.at("selfalign.config.checks").values["CHANGES"])
        settings = {name: self.root.component.settings[name] for name in names if name != "writers"}
        settings = {name: replace(one, default=None) for name, one in settings.items()}
        writers = component(RESPOND).settings["writers"]
        whole = replace(
            self.root.component, name="at", settings={**settings, "writers": replace(writers, default=None)}
        )
        return Variant(component=whole, places={name: (name,) for name in settings})


def _classes(what: Iterable[str]) -> Iterator[str]:
    """Yield the classes whose source can be read."""
    names = (one.removeprefix(SCHEMA) for one in what if one.startswith(SCHEMA))
    yield from filter(has_class, names)


def _at(values: Any, name: str) -> Any:
    return values.get(name, {}) if isinstance(values, dict) else {}


def _joined(variants: Iterable[Variant]) -> list[Variant]:
    """Return one variant for each class, with the options and places of all."""
    found: dict[str, Variant] = {}
    for one in variants:
        if (old := found.get(one.component.name)) is not None:
            one = replace(old, options={**old.options, **one.options}, places={**old.places, **one.places})
        found[one.component.name] = one
    return list(found.values())


def default_of(variant: Variant, setting: Setting) -> Any:
    """Return the default of a setting where a variant stands."""
    return variant.given.get(setting.name, setting.default)
