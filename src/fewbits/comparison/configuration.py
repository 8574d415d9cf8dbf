"""What is compared: methods with their fields, read from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from fewbits.core.config import configure, read_spec
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, LayerMethod, Method
from fewbits.core.registry import get_method
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.recipe import read_recipe


@dataclass(frozen=True)
class Configuration:
    """One row of the table: `name` as it was asked for, and the `plan` that it stands for."""

    name: str
    plan: Plan

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^\w.=-]+", "_", self.name)[:60]

    def arguments(self) -> list[str]:
        """What `fewbits compress` is told to do the same."""
        if self.name.endswith(".toml"):
            return ["--recipe", self.name]
        method, values = read_spec(self.name)
        return ["-m", method, *(part for name, value in values.items() for part in ("--set", f"{name}={value}"))]


def read_configurations(specs: Sequence[str], bits: Sequence[int] = ()) -> list[Configuration]:
    """Configurations from "METHOD", "METHOD:field=value,..." or "RECIPE.toml"; each of `bits` for methods that have such a field.

    A method that names its bits keeps them. Raises InputError for what is not known, compresses no linear layers, or is asked
    for twice.
    """
    if not specs:
        raise InputError("there is nothing to compare; -m METHOD, once for each method, would be right")
    found = [one for spec in specs for one in _read(spec, bits)]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name!r} is asked for twice; every configuration once would be right")
    return found


def _read(spec: str, bits: Sequence[int]) -> list[Configuration]:
    if spec.endswith(".toml"):
        return [Configuration(spec, read_recipe(Path(spec)))]
    name, values = read_spec(spec)
    kind = get_method(name)
    if not issubclass(kind, (LayerMethod, BlockMethod)):
        raise InputError(f"{name} compresses no linear layers of a model; a method of weights, such as gptq, would be right")
    has_bits = "bits" in {field.name for field in fields(cast(Any, kind))} and "bits" not in values
    changes: list[dict[str, str]] = [{"bits": str(width)} for width in bits] if bits and has_bits else [{}]
    return [_configured(name, kind, values | change) for change in changes]


def _configured(name: str, kind: type[Method], values: dict[str, str]) -> Configuration:
    spelled = ",".join(f"{field}={value}" for field, value in values.items())
    return Configuration(f"{name}:{spelled}" if spelled else name, Plan(configure(kind, values)))
