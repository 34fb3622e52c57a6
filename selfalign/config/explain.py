"""Explain a key of the configuration, a group or an option, as `selfalign --explain` prints it."""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from selfalign.config.options import Option, Options, Tree, Variant, default_of
from selfalign.config.schema import GLOBAL
from selfalign.config.settings import REQUIRED, UNKNOWN, Setting
from selfalign.core.errors import SelfalignError

KINDS = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "Any": "any value"}
LONGEST = 60
"""The most characters of a default that are shown."""


@dataclass(frozen=True)
class Found:
    """A setting, where it stands."""

    variant: Variant
    setting: Setting

    @property
    def default(self) -> str:
        """The default, for a reader."""
        return shown(default_of(self.variant, self.setting))

    @property
    def options(self) -> list[str]:
        """The options that have it."""
        return list(self.variant.options)

    @property
    def changed(self) -> list[str]:
        """What options set instead of the default."""
        given = {
            option: values[self.setting.name]
            for option, values in self.variant.options.items()
            if isinstance(values, dict) and self.setting.name in values
        }
        known = (REQUIRED, default_of(self.variant, self.setting))
        plain = {option: value for option, value in given.items() if not isinstance(value, dict) and value not in known}
        return [f"{option}: {shown(value)}" for option, value in plain.items()]


def explain(key: str, options: Options) -> str:
    """Return the explanation of a key such as `loss.lam`, a group such as `loss`, or an option such as `loss=dpo`.

    Without a key, the top of the configuration is listed.

    Raises:
        SelfalignError: there is no such key or option; the message has the most similar one.
    """
    tree = Tree(options)
    path, chosen, value = key.partition("=")
    if chosen and path in options.groups:
        return _option(tree, path, value)
    if not path:
        return "\n".join(
            ["settings:", *_table([Found(tree.root, one) for one in tree.root.component.settings.values()])]
        )
    if path in GLOBAL:
        return "\n".join([f"{path}: sets model, data and sizes together", "", *_options_of(tree, path)])
    if path in options.groups and "/" in path:
        path = path.replace("/", ".")
    *above, last = path.split(".")
    variants, named = _walk(tree, above)
    if named:
        return "\n".join([path, "", *_listing(named.get(last, named[OTHERS]))])
    found = [Found(one, one.component.settings[last]) for one in variants if last in one.component.settings]
    if not found:
        raise SelfalignError(_no_such(tree, path, variants))
    lines = [path, ""]
    for alike in _alike(found):
        lines += [*_block(tree, alike), ""]
    if (group := path if path in options.groups else path.replace(".", "/")) in options.groups:
        lines += [*_options_of(tree, group), ""]
    below = [one for each in found for one in _below(tree, each)]
    return "\n".join([*lines, *(_listing(below) if below else ())]).rstrip()


def _walk(tree: Tree, names: Sequence[str]) -> tuple[list[Variant], dict[str, list[Variant]]]:
    """Return the classes that may stand at a place, or {name: classes} where it maps names to components.

    Raises:
        SelfalignError: there is no such place, or a plain value stands there.
    """
    variants, named = [tree.root], dict[str, list[Variant]]()
    for index, name in enumerate(names):
        path = ".".join(names[: index + 1])
        if named:
            variants, named = named.get(name, named[OTHERS]), {}
            continue
        owners = [one for one in variants if name in one.component.settings]
        if not owners:
            raise SelfalignError(_no_such(tree, path, variants))
        for one in owners:
            known, others = tree.members(one, name)
            named |= {**known, OTHERS: others} if others else {}
        variants = [below for one in owners for below in tree.under(one, name)]
        if not variants and not named:
            raise SelfalignError(f"{path} has no settings below it: selfalign --explain {path}")
    return variants, named


OTHERS = "…"
"""Stands for any name of a user's own."""


def _below(tree: Tree, found: Found) -> list[Variant]:
    """Return the classes that may stand in a setting, or under any name that it maps to components."""
    return tree.under(found.variant, found.setting.name) or tree.members(found.variant, found.setting.name)[1]


def _no_such(tree: Tree, path: str, variants: list[Variant]) -> str:
    """Return a message about an unknown key, with the most similar known key."""
    above, dot, name = path.rpartition(".")
    names = {setting for variant in variants for setting in variant.component.settings}
    if near := get_close_matches(name, sorted(names), n=1):
        return f"no {path}; did you mean {above}{dot}{near[0]}?"
    places = [place for place in places_of(tree) if place.rpartition(".")[2] == name]
    if 0 < len(places) <= 3:
        return f"no {path}; did you mean {' or '.join(places)}?"
    return f"no {path}; {above or 'a configuration'} has {', '.join(sorted(names)) or 'nothing'}"


def places_of(tree: Tree) -> list[str]:
    """Return every key of the configuration, without those under names of a user's own."""
    found: dict[str, None] = {}

    def visit(variant: Variant, path: str) -> None:
        for name in variant.component.settings:
            found[f"{path}{name}"] = None
            for one in tree.under(variant, name):
                visit(one, f"{path}{name}.")

    visit(tree.root, "")
    return list(found)


# --- text --------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """Return a default as it is written in YAML, shortened."""
    if value is UNKNOWN:
        return "made by the code"
    if isinstance(value, str) and value == REQUIRED:
        return "none: it must be given"
    special = {None: "null", True: "true", False: "false", "": '""'}
    if value is None or isinstance(value, bool) or value == "":
        return special[value]
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()}…"


