"""Explain in one line what Hydra and OmegaConf refuse: what came, what is allowed, how to write it."""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from selfalign.core.errors import SelfalignError

Refusal = HydraException | OmegaConfBaseException

MOST_PLACES = 3
"""Maximum number of suggestions. A key with more owners does not tell which one was meant."""

FUNCTION = "function"
"""Last part of settings that name a function of the user's to be called."""

PLACES = ("name", "output_dir", "hub.repo_id")
"""Settings whose values are free texts. All other keys without a dot choose options."""


def explain_override(error: Refusal, folder: Path) -> str:
    """Return the explanation of an error in the command line, in one line; `folder` is `conf/`."""
    cause = error.__cause__
    said = " ".join(" ".join(str(e) for e in (error, cause) if e is not None).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_option(error.missing_cfg_file, error.options, folder)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _explain_key(cause)
    if override := getattr(error, "override", None):  # Hydra's message does not contain the override.
        return _explain_syntax(override, said)
    if merged := re.match("Error merging override (.*)", str(error)):
        return f"cannot set {merged[1]}: {str(cause).splitlines()[0]}"
    return _explain_ambiguous(said) or said.partition(" Config search path: ")[0]


def no_such(path: str, names: Iterable[str]) -> str:
    """Return a message about an unknown key, with the most similar known key or all known keys."""
    owner, dot, name = path.rpartition(".")
    known = sorted(names)
    if near := get_close_matches(name, known, n=1):
        return f"no {path}; did you mean {owner}{dot}{near[0]}?"
    return f"no {path}; {owner or 'a configuration'} has {', '.join(known) or 'nothing'}"


def _explain_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """Explain an override of an unknown key. If its owner has no similar key, keys of other owners are suggested."""
    path, parent = str(error.full_key), error.parent_node
    names = {str(name) for name in parent} - {"hydra"} if isinstance(parent, DictConfig) else set[str]()
    name = path.rpartition(".")[2]
    if isinstance(parent, DictConfig) and not get_close_matches(name, names):
        others = [found for found in _paths(parent._get_root(), "") if found.rpartition(".")[2] == name]
        if 0 < len(others) <= MOST_PLACES:
            return f"no {path}; did you mean {' or '.join(others)}?"
    return no_such(path, names)


def _paths(node: object, path: str) -> Iterable[str]:
    """Yield every key below a node, except Hydra's own."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for name in node:
        if path or name != "hydra":
            yield f"{path}{name}"
            yield from _paths(node._get_node(name), f"{path}{name}.")


def _explain_option(missing: str, options: Sequence[str] | None, folder: Path) -> str:
    """Explain an option that its group does not have."""
    found = re.match(r"((?:hydra/)?\w+)/(.+)", missing)
    group, name = found.groups() if found else ("", missing)
    known = options or sorted(path.stem for path in (folder / group).glob("*.yaml"))
    if not found:
        return f"no configuration {missing}; there are: {', '.join(known)}"
    near = get_close_matches(name, known, n=1)
    meant = f"did you mean {group}={near[0]}? There are: " if near else "there are: "
    plugin = "; pip install 'selfalign[sweep]'" if re.match("hydra/(launcher|sweeper)$", group) else ""
    return f"no {group}={name}; {meant}{', '.join(known)}{plugin}"


def _explain_syntax(override: str, said: str) -> str:
    """Explain how to write an override that cannot be read; `said` is Hydra's message."""
    if not re.match(r"[+~]*[A-Za-z_][\w.@:/$-]*=", override, re.ASCII):
        return f"cannot read {override!r}: expected key=value or group=option"
    function = re.search(r"while evaluating '.*?': (.*?)(?= See https?:|$)", said)
    reason = f"{function[1]}; " if function else ""
    each = "; in a sweep, quote each value by itself" if "," in override else ""
    return (
        f"cannot read {override!r}: {reason}a text with characters other than letters, digits, spaces and "
        f"/-\\+.$%*@:?| needs quotes, and again for the shell: {_command()} {quoted(override)}{each}"
    )


def _explain_ambiguous(said: str) -> str | None:
    """Explain what an override with commas can mean, if that is Hydra's question."""
    found = re.match(r"Ambiguous value for argument '(.*)' 1\. To use it as a list", said)
    if found is None:
        return None
    key, _, value = found[1].partition("=")
    one_list = shlex.quote(f"{key}=[{value}]")
    return (
        f"{found[1]!r} has several values: add -m for a sweep over them, write {one_list} for a list, or "
        f"{quoted(found[1])} for a text with commas"
    )


def quoted(override: str) -> str:
    """Return an override whose value is one text, quoted for Hydra and for the shell."""
    key, _, value = override.partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return shlex.quote(f"{key}={_in_quotes(value)}")


def as_list(texts: Iterable[str]) -> str:
    """Return texts as a list in Hydra's syntax."""
    return f"[{','.join(_in_quotes(text) for text in texts)}]"


def _in_quotes(text: str) -> str:
    """Return a text in quotes, in Hydra's syntax."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'"{escaped}"'


def check_recorded(overrides: Iterable[str], place: Path, command: Iterable[str] = ()) -> None:
    """Check that the overrides of a run folder only choose existing options, and bring no code of their own.

    Args:
        overrides: those of the run folder.
        place: the folder.
        command: the overrides of the command line, which come after them. A function that these name may be called.

    Raises:
        SelfalignError: one names a folder of options, a class, or a function that the command does not name.
    """
    given = {override.key_or_group for override in OverridesParser.create().parse_overrides(list(command))}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group.lstrip("/")
        is_choice = ("." not in key or "/" in key or override.package is not None) and key not in PLACES
        if re.match(r"(hydra|schema)\b", key) or (is_choice and ".." in str(override.value())):
            raise SelfalignError(
                f"{place}: its setting {override.input_line!r} could bring code of its own, which is not run"
            )
        named = key.rpartition(".")[2] == FUNCTION or _has_key(override.value(), FUNCTION)
        if named and override.key_or_group not in given:
            raise SelfalignError(
                f"{place}: its setting {override.input_line!r} names a function, which is called only if the command "
                f"names it: if it is yours, give {shlex.quote(str(override.input_line).lstrip('+'))}"
            )


def _has_key(value: object, name: str) -> bool:
    """Whether a mapping, or one inside it, has this key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return any(str(key) == name or _has_key(item, name) for key, item in items)


def _command() -> str:
    """Return the name of the running command, "selfalign" or "selfalign-evaluate"."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("selfalign") else "selfalign"
