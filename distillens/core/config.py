"""Settings as frozen dataclasses: to JSON, from JSON, from the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from distillens.core.checks import UserError, unknown
from distillens.core.rng import Key

T = TypeVar("T")
_OURS = re.compile(r"distillens(\.[a-z_0-9]+)+")


def describe(value: Any) -> Any:
    """A settings object as JSON: its class under ``is``, then its fields, nested."""
    if isinstance(value, Key):
        return {"is": "key", "key": value.to_json()}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        described = {"is": f"{kind.__module__}.{kind.__qualname__}"}
        for field in fields(value):
            described[field.name] = describe(getattr(value, field.name))
        return described
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a setting of type {type(value).__name__} cannot be written as JSON")


def restore(described: Any) -> Any:
    """The settings object that ``describe`` wrote. Only dataclasses of this package are made.

    Raises:
        UserError: the class is unknown, or a field does not fit it.
    """
    if isinstance(described, list):
        return tuple(restore(item) for item in described)
    if not isinstance(described, Mapping):
        return described
    if "is" not in described:
        return {name: restore(item) for name, item in described.items()}
    if described["is"] == "key":
        return Key.from_json(described["key"])
    module, _, name = str(described["is"]).rpartition(".")
    try:
        kind = getattr(import_module(module), name, None) if _OURS.fullmatch(module) else None
    except ImportError:
        kind = None
    # A module also holds the names that it imports; only its own classes are ours.
    if not (isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module):
        raise UserError("unknown settings", got=repr(described["is"]), expected="a class of distillens")
    known = {field.name for field in fields(kind)}
    values = {key: restore(item) for key, item in described.items() if key != "is"}
    for key in values:
        if key not in known:
            raise unknown(f"setting of {name}", key, known)
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"settings do not fit {name}", got=str(error)) from error


def override(value: T, assignments: Sequence[str], *, like: Any = None) -> T:
    """A settings object with fields set from text: ``steps=500``, ``net.width=64``, ``net=lenet``.

    Text is turned into the field's type. A field that is itself a settings object is reached
    with dots; where its room knows others by name, it may be replaced by one of them, with the settings that fit the data
    ``like``, or its defaults without, and with settings of its own in brackets: ``source=labels(path=attributes.csv)``. A tuple
    of such objects is a list of these: ``judges=convnet,resnet18(width=16 norm=batch)``. All are set at once: fields that must fit each other may come in any order, and of
    a field that is named twice the last counts.

    Raises:
        UserError: there is no such field (with the nearest name), or the text does not fit its type.
    """
    pairs = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(
                "a setting is written NAME=VALUE", got=repr(assignment), fix="--set steps=500, say"
            )
        pairs.append((path.strip().split("."), text.strip()))
    changes: dict[str, Any] = {}
    # What is replaced as a whole comes first: settings inside are those of what comes in its place.
    for names, text in sorted(pairs, key=lambda pair: len(pair[0])):
        _collect(changes, value, names, text, ".".join(names), like)
    return _replaced(value, changes)


def _replaced(owner: T, changes: Mapping[str, Any]) -> T:
    """The settings with collected changes made, the innermost first."""
    if not changes:
        return owner
    made = {
        name: _replaced(change.owner, change) if isinstance(change, _Inner) else change
        for name, change in changes.items()
    }
    return replace(owner, **made)  # type: ignore[type-var]  # settings are dataclasses


class _Inner(dict[str, Any]):
    """Changes to a field that is a settings object itself, and the object: the present one, or one in its place."""

    owner: Any


def _collect(
    changes: dict[str, Any], owner: Any, path: Sequence[str], text: str, whole: str, like: Any
) -> None:
    known = [field.name for field in fields(owner)]
    name, *rest = path
    if name not in known:
        lacking = getattr(type(owner), "lacks", {})  # settings of others that make no sense here, and why
        if name in lacking:
            raise UserError(f"{type(owner).__name__.lower()} has no setting {name!r}: {lacking[name]}")
        raise unknown(f"setting of {type(owner).__name__.lower()}", name, known)
    old = getattr(owner, name)
    named = _by_name(old[0]) if isinstance(old, tuple) and old and is_dataclass(old[0]) else None
    if named is not None and not rest:
        changes[name] = tuple(_one_by_name(part, named, whole, like) for part in _parts(text))
        return
    if not is_dataclass(old):
        if rest:
            raise UserError(f"setting {whole!r}: {name!r} has no settings of its own", got=repr(old))
        changes[name] = _converted(get_type_hints(type(owner))[name], text, whole)
        return
    if name not in changes:
        changes[name] = _Inner()
        changes[name].owner = old
    inner = changes[name]
    if rest:
        _collect(inner, inner.owner, rest, text, whole, like)
        return
    named = _by_name(old)
    if named is None:
        choices = ", ".join(f"{name}.{field.name}" for field in fields(old))
        raise UserError(f"setting {whole!r} holds settings of its own", fix=f"set one of {choices}")
    inner.owner = _one_by_name(text, named, whole, like)


def _parts(text: str) -> list[str]:
    """Names that commas divide; those inside of brackets do not."""
    return [part for part in (found.strip() for found in re.split(r",(?![^(]*\))", text)) if part]


def _one_by_name(text: str, named: Callable[[str, Any], Any], whole: str, like: Any) -> Any:
    """A settings object by its name, with settings of its own in brackets."""
    name, bracket, inner = text.partition("(")
    if bracket and not inner.endswith(")"):
        raise UserError(f"setting {whole!r}: a bracket is not closed", got=repr(text))
    return override(
        named(name.strip(), like), re.split(r"[\s,;]+", inner[:-1].strip()) if inner[:-1].strip() else []
    )


def _by_name(value: Any) -> Callable[[str, Any], Any] | None:
    """How the room that a settings object comes from finds others by name, if it does."""
    module = type(value).__module__
    if not _OURS.fullmatch(module):
        return None
    found: Callable[[str, Any], Any] | None = getattr(import_module(module.rpartition(".")[0]), "named", None)
    return found


def _converted(kind: Any, text: str, whole: str) -> Any:
    """The text as a value of the field's type."""
    if text.lower() == "none" and type(None) in get_args(kind):
        return None  # where a field may be empty, else a word like any other
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
    except PydanticSchemaGenerationError as error:  # settings objects in a tuple, say
        raise UserError(f"setting {whole!r} cannot be written as text", fix="set it from Python") from error
    given: Any = text
    if str(kind).startswith("tuple[tuple"):
        given = [part.split() for part in text.split(",") if part.strip()]
    elif str(kind).startswith("tuple"):
        given = [part for part in re.split(r"[,\s]+", text) if part]
    try:
        return adapter.validate_python(given)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(f"setting {whole!r} does not fit", got=repr(text), expected=reason) from error


def settings_of(value: Any) -> dict[str, Any]:
    """The settings that ``override`` can change, dotted, with their present values."""
    flat: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if is_dataclass(item) and not isinstance(item, type):
            flat |= {f"{field.name}.{name}": inner for name, inner in settings_of(item).items()}
        else:
            flat[field.name] = item
    return flat


def shrunk(value: Any, names: Sequence[str], share: float) -> list[str]:
    """The settings ``names`` (dotted; whole numbers or tuples of them) times ``share``, as ``NAME=VALUE``.

    Rounded up, never below 2 where they were more: two models are the least that have a spread. What stays as it
    is, or is not among the settings, is left out.
    """

    def less(count: int) -> int:
        return min(count, max(2, math.ceil(count * share - 1e-9)))

    flat = settings_of(value)
    found = []
    for name in names:
        old = flat.get(name)
        if isinstance(old, tuple):
            new = ",".join(str(count) for count in dict.fromkeys(map(less, old)))
            text = ",".join(map(str, old))
        elif isinstance(old, int):
            new, text = str(less(old)), str(old)
        else:
            continue
        if new != text:
            found.append(f"{name}={new}")
    return found