def kind_of(annotation: ast.expr, setting: Setting) -> str:
    """Return a type in words."""
    match annotation:
        case ast.Name(id="Any") if isinstance(setting.default, int | float):
            return (
                "number, or a list with one for each iteration" if "list" in setting.meaning + setting.limits else "any"
            )
        case ast.Name(id=name):
            return "one of some words" if setting.choices else KINDS.get(name, name)
        case ast.BinOp(left=left):
            return f"{kind_of(left, setting)} or null"
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return f"list of: {kind_of(item, setting)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, item])):
            return f"mapping of names to: {kind_of(item, setting)}"
        case _:
            return setting.kind


def _block(tree: Tree, alike: list[Found]) -> Iterator[str]:
    """Yield the lines about a setting that several options share."""
    setting = alike[0].setting
    yield from _wrapped(setting.sentence, "")
    rows: list[tuple[str, str]] = []
    options = [option for one in alike for option in one.options]
    if options and not _is_all(tree, options):
        rows.append(("in", _grouped(options)))
    inner = _below(tree, alike[0])
    if inner:
        rows.append(("type", "settings, listed below"))
    else:
        unit = f" ({setting.unit})" if setting.unit else ""
        rows.append(("type", f"{kind_of(setting.annotation, setting)}{unit}"))
        changed = list(dict.fromkeys(text for one in alike for text in one.changed))
        rows.append(("default", "; ".join([alike[0].default, *changed])))
    if allowed := ", ".join(setting.choices) or setting.limits:
        rows.append(("allowed", allowed))
    places = dict.fromkeys(f"{one.setting.place} ({one.setting.owner.rpartition('.')[2]})" for one in alike)
    rows.append(("source", ", ".join(places)))
    for name, text in rows:
        yield from _wrapped(text, f"  {name:<9}")


def _is_all(tree: Tree, options: list[str]) -> bool:
    """Return whether these are all options of a group, which need not be told."""
    group = options[0].partition("=")[0]
    return set(options) == {f"{group}={name}" for name in tree.options.groups[group]}


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, without its full stop."""
    return re.split(r"(?<!et al)(?<!eq)\.(?: |$)", text)[0]


def _grouped(options: Iterable[str]) -> str:
    """Return options as `loss=sr_dpo, sr_ipo`."""
    groups: dict[str, list[str]] = {}
    for option in options:
        group, _, name = option.partition("=")
        groups.setdefault(group, []).append(name)
    return "; ".join(f"{group}={', '.join(names)}" for group, names in groups.items())


def _alike(found: Iterable[Found]) -> list[list[Found]]:
    """Return settings in groups of the same meaning, type, default and limits."""
    groups: dict[tuple[str, ...], list[Found]] = {}
    for one in found:
        setting = one.setting
        groups.setdefault((setting.meaning, setting.kind, one.default, setting.limits), []).append(one)
    return list(groups.values())


def _option(tree: Tree, group: str, name: str) -> str:
    """Return the explanation of an option: its comment, and the settings of its class."""
    known = tree.options.groups[group]
    if name not in known:
        near = get_close_matches(name, list(known), n=1)
        meant = f"did you mean {group}={near[0]}? There are: " if near else "there are: "
        raise SelfalignError(f"no {group}={name}; {meant}{', '.join(sorted(known))}")
    option = known[name]
    variants = [one for one in tree.of_group(group) if f"{group}={name}" in one.options]
    if group == "benchmark":
        members, _ = tree.members(tree.root, group)
        variants = [one for key in option.places for one in members.get(key, ())]
    lines = [
        f"{group}={name}",
        "",
        *_wrapped(_comment(option) or (variants[0].component.meaning if variants else ""), ""),
    ]
    lines += _wrapped(str(option.file), "  source   ")
    return "\n".join([*lines, *(["", *_listing(variants)] if variants else ())])


def _comment(option: Option) -> str:
    """Return the comment at the beginning of an option's file."""
    lines: list[str] = []
    for line in option.file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line and not line.startswith("# yaml-language-server"):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def _options_of(tree: Tree, group: str) -> Iterator[str]:
    """Yield a line for each option of a group."""
    yield "options:"
    found = tree.options.groups[group]
    kinds = {option: one.component.meaning for one in tree.of_group(group) for option in one.options}
    width = max(map(len, found), default=0)
    for name, option in sorted(found.items()):
        said = _comment(option) or kinds.get(f"{group}={name}", "")
        yield from _wrapped(first_sentence(said), f"  {name:<{width}}  ")


def _listing(variants: Iterable[Variant]) -> Iterator[str]:
    """Yield a line for each setting of some classes."""
    yield "settings:"
    yield from _table([Found(one, setting) for one in variants for setting in one.component.settings.values()])


def _table(found: list[Found]) -> Iterator[str]:
    """Yield a line for each setting: its name, default and meaning, and the options that have it if not all do."""
    everything = {option for one in found for option in one.options}
    names = {one.setting.name for one in found}
    width = max(map(len, names), default=0)
    for name in dict.fromkeys(one.setting.name for one in found):
        for alike in _alike(one for one in found if one.setting.name == name):
            setting = alike[0].setting
            options = [option for one in alike for option in one.options]
            where = f" [{_grouped(options)}]" if set(options) != everything else ""
            default = "" if setting.component or not setting.meaning else f" ({alike[0].default})"
            yield from _wrapped(f"{first_sentence(setting.meaning)}{default}{where}", f"  {name:<{width}}  ")


def _wrapped(text: str, start: str) -> list[str]:
    """Return a text in lines of the terminal's width, behind a start."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    if not text:
        return [start.rstrip()] if start else []
    return textwrap.wrap(text, max(width, 60), initial_indent=start, subsequent_indent=" " * len(start))
