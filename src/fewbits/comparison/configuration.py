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
from fewbits.export.foreign import is_compressed
from fewbits.models.source import open_model
from fewbits.pipeline.dense_pass import reads_text
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.recipe import read_recipe


@dataclass(frozen=True)
class Configuration:
    """One row of the table: `name` as it was asked for, and the `plan` that it stands for, or the `place` of a compressed model.

    What lies there was compressed before, here or by others, and is only measured.
    """

    name: str
    plan: Plan | None
    place: Path | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^\w.=-]+", "_", self.name)[:60]

    @property
    def reads_text(self) -> bool:
        """Whether calibration text decides what comes out."""
        return self.plan is not None and reads_text(self.plan)

    def describe(self) -> dict[str, Any]:
        """JSON-able and complete: two configurations of equal descriptions are the same."""
        if self.plan is not None:
            return self.plan.describe()
        assert self.place is not None
        return {"place": str(self.place), "content": open_model(self.place).fingerprint()}

    def labels(self) -> dict[str, str]:
        """What the table says of the method, its family and its paper."""
        if self.plan is None:
            return {"method": self.name, "family": "published", "paper": "compressed before"}
        method = self.plan.method
        return {"method": method.name(), "family": method.family(), "paper": method.paper.title}

    def arguments(self) -> list[str]:
        """What `fewbits compress` is told to do the same; nothing for what was compressed before."""
        if self.plan is None:
            return []
        if self.name.endswith(".toml"):
            return ["--recipe", self.name]
        method, values = read_spec(self.name)
        return ["-m", method, *(part for name, value in values.items() for part in ("--set", f"{name}={value}"))]


def read_configurations(specs: Sequence[str], bits: Sequence[int] = ()) -> list[Configuration]:
    """Configurations from "METHOD", "METHOD:field=value,...", "RECIPE.toml", or where a compressed model lies ("./FOLDER", "FILE.gguf").

    Of methods that have the field, one for each of `bits`.

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
    if spec.endswith(".gguf") or "/" in spec.partition(":")[0]:
        return [_published(spec)]
    name, values = read_spec(spec)
    kind = get_method(name)
    if not issubclass(kind, (LayerMethod, BlockMethod)):
        raise InputError(f"{name} compresses no linear layers of a model; a method of weights, such as gptq, would be right")
    has_bits = "bits" in {field.name for field in fields(cast(Any, kind))} and "bits" not in values
    changes: list[dict[str, str]] = [{"bits": str(width)} for width in bits] if bits and has_bits else [{}]
    return [_configured(name, kind, values | change) for change in changes]


def _published(spec: str) -> Configuration:
    place = Path(spec)
    if not place.exists() or not is_compressed(place):
        what = "is not there" if not place.exists() else "is no compressed model"
        raise InputError(f"{spec} {what}; a folder that compress or export wrote, a .gguf file, or a method's name would be right")
    return Configuration(spec, None, place.absolute())


def _configured(name: str, kind: type[Method], values: dict[str, str]) -> Configuration:
    spelled = ",".join(f"{field}={value}" for field, value in values.items())
    return Configuration(f"{name}:{spelled}" if spelled else name, Plan(configure(kind, values)))
