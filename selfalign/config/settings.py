"""Read the settings of components from their source: name, type, default, limits, meaning, place.

Nothing is imported, so that this takes a fraction of a second and needs no torch, and a package of a user's is read
without being run. A setting's meaning stands in the `Attributes` of its dataclass's docstring, its limits in the
message of the check that refuses other values.
"""

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import PACKAGE

REQUIRED = "???"
"""The default of a setting that must be given: OmegaConf's mark."""

UNKNOWN = object()
"""A value that only running the code would tell."""

ROOT = "selfalign.config.experiment.ExperimentConfig"
CHECKS = {ROOT: "selfalign.config.checks"}
"""{class: module whose functions check it from outside}."""

COUNTED = (
    "candidates|comparisons|demonstrations|documents|examples|instructions|judgements|pairs|prompts|questions|requests|"
    "responses|samples|sequences|steps|tokens|words"
)

UNITS = {
    "name": ((r"_(seconds|nats)$", r"\1"), (r"_(tokens|steps|words|characters|samples|examples|pairs)$", r"\1")),
    "int": (
        (r"\bin (tokens|words|characters)\b", r"\1"),
        (rf"\b(?:number|most|least) (?:of )?(?:\w+ ){{0,2}}?({COUNTED})\b", r"\1"),
        (rf"^(?:\w+ )?({COUNTED})\b", r"\1"),
    ),
    "float": (
        (r"\b(per nat)\b", r"\1"),
        (r"\bin (nats|seconds|units of reward)\b", r"\1"),
        (r"\bshare of\b", "share"),
    ),
}
"""What tells the unit of a number: the end of its name, or the beginning of its meaning."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of a component.

    Attributes:
        name: of the field.
        kind: its type as it is written, without the modules of classes.
        annotation: its type as it is written.
        owner: the class that declares it, with its module.
        default: the value, REQUIRED, or UNKNOWN; {} for the settings of a component, where `default` has what differs
            from the component's own defaults.
        meaning: what the docstring says; empty if it says nothing.
        limits: what a value must be, as the message says that refuses others; empty where no value is refused.
        choices: the allowed words, if there are only these.
        component: the dataclass that it holds; empty for a plain value.
        file: the source file.
        line: number of the line there.
    """

    name: str
    kind: str
    annotation: ast.expr
    owner: str
    default: Any
    meaning: str
    limits: str = ""
    choices: tuple[str, ...] = ()
    component: str = ""
    file: Path
    line: int

    @property
    def unit(self) -> str:
        """The unit of a number, by its name or meaning; empty where neither has one."""
        kind = self.kind.split(" | ")[0]
        kind = "float" if isinstance(self.default, float) else kind
        first = self.meaning.split(". ")[0].split(";")[0]
        for patterns, text in ((UNITS["name"], self.name), (UNITS.get(kind, ()), first)):
            for pattern, unit in patterns if kind in UNITS else ():
                if found := re.search(pattern, text):
                    return found.expand(unit)
        return ""

    @property
    def sentence(self) -> str:
        """The meaning with a capital letter, but not for a symbol: λ stays λ."""
        first = self.meaning[:1]
        return f"{first.upper() if first.isascii() else first}{self.meaning[1:]}"

    @property
    def place(self) -> str:
        """File and line, from the folder of the package on."""
        below = self.file.relative_to(PACKAGE.parent) if self.file.is_relative_to(PACKAGE.parent) else self.file
        return f"{below.as_posix()}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Component:
    """A dataclass whose fields are settings.

    Attributes:
        name: the class with its module.
        meaning: the first paragraph of its docstring.
        settings: {name: setting}, those of its bases first.
        file: the source file.
        line: number of the line there.
    """

    name: str
    meaning: str
    settings: Mapping[str, Setting]
    file: Path
    line: int


@cache
def component(name: str) -> Component:
    """Return the settings of a dataclass.

    Args:
        name: `module.Class`.

    Raises:
        SelfalignError: the module has no source file, or no such class.
    """
    place, _, kind = name.rpartition(".")
    module = Module.at(place)
    node = module.classes.get(kind)
    if node is None:
        raise SelfalignError(f"{place} ({module.file}) has no class {kind}")
    found: dict[str, Setting] = {}
    meanings: dict[str, str] = {}
    for where, base in reversed(list(_bases(module, node))):
        meanings |= _meanings(base)
        for setting in _fields(where, base):
            found[setting.name] = setting
    limits = {**_limits(module, node)}
    for key in found:
        said, choices = limits.get(key, ("", ()))
        found[key] = replace(found[key], meaning=meanings.get(key, ""), limits=said, choices=choices)
        if (options := module.enum(found[key].annotation, found[key].owner)) is not None:
            found[key] = replace(found[key], choices=options)
    summary = (inspect.cleandoc(ast.get_docstring(node) or "")).split("\n\n")[0].replace("\n", " ")
    return Component(name=name, meaning=summary, settings=found, file=module.file, line=node.lineno)


