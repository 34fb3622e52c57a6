"""JSON schemas (draft 7) of configuration files, for editors: one for whole configurations, and one for each group.

They accept what Hydra accepts: a part of the settings, `defaults`, `???`, and `${…}` in place of any value.
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from selfalign.config.options import Option, Options, Tree, Variant, default_of
from selfalign.config.settings import UNKNOWN, Setting
from selfalign.core.errors import SelfalignError

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
WHOLE = "selfalign"
"""Name of the schema of presets and whole configurations."""

GLOBAL = ("preset", "experiment")
"""Groups whose options are parts of a whole configuration."""

FILLED_IN = r"^\?\?\?$|\$\{.+\}"
"""A text in place of a value: OmegaConf's mark of a missing one, or a reference to another setting."""

TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}

BOUNDS = (
    (r"^(-?[\d.]+)(?: \(.*\))? or more\b", "minimum"),
    (r"\b(?:above) (-?[\d.]+)\b", "exclusiveMinimum"),
    (r"^at least (-?[\d.]+)\b", "minimum"),
    (r"\bat most (-?[\d.]+)$", "maximum"),
    (r"\bbelow (-?[\d.]+)$", "exclusiveMaximum"),
    (r"^(?:between|from) (-?[\d.]+) (?:and|to) -?[\d.]+$", "minimum"),
    (r"^(?:between|from) -?[\d.]+ (?:and|to) (-?[\d.]+)$", "maximum"),
)
"""(what a limit says, its keyword)."""


