"""Options that several commands take, and how they are read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import typer
from rich.console import Console

from fewbits.core.config import configure, read_spec, suggest
from fewbits.core.errors import InputError
from fewbits.core.method import Method
from fewbits.core.registry import get_method
from fewbits.core.workers import Workers
from fewbits.pipeline.on_ray import open_workers
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.recipe import read_recipe

out, err = Console(), Console(stderr=True)
_TEXT = "a .txt, .jsonl or .parquet file, a data set owner/name:split on the hub, or builtin:NAME."
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, builtin:tiny-lm, or owner/name on the Hugging Face hub.")]
Text = Annotated[str, typer.Option("--data", help=f"Text: {_TEXT}")]
CalibrationText = Annotated[str, typer.Option("--data", help=f"Calibration text: {_TEXT}")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Inputs = Annotated[
    str | None,
    typer.Option(help="What statistics see: original inputs, or those propagated through compressed blocks; else as the method says."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what time, memory and disk it takes, from one block on a little text.")]
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Spread jobs over a Ray cluster: auto, HOST:PORT, or local for this machine.")
]
Memory = Annotated[str | None, typer.Option(help="Load the most of a stack (bitstack) that fits in this, such as 120MB.")]


def read_pairs(settings: list[str]) -> dict[str, str]:
    """--set name=value, name by name. Raises InputError for one without a value."""
    for setting in settings:
        if "=" not in setting:
            raise InputError(f"--set {setting!r} is not right; name=value would be, for example --set bits=3")
    return dict(cast(tuple[str, str], tuple(setting.split("=", 1))) for setting in settings)


def read_plan(method: str | None, recipe: Path | None, settings: dict[str, str]) -> Plan:
    """The method or the recipe with the settings that go over it. Raises InputError for both or neither."""
    if (method is None) == (recipe is None):
        raise InputError("compress needs a method or a recipe, and not both: -m gptq, or --recipe FILE.toml, would be right")
    if recipe is not None:
        return read_recipe(recipe, settings)
    return Plan(configure(get_method(cast(str, method)), settings))


def read_method(spec: str) -> Method:
    """The method of "NAME" or "NAME:field=value,...". Raises InputError where there is none, or no such field."""
    name, values = read_spec(spec)
    return configure(get_method(name), values)


def read_inputs(name: str | None) -> Literal["propagated", "original"] | None:
    """Raises InputError for a name that is not known."""
    known = ["original", "propagated"]
    if name is not None and name not in known:
        raise InputError(f"--inputs {name!r} is not known; {suggest(name, known)}")
    return cast("Literal['propagated', 'original'] | None", name)


def read_dtype(name: str) -> torch.dtype:
    """Raises InputError for a name that is not known."""
    known = ["float32", "bfloat16", "float16"]
    if name not in known:
        raise InputError(f"--dtype {name!r} is not known; {suggest(name, known)}")
    return cast(torch.dtype, getattr(torch, name))


def workers(address: str | None) -> contextlib.AbstractContextManager[Workers]:
    """Those of `--ray`; jobs that are lost with their node are told of on standard error."""
    return open_workers(address, lambda what: err.print(what, soft_wrap=True))
