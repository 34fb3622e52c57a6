"""What Hydra and OmegaConf refuse of a command line, said in one line: what came, what there is, how it is written."""

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
"""A key that stands in more places says nothing of which one was meant."""

PLACES = ("name", "output_dir", "hub.repo_id")
"""Settings without a dot in their keys whose values are texts; all others of them choose options."""


def explain_override(error: Refusal, folder: Path) -> str:
    """One line for what is wrong with the command line; `folder` is `conf/`."""
    cause = error.__cause__
    said = " ".join(" ".join(str(e) for e in (error, cause) if e is not None).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_option(error.missing_cfg_file, error.options, folder)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _explain_key(cause)
    if override := getattr(error, "override", None):  # Hydra knows it, but does not say it.
        return _explain_syntax(override, said)
    if merged := re.match("Error merging override (.*)", str(error)):
        return f"cannot set {merged[1]}: {str(cause).splitlines()[0]}"
    return _explain_ambiguous(said) or said.partition(" Config search path: ")[0]


def no_such(path: str, names: Iterable[str]) -> str:
    """An unknown key, with the one that was probably meant, or all that its owner has."""
    owner, dot, name = path.rpartition(".")
    known = sorted(names)
    if near := get_close_matches(name, known, n=1):
        return f"no {path}; did you mean {owner}{dot}{near[0]}?"
    return f"no {path}; {owner or 'a configuration'} has {', '.join(known) or 'nothing'}"


def _explain_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """An override of a key that is not there; where its owner has none like it, it may be another's."""
    path, parent = str(error.full_key), error.parent_node
    names = {str(name) for name in parent} - {"hydra"} if isinstance(parent, DictConfig) else set[str]()
    name = path.rpartition(".")[2]
    if isinstance(parent, DictConfig) and not get_close_matches(name, names):
        others = [found for found in _paths(parent._get_root(), "") if found.rpartition(".")[2] == name]
        if 0 < len(others) <= MOST_PLACES:
            return f"no {path}; did you mean {' or '.join(others)}?"
    return no_such(path, names)


def _paths(node: object, path: str) -> Iterable[str]:
    """Every key below a node but Hydra's own."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for name in node:
        if path or name != "hydra":
            yield f"{path}{name}"
            yield from _paths(node._get_node(name), f"{path}{name}.")


def _explain_option(missing: str, options: Sequence[str] | None, folder: Path) -> str:
    """An option that its group does not have."""
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
    """How an override that cannot be read is written; `said` is what Hydra says of it."""
    if not re.match(r"[+~]*[A-Za-z_][\w.@:/$-]*=", override, re.ASCII):
        return f"cannot read {override!r}: expected key=value or group=option"
    function = re.search(r"while evaluating '.*?': (.*?)(?= See https?:|$)", said)
    reason = f"{function[1]}; " if function else ""
    each = "; in a sweep each of its values by itself" if "," in override else ""
    return (
        f"cannot read {override!r}: {reason}a text with other signs than letters, digits, spaces and /-\\+.$%*@:?| is "
        f"quoted, and once more for the shell: {_command()} {quoted(override)}{each}"
    )


def _explain_ambiguous(said: str) -> str | None:
    """What an override with commas can mean, if that is what Hydra asks about."""
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
    """An override whose value is one text, as Hydra reads it and as a shell passes it on."""
    key, _, value = override.partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return shlex.quote(f"{key}={_in_quotes(value)}")


def as_list(texts: Iterable[str]) -> str:
    """Texts as Hydra reads a list of them."""
    return f"[{','.join(_in_quotes(text) for text in texts)}]"


def _in_quotes(text: str) -> str:
    """A text in quotes, as Hydra reads it."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'"{escaped}"'


def check_recorded(overrides: Iterable[str], place: Path) -> None:
    """Checks that the overrides of a run folder choose among the options that are there, and bring no code of theirs.

    Raises:
        SelfalignError: one names a folder of options, or a class.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group.lstrip("/")
        is_choice = ("." not in key or "/" in key or override.package is not None) and key not in PLACES
        if re.match(r"(hydra|schema)\b", key) or (is_choice and ".." in str(override.value())):
            raise SelfalignError(
                f"{place}: its setting {override.input_line!r} could bring code of its own, which is not run"
            )


def _command() -> str:
    """What the user calls, "selfalign" or "selfalign-evaluate"."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("selfalign") else "selfalign"