def write_schemas(folder: Path, options: Options, own: str) -> dict[str, list[str]]:
    """Write the schemas into a folder.

    Args:
        folder: is made if it does not exist.
        options: those that the schemas know.
        own: the folder whose options are edited, as an editor sees it.

    Returns:
        {schema: patterns of the files that it is for}.

    Raises:
        SelfalignError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        patterns: dict[str, list[str]] = {}
        for name, schema in schemas(options).items():
            file = folder / f"{name.replace('/', '.')}.json"
            file.write_text(f"{json.dumps(schema, ensure_ascii=False, indent=1)}\n", encoding="utf-8")
            groups = GLOBAL if name == WHOLE else (name,)
            patterns[file.as_posix()] = [f"{own}/{group}/*.yaml" for group in groups]
        patterns[(folder / f"{WHOLE}.json").as_posix()].append("outputs/*/config.yaml")
    except OSError as error:
        raise SelfalignError(f"cannot write the schemas to {folder}: {error.strerror}") from error
    return patterns


def schemas(options: Options) -> dict[str, Schema]:
    """Return {name: schema}: `selfalign` of whole configurations, and one for each group of options."""
    tree = Tree(options)
    found = {WHOLE: Writer(tree).whole()}
    for group in sorted(set(options.groups) - set(GLOBAL)):
        if any(option.places for option in options.groups[group].values()):
            found[group] = Writer(tree).group(group)
    return found


class Writer:
    """Writes one schema, with a definition for each class that stands in it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.definitions: Schema = {}
        self._names: dict[str, str] = {}

    def whole(self) -> Schema:
        """Return the schema of a preset, or of a whole configuration. A chosen option narrows its group's settings."""
        body = self._object(self.tree.root)
        choices = {group: sorted(names) for group, names in self.tree.options.groups.items()}
        entries = {f"override /{group}": _choice(names) for group, names in choices.items() if group in self._places()}
        body["properties"] |= {
            "defaults": _defaults([*choices.get("experiment", ()), *choices.get("preset", ())], entries),
            "hydra": {"type": "object", "description": "Settings of Hydra, such as those of a sweep."},
        }
        narrowed = [
            {"if": _overrides(group, variant), "then": {"properties": {group: self._of([variant])}}}
            for group in body["properties"]
            for variant in self.tree.of_group(group, self._under(group))
        ]
        return self._finished({**body, "allOf": narrowed}, "A preset, or a whole configuration, of selfalign.")

    def group(self, group: str) -> Schema:
        """Return the schema of a group's options: the settings of the class that an option names or starts from."""
        found = self.tree.options.groups[group]
        entries = _defaults(sorted(found), {})
        branches: dict[str, tuple[Schema, list[str]]] = {}
        for name, option in found.items():
            properties = self._properties(option)
            if properties is not None:
                body = {"properties": {**properties, "defaults": entries}, "additionalProperties": False}
                _, texts = branches.setdefault(json.dumps(body, default=str), (body, []))
                texts += self._beginnings(name, option)
        narrowed = [{"if": _starts_from(texts), "then": body} for body, texts in branches.values()]
        schema = {"type": "object", "properties": {"defaults": entries}, "allOf": narrowed}
        return self._finished(schema, f"An option of {group}.")

    def _finished(self, schema: Schema, title: str) -> Schema:
        return {"$schema": DRAFT, "title": title, **schema, "definitions": self.definitions}

    def _places(self) -> set[str]:
        return set(self.tree.root.places.get("", ())) | {
            what for told in self.tree.root.places.values() for what in told
        }

    def _under(self, group: str) -> dict[str, tuple[str, ...]]:
        """Return what the top of the configuration puts below a group's place."""
        start = f"{group}."
        return {key[len(start) :]: what for key, what in self.tree.root.places.items() if key.startswith(start)}

    def _beginnings(self, name: str, option: Option) -> list[str]:
        """Return the entries of `defaults` that bring an option's settings: its own name, or its class."""
        kinds = [f"{kind}@{place or '_here_'}" for place, told in option.places.items() for kind in told[:1]]
        return [name, *(kind for kind in kinds if "" not in option.places or kind.endswith("@_here_"))]

    def _properties(self, option: Option) -> Schema | None:
        """Return the settings of an option; None if its class cannot be read."""
        if not option.places:
            return None
        if "" in option.places:
            variants = [
                one for one in self.tree.of_group(option.group, self._under(option.group)) if option_is(one, option)
            ]
            return self._object(variants[0])["properties"] if variants else None
        known, _ = self.tree.members(self.tree.root, option.group)
        return {key: self._of(known[key]) for key in option.places if key in known}

    # --- settings ------------------------------------------------------------------------------------------------

    def _of(self, variants: Iterable[Variant]) -> Schema:
        """Return a reference to the definition of a place where one of some classes stands, and add it if it is new.

        A definition may refer to itself, as that of a panel of judges does.
        """
        variants = list(variants)
        key = json.dumps([[v.component.name, sorted(v.places.items()), v.given] for v in variants], default=str)
        if key not in self._names:
            name = " or ".join(variant.component.name.rpartition(".")[2] for variant in variants)
            same = sum(name == known.partition("-")[0] for known in self.definitions)
            name = self._names[key] = f"{name}-{same + 1}" if same else name
            self.definitions[name] = {}
            self.definitions[name] = self._object(variants[0]) if len(variants) == 1 else self._union(variants)
        return {"$ref": f"#/definitions/{quote(self._names[key])}"}

    def _object(self, variant: Variant) -> Schema:
        """Return the schema of the settings of a class."""
        properties = {name: self._setting(variant, one) for name, one in variant.component.settings.items()}
        return {
            "description": variant.component.meaning,
            "type": ["object", "string", "null"],
            "pattern": FILLED_IN,
            "properties": properties,
            "additionalProperties": False,
        }

    def _union(self, variants: list[Variant]) -> Schema:
        """Return the schema of the settings of any of some classes, each with the options that have it."""
        found: dict[str, list[tuple[Variant, Setting]]] = {}
        for variant in variants:
            for name, setting in variant.component.settings.items():
                found.setdefault(name, []).append((variant, setting))
        properties = {name: _any([self._setting(*owner) for owner in owners]) for name, owners in found.items()}
        return {
            "type": ["object", "string", "null"],
            "pattern": FILLED_IN,
            "properties": properties,
            "additionalProperties": False,
        }

    def _setting(self, variant: Variant, setting: Setting) -> Schema:
        """Return the schema of a setting."""
        said: Schema = {"description": _described(setting)} if setting.meaning else {}
        default = default_of(variant, setting)
        if default is not UNKNOWN and default != "???" and not setting.component:
            said["default"] = default
        known, others = self.tree.members(variant, setting.name)
        if known or others:
            each = {key: self._of(one) for key, one in known.items()}
            mapping = {"type": ["object", "string"], "pattern": FILLED_IN, "properties": each}
            return {**said, **mapping, "additionalProperties": self._of(others)}
        if under := self.tree.under(variant, setting.name):
            return {**said, "allOf": [self._of(under)]}
        if setting.component:
            return said
        return {**said, **_typed(setting.annotation, setting)}


