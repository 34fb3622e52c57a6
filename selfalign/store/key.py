"""Keys of artifacts: what enters them, and what is left out."""

from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, Protocol, cast, runtime_checkable

from selfalign.core.files import digest_json
from selfalign.store.source_code import SOURCE, source_code

FORMAT = 5
"""Raised when artifacts of an older selfalign must not be reused."""


@runtime_checkable
class CallsCode(Protocol):
    """A component that calls code from outside besides that of its class."""

    def called_code(self) -> dict[str, str]:
        """Return {file or package: digest of its code}."""
        ...


@runtime_checkable
class Keyed(Protocol):
    """A value that itself says what it counts as in a key, such as an artifact, which counts as its content."""

    def to_key_json(self) -> Any: ...


def key_of(stage: str, inputs: dict[str, Any]) -> str:
    """Return the key of an artifact: 20 hexadecimal digits over all that its result depends on."""
    return digest_json([FORMAT, stage, to_key_json(inputs)])[:20]


def to_key_json(value: Any) -> Any:
    """Return inputs as plain JSON for the key. A dataclass counts as its class and fields.

    A class that is not selfalign's own counts with the code of its package, by which a changed one is another; so does
    a function of the user's that a component calls.
    A field with metadata {"keyed": False} is left out: it changes how fast something is made, but not the result. One
    with {"keyed": "if set"} is left out while it has its default, so that a new setting leaves older keys as they are.
    """
    if isinstance(value, Keyed) and not isinstance(value, type):
        return value.to_key_json()
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        keyed = [f.name for f in fields(value) if _is_keyed(f, getattr(value, f.name))]
        found = source_code(type(value)) | (value.called_code() if isinstance(value, CallsCode) else {})
        code = {SOURCE: found} if found else {}
        return {"class": type(value).__name__, **code, **{name: to_key_json(getattr(value, name)) for name in keyed}}
    if isinstance(value, dict):
        return {str(key): to_key_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_key_json(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of an artifact's key")


def _is_keyed(field: Field[Any], value: Any) -> bool:
    """Whether a field of a dataclass is part of the key."""
    keyed = field.metadata.get("keyed", True)
    if keyed != "if set":
        return keyed
    return value != (field.default if field.default is not MISSING else cast(Any, field.default_factory)())
