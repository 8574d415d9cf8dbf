"""fewbits generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits import api
from fewbits.cli.options import Memory, Model


def generate(  # noqa: PLR0913 - as compress
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: int = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: int = 0,
    memory: Memory = None,
    cache: Annotated[str | None, typer.Option(help="What keys and values are kept in, as METHOD or METHOD:field=value,...")] = None,
    cache_tables: Annotated[Path | None, typer.Option(help="The cache method's tables, a file that calibrate wrote for MODEL.")] = None,
) -> None:
    """Write on from a prompt."""
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "memory": memory, "cache": cache, "cache_tables": cache_tables}
    print(api.generate(model, prompt, max_new_tokens=max_new_tokens, **options))
