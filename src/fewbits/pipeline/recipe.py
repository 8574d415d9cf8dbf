"""A plan written down in TOML: a method with its fields, layers that stay dense, layers with another method.

keep = ["*.0.self_attn.*"]

[method]
name = "gptq"
bits = 3

[[overrides]]
layers = "*.down_proj"
name = "rtn"
bits = 8

[embeddings]
name = "rtn"
bits = 8

[head]
name = "gptq"
bits = 4
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from fewbits.core.config import configure, suggest
from fewbits.core.errors import InputError
from fewbits.core.method import Method
from fewbits.core.registry import get_method
from fewbits.pipeline.plan import Plan


def read_recipe(path: Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """The plan in a TOML file; `changes` replace fields of its main method.

    Raises InputError where the file is missing, is no TOML, or says something that is not known.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read ({error.strerror}); a TOML file would be right") from error
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    known = ["method", "keep", "overrides", "embeddings", "head"]
    for name in recipe:
        if name not in known:
            raise InputError(f"{path}: {name!r} is not known in a recipe; {suggest(name, known)}")
    keep = recipe.get("keep", [])
    if not isinstance(keep, list) or not all(isinstance(pattern, str) for pattern in keep):
        raise InputError(f"{path}: keep={keep!r} is not right; a list of patterns of layer names would be")
    overrides = [_override(path, entry) for entry in recipe.get("overrides", [])]
    outside = {name: _method(path, recipe[name], {}) for name in ("embeddings", "head") if name in recipe}
    return Plan(_method(path, recipe.get("method", {}), changes or {}), tuple(keep), tuple(overrides), **outside)


def recipe_text(plan: Plan) -> str:
    """The TOML that `read_recipe` reads as an equal plan; of a method only what differs from its defaults is said."""
    lines = [f"keep = [{', '.join(json.dumps(pattern) for pattern in plan.keep)}]", ""] if plan.keep else []
    lines += ["[method]", *_lines(plan.method)]
    for pattern, method in plan.overrides:
        lines += ["", "[[overrides]]", f"layers = {json.dumps(pattern)}", *_lines(method)]
    outside = {"embeddings": plan.embeddings, "head": plan.head}
    lines += [line for name, one in outside.items() if one is not None for line in ("", f"[{name}]", *_lines(one))]
    return "\n".join(lines) + "\n"


def changed_fields(method: Method) -> dict[str, Any]:
    """The fields that differ from the method's defaults, and its bits, by which it is known."""
    found = {field.name: (getattr(method, field.name), field.default) for field in fields(cast(Any, method))}
    return {name: value for name, (value, default) in found.items() if value != default or name == "bits"}


def _lines(method: Method) -> list[str]:
    return [f"name = {json.dumps(method.name())}", *(f"{name} = {_toml(value)}" for name, value in changed_fields(method).items())]


def _toml(value: Any) -> str:
    """TOML has no word for None; a field that may be None is read from "none"."""
    return json.dumps("none" if value is None else value) if not isinstance(value, float) else repr(value)


def _override(path: Path, entry: dict[str, Any]) -> tuple[str, Method]:
    if not isinstance(entry.get("layers"), str):
        raise InputError(f"{path}: an override needs layers, a pattern of layer names such as '*.down_proj'")
    return entry["layers"], _method(path, {name: value for name, value in entry.items() if name != "layers"}, {})


def _method(path: Path, entry: dict[str, Any], changes: Mapping[str, Any]) -> Method:
    if not isinstance(entry.get("name"), str):
        raise InputError(f"{path}: a method needs a name, such as name = 'gptq'")
    values = {name: value for name, value in entry.items() if name != "name"}
    return configure(get_method(entry["name"]), values | dict(changes))