def has_class(name: str) -> bool:
    """Return whether the source of a class can be read."""
    try:
        component(name)
    except SelfalignError:
        return False
    return True


# --- source ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """The source of a module: what its names stand for."""

    name: str
    file: Path
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    values: dict[str, ast.expr] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    @staticmethod
    @cache
    def at(name: str) -> "Module":
        """Read a module.

        Raises:
            SelfalignError: it has no source file, or Python cannot read it.
        """
        file = _file_of(name)
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise SelfalignError(f"{file}: cannot be read: {error}") from error
        module = Module(name, file)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                module.imports.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                module.classes[node.name] = node
            elif isinstance(node, ast.FunctionDef):
                module.functions[node.name] = node
            elif isinstance(node, ast.Assign):
                module.values.update({to.id: node.value for to in node.targets if isinstance(to, ast.Name)})
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                module.values[node.target.id] = node.value
        return module

    def find(self, name: str) -> "tuple[Module, ast.ClassDef | ast.FunctionDef | ast.expr] | None":
        """Return what a name stands for, with the module that defines it; None if that cannot be read."""
        for known in (self.classes, self.functions, self.values):
            if name in known:
                return self, known[name]
        place, original = self.imports.get(name, ("", ""))
        if place.partition(".")[0] in (PACKAGE.name, self.name.partition(".")[0]):
            try:
                return Module.at(place).find(original)
            except SelfalignError:
                return None
        return None

    def enum(self, annotation: ast.expr, owner: str) -> tuple[str, ...] | None:
        """Return the members of the enumeration that a type of `owner` names; None if it names none."""
        module = Module.at(owner.rpartition(".")[0])
        found = module.find(annotation.id) if isinstance(annotation, ast.Name) else None
        if found and isinstance(found[1], ast.ClassDef) and _is_enum(found[1]):
            assigned = [node for node in found[1].body if isinstance(node, ast.Assign)]
            return tuple(to.id for node in assigned for to in node.targets if isinstance(to, ast.Name))
        return None


def _file_of(name: str) -> Path:
    """Return the file of a module, found as Python does and last in the current folder, without importing it."""
    top, *rest = name.split(".")
    if top == PACKAGE.name:
        roots = [PACKAGE]
    else:
        spec = importlib.util.find_spec(top) if top.isidentifier() else None
        here = Path.cwd() / top
        roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else [here]
        if not rest:
            single = Path(spec.origin) if spec and spec.origin else here.with_suffix(".py")
            if single.is_file() and single.suffix == ".py":
                return single
    for root in roots:
        path = root.joinpath(*rest)
        for file in (path.with_suffix(".py") if rest else path / "__init__.py", path / "__init__.py"):
            if file.is_file():
                return file
    raise SelfalignError(f"no source file of the module {name}")


def _bases(module: Module, node: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
    """Yield a class and the classes that it derives from, the nearest first."""
    yield module, node
    for base in node.bases:
        found = module.find(base.id) if isinstance(base, ast.Name) else None
        if found and isinstance(found[1], ast.ClassDef):
            yield from _bases(found[0], found[1])


def _is_enum(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id in ("StrEnum", "Enum") for base in node.bases)


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list]
    return any(isinstance(name, ast.Name) and name.id == "dataclass" for name in names)


