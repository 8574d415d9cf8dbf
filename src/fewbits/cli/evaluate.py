"""fewbits evaluate."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from fewbits import api
from fewbits.cli.options import Json, Memory, Model, Text, out
from fewbits.data.text import TextSample


def evaluate(  # noqa: PLR0913 - as compress
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Model to compare with, token by token.")] = None,
    data: Text = "builtin:heldout",
    windows: Annotated[int, typer.Option(help="Number of windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    streamed: Annotated[bool, typer.Option("--streamed", help="One block at a time, for models larger than memory.")] = False,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL's perplexity and, with --reference, what was lost."""
    record = api.evaluate(model, reference=reference, text=TextSample(data, windows, seq_len), streamed=streamed, memory=memory)
    if as_json:
        print(json.dumps(record))
        return
    table = Table("measured", "value")
    for name, value in record["results"].items():
        table.add_row(
            name,
            "[" + ", ".join(f"{v:+.5f}" for v in value) + "]"
            if isinstance(value, list)
            else f"{value:.6g}"
            if isinstance(value, float)
            else str(value),
        )
    out.print(table)
