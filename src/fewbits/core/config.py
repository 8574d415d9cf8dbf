"""Methods from names and text: the same dataclass fields serve Python, TOML and the command line."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from fewbits.core.errors import InputError

T = TypeVar("T")


def configure(method: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `method` with `values`; a string is read as the field's type.

    Raises InputError for an unknown field (with the nearest known one) or a value of the wrong type.
    """
    types_of = typing.get_type_hints(method)
    known = [field.name for field in fields(typing.cast(Any, method))]
    read = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{_name(method)} has no field {name!r}; {suggest(name, known)}")
        read[name] = _read(f"{_name(method)}: {name}", value, types_of[name])
    return method(**read)


def read_spec(text: str) -> tuple[str, dict[str, str]]:
    """A method's name and its fields from "NAME" or "NAME:field=value,...". Raises InputError for a field without a value."""
    name, _, fields_text = text.partition(":")
    pairs = [pair.partition("=") for pair in fields_text.split(",") if pair]
    for field, equals, _ in pairs:
        if not equals:
            raise InputError(f"{text!r}: the field {field!r} has no value; {name}:{field}=... would be right")
    return name, {field.strip(): value.strip() for field, _, value in pairs}


def suggest(name: str, known: list[str]) -> str:
    """What would be right in place of `name`, as the end of an error's line."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _name(method: type) -> str:
    return method.__name__.lower()


def _read(where: str, value: Any, kind: Any) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if isinstance(value, str):
        for option in options:
            found, result = _parse(value, option)
            if found:
                return result
    elif any(_fits(value, option) for option in options):
        return float(value) if float in options and isinstance(value, int) and not isinstance(value, bool) else value
    raise InputError(f"{where}={value!r} is not right; {' or '.join(_describe(option) for option in options)} would be")


def _parse(text: str, kind: Any) -> tuple[bool, Any]:
    if kind is type(None):
        return text.lower() == "none", None
    if kind is bool:
        return text.lower() in ("true", "false"), text.lower() == "true"
    if typing.get_origin(kind) is Literal:
        return text in typing.get_args(kind), text
    if kind in (int, float):
        try:
            return True, kind(text)
        except ValueError:
            return False, None
    return kind is str, text


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", type(None): "none", str: "a word"}.get(kind, str(kind))