def _meanings(node: ast.ClassDef) -> dict[str, str]:
    """Return {attribute: meaning} of the `Attributes` in a docstring."""
    _, _, attributes = (ast.get_docstring(node) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in attributes.splitlines():
        if entry := re.match(r"    (\w+): (.*)", line):
            name = entry[1]
            found[name] = entry[2].strip()
        elif line.startswith("     ") and name:
            found[name] += f" {line.strip()}"
        elif line.strip():
            break
    return found


def _fields(module: Module, node: ast.ClassDef) -> Iterator[Setting]:
    """Yield the fields that a class declares itself, without their meanings."""
    for line in node.body if _is_dataclass(node) else ():
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            written = ast.unparse(line.annotation)
            if not written.startswith("ClassVar") and not _is_derived(line.value):
                yield Setting(
                    name=line.target.id,
                    kind=written,
                    annotation=line.annotation,
                    owner=f"{module.name}.{node.name}",
                    default=_default(module, line.value),
                    meaning="",
                    component=_component_of(module, line.annotation),
                    file=module.file,
                    line=line.lineno,
                )


def _is_derived(value: ast.expr | None) -> bool:
    """Whether a field is no argument of its class."""
    given = {word.arg: word.value for word in value.keywords} if isinstance(value, ast.Call) else {}
    return isinstance(given.get("init"), ast.Constant)


def _component_of(module: Module, annotation: ast.expr) -> str:
    """Return the dataclass that a type names; empty for other types."""
    found = module.find(annotation.id) if isinstance(annotation, ast.Name) else None
    if found and isinstance(found[1], ast.ClassDef) and not _is_enum(found[1]):
        return f"{found[0].name}.{found[1].name}"
    return ""


def _default(module: Module, value: ast.expr | None) -> Any:
    """Return the default of a field, from what stands behind its type."""
    if value is None:
        return REQUIRED
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        given = {word.arg: word.value for word in value.keywords}
        if "default" in given:
            return value_of(module, given["default"])
        return _made(module, given["default_factory"]) if "default_factory" in given else REQUIRED
    return value_of(module, value)


def _made(module: Module, factory: ast.expr) -> Any:
    """Return what a factory of a default makes."""
    if isinstance(factory, ast.Lambda):
        return value_of(module, factory.body)
    if isinstance(factory, ast.Attribute) and factory.attr == "copy":
        return value_of(module, factory.value)
    return value_of(module, ast.Call(func=factory, args=[], keywords=[]))


def value_of(module: Module, node: ast.expr, bound: Mapping[str, Any] | None = None) -> Any:
    """Return the value of an expression of constants; UNKNOWN for any other.

    A call of a dataclass is {argument: value}, a member of an enumeration its name.
    """
    bound = bound or {}
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        pass
    if isinstance(node, ast.Name):
        if node.id in bound:
            return bound[node.id]
        found = module.find(node.id)
        return value_of(found[0], found[1]) if found and isinstance(found[1], ast.expr) else UNKNOWN
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return _sequence(module, node.elts, bound)
    if isinstance(node, ast.Dict):
        keys = [UNKNOWN if key is None else value_of(module, key, bound) for key in node.keys]
        return (
            UNKNOWN
            if UNKNOWN in keys
            else dict(zip(keys, [value_of(module, v, bound) for v in node.values], strict=True))
        )
    if isinstance(node, ast.Attribute):
        return _attribute(module, node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = value_of(module, node.left, bound), value_of(module, node.right, bound)
        return left + right if isinstance(left, str) and isinstance(right, str) else UNKNOWN
    return _called(module, node, bound) if isinstance(node, ast.Call) else UNKNOWN


def _sequence(module: Module, elements: Sequence[ast.expr], bound: Mapping[str, Any]) -> Any:
    """Return a list of values. `*names` of a mapping are its keys."""
    found: list[Any] = []
    for one in elements:
        value = value_of(module, one.value if isinstance(one, ast.Starred) else one, bound)
        if value is UNKNOWN:
            return UNKNOWN
        found += list(value) if isinstance(one, ast.Starred) else [value]
    return found


def _attribute(module: Module, node: ast.Attribute) -> Any:
    """Return a member of an enumeration by name, or a constant or name of a constant in an imported module."""
    if isinstance(node.value, ast.Name):
        found = module.find(node.value.id)
        if found and isinstance(found[1], ast.ClassDef):
            return node.attr if _is_enum(found[1]) else UNKNOWN
    if node.attr == "name" and isinstance(node.value, ast.Attribute) and isinstance(node.value.value, ast.Name):
        place = module.imports.get(node.value.value.id)
        made = Module.at(".".join(place)).values.get(node.value.attr) if place else None
        if isinstance(made, ast.Call) and made.args:
            return value_of(module, made.args[0])
    return UNKNOWN


def _called(module: Module, node: ast.Call, bound: Mapping[str, Any]) -> Any:
    """Return a new list or mapping, or the arguments of a dataclass."""
    if not isinstance(node.func, ast.Name):
        return UNKNOWN
    if node.func.id in ("list", "tuple", "dict") and len(node.args) <= 1:
        given = value_of(module, node.args[0], bound) if node.args else []
        return given if given is UNKNOWN else dict(given) if node.func.id == "dict" else list(given)
    found = module.find(node.func.id)
    if found and isinstance(found[1], ast.ClassDef) and _is_dataclass(found[1]):
        return {word.arg: value_of(module, word.value, bound) for word in node.keywords if word.arg}
    return UNKNOWN


# --- limits ------------------------------------------------------------------------------------------------------

MUST = re.compile(r"(?:[\w.…]*\.)?(\w+) must (?:be|lie) ([^…]+?)(?:[,;] got.*|[,;]|)$")
"""What the message of a check says of a setting: "loss.beta must be above 0, got -1"."""


def _limits(module: Module, node: ast.ClassDef) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return {setting: (what it must be, the allowed words)} by the messages of the checks of a class."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    outside = CHECKS.get(f"{module.name}.{node.name}")
    places: list[tuple[Module, ast.AST]] = [
        (where, method)
        for where, base in _bases(module, node)
        for method in base.body
        if isinstance(method, ast.FunctionDef) and (method.name == "__post_init__" or "check" in method.name)
    ]
    if outside:
        checks = Module.at(outside)
        places += [(checks, function) for function in checks.functions.values()]
    for where, code in places:
        for text in _messages(where, code, {}, set()):
            if (said := MUST.search(text)) and said[1] not in found:
                found[said[1]] = said[2], _words(said[2])
    return found


def _words(limits: str) -> tuple[str, ...]:
    """Return the allowed words, if the limits are a list of words."""
    parts = re.split(r", | or ", limits.replace("one of ", ""))
    plain = len(parts) > 1 and all(re.fullmatch(r"[a-z]\w*", part) for part in parts)
    return tuple(parts) if plain else ()


def _messages(module: Module, code: ast.AST, bound: Mapping[str, Any], seen: set[str]) -> Iterator[str]:
    """Yield the texts of errors in code and in the functions it calls, with "…" for what cannot be told.

    A loop over constants yields one text for each of them.
    """
    if isinstance(code, ast.For):
        for names in _rounds(module, code, bound):
            for line in code.body:
                yield from _messages(module, line, {**bound, **names}, seen)
        return
    if isinstance(code, ast.Call) and isinstance(code.func, ast.Name):
        if code.func.id == "SelfalignError" and code.args:
            yield _text(module, code.args[0], bound)
            return
        found = module.find(code.func.id)
        if found and isinstance(found[1], ast.FunctionDef) and (code.func.id not in seen or code.args):
            names = [argument.arg for argument in found[1].args.args]
            values = [value_of(module, argument, bound) for argument in code.args]
            if len(seen) < MOST_CALLS:
                yield from _messages(found[0], found[1], dict(zip(names, values, strict=False)), {*seen, code.func.id})
    for child in ast.iter_child_nodes(code):
        yield from _messages(module, child, bound, seen)


MOST_CALLS = 3
"""How deep calls of functions are followed."""


def _rounds(module: Module, loop: ast.For, bound: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the names of a loop stand for in each round; one round of unknown names if that cannot be told."""
    names = [name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name)]
    source = loop.iter
    items = isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute) and source.func.attr == "items"
    values = value_of(module, source.func.value if items else source, bound)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(values, dict) and items and len(names) == 2:
        return [dict(zip(names, pair, strict=True)) for pair in values.items()]
    if isinstance(values, list | tuple) and len(names) == 1:
        return [{names[0]: value} for value in values]
    return [dict.fromkeys(names, UNKNOWN)]


def _text(module: Module, node: ast.expr, bound: Mapping[str, Any]) -> str:
    """Return a text with its values filled in, "…" for those that cannot be told."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(module, part.value if isinstance(part, ast.FormattedValue) else part, bound) for part in node.values
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join" and node.args:
        joint, parts = value_of(module, node.func.value), value_of(module, node.args[0], bound)
        known = isinstance(joint, str) and isinstance(parts, list | tuple | dict | set)
        return joint.join(map(str, parts)) if known else "…"
    value = value_of(module, node, bound)
    return "…" if value is UNKNOWN else str(value)