def option_is(variant: Variant, option: Option) -> bool:
    """Return whether an option brings a class."""
    return f"{option.group}={option.name}" in variant.options


def _described(setting: Setting) -> str:
    limits = f" Must be {setting.limits}." if setting.limits and not setting.choices else ""
    unit = f" [{setting.unit}]" if setting.unit else ""
    return f"{setting.sentence}{limits}{unit}\n\n{setting.place}"


def _typed(annotation: ast.expr, setting: Setting) -> Schema:
    """Return the schema of a plain type."""
    if setting.choices:
        return {"anyOf": [{"enum": list(setting.choices)}, {"type": "string", "pattern": FILLED_IN}]}
    match annotation:
        case ast.Name(id=name) if name in TYPES:
            kind = TYPES[name]
            if kind == "string":
                return {"type": kind}
            return {"type": [kind, "string"], "pattern": FILLED_IN, **bounds_of(setting.limits)}
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            schema = _typed(left, setting)
            return {**schema, "type": [*_listed(schema["type"]), "null"]} if "type" in schema else schema
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return {"type": ["array", "string"], "pattern": FILLED_IN, "items": _plain(item)}
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, value])):
            return {"type": ["object", "string"], "pattern": FILLED_IN, "additionalProperties": _plain(value)}
        case _:
            return {}


def _plain(annotation: ast.expr) -> Schema:
    """Return the schema of what a list or a mapping holds."""
    name = annotation.id if isinstance(annotation, ast.Name) else ""
    if name not in TYPES:
        return {}
    return {"type": "string"} if name == "str" else {"type": [TYPES[name], "string"], "pattern": FILLED_IN}


def _any(schemas: list[Schema]) -> Schema:
    """Return the schema of a value that one of several schemas describes; what they say is put together."""
    said = ("description", "default")
    told = {schema["description"]: None for schema in schemas if "description" in schema}
    defaults = _distinct({"default": schema["default"]} if "default" in schema else {} for schema in schemas)
    limits = _distinct({key: what for key, what in schema.items() if key not in said} for schema in schemas)
    together: Schema = {"description": "\n\n".join(told)} if told else {}
    return {
        **together,
        **(defaults[0] if len(defaults) == 1 else {}),
        **(limits[0] if len(limits) == 1 else {"anyOf": limits}),
    }


def _listed(kind: str | list[str]) -> list[str]:
    return [kind] if isinstance(kind, str) else kind


def bounds_of(limits: str) -> Schema:
    """Return the keywords of the limits of a number."""
    said = limits.removesuffix(" and finite")
    found = [(keyword, re.search(pattern, said)) for pattern, keyword in BOUNDS]
    numbers = {keyword: float(match[1]) for keyword, match in found if match}
    return {keyword: int(number) if number.is_integer() else number for keyword, number in numbers.items()}


def _choice(names: list[str]) -> Schema:
    """Return the schema of a choice of options: those that are known complete, others are options of a user's."""
    return {"anyOf": [{"enum": names}, {"type": ["string", "array", "null"]}]}


def _defaults(starts: list[str], overrides: Schema) -> Schema:
    """Return the schema of `defaults`."""
    text = {"anyOf": [{"enum": [*starts, "_self_"]}, {"type": "string"}]}
    mapping = {"type": "object", "properties": overrides}
    meaning = "What the file starts from, in order; `override /GROUP: OPTION` chooses an option."
    return {"description": meaning, "type": "array", "items": {"anyOf": [text, mapping]}}


def _starts_from(texts: list[str]) -> Schema:
    """Return the condition that `defaults` has one of some entries."""
    entry = {"enum": list(dict.fromkeys(texts))}
    return {"required": ["defaults"], "properties": {"defaults": {"contains": entry}}}


def _overrides(group: str, variant: Variant) -> Schema:
    """Return the condition that `defaults` chooses an option that brings a class."""
    names = [option.partition("=")[2] for option in variant.options]
    entry = {"type": "object", "required": [key := f"override /{group}"], "properties": {key: {"enum": names}}}
    return {"required": ["defaults"], "properties": {"defaults": {"contains": entry}}}


def _distinct(schemas: Iterable[Schema]) -> list[Schema]:
    """Return schemas without those that were there already."""
    return list({json.dumps(schema, sort_keys=True, default=str): schema for schema in schemas}.values())
